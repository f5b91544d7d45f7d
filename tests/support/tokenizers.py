"""Tiny tokenizers of the families that people fine-tune, each with the chat template of its family."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from craft_ray.examples.text import byte_tokenizer

CORPUS = [
    "What is the capital of France? The capital of France is Paris. And of Italy? Rome is the capital of Italy.",
    "Name a primary color. One primary color is red. user assistant system model Certainly, be brief!",
    "Hello there, how are you? I am fine, thank you. Translate: the quick brown fox jumps over the lazy dog.",
] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GPT2 = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _byte_level(*specials: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentence_piece(prepend: bool, *specials: str) -> Tokenizer:
    """BPE on text whose spaces are ▁, as converted from SentencePiece; Llama's puts one in front of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Without a pre-tokenizer, merges would swallow whole sentences.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram(*specials: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<pad>", "</s>", "<unk>", *specials], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _around(tokenizer: Tokenizer, single: str) -> Tokenizer:
    names = [name for name in single.split() if name != "$A"]
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=tokens)
    return tokenizer


def _fast(tokenizer: Tokenizer, template: str, bos: str | None, eos: str, *more: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    if more:
        fast.add_special_tokens({"additional_special_tokens": list(more)})
    fast.chat_template = template
    return fast


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: _fast(_byte_level("<|endoftext|>"), GPT2, None, "<|endoftext|>"),
    "llama": lambda: _fast(_around(_sentence_piece(True, "<s>", "</s>"), "<s> $A"), LLAMA2, "<s>", "</s>"),
    "gemma": lambda: _fast(
        _around(_sentence_piece(False, "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos> $A"),
        GEMMA, "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
    ),
    "qwen": lambda: _fast(
        _byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        CHATML, None, "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    ),
    "mistral": lambda: _fast(
        _around(_sentence_piece(True, "<s>", "</s>", "[INST]", "[/INST]"), "<s> $A"),
        MISTRAL, "<s>", "</s>", "[INST]", "[/INST]",
    ),
    "t5": lambda: _fast(
        _around(_unigram("<|im_start|>", "<|im_end|>"), "$A </s>"), CHATML, None, "</s>", "<|im_start|>", "<|im_end|>"
    ),
}  # fmt: skip
"""By family."""

TURN_ENDS = {
    "gpt2": "<|endoftext|>", "llama": "</s>", "gemma": "<end_of_turn>", "qwen": "<|im_end|>", "mistral": "</s>",
    "t5": "<|im_end|>",
}  # fmt: skip
"""What the template of each family writes behind an assistant's turn."""


NORMALIZED = [
    (normalizers.NFC(), unicodedata.normalize("NFD", "café")),
    (normalizers.Lowercase(), "Paris"),
    (normalizers.Strip(), "  two spaces "),
]
"""What a tokenizer does to every text, and a response that is another one afterwards."""


def chat_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama with this tokenizer. Its weights are a formula, so that they are the same with every version."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, weight in enumerate(p for p in module.parameters() if p.ndim > 1):
            values = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) * (0.7 + number) ** 2)
            weight.copy_((0.15 * values).reshape(weight.shape))
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_level_chat(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte and the marks of ChatML: nothing is trained, so it is the same with every version."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer
