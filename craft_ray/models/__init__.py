"""Models: the interface (`base.Model`) and what implements it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from craft_ray.errors import ConfigError
from craft_ray.models.base import Model
from craft_ray.quiet import uncollected

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:  # craft_ray.models.packing needs only torch and transformers, not pydantic
    from craft_ray.config import Experiment, ModelConfig, Precision


def load_model(
    config: ModelConfig,
    precision: Precision,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    mesh: DeviceMesh | None = None,
    gpus: int = 1,
) -> Model:
    """The model of a configuration, in training mode. If its path is the folder of an adapter, the adapter is merged
    into the model that it belongs to.

    Args:
        precision: arithmetic of its forward passes; teacher and student must use the same.
        weights: another folder to take the weights from (a checkpoint); processor and limits are still the config's.
            If it is the folder of an adapter, the adapter is put into the config's model, and is all that trains.
        mesh: the workers that share its weights; each of them must load it at the same time.
        gpus: 2 or more spread its layers over that many GPUs of this process; it is then not trained.

    Raises:
        ConfigError: nothing loads from the path, or the adapter does not belong to this model, or the model cannot be
            sharded.
        ModelError: its weights do not load completely.
    """
    from craft_ray.storage.node_cache import local_copy

    with uncollected():
        from craft_ray.models import adapting

    merged = tuple(local_copy(path, "model.merge_statistics") for path in config.merge_statistics)
    config = config.model_copy(update={"path": local_copy(config.path, "model.path"), "merge_statistics": merged})
    weights = None if weights is None else local_copy(weights, "a checkpoint")
    adapted = weights is not None and adapting.is_adapter(weights)
    if adapting.is_adapter(config.path) and (weights is None or adapted):
        if mesh is not None:
            raise ConfigError(
                f"model.path {config.path} is an adapter, which is merged into a whole model before it is shared out: "
                f"save the merged model ('craft-ray merge'), or set workers.sharding=none"
            )
        if gpus > 1:
            raise ConfigError(
                f"model.path {config.path} is an adapter, and a model over {gpus} GPUs is loaded whole: save the "
                f"merged model ('craft-ray merge'), or set anchors.gpus_per_actor=1"
            )
        model = _merged(config, precision, torch.device(device))
    else:
        if adapting.is_adapter(config.path):
            config = _with_processor(config)
        model = _load(config, precision, torch.device(device), None if adapted else weights, mesh, gpus)
    if weights is not None and adapted:
        adapting.load(model, Path(weights), config)
    return model


def teacher_of(config: Experiment, student: Model, untouched: bool) -> Callable[[], Model]:
    """The model before fine-tuning, when it is requested: the student itself while it is untouched; for a resumed run
    it is loaded again, on the student's device."""

    def teacher() -> Model:
        return student if untouched else load_model(config.model, config.train.precision, student.device)

    return teacher


def _merged(config: ModelConfig, precision: Precision, device: torch.device) -> Model:
    """The model that the adapter at `config.path` belongs to, with the adapter merged into it."""
    from craft_ray.models import adapting

    folder = Path(config.path)
    base, _ = _base(folder)
    config = _with_processor(config)
    model = _load(config, precision, device, base)
    adapting.load(model, folder, config.model_copy(update={"path": base}))
    adapting.merge(model)
    model.merged_adapter = folder
    return model


def _with_processor(config: ModelConfig) -> ModelConfig:
    """The config of an adapter, with the path of the model that it belongs to if its own folder has no processor."""
    base, revision = _base(Path(config.path))
    own = config.kind == "lerobot" or (Path(config.path) / "tokenizer_config.json").exists()
    return config.model_copy(update={"revision": revision, **({} if own else {"path": base})})


def _base(folder: Path) -> tuple[str, str | None]:
    """The model on this node that an adapter belongs to, and its revision."""
    from craft_ray.models import adapting
    from craft_ray.storage.node_cache import local_copy

    base, revision = adapting.base_of(folder)
    return local_copy(base, f"the model that the adapter {folder} belongs to"), revision


def _load(
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    weights: str | None,
    mesh: DeviceMesh | None = None,
    gpus: int = 1,
) -> Model:
    from craft_ray.extras import require_lerobot

    if config.kind == "lerobot":
        require_lerobot("model.kind is lerobot")
        with uncollected():
            from craft_ray.lerobot.kinds import load_policy

        return load_policy(config, precision, device, weights, mesh)
    with uncollected():
        from craft_ray.models.causal_lm import CausalLM
        from craft_ray.models.vision_language import VisionLanguageModel

    kinds: dict[str, type[CausalLM] | type[VisionLanguageModel]]
    kinds = {"causal_lm": CausalLM, "vision_language": VisionLanguageModel}
    return kinds[config.kind](config, precision, device, weights, mesh, gpus)
