"""One place that chooses which backend serves a call.

Every backend is a module with the same four functions over canonical arguments, which `ops` prepares:

* `logits`: `[N, V]`, any strides, float32, float64, bfloat16 or float16; `compute` below is float64 for float64 and
  float32 for the rest, and all arithmetic happens in it.
* `seed` (0-d int64), `row_ids` (int64 `[N]` or None for `0..N-1`), `vocab_start` (global id of column 0): the noise.
* `tau`: `[N]` in `compute`.

```
sample(logits, seed, row_ids, vocab_start, logsumexp) -> Sample
    ids = argmax(l + g), score_max = max(l + g), and with logsumexp also max(l) and sum(exp(l - max(l))).
    Ties go to the smaller id. CPU backends mark a row that holds NaN, +inf or only -inf by id -1; GPU backends give it
    an id in range and NaN in score_max.
one_hot(sample, vocab_size, dtype) -> [N, V]
    one_hot(ids), exactly; NaN throughout a row whose score_max is NaN.
softmax(logits, tau, seed, row_ids, vocab_start, score_max, normalize, out_dtype, out=None) -> (weights, total)
    weights = exp((l + g - score_max) / tau), total = their sum [N]; with normalize the weights are divided by it. They are
    written to out (contiguous, of out_dtype) where it is given.
softmax_backward(dy, logits, tau, seed, row_ids, vocab_start, estimator, sample, dlogprobs, needs_dtau, out) -> dtau
    The estimator's rule (the table in `ops.gumbel_ste_embedding`) for dl given dy [N, V], plus
    dlogprobs * (one_hot(ids) - softmax(l)) where dlogprobs is given, written to out [N, V], which may be dy itself.
    The statistics of sample that the estimator does not use may be empty.
```

Through a head, without ever holding `[N, V]`, over `Head(hidden [N, H], weight [V, H], bias [V] or None, softcap)`:

```
head_sample(head, seed, row_ids, vocab_start) -> Sample
    `sample` with logsumexp of the head's logits.
head_scores(head, tau, seed, row_ids, vocab_start, eps) -> (Sample, total, Support)
    The same, with total = sum(exp((l + g - score_max) / tau)) and, where eps > 0, the stochastic support of
    p = softmax((l + g) / tau). For eps = 0 the support is empty.
head_softmax(head, tau, seed, row_ids, vocab_start, eps, ref) -> (Softmax, Support)
    Without noise: statistics of p = softmax(l / tau) and its support, decided by words of DOMAIN_SUPPORT; ref is a
    second head over the same vocabulary, or None.
head_logits_at(head, rows, tokens) -> [K]
    Single logits, rounded as those that the passes above saw.
gather_dot(x, table, rows, tokens) -> [K]           x[rows] . table[tokens], in compute precision
gather_sum(values, table, offsets, tokens) -> [N, H]  sum over a row's entries of value * table[token]
product(x, table, out=None) -> [N, C]               x @ table.T, rounded as those that the passes above saw; or, where out is
                                                    given (rows apart, tokens side by side), written there and rounded
                                                    to its dtype alone
weighted_sum(values, table) -> [N, H]               values [N, C] @ table [C, H], in compute precision; values are rounded to
                                                    the table's dtype first unless exact_weights(table.dtype)
exact_weights(dtype) -> bool
weight_terms(weights, dy, slope, out, sums) -> [N]  out[0] = weights * (dy - mean) and out[1] = weights, [N, C] each, times
                                                    slope if there is one, rounded to out's dtype. sums [2, N] are those of
                                                    weights and of weights * dy so far, to which these are added; mean is
                                                    their ratio. Returns by how much it has moved
scatter_sum(values, x, rows, tokens, table) -> [V, H]  sum over entries of value * x[row] at row `token`, table's dtype
```

`reference` is not such a module: there the public functions call `grade_kernels.reference`, plain autograd and all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = [
    "BACKENDS",
    "Head",
    "Sample",
    "Softmax",
    "Support",
    "available_backends",
    "module",
    "select",
    "set_backend",
    "status",
    "use_backend",
]

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
_override: str | None = None


class Sample(NamedTuple):
    """What a forward pass leaves behind per row; O(rows) numbers, the only ones saved for backward."""

    ids: torch.Tensor  # [N] int64
    score_max: torch.Tensor  # [N] compute, max(l + g)
    logit_max: torch.Tensor  # [N] compute, max(l); empty unless asked for
    logit_sum: torch.Tensor  # [N] compute, sum(exp(l - max(l))); empty unless asked for


class Softmax(NamedTuple):
    """Statistics per row of `p = softmax(l / tau)`, and of a reference r with the same tau where there is one."""

    logit_max: torch.Tensor  # [N] compute
    total: torch.Tensor  # [N], sum(exp((l - logit_max) / tau))
    # [N], sum p (l - logit_max) / tau, or with a reference sum p ((l - logit_max) - (r - ref_max)) / tau
    moment: torch.Tensor
    ref_max: torch.Tensor  # [N], empty without a reference
    ref_total: torch.Tensor


class Head(NamedTuple):
    """A head whose logits are `softcap(hidden @ weight.T + bias)`."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H], same dtype
    bias: torch.Tensor | None  # [V] compute, contiguous
    softcap: float | None


class Support(NamedTuple):
    """Stochastic support: each token kept with probability min(1, p / eps); sorted by row, then by token.

    The value that stands for a kept token's p is max(p, eps), which makes sums over the support unbiased.
    """

    offsets: torch.Tensor  # [N + 1] int64, where each row's entries begin
    tokens: torch.Tensor  # [K] int64
    p: torch.Tensor  # [K] compute, exact probabilities
    overflow: torch.Tensor  # [N] bool: rows whose support did not fit; they have no entries and take the dense path


def _why_not(name: str) -> str | None:
    """None if a backend can run on this machine at all, else the reason why it cannot."""
    if name in ("reference", "torch"):
        return None
    return module(name).why_unavailable()


def _why_not_here(name: str, device: torch.device) -> str | None:
    """None if a backend can serve tensors of a device here, else the reason. Looks beyond what torch.compile traces."""
    return _why_not(name) or module(name).why_not_device(device)


# What torch.compiler.assume_constant_result does, which would import the compiler, and Triton with it, along with us.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def module(name: str) -> ModuleType:
    """The module that implements a backend."""
    return importlib.import_module(f"grade_kernels.backends.{name}")


def status() -> dict[str, str | None]:
    """Every known backend with None if it is available here, else the reason why it is not."""
    return {name: _why_not(name) for name in BACKENDS}


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine."""
    return [name for name, reason in status().items() if reason is None]


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(BACKENDS)}")
    return name


def set_backend(name: str | None) -> None:
    """Use one backend for every later call in this process; None lets each call choose by device again.

    Raises:
        ValueError: a name that is not known, or a backend that cannot run on this machine.
    """
    global _override
    if name is not None and (reason := _why_not(_known(name))) is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}")
    _override = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use one backend inside a `with` block (process-wide, as `set_backend`). Raises as `set_backend` does."""
    global _override
    before = _override
    set_backend(name)
    try:
        yield
    finally:
        _override = before


def select(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of this device and dtype.

    An explicit choice (`use_backend`, `set_backend`, then the environment variable GRADE_KERNELS_BACKEND) wins, and
    raises where it cannot serve the device. Otherwise: `cpu` or `triton` for their devices, else `torch`. Nobody has
    measured `cuda` against `triton` yet, so it runs only where it is asked for.
    """
    name = _override or os.environ.get("GRADE_KERNELS_BACKEND") or None
    if name is not None:
        if _known(name) in ("reference", "torch"):
            return name
        reason = _why_not_here(name, device)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot serve tensors on device {str(device)!r}: {reason}")
        return name
    preferred = "cpu" if device.type == "cpu" else "triton"
    return preferred if _why_not_here(preferred, device) is None else "torch"
