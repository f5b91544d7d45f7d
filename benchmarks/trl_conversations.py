"""What TRL makes of two-turn conversations: tokens, labels and loss, for a test to compare with.

Run where TRL is installed; it writes tests/models/trl_conversations.json:

    pip install -c constraints.txt trl
    python -m benchmarks.trl_conversations
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.tokenizers import CHATML_MARKED, byte_level_chat, chat_model

OUT = Path("tests/models/trl_conversations.json")
CONVERSATIONS = [
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "Rome."},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a primary color."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Naïve café, ✓?"},
        {"role": "assistant", "content": "Oui, ✓ naïve.\nOn two lines."},
    ],
]


def by_trl(model: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Tokens, labels and loss of the conversations as one batch of TRL's trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            max_length=None,
            per_device_train_batch_size=len(CONVERSATIONS),
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            dataloader_pin_memory=False,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=settings,
            train_dataset=Dataset.from_dict({"messages": CONVERSATIONS}),
            processing_class=tokenizer,
        )
        rows = [dict(row) for row in trainer.train_dataset]
        batch = trainer.data_collator(rows)
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    sizes = batch["attention_mask"].sum(1).tolist()
    return {
        "tokens": [row[:size].tolist() for row, size in zip(batch["input_ids"], sizes, strict=True)],
        "labels": [row[:size].tolist() for row, size in zip(batch["labels"], sizes, strict=True)],
        "loss": loss,
    }


def main() -> None:
    tokenizer = byte_level_chat(CHATML_MARKED)
    with tempfile.TemporaryDirectory() as folder:
        found = by_trl(chat_model(Path(folder), tokenizer), tokenizer)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    OUT.write_text(json.dumps({"conversations": CONVERSATIONS, **found, "by": versions}, ensure_ascii=False) + "\n")
    print(f"{OUT}: loss {found['loss']:.6f}, {[len(row) for row in found['tokens']]} tokens")


if __name__ == "__main__":
    main()
