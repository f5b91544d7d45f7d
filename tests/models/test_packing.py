"""A pack must be indistinguishable from its sequences run one by one, and refuse what it cannot compute."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from craft_ray.config import ModelConfig, parse_config
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError
from craft_ray.examples.text import byte_tokenizer
from craft_ray.models import load_model, packing
from craft_ray.models.causal_lm import CausalLM
from craft_ray.models.packing import check_packing, packed_attention, packed_forward, plan_packs
from tests.support.runs import trained

VOCABULARY = 61
WINDOW = 5
LENGTHS = (11, 1, 23, 4, WINDOW, WINDOW + 1)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "gemma": GemmaConfig(**SHAPE | {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-sliding-upper-layers": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2-without-softcap": Gemma2Config(
        **SHAPE | {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": None}
    ),
    "gemma3-own-rope-when-sliding": Gemma3TextConfig(**SHAPE | {"head_dim": 16, "sliding_window": WINDOW}),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


def build(config: object, factory: type = AutoModel, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    # A copy, because the model keeps the config and the attention is switched in it.
    model = factory.from_config(deepcopy(config), dtype=torch.float32, **changes).eval()
    # Fresh weights of 0.02 give nearly uniform attention, which would hide a wrong mask.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def alone(model: PreTrainedModel, sequence: Tensor, layers: list[int]) -> Tensor:
    """hidden_LTD of one sequence through the model's ordinary attention."""
    with torch.inference_mode():
        states = model(input_ids=sequence[None], use_cache=False, output_hidden_states=True).hidden_states
    return torch.stack([states[layer][0] for layer in layers])


def worst(model: PreTrainedModel, layers: list[int]) -> float:
    """Largest error of a pack relative to the largest state, over sequences and layers."""
    sequences = texts()
    packed_LTD, cu_seqlens = packed_forward(model, sequences, layers)
    assert cu_seqlens.tolist() == [0, 11, 12, 35, 39, 44, 50]
    errors = []
    for i, sequence in enumerate(sequences):
        expected_LTD = alone(model, sequence, layers)
        got_LTD = packed_LTD[:, cu_seqlens[i] : cu_seqlens[i + 1]]
        assert got_LTD.shape == expected_LTD.shape
        errors += [
            ((got_TD - expected_TD).abs().max() / expected_TD.abs().max()).item()
            for got_TD, expected_TD in zip(got_LTD, expected_LTD, strict=True)
        ]
    return max(errors)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pack_equals_its_sequences_one_by_one(name: str, attention: str) -> None:
    if name.startswith("gemma2") and attention == "sdpa":
        pytest.skip("transformers offers Gemma 2 no sdpa")
    model = build(CONFIGS[name], attn_implementation=attention)
    assert worst(model, [0, 1, -2, -1]) < 1e-5
    check_packing(model)


def test_the_window_is_really_shorter_than_the_sequences() -> None:
    """Guards the test above: without the band the same comparison must fail."""
    model = build(CONFIGS["mistral-sliding"])
    model.config.sliding_window = None
    without_LTD, _ = packed_forward(model, texts(), [-1])
    model.config.sliding_window = WINDOW
    with_LTD, _ = packed_forward(model, texts(), [-1])
    changed_T = (without_LTD - with_LTD)[0].abs().amax(-1) > 1e-3
    assert not changed_T[:WINDOW].any()  # The first tokens of a sequence see everything before them anyway.
    assert changed_T[WINDOW:11].any()
    assert not changed_T[39:44].any()  # A sequence exactly as long as the window is plain causal.


def test_layers_come_in_the_requested_order() -> None:
    model = build(CONFIGS["llama"])
    first_LTD, _ = packed_forward(model, texts(), [-1, 0, 2])
    second_LTD, _ = packed_forward(model, texts(), [2, 3, 0])
    assert torch.equal(first_LTD, second_LTD[[1, 2, 0]])
    assert torch.equal(first_LTD[1], model.get_input_embeddings()(torch.cat(texts())))


def test_bf16_stays_in_bf16_and_close() -> None:
    model = build(CONFIGS["gemma"])
    expected_LTD, _ = packed_forward(model, texts(), [-1])
    got_LTD, _ = packed_forward(model.to(torch.bfloat16), texts(), [-1])
    assert got_LTD.dtype == torch.bfloat16
    assert (got_LTD.float() - expected_LTD).norm() < 0.1 * expected_LTD.norm()


def test_the_hidden_states_need_no_vocabulary_projection() -> None:
    causal = build(CONFIGS["gemma"], AutoModelForCausalLM)
    with pytest.raises(ValueError, match="vocabulary"):
        packed_forward(causal, texts(), [-1])
    packed_LTD, _ = packed_forward(causal.base_model, texts((7,)), [-1])
    with torch.inference_mode():
        full = causal(input_ids=texts((7,))[0][None], output_hidden_states=True)
    torch.testing.assert_close(packed_LTD[0], full.hidden_states[-1][0], rtol=1e-5, atol=1e-5)


# --- plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 64, 4096])
def test_a_plan_holds_every_index_once_within_the_budget(budget: int) -> None:
    lengths = torch.randint(1, 90, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    packs = plan_packs(lengths, budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= budget for pack in packs)
    planned = [lengths[i] for pack in packs for i in pack]
    assert planned == sorted(lengths, reverse=True)


def test_a_plan_is_full_and_stable() -> None:
    assert plan_packs([2, 9, 2, 3, 2], budget=6) == [[1], [3, 0], [2, 4]]
    assert plan_packs([], budget=6) == []


@pytest.mark.parametrize(("lengths", "budget"), [([3, 0], 8), ([3], 0)])
def test_a_plan_refuses_empty_sequences_and_budgets(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        plan_packs(lengths, budget)


# --- the model is left as it was ----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_restored(attention: str) -> None:
    model = build(CONFIGS["llama"], AutoModelForCausalLM, attn_implementation=attention)
    before = alone(model.base_model, texts()[0], [-1])
    with packed_attention(model.base_model):
        assert model.config._attn_implementation == packing.PACKED
        with packed_attention(model.base_model):  # packed_forward within a caller's own block
            pass
        assert model.config._attn_implementation == packing.PACKED
    assert model.config._attn_implementation == attention
    packed_forward(model.base_model, texts(), [-1])
    assert model.config._attn_implementation == attention
    assert torch.equal(before, alone(model.base_model, texts()[0], [-1]))


def test_the_attention_is_restored_after_an_error() -> None:
    model = build(CONFIGS["llama"])
    with pytest.raises(IndexError):
        packed_forward(model, [torch.tensor([VOCABULARY])], [-1])
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="no layout"), packed_attention(model):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert model.config._attn_implementation == "sdpa"


def test_other_models_parts_keep_their_own_attention() -> None:
    model = build(CONFIGS["llama"], attn_implementation="eager")
    model.draft = build(CONFIGS["qwen2"], attn_implementation="sdpa")
    with packed_attention(model):
        pass
    assert model.config._attn_implementation == "eager"
    assert model.draft.config._attn_implementation == "sdpa"


# --- refusals -----------------------------------------------------------------------------------------------


def _softcap() -> PreTrainedModel:
    return build(Gemma2Config(**SHAPE | {"head_dim": 16}))


def _bidirectional_gemma() -> PreTrainedModel:
    return build(GemmaConfig(**SHAPE | {"head_dim": 16}, use_bidirectional_attention=True))


def _bidirectional_module() -> PreTrainedModel:
    model = build(CONFIGS["llama"])
    model.layers[1].self_attn.is_causal = False
    return model


def _bidirectional_config() -> PreTrainedModel:
    model = build(CONFIGS["llama"])
    model.config.is_causal = False
    return model


def _chunked() -> PreTrainedModel:
    model = build(CONFIGS["llama"])
    model.config.attention_chunk_size = 8
    return model


def _training() -> PreTrainedModel:
    return build(CONFIGS["llama"]).train()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_softcap, "softcap"),
        (_bidirectional_gemma, "both directions"),
        (_bidirectional_module, "both directions"),
        (_bidirectional_config, "both directions"),
        (_chunked, "chunks of 8"),
        (_training, "train mode"),
    ],
)
def test_what_cannot_be_packed_is_refused(make: Callable[[], PreTrainedModel], expected: str) -> None:
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=expected):
        packed_forward(model, texts(), [-1])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dropout": 0.1}, "p = 0.1"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "mask of its own"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"craft_pack": packing.PackLayout.of([2, 3], torch.device("cpu"))}, "one row of 5 tokens"),
    ],
)
def test_attention_refuses_what_it_would_have_to_ignore(changes: dict[str, object], expected: str) -> None:
    q = torch.randn(1, 4, 4, 8)
    arguments = {"attention_mask": None, "craft_pack": packing.PackLayout.of([1, 3], q.device)} | changes
    with pytest.raises(ValueError, match=expected):
        packing.attend(torch.nn.Identity(), q, q, q, **arguments)


@pytest.mark.parametrize("sequences", [[], [torch.ones(2, 2, dtype=torch.long)], texts((3, 0))])
def test_a_pack_refuses_what_is_not_a_sequence(sequences: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="1-D"):
        packed_forward(build(CONFIGS["llama"]), sequences, [-1])


@pytest.mark.parametrize("layers", [[], [4], [-5]])
def test_a_layer_that_does_not_exist_is_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="hidden states -4 to 3"):
        packed_forward(build(CONFIGS["llama"]), texts(), layers)


def test_layers_that_mix_tokens_outside_attention_are_found() -> None:
    """A short convolution runs across the borders of a pack."""
    model = build(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"]))
    with pytest.raises(ValueError, match="changes with its neighbour"):
        check_packing(model)


def test_a_model_whose_states_depend_on_the_length_of_the_row_is_found() -> None:
    """Both packs are equally long, so only the comparison with the sequence alone can tell."""
    model = build(CONFIGS["llama"])
    model.embed_tokens.register_forward_hook(lambda _, __, states: states + 0.1 * states.shape[1])
    with pytest.raises(ValueError, match="differs from the same sequence alone"):
        check_packing(model)


# --- CUDA ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernel needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gemma", "mistral-sliding"])
def test_varlen_attention_equals_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS[name]).to("cuda", torch.bfloat16)
    varlen_LTD, _ = packed_forward(model, texts(), [-1])
    monkeypatch.setattr(packing, "_VARLEN", False)
    loop_LTD, _ = packed_forward(model, texts(), [-1])
    assert (varlen_LTD - loop_LTD).float().norm() < 0.05 * loop_LTD.float().norm()


# --- task batches ---------------------------------------------------------------------------------------------------


def saved(name: str, folder: Path) -> Path:
    """A causal model of one of the families, with the byte tokenizer of the text example."""
    tokenizer = byte_tokenizer()
    config = deepcopy(CONFIGS[name])
    config.vocab_size = len(tokenizer)
    build(config, AutoModelForCausalLM).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SAMPLES = [Sample(str(i), "ab" * n, response="c" * m) for i, (n, m) in enumerate([(9, 3), (1, 1), (2, 14), (6, 2)])]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3-own-rope-when-sliding", "gpt2"])
def test_a_packed_task_batch_has_the_loss_and_gradients_of_a_padded_one(name: str, tmp_path: Path) -> None:
    config = ModelConfig(kind="causal_lm", path=str(saved(name, tmp_path)))
    model = load_model(config, "fp32")
    assert isinstance(model, CausalLM)
    model.check_packing()
    features = [model.preprocess_task(sample) for sample in SAMPLES]
    padded, packed = model.collate(features), model.packed_batch(features)
    assert packed.inputs["input_ids"].shape == (1, sum(f.layout.length for f in features))
    assert (packed.tokens, packed.samples) == (padded.tokens, padded.samples)
    gradients = []
    for batch in (padded, packed):
        model.module.zero_grad()
        loss = model.task_loss(batch)
        loss.backward()
        gradients.append((loss.detach(), {n: p.grad for n, p in model.module.named_parameters()}))
    (loss, expected), (packed_loss, got) = gradients
    assert packed_loss == pytest.approx(loss.item(), rel=1e-5)
    scale = max(float(g.norm()) for g in expected.values() if g is not None)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5 * scale)
    assert model.task_loss(padded).item() == loss.item(), "the model's own attention is back"


def test_a_packed_run_is_the_padded_one_up_to_rounding(text_model: Path, text_data: Path, tmp_path: Path) -> None:
    columns = {"prompt": "prompt", "response": "response"}
    data = {"path": str(text_data / "new_train.parquet"), "columns": columns}
    tree = {"name": "packed", "output_dir": str(tmp_path), "model": {"kind": "causal_lm", "path": str(text_model)}}
    base = parse_config(
        tree | {"task": data, "craft": {"enabled": False}, "workers": {"num_workers": 0}, "train": {"steps": 3}}, "test"
    ).changed({"train.batch_size": 4, "train.accumulate": 2, "train.check_minutes": 0})
    runs = [trained(base.changed({"train.pack": pack}), tmp_path / f"{pack}") for pack in (False, True)]
    losses = [[record["train/loss"] for record in run.read_metrics()] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "change", [{"model.gradient_checkpointing": True}, {"model.compile": True}, {"model.disable_dropout": False}]
)
def test_what_packs_do_not_go_with_is_one_line(change: dict[str, bool], tmp_path: Path) -> None:
    tree = {"name": "a", "output_dir": str(tmp_path), "model": {"path": "m"}, "task": {"path": "d"}}
    config = parse_config(tree | {"craft": {"enabled": False}, "train": {"steps": 1, "pack": True}}, "test")
    (key,) = change
    with pytest.raises(ConfigError, match=rf"train\.pack is true, but {key} is .* set train\.pack=false"):
        config.changed(change)
