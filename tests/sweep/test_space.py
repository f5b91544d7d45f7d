"""What is drawn is in its range and a valid config; an invalid space is refused in one line before anything starts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from craft_ray.config import Experiment, parse_config
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.sweep.space import Distribution, Params, Space, check_space, load_space, parse_space

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
DRAWS = 2000


def experiment(**changes: Any) -> Experiment:
    held_out = {"data": {"path": "org/data", "split": "validation"}}
    tree = {
        "model": {"path": "org/model"}, "task": {"path": "org/data"}, "train": {"steps": 100},
        "validation": {"old": held_out, "every": 10},
    }  # fmt: skip
    return parse_config(tree, "test").changed({key.replace("__", "."): value for key, value in changes.items()})


def anything(_: Experiment) -> None:
    """Allows every config."""


def space_of(text: str) -> Space:
    return parse_space(yaml.safe_load(text), "space.yaml")


def one(text: str) -> Distribution:
    """The distribution in `text`."""
    (cases,) = space_of(f"craft.lambda_lr: {text}").knobs.values()
    return cases[0]


def drawn(distribution: Distribution) -> list[Any]:
    rng = np.random.default_rng(0)
    return [distribution.draw(rng) for _ in range(DRAWS)]


def settings(space: Space, base: Experiment, count: int = DRAWS, seed: int = 0) -> list[Params]:
    return [space.draw(base, seed, number) for number in range(count)]


def refusal(path: Path, text: str, base: Experiment | None = None) -> str:
    """The one line with which a file is refused: when it is read, or checked against a config."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_space(load_space(path), base or experiment(), anything)
    message = caught.value.message
    assert "\n" not in message
    assert message.startswith((str(path), f"no search space at {path}"))
    return message


# --- the shipped spaces -------------------------------------------------------------------------------------------


def test_these_spaces_are_shipped() -> None:
    assert [path.stem for path in SPACES] == ["ablation", "craft", "price", "smoke"]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_shipped_space_is_the_same_by_name_and_by_path_and_fits_a_config(path: Path) -> None:
    by_name, by_path = load_space(path.stem), load_space(path)
    assert by_name.knobs == by_path.knobs
    base = experiment()
    check_space(by_name, base, anything)
    for params in settings(by_name, base, 300):
        config = base.changed(params)
        for key, value in params.items():
            found: Any = config
            for part in key.split("."):
                found = getattr(found, part)
            assert (list(found) if isinstance(found, tuple) else found) == value
    first = settings(by_name, base, 300)
    assert {key for params in first for key in params} == set(by_name.knobs), "every knob is drawn sometimes"


def test_the_space_price_draws_parts_to_keep_and_each_setting_has_a_budget_that_follows_it() -> None:
    space, base = load_space("price"), experiment()
    check_space(space, base, anything)
    drawn_parts = [params["craft.keep"] for params in settings(space, base, 300)]
    assert all(0.8 <= part <= 0.99 for part in drawn_parts)
    assert len(set(drawn_parts)) > 100
    assert min(drawn_parts) < 0.82
    assert max(drawn_parts) > 0.97
    assert {len(params) for params in settings(space, base, 300)} == {1}, "nothing else is searched"
    for part in drawn_parts[:20]:
        config = base.changed({"craft.keep": part})
        assert config.kept_parts() == {None: part}
        assert config.craft.lambda_start == config.craft.lambda_max
    without = experiment(validation__every=0)
    with pytest.raises(ConfigError, match=r"keep .*validation\.every"):
        check_space(space, without, anything)


def test_a_file_of_the_working_directory_comes_before_a_shipped_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_space("smoke").knobs) == 2
    Path("smoke").write_text("craft.lambda_lr: {choice: [0.25]}")
    assert load_space("smoke").draw(experiment(), 0, 0) == {"craft.lambda_lr": 0.25}


# --- distributions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.02, 0.5),
        (1e-7, 3.0),
        (0.123456, 0.654321),  # ends of more digits than are drawn
        (0.33335, 0.33344),
        (0.999, 0.9999),
        (10_000.0, 10_003.0),
        (1 / 3, 2 / 3),
    ],
)
def test_numbers_are_short_and_never_out_of_their_range(kind: str, low: float, high: float) -> None:
    values = drawn(Distribution(kind, (low, high)))
    assert all(low <= value <= high for value in values)
    assert len(set(values)) > 50, "a narrow range is drawn from throughout, not only at its ends"
    inside = [value for value in values if low < value < high]
    if high > 2 * low:
        assert all(float(f"{value:.4g}") == value for value in inside)
    middle = math.sqrt(low * high) if kind == "loguniform" else (low + high) / 2
    assert 0.4 < sum(value < middle for value in values) / DRAWS < 0.6
    assert all(type(value) is float for value in values)


def test_a_uniform_range_may_be_negative() -> None:
    values = drawn(one("{uniform: [-0.5, 0.2]}"))
    assert all(-0.5 <= value <= 0.2 for value in values)
    assert min(values) < -0.49
    assert max(values) > 0.19


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0, 100, 25]", [0, 25, 50, 75, 100]),
        ("[1, 10, 3]", [3, 6, 9]),  # the ends are not multiples
        ("[8, 64, 8]", [8, 16, 24, 32, 40, 48, 56, 64]),
        ("[0.1, 0.5, 0.1]", [0.1, 0.2, 0.3, 0.4, 0.5]),  # 3 * 0.1 is not 0.3 in binary
        ("[-0.3, 0.1, 0.2]", [-0.2, 0.0]),
        ("[123456, 123459, 1]", [123456, 123457, 123458, 123459]),
    ],
)
def test_quniform_draws_all_multiples_in_its_range_and_nothing_else(text: str, expected: list[float]) -> None:
    distribution = one(f"{{quniform: {text}}}")
    assert sorted(set(drawn(distribution))) == expected
    assert distribution.corners() == (expected[0], expected[-1])


def test_randint_leaves_out_its_upper_end() -> None:
    values = drawn(one("{randint: [2, 6]}"))
    assert set(values) == {2, 3, 4, 5}
    assert all(type(value) is int for value in values)
    assert one("{randint: [2, 6]}").corners() == (2, 5)


def test_choice_draws_what_is_listed_as_it_is_listed() -> None:
    options = [[-2, -1], [-1], None, True, False, 3, "text", {"a": 1}]
    values = drawn(Distribution("choice", options=tuple(options)))
    assert {repr(value) for value in values} == {repr(option) for option in options}
    for option in options:
        assert values.count(option) > DRAWS / len(options) / 2


def test_listed_values_arrive_in_the_config() -> None:
    space = space_of(
        "craft.layers: {choice: [[-1], [-2, -1], null]}\n"
        "craft.use_grad_projection: {choice: [true, false]}\n"
        "train.max_grad_norm: {choice: [null, 0.5]}\n"
        "train.betas: {choice: [[0.9, 0.99]]}\n"
        "task.limit: {choice: [10, null]}\n"
        "seed: {randint: [3, 5]}\n"
    )
    base = experiment()
    check_space(space, base, anything)
    configs = [base.changed(params) for params in settings(space, base, 100)]
    assert {config.craft.layers for config in configs} == {(-1,), (-2, -1), None}
    assert {config.craft.use_grad_projection for config in configs} == {True, False}
    assert {config.train.max_grad_norm for config in configs} == {None, 0.5}
    assert {config.train.betas for config in configs} == {(0.9, 0.99)}
    assert {config.task.limit for config in configs} == {10, None}
    assert {config.seed for config in configs} == {3, 4}


def test_a_whole_quantum_serves_a_whole_number() -> None:
    space, base = space_of("train.batch_size: {quniform: [8, 64, 8]}"), experiment()
    check_space(space, base, anything)
    sizes = {base.changed(params).train.batch_size for params in settings(space, base, 100)}
    assert sizes == {8, 16, 24, 32, 40, 48, 56, 64}
    assert all(type(size) is int for size in sizes)


# --- conditions ---------------------------------------------------------------------------------------------------


def test_a_condition_on_a_knob_decides_whether_another_is_drawn() -> None:
    space = space_of(
        "craft.epsilon_schedule: {choice: [constant, linear, cosine]}\n"
        "craft.epsilon_end: {uniform: [0.01, 0.05], when: {craft.epsilon_schedule: [linear, cosine]}}\n"
    )
    base = experiment()
    check_space(space, base, anything)
    found = settings(space, base, 300)
    assert {params["craft.epsilon_schedule"] for params in found} == {"constant", "linear", "cosine"}
    for params in found:
        assert ("craft.epsilon_end" in params) == (params["craft.epsilon_schedule"] != "constant")


def test_the_first_distribution_whose_condition_holds_is_drawn_from() -> None:
    space = space_of(
        "craft.loss_type: {choice: [relative_mse, cosine, l1]}\n"
        "craft.epsilon_start:\n"
        "  - {uniform: [0.1, 0.2], when: {craft.loss_type: relative_mse}}\n"
        "  - {uniform: [0.3, 0.4], when: {craft.loss_type: [relative_mse, cosine]}}\n"
        "  - {choice: [9.0]}\n"
    )
    ranges = {"relative_mse": (0.1, 0.2), "cosine": (0.3, 0.4), "l1": (9.0, 9.0)}
    for params in settings(space, experiment(), 300):
        low, high = ranges[params["craft.loss_type"]]
        assert low <= params["craft.epsilon_start"] <= high


def test_several_conditions_hold_together_and_conditions_follow_conditions() -> None:
    space = space_of(
        "craft.use_grad_projection: {choice: [true, false]}\n"
        "craft.projection_gate: {choice: [violated, always], when: {craft.use_grad_projection: true}}\n"
        "craft.conflict_threshold:\n"
        "  {uniform: [-1, 1], when: {craft.projection_gate: always, craft.use_grad_projection: true}}\n"
    )
    base = experiment(craft__projection_gate="always")
    for params in settings(space, base, 300):
        both = params["craft.use_grad_projection"] and params["craft.projection_gate"] == "always"
        assert ("craft.conflict_threshold" in params) == both
        assert ("craft.projection_gate" in params) == params["craft.use_grad_projection"]


def test_a_condition_may_be_on_what_the_config_says() -> None:
    space = space_of(
        "craft.lambda_lr: {choice: [0.5], when: {craft.retention_mode: token_ce}}\n"
        "train.learning_rate: {choice: [0.25], when: {craft.positions: [[all], null], craft.lambda_max: 10}}\n"
    )
    hidden, tokens = (
        experiment(),
        experiment(craft__retention_mode="token_ce", craft__epsilon_start=0.1, craft__positions=["suffix"]),
    )
    for base in (hidden, tokens):
        check_space(space, base, anything)
    assert space.draw(hidden, 0, 0) == {"train.learning_rate": 0.25}
    idle = space_of("craft.lambda_lr: {choice: [0.5], when: {craft.retention_mode: token_ce}}\n")
    with pytest.raises(ConfigError, match="searches nothing"):
        check_space(idle, hidden, anything)
    assert space.draw(tokens, 0, 0) == {"craft.lambda_lr": 0.5}


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_setting_is_a_function_of_seed_and_number(path: Path) -> None:
    base = experiment()
    forwards = settings(load_space(path), base, 20)
    space = load_space(path)
    backwards = [space.draw(base, 0, number) for number in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert settings(space, base, 20, seed=1) != forwards
    assert len({str(params) for params in forwards}) > 15


def test_the_points_of_a_grid_take_turns_while_the_rest_is_drawn() -> None:
    space = space_of(
        "craft.retention_freq: {grid: [1, 2, 5]}\n"
        "craft.lambda_lr: {loguniform: [0.01, 1.0]}\n"
        "craft.layers: {grid: [[-1], null]}\n"
    )
    base = experiment()
    check_space(space, base, anything)
    points = [(f, layers) for f, layers in itertools.product([1, 2, 5], [[-1], None])]
    assert [tuple(point.values()) for point in space.grid()] == points
    found = [space.draw(base, 0, number) for number in range(12)]
    assert [(params["craft.retention_freq"], params["craft.layers"]) for params in found] == points * 2
    assert len({params["craft.lambda_lr"] for params in found}) == 12


def test_without_a_grid_there_is_one_point() -> None:
    assert space_of("craft.lambda_lr: {uniform: [0, 1]}").grid() == [{}]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_setting_near_another_belongs_to_the_space(path: Path) -> None:
    space, base, rng = load_space(path), experiment(), np.random.default_rng(0)
    params = space.draw(base, 0, 0)
    for _ in range(DRAWS // 2):
        params = space.near(base, params, rng)
        _assert_member(space, base, params)
        base.changed(params)


def _assert_member(space: Space, base: Experiment, params: Params) -> None:
    """Every knob has a value of the distribution whose condition holds."""

    def check(key: str, _: str, case: Distribution) -> Any:
        value = params[key]
        if case.options:
            assert value in case.options
        elif case.kind == "randint":
            assert type(value) is int
            assert case.numbers[0] <= value < case.numbers[1]
        else:
            assert case.numbers[0] <= value <= case.numbers[1]
            assert case.rounded(value) == value
        return value

    assert space.choose(base, check) == params


def test_a_setting_near_another_if_the_knob_has_another_distribution() -> None:
    space = space_of(
        "craft.loss_type: {choice: [relative_mse, cosine, l1]}\n"
        "train.max_grad_norm:\n"
        "  - {choice: [null, 1.0], when: {craft.loss_type: relative_mse}}\n"
        "  - {choice: [2.0, 3.0], when: {craft.loss_type: cosine}}\n"
        "  - {uniform: [0.1, 0.5]}\n"
        "craft.retention_freq: {randint: [1, 9]}\n"
        "train.warmup_steps: {quniform: [10, 50, 20]}\n"
        "craft.lambda_max: {grid: [20]}\n"
    )
    base, rng = experiment(), np.random.default_rng(0)
    params = space.draw(base, 0, 0)
    for _ in range(500):
        params = space.near(base, params, rng)
        _assert_member(space, base, params)


def test_near_is_a_fifth_less_or_a_quarter_more_or_drawn_again() -> None:
    space, rng = space_of("craft.lambda_lr: {uniform: [0, 1000]}"), np.random.default_rng(0)
    near = [space.near(experiment(), {"craft.lambda_lr": 100.0}, rng)["craft.lambda_lr"] for _ in range(DRAWS)]
    for factor in (0.8, 1.25):
        assert near.count(100 * factor) / DRAWS == pytest.approx(0.375, abs=0.05)
    redrawn = [value for value in near if value not in (80.0, 125.0)]
    assert len(redrawn) / DRAWS == pytest.approx(0.25, abs=0.05)
    assert max(redrawn) > 900


# --- refused before anything starts -------------------------------------------------------------------------------

KINDS = "uniform, loguniform, quniform, randint, choice, grid"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("craft.lamda_lr: {uniform: [0, 1]}", ["unknown key craft.lamda_lr; did you mean craft.lambda_lr?"]),
        ("train.learning_rte: {choice: [1]}", ["unknown key train.learning_rte; did you mean train.learning_rate?"]),
        (
            "seed: {choice: [1]}\ncraft.lamda_lr: {choice: [1], when: {craft.enabled: false}}",
            ["unknown key craft.lamda_lr; did you mean craft.lambda_lr?"],
        ),
        ("craft.lambda_lr.x: {choice: [1]}", ["craft.lambda_lr.x", "not a section"]),
        ("lambda_lr: {choice: [1]}", ["lambda_lr cannot be searched", "keys of craft and train"]),
        ("craft.lambda_lr: {unifrm: [0, 1]}", ["craft.lambda_lr", "unifrm", KINDS, "did you mean uniform?"]),
        ("craft.lambda_lr: {}", ["craft.lambda_lr has no distribution", KINDS]),
        ("craft.lambda_lr: []", ["craft.lambda_lr has no distribution"]),
        ("craft.lambda_lr: {when: {seed: 0}}", ["craft.lambda_lr has no distribution", KINDS]),
        ("craft.lambda_lr: {uniform: [0, 1], choice: [1]}", ["craft.lambda_lr", "['uniform', 'choice']", KINDS]),
        ("craft.lambda_lr: 0.3", ["craft.lambda_lr is 0.3", "{uniform: [0, 1]}"]),
        ("craft.lambda_lr: {uniform: [0]}", ["craft.lambda_lr", "[low, high]"]),
        ("craft.lambda_lr: {loguniform: [1, 2, 3]}", ["craft.lambda_lr", "[low, high]"]),
        ("craft.lambda_lr: {quniform: [0, 1]}", ["craft.lambda_lr", "[low, high, quantum]"]),
        ("craft.lambda_lr: {uniform: 3}", ["craft.lambda_lr", "[low, high]"]),
        ("craft.lambda_lr: {uniform: {low: 0, high: 1}}", ["craft.lambda_lr", "[low, high]"]),
        ("craft.lambda_lr: {loguniform: [1e-3, 1]}", ["craft.lambda_lr", "'1e-3'", "1.0e-3, not 1e-3"]),
        ("craft.lambda_lr: {uniform: ['0', 1]}", ["craft.lambda_lr", "in numbers"]),
        ("craft.lambda_lr: {uniform: [false, true]}", ["craft.lambda_lr", "in numbers"]),
        ("craft.lambda_lr: {uniform: [0, .inf]}", ["craft.lambda_lr", "in numbers"]),
        ("craft.lambda_lr: {uniform: [.nan, 1]}", ["craft.lambda_lr", "in numbers"]),
        ("craft.lambda_lr: {uniform: [1, 1]}", ["craft.lambda_lr", "from 1 to 1", "the first must be less"]),
        ("craft.lambda_lr: {randint: [4, 3]}", ["craft.lambda_lr", "from 4 to 3", "the first must be less"]),
        ("craft.lambda_lr: {loguniform: [0, 1]}", ["craft.lambda_lr", "starts at 0", "above 0"]),
        ("craft.lambda_lr: {loguniform: [-1, 1]}", ["craft.lambda_lr", "starts at -1", "above 0"]),
        ("craft.lambda_lr: {quniform: [0, 1, 0]}", ["craft.lambda_lr", "quantum", "above 0"]),
        ("craft.lambda_lr: {quniform: [0, 1, 2]}", ["craft.lambda_lr", "quantum", "multiples"]),
        ("craft.lambda_lr: {quniform: [4, 6, 5]}", ["craft.lambda_lr", "quantum", "multiples"]),
        ("craft.retention_freq: {randint: [1.5, 3]}", ["craft.retention_freq", "whole numbers"]),
        ("craft.lambda_lr: {choice: []}", ["craft.lambda_lr", "at least one value"]),
        ("craft.lambda_lr: {choice: 0.1}", ["craft.lambda_lr", "at least one value"]),
        ("craft.lambda_lr: {grid: []}", ["craft.lambda_lr", "at least one value"]),
        ("craft.lambda_lr: {grid: [1], when: {seed: 0}}", ["craft.lambda_lr", "a grid has no condition"]),
        ("craft.lambda_lr: [{grid: [1]}, {choice: [2]}]", ["craft.lambda_lr", "a grid has no condition"]),
        ("craft.lambda_lr: [{choice: [1]}, {choice: [2], when: {seed: 0}}]", ["craft.lambda_lr", "never drawn"]),
        ("craft.lambda_lr: {choice: [1], when: [seed]}", ["craft.lambda_lr", "when is ['seed']", "mapping"]),
        ("craft.lambda_lr: {choice: [1], when: {craft.nope: 1}}", ["craft.lambda_lr", "craft.nope", "not a key"]),
        ("craft.lambda_lr: {choice: [1], when: {1: 1}}", ["craft.lambda_lr", "depends on 1", "not a key"]),
        ("craft.lambda_lr: {choice: [1], when: {craft.lambda_lr: 1}}", ["put craft.lambda_lr above it"]),
        (
            "craft.lambda_lr: {choice: [1], when: {craft.lambda_max: 2}}\ncraft.lambda_max: {choice: [2]}",
            ["craft.lambda_lr depends on craft.lambda_max: put craft.lambda_max above it"],
        ),
        # Conditions that cannot hold: the knob would silently keep the config's value.
        ("craft.lambda_lr: {choice: [1], when: {craft.epsilon_schedule: cosin}}", ["cosin", "never is"]),
        ("craft.lambda_lr: {choice: [1], when: {train.learning_rate: 1e-4}}", ["'1e-4'", "1.0e-3, not 1e-3"]),
        (
            "craft.epsilon_schedule: {choice: [constant, linear]}\n"
            "craft.lambda_lr: {choice: [1], when: {craft.epsilon_schedule: cosine}}",
            ["craft.lambda_lr depends on craft.epsilon_schedule", "'cosine'", "not drawn"],
        ),
        (
            "craft.layers: {choice: [[-2, -1], [-1]]}\ncraft.lambda_lr: {choice: [1], when: {craft.layers: [-1]}}",
            ["craft.lambda_lr depends on craft.layers", "not drawn"],
        ),
        ("", ["empty space", "craft.lambda_lr: {loguniform: [0.01, 1.0]}"]),
        ("{}", ["empty space"]),
        ("- craft.lambda_lr", ["holds list", "mapping"]),
        ("craft.lambda_lr", ["holds str", "mapping"]),
        ("craft: [", ["is not YAML"]),
        (
            "craft.lambda_lr: {choice: [1]}\nseed: {choice: [1]}\ncraft.lambda_lr: {choice: [2]}",
            ["craft.lambda_lr", "twice", "line 3"],
        ),
        ("craft.lambda_lr: {choice: [1], choice: [2]}", ["choice", "twice"]),
    ],
)
def test_an_invalid_space_is_refused_in_one_line(text: str, parts: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path / "space.yaml", text)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "key",
    [
        *("craft.anchor_cache_dir", "train.precision", "train.keep_checkpoints", "train.checkpoint_every"),
        *("workers.num_workers", "workers", "output_dir", "name", "model.path", "anchors.layers", "tracking.mlflow"),
        *("evaluation.old", "validation.every", "objective.maximize", "sweep.samples", "compare.seeds"),
        *("task", "task.path", "task.columns.response", "craft", "train", "1"),
    ],
)
def test_what_all_trials_share_cannot_be_searched(key: str, tmp_path: Path) -> None:
    message = refusal(tmp_path / "space.yaml", f"{key}: {{choice: [1]}}")
    assert f"{key} cannot be searched: all trials share one teacher" in message
    assert "knobs are keys of craft and train" in message


def test_a_missing_file_and_one_that_is_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no search space at nowhere \(No such file.*\): specify a YAML file"):
        load_space("nowhere")
    with pytest.raises(ConfigError, match="specify a YAML file"):
        load_space(tmp_path)
    (tmp_path / "space.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"space.yaml is not YAML"):
        load_space(tmp_path / "space.yaml")


SCHEDULED = "craft.epsilon_schedule: {choice: [linear]}\n"


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        (
            SCHEDULED + "craft.epsilon_start: {uniform: [0.1, 0.3]}\ncraft.epsilon_end: {uniform: [0.05, 0.2]}",
            {},
            "epsilon_end 0.2 is above epsilon_start 0.1",
        ),
        ("craft.epsilon_start: {uniform: [0.1, 0.3]}", {}, None),
        (
            "craft.epsilon_start: {uniform: [0.1, 0.3]}",
            {"craft__epsilon_schedule": "linear", "craft__epsilon_end": 0.2, "craft__epsilon_start": 0.3},
            "epsilon_end 0.2 is above epsilon_start 0.1",
        ),
        ("craft.epsilon_end: {uniform: [0.01, 0.02]}", {}, "epsilon_schedule constant has one epsilon"),
        ("craft.initial_lambda: {uniform: [1, 20]}", {}, "initial_lambda 20.0 is above lambda_max 10.0"),
        ("craft.lambda_max: {uniform: [0.5, 20]}", {}, "initial_lambda 1.0 is above lambda_max 0.5"),
        ("train.batch_size: {choice: [32, 33]}", {"workers__num_workers": 2}, "train.batch_size 33 does not divide"),
        ("craft.anchor_batch_size: {choice: [32, 33]}", {"train__accumulate": 2}, "anchor_batch_size 33 does not"),
        ("train.accumulate: {choice: [1, 3]}", {}, "does not divide"),
        ("train.warmup_steps: {randint: [0, 200]}", {}, "train.warmup_steps 199 is more than train.steps 100"),
        ("craft.anchor_holdout: {uniform: [0, 1]}", {}, "craft.anchor_holdout: Input should be less than 1"),
        ("craft.lambda_lr: {choice: [0.1, fast]}", {}, "craft.lambda_lr"),
        ("craft.projection_mode: {choice: [weighted, eqal]}", {}, "craft.projection_mode"),
        ("craft.initial_lambda: {uniform: [0, 8]}", {"compare__token_ce": {"lambda_max": 5.0}}, "above lambda_max 5.0"),
    ],
)
def test_what_can_be_drawn_must_be_a_valid_config(
    text: str, changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    base = experiment(**changes)
    if reason is None:
        check_space(space_of(text), base, anything)
        return
    message = refusal(tmp_path / "space.yaml", text, base)
    assert reason in message, message
    assert "drawn: " in message
    assert text.splitlines()[-1].split(":")[0] in message


@pytest.mark.parametrize(
    ("text", "changes", "own"),
    [
        ("craft.lambda_lr: {loguniform: [0.01, 1]}", {"craft.enabled": False}, "craft.enabled is false"),
        ("craft.epsilon_start: {uniform: [0.1, 0.2]}", {}, "each skill has its own epsilon_start"),
    ],
)
def test_a_knob_that_changes_nothing_is_refused(text: str, changes: dict[str, Any], own: str, tmp_path: Path) -> None:
    base = experiment()
    skills = {"near": {"anchors": {"path": "a.jsonl"}, "epsilon_start": 0.1}}
    base = base.changed(changes or {"skills": skills, "anchors.source": None, "validation": {}, "evaluation": {}})
    assert own in refusal(tmp_path / "space.yaml", text, base)


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("craft.retention_freq: {uniform: [1, 5]}", {}, "craft.retention_freq"),
        ("train.steps: {loguniform: [100, 1000]}", {}, "train.steps"),
        ("train.batch_size: {quniform: [32, 64, 0.5]}", {}, "train.batch_size"),
        ("train.batch_size: {randint: [8, 65]}", {"train__accumulate": 4}, "does not divide"),
        ("train.accumulate: {randint: [1, 5]}", {}, "does not divide"),
    ],
)
def test_a_range_may_be_right_at_its_ends_and_wrong_between_them(
    text: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(tmp_path / "space.yaml", text, experiment(**changes))


def test_a_corner_that_three_knobs_make_is_found_in_a_large_space(tmp_path: Path) -> None:
    many = "".join(
        f"{key}: {{uniform: [0.1, 0.9]}}\n"
        for key in (
            *("craft.lambda_lr", "craft.initial_lambda", "craft.lambda_kp", "craft.retention_ema"),
            *("craft.conflict_threshold", "train.learning_rate", "train.weight_decay", "craft.violation_clip"),
        )
    )
    wrong = (
        "craft.epsilon_schedule: {choice: [constant, linear, cosine, exponential]}\n"
        "craft.epsilon_start: {choice: [5.0, 0.1]}\n"
        "craft.epsilon_end: {uniform: [0.01, 0.1005], when: {craft.epsilon_schedule: exponential}}\n"
    )
    message = refusal(tmp_path / "space.yaml", many + wrong)
    assert "epsilon_end 0.1005 is above epsilon_start 0.1" in message


def test_what_a_caller_does_not_allow_is_refused_with_the_setting() -> None:
    def few(config: Experiment) -> None:
        if config.craft.positions == ("all",):
            raise CacheRefused("the cache has no positions all")

    space = space_of("craft.positions: {choice: [[suffix], [all]]}")
    with pytest.raises(CacheRefused, match=r"space.yaml can draw .*has no positions all .*craft.positions=\['all'\]"):
        check_space(space, experiment(), few)
