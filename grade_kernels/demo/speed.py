"""Time and memory of the sampling layer, ours against plain PyTorch. Correctness first: no speed without it.

The layer is what alignment adds to a forward pass: from hidden states through the LM head to the embeddings of
straight-through samples, and back to the gradient of the hidden states. Plain PyTorch writes it
`F.gumbel_softmax(hidden @ head.T, tau, hard=True) @ table`. Head and table are frozen here, as with LoRA and a reward model.

Times are taken in this process, the two layers in turn. Memory is the growth of the resident set at its peak over
everything that was there before (inputs and gradient of the output included), in a fresh process per layer:
`python -m grade_kernels.demo.speed ours 64 50257 768` prints it.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F

import grade_kernels as gk

__all__ = ["Speed", "measure"]

TAU = 1.0
_MB = 2**20


@dataclass(frozen=True)
class Speed:
    """One shape, measured. Without `correct` there are no other numbers."""

    rows: int
    vocab: int
    width: int
    correct: bool
    plain_ms: float | None = None
    ours_ms: float | None = None
    plain_mb: float | None = None
    ours_mb: float | None = None


class Inputs(NamedTuple):
    """Hidden states `[N, H]`, head and table `[V, H]`, and the gradient of the embeddings `[N, H]`."""

    hidden: torch.Tensor
    head: torch.Tensor
    table: torch.Tensor
    grad: torch.Tensor


def _plain(x: Inputs) -> torch.Tensor:
    return F.gumbel_softmax(x.hidden @ x.head.T, TAU, hard=True) @ x.table


def _ours(x: Inputs) -> torch.Tensor:
    embedding = gk.linear_gumbel_ste(x.hidden, x.head, x.table, TAU).embedding
    assert isinstance(embedding, torch.Tensor)  # one table, one embedding
    return embedding


_LAYERS: dict[str, Callable[[Inputs], torch.Tensor]] = {"plain": _plain, "ours": _ours}


def _inputs(rows: int, vocab: int, width: int) -> Inputs:
    """With logits about as peaked as a language model's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    head = normal(vocab, width).mul_(4.5 / width**0.5)
    return Inputs(normal(rows, width).requires_grad_(), head, normal(vocab, width), normal(rows, width))


def _forward_backward(layer: str, x: Inputs) -> None:
    x.hidden.grad = None
    _LAYERS[layer](x).backward(x.grad)


def measure(rows: int, vocab: int, width: int, repeats: int) -> Speed:
    """Check one shape, and where the check holds, time both layers and weigh them."""
    inputs = _inputs(rows, vocab, width)
    if not _agree(inputs):
        return Speed(rows, vocab, width, correct=False)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for repeat in range(repeats + 1):
        for layer, measured in times.items():
            start = time.perf_counter()
            _forward_backward(layer, inputs)
            if repeat:  # the first round warms up
                measured.append(1000 * (time.perf_counter() - start))
    del inputs
    return Speed(
        rows,
        vocab,
        width,
        correct=True,
        plain_ms=statistics.median(times["plain"]),
        ours_ms=statistics.median(times["ours"]),
        plain_mb=_memory_in_fresh_process("plain", rows, vocab, width),
        ours_mb=_memory_in_fresh_process("ours", rows, vocab, width),
    )


def _agree(x: Inputs) -> bool:
    """Do both layers give the same tokens, embeddings and (at eps = 0) gradient under the same noise?"""
    noise = gk.GumbelNoise(1234)
    ours, ids, _ = gk.linear_gumbel_ste(x.hidden, x.head, x.table, TAU, noise=noise, eps=0.0)
    assert isinstance(ours, torch.Tensor)
    (ours_grad,) = torch.autograd.grad(ours, x.hidden, x.grad)
    for start in range(0, len(x.hidden), 8):  # a few rows at a time: logits and noise in full are large
        rows = slice(start, start + 8)
        part = x.hidden[rows].detach().requires_grad_()
        logits = part @ x.head.T
        gumbel = gk.GumbelNoise(1234, row_ids=torch.arange(start, start + len(part))).dense(*logits.shape)
        scores = logits + gumbel
        soft = (scores / TAU).softmax(dim=-1)
        hard = torch.zeros_like(soft).scatter_(-1, ids[rows, None], 1.0)
        plain = (hard - soft.detach() + soft) @ x.table
        (plain_grad,) = torch.autograd.grad(plain, part, x.grad[rows])
        # The best score, but for the rounding of logits that were multiplied out in another order.
        same = (
            bool((scores.gather(-1, ids[rows, None])[:, 0] >= scores.amax(dim=-1) - 1e-3).all())
            and torch.allclose(ours[rows], plain, atol=1e-4, rtol=1e-4)
            and torch.allclose(ours_grad[rows], plain_grad, atol=1e-4 * float(plain_grad.abs().max()), rtol=1e-3)
        )
        if not same:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------- memory


def _memory_in_fresh_process(layer: str, *shape: int) -> float:
    command = [sys.executable, "-m", "grade_kernels.demo.speed", layer, *map(str, shape)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_resident() -> int:
    """The highest resident set of this process so far (on Linux: since `_reset_peak`), in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _reset_peak() -> None:
    # Where there is no such file, the peak is that of the whole process, which the inputs dominate.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _main(layer: str, rows: int, vocab: int, width: int) -> None:
    _forward_backward(layer, _inputs(2, 64, 8))  # libraries and threads wake up before the measurement
    inputs = _inputs(rows, vocab, width)
    _reset_peak()
    before = psutil.Process().memory_info().rss
    _forward_backward(layer, inputs)
    sys.stdout.write(f"{(_peak_resident() - before) / _MB:.1f}\n")


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
