"""Every kind of model computes what transformers computes for it, sample by sample, whatever the batch is."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from craft_ray.config import ModelConfig
from craft_ray.data.conversation import Conversation
from craft_ray.data.images import decode_image
from craft_ray.data.sample import Sample
from craft_ray.errors import DataError
from craft_ray.examples.text import byte_tokenizer
from craft_ray.models import load_model
from craft_ray.models.base import IGNORE, evaluating, resolve_layers
from craft_ray.models.capabilities import packing_model
from craft_ray.models.dropout import disable_dropout
from craft_ray.models.huggingface import HuggingFaceModel
from tests.support.experiments import Digits
from tests.support.weights import spread

TEXT = ("llama", "gemma", "qwen2", "gpt2")
VISION = ("paligemma", "llava", "gemma3")
FAMILIES = (*TEXT, *VISION)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EYE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
}  # fmt: skip


# --- tiny models of several families ------------------------------------------------------------------------


def tokenizer_with(*specials: str, bos: bool = True, **named: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with more special tokens, those in `named` as attributes; GPT-2 puts none in front."""
    backend = byte_tokenizer().backend_tokenizer
    if not bos:
        from tokenizers.processors import ByteLevel

        backend.post_processor = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>" if bos else None,
        extra_special_tokens=named,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def language_model(folder: Path, make: Callable[[dict[str, Any]], Any], bos: bool = True) -> None:
    tokenizer = tokenizer_with(bos=bos)
    write(folder, AutoModelForCausalLM, make(token_ids(tokenizer)), tokenizer)


def llava(folder: Path) -> None:
    """CLIP with a class token that is dropped, 4 image tokens; no token types."""
    tokenizer = tokenizer_with("<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**EYE, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(**SMALL, **token_ids(tokenizer)),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
    )
    write(folder, AutoModelForImageTextToText, config, processor)


def gemma3(folder: Path) -> None:
    """SigLIP pooled to 4 image tokens that see each other in both directions; token type 1 is an image."""
    tokenizer = tokenizer_with(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 8, "width": 8}), tokenizer=tokenizer, image_seq_length=4
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8, **token_ids(tokenizer)),
        vision_config=SiglipVisionConfig(**EYE, patch_size=2, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    write(folder, AutoModelForImageTextToText, config, processor)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "gemma": lambda folder: language_model(
        folder, lambda ids: GemmaConfig(**SMALL | {"num_key_value_heads": 1}, head_dim=16, **ids)
    ),
    "qwen2": lambda folder: language_model(folder, lambda ids: Qwen2Config(**SMALL, **ids)),
    "gpt2": lambda folder: language_model(
        folder, lambda ids: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **ids), bos=False
    ),
    "llava": llava,
    "gemma3": gemma3,
}


def write(folder: Path, factory: Any, config: Any, processor: Any) -> None:
    torch.manual_seed(0)
    module = factory.from_config(config)
    spread(module)  # also because Gemma 3's projector starts at zero, so that no image would count
    module.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder_of(digits: Digits, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders = {"paligemma": digits.model, "llama": text_model}

    def build(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            BUILDERS[name](folders[name])
        return folders[name]

    return build


def settings(name: str, folder: Path, **changes: Any) -> ModelConfig:
    kind = "vision_language" if name in VISION else "causal_lm"
    return ModelConfig(kind=kind, path=str(folder), **{"max_length": 64} | changes)


@pytest.fixture(scope="module")
def load(folder_of: Callable[[str], Path]) -> Callable[..., HuggingFaceModel]:
    """A model of a family; those in fp32 without changes are shared, so leave them as they are."""
    shared: dict[str, HuggingFaceModel] = {}

    def get(name: str, precision: str = "fp32", **changes: Any) -> HuggingFaceModel:
        if precision != "fp32" or changes:
            return load_model(settings(name, folder_of(name), **changes), precision)
        if name not in shared:
            shared[name] = load_model(settings(name, folder_of(name)), "fp32")
        return shared[name]

    return get


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, load: Callable[..., HuggingFaceModel]) -> HuggingFaceModel:
    return load(name)


# --- samples, and what transformers makes of one --------------------------------------------------------------


BEGIN, SOFT = "<start_of_image>", "<image_soft_token>"
"""Gemma 3's mark of an image, and what its processor puts there for each part of it."""


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def samples(name: str) -> list[Sample]:
    """Prompts and responses of mixed lengths."""
    if name == "paligemma":  # its tokenizer knows a few words
        texts = [("which digit is this?", "7"), ("digit", "052"), ("is this which digit is this?", "31")]
    else:
        texts = [("The quick brown fox", " jumps"), ("To", " be, or not"), ("naïve café:", " ✓"), ("a b", "c")]
    if name == "gpt2":
        texts.append(("", "no prompt at all"))
    images = [png(seed) if name in VISION else None for seed in range(len(texts))]
    return [
        Sample(str(i), prompt, image, response)
        for i, ((prompt, response), image) in enumerate(zip(texts, images, strict=True))
    ]


def encoded(name: str, model: HuggingFaceModel, sample: Sample, suffix: list[int]) -> dict[str, Tensor]:
    """One unpadded sequence as the family's own processor has it, with `suffix` after the prompt."""
    if name in TEXT:
        inputs = {"input_ids": torch.tensor([model.tokenizer(sample.prompt)["input_ids"]], dtype=torch.long)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        mark = {"paligemma": "<image>", "llava": "<image>", "gemma3": "<start_of_image>"}[name]
        image = Image.open(io.BytesIO(sample.image or b"")).convert("RGB")
        inputs = dict(model.processor(images=[image], text=[mark + sample.prompt], return_tensors="pt"))
        inputs.pop("labels", None)
    tail = {"input_ids": torch.tensor([suffix], dtype=torch.long)}
    tail["attention_mask"] = torch.ones_like(tail["input_ids"])
    tail["token_type_ids"] = torch.full_like(tail["input_ids"], name == "paligemma")
    return {key: torch.cat([t, tail[key]], 1) if key in tail else t for key, t in inputs.items()}


def suffix_of(model: HuggingFaceModel, sample: Sample) -> list[int]:
    ids = model.tokenizer(sample.response, add_special_tokens=False)["input_ids"]
    return [*ids, model.tokenizer.eos_token_id]


def own_loss(name: str, model: HuggingFaceModel, sample: Sample) -> tuple[float, int]:
    """transformers' own loss with labels, and the number of tokens it is the mean over."""
    suffix = suffix_of(model, sample)
    inputs = encoded(name, model, sample, suffix)
    labels = inputs["input_ids"].clone()
    labels[:, : -len(suffix)] = IGNORE
    predicted = int((labels[:, 1:] != IGNORE).sum())
    with torch.inference_mode():
        return model.module(**inputs, labels=labels).loss.item(), predicted


def features_of(model: HuggingFaceModel, name: str) -> list[Any]:
    return [model.preprocess(s, model.response_tokens(s)) for s in samples(name)]


class Calls:
    """Outputs of a module while the block runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.outputs: list[Tensor] = []
        self._hook = module.register_forward_hook(lambda _m, _i, output: self.outputs.append(output))

    def __enter__(self) -> list[Tensor]:
        return self.outputs

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


# --- losses -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_models_own(name: str, model: HuggingFaceModel) -> None:
    losses = [own_loss(name, model, sample) for sample in samples(name)]
    total = sum(count for _, count in losses)
    batch = model.collate(features_of(model, name))
    assert batch.count == batch.tokens == total
    assert batch.samples == len(losses)
    expected = sum(loss * count for loss, count in losses) / total
    loss = model.task_loss(batch)
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    for features, (one, _) in zip(features_of(model, name), losses, strict=True):
        assert model.token_loss(model.collate([features])).item() == pytest.approx(one, abs=1e-5)


def test_log_probabilities_add_up_to_the_loss(name: str, model: HuggingFaceModel) -> None:
    batch = model.collate(features_of(model, name))
    with torch.inference_mode():
        log_probs_BP, likeliest_BP = model.token_log_probs(batch)
        logits_BPV = model.logits(batch)
    assert -log_probs_BP.sum().item() / batch.tokens == pytest.approx(model.token_loss(batch).item(), abs=1e-5)
    nothing = batch.targets_BP == IGNORE
    assert (log_probs_BP[nothing] == 0).all()
    assert likeliest_BP[nothing].all()
    assert torch.equal(likeliest_BP[~nothing], (logits_BPV.argmax(-1) == batch.targets_BP)[~nothing])


def test_only_logits_that_predict_something_are_computed(name: str, model: HuggingFaceModel) -> None:
    batch = model.collate(features_of(model, name))
    with Calls(model.module.get_output_embeddings()) as outputs:
        model.task_loss(batch)
    assert [tuple(o.shape[:2]) for o in outputs] == [(batch.samples, len(batch.keep_P))]
    assert len(batch.keep_P) < batch.inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "paligemma"])
def test_bf16_is_the_type_of_the_arithmetic_only(family: str, load: Callable[..., HuggingFaceModel]) -> None:
    exact, rounded = load(family), load(family, "bf16")
    batch = exact.collate(features_of(exact, family))
    assert exact.logits(batch).dtype == torch.float32
    assert rounded.logits(batch).dtype == torch.bfloat16
    assert {p.dtype for p in rounded.module.parameters()} == {torch.float32}
    loss = rounded.task_loss(batch)
    assert loss.dtype == torch.float32
    assert loss.item() != exact.task_loss(batch).item()
    assert loss.item() == pytest.approx(exact.task_loss(batch).item(), rel=0.05)


def test_a_batch_without_a_target_is_an_error(load: Callable[..., HuggingFaceModel]) -> None:
    model = load("gpt2", append_eos=False)
    lone = Sample("lone", "", response="x")  # no token before it could predict it
    batch = model.collate([model.preprocess(lone, model.response_tokens(lone))])
    with pytest.raises(DataError, match="no token to predict"):
        model.task_loss(batch)


# --- hidden states ------------------------------------------------------------------------------------------------


def test_hidden_states_of_a_padded_batch_are_those_of_each_sample_alone(name: str, model: HuggingFaceModel) -> None:
    layers = range(model.num_hidden_states)
    features = features_of(model, name)
    batch = model.collate(features)
    with torch.inference_mode():
        batched = model.hidden_states(batch, layers)
        for row, sample in enumerate(samples(name)):
            inputs = encoded(name, model, sample, suffix_of(model, sample))
            alone = model.module(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            assert len(alone) == model.num_hidden_states
            length = features[row].layout.length
            assert alone[0].shape == (1, length, model.hidden_size)
            for ours, theirs in zip(batched, alone, strict=True):
                torch.testing.assert_close(ours[row, :length], theirs[0], rtol=1e-4, atol=1e-5)
    assert len({f.layout.length for f in features}) > 1, "nothing was padded"


def test_the_last_hidden_state_feeds_the_vocabulary(name: str, model: HuggingFaceModel) -> None:
    """So it is taken after the final norm."""
    batch = model.collate(features_of(model, name))
    with torch.inference_mode():
        [last] = model.hidden_states(batch, [model.num_hidden_states - 1])
        through_head = model.module.get_output_embeddings()(last[:, batch.keep_P])
        torch.testing.assert_close(through_head, model.logits(batch), rtol=1e-4, atol=1e-4)


def test_a_suffix_does_not_change_the_prompt(name: str, model: HuggingFaceModel) -> None:
    sample = samples(name)[0]
    layers = range(model.num_hidden_states)
    states = []
    for suffix in ([], [5], [9, 3, 4]):
        features = model.preprocess(sample, suffix)
        assert features.layout.length == features.layout.prompt_length + len(suffix)
        with torch.inference_mode():
            found = model.hidden_states(model.collate([features]), layers)
        states.append(torch.stack([layer[0, : features.layout.prompt_length] for layer in found]))
    for longer in states[1:]:  # another length rounds by some 1e-6; seeing the suffix would change all digits
        torch.testing.assert_close(longer, states[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_extended_is_preprocessed_with_its_suffix(name: str, model: HuggingFaceModel) -> None:
    for sample in (s for s in samples(name) if s.prompt):
        prompt, suffix = model.preprocess(sample), model.response_tokens(sample)
        before = {key: tensor.clone() for key, tensor in prompt.tokens.items()}
        for tokens in (suffix, suffix[:1], []):
            whole, extended = model.preprocess(sample, tokens), model.with_suffix(prompt, tokens, sample.where)
            assert extended.layout == whole.layout
            for ours, theirs in ((extended.tokens, whole.tokens), (extended.images, whole.images)):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
                assert all(ours[key].dtype == theirs[key].dtype for key in theirs)
        assert all(torch.equal(prompt.tokens[key], before[key]) for key in before), "the prompt is still the prompt"


def test_a_model_packs_where_its_samples_are_rows_of_tokens(name: str, model: HuggingFaceModel) -> None:
    if name in TEXT:
        assert packing_model(model) is model
    else:
        with pytest.raises(ValueError, match="a model of kind vision_language cannot be packed"):
            packing_model(model)


def test_hidden_states_leave_the_vocabulary_projection_out(name: str, model: HuggingFaceModel) -> None:
    batch = model.collate(features_of(model, name))
    with Calls(model.module.get_output_embeddings()) as outputs:
        model.hidden_states(batch, [0, 1])
    assert outputs == []


def test_layers_come_in_the_requested_order(load: Callable[..., HuggingFaceModel]) -> None:
    model = load("llama")
    batch = model.collate(features_of(model, "llama"))
    with torch.inference_mode():
        first, last = model.hidden_states(batch, [0, 3])
        swapped = model.hidden_states(batch, [3, 0])
        embedded = model.module.get_input_embeddings()(batch.inputs["input_ids"])
    assert torch.equal(first, swapped[1])
    assert torch.equal(last, swapped[0])
    assert torch.equal(first, embedded)


def test_layer_numbers() -> None:
    assert resolve_layers([-2, -1], 5) == (3, 4)
    assert resolve_layers([0, 4], 5) == (0, 4)
    for wrong in ([5], [-6]):
        with pytest.raises(ValueError, match="out of range"):
            resolve_layers(wrong, 5)
    with pytest.raises(ValueError, match="twice"):
        resolve_layers([-1, 4], 5)


# --- tokens of images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "count"), [("paligemma", 16), ("llava", 4), ("gemma3", 4)])
def test_image_tokens_are_found(family: str, count: int, load: Callable[..., HuggingFaceModel]) -> None:
    """They are those whose embeddings change with the image."""
    model = load(family)
    one = samples(family)[0]
    features = [model.preprocess(s) for s in (one, replace(one, image=png(77)))]
    tokens = features[0].layout.image_tokens
    assert len(tokens) == count
    with torch.inference_mode():
        [embedded_BSD] = model.hidden_states(model.collate(features), [0])
    changed = (embedded_BSD[0] != embedded_BSD[1]).any(-1)
    assert tuple(torch.nonzero(changed).flatten().tolist()) == tokens


def test_paligemma_gets_what_its_processor_makes_of_a_suffix(load: Callable[..., HuggingFaceModel]) -> None:
    model = load("paligemma")
    chosen = samples("paligemma")
    features = features_of(model, "paligemma")
    batch = model.collate(features)
    theirs = model.processor(
        images=[decode_image(s.image or b"", s.id) for s in chosen],
        text=["<image>" + s.prompt for s in chosen],
        suffix=[s.response for s in chosen],
        return_tensors="pt",
        padding="longest",
    )
    for key in ("input_ids", "attention_mask", "token_type_ids", "pixel_values"):
        assert torch.equal(batch.inputs[key], theirs[key]), key
    labels = torch.full_like(theirs["labels"], IGNORE)
    labels[:, batch.keep_P + 1] = batch.targets_BP
    assert torch.equal(labels, theirs["labels"])
    loss = model.module(**theirs).loss
    assert model.task_loss(batch).item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "at", "inserted", "appended"),
    [("paligemma", 0, 17, 1), ("llava", 1, 4, 0), ("gemma3", 1, 10, 0)],  # with BOS in front of it, or behind it
)
def test_image_tokens_are_put_back_where_the_processor_puts_them(
    family: str, at: int, inserted: int, appended: int, load: Callable[..., HuggingFaceModel]
) -> None:
    model = load(family)
    for one in samples(family):
        whole = model.preprocess(one)
        ids = np.asarray(model.text.plain(one.prompt), np.int32)
        assert not model.image_tokens(torch.from_numpy(ids))
        [reading] = model.readings(ids, np.asarray(whole.images["pixel_values"][0]))
        assert (reading.at, len(reading.inserted), len(reading.appended)) == (at, inserted, appended)
        assert reading.prompt(ids).tolist() == whole.tokens["input_ids"].tolist()
        assert f"{inserted} tokens put back for the image" in reading.words


@pytest.mark.parametrize("family", ["llama", "paligemma"])
def test_tensors_of_an_imported_cache_give_the_same_features(
    family: str, load: Callable[..., HuggingFaceModel]
) -> None:
    model = load(family)
    sample = samples(family)[0]
    ours = model.preprocess(sample, [5, 6])
    prompt = ours.tokens["input_ids"][: ours.layout.prompt_length].numpy()
    pixels = ours.images["pixel_values"][0].numpy() if ours.images else None
    theirs = model.from_tensors(prompt, pixels, [5, 6])
    assert theirs.layout == ours.layout
    assert theirs.tokens.keys() == ours.tokens.keys()
    assert all(torch.equal(theirs.tokens[key], ours.tokens[key]) for key in ours.tokens)
    assert all(torch.equal(theirs.images[key], ours.images[key]) for key in ours.images)


# --- generation -------------------------------------------------------------------------------------------------


def greedy(name: str, model: HuggingFaceModel, sample: Sample, most: int) -> list[int]:
    """The most likely token repeatedly, by complete forward passes without a cache."""
    suffix: list[int] = []
    while len(suffix) < most and (not suffix or suffix[-1] != model.tokenizer.eos_token_id):
        with torch.inference_mode():
            logits = model.module(**encoded(name, model, sample, suffix), use_cache=False).logits
        suffix.append(int(logits[0, -1].argmax()))
    return suffix


def test_generation_of_mixed_lengths_is_greedy(name: str, model: HuggingFaceModel) -> None:
    chosen = [sample for sample in samples(name) if sample.prompt]
    features = [model.preprocess(sample) for sample in chosen]
    expected = [greedy(name, model, sample, 6) for sample in chosen]
    assert model.generate(features, 6) == expected
    assert [model.generate([one], 6)[0] for one in features] == expected
    assert model.module.training, "the mode was not restored"


def test_generation_ends_with_the_end_of_sequence_token(load: Callable[..., HuggingFaceModel]) -> None:
    model = load("llama", append_eos=True)
    eos = model.tokenizer.eos_token_id
    with torch.no_grad():  # its embedding, which is tied, wins every time but for one prompt's first token
        model.module.get_output_embeddings().weight[eos] *= 50
    chosen = samples("llama")
    answers = model.generate([model.preprocess(s) for s in chosen], 8)
    assert answers == [greedy("llama", model, s, 8) for s in chosen]
    assert any(answer[-1] == eos for answer in answers)
    assert all(eos not in answer[:-1] for answer in answers)


def test_what_the_folder_says_about_sampling_does_not_count(load: Callable[..., HuggingFaceModel]) -> None:
    """Qwen's folders come with a repetition penalty, for example; the greedy suffix must not depend on it."""
    model = load("qwen2", append_eos=True)
    features = [model.preprocess(sample) for sample in samples("qwen2")]
    expected = model.generate(features, 8)
    own = model.module.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 8
    own.suppress_tokens = sorted({token for answer in expected for token in answer})
    assert model.generate(features, 8) == expected
    assert model.module.generation_config is own


def test_decoding_leaves_special_tokens_out(load: Callable[..., HuggingFaceModel]) -> None:
    model = load("llama")
    sample = Sample("a", "", response="naïve ✓")
    assert model.decode(model.response_tokens(sample)) == "naïve ✓"


def test_the_response_ends_with_eos_if_the_config_says_so(name: str, load: Callable[..., HuggingFaceModel]) -> None:
    sample = samples(name)[0]
    closed, open_ = load(name), load(name, append_eos=False)
    ids = closed.tokenizer(sample.response, add_special_tokens=False)["input_ids"]
    assert closed.response_tokens(sample) == [*ids, closed.tokenizer.eos_token_id]
    assert open_.response_tokens(sample) == ids


# --- chat templates -----------------------------------------------------------------------------------------------

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatting(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str, str], HuggingFaceModel]:
    """A model of a family with a chat template."""

    def get(family: str, template: str) -> HuggingFaceModel:
        folder = shutil.copytree(folder_of(family), tmp_path / family)
        (folder / "chat_template.jinja").write_text(template)
        return load_model(settings(family, folder, chat_template=True), "fp32")

    return get


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_chat_template_writes_the_prompt(
    family: str,
    load: Callable[..., HuggingFaceModel],
    chatting: Callable[[str, str], HuggingFaceModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, model = load(family), chatting(family, TURNS)
    sample = replace(samples(family)[0], prompt="Hi")
    features = model.preprocess(sample, [5])
    text = model.tokenizer.decode(features.tokens["input_ids"][:-1])
    assert text == f"<bos>[user]{'<image>' * (4 if family == 'llava' else 0)}Hi[assistant]"
    assert features.layout.length == features.layout.prompt_length + 1
    before = model.preprocessor_fingerprint()
    assert before != plain.preprocessor_fingerprint()
    monkeypatch.setattr(model.processor, "chat_template", TURNS.replace("[assistant]", "[you]"))
    assert model.preprocessor_fingerprint() != before


@pytest.mark.parametrize(("family", "mark"), [("llava", "<image>"), ("gemma3", "<start_of_image>")])
def test_a_conversation_with_images_is_what_the_processor_makes_of_it(
    family: str, mark: str, chatting: Callable[[str, str], HuggingFaceModel]
) -> None:
    template = (
        TURNS.replace("<image>", mark).replace("[{{ m.role }}]", "[{{ m.role[0] }}]").replace("[assistant]", "[a]")
    ).replace(
        "{% endif %}{% endfor %}{% if add", "{% endif %}{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add"
    )
    model = chatting(family, template)
    image, pixels = {"type": "image"}, (png(1), png(2))
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
        {"role": "user", "content": [{"type": "text", "text": "B?"}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    talk = Sample("0", "", response="two", conversation=Conversation(tuple(turns[:-1]), turns[-1], pixels))
    features = model.preprocess_task(talk)
    shown = iter(decode_image(data, "") for data in pixels)
    filled = [
        {**turn, "content": [{**p, "image": next(shown)} if p["type"] == "image" else p for p in turn["content"]]}
        for turn in turns
    ]
    own = model.processor.apply_chat_template(filled, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(features.tokens["input_ids"], own["input_ids"][0])
    assert torch.equal(features.images["pixel_values"], own["pixel_values"])
    assert len(features.layout.image_tokens) == 8
    learnt = features.tokens["input_ids"][list(features.layout.predicted)]
    assert model.tokenizer.decode(learnt) == "one<eos>two<eos>"
    # Only the last turn is the response, and both ways are the same sequence.
    answered = model.preprocess(talk, model.response_tokens(talk))
    assert torch.equal(answered.tokens["input_ids"], features.tokens["input_ids"])
    assert model.tokenizer.decode(model.response_tokens(talk)) == "two<eos>"
    # A conversation without an image may share its batch.
    plain = Sample("1", "", response="two", conversation=Conversation((turns[2] | {"content": "B?"},), turns[-1]))
    both = model.collate([features, model.preprocess_task(plain)])
    alone = [model.collate([one]) for one in (features, model.preprocess_task(plain))]
    losses = [(model.task_loss(batch).item(), batch.tokens) for batch in alone]
    expected = sum(loss * count for loss, count in losses) / both.tokens
    assert model.task_loss(both).item() == pytest.approx(expected, rel=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------


def test_a_sample_that_is_too_long_is_never_cut(name: str, load: Callable[..., HuggingFaceModel]) -> None:
    length = load(name).preprocess(samples(name)[0], [5, 6]).layout.length
    fits, short = load(name, max_length=length), load(name, max_length=length - 1)
    assert fits.preprocess(samples(name)[0], [5, 6]).layout.length == length
    with pytest.raises(DataError, match=rf"sample 0 has {length} tokens, model.max_length is {length - 1}"):
        short.preprocess(samples(name)[0], [5, 6])


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (Sample("s7", "digit"), "sample s7 has no image.*columns.image"),
        (Sample("s7", "digit", b"no image"), "sample s7: its image of 8 bytes does not decode"),
        (Sample("s7", "digit", b""), "sample s7: its image of 0 bytes does not decode"),
        (Sample("s7", "digit", png(0)[:80]), "sample s7: its image of 80 bytes does not decode"),
        (
            Sample("s7", "<image><image>digit", png(0)),
            "sample s7: its prompt has <image> 2 times, but the row has 1 image: name each of them once",
        ),
    ],
)
def test_a_missing_or_damaged_image(sample: Sample, expected: str, load: Callable[..., HuggingFaceModel]) -> None:
    with pytest.raises(DataError, match=expected):
        load("paligemma").preprocess(sample)


@pytest.mark.parametrize(("family", "token"), [("paligemma", "<image>"), ("llava", "<image>"), ("gemma3", SOFT)])
def test_an_image_token_in_an_answer(family: str, token: str, load: Callable[..., HuggingFaceModel]) -> None:
    """transformers would look for the picture of each, in the middle of a run."""
    model = load(family)
    sample = replace(samples(family)[0], response=f"7{token}", origin="row 3")
    said = rf"row 3 has {token} after its prompt, which .* would read as part of an image .* remove it"
    with pytest.raises(DataError, match=said) as caught:
        model.preprocess_task(sample)
    assert "\n" not in caught.value.message
    with pytest.raises(DataError, match=said):
        model.preprocess(sample, model.response_tokens(sample))


def test_an_image_token_in_a_prompt_that_is_not_its_mark(load: Callable[..., HuggingFaceModel]) -> None:
    sample = replace(samples("gemma3")[0], prompt=f"digit {SOFT}?")
    with pytest.raises(DataError, match=rf"sample 0: {SOFT} is in its text 1 times, .* but the row has 1 image to be"):
        load("gemma3").preprocess(sample)


@pytest.mark.parametrize(
    ("family", "mark", "written", "said"),
    [
        ("llava", "<image>", "<image>", "<image> is in its text 2 times, .* but the row has 1 image to be"),
        ("gemma3", BEGIN, BEGIN, f"{BEGIN} is in its text 2 times, .* but the row has 1 image to be"),
        ("gemma3", BEGIN, SOFT, f"{SOFT} is in its text 1 times"),
    ],
)
def test_an_image_token_in_a_turn_of_the_assistant(
    family: str, mark: str, written: str, said: str, chatting: Callable[[str, str], HuggingFaceModel]
) -> None:
    model = chatting(family, TURNS.replace("<image>", mark))
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]}
    told, last = {"role": "assistant", "content": f"a {written}"}, {"role": "assistant", "content": "b"}
    more = {"role": "user", "content": "B?"}
    first = Sample("0", "", response="a", conversation=Conversation((asked,), told, (png(1),)))
    later = Sample("0", "", response="b", conversation=Conversation((asked, told, more), last, (png(1),)))
    for sample in (first, later):
        with pytest.raises(DataError, match=f"sample 0: {said}"):
            model.preprocess_task(sample)


def test_an_empty_sample(load: Callable[..., HuggingFaceModel]) -> None:
    with pytest.raises(DataError, match="sample s1 is empty"):
        load("gpt2").preprocess(Sample("s1", ""))
    with pytest.raises(DataError, match=r"sample s1 has no response.*columns.response"):
        load("llama").response_tokens(Sample("s1", "a"))


# --- training mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "paligemma"])
def test_gradient_checkpointing_changes_no_number(family: str, load: Callable[..., HuggingFaceModel]) -> None:
    results = []
    for checkpointing in (False, True):
        model = load(family, gradient_checkpointing=checkpointing)
        assert model.module.is_gradient_checkpointing is checkpointing
        batch = model.collate(features_of(model, family))
        [last] = model.hidden_states(batch, [model.num_hidden_states - 1])
        loss = model.task_loss(batch)
        (loss + last.square().mean()).backward()
        results.append([loss.detach(), *(p.grad for p in model.module.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    for without, with_ in zip(*results, strict=True):
        torch.testing.assert_close(with_, without, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def dropping(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Folders of models whose config asks for dropout of one half."""

    def build(family: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-dropout")
        module = AutoModelForCausalLM.from_pretrained(folder_of(family))
        for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
            if hasattr(module.config, key):
                setattr(module.config, key, 0.5)
        module.save_pretrained(folder)
        tokenizer_with(bos=family != "gpt2").save_pretrained(folder)
        return folder

    return build


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_is_off_in_training_mode(family: str, dropping: Callable[[str], Path]) -> None:
    folder = dropping(family)
    still = load_model(settings(family, folder), "fp32")
    batch = still.collate(features_of(still, family))
    assert still.module.training
    once, again = still.logits(batch), still.logits(batch)
    still.module.eval()
    assert torch.equal(once, again)
    assert torch.equal(once, still.logits(batch))

    noisy = load_model(settings(family, folder, disable_dropout=False), "fp32")
    assert not torch.equal(noisy.logits(batch), noisy.logits(batch)), "the folder has no dropout to disable"


def test_evaluating_leaves_every_part_in_the_mode_it_was_in() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU()))
    module.train()
    module[1][0].eval()  # a part that is frozen
    before = [part.training for part in module.modules()]
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == before
    with pytest.raises(KeyError), evaluating(module):
        raise KeyError
    assert [part.training for part in module.modules()] == before


def test_every_form_of_dropout_is_disabled() -> None:
    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Dropout(0.5)
            self.attention_dropout = self.dropout = self.activation_dropout = self.layerdrop = 0.5

    part = torch.nn.Sequential(Part(), torch.nn.Dropout1d(0.3))
    disable_dropout(part)
    inner = part[0]
    assert inner.layer.p == 0
    assert part[1].p == 0
    assert (inner.attention_dropout, inner.dropout, inner.activation_dropout, inner.layerdrop) == (0, 0, 0, 0)


# --- identity -------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same_model(name: str, model: HuggingFaceModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    again = load_model(settings(name, tmp_path), "fp32")
    ours, theirs = model.module.state_dict(), again.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.weights_fingerprint() == model.weights_fingerprint()
    assert again.preprocessor_fingerprint() == model.preprocessor_fingerprint()
    assert torch.equal(
        again.logits(again.collate(features_of(again, name))), model.logits(model.collate(features_of(model, name)))
    )


def test_the_number_of_image_tokens_is_part_of_the_identity(load: Callable[..., HuggingFaceModel]) -> None:
    """LLaVA's processor, not its image processor, holds the patch size."""
    model, other = load("llava"), load("llava", disable_dropout=True)
    assert model.preprocessor_fingerprint() == other.preprocessor_fingerprint()
    other.processor.patch_size = 2
    assert other.preprocess(samples("llava")[0]).layout != model.preprocess(samples("llava")[0]).layout
    assert model.preprocessor_fingerprint() != other.preprocessor_fingerprint()
