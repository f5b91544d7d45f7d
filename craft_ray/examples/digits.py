"""A small, complete example: a tiny PaliGemma reads handwritten digits, then meets a new camera.

Everything is built on the spot, without a download: `build_model` writes an ordinary Hugging Face folder with random
weights, `write_data` writes scikit-learn's 1797 digit images as Parquet. The old skill is to read the digits upright;
the new one is to read them through a camera that turns them by 90 degrees and inverts them.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

PROMPT = "which digit is this?"
CHOICES = [str(digit) for digit in range(10)]

IMAGE_SIZE = 8
PATCH_SIZE = 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
TEXT_WIDTH = 64

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
WORDS = ["which", "digit", "is", "this", "?"]

# Images in the splits, out of scikit-learn's 1797; the rest are for training.
VALIDATION_SIZE = 300
TEST_SIZE = 397
SPLIT_SEED = 0
LARGEST_PIXEL = 16


def build_model(folder: Path, seed: int = 0) -> None:
    """Write a PaliGemma of 0.2 million random weights, and its processor, as a Hugging Face folder.

    SigLIP has 2 layers on 8x8 images in patches of 2 (16 image tokens); Gemma has 4 layers of width 64. The same
    `seed` gives the same weights; the caller's random state is left as it was.
    """
    processor = build_processor()
    tokenizer = processor.tokenizer
    config = PaliGemmaConfig(  # type: ignore[call-arg]  # the ids of special tokens go through **kwargs
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        text_config=GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=128,
            # Gemma's 0.02 suits a width of thousands; at this width training would stall for hundreds of steps.
            initializer_range=TEXT_WIDTH**-0.5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        ),
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_processor() -> PaliGemmaProcessor:
    """A PaliGemma processor for 8x8 images and the few words of the prompt; each digit is one token."""
    vocabulary = SPECIAL_TOKENS + WORDS + CHOICES
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    # PaliGemma ends every prompt with a newline, which the pre-tokenizer would drop as white space.
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PaliGemmaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            image_seq_length=IMAGE_TOKENS,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
        ),
    )


def write_data(folder: Path) -> dict[str, Path]:
    """Write the digits as Parquet files in `folder`; return the path of each by name.

    `{old,new}_{train,val,test}`: id, image (PNG, 8x8 RGB), prompt, response ("0" to "9"), choices. Old is upright, new
    is the other camera. `anchors`: the upright training images as id, image and prompt, without the response. The
    three splits are stratified, share no image and are always the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels_NHW, digits_N = load_digits(return_X_y=True)
    upright_NHW = np.rint(pixels_NHW.reshape(-1, IMAGE_SIZE, IMAGE_SIZE) * (255 / LARGEST_PIXEL)).astype(np.uint8)
    cameras = {"old": upright_NHW, "new": 255 - np.rot90(upright_NHW, axes=(1, 2))}

    paths = {}
    for split, indices in split_indices(digits_N).items():
        for camera, images_NHW in cameras.items():
            name = f"{camera}_{split}"
            paths[name] = write_table(folder / f"{name}.parquet", camera, indices, images_NHW, digits_N)
    train = pq.read_table(paths["old_train"], columns=["id", "image", "prompt"])
    paths["anchors"] = folder / "anchors.parquet"
    pq.write_table(train, paths["anchors"])
    return paths


def split_indices(digits_N: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the train, val and test split: stratified by digit, disjoint, sorted."""
    rest, test = train_test_split(
        np.arange(len(digits_N)), test_size=TEST_SIZE, stratify=digits_N, random_state=SPLIT_SEED
    )
    train, val = train_test_split(rest, test_size=VALIDATION_SIZE, stratify=digits_N[rest], random_state=SPLIT_SEED)
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def write_table(path: Path, camera: str, indices: np.ndarray, images_NHW: np.ndarray, digits_N: np.ndarray) -> Path:
    """Write the rows `indices` of one camera as a labelled Parquet file."""
    table = pa.table(
        {
            "id": [f"{camera}-{index:04d}" for index in indices],
            "image": pa.array([png(images_NHW[index]) for index in indices], pa.binary()),
            "prompt": [PROMPT] * len(indices),
            "response": [CHOICES[digits_N[index]] for index in indices],
            "choices": [CHOICES] * len(indices),
        }
    )
    pq.write_table(table, path)
    return path


def png(pixels_HW: np.ndarray) -> bytes:
    """A grey image (uint8) as the bytes of an RGB PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
