"""All rows of a source are prepared once before the first step, so that a row that cannot be used ends a command in its
first minutes, and not at the step that draws it.

What was found is kept in the node's cache under a hash of the data and of everything that prepares them: the next run
on them checks nothing again. If the time does not suffice, the next run checks the rows that are left.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from craft_ray import interruption
from craft_ray.anchors.manifest import Identity
from craft_ray.config import AnchorsConfig
from craft_ray.data.place import Place, listed
from craft_ray.data.source import Source
from craft_ray.errors import DataError
from craft_ray.method.pooling import token_positions
from craft_ray.models.base import Model
from craft_ray.models.capabilities import token_model
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.pace import Pace, Report, unreported
from craft_ray.storage.files import write_atomically
from craft_ray.storage.node_cache import node_cache
from craft_ray.workers import Workers

MOST_THREADS = 8
EXAMPLES = 3
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Rows:
    """The rows of a source, and what a stage does with each of them before the model sees it."""

    key: str
    """The source's key in the configuration."""
    count: int
    content: str
    """Hash of the data and of how they are read; only the first worker's counts."""
    prepare: Callable[[int], object]
    place: Callable[[int], Place]
    how: Sequence[Any]
    """Everything else that decides whether a row can be prepared."""
    threaded: bool = False
    """Whether several threads may prepare rows at once, and are faster."""

    @property
    def identity(self) -> str:
        return json_fingerprint([importlib.metadata.version("craft-ray"), self.content, list(self.how)])


def anchor_rows(anchors: AnchorsConfig, model: Model, source: Source, identity: Identity) -> Rows:
    """The anchors of a cache, as its teacher reads them. A suffix that the teacher has yet to generate counts as the
    longest that it may be: whether it is that long shows only in the middle of a build."""
    longest = [0] * anchors.max_new_tokens
    positions = [
        *(identity.positions if identity.schema.has_hidden else ()),
        *(identity.logits.positions if identity.logits else ()),
    ]

    def prepare(row: int) -> None:
        sample = source[row]
        prompt = whole = model.preprocess(sample)
        if identity.schema.has_suffix:
            tokens = token_model(model)
            if anchors.suffix_from == "response":
                whole = tokens.with_suffix(prompt, tokens.response_tokens(sample), sample.where)
            else:
                tokens.check_continued(prompt, anchors.max_new_tokens, f"the prompt of {sample.where}")
                whole = tokens.with_suffix(prompt, longest, f"{sample.where}, continued by {len(longest)} tokens,")
        for position in positions:
            try:
                token_positions(whole.layout, position)
            except DataError as error:
                raise DataError(f"{sample.where}: {error.message}") from None
        if identity.schema.has_response:
            tokens = token_model(model)
            tokens.with_suffix(prompt, tokens.response_tokens(sample), sample.where)

    return Rows(
        "anchors.source",
        len(source),
        source.fingerprint,
        prepare,
        source.place,
        [
            "anchors",
            model.sample_fingerprint(),
            identity.suffix_from,
            identity.max_new_tokens,
            identity.schema.has_response,
            positions,
            identity.skills,
        ],
        model.threaded,
    )


@dataclass
class _Found:
    """What one worker has found in its share."""

    checked: int = 0
    """How many of its rows, in their order."""
    bad: list[int] = field(default_factory=list)
    first: tuple[int, str] | None = None
    """The lowest bad row, and what is wrong with it."""

    def add(self, row: int, message: str) -> None:
        self.bad.append(row)
        if self.first is None or row < self.first[0]:
            self.first = (row, message)


def check_rows(
    rows: Rows, minutes: float, workers: Workers, say: Callable[[str], None], report: Report = unreported
) -> None:
    """Prepare every row once; the workers share them.

    Args:
        minutes: the longest time that this may take; 0 checks nothing.
        say: receives how many rows are left.
        report: receives the progress of a check that takes long.

    Raises:
        DataError: a row cannot be used; it says how many more.
    """
    if not minutes:
        return
    record = node_cache() / "checked-rows" / f"{rows.identity}.json"
    before = workers.gather(_checked(record))[0]
    if before >= rows.count:
        return
    shares = workers.gather(_check_share(rows, before, minutes, workers, report))
    _refuse(rows, shares)
    whole = sum(share.checked for share in shares) == rows.count - before
    # The rows that all workers have reached, in their common order.
    checked = rows.count if whole else before + len(shares) * min(share.checked for share in shares)
    if workers.rank == 0:
        write_atomically(record, json.dumps({"checked": checked}))
        if not whole:
            say(
                f"{checked} of {rows.count} rows of {rows.key} are checked after {minutes:g} minutes "
                f"(train.check_minutes); the next start checks the others"
            )


def _checked(record: Path) -> int:
    return int(json.loads(record.read_text())["checked"]) if record.exists() else 0


def _check_share(rows: Rows, before: int, minutes: float, workers: Workers, report: Report) -> _Found:
    """Check this worker's rows, in an order that is spread over the whole source."""
    found, stride = _Found(), _stride(rows.count)
    threads = max(1, min(MOST_THREADS, _processors() // workers.world_size)) if rows.threaded else 1
    started = time.monotonic()
    pace = Pace(f"checking the rows of {rows.key}", rows.count, report if workers.rank == 0 else unreported, before)

    def taken(row: int, prepared: Callable[[], object]) -> None:
        interruption.check()
        try:
            prepared()
        except DataError as error:
            found.add(row, error.message)
        found.checked += 1
        pace.reached(before + found.checked * workers.world_size)

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, Future[object]]] = deque()
        for place in range(before + workers.rank, rows.count, workers.world_size):
            if time.monotonic() - started > 60 * minutes:
                break
            row = place * stride % rows.count
            if threads == 1 or not found.checked:
                # The first row is prepared alone: tokenizers set themselves up then, and may not be shared meanwhile.
                taken(row, partial(rows.prepare, row))
                continue
            ahead.append((row, pool.submit(rows.prepare, row)))
            if len(ahead) == 2 * threads:
                row, future = ahead.popleft()
                taken(row, future.result)
        for row, future in ahead:
            taken(row, future.result)
    pace.end()
    return found


def _processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse(rows: Rows, shares: Sequence[_Found]) -> None:
    bad = sorted(row for share in shares for row in share.bad)
    if not bad:
        return
    _, message = min(share.first for share in shares if share.first is not None)
    more = ""
    if bad[1:]:
        others = listed(map(rows.place, bad[1 : 1 + EXAMPLES]), after=rows.place(bad[0]))
        rest = "; ..." if len(bad) > 1 + EXAMPLES else ""
        more = f"; {len(bad) - 1} more of {rows.count} rows cannot be used either ({others}{rest})"
    raise DataError(f"{rows.key}: {message}{more}")


def _stride(count: int) -> int:
    """A step that visits every row once and leaves no large gap before the last: coprime to `count`, by the golden
    ratio."""
    stride = max(1, round(count * GOLDEN))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride
