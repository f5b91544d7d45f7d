"""The two example models and their data, built once for all tests, and a Hub that nothing can reach."""

from __future__ import annotations

import os
from pathlib import Path

# Read when transformers and datasets are imported, so they stand before both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny PaliGemma and its processor. Shared: do not write into it."""
    from craft_ray.examples import digits

    folder = tmp_path_factory.mktemp("digits") / "model"
    digits.build_model(folder)
    return folder


@pytest.fixture(scope="session")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with {old,new}_{train,val,test}.parquet and anchors.parquet. Shared: do not write into it."""
    from craft_ray.examples import digits

    folder = tmp_path_factory.mktemp("digits") / "data"
    digits.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama and its byte tokenizer. Shared: do not write into it."""
    from craft_ray.examples import text

    folder = tmp_path_factory.mktemp("text") / "model"
    text.build_model(folder)
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with {old,new}_{train,val,test}.parquet and anchors.parquet. Shared: do not write into it."""
    from craft_ray.examples import text

    folder = tmp_path_factory.mktemp("text") / "data"
    text.write_data(folder)
    return folder
