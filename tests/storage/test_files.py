"""Files on a disk or mount that several nodes write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from craft_ray.storage import files
from craft_ray.storage.files import clear_leftovers, is_temporary, new_file, new_folder, replace_link


def test_two_concurrent_writers_do_not_collide(tmp_path: Path) -> None:
    """On two nodes they may have the same process number; here they are even the same process."""
    with new_file(tmp_path / "file") as first, new_file(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first", "the last writer to finish wins"

    with new_folder(tmp_path / "folder") as first, new_folder(tmp_path / "folder") as second:
        (first / "a").write_text("first")
        (second / "b").write_text("second")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.fixture
def leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The leftovers of processes killed at the last moment, for each way to write, beside complete files."""
    for name in ("a", "a.b", "step_000001"):
        with new_folder(tmp_path / name) as folder:
            (folder / "content").write_text("complete")
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: None)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        killed.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        for name in ("a", "a.b"):
            with new_file(tmp_path / name) as file:
                file.write_text("half")
            with new_folder(tmp_path / name) as folder:
                (folder / "content").write_text("half")
        replace_link(tmp_path / "last", "step_000001")
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp").touch()
    (tmp_path / "mine.tmp").touch()
    return tmp_path


def test_only_leftovers_of_one_name_are_cleared(leftovers: Path) -> None:
    before = set(leftovers.iterdir())
    clear_leftovers(leftovers, of="a")
    gone = before - set(leftovers.iterdir())
    assert len(gone) == 2
    assert all(is_temporary(path, "a") and not path.name.startswith(".a.b.") for path in gone)


def test_all_leftovers_are_cleared_and_complete_files_stay(leftovers: Path) -> None:
    assert sum(is_temporary(path) for path in leftovers.iterdir()) == 5
    clear_leftovers(leftovers)
    assert {path.name for path in leftovers.iterdir()} == {"a", "a.b", "step_000001", ".lock", ".tmp", "mine.tmp"}
    assert (leftovers / "step_000001" / "content").read_text() == "complete", "a half-made link is not followed"
    clear_leftovers(leftovers / "nowhere")
