"""The published formulas of an embedding with its gradients, in plain PyTorch: what backends are compared with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tests.support.helpers import compute_dtype


class Answer(NamedTuple):
    """Everything one call returns and sends back."""

    embedding: tuple[torch.Tensor, ...]
    logprobs: torch.Tensor
    dlogits: torch.Tensor
    dtables: tuple[torch.Tensor, ...]
    dtau: torch.Tensor


def jacobian(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return p * (x - (p * x).sum(-1, keepdim=True))


def by_formula(
    logits: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    tau: torch.Tensor,
    g: torch.Tensor,
    ids: torch.Tensor,
    estimator: str,
    des: tuple[torch.Tensor, ...],
    dlogprobs: torch.Tensor,
) -> Answer:
    """The published formulas in plain PyTorch, in the dtypes of the arguments: float64 is the truth."""
    dtype, column = logits.dtype, tau[:, None].to(logits.dtype)
    D = F.one_hot(ids, logits.shape[1]).to(dtype)
    noisy, tempered = ((logits + g.to(dtype)) / column).softmax(-1), (logits / column).softmax(-1)
    wide = logits.to(compute_dtype(dtype))
    log_p = wide.log_softmax(-1)
    dY = torch.zeros_like(logits)
    for de, table in zip(des, tables, strict=True):
        wider = torch.promote_types(dtype, table.dtype)  # arithmetic is that of the logits, whatever the tables'
        dY = dY + (de.to(wider) @ table.to(wider).T).to(dtype)
    y = noisy if estimator == "soft" else D
    dtau = torch.zeros_like(column[:, 0])
    if estimator == "reinmax":
        dl = 2 * jacobian((D + tempered) / 2, dY) - jacobian(log_p.exp().to(dtype), dY) / 2
    else:
        p, z = (tempered, logits) if estimator == "st" else (noisy, logits + g.to(dtype))
        dl = jacobian(p, dY) / column
        dtau = -(dl * torch.where(logits == -math.inf, 0.0, z)).sum(1) / column[:, 0]
    dl = dl + (dlogprobs.to(wide.dtype)[:, None] * (D - log_p.exp())).to(dtype)
    return Answer(
        tuple(y.to(table.dtype) @ table for table in tables),
        log_p.gather(1, ids[:, None]).squeeze(1),
        dl.masked_fill(logits == -math.inf, 0.0),
        tuple(y.to(table.dtype).T @ de for de, table in zip(des, tables, strict=True)),
        dtau.to(tau.dtype),
    )
