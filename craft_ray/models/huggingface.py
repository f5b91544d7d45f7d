"""What causal language models and image-text-to-text models of transformers have in common, behind one interface.

Hidden states are indexed as in transformers' `output_hidden_states`: 0 is the embeddings, k the output of block k,
and the last one is taken after the final norm (it is not the raw output of the last block). The student's retention
pass and the teacher run the base model only; the vocabulary projection is skipped.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from craft_ray.config import ModelConfig, Precision
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError, DataError
from craft_ray.method.pooling import Layout, Pooling
from craft_ray.models.base import Batch, Features, evaluating
from craft_ray.models.capabilities import LogitsModel, TensorModel
from craft_ray.models.chat import ChatTemplate
from craft_ray.models.checks import check_decoder, check_states, generates_in_padded_batches
from craft_ray.models.compiling import compile_blocks
from craft_ray.models.dropout import disable_dropout
from craft_ray.models.fingerprint import (
    json_fingerprint,
    tokenizer_identity,
    weights_fingerprint,
)
from craft_ray.models.limits import Limits
from craft_ray.models.loading import empty_module, load_module, load_processor
from craft_ray.models.sharding import base_forward, load_sharded, save_whole
from craft_ray.models.text import Cut, TextEncoder
from craft_ray.models.tokens import clip_suffix, listed, targets, token_log_probs, token_loss


class HuggingFaceModel(LogitsModel, TensorModel):
    """What causal language models and vision-language models share; a subclass says how a prompt is encoded."""

    module: Any
    auto_class: ClassVar[Any]
    processor_class: ClassVar[Any]
    reads_images: ClassVar[bool] = False

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        device: torch.device,
        weights: str | None = None,
        mesh: DeviceMesh | None = None,
        gpus: int = 1,
    ) -> None:
        if config.attention == "flex_attention" and device.type == "cpu":
            raise ConfigError(
                "model.attention is flex_attention, which trains on a GPU alone: set model.attention=sdpa"
            )
        self.config = config
        self.gpus = gpus
        self.precision = precision
        self.device = device
        self.sharded = mesh is not None
        self.processor = load_processor(self.processor_class, config)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.text = TextEncoder(self.tokenizer)
        self.chat: ChatTemplate | None = None
        if config.chat_template:
            self.chat = ChatTemplate(self.processor, self.tokenizer, self.reads_images, config.path)
        self.module = self._module(weights or config.path, mesh).train()
        if config.disable_dropout:
            disable_dropout(self.module)
        self.settings = self.module.config
        """transformers' config of the model."""
        text = self.settings.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.num_hidden_states: int = text.num_hidden_layers + 1
        self.vocabulary: int = text.vocab_size
        self.limits = Limits.of(self.module, self.tokenizer, config.max_length, config.path)
        self._eos: int | None = self.tokenizer.eos_token_id
        # A chat model ends its turn with a token of its own, which its template writes or its generation config names.
        own = self.module.generation_config.eos_token_id if self.module.generation_config else None
        turn_end = None if self.chat is None else self.chat.end_id
        self._stops = sorted({*listed(own), *listed(self._eos), *listed(turn_end)})
        pad = self.tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else (self._eos or 0)
        takes = inspect.signature(self.module.forward).parameters
        self._takes_keep = "logits_to_keep" in takes
        self._takes_types = "token_type_ids" in takes
        # A loss that balances experts is computed from them, which fails for a single new token and is not used here.
        self._outputs = {"output_router_logits": False} if "output_router_logits" in takes else {}
        check_decoder(self)
        if config.gradient_checkpointing:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            compile_blocks(self.module, device)

    def _module(self, path: str, mesh: DeviceMesh | None) -> Any:
        """The module of a folder or hub model on the device; with a mesh, this worker's part of it."""

        def load() -> Any:
            return load_module(self.auto_class, self.config, path, self.gpus)

        if self.gpus > 1:
            return load()
        if mesh is None:
            return load().to(self.device)
        return load_sharded(
            load, lambda: empty_module(self.auto_class, self.config, path), mesh, self.precision, self.device
        )

    @property
    def description(self) -> str:
        return f"a model of kind {self.kind}"

    def check_source(self, source: Source) -> None:
        if source.features is not None:
            raise ConfigError(
                f"{source.name} is a LeRobotDataset, but model.kind is {self.kind}: choose other data, or "
                f"model.kind=lerobot"
            )
        if source.has_conversations and self.chat is None:
            raise ConfigError(
                f"{source.name} holds conversations, but model.chat_template is false: set it to true, so that the "
                f"model's own template writes them"
            )

    # -- host side: samples to batches

    @abstractmethod
    def encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        """The model's inputs for a prompt alone, with a batch dimension of one."""

    @abstractmethod
    def encode_learnt(self, sample: Sample) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """The model's inputs for a whole conversation, with a batch dimension of one, and the indices of the tokens
        that are learnt."""

    @abstractmethod
    def cut(self, sample: Sample) -> Cut:
        """The tokens of prompt and response, an image as its mark, cut where the response begins."""

    probed = "a few tokens"
    """What `probe_prompt` holds, in messages."""

    def probe_prompt(self, tokens: Sequence[int]) -> Features:
        """A short prompt that shows what the model does with any prompt."""
        return self._prompt({"input_ids": torch.tensor([tokens[:3]])})

    def image_tokens(self, input_ids_S: Tensor) -> tuple[int, ...]:
        """Indices of image tokens in a prompt."""
        return ()

    def image_inputs(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of an encoded prompt that belong to its images, not to its tokens."""
        return {}

    def join_images(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The input `name` of the images of several samples as that of their batch."""
        return torch.cat(list(parts))

    def prompt_types(self, input_ids_1S: Tensor) -> dict[str, Tensor]:
        """token_type_ids of a prompt with images, if the model takes any."""
        return {}

    suffix_type = 0
    """token_type_ids of suffix tokens, if the model has them."""

    def preprocess(self, sample: Sample, suffix: Sequence[int] | None = None) -> Features:
        return self.with_suffix(self._prompt(self.encode_prompt(sample)), suffix or (), sample.where)

    def from_tensors(
        self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None, suffix: Sequence[int] | None = None
    ) -> Features:
        encoded = {"input_ids": torch.tensor(input_ids_S, dtype=torch.long)[None]}
        if pixel_values is not None:
            encoded["pixel_values"] = torch.tensor(pixel_values)[None]
            encoded |= self.prompt_types(encoded["input_ids"])
        return self.with_suffix(self._prompt(encoded), suffix or (), "a sample of an imported cache")

    def _prompt(self, encoded: dict[str, Tensor]) -> Features:
        """Features of an encoded prompt without a suffix."""
        prompt = encoded["input_ids"]
        images = self.image_inputs(encoded)
        tokens = {name: t[0] for name, t in encoded.items() if name not in images}
        tokens.setdefault("attention_mask", torch.ones_like(tokens["input_ids"]))
        length = len(tokens["input_ids"])
        return Features(tokens, images, Layout(length, length, self.image_tokens(prompt[0])))

    def with_suffix(self, prompt: Features, suffix: Sequence[int], where: str) -> Features:
        features = self.extended(prompt, suffix)
        self.limits.check(features.tokens["input_ids"], features.layout, where)
        return features

    def extended(self, prompt: Features, suffix: Sequence[int]) -> Features:
        """A preprocessed prompt followed by `suffix` tokens, whatever the limits are."""
        assert prompt.layout.length == prompt.layout.prompt_length, "the prompt already has a suffix"
        tokens = {}
        added = {"input_ids": torch.tensor(list(suffix), dtype=torch.long)}
        for name, tensor in prompt.tokens.items():
            fill = {"attention_mask": 1, "token_type_ids": self.suffix_type}.get(name, 0)
            tail = added.get(name, torch.full((len(suffix),), fill))
            tokens[name] = torch.cat([tensor, tail.to(tensor.dtype)])
        return Features(tokens, prompt.images, replace(prompt.layout, length=len(tokens["input_ids"])))

    def preprocess_task(self, sample: Sample) -> Features:
        """A conversation with all turns of the assistant to learn; else the prompt with its response."""
        if sample.conversation is None:
            return super().preprocess_task(sample)
        assert self.chat is not None, "check_source refuses conversations without a template"
        if self.suffix_type:
            if any(message["role"] == "assistant" for message in sample.conversation.messages):
                raise DataError(
                    f"{sample.where}: the conversation has several turns of the assistant, but {self.config.path} sees "
                    f"all of a prompt at once, earlier answers included: end each row with its first answer"
                )
            return super().preprocess_task(sample)
        encoded, learnt = self.encode_learnt(sample)
        end = listed(self._eos) if self.chat.end is None and self.config.append_eos else []
        features = self.with_suffix(self._prompt(encoded), end, sample.where)
        length = features.layout.length
        learnt += tuple(range(length - len(end), length))
        if not learnt:
            raise DataError(f"{sample.where}: the chat template writes nothing of the assistant's turns: correct it")
        return replace(features, layout=replace(features.layout, prompt_length=learnt[0], learnt=learnt))

    def response_tokens(self, sample: Sample) -> list[int]:
        sample.answer()  # there must be one
        cut = self.cut(sample)
        ids = cut.ids[cut.places[0] :]
        closed = self.chat is not None and self.chat.end is not None
        if self.config.append_eos and not closed and self._eos is not None and ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        if not ids:
            raise DataError(f"{sample.where} has an empty response: there is nothing to learn from it, remove it")
        return ids

    def boundary_merges(self, sample: Sample) -> bool:
        if sample.conversation is None or self.chat is None or self.suffix_type:
            return self.cut(sample).merged
        return self.text.learnt(self.chat.learnt(sample)).merged  # over the boundaries of any turn

    def _written(self, sample: Sample) -> Cut:
        """What the chat template writes for prompt and response, cut where the response begins."""
        assert self.chat is not None
        rendered = self.chat.answered(sample)
        [(start, stop)] = rendered.spans
        text = rendered.text[:stop]
        if not self.config.append_eos and sample.conversation is None and self.chat.end is not None:
            text = text.removesuffix(self.chat.end)
        return self.text.cut(text, [start], self.text.written)

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
            fill = self.pad if name == "input_ids" else 0
            rows = features[0].tokens[name].new_full((len(features), width), fill)
            for row, f in zip(rows, features, strict=True):
                length = f.layout.length
                (row[width - length :] if left else row[:length]).copy_(f.tokens[name])
            batch[name] = rows
        for name in dict.fromkeys(name for f in features for name in f.images):  # a conversation may have none
            batch[name] = self.join_images(name, [f.images[name] for f in features if name in f.images])
        return batch

    # -- device side

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def logits(self, batch: Batch) -> Tensor:
        with self.autocast():
            if self._takes_keep:
                return self.module(**batch.inputs, **self._outputs, use_cache=False, logits_to_keep=batch.keep_P).logits
            return self.module(**batch.inputs, **self._outputs, use_cache=False).logits[:, batch.keep_P]

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
            base = base_forward(self.module)
            states = base(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        check_states(states, layers, self)
        return [states[k].to(self.device) for k in layers]  # of a spread model, each is where its layer is

    def check_anchors(self, modes: Sequence[str], positions: Sequence[str]) -> None:
        """These models provide all anchors."""

    def check_continued(self, prompt: Features, max_new_tokens: int, named: str = "a prompt") -> None:
        self.limits.check_continued(prompt.layout.length, max_new_tokens, named)

    @torch.no_grad()
    def generate(self, features: Sequence[Features], max_new_tokens: int) -> list[list[int]]:
        lengths = {f.layout.length for f in features}
        self.check_continued(max(features, key=lambda f: f.layout.length), max_new_tokens)
        # If the model is sharded, all workers must generate equally often, whatever the lengths of their prompts.
        if (len(lengths) > 1 or self.sharded) and len(features) > 1 and not self._generates_in_padded_batches:
            return [tokens for one in features for tokens in self.generate([one], max_new_tokens)]
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self._stops or None, pad_token_id=self.pad
        )
        with evaluating(self.module), self.autocast():
            output = self.continued(features, settings)
        new_tokens = output[:, max(lengths) :].tolist()
        return [clip_suffix(tokens, self._stops) for tokens in new_tokens]

    @cached_property
    def _generates_in_padded_batches(self) -> bool:
        return generates_in_padded_batches(self)

    def continued(self, features: Sequence[Features], settings: transformers.GenerationConfig) -> Any:
        """What transformers generates from prompts padded on the left."""
        inputs = {k: v.to(self.device) for k, v in self._pad_batch(features, left=True).items()}
        # transformers fills unset fields of `settings` from the model's own config, where a repetition penalty would
        # change the greedy suffix.
        own_settings = self.module.generation_config
        self.module.generation_config = settings
        try:
            return self.module.generate(**inputs, **self._outputs, generation_config=settings, synced_gpus=self.sharded)
        finally:
            self.module.generation_config = own_settings

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def spelled(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def answer_text(self, tokens: Sequence[int], expected: Sequence[int]) -> str:
        special = {*self.tokenizer.all_special_ids} | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        if not special.intersection(_opened(expected, self._stops)):
            return self.decode(tokens).strip()
        return str(self.tokenizer.decode(_opened(tokens, self._stops), skip_special_tokens=False)).strip()

    # -- identity and storage

    def weights_fingerprint(self) -> str:
        return weights_fingerprint(self.module)

    def preprocessor_fingerprint(self) -> str:
        settings = self.config.model_dump(include={"max_length", "chat_template", "append_eos"})
        template = getattr(self.processor, "chat_template", None) if self.config.chat_template else None
        identity = [self.kind, settings, template, tokenizer_identity(self.tokenizer), self._image_identity()]
        if self.text.appended and (self.chat is None or self.reads_images):  # they were part of a prompt before
            identity.append({"left out": self.text.appended})
        return json_fingerprint(identity)

    def sample_fingerprint(self) -> str:
        return json_fingerprint([self.preprocessor_fingerprint(), self.limits.identity])

    def _image_identity(self) -> Any:
        return None

    def save(self, folder: Path, final: Path | None = None) -> None:
        if self.adapter is not None:
            self.adapter.save(folder)
        elif self.sharded:
            save_whole(self.module, folder)
        else:
            self.module.save_pretrained(folder)
        if not self.trains_shards or dist.get_rank() == 0:
            self.processor.save_pretrained(folder)


def _opened(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """An answer without the token that ends it."""
    return list(tokens[:-1] if tokens and tokens[-1] in stops else tokens)
