"""The folder of a LeRobot policy: its configuration, weights and processors, loaded completely or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors import SafetensorError
from safetensors.torch import load_file

from craft_ray.config import ModelConfig
from craft_ray.errors import ConfigError, ModelError, first_line
from craft_ray.lerobot.processors import Processors, check_statistics, merge_statistics
from craft_ray.lerobot.sharding import without_data
from craft_ray.lerobot.size import SIZE_FILE, sized
from craft_ray.lerobot.tokenizers import (
    ACTION_TOKENIZER,
    TEXT_TOKENIZER,
    complete_processor_config,
    fast_tokenizer,
    local_names,
    without_remote_code,
)
from craft_ray.models.adapter import Adapter
from craft_ray.models.loading import refuse_hub_adapter
from craft_ray.quiet import without_prints

WEIGHTS = "model.safetensors"
SUPPORTED = ("pi0_fast", "pi05", "smolvla", "act")


@dataclass
class PolicyFolder:
    """The loaded contents of a folder."""

    path: Path
    policy: PreTrainedPolicy
    processors: Processors
    device: str | None
    """The device that the folder's own configuration names."""


Share = Callable[[Callable[[], PreTrainedPolicy], Callable[[], PreTrainedPolicy]], PreTrainedPolicy]
"""A policy that workers hold together: from what loads it, and what builds it without weights."""


def load_folder(
    config: ModelConfig, device: torch.device, weights: str | None, share: Share | None = None
) -> PolicyFolder:
    """Load a policy with its processors.

    Args:
        weights: another folder to take the weights from; configuration and processors stay those of `config.path`.
        share: how several workers hold it together, if they do.

    Raises:
        ConfigError: no policy loads from the path, or its type is not supported.
        ModelError: its weights do not load completely, or its normaliser lacks statistics.
    """
    path = _resolve(config)
    settings, own_device = _settings(path)
    _adapt(settings, config)
    local_names(settings, path)
    tokenizer = _action_tokenizer(config, settings)

    def build(on: torch.device) -> PreTrainedPolicy:
        settings.device = str(on)
        with _silent(), sized(path), without_remote_code(tokenizer, config.trust_remote_code):
            try:
                policy = get_policy_class(settings.type)(settings)
            except (ValueError, RuntimeError, OSError, ImportError) as error:
                raise ConfigError(f"model.path {path}: no {settings.type} can be built ({first_line(error)})") from None
        if "dtype" not in vars(settings):
            policy.float()  # smolvla takes the dtype in which its vision-language model was published
        return policy

    def load(on: torch.device) -> PreTrainedPolicy:
        policy = build(on)
        load_weights(policy, path if weights is None else _resolve(config.model_copy(update={"path": weights})))
        return policy

    def empty() -> PreTrainedPolicy:
        with without_data():
            return build(torch.device("meta"))

    policy = load(device) if share is None else share(lambda: load(torch.device("cpu")), empty)
    settings.device = str(device)
    return PolicyFolder(path, policy, _processors(config, settings, path, tokenizer), own_device)


def folder_around(config: ModelConfig, policy: PreTrainedPolicy) -> PolicyFolder:
    """Combine the processors of `config.path` with a policy that is already loaded and in training.

    Raises:
        ConfigError: the path holds a policy of another type.
    """
    path = _resolve(config)
    settings, own_device = _settings(path)
    if settings.type != policy.name:
        raise ConfigError(
            f"model.path {path} holds a {settings.type}, the policy in training is a {policy.name}: specify the "
            f"teacher's own folder"
        )
    local_names(settings, path)
    processors = _processors(config, settings, path, _action_tokenizer(config, settings))
    return PolicyFolder(path, policy, processors, own_device)


def _action_tokenizer(config: ModelConfig, settings: PreTrainedConfig) -> Any:
    if settings.type != "pi0_fast":
        return None
    return fast_tokenizer(settings.action_tokenizer_name, config.trust_remote_code)


def _processors(config: ModelConfig, settings: PreTrainedConfig, path: Path, tokenizer: Any) -> Processors:
    with _silent(), without_remote_code(tokenizer, config.trust_remote_code):
        processors = _load_processors(settings, path, tokenizer)
    check_statistics(processors, path)
    if config.merge_statistics:
        merge_statistics(processors, config.merge_statistics)
    return processors


def _resolve(config: ModelConfig) -> Path:
    path = Path(config.path)
    if path.is_dir():
        return path
    if path.is_absolute():
        raise ConfigError(f"model.path {path}: there is no such folder: specify one, or a policy on the hub")
    try:
        found = Path(snapshot_download(config.path, revision=config.revision))
    except Exception as error:  # the hub's client may raise any exception
        where = "there is no such folder, and no such policy on the hub or in its local cache"
        raise ConfigError(f"model.path {config.path}: {where} ({first_line(error)})") from None
    if not (found / WEIGHTS).is_file():
        refuse_hub_adapter(config.path, config.revision)
    return found


def _settings(path: Path) -> tuple[PreTrainedConfig, str | None]:
    """The policy's configuration, and the device that it names: LeRobot replaces one that is not available."""
    try:
        stored = json.loads((path / "config.json").read_text())
        kind, device = stored.get("type"), stored.get("device")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"model.path {path} is not the folder of a LeRobot policy (config.json: {first_line(error)}): specify one "
            f"that LeRobot or craft-ray saved"
        ) from None
    if kind not in SUPPORTED:
        raise ConfigError(
            f"model.path {path} holds {f'a policy of type {kind}' if kind else 'a model without a policy type'}, "
            f"but model.kind lerobot supports {', '.join(SUPPORTED)}: choose one of them, or another model.kind"
        )
    get_policy_class(kind)  # registers its configuration
    try:
        with _silent():
            return PreTrainedConfig.from_pretrained(path), device
    except Exception as error:  # draccus raises its own errors
        raise ConfigError(f"model.path {path}: its config.json is not LeRobot's ({first_line(error)})") from None


def _adapt(settings: PreTrainedConfig, config: ModelConfig) -> None:
    """Set the values of a policy's configuration that are decided here.

    Raises:
        ConfigError: this type of policy does not support a setting.
    """
    ours = {
        "dtype": config.dtype,
        "gradient_checkpointing": config.gradient_checkpointing,
        "compile_model": False,
        # All weights are in the folder; LeRobot would first download those that its training started from.
        "pretrained_backbone_weights": None,
        "load_vlm_weights": False,
    }
    known = vars(settings).keys()
    for name, only in (("dtype", "float32"), ("gradient_checkpointing", False)):
        if name not in known and ours[name] != only:
            raise ConfigError(
                f"model.{name} is {ours[name]}, but a policy of type {settings.type} supports only {only}: leave it out"
            )
    for name in ours.keys() & known:
        setattr(settings, name, ours[name])


def _load_processors(settings: PreTrainedConfig, path: Path, tokenizer: Any) -> Processors:
    before: dict[str, Any] = {"device_processor": {"device": "cpu"}}
    if tokenizer is not None:
        before["action_tokenizer_processor"] = {
            "action_tokenizer_input_object": tokenizer,
            "max_action_tokens": settings.max_action_tokens,
            "fast_skip_tokens": settings.fast_skip_tokens,
            "paligemma_tokenizer_name": settings.text_tokenizer_name,
        }
        before["tokenizer_processor"] = {"tokenizer_name": settings.text_tokenizer_name}
    try:
        loaded = make_pre_post_processors(settings, pretrained_path=str(path), preprocessor_overrides=before)
    except Exception as error:  # a pipeline's steps may raise any exception
        raise ConfigError(
            f"model.path {path}: its processors do not load ({first_line(error)}): save the policy with LeRobot 0.6, "
            f"which writes policy_preprocessor.json and policy_postprocessor.json beside the weights"
        ) from None
    return Processors(*loaded)


def load_weights(policy: PreTrainedPolicy, path: Path) -> None:
    """Load the weights of a folder into a policy. LeRobot's own `from_pretrained` may silently leave random ones.

    Raises:
        ModelError: a weight is missing, unknown or of another shape.
    """
    file = path / WEIGHTS
    if not file.exists():
        raise ModelError(f"model {path} has no {WEIGHTS}: the policy would be random; specify a folder that has it")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model {path}: its weights are damaged ({first_line(error)}): download or save it again"
        ) from None
    if hasattr(policy, "_fix_pytorch_state_dict_keys"):  # names of older checkpoints of the pi family
        with _silent():
            state = policy._fix_pytorch_state_dict_keys(state, policy.config)
        state = {key if key.startswith("model.") else f"model.{key}": value for key, value in state.items()}
    expected = policy.state_dict()
    shared = _shared(expected)
    missing = sorted(key for key in expected if key not in state and not shared[key] & state.keys())
    unknown = sorted(key for key in state if key not in expected)
    reshaped = sorted(key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape)
    for keys, what in ((missing, "are missing"), (unknown, "are unknown"), (reshaped, "have another shape")):
        if keys:
            raise ModelError(
                f"model {path} did not load completely: {len(keys)} weights {what} (e.g. {keys[0]}), and the policy "
                f"would be partly random; specify the complete folder of a {policy.name} of this size"
            )
    policy.load_state_dict(state, strict=False)


def _shared(state: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """For each tensor, the names of all that share its memory; a file holds only one of them."""
    groups: dict[int, set[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), set()).add(key)
    return {key: groups[tensor.data_ptr()] if tensor.numel() else {key} for key, tensor in state.items()}


def save_folder(
    found: PolicyFolder,
    folder: Path,
    final: Path | None = None,
    adapter: Adapter | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that both LeRobot's `from_pretrained` and `load_folder` load; with an adapter, the one that
    LeRobot's `make_policy` loads, with the adapter in place of the weights. Tokenizers inside the policy's own folder
    are copied.

    Args:
        final: the folder's final path, if it is first written elsewhere.
        weights: those of the policy, if it does not hold all of them itself.
    """
    settings = found.policy.config
    device, settings.device = settings.device, found.device
    settings.use_peft = adapter is not None
    try:
        with _silent():
            if adapter is None:
                found.policy.save_pretrained(folder, state_dict=weights)
            else:
                adapter.save(folder)
            settings.save_pretrained(folder)
            found.processors.before.save_pretrained(folder)
            found.processors.after.save_pretrained(folder)
    finally:
        settings.device = device
    for inside in (TEXT_TOKENIZER, ACTION_TOKENIZER):
        if (found.path / inside).is_dir():
            shutil.copytree(found.path / inside, folder / inside)
    complete_processor_config(folder, final)
    if (found.path / SIZE_FILE).exists():
        shutil.copyfile(found.path / SIZE_FILE, folder / SIZE_FILE)


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress what LeRobot prints and logs while it loads."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with without_prints():
            yield
    finally:
        logging.disable(level)
