"""Two gradients in flat memory: paired by position, each the gradient of one big batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from craft_ray.method.dual import DualState
from craft_ray.method.gradients import RETENTION, TASK, GradientPair
from craft_ray.method.step import craft_step, task_step
from tests.support.worlds import ONE, Terms, batch, craft_config, linear_loss, mlp, named, squared_error, step_on

LAMBDA = 0.75


def vectors(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def autograd(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def test_each_row_is_the_gradient_of_its_own_loss() -> None:
    module, task, anchors = mlp(), batch(1), batch(2)
    loss = squared_error(module)
    pair = GradientPair(module.named_parameters())
    pair.backward(TASK, loss, [task], ONE)
    pair.backward(RETENTION, loss, [anchors], ONE)
    for row, data in ((TASK, task), (RETENTION, anchors)):
        for found, expected in zip(pair.views[row], autograd(module, loss(data)), strict=True):
            assert torch.equal(found, expected)


def test_the_second_gradient_is_not_the_first_ones_memory() -> None:
    module = mlp()
    pair = GradientPair(module.named_parameters())
    pair.backward(TASK, squared_error(module), [batch(1)], ONE)
    before = [view.clone() for view in pair.views[TASK]]
    pair.backward(RETENTION, squared_error(module), [batch(2)], ONE)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.views[TASK], strict=True))
    assert not {v.data_ptr() for v in pair.views[TASK]} & {v.data_ptr() for v in pair.views[RETENTION]}


def test_a_row_is_refilled_at_each_step() -> None:
    module = mlp()
    pair = GradientPair(module.named_parameters())
    for _ in range(3):
        pair.backward(TASK, squared_error(module), [batch(1)], ONE)
    for found, expected in zip(pair.views[TASK], autograd(module, squared_error(module)(batch(1))), strict=True):
        assert torch.equal(found, expected)


def test_a_parameter_of_one_loss_only_gets_its_part_of_the_merge() -> None:
    both_t, both_r, only_t, only_r = vectors(3, 3, 4, 5)
    out = step_on([only_t, both_t, None], [None, both_r, only_r], multiplier=LAMBDA, use_grad_projection=False)
    first, middle, last = out.gradients
    torch.testing.assert_close(first, only_t)
    torch.testing.assert_close(middle, both_t + LAMBDA * both_r)
    torch.testing.assert_close(last, LAMBDA * only_r)


def test_the_order_in_which_parameters_lack_a_gradient_does_not_matter() -> None:
    """Lists that were filtered of None and then zipped would pair the wrong ones, here of equal size."""
    a, b, c, d = vectors(4, 4, 4, 4)
    out = step_on([None, a, b, None], [c, None, d, a], multiplier=1.0, use_grad_projection=False)
    for found, expected in zip(out.gradients, (c, a, b + d, a), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_comparison_is_over_parameters_that_both_losses_reach() -> None:
    a, b, c, d = vectors(4, 4, 3, 5)
    out = step_on([a, c, None], [b, None, d])
    assert out.metrics.dot.item() == pytest.approx(torch.dot(a, b).item(), rel=1e-6)


@pytest.mark.parametrize("with_retention", [True, False])
def test_a_parameter_that_no_loss_reaches_stays_as_it_is(with_retention: bool) -> None:
    """No gradient, no optimiser state, and no weight decay."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((4,), 2.0))
    pair = GradientPair(named([used, unused]), with_retention=with_retention)
    optimizer = torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.5)
    config = craft_config()
    for _ in range(3):
        common = {"optimizer": optimizer, "gradients": pair, "workers": ONE, "max_norm": 1.0}
        if with_retention:
            craft_step(
                lambda _: used.sum(), [Terms()], lambda _: used.square().sum(), [Terms()],
                DualState.start(config), 0.1, craft=config, **common,
            )  # fmt: skip
        else:
            task_step(lambda _: used.sum(), [Terms()], **common)
    assert unused.grad is None
    assert unused not in optimizer.state
    assert torch.equal(unused, torch.full((4,), 2.0))
    assert not torch.equal(used, torch.ones(3))


def test_a_parameter_that_was_reached_once_is_remembered_across_a_restart() -> None:
    used, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    pair = GradientPair(named([used, late]))
    pair.backward(TASK, lambda _: used.sum() + late.sum(), [Terms()], ONE)
    restored = GradientPair(named([used, late]))
    restored.restore_reached(pair.reached)
    restored.backward(TASK, lambda _: used.sum(), [Terms()], ONE)
    restored.assign_grads(ONE)
    assert torch.equal(late.grad, torch.zeros(2))


def test_tied_parameters_get_the_sum_of_their_uses_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    module, tokens = Tied(), torch.tensor([1, 2, 2, 5])
    pair = GradientPair(module.named_parameters())
    pair.backward(TASK, lambda _: module(tokens).square().mean(), [Terms()], ONE)
    assert pair.names == ["embed.weight"]
    [expected] = autograd(module, module(tokens).square().mean())
    assert torch.equal(pair.views[TASK][0], expected)


def test_frozen_parameters_take_no_memory_and_get_no_gradient() -> None:
    module = mlp()
    module[0].requires_grad_(False)
    pair = GradientPair(module.named_parameters())
    assert pair.names == ["3.weight", "3.bias"]
    pair.backward(TASK, squared_error(module), [batch(1)], ONE)
    pair.assign_grads(ONE)
    assert all(p.grad is None for p in module[0].parameters())
    assert all(p.grad is not None for p in module[3].parameters())


def test_dtypes_may_be_mixed() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    parameters = [nn.Parameter(torch.zeros(size, dtype=d)) for size, d in zip((5, 2000, 3, 7), dtypes, strict=True)]
    task = [v.to(d) for v, d in zip(vectors(5, 2000, 3, 7), dtypes, strict=True)]
    retention = [v.to(d) for v, d in zip(vectors(5, 2000, 3, 7, seed=1), dtypes, strict=True)]
    pair = GradientPair(named(parameters))
    pair.backward(TASK, linear_loss(parameters, task), [Terms()], ONE)
    pair.backward(RETENTION, linear_loss(parameters, retention), [Terms()], ONE)
    gram = pair.gram()
    flat_t, flat_r = (torch.cat([g.double() for g in side]) for side in (task, retention))
    assert gram.dot.item() == pytest.approx(torch.dot(flat_t, flat_r).item(), rel=1e-6)
    assert gram.task_sq.item() == pytest.approx(flat_t.square().sum().item(), rel=1e-6)
    pair.combine(1.0, torch.tensor(0.5, dtype=torch.float64))
    pair.assign_grads(ONE)
    for p, t, r in zip(parameters, task, retention, strict=True):
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad, t + 0.5 * r)


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 7), (2, 1, 5)])
def test_micro_batches_of_any_sizes_make_the_gradient_of_one_batch(sizes: tuple[int, ...]) -> None:
    module, whole = mlp(), batch(3)
    pair = GradientPair(module.named_parameters())
    value = pair.backward(TASK, squared_error(module), whole.split(*sizes), ONE)
    loss = squared_error(module)(whole)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=0.0)
    for found, expected in zip(pair.views[TASK], autograd(module, loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_close_leaves_neither_a_gradient_nor_a_hook() -> None:
    module = mlp()
    pair = GradientPair(module.named_parameters())
    for p, view in zip(pair.parameters, pair.views[TASK], strict=True):
        p.grad = view
    pair.close()
    assert all(p.grad is None for p in module.parameters())
    squared_error(module)(batch(2)).backward()
    assert not any(pair.reached)
    assert not any(view.any() for view in pair.views[TASK])
