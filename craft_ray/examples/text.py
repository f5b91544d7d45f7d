"""A language model that reads English documentation and then learns Python source.

Everything comes from the interpreter itself, so the example needs no network: the old skill is
the prose of `pydoc_data.topics`, the new skill the source of a fixed list of standard-library
modules. The same interpreter always gives the same model folder and the same data files.
"""

import ast
import itertools
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The width and its initial scale decide how far a minute on one core gets: with the usual 0.02 it learns more slowly.
WIDTH: Final = 96

CHUNK_BYTES: Final = 128
ANCHORS: Final = 512

# One list of sections is split ten at a time: eight for training, one each for validation and test.
SECTION_BYTES: Final = 2048
SPLIT_CYCLE: Final = (*["train"] * 4, "val", *["train"] * 4, "test")

# Below this share of letters and spaces a paragraph is a table, a grammar rule or code.
PROSE_SHARE: Final = 0.85
MINIMUM_PARAGRAPH: Final = 60
TYPOGRAPHY: Final = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})

# Ordinary modules that every supported Python has, none of them mostly tables.
SOURCE_MODULES: Final = (
    "argparse", "ast", "bdb", "calendar", "configparser", "contextlib", "csv", "dataclasses", "difflib",
    "dis", "doctest", "enum", "fractions", "ftplib", "functools", "inspect", "ipaddress", "mailbox",
    "pickle", "random", "shutil", "smtplib", "statistics", "subprocess", "tarfile",
    "textwrap", "threading", "traceback", "typing", "uuid", "weakref",
)  # fmt: skip

Item = TypeVar("Item")
SCHEMA: Final = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("response", pa.string())])


def build_model(folder: Path, seed: int = 0) -> None:
    """Save an untrained Llama of 360,000 parameters and its tokenizer in `folder`.

    `AutoModelForCausalLM` and `AutoTokenizer` load the folder offline. The weights depend only on
    `seed`, and the global random state is left as it was.
    """
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=WIDTH**-0.5,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with `<bos>` before every text so that its first byte is predicted too."""
    specials = ("<bos>", "<eos>", "<pad>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    bos, eos, pad = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=512
    )


def write_data(folder: Path) -> dict[str, Path]:
    """Write the Parquet files of the example into `folder` and return them by name.

    `old_train`, `old_val`, `old_test` and their `new_` counterparts hold an empty `prompt` and the
    chunk as `response`, so the loss covers every token. `anchors` holds chunks of `old_train` as
    `prompt` and no response: inputs of the old skill, without labels. No section, and no paragraph
    of prose, is in two splits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    skills = {"old": prose_documents(), "new": source_documents()}
    chunks = {
        f"{skill}_{split}": list(chunks_of(documents, split))
        for skill, documents in skills.items()
        for split in ("train", "val", "test")
    }
    files = {name: folder / f"{name}.parquet" for name in [*chunks, "anchors"]}
    for name, rows in chunks.items():
        write_rows(files[name], [{"id": key, "prompt": "", "response": text} for key, text in rows])
    anchors = spread(chunks["old_train"], ANCHORS)
    write_rows(files["anchors"], [{"id": key, "prompt": text, "response": None} for key, text in anchors])
    return files


def prose_documents() -> dict[str, str]:
    """English prose by topic, each paragraph on one line and only in the shortest topic that has it.

    Long topics repeat short ones word for word; without this, training prose would be in the test.
    """
    seen: set[str] = set()
    documents = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        paragraphs = [" ".join(block.split()) for block in topics[topic].translate(TYPOGRAPHY).split("\n\n")]
        fresh = [text for text in dict.fromkeys(paragraphs) if is_prose(text) and text not in seen]
        seen.update(fresh)
        documents[topic] = "\n".join(fresh)
    return documents


def is_prose(text: str) -> bool:
    letters = sum(symbol.isalpha() or symbol == " " for symbol in text)
    return text.isascii() and len(text) >= MINIMUM_PARAGRAPH and letters >= PROSE_SHARE * len(text)


def source_documents() -> dict[str, str]:
    """Python source by module, without comments and docstrings: those are English prose again."""
    library = Path(sysconfig.get_path("stdlib"))
    return {name: bare_source((library / f"{name}.py").read_text("utf-8")) for name in SOURCE_MODULES}


def bare_source(source: str) -> str:
    """Only the code of `source`, in the layout of `ast.unparse` and in ASCII."""
    tree = ast.parse(source)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode("ascii", "ignore").decode("ascii")


def sections_of(documents: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Runs of whole lines of about `SECTION_BYTES`, named `document/number`."""
    for name, text in documents.items():
        lines = text.splitlines(keepends=True)
        starts = list(itertools.accumulate(map(len, lines), initial=0))
        by_section = itertools.groupby(zip(starts, lines, strict=False), lambda item: item[0] // SECTION_BYTES)
        for number, group in by_section:
            yield f"{name}/{number}", "".join(line for _, line in group)


def chunks_of(documents: dict[str, str], split: str) -> Iterator[tuple[str, str]]:
    """The full chunks of every section that belongs to `split`, named `document/section/offset`."""
    for (name, text), owner in zip(sections_of(documents), itertools.cycle(SPLIT_CYCLE), strict=False):
        if owner == split:
            for offset in range(0, len(text) - CHUNK_BYTES + 1, CHUNK_BYTES):
                yield f"{name}/{offset}", text[offset : offset + CHUNK_BYTES]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at equal distances, or all of them if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def write_rows(path: Path, rows: Sequence[Mapping[str, str | None]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path)
