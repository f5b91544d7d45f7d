"""Capabilities that only some models have. A caller that needs one asks for its type."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError
from craft_ray.models.base import Batch, Features, Model
from craft_ray.models.readings import AS_STORED, Reading


class TokenModel(Model):
    """A model that outputs tokens, the suffix of its prompt."""

    @abstractmethod
    def preprocess(self, sample: Sample, suffix: Sequence[int] | None = None) -> Features:
        """One sample as tensors: its prompt, followed by `suffix` tokens, if any."""

    @abstractmethod
    def with_suffix(self, prompt: Features, suffix: Sequence[int], where: str) -> Features:
        """A preprocessed prompt followed by `suffix` tokens, exactly what `preprocess` returns for both; the image is
        not decoded again.

        Args:
            prompt: what `preprocess` returned without a suffix.
            where: names the sample in an error.

        Raises:
            DataError: prompt and suffix are too long together.
        """

    @abstractmethod
    def response_tokens(self, sample: Sample) -> list[int]:
        """The response as suffix tokens, with the end-of-sequence token if the config says so. Of a conversation it is
        the last turn.

        Raises:
            DataError: the sample has no response, or one that the model has no tokens for.
        """

    def boundary_merges(self, sample: Sample) -> bool:
        """Whether prompt and response as one text have a token that extends over their boundary. They are then
        tokenised separately, because an answer is generated from the tokens of the prompt."""
        return False

    def preprocess_task(self, sample: Sample) -> Features:
        return self.preprocess(sample, self.response_tokens(sample))

    @abstractmethod
    def token_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the suffix tokens, in nats, float32."""

    @abstractmethod
    def token_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability of each target token and whether it is the most likely one, each [B, P]; 0 and True where
        there is no target."""

    def task_loss(self, batch: Batch) -> Tensor:
        return self.token_loss(batch)

    @abstractmethod
    def generate(self, features: Sequence[Features], max_new_tokens: int) -> list[list[int]]:
        """Greedy suffix tokens of each prompt, including the end-of-sequence token if it was generated."""

    def check_continued(self, prompt: Features, max_new_tokens: int, named: str = "a prompt") -> None:  # noqa: B027
        """Check that `generate` can continue a prompt. Most models have no limit of their own.

        Args:
            named: the prompt in a message.

        Raises:
            DataError: the model has too few positions for its tokens and `max_new_tokens` more.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Suffix tokens as text, without special tokens."""

    def spelled(self, tokens: Sequence[int]) -> str:
        """Tokens as text for a reader, with special tokens if the model has them."""
        return self.decode(tokens)

    def answer_text(self, tokens: Sequence[int], expected: Sequence[int]) -> str:
        """What metrics of answers compare of one: its text as the tokenizer gives it back, which need not be the text
        in the data (case, accents, spaces).

        Args:
            expected: the tokens of the right answer. If it holds special tokens other than its end, they count.
        """
        return self.decode(tokens).strip()


class LogitsModel(TokenModel):
    """A model whose logits can be read after any of its tokens."""

    vocabulary: int
    """Number of logits at a token."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, P, vocabulary] at the P positions of `batch.keep_P`, through the model's own head."""


class TensorModel(Model):
    """A model that accepts tensors as inputs (of an imported cache)."""

    @abstractmethod
    def from_tensors(
        self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None, suffix: Sequence[int] | None = None
    ) -> Features:
        """Features of a prompt given as tensors, followed by `suffix` tokens, if any.

        Raises:
            DataError: these are not tensors that the model takes.
        """

    def readings(self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None) -> list[Reading]:
        """What the tokens of an imported prompt can mean, the likeliest first; the teacher's numbers decide.

        Raises:
            DataError: the prompt lacks tokens that nothing says how to put back.
        """
        return [AS_STORED]


class PackingModel(Model):
    """A model whose samples may share one row of tokens, without padding."""

    @abstractmethod
    def check_packing(self) -> None:
        """Check that `packed_hidden_states` equals `hidden_states`.

        Raises:
            ValueError: it does not.
        """

    @abstractmethod
    def packed_batch(self, features: Sequence[Features]) -> Batch:
        """A batch on the host whose samples are end to end in one row; `task_loss` of it equals that of padded ones."""

    @abstractmethod
    def packed_logits(self, features: Sequence[Features], keep_N: Tensor) -> Tensor:
        """Logits [N, vocabulary] at N tokens of such a row, counted from its start."""

    @abstractmethod
    def packed_hidden_states(self, features: Sequence[Features], layers: Sequence[int]) -> Tensor:
        """Hidden states [L, T, D] of samples laid end to end in one row of T tokens, each as if it were alone. The
        module must be in eval mode."""


@dataclass(frozen=True)
class OptimizerPreset:
    """How a model is to be optimised by its own account."""

    optimizer: Optimizer
    rates: Callable[[int], list[float]]
    """The learning rate of each parameter group at a step, from 0."""
    max_norm: float | None
    """Norm to which the gradient is clipped; None: no clipping."""
    described: str
    """The preset in a line."""


class PresetModel(Model):
    """A model that says how it is to be optimised."""

    @abstractmethod
    def optimizer_preset(self, steps: int) -> OptimizerPreset:
        """A new optimiser of its trainable parameters, for a run of this many steps.

        Raises:
            ConfigError: its preset is neither Adam nor AdamW.
        """


def token_model(model: Model) -> TokenModel:
    """The model, if it outputs tokens.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(model, TokenModel):
        return model
    raise ConfigError(
        f"{model.description} has no action tokens: anchor its hidden states at positions of the prompt "
        f"(anchors.modes=[hidden], anchors.positions=[{','.join(model.default_positions)}]), and score it by episodes "
        f"(metric success)"
    )


def logits_model(model: Model) -> LogitsModel:
    """The model, if its logits can be read.

    Raises:
        ConfigError: they cannot.
    """
    if isinstance(model, LogitsModel):
        return model
    raise ConfigError(
        f"retention modes logits and ewc need a language or vision-language model, {model.description} does not show "
        f"its logits: choose hidden, or for a policy with action tokens token_ce"
    )


def tensor_model(model: Model) -> TensorModel:
    """The model, if it accepts tensors as inputs.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(model, TensorModel):
        return model
    raise ConfigError(
        f"a legacy cache holds no robot frames, which {model.description} needs: build the cache of a policy with "
        f"'craft-ray anchors build'"
    )


def packing_model(model: Model) -> PackingModel:
    """The model, if it can be packed.

    Raises:
        ValueError: it cannot; the caller adds the remedy, as for a model that fails `check_packing`.
    """
    if isinstance(model, PackingModel):
        return model
    raise ValueError(f"{model.description} cannot be packed, because its images are not part of a row of tokens")
