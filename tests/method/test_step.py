"""One step as a whole: what it leaves alone, and what it does between two retention steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair
from craft_ray.method.step import StepMetrics, compares_gradients, craft_step, task_step
from tests.support.worlds import ONE, batch, craft_config, mlp, squared_error

Result = tuple[DualState, StepMetrics]


def take_step(
    module: nn.Module, *, accumulate: tuple[int, ...] = (8,), anchors: bool = True, **craft: object
) -> Result:
    """One AdamW step; the new state and the metrics."""
    config = craft_config(**craft)
    pair = GradientPair(module.named_parameters(), with_retention=compares_gradients(config))
    result = craft_step(
        squared_error(module), batch(1).split(*accumulate), squared_error(module),
        batch(2).split(*accumulate) if anchors else None, DualState.start(config), 0.1,
        craft=config, optimizer=torch.optim.AdamW(pair.parameters, lr=1e-2), gradients=pair, workers=ONE, max_norm=1.0,
    )  # fmt: skip
    pair.close()
    return result


def weights(module: nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_of_every_module_alone(training: bool) -> None:
    module = mlp().train(training)
    module[2].train(not training)
    before = [part.training for part in module.modules()]
    take_step(module)
    assert [part.training for part in module.modules()] == before


@pytest.mark.parametrize("accumulate", [(4, 4), (1, 7), (3, 3, 2)])
def test_micro_batches_do_not_change_the_step(accumulate: tuple[int, ...]) -> None:
    whole, parts = mlp(), mlp()
    state, metrics = take_step(whole)
    split_state, split_metrics = take_step(parts, accumulate=accumulate)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split_state.multiplier, state.multiplier, rtol=1e-5, atol=0.0)
    for name, value in vars(metrics).items():
        torch.testing.assert_close(getattr(split_metrics, name), value, rtol=1e-4, atol=1e-6)


def test_a_step_between_two_retention_steps_is_plain_and_leaves_the_multiplier() -> None:
    module, plain = mlp(), mlp()
    config = craft_config(initial_lambda=3.0)
    state, metrics = take_step(module, anchors=False, initial_lambda=3.0)
    pair = GradientPair(plain.named_parameters(), with_retention=False)
    loss, norm = task_step(
        squared_error(plain), [batch(1)], optimizer=torch.optim.AdamW(pair.parameters, lr=1e-2), gradients=pair,
        workers=ONE, max_norm=1.0,
    )  # fmt: skip
    assert torch.equal(weights(module), weights(plain))
    assert (metrics.task_loss, metrics.grad_norm) == (loss, norm)
    assert state.state_dict() == DualState.start(config).state_dict()
    assert all(value.isnan() for value in (metrics.retention_loss, metrics.dot, metrics.cos, metrics.conflict))


def test_losses_are_logged_as_they_were_before_the_step() -> None:
    module = mlp()
    task = squared_error(module)(batch(1)).item()
    retention = squared_error(module)(batch(2)).item()
    _, metrics = take_step(module)
    assert (metrics.task_loss.item(), metrics.retention_loss.item()) == (task, retention)


def test_metrics_hold_no_graph() -> None:
    _, metrics = take_step(mlp())
    assert not any(value is not None and value.requires_grad for value in vars(metrics).values())


def test_the_weights_move_with_the_old_multiplier_and_the_new_one_is_logged() -> None:
    """The dual step follows the primal step, on the L_ret that the primal step saw."""
    modules = [mlp(), mlp()]
    moving, still = (
        take_step(module, initial_lambda=2.0, violation_clip=None, lambda_lr=rate)
        for module, rate in zip(modules, (0.1, 0.0), strict=True)
    )
    assert torch.equal(*map(weights, modules))
    for (state, metrics), rate in ((moving, 0.1), (still, 0.0)):
        assert metrics.multiplier == state.multiplier
        assert state.multiplier.item() == pytest.approx(2.0 + rate * (metrics.retention_loss.item() / 0.1 - 1))


@pytest.mark.parametrize("mode", ["weighted", "equal", "task_priority"])
@pytest.mark.parametrize("accumulate", [(8,), (1, 7)])
def test_without_projection_and_angle_one_row_takes_the_same_step(mode: str, accumulate: tuple[int, ...]) -> None:
    settings = {
        "use_grad_projection": False, "lambda_floor": 0.0, "projection_mode": mode, "initial_lambda": 1.7,
        "retention_freq": 3,
    }  # fmt: skip
    apart, together = mlp(), mlp()
    state, metrics = take_step(apart, accumulate=accumulate, **settings)
    found, one_row = take_step(together, accumulate=accumulate, log_angle=False, **settings)
    torch.testing.assert_close(weights(together), weights(apart), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.state_dict(), state.state_dict(), rtol=1e-6, atol=0.0)
    for name in ("task_loss", "retention_loss", "multiplier", "grad_norm"):
        torch.testing.assert_close(
            getattr(one_row, name), getattr(metrics, name), rtol=1e-5, atol=1e-6, check_dtype=False
        )
    assert not metrics.cos.isnan()
    assert all(value.isnan() for value in (one_row.dot, one_row.cos, one_row.conflict))


def test_one_row_is_half_the_memory_of_two() -> None:
    sizes = {}
    for log_angle in (True, False):
        config = craft_config(use_grad_projection=False, lambda_floor=0.0, log_angle=log_angle)
        pair = GradientPair(mlp().named_parameters(), with_retention=compares_gradients(config))
        sizes[log_angle] = sum(buffer.nbytes for buffer in pair.buffers)
    assert sizes[False] * 2 == sizes[True]
