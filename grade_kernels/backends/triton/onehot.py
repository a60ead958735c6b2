"""`one_hot`: the hard sample, written once (zeros and a scatter would write it twice)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Sample
from grade_kernels.backends.triton.tiles import NUM_WARPS, launching

BLOCK = 2048


@triton.jit
def one_hot_kernel(ids, score_max, out, V, BLOCKS, BLOCK: tl.constexpr):
    """One block of one row."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_b = i_p // BLOCKS, i_p % BLOCKS
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    m_max = tl.load(score_max + i_n)
    b = tl.where(o_v == tl.load(ids + i_n), 1.0, 0.0)
    # A row without a distribution has no sample either.
    b = tl.where(m_max != m_max, float("nan"), b)
    tl.store(out + i_n * V + o_v, b.to(out.dtype.element_ty), mask=o_v < V)


def one_hot(sample: Sample, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """`Backend.one_hot`."""
    rows = sample.ids.shape[0]
    out = torch.empty(rows, vocab, dtype=dtype, device=sample.ids.device)
    if rows:
        blocks = triton.cdiv(vocab, BLOCK)
        ids, score_max = sample.ids.contiguous(), sample.score_max.contiguous()
        with launching(out):
            one_hot_kernel[(rows * blocks,)](ids, score_max, out, vocab, blocks, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
