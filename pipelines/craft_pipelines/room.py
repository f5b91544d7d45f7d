"""How many runs a cluster has room for at once: by its processors and GPUs, and by its memory.

Ray places processes by what they ask for. Without a request for memory it starts as many as there are processors, and
ends some of them when a node's memory is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from craft_pipelines.nodes import alive_nodes
from craft_pipelines.session import capacity
from craft_pipelines.train import resources
from craft_ray.config import Experiment, Mixture
from craft_ray.data.task import open_task, rows_of
from craft_ray.errors import ConfigError
from craft_ray.init.model import ModelFacts, look_at_model
from craft_ray.init.sizes import BYTES_FULL

PROCESS = 700 * 2**20
"""Bytes that a worker takes with a model of no size: Python, PyTorch, transformers, Ray."""
READ_BACK = 4
"""Bytes of a parameter when the first checkpoint is loaded again."""
SAMPLES = 32
"""Rows of a source whose length is inspected, spread over it."""


@dataclass(frozen=True)
class Room:
    """What a cluster holds at once."""

    count: int
    memory: int | None
    """Bytes to request for each worker; None if nothing is requested."""


def room(config: Experiment, what: str, most: int | None, say: Callable[[str], None] = lambda _: None) -> Room:
    """How many runs of a config the cluster that this process has joined holds at once.

    Args:
        what: what they are, in the singular.
        most: the user's own limit.
        say: receives how many they are, and why.

    Raises:
        ConfigError: it does not hold one.
    """
    each, workers = resources(config.workers), max(config.workers.most, 1)
    possible = capacity(each) // workers
    if config.workers.elastic and capacity(each) >= config.workers.least:
        possible = max(possible, 1)  # with fewer workers
    if not possible:
        needed = ", ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
        raise ConfigError(
            f"a {what} takes {workers} worker(s) of {needed}, and the cluster holds {capacity(each)} of them: ask for "
            f"fewer (workers.*), or join a larger cluster with RAY_ADDRESS"
        )
    wanted = min(possible, most or possible)
    if "memory" in each:  # the user's own request
        say(f"up to {wanted} {what}(s) at a time")
        return Room(wanted, None)
    try:
        expected = worker_memory(config)
    except ConfigError as error:  # an estimate refuses nothing: what cannot be loaded is refused where it is
        say(f"up to {wanted} {what}(s) at a time; the memory that one takes is not estimated ({error.message})")
        return Room(wanted, None)
    largest = max(int(node.resources.get("memory", 0)) for node in alive_nodes())
    memory = min(expected, largest)  # one runs in any case
    count = max(1, min(wanted, capacity({**each, "memory": memory}) // workers))
    say(
        f"up to {count} {what}(s) at a time: a worker takes about {_gib(expected)} of memory, a node has up to "
        f"{_gib(largest)} for them" + (f" (there are processors for {wanted})" if count < wanted else "")
    )
    return Room(count, memory)


def worker_memory(config: Experiment) -> int:
    """Bytes of host memory that a worker of a run takes at most, roughly.

    It is what the libraries take, the weights, gradients and moments of what is trained, and the values that a forward
    pass keeps for its backward pass, which are not known for a policy. With a GPU only the first and the weights, which
    are read there, count.
    """
    facts = look_at_model(config.model.path, "model.path")
    if config.workers.use_gpu:
        return PROCESS + 4 * facts.parameters
    of_parameter = 4 if config.adapter is not None else BYTES_FULL + READ_BACK
    shards = 1 if config.workers.sharding == "none" else (config.workers.shards or config.workers.most)
    tokens = math.ceil(config.train.batch_size / config.train.accumulate / max(config.workers.most, 1))
    uncounted = config.model.gradient_checkpointing or facts.kind == "lerobot"
    kept = 0 if uncounted else tokens * _longest(config, facts) * facts.token_bytes
    return PROCESS + facts.parameters * of_parameter // shards + kept


def _longest(config: Experiment, facts: ModelFacts) -> int:
    """Tokens of the longest of some samples of the new skill."""
    found = 0
    for data in [part.data for part in config.task.mix] if isinstance(config.task, Mixture) else [config.task]:
        source = open_task(data)
        rows = rows_of(source)
        count = min(SAMPLES, rows)
        samples = [source[index * rows // count] for index in range(count)]
        images = facts.image_tokens(samples) if facts.kind == "vision_language" else 0
        found = max(found, *(sum(facts.tokens_of(s, config.model.chat_template, images)) for s in samples))
    return min(found, config.model.max_length)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
