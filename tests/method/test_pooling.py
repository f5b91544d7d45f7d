"""Anchor positions on sequences that are laid out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from craft_ray.errors import DataError
from craft_ray.method.distance import hidden_loss
from craft_ray.method.pooling import Layout, Pooling, Vectors, token_positions, vector_count

PICTURE = Layout(length=9, prompt_length=7, image_tokens=(0, 1, 2))  # i i i t t t t | s s
LATE_PICTURE = Layout(length=6, prompt_length=5, image_tokens=(3, 4))  # t t t i i | s
TEXT = Layout(length=4, prompt_length=4)
ONE_TOKEN = Layout(length=1, prompt_length=1)

MEANS = ("vision_mean", "masked_mean")
SINGLE = ("text_last", "first_token", "last_token")
MANY = ("all", "every_2", "every_3")


@pytest.mark.parametrize(
    ("layout", "position", "tokens"),
    [
        (PICTURE, "vision_mean", [0, 1, 2]),
        (PICTURE, "text_last", [6]),
        (PICTURE, "masked_mean", [0, 1, 2, 3, 4, 5, 6]),
        (PICTURE, "first_token", [0]),
        (PICTURE, "last_token", [6]),
        (PICTURE, "all", [0, 1, 2, 3, 4, 5, 6]),
        (PICTURE, "every_3", [2, 5]),
        (PICTURE, "suffix", [6, 7]),
        (LATE_PICTURE, "vision_mean", [3, 4]),
        (LATE_PICTURE, "text_last", [2]),
        (LATE_PICTURE, "last_token", [4]),
        (LATE_PICTURE, "suffix", [4]),
        (TEXT, "text_last", [3]),
        (TEXT, "every_1", [0, 1, 2, 3]),
        (TEXT, "every_4", [3]),
        (TEXT, "every_5", [3]),
        (ONE_TOKEN, "every_8", [0]),
        (ONE_TOKEN, "masked_mean", [0]),
    ],
)
def test_each_position_selects_its_tokens(layout: Layout, position: str, tokens: list[int]) -> None:
    assert token_positions(layout, position) == tokens
    assert vector_count(layout, position) == (1 if position in MEANS else len(tokens))


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("stride", [1, 2, 8])
def test_every_nth_selects_at_least_one_token_and_no_gap_over_n(length: int, stride: int) -> None:
    tokens = token_positions(Layout(length, length), f"every_{stride}")
    assert len(tokens) == max(length // stride, 1)
    assert all(b - a == stride for a, b in pairwise(tokens))


@pytest.mark.parametrize("position", [*MEANS, *SINGLE, *MANY])
def test_a_suffix_does_not_change_the_positions_of_the_prompt(position: str) -> None:
    longer = Layout(PICTURE.length + 5, PICTURE.prompt_length, PICTURE.image_tokens)
    assert token_positions(longer, position) == token_positions(PICTURE, position)


@pytest.mark.parametrize("prompt", [1, 4])
@pytest.mark.parametrize("suffix", [1, 3])
def test_suffix_positions_are_those_that_predict_a_suffix_token(prompt: int, suffix: int) -> None:
    tokens = token_positions(Layout(prompt + suffix, prompt), "suffix")
    assert [t + 1 for t in tokens] == list(range(prompt, prompt + suffix))


@pytest.mark.parametrize(
    ("layout", "position"),
    [(TEXT, "vision_mean"), (TEXT, "suffix"), (Layout(2, 2, (0, 1)), "text_last"), (Layout(2, 0), "all")],
)
def test_a_position_without_a_token_is_an_error_that_says_what_there_is(layout: Layout, position: str) -> None:
    with pytest.raises(DataError, match=rf"{position}.*{layout.prompt_length} prompt tokens"):
        token_positions(layout, position)


def test_an_unknown_position_is_an_error() -> None:
    with pytest.raises(ValueError, match="middle"):
        token_positions(TEXT, "middle")


# -- the plan

LAYOUTS = [PICTURE, LATE_PICTURE, Layout(4, 3, (1,))]
WIDTH = 9
POSITIONS = ["vision_mean", "text_last", "all", "masked_mean", "every_2", "suffix"]


def hidden_states(layers: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(LAYOUTS), WIDTH, 5, generator=generator).to(dtype) for _ in range(layers)]


def by_hand(hidden: list[Tensor], sample: int, position: str) -> Tensor:
    """[L, V, D] of one sample, token by token."""
    tokens = token_positions(LAYOUTS[sample], position)
    chosen = torch.stack([layer[sample, tokens] for layer in hidden])
    return chosen.mean(1, keepdim=True) if position in MEANS else chosen


@pytest.mark.parametrize("positions", [*([p] for p in POSITIONS), POSITIONS, POSITIONS[::-1]])
def test_pools_what_the_positions_select_in_their_order(positions: list[str]) -> None:
    hidden = hidden_states()
    pooled = Pooling.plan(LAYOUTS, positions, WIDTH)(hidden)
    for sample in range(len(LAYOUTS)):
        found = pooled.values_BLVD[sample][:, pooled.valid_BV[sample]]
        expected = torch.cat([by_hand(hidden, sample, p) for p in positions], 1)
        torch.testing.assert_close(found, expected)


def test_each_position_is_padded_to_the_batch_maximum() -> None:
    plan = Pooling.plan(LAYOUTS, ["all", "masked_mean", "suffix"], WIDTH)
    assert plan.valid_BV.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 1, 1, 0],
    ]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_sample_pools_the_same_alone_and_in_a_batch(position: str) -> None:
    hidden = hidden_states()
    together = Pooling.plan(LAYOUTS, [position], WIDTH)(hidden)
    for i, layout in enumerate(LAYOUTS):
        alone = Pooling.plan([layout], [position], layout.length)([h[i : i + 1, : layout.length] for h in hidden])
        torch.testing.assert_close(together.values_BLVD[i][:, together.valid_BV[i]], alone.values_BLVD[0])


@pytest.mark.parametrize("positions", [*([p] for p in POSITIONS), POSITIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_reaches_neither_a_value_nor_a_gradient(positions: list[str], dtype: torch.dtype) -> None:
    """Not even where it is NaN."""
    clean = hidden_states(dtype=dtype)
    padded = torch.arange(WIDTH) >= torch.tensor([layout.length for layout in LAYOUTS])[:, None]
    dirty = [h.masked_fill(padded[..., None], torch.nan).requires_grad_() for h in clean]
    plan = Pooling.plan(LAYOUTS, positions, WIDTH)
    found = plan(dirty)
    assert torch.equal(found.values_BLVD, plan(clean).values_BLVD)
    hidden_loss(found, Vectors(torch.ones_like(found.values_BLVD), found.valid_BV)).backward()
    for h in dirty:
        assert h.grad.isfinite().all()
        assert not h.grad[padded].any()


@pytest.mark.parametrize("position", POSITIONS)
def test_the_gradient_flows_to_the_chosen_tokens_only(position: str) -> None:
    hidden = [h.requires_grad_() for h in hidden_states()]
    pooled = Pooling.plan(LAYOUTS, [position], WIDTH)(hidden)
    hidden_loss(pooled, Vectors(torch.zeros_like(pooled.values_BLVD), pooled.valid_BV), "mse").backward()
    for h in hidden:
        for sample, layout in enumerate(LAYOUTS):
            reached = h.grad[sample].abs().sum(-1).nonzero().flatten().tolist()
            assert reached == token_positions(layout, position)


@pytest.mark.parametrize("position", ["masked_mean", "all"])
def test_values_keep_the_type_of_the_hidden_states(position: str) -> None:
    pooled = Pooling.plan(LAYOUTS, [position], WIDTH)(hidden_states(dtype=torch.bfloat16))
    assert pooled.values_BLVD.dtype == torch.bfloat16


def test_a_mean_is_taken_in_float32() -> None:
    """3000 bfloat16 tokens of 1.0078125: a bfloat16 sum would stop growing at 256."""
    hidden = torch.full((1, 3000, 2), 1.0078125, dtype=torch.bfloat16)
    pooled = Pooling.plan([Layout(3000, 3000)], ["masked_mean"], 3000)([hidden])
    assert pooled.values_BLVD.flatten().tolist() == [1.0078125, 1.0078125]


def test_a_plan_moves_as_a_whole() -> None:
    plan = Pooling.plan(LAYOUTS, POSITIONS, WIDTH)
    moved = plan.to(torch.device("meta"))
    pooled = moved([h.to("meta") for h in hidden_states()])
    assert pooled.values_BLVD.shape == plan(hidden_states()).values_BLVD.shape
    assert pooled.values_BLVD.is_meta
    assert pooled.valid_BV.is_meta
