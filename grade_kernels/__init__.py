"""Kernels for training through discrete tokens: Gumbel noise, straight-through samples, and GRADE on top of them."""

from grade_kernels import backends, reference
from grade_kernels.backends import available_backends, set_backend, use_backend
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import (
    GumbelSTEEmbedding,
    gumbel_sample,
    gumbel_softmax,
    gumbel_ste,
    gumbel_ste_embedding,
)

__version__ = "0.1.0"

__all__ = [
    "GumbelNoise",
    "GumbelSTEEmbedding",
    "available_backends",
    "backends",
    "gumbel_sample",
    "gumbel_softmax",
    "gumbel_ste",
    "gumbel_ste_embedding",
    "reference",
    "set_backend",
    "use_backend",
]
