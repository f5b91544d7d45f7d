"""Distance of the student's hidden states from the teacher's.

Mean over samples, of the mean over layers and vectors, of a distance d(student, teacher), computed in float32:

    relative_mse   |s - t|^2 / |t|^2          in units of the teacher's own size, as is epsilon
    mse            |s - t|^2 / D
    cosine         1 - <s, t> / (|s| |t|)
    l1             |s - t|_1 / D

Every sample has the same weight however many vectors it has, so the mean over workers is the mean over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from craft_ray.method.pooling import Vectors

TINY = 1e-12
"""Keeps the distance to an all-zero vector finite."""


def hidden_loss(student: Vectors, teacher: Vectors, loss_type: str = "relative_mse") -> Tensor:
    """Mean distance of the student's vectors from the teacher's, a float32 scalar; errors as in `hidden_losses`."""
    return hidden_losses(student, teacher, loss_type).mean()


def hidden_losses(student: Vectors, teacher: Vectors, loss_type: str = "relative_mse") -> Tensor:
    """Distance of each sample's vectors from the teacher's, [B] in float32.

    Raises:
        ValueError: the shapes differ, or the name of the loss is unknown.
    """
    s, t = student.values_BLVD, teacher.values_BLVD
    if s.shape != t.shape:
        raise ValueError(
            f"the student's vectors are {tuple(s.shape)} (sample, layer, vector, dim), "
            f"the cached ones {tuple(t.shape)}: the cache belongs to another model, other layers or other positions"
        )
    s, t = s.float(), t.float()
    if loss_type == "relative_mse":
        distance_BLV = (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=TINY)
    elif loss_type == "mse":
        distance_BLV = (s - t).square().mean(-1)
    elif loss_type == "cosine":
        distance_BLV = 1 - cosine_similarity(s, t, dim=-1, eps=TINY)
    elif loss_type == "l1":
        distance_BLV = (s - t).abs().mean(-1)
    else:
        raise ValueError(f"unknown loss_type '{loss_type}': relative_mse, mse, cosine or l1")
    valid_BV = teacher.valid_BV
    per_vector_BV = torch.where(valid_BV, distance_BLV.mean(1), 0.0)
    return per_vector_BV.sum(1) / valid_BV.sum(1)
