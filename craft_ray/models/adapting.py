"""LoRA adapters by PEFT: attached to a model, loaded from a folder, saved into one, merged.

PEFT replaces the adapted layers inside the module and leaves the module itself as it is, so everything that knows its
structure keeps working. Only the adapter has gradients; the teacher is the model without it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from craft_ray.errors import ConfigError, ModelError, first_line
from craft_ray.extras import install, missing
from craft_ray.models.adapter import BASE, CONFIG, NAME, PREFIX, WEIGHTS, Adapter, adapter_state
from craft_ray.models.adapter_modules import adapted_modules, check_untied, whole_modules
from craft_ray.models.sharding import whole_shapes

if TYPE_CHECKING:  # loading a model needs no pydantic
    from craft_ray.config import AdapterConfig, ModelConfig
    from craft_ray.models.base import Model


def attach(model: Model, config: AdapterConfig, of: ModelConfig, base: str) -> None:
    """Put a fresh adapter into a model and freeze everything else. Its first values depend on torch's seed.

    Args:
        of: the configuration that the model was loaded from.
        base: hash of the model's weights.

    Raises:
        ConfigError: PEFT is not installed, or the model has no such modules.
    """
    require_peft("the config has a section adapter")
    from peft import LoraConfig

    if model.merged_adapter is not None:
        raise ConfigError(
            f"model.path {of.path} is an adapter, and a checkpoint of the section adapter would name it as its base, "
            f"which PEFT does not load: merge it first (craft-ray merge RUN OUT), or leave the section adapter out"
        )
    module = model.module
    targets = adapted_modules(module, config.target_modules)
    whole = whole_modules(module, config.modules_to_save)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init,
        base_model_name_or_path=of.path,
        revision=of.revision,
        task_type="CAUSAL_LM" if hasattr(module, "prepare_inputs_for_generation") else None,
    )
    model.adapter = _injected(model, lora, base, "adapter.target_modules")
    check_untied(model.adapter.tuner.model)


def load(model: Model, folder: Path, of: ModelConfig) -> None:
    """Put the adapter of a folder into a model, and freeze everything else.

    Args:
        of: the configuration that the model was loaded from.

    Raises:
        ConfigError: PEFT is not installed, or the adapter belongs to other weights or to another model.
        ModelError: its weights do not load completely.
    """
    require_peft(f"{folder} holds an adapter")
    from peft import PeftConfig, set_peft_model_state_dict

    settings = _settings(folder)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            f"the adapter {folder} is of type {settings.get('peft_type')}, only LORA is supported: merge it with PEFT "
            f"(merge_and_unload) and specify the merged model"
        )
    base = model.weights_fingerprint()
    if (folder / BASE).exists() and (theirs := json.loads((folder / BASE).read_text())["weights"]) != base:
        raise ConfigError(
            f"the adapter {folder} was trained on weights with the hash {theirs}, but model.path {of.path} (as "
            f"{of.dtype}) has {base}: specify the model that the adapter belongs to"
        )
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    state = _read(folder)
    adapter = _injected(model, config, base, f"the adapter {folder}")
    expected = {PREFIX + name: tensor for name, tensor in adapter_state(model.module).items()}
    for wrong, what in (
        (sorted(expected.keys() - state.keys()), "are missing"),
        (sorted(state.keys() - expected.keys()), "are unknown"),
        (
            sorted(n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape),
            "have another shape",
        ),
    ):
        if wrong:
            raise ConfigError(
                f"the adapter {folder} does not fit model.path {of.path}: {len(wrong)} weights {what} (e.g. "
                f"{wrong[0].removeprefix(PREFIX)}): specify the model that it was trained on"
            )
    set_peft_model_state_dict(model.module, {name.removeprefix(PREFIX): t for name, t in state.items()}, NAME)
    model.adapter = adapter


def adapter_states(model: Model, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a model's adapter, and those that a folder holds, by their names in PEFT's file.

    Raises:
        ModelError: the folder's do not load.
    """
    return {PREFIX + name: tensor for name, tensor in adapter_state(model.module).items()}, _read(folder)


def merge(model: Model) -> None:
    """Add a model's adapter to its own weights and remove it. They can then be trained again."""
    adapter = model.adapter
    assert adapter is not None, "the model has no adapter"
    adapter.tuner.merge_and_unload()
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in adapter.trained)
    model.adapter = None


def is_adapter(path: str | Path) -> bool:
    """Whether a local folder holds an adapter, rather than a whole model."""
    return (Path(path) / CONFIG).is_file()


def base_of(folder: Path) -> tuple[str, str | None]:
    """The path or hub name of the model that an adapter belongs to, and its revision.

    Raises:
        ConfigError: the adapter does not name it.
    """
    settings = _settings(folder)
    if not settings.get("base_model_name_or_path"):
        raise ConfigError(
            f"the adapter {folder} names no model that it belongs to (base_model_name_or_path in {CONFIG}): add it"
        )
    return settings["base_model_name_or_path"], settings.get("revision")


def require_peft(why: str) -> None:
    """
    Raises:
        ConfigError: PEFT is not installed.
    """
    if reason := missing("peft"):
        raise ConfigError(f"{why}, but {reason}: {install('lora')}")


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        return settings
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the adapter {folder}: {CONFIG} does not load ({first_line(error)}): save it again"
        ) from None


def _read(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = load_file(folder / WEIGHTS)
        return state
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the adapter {folder}: {WEIGHTS} does not load ({first_line(error)}): save it again"
        ) from None


def _injected(model: Model, config: Any, base: str, where: str) -> Adapter:
    """Inject what a `LoraConfig` says into a model; the adapter is float32, whatever the model is.

    Raises:
        ConfigError: PEFT finds no such layers, or cannot adapt one.
    """
    from peft import LoraModel
    from peft.functional import cast_adapter_dtype

    module = model.module
    trained = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    try:
        with _quiet(), whole_shapes(module):
            tuner = LoraModel(module, config, NAME)
    except (ValueError, NotImplementedError) as error:
        # "Target module Gate(\n  (proj): ...\n) is not supported. Currently, ..."
        reason = re.sub(r"\(\n.*\n\) ", " ", str(error), flags=re.DOTALL).split(". ")[0]
        raise ConfigError(f"{where}: PEFT cannot adapt this model ({first_line(reason)}): name other modules") from None
    cast_adapter_dtype(module, NAME)
    return Adapter(tuner, base, trained)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about shared weights, which are refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
