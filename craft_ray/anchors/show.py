"""A readable description of a cache in a few lines."""

from __future__ import annotations

from craft_ray.anchors.manifest import MANIFEST, SHARDS, Identity, Manifest, Plan, read_manifest, read_plan
from craft_ray.anchors.schema import StoredLogits
from craft_ray.storage.files import readable_bytes
from craft_ray.storage.paths import StoragePath


def describe(folder: StoragePath) -> list[str]:
    """What a cache holds, whether it is complete or half-written.

    Raises:
        CacheRefused: there is none, or its manifest is damaged.
    """
    plan = read_plan(folder)
    if plan is not None and not (folder / MANIFEST).exists():
        return _half_written(folder, plan)
    return _complete(folder, read_manifest(folder))


def _complete(folder: StoragePath, manifest: Manifest) -> list[str]:
    """A complete cache in a few lines."""
    identity = manifest.identity
    schema, lines = identity.schema, [f"anchor cache {folder}: complete"]
    images = f", pixels {'x'.join(map(str, identity.pixel_shape))}" if identity.pixel_shape else ""
    facts = {
        "anchors": f"{identity.rows} ({identity.inputs} inputs{images})",
        "modes": ", ".join(identity.modes),
    }
    if schema.has_hidden:
        facts["vectors"] = f"{manifest.vectors} ({manifest.vectors / identity.rows:.1f} per anchor)"
        facts["layers"] = (
            f"{list(identity.layers)} of 0 to {identity.num_hidden_states - 1}, width {identity.hidden_size}"
        )
        facts["positions"] = ", ".join(identity.positions)
    if schema.logits is not None:
        facts["logits"] = logits_in_words(schema.logits, identity.dtype)
    if schema.has_hidden or schema.logits is not None:
        facts["storage"] = identity.dtype
    if schema.has_suffix:
        facts["suffix"] = suffix_in_words(identity)
    if schema.has_response:
        facts["response"] = "the data's own"
    facts |= {
        "teacher": f"{identity.kind}, weights {identity.teacher}, run in {identity.precision}",
        "preprocessor": identity.preprocessor,
        "source": identity.source,
        "fingerprint": manifest.fingerprint,
        "size": f"{readable_bytes(manifest.bytes)} ({manifest.bytes} bytes) in {len(manifest.shards)} shards",
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.written_by.items()),
    }
    return lines + [f"  {name:<13}{value}" for name, value in facts.items()]


def suffix_in_words(identity: Identity) -> str:
    """Whose suffix tokens a cache holds. Only what a build generates ends at `max_new_tokens`."""
    if identity.suffix_from == "response":
        return "the data's responses"
    return "the teacher's own" + ("" if identity.imported else f", up to {identity.max_new_tokens} tokens")


def logits_in_words(logits: StoredLogits, dtype: str, tokens_per_row: float | None = None) -> str:
    """What mode `logits` stores, and its size."""
    many = "" if tokens_per_row is None else f"{tokens_per_row:.1f} tokens an anchor, "
    others = " and the mass of the others" if logits.classes > logits.k else ""
    heated = f" at temperature {logits.temperature:g}" if logits.temperature != 1 else ""
    return (
        f"the {logits.k} most likely of {logits.vocabulary} next tokens{others}{heated}, at "
        f"{', '.join(logits.positions)} ({many}{logits.token_bytes(dtype)} bytes a token)"
    )


def _half_written(folder: StoragePath, plan: Plan) -> list[str]:
    """A cache whose build has not finished."""
    present = [name for name, _ in plan.shards() if (folder / SHARDS / name).exists()]
    return [
        f"anchor cache {folder}: half-written, {len(present)} of {len(plan.shards())} shards are there",
        f"  {'anchors':<13}{plan.identity.rows} planned",
        f"  {'fingerprint':<13}{plan.identity.fingerprint}",
        "run 'craft-ray anchors build' again, it resumes where it stopped",
    ]
