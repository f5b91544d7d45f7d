"""Weights and processors of transformers, loaded completely or refused in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from craft_ray.config import ModelConfig
from craft_ray.errors import ConfigError, ModelError, first_line
from craft_ray.extras import install, missing

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VISION = ("torchvision", "num2words")
"""What some processors import to read videos, even if there are only images: the packages of the extra `vision`."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys of a `config.json` that describe quantised weights: transformers, an older compressed-tensors, MLX."""


def load_processor(processor_class: Any, config: ModelConfig) -> Any:
    """The processor or tokenizer of a folder or hub model.

    Raises:
        ConfigError: none loads from it.
    """
    path = Path(config.path)
    if path.is_absolute() and not path.is_dir():
        raise ConfigError(f"model.path {path}: there is no such folder: specify an existing one, or a hub model")
    try:
        return processor_class.from_pretrained(config.path, **_options(config))
    except Exception as error:  # a damaged tokenizer can raise anything, even a bare Exception
        for package in VISION:
            if package in str(error).lower() and (why := missing(package)):
                raise ConfigError(
                    f"model.path {path}: its processor needs {package}: {install('vision')} ({why})"
                ) from error
        refuse_hub_adapter(config.path, config.revision)
        raise ConfigError(
            f"model.path {path}: no processor or tokenizer loads from it ({reason(error)}): specify a folder or a "
            f"hub model that has one"
        ) from error


def load_module(auto_class: Any, config: ModelConfig, path: str, gpus: int = 1) -> Any:
    """The module of a folder or hub model, with all of its weights, on the host.

    Args:
        gpus: 2 or more put its layers on that many GPUs, in order.

    Raises:
        ConfigError: none of this class loads from it, or its weights are quantised.
        ModelError: its weights are damaged, or not those of the module.
    """
    refuse_quantised(path, **_options(config))
    try:
        module, info = auto_class.from_pretrained(
            path,
            dtype=DTYPES[config.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **_attention(config),
            **_options(config),
            **({} if gpus == 1 else spread_options(gpus)),
        )
    except ImportError as error:
        raise ConfigError(
            f"model.attention is {config.attention}: {first_line(error)} Install what it needs, or leave it out"
        ) from None
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"model {path}: its weights are damaged ({reason(error)}): fetch or save it again") from None
    except (OSError, ValueError) as error:
        if "afetensor" in str(error) or "header" in str(error):
            raise ModelError(f"model {path}: its weights do not load ({reason(error)})") from None
        refuse_hub_adapter(path, config.revision)  # what does not load may be the model that it belongs to
        raise ConfigError(f"model.path {path}: no {auto_class.__name__} loads from it ({reason(error)})") from None
    if getattr(module, "_hf_peft_config_loaded", False):
        refuse_hub_adapter(path, config.revision)
    check_complete(module, info, path, config.kind)
    if gpus > 1:
        check_spread(getattr(module, "hf_device_map", {}), gpus, path)
    return module


def refuse_hub_adapter(path: str, revision: str | None) -> None:
    """Refuse a repository of the hub that holds an adapter; a folder with one is loaded as an adapter.

    Raises:
        ConfigError: it does.
    """
    if not Path(path).is_dir() and find_adapter_config_file(path, revision=revision) is not None:
        raise ConfigError(
            f"model.path {path} is an adapter on the hub: download it (hf download {path} --local-dir FOLDER), and "
            f"specify its folder as model.path"
        )


def spread_options(gpus: int) -> dict[str, Any]:
    """What transformers needs to put the layers on the first GPUs that this process sees, about equally many on each.

    Raises:
        ConfigError: accelerate is not installed.
    """
    if cause := missing("accelerate"):
        raise ConfigError(f"a model is to be spread over {gpus} GPUs, but {cause}: pip install accelerate")
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(gpus)}
    return {"device_map": "balanced", "max_memory": free}


def check_spread(device_map: dict[str, Any], gpus: int, path: str) -> None:
    """Check that every layer is on a GPU, by what transformers says about the parts of a model.

    Raises:
        ConfigError: some are elsewhere, where a pass would fetch them each time.
    """
    elsewhere = [name for name, place in device_map.items() if str(place) in ("cpu", "disk", "meta")]
    if elsewhere or not device_map:
        found = f"{len(elsewhere)} of its parts do not fit (e.g. {elsewhere[0]})" if elsewhere else "it was not spread"
        raise ConfigError(f"model {path} over {gpus} GPUs: {found}: raise the number of GPUs (anchors.gpus_per_actor)")


def empty_module(auto_class: Any, config: ModelConfig, path: str) -> Any:
    """The module of a folder or hub model on the meta device, without its weights."""
    settings = AutoConfig.from_pretrained(path, **_options(config))
    with torch.device("meta"):
        return auto_class.from_config(
            settings, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code, **_attention(config)
        )


def _attention(config: ModelConfig) -> dict[str, str]:
    return {} if config.attention is None else {"attn_implementation": config.attention}


def _options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def refuse_quantised(path: str, **options: Any) -> None:
    """Refuse a folder or hub model whose config describes quantised weights, before they are read.

    Raises:
        ConfigError: it does. Training would update and save them without their scales.
    """
    try:
        settings, _ = PretrainedConfig.get_config_dict(path, **options)
    except (OSError, ValueError):
        return  # whoever loads the weights says what is wrong with the folder
    for found in _mappings(settings):
        for key in QUANTISED:
            if isinstance(found.get(key), dict) and (method := _method(found[key])):
                raise ConfigError(
                    f"model.path {path}: its weights are quantised ({key} in its config: {method}), and what is "
                    f"trained and saved are plain weights: specify the model that they were made from, or dequantise "
                    f"them first (transformers: model.dequantize()) and save a folder without {key}"
                )


def _method(settings: dict[str, Any]) -> str | None:
    """How weights are quantised, as a line says it; None if the settings are about something else."""
    bits = settings.get("bits") or (settings.get("load_in_4bit") and 4) or (settings.get("load_in_8bit") and 8)
    return settings.get("quant_method") or (f"{bits} bits" if bits else None)


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """A config and the configs in it."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def check_complete(module: nn.Module, info: dict[str, Any], path: str, kind: str) -> None:
    """Check that the weights of a folder and those of the model are the same ones.

    Raises:
        ModelError: some are missing or have another shape, or the folder has more for a part with weights than that
            part computes with (scales of quantised weights, biases that the config leaves out). Others are reported:
            another head, or the causal masks that older versions of transformers saved.
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
    if missing or mismatched:
        wrong = f"{len(missing)} weights are missing" if missing else f"{len(mismatched)} have another shape"
        raise ModelError(
            f"model {path} did not load completely: {wrong} (e.g. {(missing or mismatched)[0]}), they would be "
            f"random; save the folder again or choose the right model.kind (it is {kind})"
        )
    unexpected = sorted(info["unexpected_keys"])
    weighted = {name for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))}
    inside = [name for name in unexpected if name.rpartition(".")[0] in weighted]
    if inside:
        raise ModelError(
            f"model {path} did not load completely: {len(inside)} of its weights belong to parts of a "
            f"{type(module).__name__} that do not use them (e.g. {inside[0]}), so it computes something else, as with "
            f"quantised weights without a quantization_config; specify a folder whose config.json fits its weights"
        )
    if unexpected:
        log.warning(
            "model %s: %d of its weights are no part of a %s (e.g. %s); they are not loaded, and not in what is saved",
            *(path, len(unexpected), type(module).__name__, unexpected[0]),
        )


def reason(error: BaseException) -> str:
    """The first line of a library's error, with our remedy if the library's is a Python argument."""
    text = str(error).strip()
    if "contains custom code" in text:
        return "it comes with Python code of its own; set model.trust_remote_code=true if you trust it"
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return first_line(text)[:200]
