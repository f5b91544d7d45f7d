"""Sections of several kinds, made from their keys as in a file."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from craft_ray.config import DataConfig, EvalSet


def data_config(**keys: Any) -> DataConfig:
    adapter: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    return adapter.validate_python(keys)


def eval_set(**keys: Any) -> EvalSet:
    adapter: TypeAdapter[EvalSet] = TypeAdapter(EvalSet)
    return adapter.validate_python(keys)
