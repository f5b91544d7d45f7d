"""Policy folders: what does not load completely is refused in one line, what is saved loads again, statistics stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.processor import NormalizerProcessorStep
from safetensors.torch import load_file, save_file

from craft_ray.config import Experiment, ModelConfig, parse_config
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.data.source import open_source
from craft_ray.errors import CacheRefused, ConfigError, CraftError, DataError, ModelError
from craft_ray.lerobot.pi0_fast import PI0Fast
from craft_ray.lerobot.processors import Processors, merge_statistics
from craft_ray.lerobot.size import SIZE_FILE, sized
from craft_ray.lerobot.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER, write_text_tokenizer
from craft_ray.models import load_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.robots import TASKS, small_policy, small_size, smooth_chunks, write_dataset

PREPROCESSOR = "policy_preprocessor.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not write into it."""
    return small_policy(tmp_path_factory.mktemp("robot") / "policy")


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, at another path than the one it was made for."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def loaded(folder: Path | str, **changes: Any) -> PI0Fast:
    model = load_model(ModelConfig(kind="lerobot", path=str(folder), **changes), "fp32")
    assert isinstance(model, PI0Fast)
    return model


def refused(kind: type[CraftError], words: str, folder: Path | str, **changes: Any) -> None:
    """The error is one line, of exactly this type, and names the folder."""
    with pytest.raises(CraftError, match=words) as caught:
        loaded(folder, **changes)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def sample(number: int = 0) -> Sample:
    path = smooth_chunks(1, 10, 4, seed=number)[0]
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    frame = Frame({"observation.images.camera0": pixels}, {"observation.state": path[0]}, path[1:])
    return Sample(f"a{number}", TASKS[number % 2], frame=frame)


def loss(model: PI0Fast, count: int = 3) -> float:
    features = [model.preprocess_task(s) for s in map(sample, range(count))]
    return float(model.task_loss(model.collate(features)).detach())


# -- what is not a policy


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    refused(ConfigError, "there is no such folder: specify one, or a policy on the hub", tmp_path / "nowhere")
    refused(ConfigError, "no such folder, and no such policy on the hub or in its local cache", "somebody/nothing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not the folder of a LeRobot policy.*config.json"),
        ("{", "is not the folder of a LeRobot policy.*config.json"),
        ("[1]", "is not the folder of a LeRobot policy.*config.json"),
        ("{}", "a model without a policy type.*pi0_fast, pi05, smolvla, act"),
        ('{"architectures": ["LlamaForCausalLM"]}', "a model without a policy type.*another model.kind"),
        ('{"type": "diffusion"}', "a policy of type diffusion.*pi0_fast, pi05, smolvla, act"),
        ('{"type": "pi0_fast", "no_such_field": 1}', "its config.json is not LeRobot's"),
        ('{"type": "pi0_fast", "chunk_size": "many"}', "its config.json is not LeRobot's"),
    ],
)
def test_a_config_of_an_unknown_policy(content: str | None, words: str, own: Path) -> None:
    (own / "config.json").unlink()
    if content is not None:
        (own / "config.json").write_text(content)
    refused(ConfigError, words, own)


def test_a_policy_without_pictures(own: Path) -> None:
    edit(own / "config.json", lambda config: config["input_features"].pop("observation.images.camera0") and None)
    refused(ConfigError, "names no camera, but a pi0_fast needs one", own)


# -- weights


def without_weights(own: Path) -> None:
    (own / "model.safetensors").unlink()


def truncated(own: Path) -> None:
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_safetensors(own: Path) -> None:
    (own / "model.safetensors").write_bytes(b"weights")


def resaved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(own: Path) -> None:
        state = load_file(own / "model.safetensors")
        change(state)
        save_file(state, own / "model.safetensors")

    return damage


def another_size(own: Path) -> None:
    edit(own / SIZE_FILE, lambda size: size | {"mlp": size["mlp"] * 2})


NORM = "model.paligemma_with_expert.paligemma.model.language_model.norm.weight"
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_weights, "has no model.safetensors: the policy would be random"),
        (truncated, "its weights are damaged"),
        (not_safetensors, "its weights are damaged"),
        (resaved(lambda state: state.pop(NORM)), f"1 weights are missing .*{NORM}"),
        (resaved(lambda state: state.update({"model.more": torch.zeros(2)})), "1 weights are unknown .*model.more"),
        (resaved(lambda state: state.update({NORM: torch.zeros(7)})), f"1 weights have another shape .*{NORM}"),
        (another_size, r"\d+ weights have another shape"),
        (resaved(dict.clear), r"\d+ weights are missing"),
    ],
)
def test_weights_that_do_not_load_completely(damage: Callable[[Path], None], words: str, own: Path) -> None:
    damage(own)
    refused(ModelError, words, own)


def test_the_embedding_is_the_stored_one_and_not_the_heads(own: Path) -> None:
    """LeRobot updates the names of older checkpoints, and replaces a separate embedding by the head's weights."""
    stored = load_file(own / "model.safetensors")
    assert not torch.equal(stored[EMBEDDING], stored[HEAD])
    ours = loaded(own).module.state_dict()
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_an_older_checkpoint_that_holds_only_the_head_shares_it(own: Path) -> None:
    """Names without `model.` in front, and no embedding: PaliGemma's is tied to its head."""

    def older(state: dict[str, Any]) -> None:
        state.pop(EMBEDDING)
        for name in list(state):
            state[name.removeprefix("model.")] = state.pop(name)

    resaved(older)(own)
    ours = loaded(own).module.state_dict()
    assert torch.equal(ours[EMBEDDING], ours[HEAD])


def test_weights_of_another_folder_with_the_configuration_of_this_one(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    with torch.no_grad():
        model._paligemma.lm_head.weight.mul_(2)
    model.save(tmp_path / "checkpoint")
    config = ModelConfig(kind="lerobot", path=str(folder))
    again = load_model(config, "fp32", weights=str(tmp_path / "checkpoint"))
    assert again.weights_fingerprint() == model.weights_fingerprint() != loaded(folder).weights_fingerprint()
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        load_model(config, "fp32", weights=str(tmp_path / "nowhere"))


# -- processors and tokenizers


def without_preprocessor(own: Path) -> None:
    (own / PREPROCESSOR).unlink()


def without_postprocessor(own: Path) -> None:
    (own / "policy_postprocessor.json").unlink()


def unknown_step(own: Path) -> None:
    edit(own / PREPROCESSOR, lambda pipeline: pipeline["steps"].append({"registry_name": "no_such_step", "config": {}}))


@pytest.mark.parametrize("damage", [without_preprocessor, without_postprocessor, unknown_step])
def test_processors_that_do_not_load(damage: Callable[[Path], None], own: Path) -> None:
    damage(own)
    refused(ConfigError, "its processors do not load .*save the policy with LeRobot 0.6", own)


def statistics_file(own: Path, which: str = "preprocessor") -> Path:
    [file] = own.glob(f"policy_{which}_step_*_*normalizer_processor.safetensors")
    return file


@pytest.mark.parametrize(
    ("which", "lost"),
    [("preprocessor", "observation.state"), ("preprocessor", "action"), ("postprocessor", "action")],
)
def test_a_normaliser_without_statistics(which: str, lost: str, own: Path) -> None:
    """LeRobot would leave the feature unscaled."""
    file = statistics_file(own, which)
    save_file({name: value for name, value in load_file(file).items() if not name.startswith(lost)}, file)
    refused(ModelError, rf"its normaliser has no statistics of {lost} \(min, max\), which it scales by MIN_MAX", own)


def test_a_normaliser_with_the_statistics_of_another_scaling(own: Path) -> None:
    """Mean and deviation are not a range."""
    file = statistics_file(own)
    renamed = {name.replace("min", "mean").replace("max", "std"): value for name, value in load_file(file).items()}
    save_file(renamed, file)
    refused(ModelError, r"its normaliser has no statistics of \S+ \(min, max\), which it scales by MIN_MAX", own)


def test_a_text_tokenizer_with_more_tokens_than_the_policy(own: Path) -> None:
    shutil.rmtree(own / TEXT_TOKENIZER)
    write_text_tokenizer(own / TEXT_TOKENIZER, TASKS, 1400, 512)
    refused(ConfigError, "its text tokenizer .* has 1400 tokens, but the policy has 1280: specify", own)


def test_a_text_tokenizer_without_the_tokens_around_a_suffix(own: Path) -> None:
    edit(own / TEXT_TOKENIZER / "tokenizer_config.json", lambda config: config.pop("bos_token") and None)
    refused(ConfigError, "its text tokenizer .* has no BOS token, needed to delimit", own)


@pytest.mark.parametrize("inside", [TEXT_TOKENIZER, ACTION_TOKENIZER])
def test_missing_tokenizers(inside: str, own: Path, folder: Path) -> None:
    """The stored name is the path that the folder was made for, where it is missing as well."""
    shutil.rmtree(own / inside)
    gone = str(own / "gone" / inside)
    edit(own / "config.json", lambda config: config | {inside.replace("tokenizer", "tokenizer_name"): gone})
    with pytest.raises(ConfigError) as caught:
        loaded(own)
    assert "\n" not in str(caught.value)
    assert str(own) in str(caught.value)


# -- data of another robot


def opened(root: Path, **changes: Any) -> Any:
    return open_source(parse_config(tree(root, root), "test").changed(changes).task, "task")


def tree(model: Path, data: Path, folder: Path | None = None) -> dict[str, Any]:
    folder = folder or data
    return {
        "output_dir": str(folder / "runs"),
        "model": {"kind": "lerobot", "path": str(model)},
        "task": {"path": str(data), "rename": {"observation.images.top": "observation.images.camera0"}},
        "anchors": {
            "source": {"path": str(data), "rename": {"observation.images.top": "observation.images.camera0"}},
            "modes": ["hidden", "token_ce"],
            "positions": ["suffix"],
            "max_new_tokens": 8,
        },
        "craft": {"anchor_cache_dir": str(folder / "anchors"), "anchor_batch_size": 4},
        "train": {"steps": 2, "batch_size": 4},
        "workers": {"num_workers": 0},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "own", episodes=2)


@pytest.mark.parametrize(
    ("robot", "words"),
    [
        ({"cameras": ("wrist",)}, "has no observation.images.camera0, which the policy .* takes; it has .*rename"),
        (
            {"state": 5},
            r"observation.state is \[5\] in .*, but the policy .* takes \[4\]: specify a data set of the same robot",
        ),
        ({"action": 3}, r"action is \[3\] in .*, but the policy .* takes \[4\]: specify a data set of the same robot"),
    ],
)
def test_data_of_another_robot(robot: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", episodes=1, **robot)
    changes: dict[str, Any] = {"task.rename": {}} if "cameras" in robot else {}
    with pytest.raises(ConfigError, match=words) as caught:
        loaded(folder).check_source(opened(root, **changes))
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_texts_for_a_policy_and_frames_for_a_language_model(
    folder: Path, data: Path, text_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "task.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(4)))
    texts = parse_config(tree(folder, data, tmp_path), "test").changed(
        {"task": {"path": str(rows), "columns": {"response": "response"}}, "craft.enabled": False}
    )
    texts = texts.changed({"craft.anchor_cache_dir": None})
    with pytest.raises(DataError, match=r"task\.jsonl, row \d+ has no image.*columns.image") as caught:
        trained(texts, tmp_path / "texts")
    assert "\n" not in str(caught.value)
    frames = texts.changed({"task": {"path": str(data)}, "model": {"kind": "causal_lm", "path": str(text_model)}})
    with pytest.raises(
        ConfigError, match=r"is a LeRobotDataset, but model\.kind is causal_lm.*model\.kind=lerobot"
    ) as caught:
        trained(frames, tmp_path / "frames")
    assert "\n" not in str(caught.value)


def trained(config: Experiment, path: Path) -> RunFolder:
    run = RunFolder(path)
    run.begin(config, ["test"])
    train(config, run, OneWorker(), NullObserver())
    return run


# -- what the cache is bound to


def cache(model: Path, data: Path, folder: Path, **changes: Any) -> Experiment:
    config = parse_config(tree(model, data, folder), "test").changed(changes)
    build(config, say=lambda _: None)
    return config


def test_a_cache_of_another_tokenizer_of_equal_size_is_refused(
    folder: Path, own: Path, data: Path, tmp_path: Path
) -> None:
    config = cache(folder, data, tmp_path / "cache")
    shutil.rmtree(own / TEXT_TOKENIZER)
    write_text_tokenizer(own / TEXT_TOKENIZER, ["another corpus", "with other words in it"], 1280, 512)
    ours, theirs = loaded(folder), loaded(own)
    assert ours.weights_fingerprint() == theirs.weights_fingerprint()
    assert ours.preprocessor_fingerprint() != theirs.preprocessor_fingerprint()
    both = f"cache {ours.preprocessor_fingerprint()}, this run {theirs.preprocessor_fingerprint()}"
    with pytest.raises(CacheRefused, match=rf"another preprocessor \(hash\): {both}") as caught:
        trained(config.changed({"model.path": str(own)}), tmp_path / "run")
    assert "\n" not in str(caught.value)


def changed_numbers(own: Path) -> None:
    edit(own / ACTION_TOKENIZER / "processor_config.json", lambda config: config | {"scale": 11.0})


def longer_prompts(own: Path) -> None:
    edit(own / "config.json", lambda config: config | {"max_action_tokens": 32})


def other_range(own: Path) -> None:
    file = statistics_file(own)
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)


def other_pictures(own: Path) -> None:
    edit(own / "config.json", lambda config: config | {"image_resolution": [24, 24]})


@pytest.mark.parametrize("change", [changed_numbers, longer_prompts, other_range, other_pictures])
def test_everything_that_decides_the_tensors_is_part_of_the_identity(
    change: Callable[[Path], None], folder: Path, own: Path
) -> None:
    assert loaded(own).preprocessor_fingerprint() == loaded(folder).preprocessor_fingerprint()
    change(own)
    assert loaded(own).preprocessor_fingerprint() != loaded(folder).preprocessor_fingerprint()


# -- paths


def test_a_moved_folder_is_the_same_policy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a relative path, when the path that it was made for is gone."""
    first = Path(shutil.copytree(folder, tmp_path / "first"))
    loaded(first).save(tmp_path / "second")
    shutil.rmtree(first)
    (tmp_path / "deep").mkdir()
    (tmp_path / "second").rename(tmp_path / "deep" / "third")
    monkeypatch.chdir(tmp_path / "deep")
    model, original = loaded("third"), loaded(folder)
    assert model.weights_fingerprint() == original.weights_fingerprint()
    assert model.preprocessor_fingerprint() == original.preprocessor_fingerprint()
    assert loss(model) == loss(original)


def test_lerobot_loads_a_saved_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot's own classes load it offline, from another working directory, and give equal loss and actions."""
    model = loaded(folder)
    model.save(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    with sized("saved"):
        policy = PI0FastPolicy.from_pretrained(tmp_path / "saved")
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "saved"))
    one = sample()
    assert one.frame is not None
    assert one.frame.actions is not None
    item: dict[str, Any] = {
        "observation.images.camera0": torch.tensor(one.frame.images["observation.images.camera0"])
        .permute(2, 0, 1)[None]
        .float()
        / 255,
        "observation.state": torch.tensor(one.frame.state["observation.state"])[None],
        "task": [one.prompt],
    }
    acted = after(policy.predict_action_chunk(before(dict(item))))
    np.testing.assert_allclose(model.act([one]), acted.numpy(), atol=1e-6)
    chunk = torch.tensor(one.frame.actions[:8])[None]
    assert policy.forward(before(item | {"action": chunk}))[0].item() == pytest.approx(loss(model, 1), abs=1e-6)


def test_a_folder_keeps_the_device_that_it_names(own: Path, tmp_path: Path) -> None:
    edit(own / "config.json", lambda config: config | {"device": "cuda"})
    model = loaded(own)
    assert model.settings.device == "cpu"
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["device"] == "cuda"


def test_loading_is_silent(folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    model = loaded(folder)
    capfd.readouterr()
    loss(model)
    loaded(folder)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# -- statistics of the normaliser


def far(root: Path, scale: float = 3.0, **robot: Any) -> Path:
    """Data whose states and actions leave the policy's range of [-1, 1]."""
    how: dict[str, Any] = {"episodes": 2, "frames": 6} | robot
    write_dataset(root, **how)
    stats = root / "meta" / "stats.json"
    edit(
        stats,
        lambda content: (
            content
            | {
                name: {
                    key: value if key == "count" else (np.array(value) * scale).tolist() for key, value in one.items()
                }
                for name, one in content.items()
                if name in ("observation.state", "action")
            }
        ),
    )
    return root


def stats_of(model: PI0Fast) -> list[dict[str, Any]]:
    return [step.stats for step in model.folder.processors.normalizers()]


def test_the_teachers_statistics_stay_whatever_the_data_are(folder: Path, data: Path, tmp_path: Path) -> None:
    config = parse_config(tree(folder, data, tmp_path), "test").changed({"craft.enabled": False})
    run = trained(config.changed({"craft.anchor_cache_dir": None}), tmp_path / "runs" / "run")
    student = run.checkpoints / "last" / "model"
    for which in ("preprocessor", "postprocessor"):
        teacher, now = (load_file(statistics_file(path, which)) for path in (folder, student))
        assert teacher.keys() == now.keys()
        assert all(torch.equal(teacher[name], now[name]) for name in teacher)


def test_merged_statistics_are_those_of_all_data_together(folder: Path, tmp_path: Path) -> None:
    others = (far(tmp_path / "one", 3.0), far(tmp_path / "two", 5.0, seed=1))
    model = loaded(folder, merge_statistics=[str(other) for other in others])
    theirs = [LeRobotDataset(other.name, root=other).meta.stats for other in others]
    assert len(stats_of(model)) == 2
    for stats in stats_of(model):
        for name in ("observation.state", "action"):
            low = np.minimum.reduce([-np.ones(4), *(np.asarray(other[name]["min"]) for other in theirs)])
            high = np.maximum.reduce([np.ones(4), *(np.asarray(other[name]["max"]) for other in theirs)])
            np.testing.assert_allclose(stats[name]["min"], low, rtol=1e-6)
            np.testing.assert_allclose(stats[name]["max"], high, rtol=1e-6)
            assert low.min() < -1
            assert high.max() > 1


def test_merged_statistics_scale_what_the_policy_sees_and_does(folder: Path, tmp_path: Path) -> None:
    """The tensors of the normaliser, not only the numbers that it reports: 2 (x - min) / (max - min) - 1 and back."""
    model = loaded(folder, merge_statistics=[str(far(tmp_path / "far"))])
    low, high = (np.asarray(stats_of(model)[0]["action"][key]) for key in ("min", "max"))
    one = sample()
    assert one.frame is not None
    assert one.frame.actions is not None
    encoded = model.encode(one, actions=True)["action"][0].numpy()
    np.testing.assert_allclose(encoded, 2 * (one.frame.actions[:8] - low) / (high - low) - 1, atol=1e-5)
    back = model.folder.processors.after(torch.tensor(encoded)[None])
    np.testing.assert_allclose(back[0].numpy(), one.frame.actions[:8], atol=1e-5)


def test_a_camera_keeps_the_statistics_that_it_has(tmp_path: Path) -> None:
    """They are often ImageNet's; those of the data set's pixels would shift every picture."""
    other = write_dataset(tmp_path / "other", episodes=1)
    camera = next(name for name in LeRobotDataset(other.name, root=other).meta.stats if "image" in name)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    step = NormalizerProcessorStep(
        features={camera: PolicyFeature(FeatureType.VISUAL, (3, 8, 8))},
        norm_map={FeatureType.VISUAL: NormalizationMode.MEAN_STD},
        stats={camera: {"mean": mean, "std": torch.full((3, 1, 1), 0.225)}},
    )
    merge_statistics(cast(Processors, SimpleNamespace(normalizers=lambda: [step])), (str(other),))
    assert torch.allclose(torch.as_tensor(step.stats[camera]["mean"]).float(), mean)


def test_means_and_deviations_are_pooled_over_frames(own: Path, tmp_path: Path) -> None:
    """Known answer: the statistics of all numbers together, if both sides store their count."""
    random = np.random.default_rng(0)
    mine, theirs = random.normal(2.0, 0.5, (30, 4)), random.normal(-1.0, 2.0, (10, 4))
    other = write_dataset(tmp_path / "other", episodes=1)
    edit(other / "meta" / "stats.json", lambda stats: stats | {"action": summary(theirs)})
    mean_and_std(own, mine, count=True)
    stats = stats_of(loaded(own, merge_statistics=[str(other)]))[0]["action"]
    together = np.concatenate([mine, theirs])
    np.testing.assert_allclose(stats["mean"], together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["std"], together.std(0), rtol=1e-5)
    assert float(np.max(stats["count"])) == 40
    mean_and_std(own, mine, count=False)
    stats = stats_of(loaded(own, merge_statistics=[str(other)]))[0]["action"]
    middle = (mine.mean(0) + theirs.mean(0)) / 2
    spread = (mine.var(0) + theirs.var(0)) / 2 + ((mine.mean(0) - theirs.mean(0)) / 2) ** 2
    np.testing.assert_allclose(stats["mean"], middle, rtol=1e-5)
    np.testing.assert_allclose(stats["std"], np.sqrt(spread), rtol=1e-5)


def summary(numbers: np.ndarray) -> dict[str, list[float]]:
    names = ("min", "max", "mean", "std")
    return {name: getattr(numbers, name)(0).tolist() for name in names} | {"count": [len(numbers)]}


def mean_and_std(own: Path, numbers: np.ndarray, count: bool) -> None:
    """Let the policy scale its actions by mean and deviation."""
    stats = {key: torch.tensor(value, dtype=torch.float32) for key, value in summary(numbers).items()}
    if not count:
        stats.pop("count")
    for which in ("preprocessor", "postprocessor"):
        file = statistics_file(own, which)
        kept = {name: value for name, value in load_file(file).items() if not name.startswith("action.")}
        save_file(kept | {f"action.{key}": value for key, value in stats.items()}, file)
        edit(own / f"policy_{which}.json", by_deviation)
    edit(own / "config.json", lambda c: c["normalization_mapping"].update(ACTION="MEAN_STD"))


def by_deviation(pipeline: Any) -> None:
    for step in pipeline["steps"]:
        if "norm_map" in step["config"]:
            step["config"]["norm_map"]["ACTION"] = "MEAN_STD"


def test_merged_statistics_are_saved_and_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder, merge_statistics=[str(far(tmp_path / "far"))])
    plain = loaded(folder)
    assert model.weights_fingerprint() == plain.weights_fingerprint()
    assert model.preprocessor_fingerprint() != plain.preprocessor_fingerprint()
    model.save(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert again.preprocessor_fingerprint() == model.preprocessor_fingerprint()
    for ours, theirs in zip(stats_of(again), stats_of(model), strict=True):
        for name in ("observation.state", "action"):
            np.testing.assert_allclose(ours[name]["min"], theirs[name]["min"])
            np.testing.assert_allclose(ours[name]["max"], theirs[name]["max"])
    assert loss(again) == loss(model) != loss(plain)


def test_a_cache_of_other_statistics_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    config = cache(folder, data, tmp_path / "cache")
    merged = config.changed({"model.merge_statistics": [str(far(tmp_path / "far"))]})
    with pytest.raises(CacheRefused, match=r"another preprocessor \(hash\): cache .*, this run"):
        trained(merged, tmp_path / "run")


def test_statistics_that_cannot_be_merged(folder: Path, tmp_path: Path) -> None:
    refused_line(ConfigError, "nowhere is not a LeRobotDataset", folder, tmp_path / "nowhere")
    other = write_dataset(tmp_path / "other", episodes=1, action=3)
    shapes = r"action is \[3\] in .*, but \[4\] in the policy: leave that data set out"
    refused_line(DataError, shapes, folder, other)
    unlike = write_dataset(tmp_path / "unlike", episodes=1)
    edit(unlike / "meta" / "stats.json", lambda stats: {k: v for k, v in stats.items() if k.startswith("next")})
    refused_line(DataError, "has no statistics of", folder, unlike)


def refused_line(kind: type[CraftError], words: str, folder: Path, data: Path) -> None:
    with pytest.raises(CraftError, match=words) as caught:
        loaded(folder, merge_statistics=[str(data)])
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(data) in str(caught.value)


def test_a_size_file_decides_the_size(folder: Path) -> None:
    assert loaded(folder).hidden_size == small_size().width
