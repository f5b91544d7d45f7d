"""The student against the cache: does it match, does it start at zero, and where does it end on held-out anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from craft_ray.anchors.manifest import LAYER_DEFINITION, Identity, read_manifest
from craft_ray.anchors.reader import check_contains, check_identity, open_anchors
from craft_ray.anchors.schema import STEP0_AGREEMENT, STEP0_TOLERANCE
from craft_ray.config import Experiment
from craft_ray.errors import CacheRefused
from craft_ray.models.base import Model, evaluating, resolve_layers
from craft_ray.models.capabilities import token_model
from craft_ray.models.features import Shelves
from craft_ray.retention.batches import AnchorBatch, AnchorBatches
from craft_ray.storage.paths import StoragePath, storage_path
from craft_ray.workers import Workers


def open_for_student(
    config: Experiment, model: Model, teacher_weights: str | None, shelves: Shelves | None = None
) -> AnchorBatches:
    """The cache of a run, after every check that its identity allows.

    Args:
        teacher_weights: hash of the untouched student's weights; None on resume, where it is no longer the teacher
            and the checkpoint names the cache instead.
        shelves: preprocessed anchors of runs before this one.

    Raises:
        CacheRefused: the cache is of another teacher or preprocessor, or lacks what the config asks for.
        ConfigError: the model cannot be held to such anchors.
    """
    craft = config.craft
    assert craft.anchor_cache_dir is not None
    folder = storage_path(craft.anchor_cache_dir)
    manifest = read_manifest(folder)
    found = manifest.identity
    check_model(folder, found, config, model, teacher_weights)
    layers, positions = asked_of(folder, found, config)
    if craft.enabled:
        model.check_anchors([craft.retention_mode], positions)
    anchors = open_anchors(folder, manifest)
    return AnchorBatches(model, anchors, craft.retention_mode, layers, positions, shelves)


def asked_of(folder: StoragePath, found: Identity, config: Experiment) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers and positions of a cache that a config anchors.

    Raises:
        CacheRefused: the cache does not hold them, or not this retention mode.
    """
    craft, layers, positions = config.craft, found.layers, found.positions
    check_contains(folder, "mode", [craft.retention_mode], found.modes)
    if craft.retention_mode == "hidden":
        layers = _wanted_layers(config, found)
        positions = craft.positions or (config.anchors and config.anchors.positions) or positions
        check_contains(folder, "layers", layers, found.layers)
        check_contains(folder, "positions", positions, found.positions)
    return layers, positions


def check_model(
    folder: StoragePath, found: Identity, config: Experiment, model: Model, teacher_weights: str | None
) -> None:
    """Refuse a cache of another teacher, preprocessor or arithmetic than this model's.

    Raises:
        CacheRefused: naming both sides of the first difference.
    """
    expected = found.model_copy(
        update={
            "teacher": teacher_weights or found.teacher,
            "kind": model.kind,
            "preprocessor": model.preprocessor_fingerprint(),
            "precision": config.train.precision,
            "num_hidden_states": model.num_hidden_states,
            "hidden_size": model.hidden_size,
            "layer_definition": LAYER_DEFINITION,
        }
    )
    check_identity(folder, found, expected)


def _wanted_layers(config: Experiment, found: Identity) -> tuple[int, ...]:
    asked = config.craft.layers or (config.anchors and config.anchors.layers)
    if not asked:
        return found.layers
    try:
        return resolve_layers(asked, found.num_hidden_states)
    except ValueError as error:
        raise CacheRefused(str(error)) from None


@torch.no_grad()
def check_untouched(anchors: AnchorBatches, rows: Sequence[int], batch_size: int, workers: Workers) -> None:
    """Step 0 is a test: an untouched student gives what the teacher gave, within the storage's precision.

    It runs in the mode in which training runs, so dropout that is left on is found here.

    Raises:
        CacheRefused: it does not; preprocessing, dropout, layers or the teacher differ.
    """
    batches = [anchors.batch(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    identity = anchors.anchors.identity
    remedy = (
        f"preprocessing, dropout, layers or the teacher is not what the cache was built with; run 'craft-ray anchors "
        f"verify {anchors.anchors.folder} --config CONFIG'"
    )
    if anchors.mode == "token_ce":
        agreement = _agreement(anchors, batches, workers)
        if identity.suffix_from == "teacher" and agreement < STEP0_AGREEMENT[identity.precision]:
            raise CacheRefused(
                f"the untouched student agrees with only {agreement:.1%} of the teacher's cached tokens: {remedy}"
            )
        return
    losses = [anchors.loss(batch.to(workers.device), "relative_mse").item() for batch in batches]
    loss = sum(loss * batch.count for loss, batch in zip(losses, batches, strict=True)) / len(rows)
    tolerance = STEP0_TOLERANCE[identity.dtype, identity.precision]
    if not loss <= tolerance:
        raise CacheRefused(
            f"the untouched student is {loss:.2e} away from the cached teacher (relative mean square), "
            f"{identity.dtype} storage explains {tolerance:.0e}: {remedy}"
        )


def _agreement(anchors: AnchorBatches, batches: Sequence[AnchorBatch], workers: Workers) -> float:
    """The part of the cached tokens that are the student's likeliest."""
    model = token_model(anchors.model)
    wrong = sum(int((~model.token_log_probs(batch.inputs.to(workers.device))[1]).sum()) for batch in batches)
    return 1 - wrong / sum(batch.inputs.tokens for batch in batches)


@torch.inference_mode()
def heldout_loss(
    anchors: AnchorBatches, rows: Sequence[int], batch_size: int, loss_type: str, workers: Workers
) -> float:
    """L_ret over `rows`, each worker taking its share."""
    sums = torch.zeros(2, dtype=torch.float64, device=workers.device)
    mine = rows[workers.rank :: workers.world_size]
    with evaluating(anchors.model.module):
        for start in range(0, len(mine), batch_size):
            batch = anchors.batch(mine[start : start + batch_size]).to(workers.device)
            sums += torch.stack([anchors.loss(batch, loss_type).double() * batch.count, sums.new_tensor(batch.count)])
    workers.all_reduce(sums)
    return float(sums[0] / sums[1])
