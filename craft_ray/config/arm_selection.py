"""The arms that a comparison is asked for, among a config's variants, and why its data do not allow the others."""

from __future__ import annotations

from typing import Any

from craft_ray.config.arms import ADAPTER_RATE, CATALOGUE
from craft_ray.config.experiment import Experiment
from craft_ray.config.modes import RETENTION_MODES, stores


def rate_name(arm: str, rate: float) -> str:
    """The name of an arm at a learning rate of its own: `baseline_lr3e_4` for 0.0003."""
    mantissa, exponent = f"{rate:e}".split("e")
    number = f"{float(mantissa):g}".replace(".", "_")
    power = int(exponent)
    return f"{arm}_lr{number}e{'_' if power < 0 else ''}{abs(power)}"


def with_arms(config: Experiment, asked: tuple[str, ...]) -> tuple[Experiment, list[str]]:
    """The config with the requested arms of the catalogue among its variants, and those that it requests at several
    learning rates; and a line for each arm that its data do not allow.

    Args:
        asked: arms by name; the single name `all` means every arm there is.
    """
    compare = config.compare
    every = asked == ("all",)
    names = list(dict.fromkeys([*compare.own, *CATALOGUE])) if every else list(asked)
    left_out: dict[str, str] = {}
    variants = {name: dict(settings) for name, settings in compare.variants.items()}
    for name in [name for name in names if name in CATALOGUE and name not in variants]:
        variants[name] = _of_config(name, config)
    if every:
        for name in names:
            reason = lacking(config, name, variants.get(name, {}), left_out)
            if reason is not None:
                left_out[name] = reason
    chosen: list[str] = []
    for name in names:
        if name in left_out:
            variants.pop(name, None)
            continue
        chosen.append(name)
        for rate in compare.learning_rates.get(name, ()):
            own = variants.get(name, {"enabled": False} if name == "baseline" else {"retention_mode": name})
            if name == "token_ce":
                own = {**own, **compare.token_ce}
            variants[rate_name(name, rate)] = {**own, "train": {**own.get("train", {}), "learning_rate": rate}}
            chosen.append(rate_name(name, rate))
    if chosen != list(compare.chosen) or variants != compare.variants:
        config = config.changed({"compare.variants": variants, "compare.arms": chosen})
    return config, [f"left out {name}: {reason}" for name, reason in left_out.items()]


def _of_config(name: str, config: Experiment) -> dict[str, Any]:
    settings = dict(CATALOGUE[name])
    if "adapter" in settings and config.adapter is None:
        settings["train"] = {"learning_rate": ADAPTER_RATE * config.train.learning_rate}
    return settings


def lacking(config: Experiment, name: str, settings: dict[str, Any], left_out: dict[str, str]) -> str | None:
    """What the config does not have that an arm needs; None if it has everything."""
    source = settings.get("interpolate")
    if source is not None:
        if not config.validates_both:
            return "alpha is chosen on validation data of both skills (validation.old, validation.new)"
        return f"it interpolates {source}, which is left out" if source in left_out else None
    followed = [skill.validation for skill in config.skills.values()] or [config.validation.old]
    if settings.get("keep") is not None and (None in followed or not config.validation.every):
        return "keep follows validations of every old skill (validation.every)"
    if config.model.kind == "lerobot" and settings.get("train", {}).get("mask_loss_above") is not None:
        return "it masks tokens of text"
    if name == "baseline" or not settings.get("enabled", True):
        return None
    mode = settings.get("retention_mode", config.craft.retention_mode if name in config.compare.variants else name)
    needed = RETENTION_MODES[mode].stores
    if needed and config.craft.anchor_cache_dir is None:
        return "there is no anchor cache (craft.anchor_cache_dir)"
    if config.adapter is not None and RETENTION_MODES[mode].distance_of_weights:
        return "a distance of weights is measured without an adapter"
    if config.anchors is not None:
        held = set(config.anchors.modes)
        if any(not stores(held, what) for what in needed):
            return f"the cache is built without it (anchors.modes lacks {mode})"
    return _without_budget(config, name, settings, mode)


def _without_budget(config: Experiment, name: str, settings: dict[str, Any], mode: str) -> str | None:
    budget = config.compare.craft_settings(name, config.craft) if name in config.compare.own else settings
    unit = RETENTION_MODES[mode].unit(config.craft.loss_type)
    given = budget.get("epsilon_start", config.craft.epsilon_start if unit.name == config.craft.epsilon_unit else None)
    if given is None and unit.default_budget is None:
        return f"it has no budget in {unit.name} (compare.{name}.epsilon_start)"
    return None
