"""Building the anchor cache with Ray Data, whose processes are in `teachers`.

A row of the dataset is a shard to write, or a row group of one, not a sample: which rows a shard holds is decided
beforehand, and a shard appears by a rename. So whatever dies, and whenever, the shards that exist are complete, a
repeated one replaces itself, and the next build writes what is missing.
"""

from __future__ import annotations

import gc
import logging
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_pipelines.build_progress import BuildProgress, Telling, heard
from craft_pipelines.console import screen
from craft_pipelines.outputs import check_kept
from craft_pipelines.ray_metrics import BuildMetrics
from craft_pipelines.session import check_resources, check_total, join
from craft_pipelines.storage_check import check_shared
from craft_pipelines.teachers import AnchorReader, GroupTeacher, GroupWriter, ShardWriter
from craft_ray import interruption
from craft_ray.anchors.build import (
    Estimate,
    estimate,
    finish,
    finished_shards,
    full_suffixes,
    identity_of,
    only_writer,
    row_groups,
)
from craft_ray.anchors.forward import tokens_per_pack
from craft_ray.anchors.importing import import_shards
from craft_ray.anchors.legacy_files import ShardFiles
from craft_ray.anchors.manifest import (
    MANIFEST,
    SHARDS,
    Identity,
    Manifest,
    Plan,
    check_same,
    read_manifest,
    read_plan,
    write_plan,
)
from craft_ray.anchors.show import logits_in_words, suffix_in_words
from craft_ray.anchors.verify import check_files
from craft_ray.config import AnchorsConfig, Experiment, dump_config
from craft_ray.data.skills import open_anchor_source
from craft_ray.data.source import Source
from craft_ray.errors import CacheRefused, ConfigError, CraftError
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.models.weightless import without_weights
from craft_ray.retention.reforward import Agreement, reforward
from craft_ray.run.rows import anchor_rows, check_rows
from craft_ray.storage.files import clear_leftovers, readable_bytes
from craft_ray.storage.paths import StoragePath, storage_path
from craft_ray.workers import OneWorker

if TYPE_CHECKING:
    import ray.data

CHECKED_ROWS = 8
"""Imported rows on which the teacher is run again."""

MAX_DEATHS = 3
"""Deaths of a teacher's process in a row, without a shard finished in between, after which a build gives up. A teacher
that was lost with its node does not count."""


@dataclass(frozen=True)
class Built:
    """What a build did."""

    manifest: Manifest
    rows_computed: int
    """0 if the cache was already complete."""


def build(config: Experiment, say: Any = print) -> Built:
    """Build the cache of an experiment in `craft.anchor_cache_dir`, or finish it, or find it complete.

    Raises:
        CacheRefused: the folder contains another cache, or a damaged one.
    """
    anchors, folder = anchors_section(config)
    check_kept(folder, "craft.anchor_cache_dir")
    with only_writer(folder):
        return _build(config, anchors, folder, say)


def preview(config: Experiment, say: Any = print) -> None:
    """Say what a build would store and how large it would be, and check the rows as it does. Nothing is written.

    Raises:
        DataError: an anchor cannot be used.
    """
    anchors, folder = anchors_section(config)
    model, source = _opened(config, anchors, say)
    identity = identity_of(config, model, source)
    _check_every_row(config, model, source, identity, say)
    _announce(say, identity, estimate(model, source, identity.schema, anchors), folder)


def _opened(config: Experiment, anchors: AnchorsConfig, say: Any) -> tuple[Model, Source]:
    """The teacher and the anchors, which it can read."""
    say(f"loading the teacher {config.model.path}")
    model = load_model(config.model.on_host, config.train.precision)
    source = open_anchor_source(anchors, config.skills)
    model.check_source(source)
    return model, source


def _check_every_row(config: Experiment, model: Model, source: Source, identity: Identity, say: Any) -> None:
    """
    Raises:
        DataError: an anchor cannot be used.
    """
    assert config.anchors is not None
    rows = anchor_rows(config.anchors, model, source, identity)
    with screen() as shown:
        check_rows(rows, config.train.check_minutes, OneWorker(), say, shown.progress)


def _build(config: Experiment, anchors: AnchorsConfig, folder: StoragePath, say: Any) -> Built:
    model, source = _opened(config, anchors, say)
    ids = source.ids()
    plan = _plan(folder, identity_of(config, model, source), anchors)
    done = finished_shards(folder, plan, ids)
    missing = [(name, rows) for name, rows in plan.shards() if name not in done]
    if (folder / MANIFEST).exists():
        check_present(folder, done)
        if not missing:
            manifest = read_manifest(folder)
            say(f"anchor cache found in {folder}: {manifest.identity.rows} anchors, no row computed")
            return Built(manifest, 0)

    _check_every_row(config, model, source, plan.identity, say)
    expected = estimate(model, source, plan.identity.schema, anchors)
    _announce(say, plan.identity, expected, folder)
    if done:
        say(f"{len(done)} of {len(plan.shards())} shards exist already")
    packed = tokens_per_pack(model, anchors)
    passes = f"packs of up to {packed} tokens" if packed else f"batches of {anchors.batch_size} anchors, padded"
    say(f"forward passes on {passes}")
    clear_leftovers(folder / SHARDS)  # of an earlier build
    reader = without_weights(model) if anchors.readers and config.workers.num_workers else None
    del model  # the teachers load their own, and here it would take the memory of one more
    teach = _in_process if config.workers.num_workers == 0 else _on_ray
    written = sum(shard.rows for shard in done.values())
    with BuildMetrics(folder, plan.identity.rows, written) as metrics, screen() as shown:
        progress = BuildProgress(plan.identity.rows, written, shown.progress, metrics.ran)
        for name, rows in teach(config, plan, missing, progress, reader):
            metrics.wrote(rows)
            progress.wrote(name, rows)
        progress.end()
    clear_leftovers(folder / SHARDS)  # of teachers that died in this one
    manifest = finish(folder, plan, ids)
    say(
        f"anchor cache complete: {manifest.identity.rows} anchors, {manifest.vectors} vectors, "
        f"{readable_bytes(manifest.bytes)} ({manifest.bytes} bytes; estimated {readable_bytes(expected.bytes)})"
    )
    # A text may have no end; actions do, and a part of them cannot be executed.
    if manifest.identity.inputs == "frames" and (full := full_suffixes(folder, manifest)):
        say(
            f"the action tokens of {full} of {manifest.identity.rows} anchors fill anchors.max_new_tokens="
            f"{manifest.identity.max_new_tokens} and may be cut off: raise it; if they never end, the teacher has not "
            f"learnt to act (random weights?)"
        )
    return Built(manifest, sum(len(rows) for _, rows in missing))


def anchors_section(config: Experiment) -> tuple[AnchorsConfig, StoragePath]:
    """The section `anchors` and the cache folder; without them there is no cache to build."""
    if config.anchors is None:
        raise ConfigError("the config has no section anchors: set at least anchors.source.path")
    if config.craft.anchor_cache_dir is None:
        raise ConfigError("craft.anchor_cache_dir is not set: set it to the folder for the anchor cache")
    return config.anchors, storage_path(config.craft.anchor_cache_dir)


def _plan(folder: StoragePath, identity: Identity, anchors: AnchorsConfig) -> Plan:
    """The plan in the folder, if it belongs to the same cache, or a new one."""
    plan = read_plan(folder)
    started = (folder / MANIFEST).exists() or any((folder / SHARDS).glob("*.parquet"))
    if plan is None or not started:  # a plan without any shard may be replaced
        if (folder / MANIFEST).exists():
            raise CacheRefused(f"the cache in {folder} was imported, not built: choose another craft.anchor_cache_dir")
        plan = Plan(identity=identity, rows_per_shard=anchors.rows_per_shard)
        write_plan(folder, plan)
        return plan
    check_same(folder, plan.identity, identity, "config builds")
    return plan


def check_present(folder: StoragePath, done: dict[str, Any]) -> None:
    """Check the finished shards against the checksums in the manifest."""
    for shard in read_manifest(folder).shards:
        found = done.get(shard.name)
        if found is not None and found.blake3 != shard.blake3:
            raise CacheRefused(
                f"{folder / SHARDS / shard.name} is damaged: its checksum is {found.blake3[:12]}, the manifest says "
                f"{shard.blake3[:12]}; delete this file and build again, which rewrites it"
            )


def _announce(say: Any, identity: Identity, expected: Estimate, folder: StoragePath) -> None:
    what = []
    if "hidden" in identity.modes:
        what.append(
            f"hidden states of layers {list(identity.layers)} at {', '.join(identity.positions)} "
            f"({expected.vectors_per_row:.1f} vectors an anchor)"
        )
    if identity.schema.has_suffix:
        what.append(f"suffix tokens: {suffix_in_words(identity)}")
    if identity.logits is not None:
        what.append(logits_in_words(identity.logits, identity.dtype, expected.tokens_per_row))
    say(f"building the anchor cache in {folder}: {identity.rows} anchors, {'; '.join(what)}")
    say(f"estimated size {readable_bytes(expected.bytes)} ({expected.bytes} bytes)")


def _in_process(
    config: Experiment, plan: Plan, missing: list[tuple[str, range]], progress: BuildProgress, _: bytes | None
) -> Iterator[tuple[str, int]]:
    writer = ShardWriter(dump_config(config), plan.model_dump_json(), progress.passed)
    for name, rows in missing:
        interruption.check()
        writer.write(name, rows)
        yield name, len(rows)


def _on_ray(
    config: Experiment, plan: Plan, missing: list[tuple[str, range]], progress: BuildProgress, reader: bytes | None
) -> Iterator[tuple[str, int]]:
    """Run Ray Data over the missing shards, and again over the rest if a process or a node was lost."""
    import ray.data

    from craft_pipelines.failures import LOST_PROCESS_ERRORS, node_was_lost

    anchors, folder = anchors_section(config)
    join()
    actors = min(anchors.actors, len(missing))
    each = {"CPU": anchors.cpus_per_actor, "GPU": anchors.gpus_per_actor}
    lacking = check_resources(actors, each, "anchors.actors")
    if lacking is None and reader is not None:
        total = {"CPU": actors * anchors.cpus_per_actor + anchors.readers}
        lacking = check_total(1, total, "anchors.actors and anchors.readers")
    if lacking:
        raise ConfigError(lacking)
    check_shared(folder, "craft.anchor_cache_dir")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a shard may take a slow teacher hours
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log is also raised
    deaths, left, telling = 0, dict(missing), Telling(uuid.uuid4().hex)
    while left:
        try:
            with heard(telling.build, progress):
                for row in _dataset(config, plan, left, actors, telling, reader).iter_rows():
                    if row["error"]:
                        raise CraftError.from_message(row["error"], row["exit_code"])
                    deaths = 0
                    yield row["name"], len(left.pop(row["name"]))
        except LOST_PROCESS_ERRORS as error:
            deaths += not node_was_lost(error)
            if deaths > MAX_DEATHS:
                raise CraftError(
                    f"a teacher's process died {deaths} times in a row, the next shard to write is {next(iter(left))}: "
                    f"something kills it, often a lack of memory; lower anchors.batch_size, anchors.pack_tokens, "
                    f"anchors.actors or anchors.readers, and build again"
                ) from None
            for name in [name for name in left if (folder / SHARDS / name).exists()]:
                yield name, len(left.pop(name))
    gc.collect()  # Ray ends the teachers' processes once nothing refers to them, and reference cycles do


def _dataset(
    config: Experiment,
    plan: Plan,
    shards: dict[str, range],
    actors: int,
    telling: Telling,
    reader: bytes | None,
) -> ray.data.Dataset:
    """A row for each shard that was written.

    Args:
        reader: the model of the readers; None: teachers read their rows, and write them, themselves.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    anchors, folder = anchors_section(config)
    texts = {"config": dump_config(config), "plan": plan.model_dump_json()}
    parts = {name: [rows] if reader is None else _groups(rows) for name, rows in shards.items()}
    most = max(map(len, parts.values()))
    for rows in parts.values():
        rows += [range(0)] * (most - len(rows))  # every shard has equally many, so that a writer's batch is one shard
    items = [{"name": name, "start": part.start, "stop": part.stop} for name in parts for part in parts[name]]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.set_name(f"anchors-{folder.name}")  # its name in the dashboard
    count = min(actors, len(shards))
    # Its mistakes are values, and a process that dies is replaced by the next round of `_on_ray`.
    process: dict[str, Any] = {"batch_size": 1, "max_restarts": 0}
    teacher = process | {
        "fn_constructor_args": (*texts.values(), telling),
        "compute": ray.data.ActorPoolStrategy(size=count),
        "num_cpus": anchors.cpus_per_actor,
        "num_gpus": anchors.gpus_per_actor or None,
    }
    with warnings.catch_warnings():
        # Ray Data itself restarts actors without limit, and only a deprecated argument prevents it (Ray is pinned).
        warnings.simplefilter("ignore", RayDeprecationWarning)
        if reader is None:
            return dataset.map_batches(ShardWriter, **teacher)
        # In the order of the rows, so that the groups of a shard arrive at its writer together.
        dataset.context.execution_options.preserve_order = True
        readers = process | {
            "fn_constructor_args": (texts["config"], reader),
            "compute": ray.data.ActorPoolStrategy(size=min(anchors.readers, len(items))),
            "num_cpus": 1,
        }
        writers = process | {
            "batch_size": most,
            "fn_constructor_args": tuple(texts.values()),
            "compute": ray.data.ActorPoolStrategy(size=count),
            "num_cpus": 0,  # it waits for the disk, and takes no processor from the others
        }
        read = dataset.map_batches(AnchorReader, **readers)
        return read.map_batches(GroupTeacher, **teacher).map_batches(GroupWriter, **writers)


def _groups(rows: range) -> list[range]:
    return [range(group[0], group[-1] + 1) for group in row_groups(rows)]


def verify(folder: StoragePath, config: Experiment | None, rows: int, say: Any = print) -> None:
    """Check a cache against its manifest and, with a config, `rows` of it against the model.

    Raises:
        CacheRefused: the cache does not match its manifest, or the model does not reproduce it.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    say(f"{len(manifest.shards)} shards are undamaged, {manifest.identity.rows} anchors, each id once")
    if config is not None:
        model = load_model(config.model.on_host, config.train.precision)
        report_agreement(say, reforward(folder, manifest, config, model, rows))


def report_agreement(say: Any, agreement: Agreement) -> None:
    what = []
    if agreement.distance is not None:
        what.append(f"largest relative mean square {agreement.distance:.1e}")
    if agreement.divergence is not None:
        what.append(f"divergence of the logits {agreement.divergence:.1e} nats a token")
    if agreement.tokens is not None:
        what.append(f"{agreement.equal_tokens} of {agreement.tokens} suffix tokens equal")
    say(f"the model reproduces {agreement.rows} anchors: {', '.join(what) or 'nothing to compare'}")


def import_legacy(legacy: Path, config: Experiment, check: bool, say: Any = print) -> Manifest:
    """Convert legacy shards into the cache that a config names.

    Raises:
        CacheRefused: the shards do not match the config, or its model does not reproduce them.
    """
    _, folder = anchors_section(config)
    check_kept(folder, "craft.anchor_cache_dir")
    if config.skills:
        raise ConfigError("earlier shards do not say which skill an anchor belongs to: import them without skills")
    model = load_model(config.model.on_host, config.train.precision)
    shards = ShardFiles(legacy)

    def reproduced(written: StoragePath, manifest: Manifest) -> None:
        if check:
            report_agreement(say, reforward(written, manifest, config, model, CHECKED_ROWS))

    with only_writer(folder):
        manifest = import_shards(shards, folder, config, model, reproduced, say)
    say(
        f"anchor cache complete: {manifest.identity.rows} anchors from {len(shards.files)} legacy shards, "
        f"{manifest.vectors} vectors, {readable_bytes(manifest.bytes)}; it is in {folder}"
    )
    return manifest
