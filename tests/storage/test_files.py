"""Files of a disk or mount that several nodes write to."""

from __future__ import annotations

from pathlib import Path

from craft_ray.storage.files import new_file, new_folder


def test_two_that_write_at_once_do_not_meet(tmp_path: Path) -> None:
    """On two nodes they may have the same process number; here they even are one process."""
    with new_file(tmp_path / "file") as first, new_file(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first", "who ends last has the last word"

    with new_folder(tmp_path / "folder") as first, new_folder(tmp_path / "folder") as second:
        (first / "a").write_text("first")
        (second / "b").write_text("second")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
