"""The two tokenizers of pi0_fast: text (PaliGemma's) and actions (FAST, arXiv 2501.09747).

FAST takes the cosine transform of a chunk of actions, rounds it, and joins frequent runs of numbers into tokens. Action
token k is the text token `vocabulary - 1 - reserved - k`: actions use the end of the text vocabulary.

LeRobot loads both by name and runs the Python code stored with an action tokenizer. Here that code runs only if it is
trusted; otherwise LeRobot's own copy of FAST gets the folder's parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from huggingface_hub import snapshot_download
from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.processor import tokenizer_processor
from numpy.typing import NDArray
from scipy.fft import idct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from craft_ray.errors import ConfigError, first_line

TEXT_TOKENIZER: Final = "text_tokenizer"
ACTION_TOKENIZER: Final = "action_tokenizer"
RESERVED: Final = 128
"""`fast_skip_tokens`: the last text tokens, which PaliGemma keeps for segmentation."""

_FAST_CLASS: Final = "UniversalActionProcessor"
_FAST_CODE: Final = f'''"""FAST as LeRobot ships it, under the name that `AutoProcessor` looks for in this folder."""

from lerobot.policies.molmoact2.molmoact2_hf_model import action_tokenizer


class {_FAST_CLASS}(action_tokenizer.{_FAST_CLASS}):
    pass
'''
_PREFIX: Final = "Action"
"""LeRobot's suffix is `Action: `, the action tokens and `|`, and it needs this word to be one token."""


# -- loading


def fast_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The action tokenizer of a folder or of the hub.

    Args:
        trust_remote_code: run the code stored with it, as LeRobot does. Otherwise none runs.

    Raises:
        ConfigError: no FAST tokenizer loads from there.
    """
    if trust_remote_code:
        try:
            return AutoProcessor.from_pretrained(name, trust_remote_code=True)
        except Exception as error:  # remote code may raise any exception
            raise ConfigError(
                f"action tokenizer {name}: it does not load ({first_line(error)}): specify a folder or a hub model "
                f"of one"
            ) from None
    folder = _folder(name)
    parameters = _fast_parameters(folder, name)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"action tokenizer {name} has no tokenizer.json: specify a folder or a hub model with FAST")
    try:
        inner = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the Rust part raises bare Exceptions
        raise ConfigError(
            f"action tokenizer {name}: its tokenizer.json does not load ({first_line(error)}): save or download it "
            f"again"
        ) from None
    return UniversalActionProcessor(inner, **parameters)


def _folder(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute():
        raise ConfigError(f"action tokenizer {name}: there is no such folder: specify one, or a hub model")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except Exception as error:  # the hub's client may raise any exception
        raise ConfigError(
            f"action tokenizer {name}: there is no such folder, and no such model on the hub or in its local cache "
            f"({first_line(error)})"
        ) from None


def _fast_parameters(folder: Path, name: str) -> dict[str, Any]:
    """The parameters that the class needs besides the inner tokenizer, from `processor_config.json`."""
    try:
        stored = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"action tokenizer {name}: its processor_config.json cannot be read ({first_line(error)}), but without "
            f"model.trust_remote_code FAST gets its parameters from that file: save or download it again"
        ) from None
    kinds: dict[str, type | tuple[type, ...]] = {"scale": (int, float), "vocab_size": int, "min_token": int}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(stored, dict) or not isinstance(stored.get(key), kind)
    ]
    if wrong:
        raise ConfigError(
            f"action tokenizer {name}: its processor_config.json has no number {', '.join(wrong)}, which FAST needs: "
            f"use another folder, or set model.trust_remote_code to run its own code"
        )
    if stored.get("processor_class") != _FAST_CLASS:
        raise ConfigError(
            f"action tokenizer {name} is a {stored.get('processor_class')}, but only {_FAST_CLASS} (FAST) is "
            f"supported: use a FAST tokenizer, or set model.trust_remote_code to run its own code"
        )
    return {key: stored.get(key) for key in (*kinds, "time_horizon", "action_dim")}


def text_tokenizer(name: str, **options: Any) -> Any:
    """The text tokenizer of a folder or of the hub. No code stored with it runs.

    Raises:
        ConfigError: no tokenizer loads from there.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **{**options, "trust_remote_code": False})
    except Exception as error:  # a damaged tokenizer may raise anything, even a bare Exception
        raise ConfigError(
            f"text tokenizer {name}: it does not load ({first_line(error)}): specify a folder or a hub model with one"
        ) from None


@contextmanager
def without_remote_code(action_tokenizer: Any | None, trusted: bool = False) -> Iterator[None]:
    """While open, LeRobot's policies and processors use the given action tokenizer, and text tokenizers without code.

    LeRobot loads both by name and trusts their code, so the two classes that load them are replaced in its modules.
    This affects the whole process, not just one thread.

    Args:
        action_tokenizer: from `fast_tokenizer`; None for a policy that has none.
        trusted: change nothing.
    """
    if trusted:
        yield
        return

    class Processor:
        @staticmethod
        def from_pretrained(name: str, **_: Any) -> Any:
            if action_tokenizer is None:
                raise ConfigError(f"{name} would run its own code: set model.trust_remote_code if you trust it")
            return action_tokenizer

    class Text:
        from_pretrained = staticmethod(text_tokenizer)

    modules: tuple[Any, ...] = (modeling_pi0_fast, tokenizer_processor)
    before = [(module, module.AutoProcessor, module.AutoTokenizer) for module in modules]
    for module in modules:
        module.AutoProcessor, module.AutoTokenizer = Processor, Text
    try:
        yield
    finally:
        for module, processor, text in before:
            module.AutoProcessor, module.AutoTokenizer = processor, text


# -- paths: LeRobot needs absolute ones, and a folder may move


def local_names(settings: Any, folder: Path) -> None:
    """Make a policy's configuration name the tokenizers inside its own folder, wherever that is now."""
    for field, inside in _NAMES.items():
        if hasattr(settings, field) and _is_inside(getattr(settings, field), inside, folder):
            setattr(settings, field, str(folder.absolute() / inside))


def complete_processor_config(folder: Path, final: Path | None = None) -> None:
    """Make the processors of a saved policy load in LeRobot itself, offline.

    LeRobot's action step does not save which text tokenizer it belongs to (nor its own name, if it was given an
    object), and uses Google's from the hub instead. The names come from the policy's `config.json`; tokenizers inside
    the folder are named by the folder's path. A folder without an action step is left as it is.

    Args:
        final: the folder's final path, if it is first written elsewhere.
    """
    path = (final or folder).absolute()
    config = _read(folder / "config.json")
    changed = False
    for field, inside in _NAMES.items():
        if field in config and _is_inside(config[field], inside, folder):
            config[field] = str(path / inside)
            changed = True
    if changed:
        _write(folder / "config.json", config)
    pipeline_file = folder / "policy_preprocessor.json"
    pipeline = _read(pipeline_file)
    for step in pipeline["steps"]:
        if step.get("registry_name") == "action_tokenizer_processor":
            step["config"] |= {
                "action_tokenizer_name": config["action_tokenizer_name"],
                "paligemma_tokenizer_name": config["text_tokenizer_name"],
                "fast_skip_tokens": config["fast_skip_tokens"],
            }
        elif step.get("registry_name") == "tokenizer_processor" and "text_tokenizer_name" in config:
            step["config"]["tokenizer_name"] = config["text_tokenizer_name"]
    _write(pipeline_file, pipeline)


_NAMES: Final = {"text_tokenizer_name": TEXT_TOKENIZER, "action_tokenizer_name": ACTION_TOKENIZER}


def _is_inside(name: str, inside: str, folder: Path) -> bool:
    """Whether a stored name means the tokenizer in `folder`, perhaps by an earlier path of the folder."""
    return Path(name).name == inside and (folder / inside).is_dir()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- writing


def write_text_tokenizer(folder: Path, corpus: Iterable[str], vocabulary: int, action_tokens: int) -> None:
    """Write a byte-level tokenizer laid out as PaliGemma's: words first, then action tokens, then 128 reserved ones.

    Args:
        corpus: prompts as the policy sees them.
        vocabulary: number of tokens in all. Those that the corpus does not fill stay unused.

    Raises:
        ConfigError: the vocabulary has no room for words.
    """
    room = vocabulary - action_tokens - RESERVED
    specials = ["<pad>", "<eos>", "<bos>"]
    chain = [_PREFIX[:length] for length in range(2, len(_PREFIX) + 1)]
    least = len(specials) + 256 + len(chain)
    if room < least:
        raise ConfigError(
            f"a vocabulary of {vocabulary} has {action_tokens} action tokens, {RESERVED} reserved ones and {room} left "
            f"for words: raise it to {action_tokens + RESERVED + least} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=room - len(chain),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    content = json.loads(tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    tokens += [token for token in chain if token not in tokens]
    unused = [f"<unused{number}>" for number in range(room - len(tokens))]
    actions = [f"<action{number}>" for number in reversed(range(action_tokens))]
    reserved = [f"<reserved{number}>" for number in range(RESERVED)]
    # Merged before anything learnt from the corpus, so the word is one token whatever the corpus is.
    first = [[longer[:-1], longer[-1]] for longer in chain]
    content["model"]["vocab"] = {token: index for index, token in enumerate([*tokens, *unused, *actions, *reserved])}
    content["model"]["merges"] = first + [pair for pair in content["model"]["merges"] if pair not in first]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def write_action_tokenizer(
    folder: Path, chunks: NDArray[np.float32], vocabulary: int = 1024, scale: float = 10.0
) -> UniversalActionProcessor:
    """Fit FAST on chunks of actions and save it for LeRobot.

    Args:
        chunks: [N, T, D], normalised to about [-1, 1].
        scale: rounding steps per unit of a coefficient.

    Raises:
        ConfigError: the vocabulary is too small for the scale.
    """
    _, horizon, dimensions = chunks.shape
    # A number that occurs in no chunk would be dropped silently, so FAST is fitted on every one that a chunk in [-2, 2]
    # can have: the transform preserves norms, and such a chunk has at most norm 2 sqrt(T) in each dimension.
    bound = math.ceil(scale * max(2 * math.sqrt(horizon), float(np.linalg.norm(chunks, axis=1).max())))
    every = idct(np.arange(-bound, bound + 1, dtype=np.float64)[:, None] / scale, axis=0, norm="ortho")
    # LeRobot's trainer starts from the numbers as characters and adds the bytes that those have in UTF-8.
    least = 2 * bound + 1 + 256
    if vocabulary < least:
        raise ConfigError(
            f"an action vocabulary of {vocabulary} is too small for chunks of {horizon} steps at scale {scale:g}, "
            f"which need {least}: raise it, or lower the scale"
        )
    fast = UniversalActionProcessor.fit(
        [*chunks.astype(np.float64), every],
        scale=scale,
        vocab_size=vocabulary,
        time_horizon=horizon,
        action_dim=dimensions,
    )
    assert len(fast.bpe_tokenizer) <= vocabulary
    fast.bpe_tokenizer.save_pretrained(folder)
    (folder / "processing_action_tokenizer.py").write_text(_FAST_CODE, encoding="utf-8")
    numbers: Mapping[str, Any] = {
        key: getattr(fast, key) for key in ("scale", "vocab_size", "min_token", "time_horizon", "action_dim")
    }
    code = {"AutoProcessor": f"processing_action_tokenizer.{_FAST_CLASS}"}
    _write(folder / "processor_config.json", {"processor_class": _FAST_CLASS, "auto_map": code, **numbers})
    return fast
