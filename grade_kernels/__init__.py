"""Kernels for training through discrete tokens: Gumbel noise, straight-through samples, and GRADE on top of them."""

from grade_kernels import backends, reference
from grade_kernels.backends import available_backends, set_backend, use_backend
from grade_kernels.noise import GumbelNoise, PosteriorNoise
from grade_kernels.ops import (
    GumbelSTEEmbedding,
    LinearGumbelSTE,
    gumbel_sample,
    gumbel_softmax,
    gumbel_ste,
    gumbel_ste_embedding,
    linear_entropy,
    linear_gumbel_sample,
    linear_gumbel_ste,
    linear_kl,
    linear_logprobs,
)

__version__ = "0.1.0"

__all__ = [
    "GumbelNoise",
    "GumbelSTEEmbedding",
    "LinearGumbelSTE",
    "PosteriorNoise",
    "available_backends",
    "backends",
    "gumbel_sample",
    "gumbel_softmax",
    "gumbel_ste",
    "gumbel_ste_embedding",
    "linear_entropy",
    "linear_gumbel_sample",
    "linear_gumbel_ste",
    "linear_kl",
    "linear_logprobs",
    "reference",
    "set_backend",
    "use_backend",
]
