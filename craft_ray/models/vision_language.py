"""Any image-text-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from craft_ray.data.conversation import IMAGE_MARK
from craft_ray.data.images import decode_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError
from craft_ray.models.base import Features
from craft_ray.models.chat import LITERAL, written_image
from craft_ray.models.fingerprint import without_locations
from craft_ray.models.huggingface import HuggingFaceModel
from craft_ray.models.image_batches import ImageBatches, Pictures
from craft_ray.models.image_tokens import image_reading
from craft_ray.models.readings import AS_STORED, Reading
from craft_ray.models.text import Cut


class VisionLanguageModel(HuggingFaceModel):
    """An image-text-to-text model: AutoModelForImageTextToText with its processor."""

    kind = "vision_language"
    reads_images = True
    threaded = True
    default_positions = ("suffix",)
    auto_class = transformers.AutoModelForImageTextToText
    processor_class = transformers.AutoProcessor

    @property
    def suffix_type(self) -> int:  # type: ignore[override]
        """PaliGemma marks its suffix with 1 (causal attention); Gemma 3 marks images with 1, others have no types."""
        return 1 if self.settings.model_type == "paligemma" else 0

    def encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        if sample.pictures is None:
            raise DataError(f"{sample.where} has no image: name the column that holds it (columns.image)")
        if sample.conversation is None:
            self._check_marks(sample)
        if self.chat is not None:
            return self._encode(self.chat.prompt(sample), _images(sample), sample)
        text, images = self._marked(sample), _images(sample)
        self._check_images(text, images, sample)
        return self._apart(self._processed(text, images), sample)

    def _marked(self, sample: Sample) -> str:
        """A prompt, without a template, with the model's marks for its images."""
        mark = self.processor.image_token
        text = sample.prompt if mark == IMAGE_MARK else sample.prompt.replace(IMAGE_MARK, self._written_image)
        if mark in text:
            return text
        return (mark if sample.images is None else self._written_image * len(sample.images)) + text

    @cached_property
    def _written_image(self) -> str:
        """What the model's chat template writes for an image, which need not be only its mark; the mark if it has
        no template."""
        return written_image(self.processor, self.processor.image_token)

    def _apart(self, encoded: dict[str, Tensor], sample: Sample) -> dict[str, Tensor]:
        """Check that a model that gives images positions of their own (Qwen2-VL) takes each for one: it counts runs of
        image tokens.

        Raises:
            DataError: two images are side by side.
        """
        if not {"mm_token_type_ids", "image_grid_thw"} <= encoded.keys():
            return encoded
        of_images = torch.nn.functional.pad(encoded["mm_token_type_ids"][0] == 1, (1, 0))
        runs, images = int((of_images[1:] & ~of_images[:-1]).sum()), len(encoded["image_grid_thw"])
        if runs != images:
            raise DataError(
                f"{sample.where}: {images} images are at {runs} places in its text, and {self.config.path} takes "
                f"those side by side for one: put text between them, or use its chat template"
            )
        return encoded

    def _check_marks(self, sample: Sample) -> None:
        """Check that a prompt names each of its images, or none of them.

        Raises:
            DataError: it names more or fewer.
        """
        names = {IMAGE_MARK} if self.chat is not None else {IMAGE_MARK, self.processor.image_token}
        marks, given = sum(map(sample.prompt.count, names)), len(sample.pictures or ())
        if marks not in (0, given):
            raise DataError(
                f"{sample.where}: its prompt has {' or '.join(sorted(names))} {marks} times, but the row has {given} "
                f"image{'s' if given != 1 else ''}: name each of them once, or none, so that they come first"
            )

    def _check_images(self, text: str, images: Sequence[Image.Image], sample: Sample) -> None:
        """Check that a text, as the processor gets it, has a mark for each image and no other: the assistant's own
        words, for one, are written as they are.

        Raises:
            DataError: transformers would find more or fewer places than images.
        """
        mark, placed = self.processor.image_token, self._image_token
        marks, given = text.count(mark), len(images)
        if placed is not None and placed != mark and placed in text:  # what the processor itself puts for a mark
            marks, mark = text.count(placed), placed
        elif marks == given:
            return
        raise DataError(
            f"{sample.where}: {mark} is in its text {marks} times, which {self.config.path} would read as images, but "
            f"the row has {given} image{'s' if given != 1 else ''} to be marked: remove it from the turns and the "
            f"prompt, and name an image by a part of type image"
        )

    @cached_property
    def _image_token(self) -> str | None:
        """The token that stands for a part of an image, as text; None if the tokenizer has no text for it."""
        token: str | None = self.tokenizer.convert_ids_to_tokens(self._image_id)
        return token

    @property
    def _image_id(self) -> int:
        config = self.settings
        return int(config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index)

    def with_suffix(self, prompt: Features, suffix: Sequence[int], where: str) -> Features:
        if self._image_id in suffix:
            raise DataError(
                f"{where} has {self._image_token or f'the token {self._image_id}'} after its prompt, which "
                f"{self.config.path} would read as part of an image that is not there: remove it from the response "
                f"and the choices"
            )
        return super().with_suffix(prompt, suffix, where)

    def encode_learnt(self, sample: Sample) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        assert self.chat is not None
        rendered, images = self.chat.learnt(sample), _images(sample)
        ends = [at for span in rendered.spans for at in span]
        cut = self.text.learnt(rendered)
        encoded = self._encode(rendered.text, images, sample)
        places = []
        for end, place in zip(ends, cut.places, strict=True):
            # An image stands for many tokens: those after the last one are counted from the end.
            behind, mark = len(cut.ids) - place, self.processor.image_token
            if mark in rendered.text[end:]:
                head = rendered.text[:end]
                places.append(self._encode(head, images[: head.count(mark)], sample)["input_ids"].shape[1])
            else:
                places.append(encoded["input_ids"].shape[1] - behind)
        if cut.merged:
            raise DataError(
                f"{sample.where}: in what the chat template of {self.config.path} writes, a token extends over the "
                f"beginning or the end of a turn, so the turn cannot be learnt: let its marks be special tokens"
            )
        return encoded, replace(cut, places=places).inside()

    def cut(self, sample: Sample) -> Cut:
        if self.chat is not None:
            return self._written(sample)
        answer = sample.answer()
        if self.suffix_type:  # PaliGemma's processor tokenises prefix and suffix separately
            return Cut(self.tokenizer(answer, add_special_tokens=False)["input_ids"], [0], False)
        prompt = self._marked(sample)
        return self.text.cut(prompt + answer, [len(prompt)], self.text.plain)

    def _encode(self, text: str, images: Sequence[Image.Image], sample: Sample) -> dict[str, Tensor]:
        """What a chat template wrote, as the processor's own `apply_chat_template` encodes it."""
        if LITERAL in text:
            raise DataError(
                f"{sample.where}: the text of a turn holds a special token of the model, which would be read as such: "
                f"remove it, or name an image by a part of type image"
            )
        self._check_images(text, images, sample)
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        return self._apart(self._processed(text, images, **options), sample)

    def _processed(self, text: str, images: Sequence[Image.Image], **options: Any) -> dict[str, Tensor]:
        options |= self._image_settings if images else {}
        encoded = self.processor(images=[list(images)] if images else None, text=[text], return_tensors="pt", **options)
        tokens = encoded["input_ids"]
        size = len(self.text.without_appended(tokens[0].tolist()))
        of_images = self.image_inputs(encoded)
        return {
            name: tensor if name in of_images else tensor[:, :size]
            for name, tensor in encoded.items()
            if name != "labels"
        }

    def image_inputs(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # One image may have as many numbers as a short prompt has tokens: what the image processor makes is known.
        own, tokens = self.processor.image_processor.model_input_names, encoded["input_ids"]
        return {name: tensor for name, tensor in encoded.items() if name in own or tensor.shape != tokens.shape}

    def join_images(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        if len({part.shape for part in parts}) == 1:
            return torch.cat(list(parts))
        return self._image_batches.join(name, parts)

    @cached_property
    def _image_settings(self) -> dict[str, Any]:
        """How the processor is called, so that the config's settings replace the image processor's own.

        Raises:
            ConfigError: it has no such setting.
        """
        images, settings = self.processor.image_processor, dict(self.config.image_processor)
        for name in settings:
            known = sorted(images.valid_kwargs.__annotations__)
            if name not in known:
                raise ConfigError(
                    f"model.image_processor has {name}, but the {type(images).__name__} of {self.config.path} has the "
                    f"settings {', '.join(known)}: choose one of them, or leave it out"
                )
        return {"images_kwargs": settings} if settings else {}

    @cached_property
    def _image_batches(self) -> ImageBatches:
        """Made when a batch needs it: a processor that tiles takes as long for it as for a few samples."""
        # A copy, because padding is a state of the tokenizer, and batches are made in a thread of their own.
        processor = deepcopy(self.processor)
        if processor.tokenizer.pad_token is None:  # the padded tokens are not read
            processor.tokenizer.pad_token = processor.tokenizer.convert_ids_to_tokens(self.pad)

        def process(samples: Sequence[Pictures]) -> dict[str, Tensor]:
            encoded = processor(
                images=[list(pictures) for pictures in samples],
                text=[processor.image_token * len(pictures) for pictures in samples],
                padding=True,
                return_tensors="pt",
                **self._image_settings,
            )
            return self.image_inputs(encoded)

        return ImageBatches(process, self.config.path)

    probed = "a few tokens and a picture"

    def probe_prompt(self, tokens: Sequence[int]) -> Features:
        text = self.processor.image_token + self.tokenizer.decode(tokens[:1])
        return self._prompt(self._processed(text, [Image.new("RGB", (32, 32))]))

    def image_tokens(self, input_ids_S: Tensor) -> tuple[int, ...]:
        return tuple(torch.nonzero(input_ids_S == self._image_id).flatten().tolist())

    def readings(self, input_ids_S: np.ndarray, pixel_values: np.ndarray | None) -> list[Reading]:
        if pixel_values is None or self.image_tokens(torch.from_numpy(input_ids_S)):
            return [AS_STORED]
        return [image_reading(self.processor, input_ids_S, pixel_values.shape[-2:])]

    def prompt_types(self, input_ids_1S: Tensor) -> dict[str, Tensor]:
        if not self._takes_types:
            return {}
        types = torch.zeros_like(input_ids_1S)
        if self.suffix_type == 0:
            types[:, list(self.image_tokens(input_ids_1S[0]))] = 1
        return {"token_type_ids": types}

    def _image_identity(self) -> Any:
        # The processor's own settings decide how many image tokens a prompt has, the image processor's what they show;
        # its class is included, because two backends of one processor resize differently.
        images = self.processor.image_processor
        settings = without_locations(self.processor.to_dict())
        settings["image_processor"] = without_locations(images.to_dict())
        own = self.config.image_processor
        # After a prompt, an answer has other tokens than on its own: it was tokenised on its own before.
        joined = [["answers behind prompts"]] if self.chat is None and not self.suffix_type and self.text.leads else []
        return [type(images).__name__, settings, *([dict(own)] if own else []), *joined]


def _images(sample: Sample) -> list[Image.Image]:
    """The decoded images of a sample, in the order of its text."""
    encoded = sample.pictures or ()
    several = len(encoded) > 1
    return [
        decode_image(data, f"{sample.where}, image {number}" if several else sample.where)
        for number, data in enumerate(encoded, 1)
    ]
