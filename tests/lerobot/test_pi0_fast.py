"""pi0_fast behind the adapter: loss, likelihoods, hidden states, tokens and actions are those of LeRobot's own policy.

Equalities are with LeRobot's classes, loaded by its own `from_pretrained` and fed, fully padded, by its own processors.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.anchors.schema import STEP0_AGREEMENT
from craft_ray.anchors.verify import check_files
from craft_ray.config import Experiment, ModelConfig, parse_config
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.data.source import open_source
from craft_ray.errors import DataError
from craft_ray.lerobot.pi0_fast import SUFFIX, SUFFIX_MASK, PI0Fast
from craft_ray.lerobot.policy import ACTION, LANGUAGE, LANGUAGE_MASK
from craft_ray.lerobot.size import sized
from craft_ray.method.pooling import Vectors
from craft_ray.models import load_model
from craft_ray.models.base import IGNORE
from craft_ray.retention.hidden import Hidden
from craft_ray.retention.reforward import reforward
from craft_ray.retention.token_ce import TokenCE
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.scoring import EvalData, evaluate, open_eval_set
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.configs import data_config
from tests.support.configs import eval_set as make_set
from tests.support.robots import TASKS, small_policy, smooth_chunks, write_dataset

CHUNK = 8
POSITIONS = ("suffix", "vision_mean", "text_last", "all")
SHAPES = {"one": {}, "two": {"cameras": 2}, "empty": {"cameras": 2, "empty_cameras": 1}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One camera, two, and two plus one that the data do not have. Shared: do not write into them."""
    root = tmp_path_factory.mktemp("pi0_fast")
    return {name: small_policy(root / name, **changes) for name, changes in SHAPES.items()}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def loaded(folder: Path, precision: Any = "fp32", **changes: Any) -> PI0Fast:
    model = load_model(ModelConfig(kind="lerobot", path=str(folder), **changes), precision)
    assert isinstance(model, PI0Fast)
    return model


def lerobots(folder: Path) -> tuple[Any, Any, Any]:
    """The policy and its processors, as a user of LeRobot loads them."""
    with sized(folder):
        policy = PI0FastPolicy.from_pretrained(folder)
    return policy, *make_pre_post_processors(policy.config, pretrained_path=str(folder))


def sample(number: int, cameras: int = 2, size: tuple[int, int] = (32, 32), steps: int = 12) -> Sample:
    """Odd ones have the longer prompt; that of number 1 is the longest."""
    random = np.random.default_rng(number)
    path = smooth_chunks(1, steps + 1, 4, seed=number)[0]
    pictures = {
        f"observation.images.camera{i}": random.integers(0, 256, (*size, 3), dtype=np.uint8) for i in range(cameras)
    }
    task = TASKS[number % 2] + " again" * (number == 1)
    return Sample(f"a{number}", task, frame=Frame(pictures, {"observation.state": path[0]}, path[1:]))


def samples(shape: str, count: int = 4, **how: Any) -> list[Sample]:
    return [sample(i, SHAPES[shape].get("cameras", 1), **how) for i in range(count)]


def item(chosen: list[Sample], actions: bool = True) -> dict[str, Any]:
    """What LeRobot's data loader gives."""
    frames = [s.frame for s in chosen if s.frame is not None]
    result: dict[str, Any] = {
        name: torch.stack([torch.tensor(f.images[name]).permute(2, 0, 1).float() / 255 for f in frames])
        for name in frames[0].images
    }
    result["observation.state"] = torch.stack([torch.tensor(f.state["observation.state"]) for f in frames])
    result["task"] = [s.prompt for s in chosen]
    if actions:
        chunks = [np.concatenate([f.actions, np.repeat(f.actions[-1:], CHUNK, 0)])[:CHUNK] for f in frames]
        result[ACTION] = torch.tensor(np.stack(chunks))
    return result


def answered(model: PI0Fast, chosen: list[Sample]) -> list[Any]:
    return [model.preprocess(s, model.response_tokens(s)) for s in chosen]


def pooled(model: PI0Fast, features: list[Any], positions: tuple[str, ...]) -> Vectors:
    batch = model.collate(features, positions)
    assert batch.pooling is not None
    with torch.no_grad():
        return batch.pooling(model.hidden_states(batch, range(model.num_hidden_states)))


def rows_of(vectors: Vectors) -> list[Tensor]:
    """For each sample its vectors [L, V, D], without the padding."""
    return [v[:, valid] for v, valid in zip(vectors.values_BLVD, vectors.valid_BV, strict=True)]


def close(ours: Tensor, theirs: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=within, rtol=within)


@pytest.fixture(scope="module")
def taught(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy trained for a while on the actions of six samples, so that other pictures give other tokens."""
    model = loaded(folders["one"])
    batch = model.collate(answered(model, samples("one", 6)))
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    for _ in range(100):
        model.task_loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught") / "policy"
    model.save(folder)
    return folder


# -- loss and likelihoods


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (20, 60)])
def test_the_loss_is_lerobots_own(shape: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    """On its own batch, padded to the limits of the policy, and with the same gradient."""
    chosen = samples(shape, size=size)
    policy, before, _ = lerobots(folders[shape])
    theirs, _ = policy.forward(before(item(chosen)))
    theirs.backward()
    model = loaded(folders[shape])
    batch = model.collate(answered(model, chosen))
    assert batch.inputs[SUFFIX].shape[1] < policy.config.max_action_tokens
    assert batch.inputs[LANGUAGE].shape[1] < policy.config.tokenizer_max_length
    ours = model.task_loss(batch)
    ours.backward()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    own = dict(policy.named_parameters())
    for name, parameter in model.module.named_parameters():
        close(parameter.grad, own[name].grad)


def test_log_probabilities_of_the_tokens_sum_to_the_loss(shape: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[shape])
    batch = model.collate(answered(model, samples(shape)))
    log_probs, likeliest = model.token_log_probs(batch)
    assert log_probs.shape == likeliest.shape == batch.targets_BP.shape
    assert batch.tokens == int((batch.targets_BP != IGNORE).sum())
    assert -log_probs.sum().item() / batch.tokens == pytest.approx(model.task_loss(batch).item(), abs=1e-5)
    none = batch.targets_BP == IGNORE
    assert none.any()
    assert (log_probs[none] == 0).all()
    assert likeliest[none].all()


def test_micro_batches_weighted_by_their_counts_are_the_whole_batch(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"])
    features = answered(model, samples("one", 5))
    whole, *parts = (model.collate(part) for part in (features, features[:2], features[2:]))
    weighted = sum(model.task_loss(part).item() * part.count for part in parts) / whole.count
    assert weighted == pytest.approx(model.task_loss(whole).item(), abs=1e-5)


def test_a_batch_without_actions_has_no_loss(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"])
    with pytest.raises(DataError, match="no tokens to predict"):
        model.task_loss(model.collate([model.preprocess(s) for s in samples("one")]))


def test_a_suffix_longer_than_the_policys_is_refused_with_both_lengths(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"])
    most = model.settings.max_action_tokens
    model.preprocess(sample(0, 1), [5] * most)
    with pytest.raises(DataError, match=f"sample a0 has {most + 1} suffix tokens.*max_action_tokens is {most}: lower"):
        model.preprocess(sample(0, 1), [5] * (most + 1))


def test_a_prompt_that_is_extended_is_preprocessed_with_its_suffix(shape: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[shape])
    for s in [*samples(shape), *QUESTIONS]:
        prompt = model.preprocess(s)
        for tokens in (model.response_tokens(s), [5], []):
            whole, extended = model.preprocess(s, tokens), model.with_suffix(prompt, tokens, s.where)
            assert extended.layout == whole.layout
            assert extended.layout.length == whole.layout.prompt_length + len(whole.tokens["suffix"])
            for ours, theirs in ((extended.tokens, whole.tokens), (extended.images, whole.images)):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("scale", "words"),
    [(2, r"have more tokens than the policy's max_action_tokens of \d+"), (90, "leave the range.*merge_statistics")],
)
def test_actions_that_the_tokenizer_cannot_encode_are_refused(
    scale: float, words: str, folders: dict[str, Path]
) -> None:
    """FAST itself silently drops a number that it does not know, and the robot would be taught something else."""
    model = loaded(folders["one"])
    frame = sample(0, 1).frame
    assert frame is not None
    actions = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * scale
    with pytest.raises(DataError, match=f"actions of sample wild {words}") as caught:
        model.response_tokens(Sample("wild", TASKS[0], frame=Frame(frame.images, frame.state, actions)))
    assert "\n" not in str(caught.value)


# -- hidden states


def test_hidden_states_are_those_of_lerobots_own_padded_pass(shape: str, folders: dict[str, Path]) -> None:
    """And indexed as in transformers: 0 is the embeddings, the last one follows the final norm."""
    chosen = samples(shape)
    policy, before, _ = lerobots(folders[shape])
    encoded = before(item(chosen))
    core = policy.model
    images, masks = policy._preprocess_images(encoded)
    embedded, real, attention, _, _ = core.embed_prefix_fast(
        images, masks, *(encoded[name] for name in (LANGUAGE, LANGUAGE_MASK, SUFFIX, SUFFIX_MASK))
    )
    with torch.no_grad():
        states = core.paligemma_with_expert.paligemma.model.language_model(
            inputs_embeds=embedded,
            attention_mask=prepare_attention_masks_4d(attention),
            position_ids=torch.cumsum(real, dim=1) - 1,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    model = loaded(folders[shape])
    assert len(states) == model.num_hidden_states == 3
    features = answered(model, chosen)
    everything, suffix = (rows_of(pooled(model, features, (position,))) for position in ("all", "suffix"))
    for row, (f, hidden) in enumerate(zip(features, torch.stack(states, 1), strict=True)):
        own = hidden[:, real[row]]
        prompt = len(f.layout.prompt)
        close(everything[row], own[:, :prompt])
        close(suffix[row], own[:, prompt:-1])  # from BOS to the last token but one


def test_the_vectors_at_the_position_suffix_feed_the_head(shape: str, folders: dict[str, Path]) -> None:
    """The logits of LeRobot's loss are the head's of these vectors, token for token."""
    chosen = samples(shape)
    policy, before, _ = lerobots(folders[shape])
    encoded = before(item(chosen))
    seen: list[Tensor] = []
    policy.model.paligemma_with_expert.paligemma.lm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    policy.forward(encoded)
    model = loaded(folders[shape])
    vectors = rows_of(pooled(model, answered(model, chosen), ("suffix",)))
    for row, own in enumerate(vectors):
        tokens = encoded[SUFFIX][row][encoded[SUFFIX_MASK][row]]
        assert own.shape[1] == len(tokens) - 1
        logits = model._paligemma.lm_head(own[-1])
        close(logits, seen[0][row, : len(tokens) - 1], 1e-4)
        loss = cross_entropy(logits, tokens[1:])
        assert loss.item() == pytest.approx(model.task_loss(model.collate(answered(model, [chosen[row]]))).item(), 1e-4)


def test_the_prompt_does_not_attend_to_the_suffix(shape: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[shape])
    chosen = samples(shape)
    positions = ("all", "vision_mean", "text_last")
    without = rows_of(pooled(model, [model.preprocess(s) for s in chosen], positions))
    with_ = rows_of(pooled(model, answered(model, chosen), positions))
    for one, other in zip(without, with_, strict=True):
        close(one, other)


def test_hidden_states_do_not_depend_on_the_samples_beside_them(shape: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[shape])
    features = answered(model, samples(shape))
    assert len({f.layout.length for f in features}) > 1
    assert len({f.layout.prompt_length for f in features}) > 1
    beside = rows_of(pooled(model, features, POSITIONS))
    for own, f in zip(beside, features, strict=True):
        close(rows_of(pooled(model, [f], POSITIONS))[0], own)


def test_the_values_of_masked_tokens_change_nothing(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"])
    batch = model.collate(answered(model, samples("one")), POSITIONS)
    assert batch.pooling is not None
    layers = range(model.num_hidden_states)
    with torch.no_grad():
        before, loss = rows_of(batch.pooling(model.hidden_states(batch, layers))), model.task_loss(batch)
        for tokens, mask in ((LANGUAGE, LANGUAGE_MASK), (SUFFIX, SUFFIX_MASK)):
            assert not batch.inputs[mask].all()
            batch.inputs[tokens][~batch.inputs[mask]] = 77
        after = rows_of(batch.pooling(model.hidden_states(batch, layers)))
        assert model.task_loss(batch).item() == pytest.approx(loss.item(), abs=1e-6)
    for one, other in zip(before, after, strict=True):
        close(one, other)


def test_an_absent_camera_changes_nothing(folders: dict[str, Path]) -> None:
    """The same weights, with a third camera that the data do not have: neither vectors nor loss nor tokens differ."""
    two, empty = loaded(folders["two"]), loaded(folders["empty"])
    assert two.weights_fingerprint() == empty.weights_fingerprint()
    results = []
    for model in (two, empty):
        features = answered(model, samples("two"))
        results.append((rows_of(pooled(model, features, POSITIONS)), model.task_loss(model.collate(features))))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        close(one, other)
    assert results[0][1].item() == pytest.approx(results[1][1].item(), abs=1e-6)
    prompts = [two.preprocess(s) for s in samples("two")], [empty.preprocess(s) for s in samples("two")]
    assert two.generate(prompts[0], 12) == empty.generate(prompts[1], 12)


# -- tokens


def growing(model: PI0Fast, sample: Sample, stop: int, most: int) -> list[int]:
    """Greedy decoding by complete training passes over one sample without padding."""
    suffix: list[int] = []
    while len(suffix) < most and stop not in suffix:
        f = model.preprocess(sample, [*suffix, 0])
        [hidden] = model.hidden_states(model.collate([f]), [model.num_hidden_states - 1])
        suffix.append(int(model._paligemma.lm_head(hidden[0, -2]).argmax()))
    return suffix


@pytest.mark.parametrize("name", ["empty", "taught"])
def test_generation_is_greedy_under_the_attention_of_training(
    name: str, folders: dict[str, Path], taught: Path
) -> None:
    model = loaded(taught if name == "taught" else folders[name])
    chosen = samples(name if name in SHAPES else "one", 3)
    most = model.settings.max_action_tokens
    with torch.no_grad():
        expected = [growing(model, s, model._end, most) for s in chosen]
    features = [model.preprocess(s) for s in chosen]
    assert model.generate(features, most) == expected
    assert [model.generate([f], most)[0] for f in features] == expected
    assert model.module.training, "the mode was not restored"
    if name == "taught":
        assert all(tokens[-1] == model._end for tokens in expected)


def test_generated_tokens_are_the_likeliest_to_the_loss(folders: dict[str, Path], taught: Path) -> None:
    """LeRobot's own decoding lets the prompt attend to BOS: for an untaught policy it misses the bound of step 0."""
    agreement = {}
    for name, folder in (("untaught", folders["one"]), ("taught", taught)):
        model = loaded(folder)
        chosen = [sample(100 + i, 1) for i in range(16)]
        most = model.settings.max_action_tokens
        features = [model.preprocess(s) for s in chosen]
        theirs = lerobots_tokens(folder, chosen, most)
        for whose, tokens in (("ours", model.generate(features, most)), ("lerobot", theirs)):
            batch = model.collate([model.preprocess(s, t) for s, t in zip(chosen, tokens, strict=True)])
            with torch.no_grad():
                wrong = int((~model.token_log_probs(batch)[1]).sum())
            agreement[name, whose] = 1 - wrong / batch.tokens
    assert agreement["untaught", "ours"] > 0.999
    assert agreement["taught", "ours"] > 0.999
    assert agreement["untaught", "lerobot"] < STEP0_AGREEMENT["fp32"], "LeRobot's own decoding would be good enough"


def lerobots_tokens(folder: Path, chosen: list[Sample], most: int) -> list[list[int]]:
    policy, before, _ = lerobots(folder)
    policy.eval()
    encoded = before(item(chosen, actions=False))
    images, masks = policy._preprocess_images(encoded)
    tokens = policy.model.sample_actions_fast_kv_cache(
        images, masks, encoded[LANGUAGE], encoded[LANGUAGE_MASK], max_decoding_steps=most
    ).tolist()
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")
    return [row[: row.index(end) + 1] if end in row else row for row in tokens]


def test_action_tokens_come_back_as_the_normalised_actions(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"])
    scale = model.policy.action_tokenizer.scale
    for s in samples("one", 8):
        tokens = model.response_tokens(s)
        assert model.decode(tokens).startswith("Action: ")
        assert model._end in tokens
        actions = model.policy.detokenize_actions(torch.tensor(tokens), action_horizon=CHUNK, action_dim=4)
        assert s.frame is not None
        assert s.frame.actions is not None
        assert abs(actions.numpy() - s.frame.actions[:CHUNK]).max() <= 0.5 / scale * CHUNK**0.5 + 1e-6


# -- acting


def test_it_acts_as_lerobot_does(shape: str, folders: dict[str, Path]) -> None:
    """Alone and in a batch, from pictures of another size than the policy's."""
    chosen = samples(shape, size=(40, 24))
    policy, before, after = lerobots(folders[shape])
    model = loaded(folders[shape])
    together = model.act(chosen)
    assert together.shape == (4, CHUNK, 4)
    assert together.dtype == np.float32
    for row, one in enumerate(chosen):
        theirs = after(policy.predict_action_chunk(before(item([one], actions=False)))).numpy()
        np.testing.assert_allclose(together[row], theirs[0], atol=1e-5)
        np.testing.assert_allclose(model.act([one])[0], theirs[0], atol=1e-5)
    assert model.module.training


def test_a_taught_policy_acts_as_lerobot_does_and_as_it_was_taught(taught: Path) -> None:
    chosen = samples("one", 6)
    policy, before, after = lerobots(taught)
    acted = loaded(taught).act(chosen)
    theirs = after(policy.predict_action_chunk(before(item(chosen, actions=False)))).numpy()
    np.testing.assert_allclose(acted, theirs, atol=1e-5)
    wanted = np.stack([s.frame.actions[:CHUNK] for s in chosen if s.frame and s.frame.actions is not None])
    assert abs(acted - wanted).mean() < 0.5 * abs(wanted).mean()


def test_fewer_actions_than_a_chunk_has_are_executed(taught: Path, tmp_path: Path) -> None:
    """LeRobot would decode the tokens of a chunk as if they were that many actions."""
    model, whole = loaded(taught), loaded(taught).act(samples("one"))
    model.settings.n_action_steps = 3
    np.testing.assert_array_equal(model.act(samples("one")), whole[:, :3])
    assert model.settings.n_action_steps == 3


def test_a_policy_that_outputs_nonsense_acts_without_log_lines(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = loaded(folders["one"])
    model.settings.validate_action_token_prefix = True
    for seed in range(3):
        with torch.no_grad():
            torch.manual_seed(seed)
            model._paligemma.lm_head.weight.normal_(std=3.0)
        with caplog.at_level(logging.DEBUG):
            actions = model.act(samples("one"))
        assert np.isfinite(actions).all()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert model.settings.validate_action_token_prefix
    assert logging.root.manager.disable == logging.NOTSET


# -- modes and arithmetic


def test_recomputed_activations_give_the_same_gradients(folders: dict[str, Path]) -> None:
    results = []
    for checkpointing in (False, True):
        model = loaded(folders["empty"], gradient_checkpointing=checkpointing)
        assert model.policy.model.gradient_checkpointing_enabled is checkpointing
        batch = model.collate(answered(model, samples("empty")), POSITIONS)
        assert batch.pooling is not None
        hidden = model.hidden_states(batch, range(model.num_hidden_states))
        anchored = batch.pooling(hidden).values_BLVD.square().mean()
        loss = model.task_loss(batch) + anchored
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for without, with_ in zip(*results, strict=True):
        close(with_, without)


def test_activations_are_recomputed_in_the_backward_pass(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"], gradient_checkpointing=True)
    model.task_loss(model.collate(answered(model, samples("one"))))  # the first pass looks for dropout
    calls: list[None] = []
    model.taps.entries[0].register_forward_hook(lambda *_: calls.append(None))
    loss = model.task_loss(model.collate(answered(model, samples("one"))))
    once = len(calls)
    loss.backward()
    assert len(calls) == 2 * once


def test_arithmetic_in_bfloat16_stays_near(folders: dict[str, Path]) -> None:
    chosen = samples("empty")
    exact, short = (loaded(folders["empty"], precision) for precision in ("fp32", "bf16"))
    losses = [model.task_loss(model.collate(answered(model, chosen))) for model in (exact, short)]
    assert losses[1].dtype == torch.float32
    assert losses[0].item() != losses[1].item()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    ours, theirs = (rows_of(pooled(model, answered(model, chosen), POSITIONS)) for model in (short, exact))
    for one, other in zip(ours, theirs, strict=True):
        assert ((one.float() - other).norm() / other.norm()).item() < 2e-2
    losses[1].backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in short.module.parameters() if p.grad is not None)
    assert all(len(tokens) == 9 for tokens in short.generate([short.preprocess(s) for s in chosen], 9))
    assert np.isfinite(short.act(chosen)).all()


def test_weights_in_bfloat16_run(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"], "bf16", dtype="bfloat16")
    assert model._paligemma.lm_head.weight.dtype == torch.bfloat16
    batch = model.collate(answered(model, samples("one")))
    log_probs, _ = model.token_log_probs(batch)
    loss = model.task_loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(-log_probs.sum().item() / batch.tokens, rel=1e-2)
    assert len(model.generate([model.preprocess(sample(0, 1))], 5)[0]) == 5


def test_training_mode_is_the_mode_of_the_teacher(folders: dict[str, Path]) -> None:
    """Nothing is random in it, and no method of the model changes it."""
    model = loaded(folders["one"])
    batch = model.collate(answered(model, samples("one")), POSITIONS)
    layers = range(model.num_hidden_states)
    with torch.no_grad():
        training = [model.task_loss(batch), *model.hidden_states(batch, layers)]
        again = [model.task_loss(batch), *model.hidden_states(batch, layers)]
        assert model.module.training
        model.module.eval()
        still = [model.task_loss(batch), *model.hidden_states(batch, layers)]
        assert not model.module.training
        model.generate([model.preprocess(sample(0, 1))], 3)
        model.act([sample(0, 1)])
        assert not model.module.training
    for one, two, three in zip(training, again, still, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_the_taps_are_gone_after_a_pass(folders: dict[str, Path]) -> None:
    model = loaded(folders["one"])
    model.hidden_states(model.collate([model.preprocess(sample(0, 1))]), [0, 1, 2])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()]
    assert sum(hooks) == 0


# -- a cache


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demonstrations"
    return write_dataset(root, episodes=3, frames=(4, 6, 5), cameras=("camera0", "camera1"), task=TASKS)


def experiment(model: Path, data: Path, folder: Path, changes: dict[str, Any] | None = None) -> Experiment:
    tree = {
        "output_dir": str(folder / "runs"),
        "model": {"kind": "lerobot", "path": str(model)},
        "task": {"path": str(data)},
        "anchors": {
            "source": {"path": str(data)},
            "modes": ["hidden", "token_ce"],
            "positions": list(POSITIONS),
            "layers": [0, 1, -1],
            "batch_size": 5,
            "rows_per_shard": 8,
            "max_new_tokens": 24,
        },
        "craft": {"anchor_cache_dir": str(folder / "anchors"), "anchor_batch_size": 4},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test").changed(changes or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("suffix_from", ["teacher", "response"])
def test_an_untouched_student_gives_what_is_in_the_cache(
    precision: str, suffix_from: str, folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """In other batches than the teacher's, in training mode, and with recomputed activations."""
    config = experiment(
        folders["empty"], data, tmp_path, {"train.precision": precision, "anchors.suffix_from": suffix_from}
    )
    build(config, say=lambda _: None)
    folder = tmp_path / "anchors"
    manifest = read_manifest(folder)
    assert (manifest.identity.inputs, manifest.identity.layers) == ("frames", (0, 1, 2))
    check_files(folder, manifest)
    student = loaded(folders["empty"], precision, gradient_checkpointing=True)
    agreement = reforward(folder, manifest, config, student, 15)
    assert agreement.rows == 15
    if precision == "fp32":
        assert agreement.distance is not None
        assert agreement.distance < 1e-7
        assert agreement.equal_tokens == (agreement.tokens or 0)
    anchors = open_anchors(folder, manifest)
    Hidden(student, anchors, manifest.identity.layers, POSITIONS).check_untouched(range(15), 4)
    TokenCE(student, anchors).check_untouched(range(15), 4)
    assert student.module.training


def trained(config: Experiment, path: Path) -> RunFolder:
    run = RunFolder(path)
    run.begin(config, ["test"])
    train(config, run, OneWorker(), NullObserver())
    return run


def test_a_run_starts_at_its_teacher_and_learns(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    config = experiment(folders["two"], data, tmp_path, {"craft.anchor_holdout": 0.25})
    build(config, say=lambda _: None)
    for mode, at_first in (("hidden", 1e-6), ("token_ce", 8.0)):
        changes = {"craft.retention_mode": mode, "craft.epsilon_start": 0.001, "train.accumulate": 2}
        run = trained(config.changed(changes), tmp_path / mode)
        records = run.read_metrics()
        assert records[0]["craft/retention_loss"] < at_first
        assert all(np.isfinite(record["train/loss"]) for record in records)
        result = run.finished()
        assert result is not None
        assert result["retention_loss"] > 0
        policy, _, _ = lerobots(run.checkpoints / "last" / "model")
        student = loaded(run.checkpoints / "last" / "model")
        assert all(torch.equal(value, student.module.state_dict()[name]) for name, value in policy.state_dict().items())
        assert student.weights_fingerprint() != loaded(folders["two"]).weights_fingerprint()


def test_a_cache_needs_no_room_for_bos(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """LeRobot's own limit counts what is generated after it."""
    most = loaded(folders["two"]).settings.max_action_tokens
    build(experiment(folders["two"], data, tmp_path, {"anchors.max_new_tokens": most}), say=lambda _: None)
    more = experiment(folders["two"], data, tmp_path / "more", {"anchors.max_new_tokens": most + 1})
    with pytest.raises(DataError, match=f"{most + 1} suffix tokens.*lower max_new_tokens"):
        build(more, say=lambda _: None)


def test_action_tokens_that_do_not_end_are_reported(
    folders: dict[str, Path], taught: Path, data: Path, tmp_path: Path
) -> None:
    """For a teacher with random weights, and for one that may generate too few; not for one that ends them."""

    def warnings(model: Path, source: Path, **changes: Any) -> list[str]:
        lines: list[str] = []
        anchors = {f"anchors.{key}": value for key, value in changes.items()}
        own = {"task.path": str(source), "anchors.source.path": str(source)}
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        build(experiment(model, data, folder, own | anchors), say=lines.append)
        return [line for line in lines if "may be cut off" in line]

    (line,) = warnings(folders["two"], data)
    assert line.startswith("the action tokens of 15 of 15 anchors fill anchors.max_new_tokens=24")
    assert "random weights" in line
    assert not warnings(folders["two"], data, suffix_from="response")
    one = write_dataset(tmp_path / "one", episodes=1, cameras=("camera0",), task=TASKS)
    most = loaded(taught).settings.max_action_tokens
    assert len(warnings(taught, one, max_new_tokens=2)) == 1
    assert not warnings(taught, one, max_new_tokens=most)


def test_action_tokens_of_demonstrations_have_a_perplexity(folders: dict[str, Path], data: Path) -> None:
    model = loaded(folders["two"])
    eval_set = make_set(data=data_config(path=str(data)), metric="perplexity", batch_size=4)
    source = open_eval_set(eval_set, "evaluation.old")
    score = evaluate(EvalData(model, source, eval_set), OneWorker())
    frames = open_source(data_config(path=str(data)), "task")
    batch = model.collate(answered(model, [frames[i] for i in range(len(frames))]))
    with torch.no_grad():
        assert np.log(score.value) == pytest.approx(model.task_loss(batch).item(), abs=1e-4)


# -- questions about a picture


def png(number: int, size: tuple[int, int] = (30, 20)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


QUESTIONS = [
    Sample("q0", "open or close?", image=png(0), response="close", choices=("open", "close")),
    Sample("q1", "is it the drawer", image=png(1, (32, 32)), response="yes it is", choices=("no", "yes it is", "or")),
    Sample("q2", "drawer?", image=png(2, (9, 40)), response="a", choices=("a", "the drawer | is closed")),
]


def log_likelihood(folder: Path, question: Sample, answer: str) -> float:
    """Of an answer after [picture | BOS question line break], by LeRobot's modules alone, without padding."""
    policy, _, _ = lerobots(folder)
    tokenizer = policy._paligemma_tokenizer
    picture = Image.open(io.BytesIO(question.image or b""))
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None].float() / 255
    images, masks = policy._preprocess_images({"observation.images.camera0": pixels})

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    question_ids = torch.tensor([[tokenizer.bos_token_id, *ids(question.prompt + "\n")]])
    answer_ids = torch.tensor([[*ids(answer), tokenizer.eos_token_id]])
    embedded, real, attention, _, _ = policy.model.embed_prefix_fast(
        images,
        masks,
        question_ids,
        torch.ones_like(question_ids).bool(),
        answer_ids,
        torch.ones_like(answer_ids).bool(),
    )
    with torch.no_grad():
        (hidden, _), _ = policy.model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(attention),
            position_ids=torch.cumsum(real, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=False,
        )
        logits = policy.model.paligemma_with_expert.paligemma.lm_head(hidden[0, -answer_ids.shape[1] - 1 : -1])
    return -cross_entropy(logits, answer_ids[0], reduction="sum").item()


def test_the_likelihood_of_an_answer_is_that_of_all_of_its_tokens(shape: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[shape])
    batch = model.collate(answered(model, QUESTIONS))
    log_probs, _ = model.token_log_probs(batch)
    expected = [log_likelihood(folders[shape], q, str(q.response)) for q in QUESTIONS]
    assert log_probs.sum(1).tolist() == pytest.approx(expected, abs=1e-4)
    assert batch.tokens == sum(len(model.response_tokens(q)) for q in QUESTIONS)
    assert model.task_loss(batch).item() == pytest.approx(-sum(expected) / batch.tokens, abs=1e-5)


def test_answers_are_generated_without_bos_and_end_where_text_ends(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["empty"])
    features = answered(model, QUESTIONS)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    for _ in range(60):
        model.task_loss(model.collate(features)).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [model.preprocess(q) for q in QUESTIONS]
    answers = model.generate(prompts, 16)
    assert answers == [model.response_tokens(q) for q in QUESTIONS]
    assert [model.decode(tokens) for tokens in answers] == [q.response for q in QUESTIONS]
    with torch.no_grad():
        stop = model.tokenizer.eos_token_id
        assert answers == [growing(model, q, stop, 16) for q in QUESTIONS]


def test_the_picture_of_a_question_is_seen_by_the_first_camera(folders: dict[str, Path]) -> None:
    """Its picture gives the image tokens of a frame with the same picture."""
    model = loaded(folders["empty"])
    question = model.preprocess(QUESTIONS[0])
    assert len(question.layout.image_tokens) == 16
    assert len(question.layout.absent) == 2 * 16
    pixels = np.asarray(Image.open(io.BytesIO(QUESTIONS[0].image or b"")))
    seen = dict.fromkeys(model.cameras, pixels)
    frame = Sample("f", TASKS[0], frame=Frame(seen, {"observation.state": np.zeros(4, np.float32)}))
    embeddings = []
    for features in (question, model.preprocess(frame)):
        [hidden] = model.hidden_states(model.collate([features]), [0])
        embeddings.append(hidden[0, :16])
    close(*embeddings)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Sample("q", "which?", response="a"), "sample q has no image.*columns.image"),
        (Sample("q", "which?", image=b"no", response="a"), "sample q: its image of 2 bytes does not decode"),
        (Sample("q", "which? " * 99, image=png(0), response="a"), r"question of sample q has \d{3} tokens.*is \d+: "),
        (Sample("q", "which?", image=png(0)), "sample q has no response.*columns.response"),
    ],
)
def test_an_invalid_question_is_refused_in_one_line(question: Sample, words: str, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=words) as caught:
        answered(loaded(folders["one"]), [question])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines file, with the paths of the pictures."""
    root = tmp_path_factory.mktemp("questions")
    rows = []
    for question in QUESTIONS:
        (root / f"{question.id}.png").write_bytes(question.image or b"")
        choices = list(question.choices or ())
        row = {"image_path": f"{question.id}.png", "question": question.prompt, "choices": choices}
        rows.append(row | {"answer_index": choices.index(str(question.response))})
    path = root / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = {"image": "image_path", "prompt": "question", "choices": "choices", "answer_index": "answer_index"}


def test_choices_are_scored_from_a_file_of_questions(folders: dict[str, Path], questions: Path) -> None:
    eval_set = make_set(data=data_config(path=str(questions), columns=COLUMNS), metric="choice", batch_size=2)
    model = loaded(folders["empty"])
    score = evaluate(EvalData(model, open_eval_set(eval_set, "evaluation.old"), eval_set), OneWorker())
    margins = []
    for question in QUESTIONS:
        found = {c: log_likelihood(folders["empty"], question, c) for c in question.choices or ()}
        right = found.pop(str(question.response))
        margins.append(right - max(found.values()))
    assert score.value == sum(margin > 0 for margin in margins) / 3
    assert [record["margin"] for record in score.records] == pytest.approx(margins, abs=1e-4)


def test_questions_are_anchors_of_what_the_language_model_knows(
    folders: dict[str, Path], data: Path, questions: Path, tmp_path: Path
) -> None:
    """While actions are learnt, the teacher's answers are retained."""
    source = {"anchors.source": {"path": str(questions), "columns": COLUMNS}}
    config = experiment(folders["empty"], data, tmp_path, source | {"anchors.max_new_tokens": 6})
    two = experiment(folders["two"], data, tmp_path).task
    config = config.changed({"model.path": str(folders["two"]), "task": two.model_dump()})
    build(config, say=lambda _: None)
    manifest = read_manifest(tmp_path / "anchors")
    assert manifest.identity.inputs == "raw"
    agreement = reforward(tmp_path / "anchors", manifest, config, loaded(folders["two"]), 3)
    assert agreement.distance is not None
    assert agreement.distance < 1e-7
    assert agreement.tokens == agreement.equal_tokens > 0
    for mode in ("hidden", "token_ce"):
        held = config.changed({"craft.retention_mode": mode, "craft.epsilon_start": config.craft.epsilon_start})
        records = trained(held, tmp_path / mode).read_metrics()
        assert len(records) == 3
        assert all(np.isfinite(record["craft/retention_loss"]) for record in records)


# -- the same through a saved folder


def test_a_saved_policy_is_the_same_here_and_in_lerobot(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_of: Callable[[Path], float]
) -> None:
    model = loaded(taught)
    model.save(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    again = loaded(Path("saved"))
    assert again.weights_fingerprint() == model.weights_fingerprint()
    assert again.preprocessor_fingerprint() == model.preprocessor_fingerprint()
    assert loss_of(tmp_path / "saved") == loss_of(taught)


@pytest.fixture
def loss_of() -> Callable[[Path], float]:
    def loss(folder: Path) -> float:
        policy, before, _ = lerobots(folder)
        return float(policy.forward(before(item(samples("one"))))[0].detach())

    return loss
