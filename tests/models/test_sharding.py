"""Which parts of a model are sharded one by one: its repeated layers, found by what they are and not by name."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from craft_ray.errors import ConfigError
from craft_ray.models.sharding import find_blocks

SMALL = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def test_the_layers_of_a_language_model_are_its_blocks() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=3))
    assert find_blocks(model) == list(model.model.layers)


def test_the_experts_of_a_layer_belong_to_it() -> None:
    config = MixtralConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=1, num_local_experts=2)
    model = MixtralForCausalLM(config)
    assert find_blocks(model) == list(model.model.layers)


def test_two_towers_have_blocks_of_both() -> None:
    towers = [nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2)]
    model = nn.ModuleDict({"vision": nn.Sequential(towers[0]), "text": nn.Sequential(towers[1])})
    assert find_blocks(model) == [*towers[0], *towers[1]]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "those of a Sequential are not found"),
        (nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(40, 40)), "hold 20 of its 1,660 weights"),
    ],
)
def test_a_model_without_blocks_is_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_blocks(module)
