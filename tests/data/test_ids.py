"""Ids behave like a list, and take a small part of its memory."""

from __future__ import annotations

import tracemalloc

import pyarrow as pa
import pytest

from craft_ray.data import ids as module
from craft_ray.data.ids import Ids

MANY = [f"{number:08d}" for number in range(10_000)]


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_ids_are_the_sequence_that_they_were_made_from(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    given = ["b", "", "ü and ∞", *MANY[:20]]
    ids = Ids(iter(given))
    assert ids == given
    assert list(ids) == given
    assert len(ids) == 23
    assert (ids[2], ids[-1]) == (given[2], given[-1])
    assert ids[5:9] == given[5:9]
    assert "ü and ∞" in ids
    assert ids != given[1:]
    assert Ids([]) == []


def test_a_duplicate_id_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ids(MANY).duplicate is None
    assert Ids([*MANY, MANY[17], MANY[3]]).duplicate == MANY[17]
    monkeypatch.setattr(module, "hash", lambda _: 1, raising=False)  # equal hashes are not taken for equal ids
    assert Ids(MANY).duplicate is None
    assert Ids([*MANY, MANY[17]]).duplicate == MANY[17]


def test_ids_take_a_fifth_of_a_lists_memory() -> None:
    count = 300_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    ids = Ids(f"{number:08d}" for number in range(count))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ids) == count
    assert (kept + pa.total_allocated_bytes() - before) / count < 65 / 5 + 1
