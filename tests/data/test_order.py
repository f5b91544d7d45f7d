"""Which samples a step uses, and batches that are prepared ahead of it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from craft_ray.data.prefetch import prefetch
from craft_ray.data.sampler import StepSampler

# --- sampler ----------------------------------------------------------------------------------------------------


def batches(rows: int, size: int, steps: int, seed: int = 0, stream: int = 0) -> list[list[int]]:
    sampler = StepSampler(rows, size, seed, stream)
    return [sampler.global_batch(step) for step in range(steps)]


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (8, 4), (1, 1), (3, 8), (5, 5), (7, 20)])
def test_each_epoch_is_a_permutation(rows: int, size: int) -> None:
    """Also if batches cross its end, and if one batch is more than an epoch."""
    steps = 3 * rows
    order = list(itertools.chain(*batches(rows, size, steps)))
    assert len(order) == steps * size
    for start in range(0, len(order), rows):
        assert sorted(order[start : start + rows]) == list(range(rows))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    """In any order of access, whatever the sampler returned before."""
    expected = batches(10, 4, 20)
    used = StepSampler(10, 4, 0, 0)
    for step in (19, 0, 7, 7, 3, 12, 2):
        assert used.global_batch(step) == expected[step]
        assert StepSampler(10, 4, 0, 0).global_batch(step) == expected[step]


def test_epochs_seeds_and_streams_differ() -> None:
    rows = 64  # equal orders by chance: 1 in 64!
    epochs = batches(rows, rows, 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(rows))
    assert batches(rows, rows, 1, seed=1) != epochs[:1] != batches(rows, rows, 1, stream=1)
    assert batches(rows, rows, 1, seed=1) != batches(rows, rows, 1, stream=1)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 12])
def test_workers_share_the_global_batch(workers: int) -> None:
    expected = batches(7, 12, 5)
    samplers = [StepSampler(7, 12, 0, 0) for _ in range(workers)]
    for step in (3, 0, 4, 1, 2):
        parts = [sampler.local_batch(step, rank, workers) for rank, sampler in enumerate(samplers)]
        assert {len(part) for part in parts} == {12 // workers}
        assert list(itertools.chain(*parts)) == expected[step]


def test_the_order_is_unchanged() -> None:
    """Resuming relies on it, so a change of the order is a change of the format of checkpoints."""
    assert batches(10, 4, 4, seed=3, stream=1) == [[4, 1, 2, 8], [5, 0, 7, 9], [6, 3, 6, 5], [3, 1, 2, 0]]


# --- prefetch -----------------------------------------------------------------------------------------------------


def running() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert running() == []
    yield
    assert running() == []


def test_steps_come_in_order() -> None:
    assert list(prefetch(lambda step: step * step, 3, 8, depth=2)) == [9, 16, 25, 36, 49]
    assert list(prefetch(lambda step: step, 5, 5, depth=1)) == []


def test_batches_are_made_in_another_thread() -> None:
    """In a single one."""
    makers = list(prefetch(lambda _: threading.get_ident(), 0, 5, depth=2))
    assert len(set(makers)) == 1
    assert makers[0] != threading.get_ident()


def test_an_error_is_raised_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("row 17")
        return step

    batches = prefetch(make, 0, 10, depth=4)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 17"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def settled(made: list[int]) -> int:
    """How many are made when no more are coming."""
    count = -1
    while count != len(made):
        count = len(made)
        time.sleep(0.15)
    return count


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_wait(depth: int) -> None:
    """Besides those that wait, there are the one that the thread holds and those already taken."""
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step

    batches = prefetch(make, 0, 100, depth)
    for taken in (1, 2, 3):
        next(batches)
        assert settled(made) == taken + depth + 1
    batches.close()  # type: ignore[attr-defined]
    assert len(made) == 3 + depth + 1


def test_closing_early_ends_the_thread() -> None:
    batches = prefetch(lambda step: step, 0, 10**9, depth=2)
    next(batches)
    assert len(running()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert running() == []


def test_an_error_of_the_caller_ends_the_thread() -> None:
    def consume() -> None:
        for batch in prefetch(lambda step: step, 0, 10**9, depth=2):
            if batch == 2:
                raise KeyError(batch)

    with pytest.raises(KeyError):
        consume()
