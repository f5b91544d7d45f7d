"""A folder loads completely or is refused in one line; fingerprints say what was loaded, not from where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_torchvision_available

from craft_ray.config import ModelConfig
from craft_ray.errors import ConfigError, CraftError, ModelError
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.models.fingerprint import json_fingerprint, weights_fingerprint
from tests.support.experiments import Digits
from tests.support.tiling import build, without_videos

KINDS = {"text": "causal_lm", "digits": "vision_language"}
WEIGHTS = "model.safetensors"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return KINDS[request.param]


@pytest.fixture
def original(kind: str, text_model: Path, digits: Digits) -> Path:
    return {"causal_lm": text_model, "vision_language": digits.model}[kind]


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def load(kind: str, path: Path | str, **changes: Any) -> Model:
    return load_model(ModelConfig(kind=kind, path=str(path), **changes), "fp32")  # type: ignore[arg-type]


def refusal(error: type[CraftError], kind: str, path: Path | str, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        load(kind, path, **changes)
    assert "\n" not in caught.value.message
    return caught.value.message


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def some_matrix(folder: Path) -> str:
    return next(name for name, t in sorted(load_file(folder / WEIGHTS).items()) if t.ndim == 2 and "mlp" in name)


# --- what does not load ----------------------------------------------------------------------------------------


def test_a_missing_folder(kind: str, tmp_path: Path) -> None:
    message = refusal(ConfigError, kind, tmp_path / "nothing")
    assert message.startswith(f"model.path {tmp_path / 'nothing'}: there is no such folder")
    assert ConfigError.exit_code == 2


def test_a_hub_name_that_cannot_be_reached(kind: str) -> None:
    assert "model.path craft-ray-tests/not-there" in refusal(ConfigError, kind, "craft-ray-tests/not-there")


def test_a_missing_weight_is_named(kind: str, folder: Path) -> None:
    name = some_matrix(folder)
    change_weights(folder, lambda weights: weights.pop(name))
    message = refusal(ModelError, kind, folder)
    assert str(folder) in message
    assert "did not load completely" in message
    assert name.split(".", 1)[1] in message


def test_a_weight_of_another_shape_is_named(kind: str, folder: Path) -> None:
    name = some_matrix(folder)
    change_weights(folder, lambda weights: weights.update({name: weights[name][:, :-1].contiguous()}))
    message = refusal(ModelError, kind, folder)
    assert "have another shape" in message
    assert name.split(".", 1)[1] in message


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated_weights(kind: str, folder: Path, kept: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    assert "damaged" in refusal(ModelError, kind, folder)


def test_a_folder_without_weights(kind: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "no file named model.safetensors" in refusal(ModelError, kind, folder)


def test_a_pickle_that_runs_code_is_not_run(text_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "copy"))
    trace = tmp_path / "it ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str, str]]:
            return open, (str(trace), "w")

    torch.save({**load_file(folder / WEIGHTS), "payload": Payload()}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "damaged" in refusal(ModelError, "causal_lm", folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{"), ("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", None)],
)
def test_a_damaged_folder(kind: str, folder: Path, name: str, content: str | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert f"model.path {folder}: no processor or tokenizer loads from it" in refusal(ConfigError, kind, folder)


def test_the_wrong_kind(text_model: Path, digits: Digits) -> None:
    message = refusal(ConfigError, "causal_lm", digits.model)
    assert "PaliGemmaConfig" in message
    assert "AutoModelForCausalLM" in message
    message = refusal(ConfigError, "vision_language", text_model)
    assert "LlamaConfig" in message
    assert "AutoModelForImageTextToText" in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused_and_does_not_run(kind: str, folder: Path, file: str) -> None:
    trace = folder / "it ran"
    (folder / "custom.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\nraise RuntimeError('it is loaded')\n"
    )
    if file == "config.json":
        change_json(folder / file, model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    else:
        own = {"AutoTokenizer": ["custom.Config", None], "AutoProcessor": "custom.Config"}
        change_json(folder / file, tokenizer_class="Custom", auto_map=own)
    assert "set model.trust_remote_code=true if you trust it" in refusal(ConfigError, kind, folder)
    assert not trace.exists()

    with pytest.raises((ConfigError, ModelError), match="it is loaded"):
        load(kind, folder, trust_remote_code=True)
    assert trace.exists(), "the folder had no code to refuse"


# --- identity -------------------------------------------------------------------------------------------------


def identity(kind: str, path: Path, **changes: Any) -> tuple[str, str]:
    model = load(kind, path, **changes)
    return model.weights_fingerprint(), model.preprocessor_fingerprint()


def test_path_and_sharding_are_not_part_of_the_identity(kind: str, original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "elsewhere")
    model = load(kind, original)
    model.module.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    model.processor.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    found = {identity(kind, path) for path in (original, tmp_path / "elsewhere", tmp_path / "sharded")}
    assert len(found) == 1


def test_one_bit_of_one_weight(kind: str, original: Path, folder: Path) -> None:
    name = some_matrix(folder)

    def flip(weights: dict[str, Tensor]) -> None:
        weights[name].view(torch.int32)[-1, -1] ^= 1

    change_weights(folder, flip)
    before, after = identity(kind, original), identity(kind, folder)
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_the_type_of_the_weights(kind: str, original: Path) -> None:
    assert identity(kind, original)[0] != identity(kind, original, dtype="bfloat16")[0]


def test_names_and_shapes_count() -> None:
    def digest(**state: Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in state.items():
            module.register_buffer(name, tensor)
        return weights_fingerprint(module)

    one = digest(a=torch.ones(2, 3), b=torch.zeros(2))
    assert one == digest(b=torch.zeros(2), a=torch.ones(2, 3))
    assert one != digest(a=torch.ones(3, 2), b=torch.zeros(2))
    assert one != digest(c=torch.ones(2, 3), b=torch.zeros(2))
    assert one != digest(a=torch.ones(2, 3), b=torch.zeros(2, dtype=torch.int32))
    assert digest(a=torch.tensor(1.0)) != digest(a=torch.tensor(2.0))
    assert digest(a=torch.arange(6.0).view(2, 3)) == digest(a=torch.arange(6.0).view(2, 3).t().contiguous().t())


@pytest.mark.parametrize("changes", [{"max_length": 100}, {"append_eos": False}], ids=["max_length", "append_eos"])
def test_limits_of_the_preprocessing(kind: str, original: Path, changes: dict[str, Any]) -> None:
    before, after = identity(kind, original), identity(kind, original, **changes)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_execution_settings_are_not_part_of_the_preprocessing(kind: str, original: Path) -> None:
    assert identity(kind, original) == identity(kind, original, gradient_checkpointing=True, disable_dropout=False)


def test_another_tokenizer(kind: str, original: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["craft"])
    tokenizer.save_pretrained(folder)
    before, after = identity(kind, original), identity(kind, folder)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_tokenizer_that_was_used_is_the_same(text_model: Path) -> None:
    model = load("causal_lm", text_model)
    before = model.preprocessor_fingerprint()
    model.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # type: ignore[attr-defined]
    assert model.preprocessor_fingerprint() == before


def test_another_scale_of_images(digits: Digits, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits.model, tmp_path / "copy"))
    change_images(folder, image_mean=[0.25, 0.5, 0.5])
    before, after = identity("vision_language", digits.model), identity("vision_language", folder)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_an_image_size_that_the_model_does_not_take(digits: Digits, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits.model, tmp_path / "copy"))
    change_images(folder, size={"height": 16, "width": 16})
    message = refusal(ModelError, "vision_language", folder)
    assert "does not run on a few tokens and a picture (RuntimeError: The size of tensor" in message


def change_images(folder: Path, **changes: Any) -> None:
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    change_json(file, image_processor=settings["image_processor"] | changes)


def test_the_order_of_keys_does_not_count() -> None:
    assert json_fingerprint({"a": 1, "b": [1, 2]}) == json_fingerprint({"b": [1, 2], "a": 1})
    assert json_fingerprint({"b": [1, 2]}) != json_fingerprint({"b": [2, 1]})


# --- storage --------------------------------------------------------------------------------------------------


def test_weights_from_a_checkpoint(text_model: Path, tmp_path: Path) -> None:
    """The processor and the limits are the config's; the weights are the checkpoint's."""
    trained = load("causal_lm", text_model)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(0.01)
    trained.save(tmp_path / "model")
    config = ModelConfig(path=str(text_model))
    resumed = load_model(config, "fp32", weights=str(tmp_path / "model"))
    assert resumed.weights_fingerprint() == trained.weights_fingerprint()
    assert resumed.weights_fingerprint() != load_model(config, "fp32").weights_fingerprint()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert weights_fingerprint(plain) == trained.weights_fingerprint()


def test_a_checkpoint_that_is_damaged(text_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "copy"))
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        load_model(ModelConfig(path=str(text_model)), "fp32", weights=str(folder))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_package_that_a_processor_needs(tmp_path: Path) -> None:
    with without_videos():
        folder = build("qwen2_vl", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"its processor needs torchvision: pip .*craft-ray\[vision\]") as caught:
        load_model(ModelConfig(kind="vision_language", path=str(folder)), "fp32")
    assert "\n" not in caught.value.message
