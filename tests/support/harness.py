"""Task files of the lm-evaluation-harness on local documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CUPS = [
    {"question": f"Which of the {number} cups is full?", "choices": choices, "answer": number % len(choices)}
    for number, choices in enumerate(
        [["left", "right"], ["the red one", "both", "none"], ["a", "bc"], ["yes", "no", "perhaps"], ["x", "the other"]]
    )
]
SUMS = [{"question": f"{number} and {number + 1} are", "answer": str(2 * number + 1)} for number in range(5)]

CHOICE: dict[str, Any] = {
    "task": "cups",
    "tag": "kitchen",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
REPLY: dict[str, Any] = {
    "task": "sums",
    "tag": "kitchen",
    "output_type": "generate_until",
    "doc_to_text": "{{question}} ",  # the space belongs to the continuation
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A task file and its documents, which are also its solved examples."""
    name = settings["task"]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{folder.name}/{name}.jsonl"}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data | {"test_split": "test"} | settings))


def write_tasks(folder: Path) -> None:
    """The tasks `cups` and `sums` with the tag `kitchen`; their data paths start from the folder above."""
    folder.mkdir()
    write_task(folder, CHOICE, CUPS)
    write_task(folder, REPLY, SUMS)
