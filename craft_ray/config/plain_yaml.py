"""YAML as it is written.

YAML 1.1 reads `0100` as 64 (octal), `2:30` as 150 (base 60), `off` as false, `2026-11-29` as a date and `1_000` as
1000. Here they are text, as in YAML 1.2, and a field that is a number or a truth value reads its text: 100, false,
1000. So no value turns into another one on the way, and what `yaml.safe_dump` writes is read back as it was.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

PLAIN = {
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "tag:yaml.org,2002:float": (
        r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
    "tag:yaml.org,2002:timestamp": None,
}
"""How a plain scalar of a type looks; None: no scalar is of this type. A part of what YAML 1.1 reads so."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys: YAML would silently drop the first one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """The rules of YAML 1.1 by the first character of a scalar, with ours for the types in `PLAIN`."""
    ours = {tag: re.compile(rf"^(?:{pattern})$") for tag, pattern in PLAIN.items() if pattern is not None}
    return {
        first: [(tag, ours.get(tag, pattern)) for tag, pattern in rules if tag in ours or tag not in PLAIN]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _resolvers()


def read_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        YAMLError: it is not valid YAML, or has a duplicate key.
    """
    return yaml.load(text, _Loader)
