"""A-GEM is settings of the step: where g_t and g_r conflict, the part of g_t along g_r goes, and nothing is added.

g = g_t - (<g_t, g_r> / |g_r|^2) g_r   if <g_t, g_r> < 0, else g_t        Chaudhry et al., arXiv 1812.00420, eq. 11
"""

from __future__ import annotations

import pytest
import torch

from craft_ray.config.arms import CATALOGUE
from tests.support.worlds import step_on

SETTINGS = {
    key: CATALOGUE["a_gem"][key]
    for key in (
        "lambda_lr",
        "lambda_kp",
        "lambda_floor",
        "use_grad_projection",
        "projection_gate",
        "conflict_threshold",
    )
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("epsilon", [0.1, 10.0])
def test_the_arm_is_the_papers_projection_whatever_the_budget(seed: int, epsilon: float) -> None:
    task, old = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)).unbind()
    expected = task - (task @ old) / (old @ old) * old if task @ old < 0 else task
    found = step_on([task], [old], multiplier=CATALOGUE["a_gem"]["initial_lambda"], epsilon=epsilon, **SETTINGS)
    torch.testing.assert_close(found.flat, expected, rtol=1e-5, atol=1e-6)
    assert found.state.multiplier == 0


def test_both_cases_occur_above() -> None:
    pairs = [torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert {bool(task @ old < 0) for task, old in pairs} == {False, True}
