"""Two workers take the step that one worker takes on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

from benchmarks.ledger import Ledger
from craft_ray.errors import ModelError
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import TASK, GradientPair
from craft_ray.method.step import compares_gradients, craft_step, task_step
from craft_ray.workers import ProcessGroup, Workers
from tests.support.worlds import ONE, Batch, Terms, batch, craft_config, mlp, squared_error

STEPS = 5


@dataclass(frozen=True)
class Shares:
    """How many of eight samples each worker takes, in micro-batches."""

    task: tuple[tuple[int, ...], ...]
    anchors: tuple[tuple[int, ...], ...]


SHARES = {
    "equal": Shares(task=((4,), (4,)), anchors=((4,), (4,))),
    "different counts": Shares(task=((3,), (5,)), anchors=((7,), (1,))),
    "micro-batches of different counts": Shares(task=((1, 2), (4, 1)), anchors=((2, 2), (1, 3))),
}

ONE_ROW = {"use_grad_projection": False, "log_angle": False, "lambda_floor": 0.0}


def named_error(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def share(data: Batch, sizes: tuple[tuple[int, ...], ...], workers: Workers) -> list[Batch]:
    """This worker's micro-batches; with one worker, the whole batch."""
    if workers.world_size == 1:
        return [data]
    flat = [size for own in sizes for size in own]
    start = sum(len(own) for own in sizes[: workers.rank])
    return data.split(*flat)[start : start + len(sizes[workers.rank])]


def train(
    shares: Shares, workers: Workers, sharded: bool = False, frozen: bool = False, **changes: Any
) -> dict[str, Tensor]:
    """Five steps in which surgery fires each time: the anchors hold the network where the task drives it away.

    Args:
        frozen: whether the first layer keeps its weight, and trains its bias only.
    """
    module = mlp()
    module[0].weight.requires_grad_(not frozen)
    if sharded:
        fully_shard(module[0])
        fully_shard(module)
    settings = {"projection_gate": "always", "conflict_threshold": 0.5, "lambda_lr": 0.3, "retention_ema": 0.9}
    config = craft_config(**settings | changes)
    pair = GradientPair(
        module.named_parameters(),
        with_retention=compares_gradients(config),
        sharded=module if isinstance(module, FSDPModule) else None,
    )
    state = DualState.start(config)
    optimizer = torch.optim.AdamW(pair.parameters, lr=1e-2)
    log: dict[str, list[Tensor]] = {}
    for step in range(STEPS):
        task = batch(step)
        anchors = Batch(task.x, -task.y)
        state, metrics = craft_step(
            squared_error(module), share(task, shares.task, workers),
            squared_error(module), share(anchors, shares.anchors, workers),
            state, 0.5, craft=config, optimizer=optimizer, gradients=pair, workers=workers, max_norm=0.5,
        )  # fmt: skip
        for name, value in vars(metrics).items():
            if value is not None:
                log.setdefault(name, []).append(value)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    weights = nn.utils.parameters_to_vector(whole).detach()
    return {"weights": weights, "lambda": state.multiplier} | {k: torch.stack(v) for k, v in log.items()}


def late_parameter(workers: Workers) -> str:
    """The second step reaches a parameter that the first one did not."""
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    pair = GradientPair([("early", early), ("late", late)])
    settings = {"optimizer": torch.optim.SGD([early, late], lr=0.1), "gradients": pair, "workers": workers}
    task_step(lambda _: early.sum(), [Terms()], **settings, max_norm=None)
    try:
        task_step(lambda _: (early + late).sum(), [Terms()], **settings, max_norm=None)
    except ModelError as error:
        return str(error)
    return "no error"


def reached_by_one(workers: Workers) -> dict[str, Any]:
    """At the first step worker 1 alone reaches `other`; no worker reaches `unused`."""
    shared, other, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    pair = GradientPair([("shared", shared), ("other", other), ("unused", unused)])
    pair.backward(TASK, lambda _: (shared + other if workers.rank else shared).sum(), [Terms()], workers)
    pair.assign_grads(workers)
    return {"reached": pair.reached, "gradients": [shared.grad, other.grad, unused.grad]}


def plain_loops() -> list[Tensor]:
    """The weights after the baseline arm's steps on a sharded network, and after a plain loop of FSDP2."""
    found = []
    for plain in (False, True):
        module = fully_shard(mlp())
        share = [batch(step).split(4, 4)[dist.get_rank()] for step in range(STEPS)]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        pair = None if plain else GradientPair(module.named_parameters(), with_retention=False, sharded=module)
        for data in share:
            if pair is None:
                optimizer.zero_grad()
                squared_error(module)(data).backward()
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
            else:
                workers = ProcessGroup(torch.device("cpu"))
                task_step(
                    squared_error(module), [data], optimizer=optimizer, gradients=pair, workers=workers, max_norm=0.5
                )
        found.append(torch.cat([p.full_tensor().detach().flatten() for p in module.parameters()]))
    return found


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    workers = ProcessGroup(torch.device("cpu"))
    found: dict[str, Any] = {name: train(shares, workers) for name, shares in SHARES.items()}
    found |= {f"{name}, one row": train(shares, workers, **ONE_ROW) for name, shares in SHARES.items()}
    for name, shares in SHARES.items():
        found[f"{name}, sharded"] = train(shares, workers, sharded=True)
        found[f"{name}, one row, sharded"] = train(shares, workers, sharded=True, **ONE_ROW)
    found["frozen"] = train(SHARES["different counts"], workers, sharded=True, frozen=True)
    for name in ("equal", "micro-batches of different counts"):
        for rows, settings in (("", {}), (", one row", ONE_ROW)):
            with Ledger() as ledger:
                train(SHARES[name], workers, sharded=True, **settings)
            found[f"sent, {name}{rows}"] = dict(ledger.collectives)
    found["plain"] = plain_loops()
    found["late"] = late_parameter(workers)
    found["reached"] = reached_by_one(workers)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers found."""
    folder: Path = tmp_path_factory.mktemp("two")
    spawn(run_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    return train(SHARES["equal"], ONE)


def test_surgery_fires_and_clipping_bites(one: dict[str, Tensor]) -> None:
    """Otherwise the comparison below would be of plain training."""
    assert one["conflict"].all()
    assert (one["grad_norm"] > 0.5).all()


@pytest.mark.parametrize("shares", SHARES)
def test_two_workers_are_one(shares: str, one: dict[str, Tensor], two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found[shares].keys() == one.keys()
        for name, expected in one.items():
            torch.testing.assert_close(found[shares][name], expected, rtol=1e-4, atol=1e-6, msg=named_error(name))


def test_two_workers_are_one_without_a_second_row(two: list[dict[str, Any]]) -> None:
    expected = train(SHARES["equal"], ONE, **ONE_ROW)
    assert expected["cos"].isnan().all()
    for found in two:
        for shares in SHARES:
            torch.testing.assert_close(
                found[f"{shares}, one row"], expected, rtol=1e-4, atol=1e-6, equal_nan=True, msg=named_error(shares)
            )


@pytest.mark.parametrize("shares", SHARES)
def test_two_workers_that_share_the_weights_are_one(
    shares: str, one: dict[str, Tensor], two: list[dict[str, Any]]
) -> None:
    expected = {"": one, ", one row": train(SHARES["equal"], ONE, **ONE_ROW)}
    for found in two:
        for rows, values in expected.items():
            torch.testing.assert_close(
                found[f"{shares}{rows}, sharded"],
                values,
                rtol=1e-4,
                atol=1e-6,
                equal_nan=True,
                msg=named_error(shares + rows),
            )


def test_a_frozen_weight_is_shared_and_stays(one: dict[str, Tensor], two: list[dict[str, Any]]) -> None:
    """It has a part in no gradient, so it has none in the norm and in the angle, either."""
    expected = train(SHARES["equal"], ONE, frozen=True)
    assert not torch.allclose(expected["grad_norm"], one["grad_norm"], rtol=0.01)
    for found in two:
        for name, value in expected.items():
            torch.testing.assert_close(found["frozen"][name], value, rtol=1e-4, atol=1e-6, msg=named_error(name))
        assert torch.equal(found["frozen"]["weights"][:80].view(16, 5), mlp()[0].weight)


@pytest.mark.parametrize("rows", ["", ", one row"])
def test_micro_batches_are_gathered_for_each_and_reduced_once(rows: str, two: list[dict[str, Any]]) -> None:
    """Each of the two losses is reduced once a step, whole: 4 bytes for each of 147 numbers, padded to even rows."""
    for found in two:
        once, twice = (found[f"sent, {name}{rows}"] for name in ("equal", "micro-batches of different counts"))
        assert once["reduce-scatter"] == twice["reduce-scatter"] == STEPS * 2 * 4 * (16 * 6 + 4 * 16 + 4)
        assert twice["all-gather"] > 1.5 * once["all-gather"]


def test_the_baseline_is_a_plain_loop_of_fsdp_bit_for_bit(two: list[dict[str, Any]]) -> None:
    for found in two:
        ours, plain = found["plain"]
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("shares", SHARES)
def test_the_workers_stay_equal_to_the_last_bit(shares: str, two: list[dict[str, Any]]) -> None:
    for name, value in two[0][shares].items():
        assert torch.equal(value, two[1][shares][name]), name


def test_a_parameter_that_is_reached_later_is_an_error_that_names_it(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "late had no gradient in the first step and has one now" in found["late"]
        assert "freeze it, or use one worker" in found["late"]


def test_one_worker_may_reach_a_parameter_later() -> None:
    assert late_parameter(ONE) == "no error"


def test_a_parameter_that_one_worker_reaches_is_trained_by_all(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["reached"]["reached"] == [True, True, False]
        shared, other, unused = found["reached"]["gradients"]
        assert shared.tolist() == [1.0, 1.0]
        assert other.tolist() == [0.5, 0.5]
        assert unused is None
