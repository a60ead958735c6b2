"""What the operation takes, and what its forward pass leaves for its backward pass."""

from typing import Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from grade_kernels.backends import Head, Noise, Support
from grade_kernels.ops.head_gradients import PerHead

__all__ = ["Draw", "Gradients", "Kept", "Statistics"]

T = TypeVar("T")


class Draw(NamedTuple):
    """The arguments."""

    head: Head
    tables: list[torch.Tensor]  # [V, D]
    tau: torch.Tensor  # [N] compute
    noise: Noise
    ids: torch.Tensor | None  # [N]: return these tokens
    estimator: str
    eps: float
    wants_support: bool  # a backward pass can follow
    backend: str
    draws: int = 1  # M, of `gumbel_rao`


class Kept(NamedTuple):
    """What is saved beside the arguments and the tokens."""

    statistics: torch.Tensor  # [5, N], see `Statistics`
    # of the relaxation; empty where the table of passes has none; of M N rows, draw by draw, with `gumbel_rao`
    support: Support
    untempered: Support  # of softmax(l), for `reinmax`


class Statistics(NamedTuple):
    """The rows of `Kept.statistics`; a row that no pass fills is zero."""

    score_max: torch.Tensor
    logit_max: torch.Tensor
    logit_sum: torch.Tensor  # sum(exp(l - logit_max))
    relaxed_sum: torch.Tensor  # the relaxation's own normaliser: of the scores, or of the logits at tau
    chosen: torch.Tensor  # logit of the token that was returned


class Gradients(NamedTuple, Generic[T]):
    """The arguments that have gradients."""

    head: PerHead[T]
    tables: list[T]
    tau: T
