"""What a teacher yields, in the type that the cache stores, refused if that type cannot hold it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from craft_ray.errors import DataError

TORCH = {"float16": torch.float16, "float32": torch.float32}


def stored(
    values_NF: Tensor, names: Sequence[str], counts: Sequence[int], dtype: str, what: str = "hidden states"
) -> np.ndarray:
    """Vectors in the storage type, on the host; `counts[i]` of them belong to the anchor that is `names[i]` in errors.

    The conversion and its check run where the values are, so that only the smaller type is moved.

    Raises:
        DataError: a value is not finite, or too large for the storage type.
    """
    values = values_NF.to(TORCH[dtype])
    wrong_N = ~values.isfinite().all(1)
    if bool(wrong_N.any()):
        first = int(wrong_N.nonzero()[0])
        anchor = names[int(np.searchsorted(np.cumsum(counts), first, side="right"))]
        largest = values_NF[first].float().abs().max().item()
        if not np.isfinite(largest):
            raise DataError(f"the teacher's {what} of {anchor} are not finite: check the model and the input")
        raise DataError(
            f"a hidden state of {anchor} is {largest:.3g}, {dtype} ends at {np.finfo(dtype).max:.3g}: set "
            f"anchors.dtype to float32"
        )
    return values.cpu().numpy()
