"""pi0_fast: a PaliGemma that outputs actions as tokens (arXiv 2501.09747).

Its sequence is [pictures | text | suffix]. Pictures and text attend to each other; the suffix, BOS and the FAST tokens
of the actions, is causal. BOS is given, every other suffix token is predicted. The hidden states of pictures and text
do not depend on the suffix, so anchors that need only those leave it out, which saves most of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from torch import Tensor

from craft_ray.config import ModelConfig, Precision
from craft_ray.data.images import decode_image
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError, DataError
from craft_ray.lerobot.folder import PolicyFolder
from craft_ray.lerobot.policy import LANGUAGE, LANGUAGE_MASK, LeRobotPolicy, Output, image_tokens, padded
from craft_ray.lerobot.sharding import in_step
from craft_ray.lerobot.taps import Taps
from craft_ray.method.pooling import Layout
from craft_ray.models.base import IGNORE, Batch, Features, evaluating
from craft_ray.models.capabilities import TensorModel, TokenModel
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.models.readings import Reading
from craft_ray.models.sharding import gathered
from craft_ray.models.tokens import clip_suffix, token_log_probs

SUFFIX, SUFFIX_MASK = "action.tokens", "action.token_mask"
END = "|"
"""The token that ends the actions."""


class PI0Fast(TokenModel, TensorModel, LeRobotPolicy):
    """It takes frames with actions and, as a language model, questions about a picture with their answers."""

    default_positions = ("suffix",)

    def __init__(self, config: ModelConfig, precision: Precision, device: torch.device, folder: PolicyFolder) -> None:
        super().__init__(config, precision, device, folder)
        paligemma = self._paligemma
        self.hidden_size: int = paligemma.config.text_config.hidden_size
        self.tokenizer: Any = self.policy._paligemma_tokenizer
        where = f"model.path {folder.path}"
        if not self.cameras:
            raise ConfigError(
                f"{where}: its config.json names no camera, but a pi0_fast needs one: specify another folder"
            )
        vocabulary = self.tokenizer.get_vocab()
        named = {"BOS": self.tokenizer.bos_token, "end marker": END, "EOS": self.tokenizer.eos_token}
        if lacking := [name for name, token in named.items() if token not in vocabulary]:
            raise ConfigError(
                f"{where}: its text tokenizer {self.settings.text_tokenizer_name} has no {' and no '.join(lacking)} "
                f"token, needed to delimit actions: specify the one that the policy was trained with"
            )
        self._bos: int = self.tokenizer.bos_token_id
        self._end: int = self.tokenizer.convert_tokens_to_ids(END)
        self._per_camera = image_tokens(self.settings.image_resolution, paligemma.config.vision_config.patch_size)
        known, rows = len(self.tokenizer), paligemma.model.language_model.embed_tokens.num_embeddings
        if known > rows:
            raise ConfigError(
                f"{where}: its text tokenizer {self.settings.text_tokenizer_name} has {known} tokens, "
                f"but the policy has {rows}: specify the tokenizer that the policy was trained with"
            )

    @property
    def _paligemma(self) -> Any:
        return self.policy.model.paligemma_with_expert.paligemma

    def make_taps(self) -> Taps:
        language = self._paligemma.model.language_model
        return Taps([layer.input_layernorm for layer in language.layers], language.norm)

    def check_source(self, source: Source) -> None:
        if source.has_conversations:
            raise ConfigError(
                f"{source.name} holds conversations, but {self.description} has no chat template for them"
            )
        if source.features is not None:  # otherwise these are questions and answers
            super().check_source(source)

    # -- host side

    def layout(self, encoded: Mapping[str, Tensor], suffix: int) -> Layout:
        cameras = sum(name in encoded for name in self.cameras)
        pictures = len(self.settings.image_features) * self._per_camera
        prompt = pictures + int(encoded[LANGUAGE_MASK].sum())
        seen = cameras * self._per_camera
        # Absent cameras come after those that are present.
        return Layout(prompt + suffix, prompt, tuple(range(seen)), tuple(range(seen, pictures)), given=0)

    def preprocess(self, sample: Sample, suffix: Sequence[int] | None = None) -> Features:
        """A frame with its action tokens, or a question about a picture with the tokens of its answer."""
        if sample.frame is None:
            encoded, given = self._encode_question(sample), []
            text = {"language": encoded[LANGUAGE][0]}
        else:
            encoded, given = self.encode(sample), [self._bos]
            text = self.language(encoded)
        layout = replace(self.layout(encoded, len(given)), given=len(given))
        images = {name: encoded[name] for name in self.cameras if name in encoded}
        prompt = Features(text | {"suffix": torch.tensor(given, dtype=torch.long)}, images, layout)
        return self.with_suffix(prompt, suffix or (), sample.where)

    def with_suffix(self, prompt: Features, suffix: Sequence[int], where: str) -> Features:
        given = prompt.tokens["suffix"]
        assert len(given) == prompt.layout.given, "the prompt already has a suffix"
        most = self.settings.max_action_tokens
        if len(suffix) > most:
            raise DataError(
                f"{where} has {len(suffix)} suffix tokens, but the policy's max_action_tokens is "
                f"{most}: lower max_new_tokens when they are generated, or use a policy with a larger max_action_tokens"
            )
        tokens = torch.cat([given, torch.tensor(list(suffix), dtype=torch.long)])
        layout = replace(prompt.layout, length=prompt.layout.length + len(suffix))
        return Features(prompt.tokens | {"suffix": tokens}, prompt.images, layout)

    def from_tensors(
        self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None, suffix: Sequence[int] | None = None
    ) -> Features:
        """A prompt as earlier tools stored it: the first camera's picture in [-1, 1] and the tokens of the text."""
        resolution = tuple(self.settings.image_resolution)
        if pixel_values is None or pixel_values.shape != (3, *resolution):
            shape = None if pixel_values is None else list(pixel_values.shape)
            raise DataError(f"its pixel_values are {shape}, but the policy takes pictures of {[3, *resolution]}")
        picture = (torch.from_numpy(np.array(pixel_values, dtype=np.float32))[None] + 1) / 2
        ids = torch.from_numpy(input_ids_S.astype(np.int64))[None]
        encoded = {self.cameras[0]: picture, LANGUAGE: ids, LANGUAGE_MASK: torch.ones_like(ids)}
        tokens = list(suffix or ())
        given = tokens[:1] if tokens[:1] == [self._bos] else []
        layout = replace(self.layout(encoded, len(given)), given=len(given))
        own = {"language": ids[0], "suffix": torch.tensor(given, dtype=torch.long)}
        prompt = Features(own, {self.cameras[0]: picture}, layout)
        return self.with_suffix(prompt, tokens[len(given) :], "a sample of an imported cache")

    def readings(self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None) -> list[Reading]:
        """LeRobot's decoding appends BOS to the prompt; earlier builders did so as well, but stored it without."""
        as_stored = Reading("", stop=self._end)
        if input_ids_S[-1:].tolist() == [self._bos]:
            return [as_stored]
        return [
            replace(as_stored, words="BOS put back at the end of the prompt", appended=(self._bos,)),
            as_stored,
            replace(as_stored, words="BOS put back before the suffix", leading=(self._bos,)),
        ]

    def _encode_question(self, sample: Sample) -> dict[str, Any]:
        """The picture as the first camera's, and the question in PaliGemma's format: BOS, the text and a line break."""
        if sample.image is None:
            raise DataError(f"{sample.where} has no image: specify the column that holds it (columns.image)")
        if len(sample.pictures or ()) > 1:
            raise DataError(f"{sample.where} has several images, and {self.description} reads one: specify one column")
        picture = decode_image(sample.image, sample.where).convert("RGB")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
            picture.height, picture.width, 3
        )
        # Pictures of one batch need one size; the policy would resize them to this one as well.
        resized = self._resize(pixels.permute(2, 0, 1)[None])
        # LeRobot configures this tokenizer to append EOS to every text, which is wrong for a question.
        text = self.tokenizer(f"{sample.prompt}\n", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[self._bos, *text]])
        most = self.settings.tokenizer_max_length
        if ids.shape[1] > most:
            raise DataError(
                f"the question of {sample.where} has {ids.shape[1]} tokens, but the policy's tokenizer_max_length "
                f"is {most}: shorten it"
            )
        return {
            self.cameras[0]: resized, LANGUAGE: ids, LANGUAGE_MASK: torch.ones_like(ids), "task": [sample.prompt]
        }  # fmt: skip

    def _resize(self, picture_BCHW: Tensor) -> Tensor:
        from lerobot.policies.common.vla_utils import resize_with_pad_torch

        floats = picture_BCHW.permute(0, 2, 3, 1).float() / 255
        return resize_with_pad_torch(floats, *self.settings.image_resolution).permute(0, 3, 1, 2)

    def response_tokens(self, sample: Sample) -> list[int]:
        """The actions as FAST tokens, followed by the end marker; or the answer to a question.

        LeRobot's preprocessor makes the tokens from a complete frame, so it reads the pictures here as well.
        """
        if sample.frame is None:
            return self._answer_tokens(sample)
        encoded = self.encode(sample, actions=True)
        tokens: list[int] = encoded[SUFFIX][0][encoded[SUFFIX_MASK][0].bool()].tolist()
        if self._end not in tokens:
            raise DataError(
                f"the actions of {sample.where} have more tokens than the policy's max_action_tokens of "
                f"{self.settings.max_action_tokens}: they are from another robot or on another scale"
            )
        self._check_whole(tokens, sample)
        return tokens[1:]

    def _check_whole(self, tokens: Sequence[int], sample: Sample) -> None:
        """Refuse actions that FAST cannot hold: it skips a number that is too large, and all later numbers shift."""
        before = 1 + len(self.tokenizer.encode("Action: ", add_special_tokens=False))
        action_tokens = torch.tensor(tokens[before : tokens.index(self._end)])
        fast = self.policy.action_tokenizer.bpe_tokenizer
        numbers = len(fast.decode(self.policy._paligemma_tokens_to_act_tokens(action_tokens).tolist()))
        if numbers != self.settings.chunk_size * self.action_size:
            raise DataError(
                f"the actions of {sample.where} leave the range that the policy's action tokenizer has tokens for: "
                f"widen the statistics with the data set (model.merge_statistics), or leave its episode out"
            )

    def _answer_tokens(self, sample: Sample) -> list[int]:
        if sample.response is None:
            raise DataError(f"{sample.where} has no response: specify the column that holds it (columns.response)")
        ids: list[int] = self.tokenizer(sample.response, add_special_tokens=False)["input_ids"]
        eos = [self.tokenizer.eos_token_id] if self.config.append_eos else []
        return ids + eos

    def collate(self, features: Sequence[Features], positions: Sequence[str] | None = None) -> Batch:
        batch = super().collate(features, positions)
        rows = [f.tokens["suffix"] for f in features]
        given = torch.tensor([f.layout.given for f in features])
        most = max(map(len, rows))
        if not most:
            return batch
        tokens, mask = padded(rows, most)
        predicted = mask & (torch.arange(most) >= given[:, None])
        first = int(given.min())  # a column that is given in every row has no targets
        targets_BP = tokens.masked_fill(~predicted, IGNORE)[:, first:]
        inputs = batch.inputs | {SUFFIX: tokens, SUFFIX_MASK: mask}
        return replace(batch, inputs=inputs, targets_BP=targets_BP, tokens=int(predicted.sum()))

    def terms(self, inputs: Mapping[str, Tensor]) -> int:
        return int(inputs[SUFFIX_MASK][:, 1:].sum())  # all tokens after BOS

    def preprocessor_fingerprint(self) -> str:
        return json_fingerprint([super().preprocessor_fingerprint(), list(self.settings.image_resolution)])

    def sample_fingerprint(self) -> str:
        limits = [self.settings.tokenizer_max_length, self.settings.max_action_tokens]
        return json_fingerprint([self.preprocessor_fingerprint(), limits])

    # -- device side

    def run_prompt(self, inputs: Mapping[str, Tensor]) -> None:
        self._run(inputs)

    def _run(self, inputs: Mapping[str, Tensor], use_cache: bool = False) -> tuple[Tensor, Tensor, Any]:
        """The last hidden state after the final norm [B, S, D], which positions are real [B, S], keys and values."""
        core = self.policy.model
        images, masks = self.policy._preprocess_images(inputs)
        embedded, real, attention, _, _ = core.embed_prefix_fast(
            images, masks, inputs[LANGUAGE], inputs[LANGUAGE_MASK], inputs.get(SUFFIX), inputs.get(SUFFIX_MASK)
        )
        embedded = embedded.to(self._paligemma.lm_head.weight.dtype)
        (hidden, _), cache = core.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(attention, dtype=embedded.dtype),
            position_ids=torch.cumsum(real, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=use_cache,
        )
        return hidden, real, cache

    def _before_suffix(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The hidden state of the prompt's last token, [B, 1, D]."""
        most = inputs[SUFFIX].shape[1] if SUFFIX in inputs else 0
        pictures = hidden.shape[1] - most - inputs[LANGUAGE].shape[1]
        last = pictures + inputs[LANGUAGE_MASK].sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]

    def token_loss(self, batch: Batch) -> Tensor:
        """LeRobot's own loss: cross-entropy over the FAST tokens after BOS. For answers, over all of their tokens."""
        if not batch.tokens:
            raise DataError("a batch holds no tokens to predict: its samples have no actions, or empty answers")
        inputs = self.inputs(batch)
        if batch.targets_BP.shape[1] == inputs[SUFFIX].shape[1]:  # LeRobot's skips the first token of every suffix
            return -self.token_log_probs(batch)[0].sum() / batch.tokens
        with self.autocast():
            images, masks = self.policy._preprocess_images(inputs)
            tokens = [inputs[name] for name in (LANGUAGE, LANGUAGE_MASK, SUFFIX, SUFFIX_MASK)]
            forward = self.policy.model.forward
            loss: Tensor = self.without_dropout("loss", lambda: forward(images, masks, *tokens)["loss"])
        return loss.float()

    def token_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = self.inputs(batch)
        most, columns = inputs[SUFFIX].shape[1], batch.targets_BP.shape[1]

        def logits() -> Tensor:
            hidden, _, _ = self._run(inputs)
            feeding = torch.cat([self._before_suffix(hidden, inputs), hidden[:, -most:-1]], 1)[:, most - columns :]
            return self._paligemma.lm_head(feeding)

        with self.autocast():
            logits_BPV = self.without_dropout("likelihood of tokens", logits)
        return token_log_probs(logits_BPV, batch.targets_BP)

    @torch.no_grad()
    def generate(self, features: Sequence[Features], max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens under the attention mask of training.

        LeRobot's own decoding lets the prompt attend to BOS, which training does not: a few of its tokens are not the
        most likely ones under the loss that a student learns from.
        """
        acting = {f.layout.given for f in features} == {1}
        assert acting or not any(f.layout.given for f in features), "frames and questions cannot share a batch"
        stop = self._end if acting else self.tokenizer.eos_token_id
        inputs = self.inputs(self.collate(features).to(self.device))
        with evaluating(self.module), self.autocast():
            generating = partial(self._in_step, partial(self._greedy, inputs, stop, max_new_tokens))
            tokens = gathered(self.module, generating)
        return [clip_suffix(row, {stop}) for row in tokens.tolist()]

    def _in_step(self, generating: Callable[[], Output]) -> Output:
        """What `generating` returns. If the policy is sharded, one that is done makes the passes of the others."""
        if not self.sharded:
            return generating()
        model, dtype = self.policy.model.paligemma_with_expert, self._paligemma.lm_head.weight.dtype
        nothing = torch.zeros(1, 1, self.hidden_size, device=self.device, dtype=dtype)
        zero = torch.zeros(1, 1, device=self.device, dtype=torch.long)

        def idle() -> None:
            model.forward(attention_mask=None, position_ids=zero, inputs_embeds=[nothing, None], use_cache=False)

        with in_step(self._paligemma.model.language_model.embed_tokens, idle, self.device):
            return generating()

    def _greedy(self, inputs: Mapping[str, Tensor], stop: int, most: int) -> Tensor:
        """Up to `most` tokens [B, T] that follow those of the batch, until every row has produced `stop`."""
        model, lm_head = self.policy.model.paligemma_with_expert, self._paligemma.lm_head
        hidden, real, cache = self._run(inputs, use_cache=True)
        feeding = hidden[:, -1:] if SUFFIX in inputs else self._before_suffix(hidden, inputs)
        tokens = lm_head(feeding).argmax(-1)
        while tokens.shape[1] < most and not (tokens == stop).any(1).all():
            embedded = model.embed_language_tokens(tokens[:, -1:]).to(lm_head.weight.dtype)
            position = real.sum(1, keepdim=True)
            real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
            (feeding, _), cache = model.forward(
                attention_mask=prepare_attention_masks_4d(real[:, None], dtype=embedded.dtype),
                position_ids=position,
                past_key_values=cache,
                inputs_embeds=[embedded, None],
                use_cache=True,
            )
            tokens = torch.cat([tokens, lm_head(feeding).argmax(-1)], 1)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        # LeRobot decodes n_action_steps actions whatever the length of the chunk, and it ends the program if a policy
        # that has forgotten its actions outputs something else, which is a failed episode and not an error.
        settings = self.settings
        own = settings.n_action_steps, settings.validate_action_token_prefix
        settings.n_action_steps, settings.validate_action_token_prefix = settings.chunk_size, False
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        predict = super().predict
        try:
            return self._in_step(lambda: predict(inputs))
        finally:
            settings.n_action_steps, settings.validate_action_token_prefix = own
            logging.disable(level)
