"""What a sample may be: how long, and of which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from craft_ray.errors import ConfigError, DataError
from craft_ray.method.pooling import Layout


@dataclass(frozen=True)
class Limits:
    """The limits of a language model and of its config."""

    max_length: int
    """Most tokens of a sample, as the config says."""
    positions: int | None
    """Most tokens that the model has positions for; None if they are unlimited."""
    embeddings: int
    """Number of token ids that have an embedding."""
    tokenizer: Any

    @classmethod
    def of(cls, module: Any, tokenizer: Any, max_length: int, path: str) -> Limits:
        """The limits of a loaded model.

        Raises:
            ConfigError: a token that we add, for padding or at the end of a response, has no embedding.
        """
        text = module.config.get_text_config()
        # Rotary positions are computed, whatever the number; max_position_embeddings is what was trained.
        computed = getattr(text, "rope_parameters", None) is not None
        positions = None if computed else getattr(text, "max_position_embeddings", None)
        embeddings = module.get_input_embeddings().weight.shape[0]
        for name in ("pad_token", "eos_token"):
            index = getattr(tokenizer, f"{name}_id")
            if index is not None and index >= embeddings:
                raise ConfigError(
                    f"model.path {path}: {name} {getattr(tokenizer, name)!r} of its tokenizer has id {index}, but the "
                    f"model has embeddings for ids 0 to {embeddings - 1}: set another {name}, or resize the embeddings "
                    f"(transformers: model.resize_token_embeddings) and save the folder again"
                )
        return cls(max_length, positions, embeddings, tokenizer)

    @property
    def identity(self) -> list[int | None]:
        """The limits that a sample is checked against, apart from the tokenizer."""
        return [self.max_length, self.positions, self.embeddings]

    def check(self, input_ids_S: Tensor, layout: Layout, where: str) -> None:
        """Check a sample.

        Args:
            where: names it in an error.

        Raises:
            DataError: it is empty or too long, or one of its tokens has no embedding.
        """
        length, prompt = len(input_ids_S), layout.prompt_length
        if length == 0:
            raise DataError(f"{where} is empty: it has neither a prompt nor a response")
        if length > self.max_length:
            raise DataError(
                f"{where} has {length} tokens, model.max_length is {self.max_length}: raise it, or shorten the sample "
                f"(its prompt has {prompt})"
            )
        if self.positions is not None and length > self.positions:
            raise DataError(
                f"{where} has {length} tokens, the model has {self.positions} positions "
                f"(max_position_embeddings in its config): shorten the sample (its prompt has {prompt})"
            )
        behind = input_ids_S >= self.embeddings
        behind[list(layout.image_tokens)] = False  # a picture takes their place
        if behind.any():
            index = int(input_ids_S[behind][0])
            raise DataError(
                f"{where} has the token {self.tokenizer.convert_ids_to_tokens(index)!r} with id "
                f"{index}, but the model has embeddings for ids 0 to {self.embeddings - 1}: resize them (transformers: "
                f"model.resize_token_embeddings) and save the folder again, or remove the token from the data"
            )

    def check_continued(self, length: int, max_new_tokens: int, named: str) -> None:
        """Check that a prompt of `length` tokens can be continued.

        Args:
            named: the prompt in a message.

        Raises:
            DataError: the model has too few positions.
        """
        if self.positions is not None and length + max_new_tokens > self.positions:
            raise DataError(
                f"{named} has {length} tokens, which with {max_new_tokens} new ones are more than the model's "
                f"{self.positions} positions (max_position_embeddings in its config): lower max_new_tokens, or shorten "
                f"the prompt"
            )
