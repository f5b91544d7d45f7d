"""Any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from craft_ray.data.sample import Sample
from craft_ray.models.base import Batch, Features, evaluating
from craft_ray.models.capabilities import PackingModel
from craft_ray.models.huggingface import HuggingFaceModel
from craft_ray.models.loading import reason
from craft_ray.models.packing import check_packing, pack, packed_attention, packed_forward, packed_logits
from craft_ray.models.text import Cut


class CausalLM(HuggingFaceModel, PackingModel):
    """A language model: AutoModelForCausalLM with its tokenizer."""

    kind = "causal_lm"
    auto_class = transformers.AutoModelForCausalLM
    processor_class = transformers.AutoTokenizer

    @property
    def default_positions(self) -> tuple[str, ...]:  # type: ignore[override]
        """For running text, every token; for a chat model, its own replies, which kept more (docs/evidence.md)."""
        return ("all",) if self.chat is None else ("suffix",)

    def encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        if self.chat is None:
            return _one(self.text.plain(sample.prompt))
        return _one(self.text.written(self.chat.prompt(sample)))

    def encode_learnt(self, sample: Sample) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        assert self.chat is not None
        cut = self.text.learnt(self.chat.learnt(sample))
        return _one(cut.ids), cut.inside()

    def cut(self, sample: Sample) -> Cut:
        if self.chat is not None:
            return self._written(sample)
        return self.text.cut(sample.prompt + sample.answer(), [len(sample.prompt)], self.text.plain)

    def from_tokens(self, prompt: Sequence[int], suffix: Sequence[int], where: str) -> Features:
        """Features of a prompt given as tokens, followed by `suffix` tokens, if any.

        Raises:
            DataError: they are too long together.
        """
        return self.with_suffix(self._prompt(_one(prompt)), suffix, where)

    def check_packing(self) -> None:
        if self.gpus > 1:
            raise ValueError(f"a model over {self.gpus} GPUs cannot be packed")
        try:
            with evaluating(self.module), self.autocast():
                check_packing(self.module.base_model, 1e-1 if self.precision == "bf16" else 1e-3)
        except TypeError as error:  # its forward does not accept the layout that attention needs
            raise ValueError(f"{type(self.module).__name__} cannot be packed ({reason(error)})") from None

    def packed_batch(self, features: Sequence[Features]) -> Batch:
        inputs, layout = pack([f.tokens["input_ids"] for f in features])
        predicted = [t + start for f, start in zip(features, layout.bounds, strict=False) for t in f.layout.predicted]
        keep_P = torch.tensor(predicted, dtype=torch.long) - 1
        targets_1P = inputs["input_ids"][:, predicted]
        return Batch(inputs, keep_P, targets_1P, len(predicted), len(features), pack=layout)

    def logits(self, batch: Batch) -> Tensor:
        if batch.pack is None:
            return super().logits(batch)
        inputs = {**batch.inputs, **self._outputs, "craft_pack": batch.pack, "use_cache": False}
        with self.autocast(), packed_attention(self.module.base_model):
            if self._takes_keep:
                return self.module(**inputs, logits_to_keep=batch.keep_P).logits
            return self.module(**inputs).logits[:, batch.keep_P]

    def packed_hidden_states(self, features: Sequence[Features], layers: Sequence[int]) -> Tensor:
        with self.autocast():
            return packed_forward(self.module.base_model, [f.tokens["input_ids"] for f in features], layers)[0]

    def packed_logits(self, features: Sequence[Features], keep_N: Tensor) -> Tensor:
        with self.autocast():
            return packed_logits(self.module, [f.tokens["input_ids"] for f in features], keep_N, self._takes_keep)


def _one(ids: Sequence[int]) -> dict[str, Tensor]:
    """Tokens as a batch of one."""
    return {"input_ids": torch.tensor([list(ids)], dtype=torch.long)}
