"""A folder that cannot be written to is one line with exit code 2, for every stage that writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from craft_pipelines.outputs import check_kept

from craft_ray.errors import ConfigError, StorageError
from craft_ray.storage.lock import exclusive_lock

NOBODY = 65534


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_kept(path, "output_dir")
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("output_dir ")
    return caught.value.message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "runs" / "x"):
        assert f"{tmp_path / 'file'} is a file" in refusal(path)


def test_a_name_that_is_too_long_for_the_disk(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    assert "choose a shorter name" in refusal(tmp_path / ("n" * longest) / "run")
    assert "choose a shorter name" in refusal(tmp_path / ("é" * (longest // 2)))
    check_kept(tmp_path / ("n" * 200), "output_dir")


@contextmanager
def ordinary_user(folder: Path) -> Iterator[None]:
    """The superuser may write everywhere, so it becomes an ordinary user, to whom `folder` is given."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_read_only_folder() -> None:
    with tempfile.TemporaryDirectory() as name:  # whose parents others may enter, other than those of tmp_path
        folder = Path(name)
        with ordinary_user(folder):
            (folder / "fixed").mkdir(mode=0o500)
            assert f"{folder / 'fixed'} is read-only" in refusal(folder / "fixed" / "runs")
            check_kept(folder / "runs", "output_dir")


def test_what_the_check_does_not_foresee_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = exclusive_lock(tmp_path / "file" / ".lock", ConfigError("held"))
    with pytest.raises(StorageError, match="cannot be written to"), lock:
        pass


def test_nothing_is_written_by_the_check(tmp_path: Path) -> None:
    check_kept(tmp_path / "a" / "b", "output_dir")
    assert not list(tmp_path.iterdir())
