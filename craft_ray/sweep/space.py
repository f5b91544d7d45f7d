"""The search space: which knobs are searched, from which distribution, and under which condition.

    craft.lambda_lr: {loguniform: [0.01, 1.0]}
    craft.epsilon_schedule: {choice: [constant, cosine]}
    craft.epsilon_end: {uniform: [0.02, 0.05], when: {craft.epsilon_schedule: cosine}}

A knob may have a list of distributions, each with a `when`; the first whose condition holds is drawn from, and
if none holds, the knob keeps the config's value.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from craft_ray.config import Experiment, read_yaml
from craft_ray.errors import ConfigError, CraftError
from craft_ray.shipped import shipped

Params = dict[str, Any]
"""Dotted config key to value."""

NUMBERS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}
KINDS = (*NUMBERS, "choice", "grid")
SECTIONS = ("craft", "train", "adapter")
KNOBS = ("task.limit", "seed")
PINNED = ("craft.anchor_cache_dir", "train.precision", "train.checkpoint_every", "train.keep_checkpoints")
DIGITS = 4
"""Significant digits of a drawn number, as a person would write it. More where the range is narrow."""
MOST_CORNERS = 1024
CHECKED_DRAWS = 256
RESAMPLING = 0.25
PERTURBATIONS = (0.8, 1.25)


@dataclass(frozen=True)
class Distribution:
    """Where a value comes from. `numbers` are [low, high] (and the quantum of quniform); `options` are listed."""

    kind: str
    numbers: tuple[float, ...] = ()
    options: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def draw(self, rng: np.random.Generator) -> Any:
        """uniform and loguniform: [low, high]; quniform: multiples of q in it; randint: low <= n < high."""
        if self.options:
            return self.options[int(rng.integers(len(self.options)))]
        low, high = self.numbers[:2]
        if self.kind == "randint":
            return int(rng.integers(int(low), int(high)))
        if self.kind == "loguniform":
            return self.rounded(math.exp(rng.uniform(math.log(low), math.log(high))))
        return self.rounded(rng.uniform(low, high))

    def rounded(self, value: float) -> float:
        """A value as it is used: few digits, or a multiple of the quantum, and never outside the range."""
        low, high = self.numbers[:2]
        if self.kind == "quniform":
            quantum = Decimal(repr(self.numbers[2]))
            least, most = _multiples(self.numbers)
            return float(min(max(round(Decimal(value) / quantum), least), most) * quantum)
        narrow = math.floor(math.log10(max(abs(low), abs(high)) / (high - low)))
        value = float(f"{value:.{DIGITS + max(narrow, 0)}g}")
        return min(max(value, low), high)

    def corners(self) -> tuple[Any, ...]:
        """The extreme values, or all values if they are listed."""
        if self.options:
            return self.options
        low, high = self.numbers[:2]
        return (int(low), int(high) - 1) if self.kind == "randint" else (self.rounded(low), self.rounded(high))

    def holds(self, value_of: Callable[[str], Any]) -> bool:
        return all(value_of(key) in allowed for key, allowed in self.when)


@dataclass(frozen=True)
class Space:
    """The knobs of a sweep, in the order of the file."""

    name: str
    knobs: dict[str, tuple[Distribution, ...]]
    source: dict[str, Any]
    """As it was written."""

    def grid(self) -> list[Params]:
        """The points of the grid; one empty point if no knob has a grid."""
        keys = [key for key, cases in self.knobs.items() if cases[0].kind == "grid"]
        options = [self.knobs[key][0].options for key in keys]
        return [dict(zip(keys, point, strict=True)) for point in itertools.product(*options)]

    def choose(self, base: Experiment, pick: Callable[[str, str, Distribution], Any]) -> Params:
        """Values for the knobs in order, each by `pick`.

        Args:
            pick: from the knob, a name for its distribution (unique within the knob), and the distribution.
        """
        params: Params = {}

        def value_of(key: str) -> Any:
            return params[key] if key in params else _get(base, key)

        for key, cases in self.knobs.items():
            for number, case in enumerate(cases):
                if case.holds(value_of):
                    params[key] = pick(key, key if len(cases) == 1 else f"{key} ({number + 1})", case)
                    break
        return params

    def draw(self, base: Experiment, seed: int, number: int) -> Params:
        """The setting of trial `number`: a function of its arguments alone. Grid points take turns."""
        points = self.grid()
        point = points[number % len(points)]
        rng = np.random.default_rng([seed, number])
        return self.choose(base, lambda key, _, case: point[key] if case.kind == "grid" else case.draw(rng))

    def near(self, base: Experiment, params: Params, rng: np.random.Generator) -> Params:
        """A setting near `params`: each knob is drawn again with a probability of one in four; otherwise a number
        becomes a fifth smaller or a quarter larger, within its range, and a choice is kept.

        Jaderberg et al., 2017, "Population Based Training of Neural Networks" (explore: perturb and resample).
        """

        def pick(key: str, _: str, case: Distribution) -> Any:
            if key not in params or rng.random() < RESAMPLING:
                return case.draw(rng)
            if case.options:
                return params[key] if params[key] in case.options else case.draw(rng)
            if type(params[key]) not in (int, float):
                return case.draw(rng)  # from another distribution of this knob
            value = case.rounded(params[key] * rng.choice(PERTURBATIONS))
            return min(round(value), int(case.numbers[1]) - 1) if case.kind == "randint" else value

        return self.choose(base, pick)

    def corners(self, base: Experiment) -> Iterator[Params]:
        """Settings at the extremes of the space: all of them if they are few; otherwise each pair of knobs at all its
        extremes, with the others at their first, and MOST_CORNERS more at random."""
        cases = {(key, number): case for key, many in self.knobs.items() for number, case in enumerate(many)}
        options = {slot: case.corners() for slot, case in cases.items()}
        slots = list(options)
        first = {slot: values[0] for slot, values in options.items()}
        full = math.prod(len(values) for values in options.values())
        if full <= MOST_CORNERS:
            chosen = [dict(zip(slots, values, strict=True)) for values in itertools.product(*options.values())]
        else:
            chosen = [
                {**first, one: a, other: b}
                for one, other in itertools.combinations(slots, 2)
                for a in options[one]
                for b in options[other]
            ]
            rng = np.random.default_rng(0)
            for _ in range(MOST_CORNERS):
                chosen.append({slot: values[int(rng.integers(len(values)))] for slot, values in options.items()})
        seen = set()
        for values in chosen:
            at = {id(cases[slot]): value for slot, value in values.items()}
            params = self.choose(base, lambda _, __, case: at[id(case)])  # noqa: B023 - used within this iteration
            if str(params) not in seen:
                seen.add(str(params))
                yield params


def load_space(source: str | Path) -> Space:
    """The space in a YAML file, or one of the shipped ones by its name.

    Raises:
        ConfigError: it is missing or empty, or a knob or distribution is invalid.
    """
    path = Path(source)
    ours = shipped("search_spaces") / f"{source}.yaml"
    if not path.is_file() and len(path.parts) == 1 and not path.suffix and ours.is_file():
        text, name = ours.read_text(), f"search_spaces/{source}.yaml"
    else:
        try:
            text, name = path.read_text(), str(source)
        except OSError as error:
            names = sorted(file.stem for file in shipped("search_spaces").glob("*.yaml"))
            raise ConfigError(
                f"no search space at {source} ({error.strerror}): specify a YAML file, or one of {', '.join(names)}"
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not YAML: {error}") from None
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from None
    return parse_space(tree, name)


def parse_space(tree: Any, name: str) -> Space:
    """A mapping of dotted keys to distributions as a space. See the top of this module for the format."""
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{name} holds {type(tree).__name__}, but a space is a mapping of knobs to distributions")
    if not tree:
        raise ConfigError(f"{name} is an empty space: add knobs, e.g. 'craft.lambda_lr: {{loguniform: [0.01, 1.0]}}'")
    knobs: dict[str, tuple[Distribution, ...]] = {}
    for key, entry in tree.items():
        where = f"{name}: {key}"
        section, separator, _ = str(key).partition(".")
        if not (key in KNOBS or (section in SECTIONS and separator)) or key in PINNED:
            raise ConfigError(
                f"{where} cannot be searched: all trials share one teacher, one anchor cache, one evaluation and one "
                f"way of saving; knobs are keys of craft and train (except {', '.join(PINNED)}) and of adapter, "
                f"task.limit and seed"
            )
        entries = entry if isinstance(entry, list) else [entry]
        if not entries:
            raise ConfigError(f"{where} has no distribution")
        cases = tuple(_distribution(case, where) for case in entries)
        if any(case.kind == "grid" and (case.when or len(cases) > 1) for case in cases):
            raise ConfigError(f"{where}: a grid has no condition; use choice")
        if any(not case.when for case in cases[:-1]):
            raise ConfigError(f"{where}: what follows a distribution without a condition is never drawn; put it last")
        for case in cases:
            for condition, _ in case.when:
                if condition in tree and condition not in knobs:
                    raise ConfigError(f"{where} depends on {condition}: put {condition} above it")
        knobs[key] = cases
    return Space(name, knobs, tree)


def check_space(space: Space, base: Experiment, allowed: Callable[[Experiment], None]) -> None:
    """Refuse a space that can draw what the config, or `allowed`, does not accept: at its extremes and among its first
    draws, because whole numbers and divisors can be wrong between extremes that are right.

    Raises:
        ConfigError: naming the space, the values and what is wrong with them.
    """
    for key, cases in space.knobs.items():
        try:
            _get(base, key)
        except KeyError:  # checked here, because a knob whose condition never holds is not drawn below
            changed(base, {key: cases[0].corners()[0]}, space.name, allowed)
        for case in cases:
            for condition, values in case.when:
                _check_condition(space, base, key, condition, values)
    if all(_never(space, base, cases) for cases in space.knobs.values()):
        raise ConfigError(
            f"{space.name} searches nothing: each of its knobs has a condition that the config does not meet and the "
            f"space does not search"
        )
    _check_read(space, base)
    for params in space.corners(base):
        changed(base, params, space.name, allowed)
    for number in range(max(CHECKED_DRAWS, base.sweep.samples * len(space.grid()))):
        changed(base, space.draw(base, base.sweep.seed, number), space.name, allowed)


def changed(base: Experiment, params: Params, name: str, allowed: Callable[[Experiment], None]) -> Experiment:
    """The config of a setting.

    Raises:
        ConfigError: the space `name` drew values that a config does not allow.
    """
    drawn = ", ".join(f"{key}={value}" for key, value in params.items())
    try:
        config = base.changed(params)
        allowed(config)
    except CraftError as error:
        reason = error.message.removeprefix("command line: ")
        raise type(error)(f"{name} can draw an invalid setting: {reason} (drawn: {drawn})") from None
    return config


def _never(space: Space, base: Experiment, cases: tuple[Distribution, ...]) -> bool:
    """Whether a knob is never drawn, whatever the others are."""
    return all(
        any(key not in space.knobs and _get(base, key) not in values for key, values in case.when) for case in cases
    )


def _check_read(space: Space, base: Experiment) -> None:
    """Refuse a knob that changes nothing, whatever is drawn: its trials would be equal."""
    for key in space.knobs:
        section, _, name = key.partition(".")
        if section != "craft":
            continue
        if not base.craft.enabled and "craft.enabled" not in space.knobs:
            raise ConfigError(
                f"{space.name}: {key} changes nothing, because craft.enabled is false: set it to true, or leave the "
                f"knobs of craft out"
            )
        own = name in ("keep", "epsilon_start") and [getattr(skill, name) for skill in base.skills.values()]
        if own and None not in own and (name == "keep" or base.craft.epsilon_end is None):
            raise ConfigError(
                f"{space.name}: {key} changes nothing, because each skill has its own {name}: leave it out of one "
                f"(skills.{next(iter(base.skills))}.{name}), or out of the space"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_condition(space: Space, base: Experiment, key: str, condition: str, values: tuple[Any, ...]) -> None:
    """Refuse a condition that can never hold: its knob would silently keep the config's value."""
    where = f"{space.name}: {key} depends on {condition}"
    try:
        found = _get(base, condition)
    except KeyError:
        raise ConfigError(f"{where}, which is not a key of the config") from None
    cases = space.knobs.get(condition, ())
    for value in values:
        if cases and all(case.options for case in cases):
            drawn = [option for case in cases for option in case.options]
            if value not in drawn and value != found:
                raise ConfigError(f"{where} being {value!r}, which is not drawn: it is among {drawn}")
            continue
        try:
            valid = _get(base.changed({condition: value}), condition) == value
        except ConfigError as error:
            # A value that conflicts with other keys of this config is still a valid value.
            valid = not error.message.startswith(f"command line: {condition}:")
        if not valid:
            raise ConfigError(
                f"{where} being {value!r}, which it never is (it is {found!r}; a number is 1.0e-3, not 1e-3, and a "
                f"list as a value is written inside a list)"
            )


def _distribution(entry: Any, where: str) -> Distribution:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is {entry!r}: write a distribution, e.g. {{uniform: [0, 1]}} or {{choice: [a, b]}}")
    kinds = [key for key in entry if key != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        near = difflib.get_close_matches(str(kinds[0]) if kinds else "", KINDS, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where} has {kinds or 'no distribution'}: specify one of {', '.join(KINDS)}{guess}")
    kind, values = kinds[0], entry[kinds[0]]
    when = entry.get("when", {})
    if not isinstance(when, dict):
        raise ConfigError(f"{where}: when is {when!r}; write a mapping, e.g. {{craft.epsilon_schedule: cosine}}")
    conditions = tuple((str(key), tuple(v) if isinstance(v, list) else (v,)) for key, v in when.items())
    if kind not in NUMBERS:
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {kind} is {values!r}; list at least one value")
        for value in values:
            if isinstance(value, str) and _is_number(value):
                raise ConfigError(f"{where}: '{value}' is text in YAML: write a number as 1.0e-3, not 1e-3")
        return Distribution(kind, options=tuple(values), when=conditions)
    numbers = values if isinstance(values, list) else []
    if len(numbers) != NUMBERS[kind] or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        form = "[low, high, quantum]" if kind == "quniform" else "[low, high]"
        raise ConfigError(f"{where}: {kind} is {values!r}; write {form}, in numbers (1.0e-3, not 1e-3)")
    low, high = numbers[:2]
    if not low < high:
        raise ConfigError(f"{where}: {kind} goes from {low} to {high}: the first must be less")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{where}: loguniform starts at {low}: it must be above 0")
    if kind == "quniform":
        least, most = _multiples(numbers) if numbers[2] > 0 else (0, 0)
        if not least < most:
            raise ConfigError(
                f"{where}: the quantum of quniform is {numbers[2]}: it must be above 0, and the range must hold two of "
                f"its multiples"
            )
    if kind == "randint" and not all(float(n).is_integer() for n in numbers):
        raise ConfigError(f"{where}: randint is {values!r}; both must be whole numbers")
    return Distribution(kind, tuple(float(n) for n in numbers), when=conditions)


def _multiples(numbers: Sequence[float]) -> tuple[int, int]:
    """The first and the last multiple of the quantum of quniform, in quanta. In decimals: 0.3 / 0.1 < 3 in binary."""
    low, high, quantum = (Decimal(repr(n)) for n in numbers)
    return math.ceil(low / quantum), math.floor(high / quantum)


def _get(config: Experiment, key: str) -> Any:
    """The value at a dotted key.

    Raises:
        KeyError: there is none.
    """
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value
