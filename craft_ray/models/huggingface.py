"""Any causal language model and any image-text-to-text model of transformers, behind one interface.

Hidden states are indexed as in transformers' `output_hidden_states`: 0 is the embeddings, k the output of block k,
and the last one is taken after the final norm (it is not the raw output of the last block). The student's retention
pass and the teacher run the base model only; the vocabulary projection is skipped.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from craft_ray.config import ModelConfig, Precision
from craft_ray.data.images import decode_image
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError, DataError, ModelError
from craft_ray.method.pooling import Layout, Pooling
from craft_ray.models.base import Batch, Features, disable_dropout, evaluating
from craft_ray.models.capabilities import PackingModel, TensorModel, TokenModel
from craft_ray.models.fingerprint import (
    json_fingerprint,
    tokenizer_identity,
    weights_fingerprint,
    without_locations,
)
from craft_ray.models.packing import check_packing, packed_forward
from craft_ray.models.tokens import clip_suffix, targets, token_log_probs, token_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HuggingFaceModel(TokenModel, TensorModel):
    """What causal language models and vision-language models share; a subclass says how a prompt is encoded."""

    module: Any
    auto_class: ClassVar[Any]
    processor_class: ClassVar[Any]

    def __init__(
        self, config: ModelConfig, precision: Precision, device: torch.device, weights: str | None = None
    ) -> None:
        self.config = config
        self.precision = precision
        self.device = device
        self.processor = self._load_processor()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.module = self._load_module(weights or config.path).to(device).train()
        if config.disable_dropout:
            disable_dropout(self.module)
        if config.gradient_checkpointing:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
        text = self.module.config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.num_hidden_states: int = text.num_hidden_layers + 1
        self._eos: int | None = self.tokenizer.eos_token_id
        # A chat model ends its turn with a token of its own, which its generation config names.
        own = self.module.generation_config.eos_token_id if self.module.generation_config else None
        self._stops = sorted({*_listed(own), *_listed(self._eos)})
        pad = self.tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else (self._eos or 0)
        self._takes_keep = "logits_to_keep" in inspect.signature(self.module.forward).parameters

    @property
    def description(self) -> str:
        return f"a model of kind {self.kind}"

    # -- loading

    def _options(self) -> dict[str, Any]:
        return {"revision": self.config.revision, "trust_remote_code": self.config.trust_remote_code}

    def _load_processor(self) -> Any:
        path = Path(self.config.path)
        if path.is_absolute() and not path.is_dir():
            raise ConfigError(f"model.path {path}: there is no such folder: specify an existing one, or a hub model")
        try:
            return self.processor_class.from_pretrained(self.config.path, **self._options())
        except Exception as error:  # a damaged tokenizer can raise anything, even a bare Exception
            raise ConfigError(
                f"model.path {path}: no processor or tokenizer loads from it ({_reason(error)}): specify a folder or a "
                f"hub model that has one"
            ) from error

    def _load_module(self, path: str) -> Any:
        try:
            module, info = self.auto_class.from_pretrained(
                path,
                dtype=DTYPES[self.config.dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **self._options(),
            )
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelError(
                f"model {path}: its weights are damaged ({_reason(error)}): fetch or save it again"
            ) from None
        except (OSError, ValueError) as error:
            if "afetensor" in str(error) or "header" in str(error):
                raise ModelError(f"model {path}: its weights do not load ({_reason(error)})") from None
            raise ConfigError(
                f"model.path {path}: no {self.auto_class.__name__} loads from it ({_reason(error)})"
            ) from None
        missing = sorted(info["missing_keys"])
        mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
        if missing or mismatched:
            wrong = f"{len(missing)} weights are missing" if missing else f"{len(mismatched)} have another shape"
            raise ModelError(
                f"model {path} did not load completely: {wrong} (e.g. {(missing or mismatched)[0]}), they would be "
                f"random; save the folder again or choose the right model.kind (it is {self.kind})"
            )
        return module

    def check_source(self, source: Source) -> None:
        if source.features is not None:
            raise ConfigError(
                f"{source.name} is a LeRobotDataset, but model.kind is {self.kind}: choose other data, or "
                f"model.kind=lerobot"
            )

    # -- host side: samples to batches

    @abstractmethod
    def encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        """The model's inputs for a prompt alone, with a batch dimension of one."""

    def image_tokens(self, input_ids_S: Tensor) -> tuple[int, ...]:
        """Indices of image tokens in a prompt."""
        return ()

    def prompt_types(self, input_ids_1S: Tensor) -> dict[str, Tensor]:
        """token_type_ids of a prompt with images, where the model takes any."""
        return {}

    suffix_type = 0
    """token_type_ids of suffix tokens, where the model has them."""

    def preprocess(self, sample: Sample, suffix: Sequence[int] | None = None) -> Features:
        return self.with_suffix(self._prompt(self.encode_prompt(sample)), suffix or (), sample.id)

    def from_tensors(
        self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None, suffix: Sequence[int] | None = None
    ) -> Features:
        encoded = {"input_ids": torch.tensor(input_ids_S, dtype=torch.long)[None]}
        if pixel_values is not None:
            encoded["pixel_values"] = torch.tensor(pixel_values)[None]
            encoded |= self.prompt_types(encoded["input_ids"])
        return self.with_suffix(self._prompt(encoded), suffix or (), "of an imported cache")

    def _prompt(self, encoded: dict[str, Tensor]) -> Features:
        """Features of an encoded prompt alone."""
        prompt = encoded["input_ids"]
        tokens = {name: t[0] for name, t in encoded.items() if t.shape == prompt.shape}
        images = {name: t for name, t in encoded.items() if t.shape != prompt.shape}
        tokens.setdefault("attention_mask", torch.ones_like(tokens["input_ids"]))
        length = len(tokens["input_ids"])
        return Features(tokens, images, Layout(length, length, self.image_tokens(prompt[0])))

    def with_suffix(self, prompt: Features, suffix: Sequence[int], sample_id: str) -> Features:
        assert prompt.layout.length == prompt.layout.prompt_length, "the prompt already has a suffix"
        tokens = {}
        added = {"input_ids": torch.tensor(list(suffix), dtype=torch.long)}
        for name, tensor in prompt.tokens.items():
            fill = {"attention_mask": 1, "token_type_ids": self.suffix_type}.get(name, 0)
            tail = added.get(name, torch.full((len(suffix),), fill))
            tokens[name] = torch.cat([tensor, tail.to(tensor.dtype)])
        length = len(tokens["input_ids"])
        if length > self.config.max_length:
            raise DataError(
                f"sample {sample_id} has {length} tokens, model.max_length is {self.config.max_length}: raise it, or "
                f"shorten the sample (its prompt has {prompt.layout.prompt_length})"
            )
        if length == 0:
            raise DataError(f"sample {sample_id} is empty: it has neither a prompt nor a response")
        return Features(tokens, prompt.images, replace(prompt.layout, length=length))

    def response_tokens(self, sample: Sample) -> list[int]:
        if sample.response is None:
            raise DataError(f"sample {sample.id} has no response: name the column that holds it (columns.response)")
        ids: list[int] = self.tokenizer(sample.response, add_special_tokens=False)["input_ids"]
        if self.config.append_eos and self._eos is not None:
            ids = [*ids, self._eos]
        if not ids:
            raise DataError(f"sample {sample.id} has an empty response: there is nothing to learn from it, remove it")
        return ids

    def collate(self, features: Sequence[Features], positions: Sequence[str] | None = None) -> Batch:
        inputs = self._pad_batch(features, left=False)
        layouts = [f.layout for f in features]
        keep, wanted, count = targets(layouts, inputs["input_ids"])
        pooling = None
        if positions is not None:
            pooling = Pooling.plan(layouts, positions, inputs["input_ids"].shape[1])
        return Batch(inputs, keep, wanted, count, len(features), pooling)

    def _pad_batch(self, features: Sequence[Features], left: bool) -> dict[str, Tensor]:
        width = max(f.layout.length for f in features)
        batch: dict[str, Tensor] = {}
        for name in features[0].tokens:
            fill = self._pad if name == "input_ids" else 0
            rows = features[0].tokens[name].new_full((len(features), width), fill)
            for row, f in zip(rows, features, strict=True):
                length = f.layout.length
                (row[width - length :] if left else row[:length]).copy_(f.tokens[name])
            batch[name] = rows
        for name in features[0].images:
            batch[name] = torch.cat([f.images[name] for f in features])
        return batch

    # -- device side

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, P, vocabulary] at the positions that predict a target, through the model's own head."""
        with self.autocast():
            if self._takes_keep:
                return self.module(**batch.inputs, use_cache=False, logits_to_keep=batch.keep_P).logits
            return self.module(**batch.inputs, use_cache=False).logits[:, batch.keep_P]

    def token_loss(self, batch: Batch) -> Tensor:
        if not batch.tokens:
            raise DataError(
                "a batch holds no token to predict: its responses are empty, or a single token after an empty prompt"
            )
        return token_loss(self.logits(batch).flatten(0, 1), batch.targets_BP.flatten(), batch.tokens)

    def token_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return token_log_probs(self.logits(batch), batch.targets_BP)

    def hidden_states(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        with self.autocast():
            states = self.module.base_model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        assert len(states) == self.num_hidden_states
        return [states[k] for k in layers]

    def check_anchors(self, modes: Sequence[str], positions: Sequence[str]) -> None:
        """These models provide all anchors."""

    @torch.inference_mode()
    def generate(self, features: Sequence[Features], max_new_tokens: int) -> list[list[int]]:
        inputs = {k: v.to(self.device) for k, v in self._pad_batch(features, left=True).items()}
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self._stops or None, pad_token_id=self._pad
        )
        # transformers fills unset fields of `settings` from the model's own config, where a repetition penalty would
        # change the greedy suffix.
        own_settings = self.module.generation_config
        self.module.generation_config = settings
        try:
            with evaluating(self.module), self.autocast():
                output = self.module.generate(**inputs, generation_config=settings)
        finally:
            self.module.generation_config = own_settings
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [clip_suffix(tokens, self._stops) for tokens in new_tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    # -- identity and storage

    def weights_fingerprint(self) -> str:
        return weights_fingerprint(self.module)

    def preprocessor_fingerprint(self) -> str:
        settings = self.config.model_dump(include={"max_length", "chat_template", "append_eos"})
        template = getattr(self.processor, "chat_template", None) if self.config.chat_template else None
        return json_fingerprint(
            [self.kind, settings, template, tokenizer_identity(self.tokenizer), self._image_identity()]
        )

    def _image_identity(self) -> Any:
        return None

    def save(self, folder: Path, final: Path | None = None) -> None:
        self.module.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class CausalLM(HuggingFaceModel, PackingModel):
    """A language model: AutoModelForCausalLM with its tokenizer."""

    kind = "causal_lm"
    default_positions = ("all",)
    auto_class = transformers.AutoModelForCausalLM
    processor_class = transformers.AutoTokenizer

    def encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        if self.config.chat_template:
            messages = [{"role": "user", "content": sample.prompt}]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = self.tokenizer(sample.prompt)["input_ids"]
        return {"input_ids": torch.tensor([ids], dtype=torch.long)}

    def check_packing(self) -> None:
        try:
            with evaluating(self.module), self.autocast():
                check_packing(self.module.base_model, 1e-1 if self.precision == "bf16" else 1e-3)
        except TypeError as error:  # its forward does not accept the layout that attention needs
            raise ValueError(f"{type(self.module).__name__} cannot be packed ({_reason(error)})") from None

    def packed_hidden_states(self, features: Sequence[Features], layers: Sequence[int]) -> Tensor:
        with self.autocast():
            return packed_forward(self.module.base_model, [f.tokens["input_ids"] for f in features], layers)[0]


class VisionLanguageModel(HuggingFaceModel):
    """An image-text-to-text model: AutoModelForImageTextToText with its processor."""

    kind = "vision_language"
    default_positions = ("suffix",)
    auto_class = transformers.AutoModelForImageTextToText
    processor_class = transformers.AutoProcessor

    @property
    def suffix_type(self) -> int:  # type: ignore[override]
        """PaliGemma marks its suffix with 1 (causal attention); Gemma 3 marks images with 1, others have no types."""
        return 1 if self.module.config.model_type == "paligemma" else 0

    def encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        if sample.image is None:
            raise DataError(f"sample {sample.id} has no image: name the column that holds it (columns.image)")
        image = decode_image(sample.image, f"sample {sample.id}")
        mark = self.processor.image_token
        marks, most = sample.prompt.count(mark), 0 if self.config.chat_template else 1
        if marks > most:
            owner = "the chat template places it" if self.config.chat_template else "a sample has one image"
            raise DataError(
                f"sample {sample.id}: its prompt has {mark} {marks} times, but {owner}: leave {most} of them"
            )
        if self.config.chat_template:
            content = [{"type": "image", "image": image}, {"type": "text", "text": sample.prompt}]
            encoded = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            text = sample.prompt if mark in sample.prompt else mark + sample.prompt
            encoded = self.processor(images=[image], text=[text], return_tensors="pt")
        return {name: tensor for name, tensor in encoded.items() if name != "labels"}

    def image_tokens(self, input_ids_S: Tensor) -> tuple[int, ...]:
        config = self.module.config
        mark = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        return tuple(torch.nonzero(input_ids_S == mark).flatten().tolist())

    def prompt_types(self, input_ids_1S: Tensor) -> dict[str, Tensor]:
        if "token_type_ids" not in inspect.signature(self.module.forward).parameters:
            return {}
        types = torch.zeros_like(input_ids_1S)
        if self.suffix_type == 0:
            types[:, list(self.image_tokens(input_ids_1S[0]))] = 1
        return {"token_type_ids": types}

    def _image_identity(self) -> Any:
        # The processor's own settings decide how many image tokens a prompt has, the image processor's what they show;
        # its class is included, because two backends of one processor resize differently.
        images = self.processor.image_processor
        settings = without_locations(self.processor.to_dict())
        settings["image_processor"] = without_locations(images.to_dict())
        return [type(images).__name__, settings]


def _listed(value: int | list[int] | None) -> list[int]:
    """Token ids as transformers holds them: none, one, or several."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _reason(error: BaseException) -> str:
    """The first line of a library's error, with our remedy where the library's is a Python argument."""
    text = str(error).strip()
    if "contains custom code" in text:
        return "it comes with Python code of its own; set model.trust_remote_code=true if you trust it"
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text.splitlines()[0][:200]
