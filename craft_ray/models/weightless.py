"""A model without its modules: what another process needs to preprocess samples for it, without loading it."""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch import nn

from craft_ray.errors import ConfigError, first_line
from craft_ray.models.base import Model


def without_weights(value: Any) -> bytes:
    """A model, or what preprocesses samples with one, for `received` in another process.

    The model's modules are left out: preprocessing and collating call none, so a process that does nothing else holds
    a few megabytes whatever the model's size. The model itself is not changed.

    Raises:
        ConfigError: a part of the value cannot be sent to another process.
    """
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"a part of the model cannot be sent to other processes ({first_line(error)}): preprocess its samples "
            f"where it is (anchors.readers=0, train.loader_workers=0)"
        ) from None
    return stream.getvalue()


def received(sent: bytes) -> Any:
    """What `without_weights` sent, in the process that it was sent to.

    Raises:
        ConfigError: the process lacks the code of a part of it.
    """
    try:
        return pickle.loads(sent)  # it comes from this run's own driver
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"a process cannot preprocess samples, because it lacks code of the model ({first_line(error)}): "
            f"preprocess them where the model is (anchors.readers=0, train.loader_workers=0)"
        ) from None


class _Pickler(pickle.Pickler):
    """Replaces each module of a model with an empty one."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._modules: set[int] = set()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Model):  # comes before its parts
            roots = [value.module] if value.adapter is None else [value.module, value.adapter.tuner]
            self._modules |= {id(module) for root in roots for module in root.modules()}
        return (nn.Module, ()) if id(value) in self._modules else NotImplemented
