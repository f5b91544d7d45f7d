"""Divergence of the student's next-token distribution from the teacher's, over the teacher's most likely tokens.

A distribution over V tokens is reduced to C classes: the k tokens that are most likely for the teacher, and one class
for the mass of all others. The loss is the Kullback-Leibler divergence over these classes, at a temperature T:

    z_c = logit_c / T for the k tokens,   z_tail = log sum_{other tokens} exp(logit / T)
    log p = log_softmax(z of the teacher),   log q = log_softmax(z of the student)
    KL = sum_c p_c (log p_c - log q_c) = sum_c p_c (e^d - 1 - d),   d = log q_c - log p_c

The two forms are equal because p and q both add up to 1. No term of the second is negative, so nothing cancels, and
float32 resolves it far below the rounding of the cache.

It is Learning without Forgetting's loss (Li and Hoiem, arXiv 1606.09282; Hinton et al., arXiv 1503.02531) less the
teacher's entropy, so that it is 0 where nothing has changed. Without the tail, the k probabilities would have to be
normalised, and the student would be drawn to a distribution that is not the teacher's (arXiv 2503.16870). Merging
tokens into one class never increases a divergence, so this is a lower bound of the one over the whole vocabulary, and
equal to it at k = V, where there is no tail.

Shapes: N positions, V tokens, K of them kept, C = K + 1 classes, or K where K = V.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = -1e4
"""Log-probability of a class that a model rules out: float16 holds it, and 0 times it is 0."""


def top_tokens(logits_NV: Tensor, k: int) -> Tensor:
    """The k most likely tokens of each position, [N, K], the most likely first."""
    return logits_NV.float().topk(k, dim=-1).indices


def class_log_probs(logits_NV: Tensor, tokens_NK: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the kept tokens and of all others together, [N, C] in float32."""
    scaled_NV = logits_NV.float() / temperature
    classes_NC = scaled_NV.gather(1, tokens_NK)
    if tokens_NK.shape[1] < scaled_NV.shape[1]:
        others_NV = scaled_NV.scatter(1, tokens_NK, -1e30)  # finite: the gradient of log 0 is not a number
        classes_NC = torch.cat([classes_NC, others_NV.logsumexp(1, keepdim=True)], 1)
    return classes_NC.log_softmax(1).clamp(min=LEAST)


def divergence(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """KL(teacher || student) of normalised log-probabilities, in nats, the mean over N: a float32 scalar."""
    return divergences(student_NC, teacher_NC).mean()


def divergences(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """KL(teacher || student) at each position, [N] in nats."""
    p_NC, d_NC = teacher_NC.exp(), student_NC - teacher_NC
    near_NC = d_NC.abs() < 1
    # The exponential of a large d overflows where p is tiny, and its gradient counts even where it is not selected.
    small_NC = d_NC.where(near_NC, 0.0)
    terms_NC = torch.where(near_NC, p_NC * (small_NC.expm1() - small_NC), student_NC.exp() - p_NC - p_NC * d_NC)
    return terms_NC.sum(1)


def squared_surprise(log_probs_NC: Tensor) -> float:
    """Mean over N of sum_c p_c (log p_c)^2, in squared nats.

    If each log p_c is moved by a relative mean square of r, the divergence that results is half of r times this, to
    second order.
    """
    exact_NC = log_probs_NC.double()
    return float((exact_NC.exp() * exact_NC.square()).sum(1).mean())
