"""The shipped config of the earlier rule takes the steps that the earlier rule took."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from craft_ray.config import load_config
from craft_ray.method.dual import DualState, epsilon_at
from craft_ray.method.gradients import GradientPair
from craft_ray.method.step import craft_step
from craft_ray.shipped import shipped
from tests.support.worlds import ONE, Batch, batch, mlp, squared_error

STEPS, K, RATE, MOST, START, END = 24, 5, 0.01, 10.0, 1.0, 0.1


def flat(loss: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def opposed(task: Batch) -> Batch:
    """Anchors that pull against the task, with gradients small enough that some dot products stay above -0.1."""
    return Batch(task.x, -0.2 * task.y)


def earlier_rule(module: nn.Module) -> tuple[list[float], int]:
    """The earlier loop, from its description: every K-th step the task's gradient is projected where the dot product
    is below -0.1, lambda times the retention gradient is added, and lambda follows L_ret - epsilon.

    Returns:
        lambda after each step, and at how many steps the dot product and the cosine are on different sides of -0.1.
    """
    multiplier, history, differ = 1.0, [], 0
    for step in range(STEPS):
        task = batch(step)
        total = flat(squared_error(module)(task), module)
        if step % K == 0:
            loss = squared_error(module)(opposed(task))
            retention = flat(loss, module)
            dot = total @ retention
            differ += int((dot < -0.1) != (dot / (total.norm() * retention.norm()) < -0.1))
            if dot < -0.1:
                total = total - dot / (retention @ retention) * retention
            total = total + multiplier * retention
            epsilon = START + (END - START) * step / STEPS
            multiplier = min(max(multiplier + RATE * (loss.item() - epsilon), 0.0), MOST)
        total = total * min(1.0, 1.0 / (total.norm().item() + 1e-6))
        with torch.no_grad():
            weights = nn.utils.parameters_to_vector(module.parameters()) - 0.1 * total
            nn.utils.vector_to_parameters(weights, module.parameters())
        history.append(multiplier)
    return history, differ


def test_the_shipped_config_of_the_earlier_rule_takes_its_steps() -> None:
    config = load_config(Path(shipped("pipelines/configs")) / "original_rule.yaml")
    assert config.craft.epsilon_decay_steps == config.train.steps
    craft = config.craft.model_copy(update={"epsilon_decay_steps": STEPS})
    theirs, ours = mlp(), mlp()
    expected, differ = earlier_rule(theirs)
    assert differ >= 1
    pair, state = GradientPair(ours.named_parameters()), DualState.start(craft)
    optimizer = torch.optim.SGD(pair.parameters, lr=0.1)
    history = []
    for step in range(STEPS):
        task = batch(step)
        state, metrics = craft_step(
            squared_error(ours), [task], squared_error(ours),
            None if step % craft.retention_freq else [opposed(task)],
            state, epsilon_at(step, STEPS, craft),
            craft=craft, optimizer=optimizer, gradients=pair, workers=ONE, max_norm=1.0,
        )  # fmt: skip
        history.append(K * metrics.multiplier.item())
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=0.0)
    assert len(set(expected)) > 3
    vectors = [nn.utils.parameters_to_vector(module.parameters()) for module in (ours, theirs)]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-6)
