"""Weights between the teacher and a finished run, and the choice of alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from craft_ray.config.arm_selection import rate_name, with_arms
from craft_ray.config.arms import CATALOGUE
from craft_ray.models import load_model
from craft_ray.report.arms import styles_of
from craft_ray.run.folder import RunFolder
from craft_ray.run.interpolation import Interpolation, choose, interpolated
from craft_ray.workers import OneWorker
from tests.support.caches import prompts, text_experiment
from tests.support.experiments import ANSWERED, Digits
from tests.support.runs import trained


def test_the_ends_are_exact_and_the_middle_is_the_mean(text_model: Path, tmp_path: Path) -> None:
    config = text_experiment(text_model, prompts(tmp_path / "a.jsonl", [3, 4]), tmp_path)
    model, other = load_model(config.model, "fp32"), load_model(config.model, "fp32")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(torch.randn_like(parameter))
    start = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    end = other.module.state_dict()
    path = Interpolation(model, end)
    for alpha, expected in ((1.0, end), (0.0, start), (1.0, end)):
        path.to(alpha)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.module.state_dict().items())
    path.to(0.5)
    for name, tensor in model.module.state_dict().items():
        torch.testing.assert_close(tensor, (start[name] + end[name]) / 2)


def test_alpha_is_the_best_mean_or_the_best_that_keeps_enough() -> None:
    found = [(0.0, 1.0, 0.1), (0.5, 0.9, 0.7), (0.8, 0.6, 0.99), (1.0, 0.3, 1.0)]
    records = [{"alpha": alpha, "old/ratio": old, "new/gain": new} for alpha, old, new in found]
    assert choose(records, None)["alpha"] == 0.5
    assert choose(records, 0.55)["alpha"] == 0.8
    assert choose(records, 0.999)["alpha"] == 0.0


def test_all_arms_leave_out_what_the_data_do_not_allow(text_model: Path, tmp_path: Path) -> None:
    settings = {"compare.learning_rates": {"baseline": [3e-4]}}
    config = text_experiment(text_model, prompts(tmp_path / "a.jsonl", [3, 4]), tmp_path, settings)
    changed, lines = with_arms(config, ("all",))
    chosen = changed.compare.chosen
    assert {"baseline", "baseline_lr3e_4", "hidden", "l2_sp", "ewc", "lora", "selective_tokens"} <= set(chosen)
    left = {line.split(":")[0].removeprefix("left out ") for line in lines}
    assert {"replay", "a_gem", "wise_ft", "hidden_keep", "logits", "token_ce"} <= left
    assert not left & set(chosen)
    assert changed.compare.train_settings("baseline_lr3e_4") == {"learning_rate": 3e-4}


def test_where_the_data_allow_every_arm_all_of_them_and_several_rates_are_compared(
    text_model: Path, tmp_path: Path
) -> None:
    source = prompts(tmp_path / "a.jsonl", [3, 4])
    answered = {"data": {"path": str(source), "columns": {"response": "prompt"}}, "metric": "perplexity"}
    settings = {
        "anchors.modes": ["hidden", "token_ce", "logits", "replay"],
        "anchors.source.columns.response": "prompt",
        "validation": {"every": 1, "old": answered, "new": answered},
        "compare.token_ce": {"epsilon_start": 0.5},
        "compare.learning_rates": {"baseline": [1e-4, 3e-4], "hidden": [1e-4, 3e-4], "lora": [1e-3, 3e-3]},
    }
    changed, lines = with_arms(text_experiment(text_model, source, tmp_path, settings), ("all",))
    assert not lines
    chosen = changed.compare.chosen
    assert set(CATALOGUE) < set(chosen)
    assert len(chosen) == 3 + len(CATALOGUE) + 6
    drawn = styles_of(chosen).values()
    assert len({(style.color, style.marker) for style in drawn}) == len(chosen)


@pytest.mark.parametrize(("rate", "name"), [(3e-4, "a_lr3e_4"), (0.0025, "a_lr2_5e_3"), (1.0, "a_lr1e0")])
def test_an_arm_is_named_after_its_rate(rate: float, name: str) -> None:
    assert rate_name("a", rate) == name


@pytest.mark.parametrize("tested", [True, False])
def test_an_interpolated_run_certifies_the_stated_part(digits: Digits, tmp_path: Path, tested: bool) -> None:
    """Also that of plain fine-tuning, by the weights that were chosen: not by those that were scored last."""

    def scored(skill: str, split: str) -> dict[str, Any]:
        data = {"path": str(digits.data / f"{skill}_{split}.parquet"), "columns": ANSWERED, "limit": 24}
        return {"data": data, "metric": "perplexity"}

    changes = {
        "craft.enabled": False, "craft.anchor_cache_dir": None, "craft.keep": 0.9, "train.learning_rate": 0.02,
        "validation": {"every": 0, "old": scored("old", "val"), "new": scored("new", "val")},
        "evaluation.old": scored("old", "test") if tested else None,
    }  # fmt: skip
    config = digits.experiment(tmp_path, changes)
    source, said = trained(config, tmp_path / "plain"), list[str]()
    plain = source.finished()
    assert plain is not None
    assert "certificate" not in plain, "training was not held to it"
    folder = RunFolder(tmp_path / "mixed")
    folder.begin(config, ["test"])
    result = interpolated(config, source, folder, OneWorker(), said.append, (0.0, 0.3, 1.0))
    assert folder.finished() == result
    certificate, chosen = result["certificate"], next(r for r in result["alphas"] if r["alpha"] == result["alpha"])
    assert certificate["keep"] == 0.9
    assert certificate["judged_on"] == ("evaluation" if tested else "validation")
    assert certificate["kept"] == (result["old"]["ratio"] if tested else pytest.approx(chosen["old/ratio"]))
    assert result["feasible"] == (certificate["kept"] >= 0.9)
    assert (result["retention_loss"], result["epsilon"]) == (None, None)
    assert "keep 90% of the old skill: " in said[-1]
