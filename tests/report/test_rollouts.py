"""What the report says about success in a simulator, and how it shows episodes and variants."""

from __future__ import annotations

import base64
import io
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from craft_ray.errors import ConfigError
from craft_ray.report.arms import ARMS, VARIANTS
from craft_ray.report.examples import examples
from craft_ray.report.rollouts import rollouts
from craft_ray.report.runs import read_runs
from craft_ray.run.folder import RunFolder
from tests.support.reports import EVIL, Page, report, write_run

FILMED = 4


def film() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 8), (30, 90, 200)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def episodes(succeeded: Sequence[bool]) -> list[dict[str, Any]]:
    """The records of episodes 0, 1, ...: the first ones are filmed."""
    return [
        {
            "id": f"episode {number}", "prompt": f"open {EVIL}", "response": "success", "correct": correct,
            "prediction": "success" if correct else "failure", "steps": 40 + number,
            **({"film": film()} if number < FILMED else {}),
        }
        for number, correct in enumerate(succeeded)
    ]  # fmt: skip


def rolled_out(
    folder: Path, arm: str, seed: int, old: Sequence[bool], mode: str | None = None, **craft: Any
) -> RunFolder:
    """A run with this outcome on the old skill, with a teacher that always succeeded; scored on 20 episodes."""
    after = sum(old) / len(old)
    run = write_run(
        folder, arm, seed, (0.8, after), (0.0, 0.5), metric="success", predictions=False, mode=mode, **craft
    )
    run.write_predictions("old_before", episodes([True] * len(old)))
    run.write_predictions("old_after", episodes(old))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """Plain fine-tuning, hidden and two variants. Filmed episodes 1 and 3 differ."""
    prefix = {"mode": "hidden", "positions": ["text_last"], "epsilon_start": 0.5}
    return [
        rolled_out(tmp_path, "prefix", 0, [True, False, True, True, True], **prefix),  # type: ignore[arg-type]
        rolled_out(tmp_path, "baseline", 0, [True, False, True, False, False]),
        rolled_out(tmp_path, "near", 0, [False, False, False, False, True], mode="token_ce"),
        rolled_out(tmp_path, "hidden", 0, [True, True, False, False, True]),
    ]


def test_success_is_shown_with_its_episodes_and_wilsons_intervals(runs: list[RunFolder], tmp_path: Path) -> None:
    text = Page(report(runs, tmp_path)[1]).text
    assert "success rate" in text
    assert "n = 20 episodes of the old skill, n = 20 episodes of the new skill" in text
    assert "of the teacher's success" in text
    assert "CRaFT hidden kept 75.0 % of the teacher's success on the old skill" in text
    assert "reached 100.0 % of plain fine-tuning's success on the new skill" in text
    assert "80.0 % [58.4, 91.9] %" in text, "the teacher's, 16 of 20"
    assert text.count("60.0 % [38.7, 78.1] %") == 2, "of CRaFT hidden, 12 of 20: among the scores and the runs"
    assert "held-out samples" not in text


def test_episodes_are_side_by_side_and_those_that_differ_come_first(runs: list[RunFolder]) -> None:
    (old,) = rollouts(read_runs(runs))
    assert old.skill == "old"
    assert [episode.id for episode in old.episodes] == ["episode 1", "episode 3", "episode 0"]
    assert [strip.label for strip in old.episodes[0].strips] == [
        "Teacher, before", "Plain fine-tuning", "CRaFT hidden", "CRaFT prefix", "CRaFT near",
    ]  # fmt: skip
    assert [strip.outcome for strip in old.episodes[0].strips] == [
        "success after 41 steps", "no success", "success after 41 steps", "no success", "no success",
    ]  # fmt: skip
    assert "Seed 0, 3 of the 4 filmed episodes: first those in which plain" in old.note
    assert "(2 of 4)" in old.note


def test_the_page_shows_the_strips_and_needs_nothing_else(runs: list[RunFolder], tmp_path: Path) -> None:
    text = report(runs, tmp_path)[1]
    page = Page(text)
    strips = [reference for reference in page.references if reference.startswith("data:")]
    assert len(strips) == 3 * 5
    assert set(strips) == {f"data:image/png;base64,{film()}"}
    assert "episode 1, CRaFT hidden: success after 41 steps" in re.findall(r'alt="([^"]*)"', text)
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.text.count(f"open {EVIL}") == 3, "prompts are shown as they are"
    assert len(page.ids) == len(set(page.ids))


def test_only_the_first_seed_is_shown(runs: list[RunFolder], tmp_path: Path) -> None:
    late = rolled_out(tmp_path, "baseline", 1, [True] * 5)
    (old,) = rollouts(read_runs([late, *runs]))
    assert len(old.episodes[0].strips) == 5
    assert "95 % intervals over what it was scored on: Wilson's" in Page(report([late, *runs], tmp_path)[1]).text


def test_episodes_are_not_examples(runs: list[RunFolder]) -> None:
    assert examples(read_runs(runs)) is None


def test_a_plain_run_alone_shows_its_first_episodes(tmp_path: Path) -> None:
    run = rolled_out(tmp_path, "baseline", 0, [True, False, True, False, False])
    (old,) = rollouts(read_runs([run]))
    assert [episode.id for episode in old.episodes] == ["episode 0", "episode 1", "episode 2"]
    assert old.note == "Seed 0, 3 of the 4 filmed episodes."


def test_without_films_there_is_no_section(tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0, metric="success", predictions=False)
    assert "Rollouts" not in Page(report([run], tmp_path)[1]).text


# -- variants


def test_variants_are_arms_with_a_distinct_style(runs: list[RunFolder], tmp_path: Path) -> None:
    content, text = report(runs, tmp_path)
    assert list(content["summary"]) == ["baseline", "hidden", "prefix", "near"]
    assert content["summary"]["prefix"]["new_ratio"] == 1.0
    assert content["summary"]["prefix"]["epsilon"] == 0.5
    text_of = Page(text).text
    assert "CRaFT prefix kept 100.0 %" in text_of
    assert "CRaFT near kept 25.0 %" in text_of
    assert "craft.positions" in text_of
    assert "Retention loss and ε, relative squared error" in text_of
    assert "Retention loss and ε, nats a token" in text_of, "a column for each unit"
    styles = {run.arm: run.style for run in read_runs(runs)}
    assert (styles["prefix"].color, styles["near"].color) == (VARIANTS[0][0], VARIANTS[1][0])
    assert all(text.count(style.path) > 3 for style in styles.values())


def test_no_two_arms_look_alike() -> None:
    first = [(style.color, style.marker, style.path) for style in ARMS.values()] + list(VARIANTS[:5])
    for part in zip(*first, strict=True):
        assert len(set(part)) == len(first)
    assert len(set(VARIANTS)) == len(VARIANTS)


def test_more_variants_than_can_be_distinguished_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, 0, mode="hidden") for name in string.ascii_lowercase]
    with pytest.raises(ConfigError, match="y, z, but a report can distinguish 25"):
        report(runs, tmp_path)


def test_runs_of_one_variant_differ_in_their_seed_alone(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), "near", seed, mode="hidden", epsilon_start=0.1 + seed) for seed in range(2)]
    with pytest.raises(ConfigError, match="the near runs are not comparable"):
        report(runs, tmp_path)
