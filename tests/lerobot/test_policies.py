"""ACT, pi05 and smolvla behind the adapter: features as LeRobot has them, its own loss and actions, what is refused.

Equalities are with LeRobot's own classes, loaded by its own `from_pretrained` and fed by its own processors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import load_file, save_file

from craft_ray.anchors.build import identity_of
from craft_ray.config import Experiment, ModelConfig, parse_config
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.data.source import open_source
from craft_ray.errors import ConfigError, CraftError, ModelError
from craft_ray.lerobot.policy import ACTION, IS_PAD, LANGUAGE, LeRobotPolicy
from craft_ray.method.pooling import Vectors
from craft_ray.models import load_model
from craft_ray.models.capabilities import packing_model, tensor_model, token_model
from craft_ray.models.dropout import disable_dropout
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.robots import TASKS, small_policy, write_dataset
from tests.support.robots_others import (
    CHUNK,
    EXECUTED,
    small_act,
    small_pi05,
    small_pi05_sizes,
    small_smolvla,
    write_vlm,
)

MAKERS = {"act": small_act, "pi05": small_pi05, "smolvla": small_smolvla}
KINDS = tuple(MAKERS)
VLAS = ("pi05", "smolvla")


@pytest.fixture(autouse=True)
def pi05_is_small() -> Iterator[None]:
    with small_pi05_sizes():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each type, with two cameras; pi05 and smolvla have one more that the data do not have. Shared."""
    root = tmp_path_factory.mktemp("policies")
    return {
        kind: make(root / kind, cameras=2, **({} if kind == "act" else {"empty_cameras": 1}))
        for kind, make in MAKERS.items()
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def loaded(folder: Path, precision: Any = "fp32", **changes: Any) -> LeRobotPolicy:
    model = load_model(ModelConfig(kind="lerobot", path=str(folder), **changes), precision)
    assert isinstance(model, LeRobotPolicy)
    return model


def lerobots(folder: Path) -> tuple[Any, Any, Any]:
    """The policy and its processors, as a user of LeRobot loads them. Dropout is off, as it is in ours."""
    config = get_policy_class(json.loads((folder / "config.json").read_text())["type"]).config_class.from_pretrained(
        folder
    )
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    disable_dropout(policy)
    return policy, *make_pre_post_processors(config, pretrained_path=str(folder))


def sample(number: int, task: str = TASKS[0], cameras: int = 2, steps: int | None = 5, side: int = 64) -> Sample:
    random = np.random.default_rng(number)
    pictures = {
        f"observation.images.camera{i}": random.integers(0, 256, (side, side, 3), np.uint8) for i in range(cameras)
    }
    state = {"observation.state": random.uniform(-1, 1, 4).astype(np.float32)}
    actions = None if steps is None else random.uniform(-1, 1, (steps, 4)).astype(np.float32)
    return Sample(f"a{number}", task, frame=Frame(pictures, state, actions))


def batched(samples: list[Sample]) -> dict[str, Any]:
    """What LeRobot's data loader would give."""
    frames = [s.frame for s in samples if s.frame is not None]
    item: dict[str, Any] = {
        name: torch.stack([torch.tensor(f.images[name]).permute(2, 0, 1).float() / 255 for f in frames])
        for name in frames[0].images
    }
    item["observation.state"] = torch.stack([torch.tensor(f.state["observation.state"]) for f in frames])
    item["task"] = [s.prompt for s in samples]
    if frames[0].actions is not None:
        chunks = [np.concatenate([f.actions, np.repeat(f.actions[-1:], CHUNK, 0)])[:CHUNK] for f in frames]
        item[ACTION] = torch.tensor(np.stack(chunks))
        item[IS_PAD] = torch.tensor([[step >= len(f.actions) for step in range(CHUNK)] for f in frames])
    return item


SAMPLES = [sample(0), sample(1, TASKS[1] + " and then close it again"), sample(2, TASKS[1], steps=12)]


def positions_of(kind: str) -> tuple[str, ...]:
    return ("all", "vision_mean") if kind == "act" else ("all", "vision_mean", "text_last")


def pooled(model: LeRobotPolicy, samples: list[Sample], positions: tuple[str, ...]) -> Vectors:
    batch = model.collate([model.preprocess(s) for s in samples], positions)
    assert batch.pooling is not None
    with torch.no_grad():
        return batch.pooling(model.hidden_states(batch, range(model.num_hidden_states)))


def lerobots_hidden(folder: Path, samples: list[Sample]) -> list[Tensor]:
    """For each sample the hidden states [L, S, D] of its prompt's tokens, without the adapter."""
    policy, before, _ = lerobots(folder)
    policy.eval()
    batch = before(batched(samples))
    if policy.name == "act":
        states: list[Tensor] = []
        encoder = policy.model.encoder
        encoder.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        encoder.layers[0].register_forward_hook(lambda _, __, output: states.append(output))
        encoder.register_forward_hook(lambda _, __, output: states.append(output))
        policy.predict_action_chunk(batch)
        return list(torch.stack(states).permute(2, 0, 1, 3))
    words, mask = batch[LANGUAGE], batch["observation.language.attention_mask"]
    if policy.name == "pi05":
        images, masks = policy._preprocess_images(batch)
        text = policy.model.paligemma_with_expert.paligemma.model.language_model
        embedded, real, attention = policy.model.embed_prefix(images, masks, words, mask)
    else:
        images, masks = policy.prepare_images(batch)
        text = policy.model.vlm_with_expert.vlm.model.text_model
        state = policy.prepare_state(batch)
        embedded, real, attention = policy.model.embed_prefix(images, masks, words, mask, state=state)
    with torch.no_grad():
        states = text(
            inputs_embeds=embedded,
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(real, attention)),
            position_ids=torch.cumsum(real, dim=1) - 1,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    own = torch.stack(states, 1)
    if policy.name == "smolvla":
        real[:, -1] = False  # the state
    return [hidden[:, seen] for hidden, seen in zip(own, real, strict=True)]


# -- features


def test_features_have_the_shape_that_the_positions_give(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind])
    vectors = pooled(model, SAMPLES, positions_of(kind))
    layouts = [model.preprocess(s).layout for s in SAMPLES]
    prompts = [len(layout.prompt) for layout in layouts]
    means = len(positions_of(kind)) - 1
    assert vectors.values_BLVD.shape == (3, model.num_hidden_states, max(prompts) + means, model.hidden_size)
    assert vectors.valid_BV.sum(1).tolist() == [count + means for count in prompts]
    pictures = {"act": 2 * 4, "pi05": 2 * 16, "smolvla": 2 * 4}[kind]
    assert [len(layout.image_tokens) for layout in layouts] == [pictures] * 3
    assert model.module.training


def test_features_are_those_of_lerobots_own_pass(kind: str, folders: dict[str, Path]) -> None:
    """With LeRobot's own padding, up to the longest prompt that the policy takes."""
    model = loaded(folders[kind])
    vectors = pooled(model, SAMPLES, positions_of(kind))
    for row, theirs in enumerate(lerobots_hidden(folders[kind], SAMPLES)):
        tokens = theirs.shape[1]
        ours = vectors.values_BLVD[row]
        torch.testing.assert_close(ours[:, :tokens], theirs, atol=1e-5, rtol=1e-4)
        image = list(model.preprocess(SAMPLES[row]).layout.image_tokens)
        most = vectors.valid_BV.shape[1] - len(positions_of(kind)) + 1
        torch.testing.assert_close(ours[:, most], theirs[:, image].mean(1), atol=1e-5, rtol=1e-4)
        if kind != "act":
            torch.testing.assert_close(ours[:, most + 1], theirs[:, -1], atol=1e-5, rtol=1e-4)


def test_special_tokens_around_pictures_are_counted(tmp_path: Path) -> None:
    folder = small_smolvla(tmp_path / "policy", cameras=2, add_image_special_tokens=True)
    model = loaded(folder)
    image = model.preprocess(SAMPLES[0]).layout.image_tokens
    assert image == (2, 3, 4, 5, 9, 10, 11, 12)
    ours = pooled(model, SAMPLES[:1], ("all",)).values_BLVD[0]
    torch.testing.assert_close(ours, lerobots_hidden(folder, SAMPLES[:1])[0], atol=1e-5, rtol=1e-4)


def test_a_fixed_length_of_the_prompt_changes_no_feature(tmp_path: Path) -> None:
    """LeRobot pads to it after the state."""
    plain, fixed = (loaded(small_smolvla(tmp_path / f"p{n}", prefix_length=n)) for n in (-1, 64))
    ours, theirs = (pooled(model, [sample(0, cameras=1)], positions_of("smolvla")) for model in (plain, fixed))
    assert torch.equal(ours.values_BLVD, theirs.values_BLVD)
    assert fixed.settings.prefix_length == 64


def test_features_do_not_depend_on_the_texts_beside_them(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind])
    alone = pooled(model, SAMPLES[:1], positions_of(kind))
    beside = pooled(model, SAMPLES, positions_of(kind))
    ours, theirs = (v.values_BLVD[0][:, v.valid_BV[0]] for v in (alone, beside))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", VLAS)
def test_features_do_not_depend_on_what_an_empty_camera_holds(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folders[kind])
    before = pooled(model, SAMPLES, positions_of(kind)).values_BLVD
    name = "_preprocess_images" if kind == "pi05" else "prepare_images"
    own = getattr(model.policy, name)

    def filled(inputs: Any) -> Any:
        images, masks = own(inputs)
        assert [mask.all().item() for mask in masks] == [True, True, False]
        return [*images[:2], torch.randn_like(images[2])], masks

    monkeypatch.setattr(model.policy, name, filled)
    assert torch.equal(pooled(model, SAMPLES, positions_of(kind)).values_BLVD, before)
    absent = model.preprocess(SAMPLES[0]).layout.absent
    assert len(absent) == len(model.preprocess(SAMPLES[0]).layout.image_tokens) / 2


@pytest.mark.parametrize("kind", VLAS)
def test_the_taps_see_the_same_in_the_joint_training_pass(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind])
    batch = model.collate([model.preprocess(s) for s in SAMPLES], ("all",))
    assert batch.pooling is not None
    layers = range(model.num_hidden_states)
    with model.taps.capture(layers) as seen:
        model.task_loss(batch)
    assert sorted(seen) == list(layers)
    prompt = model.hidden_states(batch, layers)
    ours, theirs = (batch.pooling([states[k] for k in layers]) for states in (prompt, seen))
    valid = ours.valid_BV[:, None, :, None]
    torch.testing.assert_close(ours.values_BLVD * valid, theirs.values_BLVD * valid, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1])
def test_the_features_of_act_depend_neither_on_actions_nor_on_chance(layer: int, folders: dict[str, Path]) -> None:
    """In training, its latent is sampled around an encoding of its actions."""
    model = loaded(folders["act"], disable_dropout=False)
    ours, again = pooled(model, SAMPLES, ("all",)), pooled(model, SAMPLES, ("all",))
    without = pooled(model, [sample(0, steps=None)], ("all",))
    assert torch.equal(ours.values_BLVD, again.values_BLVD)
    torch.testing.assert_close(ours.values_BLVD[:1, layer], without.values_BLVD[:, layer], atol=1e-5, rtol=1e-4)


def test_a_retention_gradient_reaches_what_the_features_come_from(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind])
    batch = model.collate([model.preprocess(s) for s in SAMPLES], ("all",))
    assert batch.pooling is not None
    batch.pooling(model.hidden_states(batch, [model.num_hidden_states - 1])).values_BLVD.square().mean().backward()
    reached = {n for n, p in model.module.named_parameters() if p.grad is not None and p.grad.any()}
    parts = {
        "act": (
            ("backbone", "encoder_robot_state", "model.encoder.layers.1"),
            ("vae_encoder", "decoder", "action_head"),
        ),
        "pi05": (("vision_tower", "embed_tokens", "language_model.layers.1"), ("gemma_expert", "action_in_proj")),
        "smolvla": (("vision_model", "embed_tokens", "text_model.layers.1"), ("lm_expert", "state_proj")),
    }
    for wanted in parts[kind][0]:
        assert any(wanted in name for name in reached), wanted
    for spared in parts[kind][1]:
        assert not any(name.startswith(f"model.{spared}") or f".{spared}." in name for name in reached), spared


def test_recomputed_activations_give_the_same_gradient(folders: dict[str, Path]) -> None:
    gradients = []
    for recompute in (False, True):
        model = loaded(folders["pi05"], gradient_checkpointing=recompute)
        batch = model.collate([model.preprocess(s) for s in SAMPLES], ("all",))
        assert batch.pooling is not None
        loss = batch.pooling(model.hidden_states(batch, [1, 2])).values_BLVD.square().mean()
        torch.manual_seed(0)
        (loss + model.task_loss(batch)).backward()
        gradients.append({n: p.grad for n, p in model.module.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)


def test_arithmetic_in_bfloat16_stays_near(kind: str, folders: dict[str, Path]) -> None:
    exact, short = (pooled(loaded(folders[kind], p), SAMPLES, ("all",)).values_BLVD.float() for p in ("fp32", "bf16"))
    error = (exact - short).square().mean() / exact.square().mean()
    assert 0 < error < 1e-3
    model = loaded(folders[kind], "bf16")
    loss = model.task_loss(model.collate([model.preprocess(s) for s in SAMPLES]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# -- loss and actions


def test_the_loss_is_lerobots_own(kind: str, folders: dict[str, Path]) -> None:
    policy, before, _ = lerobots(folders[kind])
    policy.train()
    batch = before(batched(SAMPLES))
    model = loaded(folders[kind])
    ours = model.collate([model.preprocess_task(s) for s in SAMPLES])
    assert torch.equal(ours.inputs[IS_PAD], batch[IS_PAD])
    torch.manual_seed(7)
    theirs = policy.forward(batch)[0]
    torch.manual_seed(7)
    loss = model.task_loss(ours)
    torch.testing.assert_close(loss, theirs, atol=1e-6, rtol=1e-5)
    loss.backward()
    theirs.backward()
    gradients = dict(policy.named_parameters())
    for name, parameter in model.module.named_parameters():
        assert (parameter.grad is None) == (gradients[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("kind", "terms"), [("act", 5 + 5 + 8), ("pi05", 3), ("smolvla", 5 + 5 + 8)])
def test_a_batch_counts_what_its_loss_is_a_mean_of(kind: str, terms: int, folders: dict[str, Path]) -> None:
    """Two of the episodes end within the chunk; pi05 counts the actions after the end, the others do not."""
    model = loaded(folders[kind])
    batch = model.collate([model.preprocess(s) for s in SAMPLES])
    assert batch.count == model.terms(batch.inputs) == terms


def test_micro_batches_weighted_by_their_counts_are_the_whole_batch(tmp_path: Path) -> None:
    model = loaded(small_act(tmp_path, cameras=2, use_vae=False))
    whole, *parts = (model.collate([model.preprocess(s) for s in part]) for part in (SAMPLES, SAMPLES[:1], SAMPLES[1:]))
    mean = sum(model.task_loss(part).item() * part.count for part in parts) / whole.count
    assert model.task_loss(whole).item() == pytest.approx(mean, rel=1e-5)


def test_it_acts_as_lerobot_does(kind: str, folders: dict[str, Path]) -> None:
    observed = [sample(n, SAMPLES[n].prompt, steps=None) for n in range(3)]
    policy, before, after = lerobots(folders[kind])
    model = loaded(folders[kind])
    torch.manual_seed(3)
    policy.reset()
    batch = before(batched(observed))
    theirs = torch.stack([after(policy.select_action(batch)) for _ in range(EXECUTED)], 1)
    torch.manual_seed(3)
    ours = model.act(observed)
    assert ours.shape == (3, EXECUTED, 4)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert model.module.training


def test_an_act_that_averages_over_time_steps_is_refused(tmp_path: Path) -> None:
    model = loaded(small_act(tmp_path, temporal_ensemble_coeff=0.01, n_action_steps=1))
    with pytest.raises(ConfigError, match=r"temporal_ensemble_coeff 0\.01.*set it to null") as caught:
        model.act([sample(0, cameras=1)])
    assert one_line(caught.value)


# -- folders


def test_a_saved_policy_loads_in_lerobot_and_here(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders[kind])
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += 0.01
    folder = tmp_path / "saved"
    model.save(folder)
    policy, *_ = lerobots(folder)
    ours = model.module.state_dict()
    assert policy.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in policy.state_dict().items())
    again = loaded(folder)
    assert again.weights_fingerprint() == model.weights_fingerprint() != loaded(folders[kind]).weights_fingerprint()
    assert again.preprocessor_fingerprint() == model.preprocessor_fingerprint()
    as_checkpoint = load_model(model.config, "fp32", weights=str(folder))
    assert as_checkpoint.weights_fingerprint() == model.weights_fingerprint()


def test_weights_that_the_folder_replaces_are_not_downloaded(folders: dict[str, Path], tmp_path: Path) -> None:
    """Training from scratch started with weights from the hub, and the configuration still names them."""
    act = small_act(tmp_path / "act")
    edit(act / "config.json", pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1")
    smolvla = small_smolvla(tmp_path / "smolvla")
    edit(smolvla / "config.json", load_vlm_weights=True)
    for folder in (act, smolvla):
        stored = load_file(folder / "model.safetensors")
        state = loaded(folder).module.state_dict()
        assert all(torch.equal(state[name], value) for name, value in stored.items())


def test_a_smolvla_published_in_bfloat16_is_trained_in_float32(tmp_path: Path) -> None:
    write_vlm(tmp_path / "policy_vlm", dtype="bfloat16")
    folder = small_smolvla(tmp_path / "policy")
    file = folder / "model.safetensors"
    stored = {name: value + 1e-4 for name, value in load_file(file).items()}
    save_file({name: value.float() for name, value in stored.items()}, file)
    state = loaded(folder).module.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], value.float()) for name, value in stored.items())


@pytest.mark.parametrize("kind", ["act", "smolvla"])
@pytest.mark.parametrize("setting", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_a_setting_that_a_type_lacks_is_not_ignored(
    kind: str, setting: dict[str, Any], folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=f"model.{next(iter(setting))} is .* type {kind} supports only") as caught:
        loaded(folders[kind], **setting)
    assert one_line(caught.value)


@pytest.mark.parametrize("kind", ["diffusion", "pi0"])
def test_another_type_is_refused_with_the_supported_ones(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": kind}))
    with pytest.raises(
        ConfigError, match=f"a policy of type {kind}, but model.kind lerobot supports pi0_fast, pi05"
    ) as caught:
        loaded(tmp_path)
    assert one_line(caught.value)


# -- data


def test_data_are_checked_for_the_inputs_of_the_policy(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind])
    shapes: dict[str, tuple[int, ...]] = {**model.features, ACTION: (4,)}
    model.check_source(source(shapes))
    camera = "observation.images.camera1"
    for wrong, words in (
        ({n: s for n, s in shapes.items() if n != camera}, f"has no {camera}.*rename"),
        (shapes | {ACTION: (7,)}, r"action is \[7\] in the data.*takes \[4\]"),
        (None, f"the data is not a LeRobotDataset, but a policy of type {kind}"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            model.check_source(source(wrong))
        assert one_line(caught.value)
    other_size = source(shapes | {camera: (3, 96, 96)})
    if kind == "act":
        with pytest.raises(ConfigError, match=r"\[3, 96, 96\]"):
            model.check_source(other_size)
    else:
        model.check_source(other_size)


def source(features: dict[str, tuple[int, ...]] | None) -> Any:
    return SimpleNamespace(features=features, name="the data")


# -- what they do not have


def test_action_tokens_are_refused_with_the_type_and_the_remedy(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind])
    for ask in (
        lambda: token_model(model),
        lambda: model.check_anchors(["token_ce"], ["all"]),
        lambda: model.check_anchors(["hidden"], ["suffix"]),
    ):
        with pytest.raises(
            ConfigError, match=rf"type {kind} has no action tokens: .*anchors.modes=\[hidden\]"
        ) as caught:
            ask()
        assert one_line(caught.value)
    model.check_anchors(["hidden"], model.default_positions)
    with pytest.raises(ConfigError, match=f"no robot frames, which a policy of type {kind} needs") as caught:
        tensor_model(model)
    assert one_line(caught.value)
    with pytest.raises(ValueError, match=f"a policy of type {kind} cannot be packed"):
        packing_model(model)


def test_a_cache_of_action_tokens_is_refused_before_anything_is_computed(
    kind: str, folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeRobotPolicy, "encode", lambda *_: pytest.fail("a sample was preprocessed"))
    config = experiment(folders[kind], data, tmp_path, {"anchors.modes": ["hidden", "token_ce"]})
    with pytest.raises(ConfigError, match=f"type {kind} has no action tokens") as caught:
        build(config, say=lambda _: None)
    assert one_line(caught.value)
    assert not (tmp_path / "anchors").exists()


@pytest.mark.parametrize("kind", VLAS)
def test_a_policy_whose_expert_alone_is_trained_has_nothing_to_anchor(kind: str, data: Path, tmp_path: Path) -> None:
    folder = MAKERS[kind](tmp_path / "policy", cameras=2, train_expert_only=True)
    model = loaded(folder)
    config = experiment(folder, data, tmp_path)
    with pytest.raises(
        ConfigError, match=f"only the action expert of this {kind} is trained .*train_expert_only"
    ) as caught:
        identity_of(config, model, open_source(config.task, "task"))
    assert one_line(caught.value)
    model.task_loss(model.collate([model.preprocess(SAMPLES[0])])).backward()  # plain fine-tuning is possible


def test_a_part_that_was_frozen_after_the_cache_was_built_is_reported(data: Path, tmp_path: Path) -> None:
    """The weights are still the teacher's, but no gradient reaches what is anchored."""
    folder = small_smolvla(tmp_path / "policy", cameras=2)
    config = experiment(folder, data, tmp_path)
    build(config, say=lambda _: None)
    edit(folder / "config.json", train_expert_only=True)
    with pytest.raises(ConfigError, match="only the action expert of this smolvla is trained"):
        trained(config, tmp_path / "run")
    trained(config.changed({"craft.enabled": False}), tmp_path / "baseline")


# -- a whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of six frames. Shared."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", 2, 6, 64, ("camera0", "camera1"), task=TASKS)


def experiment(model: Path, data: Path, folder: Path, changes: dict[str, Any] | None = None) -> Experiment:
    tree = {
        "output_dir": str(folder / "runs"),
        "model": {"kind": "lerobot", "path": str(model)},
        "task": {"path": str(data)},
        "anchors": {"source": {"path": str(data)}, "modes": ["hidden"], "positions": ["all"], "batch_size": 5},
        "craft": {"anchor_cache_dir": str(folder / "anchors"), "anchor_batch_size": 4, "anchor_holdout": 0.25},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test").changed(changes or {})


def trained(config: Experiment, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(config, ["test"])
    train(config, folder, OneWorker(), NullObserver())
    return folder


def test_a_run_starts_at_its_teacher_and_learns(
    kind: str, folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """The first step's L_ret is only the rounding of the storage: noise, latent and actions do not enter."""
    config = experiment(folders[kind], data, tmp_path)
    identity = build(config, say=lambda _: None).manifest.identity
    assert (identity.inputs, identity.rows) == ("frames", 12)
    run = trained(config, tmp_path / "runs" / "run")
    records = run.read_metrics()
    assert records[0]["craft/retention_loss"] < 1e-6
    assert records[-1]["craft/retention_loss"] > 1e-5
    assert all(np.isfinite(record["train/loss"]) for record in records)
    result = run.finished()
    assert result is not None
    assert result["retention_loss"] > 0
    student, *_ = lerobots(run.checkpoints / "last" / "model")
    assert not torch.equal(
        *(torch.cat([p.flatten() for p in m.parameters()]) for m in (student, lerobots(folders[kind])[0]))
    )


@pytest.mark.parametrize("kind", VLAS)
def test_the_same_run_gives_the_same_weights(kind: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Even though noise and times are drawn at random."""
    config = experiment(folders[kind], data, tmp_path, {"anchors.positions": None})
    build(config, say=lambda _: None)
    weights = []
    for name in ("one", "two"):
        run = trained(config, tmp_path / name)
        weights.append((run.checkpoints / "last" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# -- helpers


def one_line(error: CraftError) -> bool:
    return "\n" not in error.message and len(error.message) < 400


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- dropout that no module declares -----------------------------------------------------------------------------


def mutter(model: LeRobotPolicy, first: str, always: bool = False) -> None:
    """Give a layer dropout in its own code, under no name that could be looked for."""
    layer: Any = model.module.get_submodule(first)
    quiet = layer.forward
    layer.forward = lambda x: nn.functional.dropout(quiet(x), 0.5, layer.training or always)


def first_layer(model: LeRobotPolicy) -> str:
    """The layer that its forward pass runs first."""
    order: list[str] = []
    for name, part in model.module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.register_forward_pre_hook(lambda _part, _, name=name: order.append(name))
    results(model)
    return order[0]


def results(model: LeRobotPolicy) -> tuple[Tensor, Tensor]:
    batch = model.collate([model.preprocess_task(s) for s in (sample(0), sample(1, TASKS[1]))], ("all",))
    torch.manual_seed(5)
    with torch.no_grad():
        return model.task_loss(batch), model.hidden_states(batch, [1])[0]


@pytest.mark.parametrize("name", ["pi0_fast", *KINDS])
def test_dropout_that_no_attribute_declares_is_off(name: str, tmp_path: Path) -> None:
    folder = {"pi0_fast": small_policy, **MAKERS}[name](tmp_path / "policy", cameras=2)
    expected, first, model = results(loaded(folder)), first_layer(loaded(folder)), loaded(folder)
    mutter(model, first)
    for _ in range(2):
        found = results(model)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert all(part.training for part in model.module.modules())
    noisy = loaded(folder, disable_dropout=False)
    mutter(noisy, first)
    assert not torch.equal(results(noisy)[0], expected[0])


def test_randomness_that_cannot_be_turned_off_is_refused(folders: dict[str, Path]) -> None:
    first, model = first_layer(loaded(folders["pi05"])), loaded(folders["pi05"])
    mutter(model, first, always=True)
    with pytest.raises(ModelError, match=f"{first} draws random numbers in evaluation mode, too"):
        results(model)
