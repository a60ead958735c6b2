"""The operations over given logits `[N, V]`, and the ways to do the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import grade_kernels as gk
from benchmarks.harness import OURS, Case, Contestants, compiled

TAU = 1.0
SEED = 20260101
# Relative to the norm of a row. A narrow result is rounded, and so is the gradient that reaches it through a table.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}


def _tensor(case: Case, *shape: int, key: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key)
    return torch.randn(shape, generator=generator).to(case.device, case.torch_dtype)


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Logits, the frozen table, and the gradient that comes from above; None where a case has none.

    Standard normal logits are nearly flat, which is the hardest distribution to sample from by bounds (NOTES.md).
    """
    logits = _tensor(case, case.N, case.V, key=1)
    table = None if case.D is None else _tensor(case, case.V, case.D, key=2)
    if case.pass_ == "forward":
        return logits, table, None
    return logits.requires_grad_(), table, _tensor(case, case.N, case.D or case.V, key=3)


def _ours(op: str, library: Any, table: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """The operation as a function of logits (and `noise`), in `grade_kernels` or `grade_kernels.reference`."""
    if op == "gumbel_sample":
        return library.gumbel_sample
    if op == "gumbel_ste_embedding":
        return lambda logits, **noise: library.gumbel_ste_embedding(logits, table, TAU, **noise).embedding
    return lambda logits, **noise: getattr(library, op)(logits, TAU, **noise)


def _theirs(op: str, table: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same in PyTorch. For sampling it is short of an argmax over its one-hot result, to their advantage."""
    if op == "gumbel_ste_embedding":
        return lambda logits: F.gumbel_softmax(logits, TAU, hard=True) @ table
    return lambda logits: F.gumbel_softmax(logits, TAU, hard=op != "gumbel_softmax")


def _multinomial(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def _exponential_race(logits: torch.Tensor) -> torch.Tensor:
    """The sampler of gpt-fast and others: the first of V exponential clocks to ring."""
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_(1)).argmax(-1)


def step(function: Callable[..., Any], logits: torch.Tensor, upstream: torch.Tensor | None) -> tuple[Any, ...]:
    """What a training step does with it: outputs, and the gradient of the logits where there is one from above."""
    if upstream is None:
        with torch.no_grad():
            return (function(logits),)
    y = function(logits)
    return y, *torch.autograd.grad(y, logits, upstream)


def build(case: Case) -> Contestants:
    """Ours, eager and compiled PyTorch; for sampling, other samplers too."""
    logits, table, upstream = inputs(case)
    theirs = _theirs(case.op, table)
    functions = {OURS: _ours(case.op, gk, table), "eager": theirs, "compiled": compiled(theirs)}
    if case.op == "gumbel_sample":
        functions |= {
            "multinomial": _multinomial,
            "exponential": _exponential_race,
            "compiled exponential": compiled(_exponential_race),
        }
    return {name: lambda function=function: step(function, logits, upstream) for name, function in functions.items()}


def check(case: Case, ours: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Compare what is going to be timed with the reference in float64, on the first row and the last.

    Raises:
        AssertionError: a sample, value or gradient differs.
    """
    torch.manual_seed(SEED)
    actual = ours()
    torch.manual_seed(SEED)
    rows = torch.tensor(sorted({0, case.N - 1}))
    noise = gk.GumbelNoise(gk.GumbelNoise.from_generator().seed, rows)
    logits, table, upstream = inputs(case)
    wide = logits.detach()[rows].cpu().double().requires_grad_(logits.requires_grad)
    if table is None:
        op, dy = case.op, None if upstream is None else upstream[rows].cpu().double()
    else:
        # Embedding a one-hot row is a lookup, and its gradient dY = de @ E.T: no table in float64 is needed.
        op, dy = "gumbel_ste", (upstream[rows].float() @ table.float().T).cpu().double()
    expected = step(partial(_ours(op, gk.reference, None), noise=noise), wide, dy)
    if table is not None:
        expected = table[expected[0].argmax(-1)].cpu(), *expected[1:]
    some = [x[rows.to(x.device)] for x in actual]
    agree(case, some, expected, exact=case.op != "gumbel_softmax")


def agree(case: Case, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], exact: bool) -> None:
    """Compare outputs, and gradients where there are any, with the truth in float64, row by row.

    Args:
        case: what was computed.
        actual: the output, and the gradient if the case has one, each `[rows, width]` or `[rows]`.
        expected: the truth.
        exact: outputs must be equal; else they may differ as gradients may.

    Raises:
        AssertionError: they differ.
    """
    for what, mine, truth in zip(("output", "gradient")[: len(expected)], actual, expected, strict=True):
        mine, truth = mine.detach().cpu().double(), truth.detach().cpu().double()
        if what == "output" and exact:
            assert torch.equal(mine, truth), f"{case}: another sample than the reference's"
            continue
        # A row whose own gradient nearly vanishes is judged by the size of the others'.
        norms = truth.norm(dim=-1)
        error = ((mine - truth).norm(dim=-1) / norms.clamp(min=norms.mean())).max()
        assert error <= TOLERANCE[case.dtype], f"{case}: relative error of the {what} is {error:.1e}"
