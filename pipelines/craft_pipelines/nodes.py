"""The nodes of the cluster that this process has joined, and function calls on each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from craft_ray.errors import first_line

TIMEOUT_S = 120.0
"""For an answer: the first one from a node has to wait for a process to start there."""


@dataclass(frozen=True)
class Node:
    id: str
    address: str
    resources: dict[str, float] = field(compare=False)
    """What Ray offers there: CPU, GPU, memory, object_store_memory (bytes), ..."""

    @property
    def name(self) -> str:
        """The address and a part of the id, because several nodes on one machine may share an address."""
        return f"{self.address} ({self.id[:6]})"


@dataclass(frozen=True)
class Answer:
    value: Any
    error: str | None
    """Why there is no value, in one line."""


def alive_nodes() -> list[Node]:
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]


def ask(function: Callable[..., Any], nodes: Sequence[Node], *arguments: Any) -> dict[Node, Answer]:
    """Call `function` in a process on each of the nodes, however busy they are. Nodes that are lost meanwhile are
    omitted."""
    remote = ray.remote(function)
    asked = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked[node] = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote(*arguments)
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=TIMEOUT_S)
    alive = {node.id for node in alive_nodes()}
    answers = {}
    for node, reference in asked.items():
        if node.id not in alive:
            continue
        if reference not in done:
            answers[node] = Answer(None, f"no answer in {TIMEOUT_S:g} s")
            continue
        try:
            answers[node] = Answer(ray.get(reference), None)
        except RayTaskError as error:
            answers[node] = Answer(None, first_line(f"{type(error.cause).__name__}: {error.cause}"))
        except RayError as error:
            answers[node] = Answer(None, first_line(error))
    return answers
