"""What is checked on a model when it loads: any architecture, whatever its parts and settings are called."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from craft_ray.config import ModelConfig
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, CraftError, DataError, ModelError
from craft_ray.examples.text import byte_tokenizer
from craft_ray.models import load_model
from craft_ray.models.causal_lm import CausalLM
from craft_ray.models.dropout import drawing, silence
from craft_ray.models.huggingface import HuggingFaceModel
from tests.support.weights import spread

P = 0.2
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 48,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48, "resid_pdrop": P, "embd_pdrop": P, "attn_pdrop": P}
DECODER = {
    "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "max_position_embeddings": 48, "is_decoder": True, "is_encoder_decoder": False,
    "dropout": P, "attention_dropout": P, "activation_dropout": P, "decoder_layerdrop": P,
}  # fmt: skip
HIDDEN = SMALL | {"hidden_dropout_prob": P, "attention_probs_dropout_prob": P}
EXPERTS = SMALL | {"num_key_value_heads": 2, "num_experts_per_tok": 2, "attention_dropout": P}

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": SMALL | {"attention_dropout": P},
    "Starcoder2": SMALL | {"residual_dropout": P, "embedding_dropout": P, "attention_dropout": P},
    "Falcon": SMALL | {"hidden_dropout": P, "attention_dropout": P, "alibi": False},
    "Phi": SMALL | {"resid_pdrop": P, "embd_pdrop": P, "attention_dropout": P},
    "GPTNeoX": SMALL | {"hidden_dropout": P, "attention_dropout": P},
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 8},
    "GPTBigCode": GPT,
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "hidden_dropout": P, "attention_dropout": P},
    "OPT": SMALL | {"ffn_dim": 48, "dropout": P, "attention_dropout": P, "layerdrop": P, "word_embed_proj_dim": 32},
    "BioGpt": HIDDEN | {"activation_dropout": P, "layerdrop": P},
    "Bart": DECODER,
    "Gemma2": SMALL | {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": P, "sliding_window": 8},
    "Mixtral": EXPERTS | {"num_local_experts": 4, "router_jitter_noise": P, "output_router_logits": True},
    "Qwen3Moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "output_router_logits": True},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 4},
    "Rwkv": {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "context_length": 48},
    "MiniMax": EXPERTS | {
        "num_local_experts": 2, "head_dim": 8, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "RoFormer": HIDDEN | {"embedding_size": 32, "is_decoder": True},
}  # fmt: skip
"""Dropout everywhere and under every name; sequences mixed by attention, recurrence and convolution; experts."""

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": HIDDEN, "Roberta": HIDDEN | {"max_position_embeddings": 512}, "Electra": HIDDEN | {"embedding_size": 32},
    "XLNet": {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "dropout": P},
}  # fmt: skip


def write(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny random model with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{family}Config")(**{"vocab_size": len(tokenizer)} | ids | changes)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    spread(module)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(path: Path, **changes: Any) -> HuggingFaceModel:
    model = load_model(ModelConfig(path=str(path), **{"max_length": 64} | changes), "fp32")
    assert isinstance(model, HuggingFaceModel)
    return model


def refusal(error: type[CraftError], path: Path, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        load(path, **changes)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    return caught.value.message


# --- families ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    folder = tmp_path_factory.mktemp(request.param)
    return load(write(folder, request.param, **DECODERS[request.param]))


def test_two_losses_of_one_batch_are_equal_in_training_mode(decoder: HuggingFaceModel) -> None:
    batch = decoder.collate([decoder.preprocess(Sample("0", "a prompt"), [70, 71, 72])])
    assert decoder.module.training
    with torch.no_grad():
        first = decoder.task_loss(batch).item()
        assert [decoder.task_loss(batch).item() for _ in range(3)] == [first] * 3
        decoder.module.eval()
        evaluated = decoder.task_loss(batch).item()
        decoder.module.train()
    assert evaluated == pytest.approx(first, abs=1e-5)


def test_a_prompt_is_continued_as_if_it_were_alone(decoder: HuggingFaceModel) -> None:
    features = [decoder.preprocess(Sample("0", prompt)) for prompt in ("To", "The quick brown fox", "A")]
    assert decoder.generate(features, 6) == [decoder.generate([one], 6)[0] for one in features]


def test_the_positions_that_a_model_has_are_known(decoder: HuggingFaceModel) -> None:
    batch = decoder.collate([decoder.preprocess(Sample("0", "w" * 47))])
    with torch.no_grad():
        decoder.module(**batch.inputs, use_cache=False)
        if decoder.limits.positions is None:
            batch = decoder.collate([decoder.preprocess(Sample("0", "w" * 60))])
            decoder.module(**batch.inputs, use_cache=False)
            return
    with pytest.raises(DataError, match=r"sample long has 49 tokens, the model has 48 positions .*: shorten"):
        decoder.preprocess(Sample("long", "w" * 48))
    with pytest.raises(DataError, match="a prompt has 40 tokens, which with 9 new ones are more than the model's 48"):
        decoder.generate([decoder.preprocess(Sample("0", "w" * 39))], 9)


def test_what_is_saved_is_loaded_again(decoder: HuggingFaceModel, tmp_path: Path) -> None:
    decoder.save(tmp_path)
    assert load(tmp_path).weights_fingerprint() == decoder.weights_fingerprint()


@pytest.mark.parametrize("family", ENCODERS)
def test_a_model_that_sees_the_answer_is_refused(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path, family, **ENCODERS[family])
    assert "changes with the tokens behind it" in refusal(ModelError, folder)
    assert "changes with the tokens behind it" in refusal(ModelError, folder, disable_dropout=False)


# --- made-up models: what no list of names could know -------------------------------------------------------------


def altered(
    monkeypatch: pytest.MonkeyPatch, part: type[nn.Module], change: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Change what a part of the tiny Llama returns."""
    before = part.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = before(self, *args, **kwargs)
        if isinstance(output, Tensor):
            return change(self, output)
        output.last_hidden_state = change(self, output.last_hidden_state)
        return output

    monkeypatch.setattr(part, "forward", forward)


def test_randomness_of_any_name_is_off_in_training_mode(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, LlamaMLP, lambda part, x: x * (1 + torch.rand_like(x)) if part.training else x)
    for checkpointing in (False, True):
        model = load(text_model, gradient_checkpointing=checkpointing)
        batch = model.collate([model.preprocess(Sample("0", "a prompt"), [70, 71, 72])])
        losses = [model.task_loss(batch) for _ in range(2)]
        assert losses[0].item() == losses[1].item()
        assert all(part.training for part in model.module.modules())
        losses[0].backward()
        assert all(part.training for part in model.module.modules())
    noisy = load(text_model, disable_dropout=False)
    assert noisy.task_loss(batch).item() != noisy.task_loss(batch).item()


def test_randomness_that_is_always_there_is_refused(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, LlamaMLP, lambda _, x: x * (1 + torch.rand_like(x)))
    assert "two passes over one batch differ in training mode" in refusal(ModelError, text_model)


def test_a_model_whose_samples_see_each_other_is_refused(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, LlamaModel, lambda _, x: x + x.mean((0, 1)))
    assert "changes with the tokens behind it" in refusal(ModelError, text_model)
    monkeypatch.undo()
    altered(monkeypatch, LlamaModel, lambda _, x: torch.cat([x[:1], x[1:] + x[:1, -1:]]))
    assert "change with the other samples of its batch" in refusal(ModelError, text_model)
    monkeypatch.undo()
    altered(monkeypatch, LlamaModel, lambda _, x: x * x.shape[1])  # the longest sample decides
    assert "are not the same alone as beside a longer one" in refusal(ModelError, text_model)


def test_a_model_that_fails_on_tokens_is_refused_in_one_line(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, LlamaModel, lambda _, x: x @ torch.ones(3, 3))
    assert "does not run on a few tokens (RuntimeError: mat1 and mat2" in refusal(ModelError, text_model)


def test_the_check_draws_no_random_numbers_of_the_run(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, LlamaMLP, lambda part, x: x * (1 + torch.rand_like(x)) if part.training else x)
    torch.manual_seed(7)
    load(text_model)
    assert torch.initial_seed() == 7
    found = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(3))


class Layer(nn.Module):
    """Functional dropout, of an argument that no attribute holds, around a layer of its own."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(nn.functional.dropout(x, 0.5, self.training))


def test_the_part_that_draws_is_found_and_not_the_one_around_it() -> None:
    quiet, loud = nn.Linear(4, 4), Layer(nn.Linear(4, 4))
    module = nn.Sequential(quiet, Layer(nn.Sequential(loud, nn.Dropout(0.5)))).train()
    with drawing(module, torch.device("cpu")) as found:
        module(torch.ones(2, 4))
    assert found == {loud, module[1], module[1].inside[1]}

    x = torch.ones(2, 4)
    output = silence(module, lambda: module(x), torch.device("cpu"))
    assert torch.equal(output, module(x))
    assert all(part.training for part in module.modules())
    with pytest.raises(RuntimeError):
        module(torch.ones(3))
    assert all(part.training for part in module.modules()), "an exception left a part in evaluation mode"


# --- quantised folders, and weights that the model has no use for -----------------------------------------------


@pytest.fixture
def folder(text_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(text_model, tmp_path / "copy"))


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization_config": FP8}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"quant_method": "gguf"}}, "gguf"),
        ({"quantization_config": {"quant_method": "what comes next year"}}, "what comes next year"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": FP8}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
    ],
)
def test_a_quantised_folder_is_refused_before_its_weights_are_read(
    changes: dict[str, Any], method: str, folder: Path
) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    configure(folder, **changes)
    message = refusal(ConfigError, folder)
    assert "its weights are quantised" in message
    assert method in message


def test_weights_of_a_part_that_does_not_use_them_are_refused(folder: Path) -> None:
    """FP8 weights whose config lost its quantization_config, or a config that leaves the biases out."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    weights[f"{name}_scale_inv"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refusal(ModelError, folder)
    assert f"{name.removeprefix('model.')}_scale_inv" in message
    assert "1 of its weights belong to parts of a LlamaForCausalLM that do not use them" in message


def test_weights_of_another_head_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the masks of older versions of transformers, beside the weights that an attention layer's parts have."""
    extra = {"value_head.weight": torch.ones(1, 2), "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}
    weights = load_file(folder / "model.safetensors") | extra
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load(folder)
    [line] = [record.getMessage() for record in caplog.records if record.name == "craft_ray.models.loading"]
    assert f"model {folder}: 2 of its weights are no part of a LlamaForCausalLM (e.g. " in line


# --- tokens and hidden states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_special_token_without_an_embedding(name: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({name: "[NEW]"})
    tokenizer.save_pretrained(folder)
    last = len(tokenizer) - 2
    assert f"{name} '[NEW]' of its tokenizer has id {last + 1}, but the model has embeddings for ids 0 to {last}" in (
        refusal(ConfigError, folder)
    )


def test_a_token_of_the_data_without_an_embedding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    model = load(folder)
    model.preprocess(Sample("s1", "no tool"))
    with pytest.raises(DataError, match=r"sample s2 has the token '<tool>' with id \d+, but the model has embeddings"):
        model.preprocess(Sample("s2", "use <tool>"))


def test_a_hidden_state_of_another_width(tmp_path: Path) -> None:
    """OPT-350m projects its last one to the width of the embeddings."""
    model = load(write(tmp_path, "OPT", **DECODERS["OPT"] | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}))
    batch = model.collate([model.preprocess(Sample("0", "a prompt"))])
    assert [tuple(state.shape[2:]) for state in model.hidden_states(batch, [0, 2])] == [(32,), (32,)]
    with pytest.raises(
        ModelError, match=r"hidden state 3 has width 16, those of its layers have 32.*layers=\[-3, -2\]"
    ):
        model.hidden_states(batch, [2, 3])
    assert isinstance(model, CausalLM)
    with pytest.raises(ValueError, match="its hidden states have different widths"):
        model.check_packing()
