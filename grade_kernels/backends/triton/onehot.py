"""`one_hot`: the hard sample, written once (zeros and a scatter would write it twice)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Sample
from grade_kernels.backends.triton.strips import NUM_WARPS
from grade_kernels.backends.triton.targets import launching

BLOCK = 2048


@triton.jit
def one_hot_kernel(ids, score_max, out, V, BLOCKS, BLOCK: tl.constexpr):
    """One block of one row."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_b = i_p // BLOCKS, i_p % BLOCKS
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    r_max = tl.load(score_max + i_n)
    b_y = tl.where(o_v == tl.load(ids + i_n), 1.0, 0.0)  # [BLOCK]
    # A row without a distribution has no sample either.
    b_y = tl.where(r_max != r_max, float("nan"), b_y)
    tl.store(out + i_n * V + o_v, b_y.to(out.dtype.element_ty), mask=o_v < V)


def one_hot(sample: Sample, vocab: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """`Backend.one_hot`."""
    rows = sample.ids.shape[0]
    out = torch.empty(rows, vocab, dtype=dtype, device=sample.ids.device) if out is None else out
    if rows:
        blocks = triton.cdiv(vocab, BLOCK)
        with launching(out):
            one_hot_kernel[(rows * blocks,)](
                ids=sample.ids.contiguous(), score_max=sample.score_max.contiguous(), out=out, V=vocab, BLOCKS=blocks,
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out
