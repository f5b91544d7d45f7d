"""Whether a cache belongs to this run: its teacher, its preprocessing, and the layers and positions that it needs."""

from __future__ import annotations

from collections.abc import Sequence

from craft_ray.anchors.manifest import LAYER_DEFINITION, Identity
from craft_ray.config import Experiment
from craft_ray.config.modes import RETENTION_MODES, stores
from craft_ray.errors import CacheRefused
from craft_ray.models.base import Model, resolve_layers
from craft_ray.storage.paths import StoragePath


def check_model(
    folder: StoragePath, found: Identity, config: Experiment, model: Model, teacher_weights: str | None
) -> None:
    """Refuse a cache of another teacher, preprocessor or arithmetic than this model's.

    The source and the selection are compared by `craft-ray anchors build` only: training does not need
    the anchors' files, they are in the cache.

    Args:
        teacher_weights: hash of the untouched student's weights; None if the student is no longer the teacher.

    Raises:
        CacheRefused: naming both sides of the first difference.
    """
    remedy = f"{found.renewal} for this model, or specify the one that belongs to it (this is {folder})"
    for what, ours, theirs in (
        ("teacher (hash of its weights)", teacher_weights or found.teacher, found.teacher),
        ("kind of model", model.kind, found.kind),
        ("preprocessor (hash)", model.preprocessor_fingerprint(), found.preprocessor),
        ("arithmetic of the forward pass", config.train.precision, found.precision),
        ("hidden states of the model", model.num_hidden_states, found.num_hidden_states),
        ("width", model.hidden_size, found.hidden_size),
        ("definition of layers", LAYER_DEFINITION, found.layer_definition),
    ):
        if ours != theirs:
            raise CacheRefused(f"the cache was built with another {what}: cache {theirs}, this run {ours}; {remedy}")


def select(folder: StoragePath, found: Identity, config: Experiment) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers and positions of a cache that a config anchors.

    Raises:
        CacheRefused: the cache lacks one of them, or this retention mode.
    """
    craft, layers, positions = config.craft, found.layers, found.positions
    read: Sequence[str] = ()
    _check_contains(folder, "skills", list(config.skills), found.skills or ())
    if not holds(found, craft.retention_mode):
        _check_contains(folder, "mode", [craft.retention_mode], found.modes)
    if stores([craft.retention_mode], "vectors"):
        layers = _wanted_layers(config, found)
        positions = craft.positions or (config.anchors and config.anchors.positions) or positions
        _check_contains(folder, "layers", layers, found.layers)
        _check_contains(folder, "positions", positions, found.positions)
        read = positions
    if stores([craft.retention_mode], "logits"):
        positions = read = _logits_positions(folder, config, found)
    if stores([craft.retention_mode], "suffix") or "suffix" in read:
        _check_suffix(folder, config, found)
    return layers, positions


def _check_suffix(folder: StoragePath, config: Experiment, found: Identity) -> None:
    """Refuse suffix tokens of another origin than the config says. Earlier shards do not say whose tokens they hold."""
    if config.anchors is None or found.imported or config.anchors.suffix_from == found.suffix_from:
        return
    raise CacheRefused(
        f"the cache in {folder} was built with anchors.suffix_from {found.suffix_from}, this run's is "
        f"{config.anchors.suffix_from}: change the config, or build another cache"
    )


def holds(found: Identity, mode: str) -> bool:
    """Whether a cache has what a retention mode needs, whichever mode it was stored for."""
    schema = found.schema
    held = {
        "vectors": schema.has_hidden,
        "suffix": schema.has_suffix,
        "logits": schema.logits is not None,
        "response": schema.has_response,
    }
    return all(held[what] for what in RETENTION_MODES[mode].stores)


def _logits_positions(folder: StoragePath, config: Experiment, found: Identity) -> tuple[str, ...]:
    """The positions of the cached logits, if they are what the config says about them."""
    held = found.logits
    assert held is not None, "a cache with this mode has logits"
    if config.anchors is not None and "logits" in config.anchors.modes:
        asked = config.anchors.logits
        for what, ours, theirs in (
            ("k", asked.k, held.k),
            ("temperature", asked.temperature, held.temperature),
            ("positions", asked.positions or held.positions, held.positions),
        ):
            if ours != theirs:
                raise CacheRefused(
                    f"the cache in {folder} holds logits of {what} {_shown(theirs)}, anchors.logits.{what} is "
                    f"{_shown(ours)}: change the config, or build the cache again"
                )
    return held.positions


def _shown(value: object) -> str:
    return _listed(value) if isinstance(value, tuple) else str(value)


def _wanted_layers(config: Experiment, found: Identity) -> tuple[int, ...]:
    asked = config.craft.layers or (config.anchors and config.anchors.layers)
    if not asked:
        return found.layers
    try:
        return resolve_layers(asked, found.num_hidden_states)
    except ValueError as error:
        raise CacheRefused(str(error)) from None


def _check_contains(folder: StoragePath, what: str, wanted: Sequence[object], held: Sequence[object]) -> None:
    """Refuse a cache that lacks a mode, a layer or a position."""
    lacking = [w for w in wanted if w not in held]
    if lacking:
        raise CacheRefused(
            f"the cache in {folder} holds {what} {_listed(held)}, this run asks for {_listed(wanted)}: change the "
            f"config, or build a cache with {_listed(lacking)}"
        )


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items)) or "none"
