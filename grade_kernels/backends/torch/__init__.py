"""The fallback: plain PyTorch operations on any device, chunked over the vocabulary."""

from grade_kernels.backends.torch.head import (
    exact_weights,
    gather_dot,
    gather_sum,
    head_logits_at,
    head_sample,
    head_scores,
    head_softmax,
    product,
    scatter_sum,
    weight_terms,
    weighted_sum,
)
from grade_kernels.backends.torch.rows import one_hot, sample, softmax, softmax_backward

__all__ = [
    "exact_weights",
    "gather_dot",
    "gather_sum",
    "head_logits_at",
    "head_sample",
    "head_scores",
    "head_softmax",
    "one_hot",
    "product",
    "sample",
    "scatter_sum",
    "softmax",
    "softmax_backward",
    "weight_terms",
    "weighted_sum",
]
