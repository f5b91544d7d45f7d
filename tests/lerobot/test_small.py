"""A small pi0_fast policy: LeRobot itself loads it, its tokenizers keep actions, and no code stored with them runs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from craft_ray.errors import ConfigError, CraftError, DataError
from craft_ray.examples.robot import ACTION_TOKENS, SCALE, SIZE, build_policy
from craft_ray.lerobot.size import SIZE_FILE, PaliGemmaSize, sized
from craft_ray.lerobot.tokenizers import (
    ACTION_TOKENIZER,
    RESERVED,
    TEXT_TOKENIZER,
    complete_processor_config,
    fast_tokenizer,
    local_names,
    text_tokenizer,
    without_remote_code,
    write_action_tokenizer,
    write_text_tokenizer,
)
from craft_ray.storage.files import new_folder
from tests.support.robots import TASKS, small_policy, small_size, smooth_chunks


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cameras, and one that the data do not have. Shared: do not write into it."""
    return small_policy(tmp_path_factory.mktemp("robot") / "policy", cameras=2, empty_cameras=1)


@pytest.fixture
def own_folder(policy_folder: Path, tmp_path: Path) -> Path:
    """A copy, at another path than its configuration names."""
    return Path(shutil.copytree(policy_folder, tmp_path / "moved"))


def observations() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "observation.images.camera0": torch.rand(2, 3, 32, 32, generator=generator),
        "observation.images.camera1": torch.rand(2, 3, 32, 32, generator=generator),
        "observation.state": torch.rand(2, 4, generator=generator) * 2 - 1,
        "action": torch.from_numpy(smooth_chunks(2, seed=7)),
        "task": list(TASKS),
    }


def loaded(folder: Path) -> PI0FastPolicy:
    """Loaded as a user of LeRobot would."""
    with sized(folder):
        return PI0FastPolicy.from_pretrained(folder)


# -- LeRobot itself


def test_lerobot_loads_the_folder_from_any_directory_with_the_stored_weights(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = loaded(policy_folder)
    stored = load_file(policy_folder / "model.safetensors")
    assert policy.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in policy.state_dict().items())


def test_the_processors_that_lerobot_loads_give_what_ours_give(policy_folder: Path) -> None:
    config = loaded(policy_folder).config
    theirs, _ = make_pre_post_processors(config, pretrained_path=str(policy_folder))
    with without_remote_code(fast_tokenizer(config.action_tokenizer_name)):
        ours, _ = make_pre_post_processors(config, pretrained_path=str(policy_folder))
    one, other = theirs(observations()), ours(observations())
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert {"action.tokens", "action.token_mask", "observation.language.tokens"} <= set(tensors)
    assert all(torch.equal(one[name], other[name]) for name in tensors)


def test_the_policy_learns_and_predicts_in_lerobot(policy_folder: Path) -> None:
    policy = loaded(policy_folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(policy_folder))
    batch = before(observations())
    loss, _ = policy(batch)
    loss.backward()
    assert abs(loss.item() - np.log(small_size().vocabulary)) < 2  # as good as a guess
    del batch["action"]
    assert after(policy.predict_action_chunk(batch)).shape == (2, 8, 4)


def test_nothing_of_a_prompt_or_of_actions_is_cut_off(policy_folder: Path) -> None:
    config = loaded(policy_folder).config
    before, _ = make_pre_post_processors(config, pretrained_path=str(policy_folder))
    batch = before(observations())
    assert not batch["observation.language.attention_mask"][:, -1].any()
    assert not batch["action.token_mask"][:, -1].any()


def test_the_policy_decodes_the_tokens_of_its_processor_to_the_actions(policy_folder: Path) -> None:
    policy = loaded(policy_folder)
    before, _ = make_pre_post_processors(policy.config, pretrained_path=str(policy_folder))
    batch = before(observations())
    generated = batch["action.tokens"][:, 1:]  # a policy is given BOS and generates the rest
    policy.config.validate_action_token_prefix = True
    actions = policy.detokenize_actions(generated, action_horizon=8, action_dim=4)
    assert (actions - observations()["action"]).abs().max() < quantisation(8)


def test_a_saved_policy_still_names_its_text_tokenizer(own_folder: Path, tmp_path: Path) -> None:
    """LeRobot does not save it; without it, loading asks the hub."""
    policy = loaded(own_folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(own_folder))
    folder = tmp_path / "again"
    for part in (policy, before, after):
        part.save_pretrained(folder)
    with pytest.raises(Exception, match="huggingface"):
        make_pre_post_processors(policy.config, pretrained_path=str(folder))
    complete_processor_config(folder)
    again, _ = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    assert torch.equal(again(observations())["action.tokens"], before(observations())["action.tokens"])


def test_the_action_tokenizer_is_named_even_if_it_was_given_as_an_object(own_folder: Path, tmp_path: Path) -> None:
    config = loaded(own_folder).config
    given = {"action_tokenizer_input_object": fast_tokenizer(config.action_tokenizer_name)}
    overrides = {"action_tokenizer_processor": given}
    before, after = make_pre_post_processors(config, pretrained_path=str(own_folder), preprocessor_overrides=overrides)
    folder = tmp_path / "again"
    config.save_pretrained(folder)
    for part in (before, after):
        part.save_pretrained(folder)
    complete_processor_config(folder)
    make_pre_post_processors(config, pretrained_path=str(folder))


def test_a_folder_written_elsewhere_and_renamed_names_its_final_path(own_folder: Path, tmp_path: Path) -> None:
    final = tmp_path / "final"
    with new_folder(final) as temporary:
        shutil.copytree(own_folder, temporary, dirs_exist_ok=True)
        complete_processor_config(temporary, final)
    shutil.rmtree(own_folder)
    texts = "".join((final / name).read_text() for name in ("config.json", "policy_preprocessor.json"))
    assert texts.count(str(final / TEXT_TOKENIZER)) == 3
    assert texts.count(str(final / ACTION_TOKENIZER)) == 2
    make_pre_post_processors(loaded(final).config, pretrained_path=str(final))


def test_a_moved_folder_names_its_own_tokenizers(own_folder: Path) -> None:
    config = loaded(own_folder).config
    local_names(config, own_folder)
    assert config.text_tokenizer_name == str(own_folder / TEXT_TOKENIZER)
    assert config.action_tokenizer_name == str(own_folder / ACTION_TOKENIZER)


def test_a_name_on_the_hub_does_not_change(own_folder: Path) -> None:
    config = loaded(own_folder).config
    config.text_tokenizer_name = "google/paligemma-3b-pt-224"
    local_names(config, own_folder)
    assert config.text_tokenizer_name == "google/paligemma-3b-pt-224"


def test_the_same_seed_gives_the_same_folder_and_leaves_the_random_state_alone(
    policy_folder: Path, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    same = small_policy(tmp_path / "same", cameras=2, empty_cameras=1)
    other = small_policy(tmp_path / "other", cameras=2, empty_cameras=1, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("model.safetensors", f"{TEXT_TOKENIZER}/tokenizer.json", f"{ACTION_TOKENIZER}/tokenizer.json"):
        assert (same / name).read_bytes() == (policy_folder / name).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (same / "model.safetensors").read_bytes()


# -- the size


def test_a_size_reads_back_and_is_gone_after_the_context(policy_folder: Path) -> None:
    original = modeling_pi0_fast.PI0FastPaliGemma
    assert PaliGemmaSize.load(policy_folder) == small_size()
    with sized(policy_folder):
        assert modeling_pi0_fast.PI0FastPaliGemma is not original
    assert modeling_pi0_fast.PI0FastPaliGemma is original
    with pytest.raises(ZeroDivisionError), sized(policy_folder):
        _ = 1 / 0
    assert modeling_pi0_fast.PI0FastPaliGemma is original


def test_a_folder_without_a_size_changes_nothing(tmp_path: Path) -> None:
    original = modeling_pi0_fast.PI0FastPaliGemma
    with sized(tmp_path), sized("lerobot/pi0fast-base"):
        assert modeling_pi0_fast.PI0FastPaliGemma is original


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"width": 32.0}, "width is 32.0"),
        ({"image": 30}, "image is 30 and its patch 8"),
        ({"vision_heads": 3}, "vision_heads 3"),
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"head_dim": 15}, "even"),
    ],
)
def test_a_size_that_no_model_has_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        replace(small_size(), **changes)
    assert one_line(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"width": 32, "colour": 1}'])
def test_a_damaged_size_file_is_one_line_with_its_name(own_folder: Path, text: str) -> None:
    (own_folder / SIZE_FILE).write_text(text)
    with pytest.raises(ConfigError, match=SIZE_FILE) as caught, sized(own_folder):
        pass
    assert one_line(caught.value)


# -- tokenizers


def quantisation(length: int, scale: float = SCALE) -> float:
    """The most that an action moves if each of its `length` coefficients is rounded by half a step.

    A row of the orthonormal transform has length 1, so its absolute entries sum to sqrt(length) at most.
    """
    return 0.5 / scale * length**0.5 + 1e-6


@pytest.mark.parametrize("trusted", [False, True])
def test_actions_come_back_within_the_rounding(policy_folder: Path, trusted: bool) -> None:
    tokenizer = fast_tokenizer(str(policy_folder / ACTION_TOKENIZER), trust_remote_code=trusted)
    chunks = smooth_chunks(16, seed=3)  # not those it was fitted on
    assert np.abs(tokenizer.decode(tokenizer(chunks)) - chunks).max() < quantisation(8)


def test_the_tokens_are_those_of_lerobots_own_loading(policy_folder: Path) -> None:
    folder = str(policy_folder / ACTION_TOKENIZER)
    theirs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    ours = fast_tokenizer(folder)
    chunks = smooth_chunks(16, seed=3)
    tokens = ours(chunks)
    assert tokens == theirs(chunks)
    assert np.array_equal(ours.decode(tokens), theirs.decode(tokens))


@pytest.mark.parametrize("level", [-2.0, -1.0, 1.0, 2.0])
def test_actions_outside_the_fitted_range_are_not_lost(policy_folder: Path, level: float) -> None:
    """A byte-level tokenizer drops what it never saw, and a whole chunk would then decode to nothing."""
    tokenizer = fast_tokenizer(str(policy_folder / ACTION_TOKENIZER))
    chunk = np.full((1, 8, 4), level, dtype=np.float32)
    assert np.abs(tokenizer.decode(tokenizer(chunk)) - chunk).max() < quantisation(8)


def test_smooth_chunks_take_fewer_tokens_than_they_have_numbers(policy_folder: Path) -> None:
    tokens = fast_tokenizer(str(policy_folder / ACTION_TOKENIZER))(smooth_chunks(16, seed=3))
    assert np.mean([len(chunk) for chunk in tokens]) < 8 * 4


def test_the_text_tokenizer_has_the_shape_of_paligemmas(policy_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_folder / TEXT_TOKENIZER, add_eos_token=True, add_bos_token=False)
    assert tokenizer.vocab_size == len(tokenizer) == small_size().vocabulary
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Action: ", add_special_tokens=False))[:2] == [
        "Action",
        ":",
    ]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("|"))[0] == "|"
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.pad_token_id == 0  # LeRobot pads the suffix with zeros
    last = tokenizer.vocab_size - 1
    assert tokenizer.convert_ids_to_tokens(last - RESERVED) == "<action0>"
    assert tokenizer.convert_ids_to_tokens(last - RESERVED - 511) == "<action511>"


@pytest.mark.parametrize("text", ["Task: wasch_ab – 茶, State: -1 0 255;\n", "Actions speak | louder", "<action0>"])
def test_any_text_comes_back_and_none_becomes_an_action(policy_folder: Path, text: str) -> None:
    tokenizer = text_tokenizer(str(policy_folder / TEXT_TOKENIZER))
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < tokenizer.vocab_size - RESERVED - 512


def test_the_word_action_is_one_token_whatever_the_corpus_was(tmp_path: Path) -> None:
    write_text_tokenizer(tmp_path, ["tion on ctio Ac"] * 50, vocabulary=1024, action_tokens=512)
    assert text_tokenizer(str(tmp_path)).tokenize("Action: ") == ["Action", ":", "Ġ"]


def test_a_vocabulary_without_room_is_refused_with_the_size_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="raise it to 904 or more") as caught:
        write_text_tokenizer(tmp_path, [], vocabulary=640, action_tokens=512)
    assert one_line(caught.value)
    write_text_tokenizer(tmp_path, [], vocabulary=904, action_tokens=512)


def test_an_action_vocabulary_too_small_for_its_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="512 is too small for chunks of 8 steps at scale 100") as caught:
        write_action_tokenizer(tmp_path, smooth_chunks(), vocabulary=512, scale=100)
    assert one_line(caught.value)


# -- remote code


def test_no_code_beside_the_tokenizers_runs_unless_it_is_trusted(own_folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    plant(own_folder, mark)
    config = loaded_config(own_folder)
    action = fast_tokenizer(config.action_tokenizer_name)
    with sized(own_folder), without_remote_code(action):
        policy = PI0FastPolicy(config)
        make_pre_post_processors(config)
        make_pre_post_processors(config, pretrained_path=str(own_folder))
    assert policy.action_tokenizer is action
    assert not mark.exists()
    with pytest.raises(ConfigError, match="planted"):
        fast_tokenizer(config.action_tokenizer_name, trust_remote_code=True)
    assert mark.exists()


def test_trusted_code_is_loaded_as_in_lerobot(own_folder: Path) -> None:
    config = loaded_config(own_folder)
    with sized(own_folder), without_remote_code(None, trusted=True):
        policy = PI0FastPolicy(config)
    assert type(policy.action_tokenizer).__module__.startswith("transformers_modules")


def test_the_names_in_lerobot_are_as_before_after_an_error(own_folder: Path) -> None:
    with without_remote_code(None):
        assert modeling_pi0_fast.AutoProcessor is not AutoProcessor
    with pytest.raises(ZeroDivisionError), without_remote_code(None):
        _ = 1 / 0
    assert modeling_pi0_fast.AutoProcessor is AutoProcessor
    assert modeling_pi0_fast.AutoTokenizer is AutoTokenizer


def plant(folder: Path, mark: Path) -> None:
    """Code beside both tokenizers that leaves a mark and fails."""
    code = f"from pathlib import Path\n\nPath({str(mark)!r}).touch()\nraise RuntimeError('planted')\n"
    (folder / ACTION_TOKENIZER / "processing_action_tokenizer.py").write_text(code)
    (folder / TEXT_TOKENIZER / "planted.py").write_text(code)
    settings = folder / TEXT_TOKENIZER / "tokenizer_config.json"
    own = {"AutoTokenizer": [None, "planted.Planted"]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "auto_map": own}))


def loaded_config(folder: Path) -> Any:
    config = PI0FastPolicy.config_class.from_pretrained(folder)
    local_names(config, folder)
    return config


# -- bad folders


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json cannot be read"),
        (lambda folder: (folder / "processor_config.json").write_text("{"), "processor_config.json cannot be read"),
        (lambda folder: (folder / "processor_config.json").write_text("[]"), "no number scale"),
        (edit("processor_config.json", lambda c: c.pop("min_token")), "no number min_token"),
        (edit("processor_config.json", lambda c: c.update(processor_class="Spline")), "is a Spline"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json does not load"),
    ],
)
def test_a_bad_action_tokenizer_is_refused_in_one_line(
    own_folder: Path, damage: Callable[[Path], Any], words: str
) -> None:
    folder = own_folder / ACTION_TOKENIZER
    damage(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        fast_tokenizer(str(folder))
    assert one_line(caught.value)
    assert str(folder) in caught.value.message


def test_names_of_nothing_are_refused_in_one_line(tmp_path: Path) -> None:
    for load in (fast_tokenizer, text_tokenizer):
        for name in ("nobody/has-this", str(tmp_path / "nothing")):
            with pytest.raises(ConfigError, match=name) as caught:
                load(name)
            assert one_line(caught.value)


def one_line(error: CraftError) -> bool:
    return "\n" not in error.message and len(error.message) < 600


# -- from data sets


def record(folder: Path, task: str, level: float, states: int = 4) -> Path:
    """Two episodes of 12 frames, whose actions encode the episode and the frame."""
    row = {"dtype": "float32", "names": None}
    features = {
        "observation.images.top": {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]},
        "observation.state": {**row, "shape": (states,)},
        "action": {**row, "shape": (3,)},
    }
    dataset = LeRobotDataset.create(f"local/{folder.name}", fps=10, features=features, root=folder, use_videos=False)
    for episode in range(2):
        for frame in range(12):
            dataset.add_frame(
                {
                    "observation.images.top": np.full((16, 16, 3), frame, dtype=np.uint8),
                    "observation.state": np.full(states, level, dtype=np.float32),
                    "action": np.array([episode, frame / 11, level], dtype=np.float32),
                    "task": task,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return folder


def test_a_policy_is_built_for_data_sets_and_keeps_their_joint_range(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [record(tmp_path / "close", "close it", -1.0), record(tmp_path / "open", "open it", 3.0)]
    folder = tmp_path / "policy"
    caplog.clear()
    build_policy(folder, replace(small_size(), vocabulary=1280), sets, chunk=8, action_tokens=512)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warnings  # a decoder that does not load would log a page
    policy = loaded(folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    assert list(policy.config.image_features) == ["observation.images.top"]
    steps = {"action": [index / 10 for index in range(8)]}
    item = LeRobotDataset("local/close", root=sets[0], delta_timestamps=steps)[2]
    batch = before({**item, "task": [item["task"]], "action": item["action"][None]})
    assert batch["action"][0, :, 2].unique().tolist() == [
        -1.0
    ]  # the level of one of the two sets is an end of the range
    assert torch.allclose(after(batch["action"]), item["action"])
    assert not batch["action.token_mask"][:, -1].any()
    policy(batch)


def test_data_sets_with_different_features_are_refused_by_name(tmp_path: Path) -> None:
    sets = [record(tmp_path / "close", "close it", -1.0), record(tmp_path / "open", "open it", 3.0, states=5)]
    with pytest.raises(DataError, match=r"close and .*open have different features") as caught:
        build_policy(tmp_path / "policy", small_size(), sets)
    assert one_line(caught.value)


def test_the_size_of_the_example_holds_its_tokenizers() -> None:
    words = 512
    assert SIZE.vocabulary > ACTION_TOKENS + RESERVED + words
