"""Samples with several images, and images that a processor cuts into tiles: what the library computes for one alone."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_ray.config import ModelConfig
from craft_ray.data.conversation import Conversation
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, ModelError
from craft_ray.models import load_model
from craft_ray.models.image_batches import ImageBatches, Pictures
from craft_ray.models.vision_language import VisionLanguageModel
from tests.support.tiling import AROUND, BUILDERS, MARKED, build, png, without_videos
from tests.support.tokenizers import TOKENIZERS

FAMILIES = tuple(BUILDERS)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def question(name: str, prompt: str, *images: bytes, response: str = " yes") -> Sample:
    return Sample(name, prompt, next(iter(images), None), response, images=images)


SQUARE, WIDE, TALL, LARGE = png(8, 8), png(24, 8, 1), png(8, 20, 2), png(16, 16, 3)
SAMPLES = [
    question("two", "<image>, then <image>: which?", SQUARE, WIDE),
    question("one", "is it tall?", TALL, response=" no, not so"),
    question("three", "count", LARGE, SQUARE, png(30, 8, 4)),
]
"""Different numbers of images, and images of different numbers of tiles."""
PAN_AND_SCAN = {
    "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 4, "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., VisionLanguageModel]]:
    """A model of a family; those without changes are shared."""
    folders: dict[str, Path] = {}
    shared: dict[str, VisionLanguageModel] = {}

    def get(family: str, **changes: Any) -> VisionLanguageModel:
        if family not in folders:
            folders[family] = build(family, tmp_path_factory.mktemp(family) / family)
        key = f"{family} {changes}"
        if key not in shared:
            settings = {"kind": "vision_language", "path": str(folders[family]), "max_length": 512} | changes
            model = load_model(ModelConfig(**settings), "fp32")
            assert isinstance(model, VisionLanguageModel)
            shared[key] = model
        return shared[key]

    with without_videos():
        yield get


def opened(sample: Sample) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.pictures or ()]


def marked(model: VisionLanguageModel, family: str, sample: Sample) -> str:
    """The prompt with what the family writes for an image, in front where the prompt names none."""
    mark = model.processor.image_token
    mark = f"<|vision_start|>{mark}<|vision_end|>" if family.startswith("qwen") else mark
    text = sample.prompt.replace("<image>", mark)
    return text if mark in text else mark * len(sample.pictures or ()) + text


def libraries(model: VisionLanguageModel, family: str, sample: Sample, end: Sequence[int]) -> dict[str, Tensor]:
    """One sample with its response, as the family's own processor has it."""
    inputs = dict(model.processor(images=[opened(sample)], text=[marked(model, family, sample)], return_tensors="pt"))
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            fill = {"input_ids": list(end), "attention_mask": [1] * len(end)}.get(name, [0] * len(end))
            inputs[name] = torch.cat([inputs[name], torch.tensor([fill])], 1)
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_the_library_computes_for_each_sample(
    family: str, load: Callable[..., VisionLanguageModel]
) -> None:
    model = load(family)
    features = [model.preprocess_task(sample) for sample in SAMPLES]
    batch = model.collate(features, ("vision_mean",))
    states = model.hidden_states(batch, range(model.num_hidden_states))
    assert batch.pooling is not None
    pooled = batch.pooling(states).values_BLVD
    total, tokens = 0.0, 0
    for row, sample in enumerate(SAMPLES):
        end = model.response_tokens(sample)
        inputs = libraries(model, family, sample, end)
        ids = inputs["input_ids"][0]
        assert features[row].tokens["input_ids"].tolist() == ids.tolist()
        labels = torch.full_like(ids, -100)
        labels[-len(end) :] = ids[-len(end) :]
        with torch.no_grad():
            own = model.module(**inputs, labels=labels[None], output_hidden_states=True)
        places = torch.nonzero(ids == model.module.config.image_token_id).flatten()
        assert features[row].layout.image_tokens == tuple(places.tolist())
        for layer, expected in enumerate(own.hidden_states):
            torch.testing.assert_close(states[layer][row, : len(ids)], expected[0], **CLOSE)
            torch.testing.assert_close(pooled[row, layer, 0], expected[0, places].mean(0), **CLOSE)
        total, tokens = total + own.loss.item() * len(end), tokens + len(end)
    assert batch.tokens == tokens
    assert model.task_loss(batch).item() == pytest.approx(total / tokens, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_of_a_batch_are_those_of_the_librarys_batch(
    family: str, load: Callable[..., VisionLanguageModel]
) -> None:
    model = load(family)
    batch = model.collate([model.preprocess(sample) for sample in SAMPLES])
    texts = [marked(model, family, sample) for sample in SAMPLES]
    own = model.processor(images=list(map(opened, SAMPLES)), text=texts, padding=True, return_tensors="pt")
    images = [name for name, tensor in own.items() if tensor.shape != own["input_ids"].shape]
    assert "pixel_values" in images
    for name in images:
        assert torch.equal(batch.inputs[name], own[name])
    shapes = {tuple(model.preprocess(sample).images["pixel_values"].shape) for sample in SAMPLES}
    assert len(shapes) == 3, "the samples have different numbers of images or tiles"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_samples_alone(family: str, load: Callable[..., VisionLanguageModel]) -> None:
    model = load(family)
    prompts = [model.preprocess(sample) for sample in SAMPLES]
    assert model.generate(prompts, 3) == [model.generate([prompt], 3)[0] for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_with_and_without_images_share_a_batch(family: str, load: Callable[..., VisionLanguageModel]) -> None:
    model = load(family)
    features = [model.preprocess_task(sample) for sample in (question("none", "no image here"), *SAMPLES)]
    assert not features[0].images
    losses = [model.task_loss(batch).item() * batch.tokens for batch in (model.collate([one]) for one in features)]
    batch = model.collate(features)
    assert model.task_loss(batch).item() == pytest.approx(sum(losses) / batch.tokens, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_template_places_the_images(family: str, load: Callable[..., VisionLanguageModel]) -> None:
    model = load(family, chat_template=True)
    first, second = opened(SAMPLES[0])
    parts = [
        {"type": "image", "image": first}, {"type": "text", "text": ", then "}, {"type": "image", "image": second},
        {"type": "text", "text": ": which?"},
    ]  # fmt: skip
    own = model.processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    expected = own["input_ids"][0].tolist()
    assert model.preprocess(SAMPLES[0]).tokens["input_ids"].tolist() == expected
    # A conversation with the same parts is the same prompt.
    named = [{key: value for key, value in part.items() if key != "image"} for part in parts]
    turns = ({"role": "user", "content": named},)
    talk = Sample("talk", "", conversation=Conversation(turns, None, SAMPLES[0].images or ()))
    assert model.preprocess(talk).tokens["input_ids"].tolist() == expected
    before = model.preprocess(question("front", "which?", SQUARE, WIDE)).tokens["input_ids"].tolist()
    assert before != expected
    assert model.tokenizer.decode(before).endswith("which?<|im_end|>\n<|im_start|>assistant\n")


IMAGE: dict[str, Any] = {"type": "image"}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "tall?"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": " or "}, IMAGE]},
    {"role": "assistant", "content": "No."},
]
TALK = Sample("talk", "", response="No.", conversation=Conversation(tuple(TURNS[:3]), TURNS[3], (TALL, WIDE, LARGE)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_behind_images_is_learnt(family: str, load: Callable[..., VisionLanguageModel]) -> None:
    model = load(family, chat_template=True)
    features = model.preprocess_task(TALK)
    learnt = [int(features.tokens["input_ids"][at]) for at in features.layout.predicted]
    assert model.tokenizer.decode(learnt) == "Yes.<|im_end|>No.<|im_end|>"
    both = model.collate([features, model.preprocess_task(SAMPLES[0])])
    alone = [model.collate([one]) for one in (features, model.preprocess_task(SAMPLES[0]))]
    expected = sum(model.task_loss(batch).item() * batch.tokens for batch in alone) / both.tokens
    assert model.task_loss(both).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("learnt", "said"), [("true", "Yes.<|im_end|>No.<|im_end|>"), ("loop.last", "No.<|im_end|>")])
@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl", "internvl"])
def test_a_templates_own_marks_decide_behind_images(
    family: str, learnt: str, said: str, tmp_path: Path, load: Callable[..., VisionLanguageModel]
) -> None:
    plain = load(family, chat_template=True)
    folder = Path(shutil.copytree(plain.config.path, tmp_path / family))
    mark = AROUND.get(family, "{}").format(plain.processor.image_token)
    (folder / "chat_template.jinja").write_text(MARKED.replace("MARK", mark).replace("LEARNT", learnt))
    features = load(family, chat_template=True, path=str(folder)).preprocess_task(TALK)
    ids = features.tokens["input_ids"]
    assert torch.equal(ids, plain.preprocess_task(TALK).tokens["input_ids"])
    assert plain.tokenizer.decode([int(ids[at]) for at in features.layout.predicted]) == said
    if learnt == "true":
        assert features.layout == plain.preprocess_task(TALK).layout


@pytest.mark.parametrize("written", ["gpt2", "llama", "gemma"])
def test_prompt_and_response_are_one_text_behind_images(
    written: str, tmp_path: Path, load: Callable[..., VisionLanguageModel]
) -> None:
    """As for a model without images: what would extend over the boundary is told, and split."""
    path = build("llava_next", tmp_path / written, TOKENIZERS[written]())
    model = load("llava_next", path=str(path))
    for response in (" One primary color is red.", "Paris"):
        sample = question("a", "<image>\nName a primary color:", SQUARE, response=response)
        ids = model.preprocess_task(sample).tokens["input_ids"].tolist()
        own = model.processor(images=[opened(sample)], text=[sample.prompt + response])["input_ids"][0]
        assert ids == [*own, model.tokenizer.eos_token_id]
        assert not model.boundary_merges(sample)
    sample = question("a", "<image>\nName a prim", SQUARE, response="ary color")
    whole = model.processor(images=[opened(sample)], text=["<image>\nName a primary color"])["input_ids"][0]
    prompt = model.preprocess(sample).tokens["input_ids"].tolist()
    assert model.boundary_merges(sample) == (whole[: len(prompt)] != prompt)
    ids = model.preprocess_task(sample).tokens["input_ids"].tolist()
    assert ids[: len(prompt)] == prompt
    assert model.tokenizer.decode(ids, skip_special_tokens=True).endswith("Name a primary color")
    assert model.text.leads == (written == "llama")  # its answers had a space in front, when they were taken alone
    before = model.preprocessor_fingerprint()
    model.text.leads = not model.text.leads
    assert model.preprocessor_fingerprint() != before


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (question("a", "<image> and <image>", SQUARE), r"<image> 2 times, but the row has 1 image: name each"),
        (question("a", "<image>?", SQUARE, WIDE), r"<image> 1 times, but the row has 2 images: name each"),
        (question("a", "<image>?"), r"<image> 1 times, but the row has 0 images"),
    ],
)
def test_a_prompt_names_all_of_its_images_or_none(
    sample: Sample, expected: str, chat: bool, load: Callable[..., VisionLanguageModel]
) -> None:
    model = load("idefics3", chat_template=chat)
    with pytest.raises(DataError, match=rf"a\.jsonl, row 3: its prompt has {expected}") as caught:
        model.preprocess(replace(sample, origin="a.jsonl, row 3"))
    assert "\n" not in caught.value.message


def test_a_damaged_image_is_named_by_its_number(load: Callable[..., VisionLanguageModel]) -> None:
    with pytest.raises(DataError, match="sample a, image 2: its image of 4 bytes does not decode"):
        load("idefics3").preprocess(question("a", "?", SQUARE, b"none"))


def test_images_side_by_side_that_the_model_takes_for_one(load: Callable[..., VisionLanguageModel]) -> None:
    mark = "<|image_pad|>"
    with pytest.raises(DataError, match="sample a: 2 images are at 1 places in its text"):
        load("qwen2_vl").preprocess(question("a", f"{mark}{mark}?", SQUARE, WIDE))
    assert load("qwen2_vl").preprocess(question("a", f"{mark}, {mark}?", SQUARE, WIDE))


# --- how a processor joins images -----------------------------------------------------------------------------


def areas(samples: Sequence[Pictures], fill: float = 0, skewed: bool = False) -> Mapping[str, Tensor]:
    """Each image's width, height and area in a row of a sample, as many rows as the sample with the most images."""
    most = max(map(len, samples))
    rows = [[[float(w), h, w * h] for w, h in (picture.size for picture in pictures)] for pictures in samples]
    padded = torch.tensor([[*row, *([[fill] * 3] * (most - len(row)))] for row in rows])
    return {"areas": padded.flip(1) if skewed and len(samples) > 1 else padded}


def test_what_a_batch_is_padded_with_is_learnt() -> None:
    one, two = (areas([[Image.new("RGB", (2, 3))] * count])["areas"] for count in (1, 2))
    joined = ImageBatches(lambda samples: areas(samples, fill=-1), "m").join("areas", [one, two])
    assert joined.tolist() == [[[2, 3, 6], [-1, -1, -1]], [[2, 3, 6], [2, 3, 6]]]


@pytest.mark.parametrize("error", [None, ValueError("one\nimage"), RuntimeError("one image")])
def test_a_processor_that_joins_images_otherwise_is_refused(error: Exception | None) -> None:
    def process(samples: Sequence[Pictures]) -> Mapping[str, Tensor]:
        if error is not None and max(map(len, samples)) > 1:
            raise error
        return areas(samples, skewed=True)

    one, two = (areas([[Image.new("RGB", (2, 3))] * count])["areas"] for count in (1, 2))
    with pytest.raises(ModelError, match="model m: the images of a batch have areas of different shapes") as caught:
        ImageBatches(process, "m").join("areas", [one, two])
    assert "\n" not in caught.value.message


# --- settings of the image processor --------------------------------------------------------------------------


def test_pan_and_scan_is_a_setting(load: Callable[..., VisionLanguageModel]) -> None:
    """Gemma 3's processor leaves it off, whatever its folder says."""
    plain, model = load("gemma3"), load("gemma3", image_processor=PAN_AND_SCAN)
    features = [model.preprocess_task(sample) for sample in SAMPLES]
    # 24x8 is cut into three crops, and so are 8x20 and 30x8; squares into none.
    assert [len(one.images["pixel_values"]) for one in features] == [2 + 3, 1 + 3, 3 + 3]
    batch = model.collate(features)
    states = model.hidden_states(batch, [1, 2])
    for row, sample in enumerate(SAMPLES):
        inputs = model.processor(
            images=[opened(sample)], text=[marked(model, "gemma3", sample)], return_tensors="pt", **PAN_AND_SCAN
        )
        with torch.no_grad():
            own = model.module(**inputs, output_hidden_states=True)
        size = inputs["input_ids"].shape[1]
        for layer, found in zip((1, 2), states, strict=True):
            torch.testing.assert_close(found[row, :size], own.hidden_states[layer][0], **CLOSE)
    assert model.preprocessor_fingerprint() != plain.preprocessor_fingerprint()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"pan": True},
            "model.image_processor has pan, but the Gemma3ImageProcessorPil .* has the settings .*do_pan_",
        ),
        ({"do_pan_and_scan": "much"}, "does not run on a few tokens and a picture"),
    ],
)
def test_a_setting_that_the_image_processor_does_not_have(
    settings: dict[str, Any], expected: str, load: Callable[..., VisionLanguageModel]
) -> None:
    with pytest.raises((ConfigError, ModelError), match=expected) as caught:
        load("gemma3", image_processor=settings)
    assert "\n" not in caught.value.message


def test_settings_need_a_model_that_reads_images() -> None:
    with pytest.raises(ValueError, match="image_processor has do_resize, but kind is causal_lm"):
        ModelConfig(path="org/model", image_processor={"do_resize": False})
