"""Task data that are read as training needs them: their order, their passes, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import DataFilesDict, DataFilesList

from craft_ray.config import HuggingFaceData, TaskConfig
from craft_ray.data import streaming
from craft_ray.data.sampler import Sampler
from craft_ray.data.source import open_source
from craft_ray.data.streaming import Stream, StreamedSource
from craft_ray.data.task import open_task, sampler_of
from craft_ray.errors import ConfigError, CraftError, DataError
from tests.support.configs import data_config

ROWS, FILES = 60, 3


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a pass the library gives Arrow's threads five seconds to end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files in the layout of the hub."""
    root = tmp_path_factory.mktemp("streamed") / "data"
    write(root)
    return root


def write(root: Path) -> None:
    root.mkdir()
    each = ROWS // FILES
    for number in range(FILES):
        numbers = range(number * each, (number + 1) * each)
        rows: dict[str, Any] = {
            "id": [f"r{n:02d}" for n in numbers],
            "prompt": [f"What is 00{n}?" for n in numbers],
            "response": pa.array([n / 4 for n in numbers], pa.float32()),
            "image": [{"bytes": b"not read", "path": None} for n in numbers],
        }
        pq.write_table(pa.table(rows), root / f"train-{number}.parquet", row_group_size=4)


def config(folder: Path, **settings: Any) -> HuggingFaceData:
    columns = {"id": "id", "response": "response", **settings.pop("columns", {})}
    own = {"path": str(folder), "streaming": True, "shuffle_buffer": 16, "columns": columns, **settings}
    found = data_config(**own)
    assert isinstance(found, HuggingFaceData)
    return found


def opened(folder: Path, seed: int = 0, **settings: Any) -> StreamedSource:
    source = open_task(config(folder, **settings))
    assert isinstance(source, StreamedSource)
    return source.in_order_of(seed, 0)


def ids(source: StreamedSource, start: int, stop: int) -> list[str]:
    return [source[place].id for place in range(start, stop)]


def test_every_pass_has_every_row_once_in_an_order_of_its_own(folder: Path) -> None:
    source = opened(folder)
    passes = [ids(source, number * ROWS, (number + 1) * ROWS) for number in range(3)]
    assert all(Counter(order) == Counter(passes[0]) for order in passes)
    assert all(len(set(order)) == ROWS for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    assert passes[0] != sorted(passes[0])


def test_the_order_is_that_of_the_seed_whenever_it_is_asked(folder: Path) -> None:
    order = ids(opened(folder), 0, 2 * ROWS)
    assert ids(opened(folder), 0, 2 * ROWS) == order
    assert ids(opened(folder, seed=1), 0, 2 * ROWS) != order
    assert ids(opened(folder), 37, 2 * ROWS) == order[37:], "a resumed run continues with the next row"


def test_a_place_can_be_asked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order among the first rows; behind them by a new start."""
    monkeypatch.setattr(streaming, "HEAD", 10)
    order = ids(opened(folder), 0, 3 * ROWS)
    source = opened(folder)
    for place in (150, 149, 3, 0, 9, 70, 71, 12, 5, 130, 11):
        assert source[place].id == order[place]


def test_batches_are_those_of_one_worker_for_any_number(folder: Path) -> None:
    task: TaskConfig = config(folder)

    def sampler(source: StreamedSource) -> Sampler:
        return sampler_of(task, source, 6, 0, 0)

    source = opened(folder)
    whole = [[source[row].id for row in sampler(source).local_batch(step, 0, 1)] for step in range(14)]
    parts = [opened(folder) for _ in range(3)]
    for step in range(14):
        shared = [part[row].id for rank, part in enumerate(parts) for row in sampler(part).local_batch(step, rank, 3)]
        assert shared == whole[step]


def test_values_are_those_of_the_stored_rows_and_other_columns_are_not_read(folder: Path) -> None:
    stored = {
        sample.id: sample
        for sample in open_source(data_config(path=str(folder), columns={"id": "id", "response": "response"}), "task")
    }
    source = opened(folder)
    for place in range(ROWS):
        sample = source[place]
        assert (sample.prompt, sample.response) == (stored[sample.id].prompt, stored[sample.id].response)
        assert sample.image is None


def test_how_many_samples_can_be_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(folder).checkable() == ROWS
    assert opened(folder, limit=7).checkable() == 7
    assert set(ids(opened(folder, limit=7), 0, 21)) == {f"r{n:02d}" for n in range(7)}
    monkeypatch.setattr(streaming, "HEAD", 25)
    assert opened(folder).checkable() == 25


def test_classes_are_named(tmp_path: Path) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": {"label": datasets.ClassLabel(names=["no", "yes"])}}
    )
    rows = {"prompt": ["a", "b"], "answer": [{"label": 1}, {"label": 0}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    source = opened(tmp_path / "data", columns={"id": None, "response": "answer.label"})
    assert {source[place].prompt: source[place].response for place in range(2)} == {"a": "yes", "b": "no"}


def test_the_fingerprint_is_of_the_files_and_of_how_they_are_read(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "copy")
    assert opened(tmp_path / "copy").fingerprint == opened(folder).fingerprint
    others = [opened(folder, limit=7), opened(folder, shuffle_buffer=3), opened(folder, columns={"id": None})]
    file = tmp_path / "copy" / "train-1.parquet"
    exchanged = file.read_bytes().replace(b"What is 0020?", b"What is 0099?")
    assert len(exchanged) == file.stat().st_size
    file.write_bytes(exchanged)
    others.append(opened(tmp_path / "copy"))
    file.unlink()
    found = {source.fingerprint for source in (opened(folder), *others, opened(tmp_path / "copy"))}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "test"}, r"task: .* does not read as dataset \(Bad split: test"),
        ({"split": "train[:50%]"}, r"task: .* does not read as dataset \(Bad split: train\[:50%\]"),
        ({"columns": {"response": "answer"}}, r"task.columns.response is 'answer', but .* has the columns id, prompt"),
        ({"path": "s3://bucket/data"}, r"task.streaming is of data sets on the hub, and s3://bucket/data is in an obj"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(settings: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        opened(folder, **settings)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_files_whose_values_the_library_converts(name: str, tmp_path: Path) -> None:
    text = "prompt,response\n007,1\n" if name.endswith("csv") else '{"prompt": "007", "response": "1"}\n'
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"converts their values .*revision: refs/convert/parquet"):
        opened(tmp_path, columns={"id": None})


@pytest.mark.parametrize("key", ["anchors.source", "evaluation.old.data", "task.mix[0]"])
def test_only_one_source_of_task_data_is_streamed(key: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(key)}.streaming is true, but only one source"):
        open_source(config(folder), key)


def test_data_without_rows() -> None:
    with pytest.raises(DataError, match=r"task: empty holds no sample"):
        Stream([], 8, None, "task: empty").row(0)


def test_a_file_that_breaks_off_names_the_place(tmp_path: Path) -> None:
    write(tmp_path / "data")
    source = opened(tmp_path / "data", shuffle_buffer=1)
    (tmp_path / "data" / "train-2.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CraftError, match=r"cannot be read beyond \d+ rows \(.*\): fix that, and resume") as caught:
        ids(source, 0, ROWS)
    assert "\n" not in caught.value.message


class Hub:
    """What the hub has under the name org/words, at a commit of each revision; the library streams it from a folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.commits = {None: "0a", "v1": "0a", "v2": "0b"}
        self.asked: list[str | None] = []
        builder_of, load = datasets.load_dataset_builder, datasets.load_dataset

        def builder(path: str, revision: str | None) -> Any:
            self.asked.append(revision)
            found = builder_of(str(folder))
            commit = self.commits[revision]
            files = [f"hf://datasets/{path}@{commit}/train-{number}.parquet" for number in range(FILES)]
            there = DataFilesList(files, [(path, commit)] * FILES)
            found.config.data_files = DataFilesDict({"train": there})
            return found

        def rows(path: str, split: str, revision: str | None, streaming: bool) -> Any:
            self.asked.append(revision)
            return load(str(folder), split=split, streaming=streaming)

        patch.setattr(datasets, "load_dataset_builder", builder)
        patch.setattr(datasets, "load_dataset", rows)


def test_a_data_set_of_the_hub_is_known_by_its_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, here = Hub(folder, monkeypatch), Path("org/words")
    first, tagged, later = (opened(here, revision=name) for name in (None, "v1", "v2"))
    assert hub.asked == [None, None, "v1", "v1", "v2", "v2"]
    assert first.name == "org/words"
    assert set(ids(first, 0, ROWS)) == {f"r{n:02d}" for n in range(ROWS)}
    assert first.fingerprint == tagged.fingerprint, "a name of the same commit"
    assert first.fingerprint != later.fingerprint
    hub.commits[None] = "0c"
    assert opened(here).fingerprint not in (first.fingerprint, later.fingerprint), "the main branch has moved"


@pytest.mark.parametrize("listed", [False, True])
def test_images_of_a_stream(listed: bool, tmp_path: Path) -> None:
    """Whether a sample has a list of them is in the column's type."""
    (tmp_path / "data").mkdir()
    cells = [[{"bytes": b"a", "path": None}] * (n % 3) for n in range(12)] if listed else [{"bytes": b"a"}] * 12
    rows = {"id": [f"r{n}" for n in range(12)], "prompt": ["?"] * 12, "response": ["!"] * 12, "image": cells}
    pq.write_table(pa.table(rows), tmp_path / "data" / "train-0.parquet")
    source = open_task(config(tmp_path / "data", columns={"image": "image"}))
    assert source.has_image_lists is listed
    for row in (0, 1, 5):
        expected = (b"a",) * (row % 3) if listed else (b"a",)
        assert source[row].pictures == expected
        assert source[row].images == (expected if listed else None)
