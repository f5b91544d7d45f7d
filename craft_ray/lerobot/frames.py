"""Which frames of a LeRobotDataset are anchors, and with which words: a random choice, and a file of prompts."""

from __future__ import annotations

import json
import random

import numpy as np
from numpy.typing import NDArray

from craft_ray.config import LeRobotData
from craft_ray.data.cells import refuse_halves
from craft_ray.errors import ConfigError
from craft_ray.storage.paths import storage_path


def sampled(rows: NDArray[np.int64], config: LeRobotData) -> NDArray[np.int64]:
    """The frames that `sample` keeps, in their order; all of them if it is not set or there are no more."""
    if config.sample is None or config.sample >= len(rows):
        return rows
    chosen = random.Random(config.sample_seed).sample(range(len(rows)), config.sample)
    return rows[sorted(chosen)]


def read_prompts(path: str) -> list[str]:
    """The prompts in a JSON file: a list, or a list under the key `prompts`.

    Raises:
        ConfigError: there is no such file, or it does not hold a list of texts.
        DataError: a text holds half a character.
    """
    try:
        content = json.loads(storage_path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"prompts {path}: there is no such file: specify a JSON file with a list of texts") from None
    except OSError as error:  # a folder, no permission
        raise ConfigError(
            f"prompts {path} does not open ({error.strerror}): specify a JSON file with a list of texts"
        ) from None
    except ValueError:
        content = None
    prompts = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
        raise ConfigError(
            f'prompts {path}: it is no JSON list of texts: write {{"prompts": ["Pick up the cube", ...]}}'
        )
    refuse_halves(prompts, f"prompts {path}: a prompt is")
    return prompts
