"""Exported figures and tables: all that the page draws, as files that other programs read, complete or not at all."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from craft_pipelines.export import export, runs_of
from PIL import Image

from craft_ray.errors import ConfigError, StorageError
from craft_ray.report.export import plots_in, write_files
from craft_ray.report.runs import read_runs
from craft_ray.report.svg import inline_svg, new_figure
from craft_ray.report.table import Table
from craft_ray.report.tables import report_tables
from craft_ray.run.kept import Certificate
from tests.support.reports import data_file, report, write_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's folder with its report and its runs. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("comparison")
    data_file(folder / "runs")
    runs = [
        write_run(folder / "runs", arm, seed, new=(0.1, 0.9 - 0.1 * seed), predictions=False)
        for arm in ("baseline", "hidden")
        for seed in (0, 1)
    ]
    report(runs, folder)
    for name in ("report.html", "result.json"):
        shutil.move(folder / "report" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def exported(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "paper"
    export(comparison, out)
    return out


def test_each_figure_of_the_page_is_a_pdf_and_a_picture(comparison: Path, exported: Path) -> None:
    page = (comparison / "report.html").read_text()
    assert "mathdefault" not in page  # TeX of a label
    drawn = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    index = json.loads((exported / "index.json").read_text())
    assert [text.replace("&#39;", "'") for text in drawn] == list(index["figures"].values())
    assert list(index["figures"]) == ["pareto", "losses", "retention-hidden", "cosine-hidden"]
    assert {path.name for path in (exported / "figures").iterdir()} == {
        f"{name}.{kind}" for name in index["figures"] for kind in ("pdf", "png")
    }
    for name in index["figures"]:
        pdf = (exported / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-")
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
        with Image.open(exported / "figures" / f"{name}.png") as picture:
            picture.load()
            assert picture.width > 800
            colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
            assert colors is not None
            assert len(colors) > 20  # something is drawn


def test_tables_hold_the_numbers_of_the_report(comparison: Path, exported: Path) -> None:
    summary = json.loads((comparison / "result.json").read_text())["summary"]
    with (exported / "tables" / "arms.csv").open(newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["teacher", "baseline", "hidden"]
    for arm, numbers in summary.items():
        for key in ("old_after", "old_ratio", "new_after", "new_ratio", "retention_loss", "epsilon", "seconds"):
            assert float(rows[arm][key]) == numbers[key]  # in full precision
        low, high = numbers["new_after_interval"]
        assert (float(rows[arm]["new_after_low"]), float(rows[arm]["new_after_high"])) == (low, high)
    assert rows["teacher"]["retention_loss"] == ""
    with (exported / "tables" / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["arm"], run["seed"], run["feasible"], run["lambda"]) for run in runs] == [
        ("baseline", "0", "true", ""), ("baseline", "1", "true", ""),
        ("hidden", "0", "true", "2.5"), ("hidden", "1", "true", "2.5"),
    ]  # fmt: skip
    text = (exported / "tables" / "arms.tex").read_text()
    assert text.count(r"\\") == 4
    assert r"CRaFT hidden & 40.0 \% {[}40.0, 40.0] \% &" in text
    page = (comparison / "report.html").read_text()
    for cell in ("100.0 %", "85.0 %", "0.0400"):
        assert cell in page
        assert cell.replace("%", r"\%") in text


def test_a_single_run_and_a_report_of_runs_elsewhere(comparison: Path, tmp_path: Path) -> None:
    run = comparison / "runs" / "made-up-hidden-seed0"
    assert [folder.path for folder in runs_of(run)] == [run]
    (tmp_path / "result.json").write_text(json.dumps({"runs": [{"path": str(run)}]}))
    export(tmp_path, tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "index.json").read_text())["tables"]) == ["arms", "certificates", "runs"]


def test_several_skills_have_a_table(tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0, predictions=False)
    result = json.loads((run.path / "result.json").read_text())
    certificate = Certificate(0.9, 0.95, 0.89, 1.01, 40).as_dict()
    result["skills"] = {
        "drawing": {
            "metric": "choice", "before": 0.8, "after": 0.76, "ratio": 0.95, "ratio_low": 0.9, "retention_loss": 0.02,
            "epsilon": 0.05, "feasible": True, "certificate": certificate, "lambda": 3.0,
        },
        "unscored": {
            "retention_loss": 0.1, "epsilon": 0.05, "feasible": False, "lambda": 10.0, "heldout_anchors": 5,
        },
    }  # fmt: skip
    (run.path / "result.json").write_text(json.dumps(result))
    tables = {table.name: table for table in report_tables(read_runs([run]))}
    table = tables["skills"]
    name = "made-up-hidden-seed0"
    assert table.shown == [
        [name, "drawing", "80.0 %", "76.0 %", "95.0 %", "0.0200", "keep 90 %", "undecided", "3.00"],
        [name, "unscored", "–", "–", "–", "0.100", "ε 0.05", "no", "10.0"],
    ]
    assert table.records[0]["ratio_low"] == 0.9
    assert (table.records[0]["verdict"], table.records[1]["verdict"]) == ("undecided", None)
    table = tables["certificates"]
    assert table.shown == [
        [name, "drawing", "keep 90 %", "95.0 %", "89.0 %", "undecided", "0.0200", "0.0500", "3.00", "–", "–"],
        [name, "unscored", "ε 0.05", "–", "–", "not met", "0.100", "0.0500", "10.0", "–", "–"],
    ]
    assert table.records[0]["samples_to_decide"] == 58


def test_runs_without_scores_have_tables(tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0, old=None, new=None, loss=None)
    arms, runs = report_tables(read_runs([run]))
    assert arms.shown[1] == ["CRaFT hidden", *["–"] * 7]
    assert runs.shown[0][2:9] == ["–"] * 7


def test_a_comparison_that_was_moved_is_exported_from_where_it_is(
    comparison: Path, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(comparison, tmp_path / "copy")
    moved = tmp_path / "copy" / "runs" / "made-up-hidden-seed1"
    result = json.loads((moved / "result.json").read_text())
    (moved / "result.json").write_text(json.dumps({**result, "seconds": 77.0}))
    export(tmp_path / "copy", tmp_path / "out")
    assert "77.0" in (tmp_path / "out" / "tables" / "runs.csv").read_text()
    for path in (exported / "figures").iterdir():  # equal runs give equal files
        assert path.read_bytes() == (tmp_path / "out" / "figures" / path.name).read_bytes()


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(comparison: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    open_run = tmp_path / "open"
    shutil.copytree(comparison / "runs" / "made-up-hidden-seed0", open_run)
    (open_run / "result.json").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text('{"scores": []}')
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "result.json").write_text(json.dumps({"runs": [{"path": str(tmp_path / "lost-run")}]}))
    for source, out, said in [
        (comparison, "taken", "taken exists: choose a new folder for the files"),
        (open_run, "new", "is not a finished run"),
        (tmp_path / "nowhere", "new", "is neither a run"),
        (tmp_path / "other", "new", "is not what a report of runs writes"),
        (gone, "new", "lost-run of the report in"),
    ]:
        with pytest.raises(ConfigError, match=said):
            export(source, tmp_path / out)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "taken").iterdir())


def test_a_full_disk_leaves_no_part_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_figure(1, 1) as figure:
        figure.subplots().plot([0, 1])
        plot = inline_svg(figure, "line", "a line")
    assert list(plots_in({"a": None, "b": [("text", plot)], "c": {"d": 1}})) == [plot]
    table = Table("t", "a table", ["A"], [["x"]], [{"a": 1}])

    def full(path: Path, text: str, encoding: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(StorageError, match="No space left"):
            write_files([plot], [table], tmp_path / "out", "craft-ray export")
    assert not list(tmp_path.iterdir())
    write_files([plot], [table], tmp_path / "out", "craft-ray export")
    assert len(list((tmp_path / "out").rglob("*.*"))) == 5


def test_cells_are_escaped_for_each_kind_of_file() -> None:
    table = Table(
        "odd",
        "100 % of it",
        ["name", "ε_1"],
        [["[a] & b\\c\n~^{x}", "50 %\N{NO-BREAK SPACE}| λ ≥ −1 #1 $2"], ["*", "–"]],
        [{"name": 'say "a", b\nc', "x": None, "met": True}, {"name": "–", "x": 0.1 + 0.2, "met": False}],
    )
    assert table.latex().splitlines() == [
        r"% 100 \% of it",
        r"\begin{tabular}{lr}",
        r"\hline",
        r"name & $\varepsilon$\_1 \\",
        r"\hline",
        r"{[}a] \& b\textbackslash{}c \textasciitilde{}\textasciicircum{}\{x\} & "
        r"50 \% \textbar{} $\lambda$ $\geq$ $-$1 \#1 \$2 \\",
        r"{*} & -- \\",
        r"\hline",
        r"\end{tabular}",
    ]
    assert table.csv() == 'name,x,met\n"say ""a"", b\nc",,true\n–,0.30000000000000004,false\n'
    assert table.markdown().splitlines()[2] == r"| \[a\] & b\\c \~^\{x\} | 50 % \| λ ≥ −1 \#1 $2 |"
