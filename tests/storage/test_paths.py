"""Paths in an object store: their names, their content, and that no reader sees half of anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from craft_pipelines.evaluate import model_folder
from craft_pipelines.merge import checkpoint_of

from craft_ray.config import parse_config
from craft_ray.errors import ConfigError, StorageError
from craft_ray.storage.files import append_text, checksum, new_file, new_folder, write_atomically
from craft_ray.storage.node_cache import local_copy
from craft_ray.storage.paths import ObjectPath, copy_tree, remove_tree, storage_path

LARGE = 12 << 20
"""A size that is sent in several parts."""


@pytest.fixture
def bucket(object_store: ObjectPath, tmp_path: Path) -> ObjectPath:
    """A folder of this test only."""
    return object_store / tmp_path.name


def test_names_behave_like_those_of_a_path() -> None:
    ours, theirs = ObjectPath("s3://bucket/a/b.tar/step_01.json"), Path("/bucket/a/b.tar/step_01.json")
    assert str(ours) == f"s3:/{theirs}"
    assert (ours.name, ours.suffix) == (theirs.name, theirs.suffix)
    assert str(ours.parent / "x") == "s3://bucket/a/b.tar/x"
    assert str(ours.with_name("y")) == "s3://bucket/a/b.tar/y"
    assert str(ours.with_suffix(".z")) == "s3://bucket/a/b.tar/step_01.z"
    assert [str(parent) for parent in ours.parents] == ["s3://bucket/a/b.tar", "s3://bucket/a", "s3://bucket"]
    assert storage_path("s3://bucket/a/b.tar/step_01.json") == ours
    assert len({ours, ObjectPath(str(ours)), ours.parent}) == 2
    assert storage_path("a/b") == Path("a/b")


def test_a_path_that_the_system_does_not_open_is_refused_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path / ("n" * 300), tmp_path / ("n" * 300) / "below", tmp_path / "circle"):
        with pytest.raises(ConfigError, match=r"^task\.path: .* does not open \("):
            local_copy(str(path), "task.path")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "*.jsonl", "a/hub-name", "a\0b"):
        assert local_copy(str(path), "task.path") == str(path)


def test_no_system_function_mistakes_it_for_a_file() -> None:
    with pytest.raises(TypeError, match="in an object store"):
        open(ObjectPath("s3://bucket/a"))  # noqa: SIM115


def test_content_is_read_back_and_listed(bucket: ObjectPath) -> None:
    file = bucket / "folder" / "file.txt"
    assert not file.exists()
    assert not bucket.exists()
    assert list(bucket.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        file.read_text()
    with pytest.raises(FileNotFoundError):
        file.stat()
    write_atomically(file, "grün")
    assert file.read_text() == "grün"
    assert file.stat().st_size == len("grün".encode())
    assert (file.is_file(), file.is_dir(), file.parent.is_dir()) == (True, False, True)
    write_atomically(bucket / "other", "x")
    assert list(bucket.iterdir()) == [bucket / "folder", bucket / "other"]
    assert list(bucket.glob("f*")) == [bucket / "folder"]
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.unlink()


def test_a_file_has_the_same_checksum_in_both(bucket: ObjectPath, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(LARGE))
    (bucket / "copy").upload(local)
    assert checksum(bucket / "copy") == checksum(local)


def test_a_tree_goes_there_and_back(bucket: ObjectPath, tmp_path: Path) -> None:
    tree = {"a": "1", "b/c": "2", "b/d/e": "", "b/.hidden": "3"}
    for name, text in tree.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    copy_tree(tmp_path / "tree", bucket / "tree")
    copy_tree(bucket / "tree", bucket / "second")
    copy_tree(bucket / "second", tmp_path / "back")
    found = {
        str(f.relative_to(tmp_path / "back")): f.read_text() for f in (tmp_path / "back").rglob("*") if f.is_file()
    }
    assert found == tree
    remove_tree(bucket / "tree")
    remove_tree(bucket / "never there")
    assert [entry.name for entry in bucket.iterdir()] == ["second"]


@pytest.mark.parametrize("after", [b"{}", b'{"longer": "than before"}', b"four", None])
def test_a_read_returns_the_content_of_one_moment(
    bucket: ObjectPath, after: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces or deletes the object between the reads of its size and its content."""
    path, opened, opening = bucket / "changing", [], ObjectPath.open_input
    path.write_bytes(b"size")

    def interrupted(self: ObjectPath) -> pa.NativeFile:
        file = opening(self)
        if not opened:
            path.unlink() if after is None else path.write_bytes(after)
        opened.append(file)
        return file

    monkeypatch.setattr(ObjectPath, "open_input", interrupted)
    if after is None:
        with pytest.raises(FileNotFoundError):
            path.read_bytes()
    else:
        assert path.read_bytes() == after


def test_an_object_that_keeps_changing_is_not_read_forever(bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opening = bucket / "changing", ObjectPath.open_input
    path.write_bytes(b"")

    def interrupted(self: ObjectPath) -> pa.NativeFile:
        file = opening(self)
        path.write_bytes(bytes(file.size() + 1))
        return file

    monkeypatch.setattr(ObjectPath, "open_input", interrupted)
    with pytest.raises(StorageError, match="changed 4 times while it was read"):
        path.read_bytes()


def test_an_error_while_writing_leaves_the_old_object(bucket: ObjectPath) -> None:
    write_atomically(bucket / "file", "old")
    with pytest.raises(ZeroDivisionError), new_file(bucket / "file") as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise ZeroDivisionError
    assert (bucket / "file").read_text() == "old"
    with pytest.raises(ZeroDivisionError), new_folder(bucket / "folder", last="mark") as temporary:  # noqa: PT012
        (temporary / "mark").write_text("")
        raise ZeroDivisionError
    assert not (bucket / "folder").exists()


def test_the_file_that_completes_a_folder_comes_last(bucket: ObjectPath) -> None:
    seen: list[bool] = []
    original = ObjectPath.upload

    def upload(self: ObjectPath, source: Path) -> None:
        seen.append((bucket / "folder" / "z").exists())
        original(self, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectPath, "upload", upload)
        with new_folder(bucket / "folder", last="a") as temporary:
            (temporary / "a").write_text("1")
            (temporary / "z").write_text("2")
    assert seen == [True]
    assert [entry.name for entry in (bucket / "folder").iterdir()] == ["a", "z"]


def test_an_upload_that_is_killed_leaves_no_object(bucket: ObjectPath) -> None:
    program = (
        "import sys, time\n"
        "import pyarrow.fs\n"
        "store, key = pyarrow.fs.FileSystem.from_uri(sys.argv[1])\n"
        "file = store.open_output_stream(key)\n"
        f"file.write(b'x' * {LARGE})\n"
        "print('half', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(bucket / "half")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert not (bucket / "half").exists()


def test_a_file_that_grows_is_not_written_to_a_store() -> None:
    with pytest.raises(AssertionError, match="cannot grow"):
        append_text(ObjectPath("s3://bucket/log"), "line")


def test_a_store_that_cannot_be_used_is_one_line(bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StorageError, match=r"s3://no-such-bucket/x could not be written .*NO_SUCH_BUCKET.*: check"
    ) as found:
        write_atomically(ObjectPath("s3://no-such-bucket/x"), "text")
    assert "\n" not in found.value.message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in found.value.message
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"could not be read .*NETWORK_CONNECTION.*AWS_ENDPOINT_URL .it is http://127"
    ):
        (bucket / "file").read_text()


def test_an_input_is_copied_once_and_again_when_it_changes(bucket: ObjectPath) -> None:
    write_atomically(bucket / "in" / "a.jsonl", "1")
    write_atomically(bucket / "in" / "b.txt", "2")
    file = local_copy(str(bucket / "in" / "a.jsonl"), "task.path")
    assert Path(file).name == "a.jsonl"
    assert Path(file).read_text() == "1"
    assert local_copy(str(bucket / "in" / "a.jsonl"), "task.path") == file
    folder = Path(local_copy(str(bucket / "in"), "task.path"))
    assert sorted(entry.name for entry in folder.iterdir()) == ["a.jsonl", "b.txt"]
    pattern = Path(local_copy(str(bucket / "in" / "*.txt"), "task.path"))
    assert [entry.name for entry in pattern.parent.glob(pattern.name)] == ["b.txt"]
    for name in ("c[1]", "c1"):
        write_atomically(bucket / name, name)
    assert Path(local_copy(str(bucket / "c[1]"), "task.path")).read_text() == "c[1]"
    time.sleep(1.1)  # the store's times are whole seconds
    write_atomically(bucket / "in" / "a.jsonl", "3")
    assert Path(local_copy(str(bucket / "in" / "a.jsonl"), "task.path")).read_text() == "3"
    with pytest.raises(ConfigError, match=r"task.path: there is nothing at s3://.*/none"):
        local_copy(str(bucket / "none"), "task.path")


def test_the_last_checkpoint_is_found_by_its_name_on_a_disk(bucket: ObjectPath) -> None:
    write_atomically(bucket / "checkpoints" / "step_000002" / "model" / "config.json", "{}")
    write_atomically(bucket / "checkpoints" / "last", "step_000002")
    for named in (("last", "model"), ("last",)):
        found = Path(local_copy(str(bucket / "checkpoints" / "/".join(named)), "model.path"))
        assert (found / "/".join(("model",)[len(named) - 1 :]) / "config.json").read_text() == "{}"
    checkpoint = bucket / "checkpoints" / "step_000002"
    assert model_folder(bucket / "checkpoints" / "last") == checkpoint / "model"
    assert model_folder(bucket / "checkpoints" / "last" / "model") == checkpoint / "model"
    assert checkpoint_of(bucket / "checkpoints" / "last")[1] == checkpoint


TREE = {"model": {"path": "m"}, "task": {"path": "t.jsonl"}, "train": {"steps": 1}}


def test_object_paths_in_a_config_stay_as_they_are(tmp_path: Path) -> None:
    paths = {"output_dir": "s3://b/runs/", "craft": {"anchor_cache_dir": "s3://b/anchors"}}
    config = parse_config(TREE | paths, "test", tmp_path)
    assert config.output_dir == "s3://b/runs"
    assert config.craft.anchor_cache_dir == "s3://b/anchors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://b/runs", "output_dir: 'gs://b/runs' has an unknown scheme: specify a path .* or s3://BUCKET/KEY"),
        ("s3://", "has to be s3://BUCKET/KEY only"),
        (
            "s3://key:geheim@b/runs",
            "'b/runs' has to be s3://BUCKET/KEY only: credentials, .* come from the environment",
        ),
        ("s3://b/runs?endpoint_override=x", "has to be s3://BUCKET/KEY only"),
    ],
)
def test_a_path_that_is_not_valid_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        parse_config(TREE | {"output_dir": text}, "test")
    assert "geheim" not in found.value.message


def test_a_folder_without_folders_is_copied(bucket: ObjectPath, tmp_path: Path) -> None:
    (bucket / "flat" / "one.txt").write_bytes(b"1")
    copy_tree(bucket / "flat", tmp_path / "new" / "flat")
    assert (tmp_path / "new" / "flat" / "one.txt").read_bytes() == b"1"
