"""The field's own answers to forgetting, as arms of a comparison: each is a variant of the config (docs/arms.md)."""

from __future__ import annotations

from typing import Any

PENALTY: dict[str, Any] = {
    "lambda_lr": 0.0,
    "lambda_kp": 0.0,
    "lambda_floor": 0.0,
    "use_grad_projection": False,
    "keep": None,
    "epsilon_schedule": "constant",
}
"""L_task + lambda L_ret with a lambda that does not move."""
ADAPTER_RATE = 10.0
"""Learning rate of an adapter, relative to that of full training."""
TOKEN_THRESHOLD = 2.5
"""Loss in nats above which `selective_tokens` masks a token, as in arXiv 2501.14315."""


def penalty(mode: str, weight: float = 1.0, **others: Any) -> dict[str, Any]:
    """A retention mode with a fixed multiplier; its budget, which nothing follows, is 1 in its unit."""
    return {
        "retention_mode": mode, **PENALTY, "initial_lambda": weight, "lambda_max": max(weight, 1.0),
        "epsilon_start": 1.0, "epsilon_end": None, **others,
    }  # fmt: skip


CATALOGUE: dict[str, dict[str, Any]] = {
    "selective_tokens": {"enabled": False, "train": {"mask_loss_above": TOKEN_THRESHOLD}},
    "lora": {"enabled": False, "adapter": {}},
    "wise_ft": {"interpolate": "baseline"},
    "l2_sp": penalty("l2_sp", 0.1),
    "lora_hidden": {"retention_mode": "hidden", "adapter": {}},
    "hidden_fixed": penalty("hidden"),
    "token_ce_fixed": penalty("token_ce"),
    "logits": {"retention_mode": "logits"},
    "logits_fixed": penalty("logits"),
    "ewc": penalty("ewc", 100.0),
    "wise_ft_hidden": {"interpolate": "hidden"},
    "hidden_keep": {"retention_mode": "hidden", "keep": 0.95},
    "replay": penalty("replay"),
    "a_gem": penalty("replay", 0.0, use_grad_projection=True, projection_gate="always", conflict_threshold=0.0),
    "wise_ft_replay": {"interpolate": "replay"},
}
"""The settings of each, as in `compare.variants`."""
