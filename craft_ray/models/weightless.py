"""A model without its weights: what another process needs to preprocess samples for it, without loading it."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from craft_ray.errors import ConfigError, first_line
from craft_ray.models.base import Model


def without_weights(model: Model) -> bytes:
    """A model whose weights have shapes and types but no values, for `preprocessing_model` in another process.

    Preprocessing and collating read none of them, so a process that does nothing else holds a few megabytes whatever
    the model's size. The model itself is not changed.

    Raises:
        ConfigError: a part of the model cannot be sent to another process.
    """
    stream = io.BytesIO()
    try:
        _Pickler(stream, model.module).dump(model)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{model.description} cannot be sent to other processes ({first_line(error)}): preprocess its samples in "
            f"this one (anchors.readers=0, train.loader_workers=0)"
        ) from None
    return stream.getvalue()


def preprocessing_model(sent: bytes) -> Model:
    """The model of `without_weights`, in the process that it was sent to.

    Raises:
        ConfigError: the process lacks the code of a part of it.
    """
    try:
        model = pickle.loads(sent)  # written by this run's own driver
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"a process cannot preprocess samples: the model's code is not there ({first_line(error)}); preprocess "
            f"them where the model is (anchors.readers=0, train.loader_workers=0)"
        ) from None
    assert isinstance(model, Model)
    return model


class _Pickler(pickle.Pickler):
    """Leaves the values of a module's tensors out."""

    def __init__(self, stream: io.BytesIO, module: nn.Module) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._weights = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in self._weights:
            return _empty, (tuple(value.shape), value.dtype, value.requires_grad, isinstance(value, nn.Parameter))
        return NotImplemented


def _empty(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, is_parameter: bool) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return nn.Parameter(tensor, requires_grad) if is_parameter else tensor
