"""The simulation of large models holds what formulas say, and what real processes hold and send."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.cost_model import PALIGEMMA
from benchmarks.harness import Report
from benchmarks.ledger import Ledger
from benchmarks.simulated import Case, check, gathered_bytes, made, simulate, simulate_layers
from benchmarks.simulated_models import MODELS


def parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[model].make(*MODELS[model].layers).parameters())


def test_models_have_the_published_sizes() -> None:
    assert parameters("7B") == 6_738_415_616
    assert parameters("70B") == 68_976_648_192
    # pi0_fast has PaliGemma's shapes with 257,152 tokens, and a head of its own.
    assert parameters("pi0_fast") == PALIGEMMA.parameters + (2 * 257_152 - PALIGEMMA.vocabulary) * PALIGEMMA.width


def test_a_sharded_worker_holds_its_part_of_twenty_bytes_a_parameter() -> None:
    found, whole = simulate(Case("tiny"), 4), parameters("tiny")
    assert found.state == pytest.approx(20 * whole / 4, rel=0.01)
    assert found.peak > found.state + found.gathered
    # Each of two losses gathers every weight twice, in bfloat16; the root's stay gathered for the backward pass, and
    # the retention loss needs no head, which is gathered with the root.
    block, root = gathered_bytes(made(Case("tiny")), "bf16")
    assert found.all_gather == 2 * (2 * MODELS["tiny"].layers[0] * block + root)
    assert found.all_reduce < 1000


def test_a_worker_that_shares_a_frozen_model_holds_all_of_the_adapter() -> None:
    shared, replica = (simulate(Case("tiny", adapter=True, sharded=sharded), 4) for sharded in (True, False))
    assert (shared.gradients, shared.moments) == (replica.gradients, replica.moments)
    assert shared.all_reduce == pytest.approx(replica.all_reduce, rel=0.01)
    adapter = replica.weights - 2 * parameters("tiny")
    assert shared.weights == pytest.approx(2 * parameters("tiny") / 4 + adapter, rel=0.01)
    assert shared.reduce_scatter == 0 < shared.all_gather


@pytest.mark.parametrize("sharded", [True, False])
def test_layers_add_the_same_each(sharded: bool) -> None:
    case = Case("tiny", sharded=sharded)
    few, whole = simulate(case, 2), simulate_layers(case, 2, *MODELS["tiny"].layers)
    for key, value in asdict(whole).items():
        assert getattr(few, key) == pytest.approx(value, rel=0.01), key


def test_a_replica_holds_and_reduces_everything() -> None:
    found, whole = simulate(Case("tiny", sharded=False), 4), parameters("tiny")
    assert found.state == pytest.approx(20 * whole, rel=0.02)
    assert found.all_reduce == pytest.approx(8 * whole, rel=0.02)
    assert found.gathered == found.all_gather == found.reduce_scatter == 0
    assert found.sent(4) == 2 * 3 / 4 * found.all_reduce


def test_live_memory_is_counted_until_it_is_freed() -> None:
    with Ledger() as ledger:
        first = torch.empty(1000)
        view = first[:10]
        second = torch.empty(500)
        assert (ledger.live, ledger.peak) == (6000, 6000)
        del first
        assert ledger.live == 6000  # the view holds it
        del view
        assert ledger.live == 2000
        second.untyped_storage().resize_(0)
        assert (ledger.live, ledger.peak) == (0, 6000)


@pytest.mark.slow
def test_real_processes_hold_and_send_the_same(tmp_path: Path) -> None:
    report = Report("simulated", "-")
    check(report, "tiny", (2,))
    judged = [row for row in report.rows if row.target is not None]
    assert len(judged) == 5
    assert all(row.met for row in judged)
