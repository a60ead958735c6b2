"""Products of rows with gathered rows of a table: what the sparse backward consists of. No atomics anywhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.triton.scores import weighted_sum
from grade_kernels.backends.triton.targets import launching

BLOCK_COLUMNS = 512
DOT_ENTRIES = 4  # entries that a program multiplies at a time
SUM_ENTRIES = 4  # rows of the table that a program has in flight


@triton.jit(do_not_specialize=["K"])
def gather_dot_kernel(
    x, table, rows, tokens, out, s_xn, s_xd, s_tv, s_td, K, D, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[k] = x[rows[k]] . table[tokens[k]]."""
    o_k = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    m_k = o_k < K
    p_x = x + tl.load(rows + o_k, mask=m_k, other=0)[:, None] * s_xn  # [ENTRIES, 1]
    p_t = table + tl.load(tokens + o_k, mask=m_k, other=0)[:, None] * s_tv
    b_sum = tl.zeros((ENTRIES, BLOCK), tl.float32)
    for i_d in range(0, tl.cdiv(D, BLOCK)):
        # 64-bit: they are multiplied by a stride that may be the vocabulary.
        o_d = i_d * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        m_kd = m_k[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_x + o_d[None, :] * s_xd, mask=m_kd, other=0.0).to(tl.float32)  # [ENTRIES, BLOCK]
        b_t = tl.load(p_t + o_d[None, :] * s_td, mask=m_kd, other=0.0).to(tl.float32)  # [ENTRIES, BLOCK]
        b_sum = tl.fma(b_x, b_t, b_sum)
    tl.store(out + o_k, tl.sum(b_sum, 1), mask=m_k)


@triton.jit
def gather_sum_kernel(
    values, table, offsets, tokens, out, s_tv, s_td, D, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of columns of out[n] = sum of values[k] * table[tokens[k]] over row n's entries k, in order."""
    i_n = tl.program_id(0).to(tl.int64)
    # 64-bit: they are multiplied by a stride that may be the vocabulary.
    o_d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_d = o_d < D
    start = tl.load(offsets + i_n)
    count = (tl.load(offsets + i_n + 1) - start).to(tl.int32)
    o_e = tl.arange(0, ENTRIES)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_e in range(0, tl.cdiv(count, ENTRIES)):
        m_e = i_e * ENTRIES + o_e < count
        o_k = start + i_e * ENTRIES + o_e
        b_value = tl.load(values + o_k, mask=m_e, other=0.0)  # [ENTRIES]
        o_t = tl.load(tokens + o_k, mask=m_e, other=0)  # [ENTRIES]
        m_ed = m_e[:, None] & m_d[None, :]
        p_t = table + o_t[:, None] * s_tv + o_d[None, :] * s_td
        b_t = tl.load(p_t, mask=m_ed, other=0.0).to(tl.float32)  # [ENTRIES, BLOCK]
        b_sum += weighted_sum(b_value[:, None], b_t, 0)
    tl.store(out + i_n * D + o_d, b_sum, mask=m_d)


def _block(width: int) -> int:
    return min(BLOCK_COLUMNS, triton.next_power_of_2(width))


def gather_dot(x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`Backend.gather_dot`, for a width that is not 0."""
    width, count = x.shape[1], len(tokens)
    out = torch.empty(count, dtype=torch.float32, device=x.device)
    if count > 0:
        with launching(x):
            gather_dot_kernel[(triton.cdiv(count, DOT_ENTRIES),)](
                x=x, table=table, rows=rows.contiguous(), tokens=tokens.contiguous(), out=out,
                s_xn=x.stride(0), s_xd=x.stride(1), s_tv=table.stride(0), s_td=table.stride(1), K=count, D=width,
                ENTRIES=DOT_ENTRIES, BLOCK=_block(width), num_warps=4,
            )  # fmt: skip
    return out


def gather_sum(values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`Backend.gather_sum`, for a width that is not 0."""
    rows, width = len(offsets) - 1, table.shape[1]
    out = torch.empty(rows, width, dtype=torch.float32, device=table.device)
    if rows > 0:
        with launching(table):
            gather_sum_kernel[(rows, triton.cdiv(width, _block(width)))](
                values=values.float().contiguous(), table=table, offsets=offsets.contiguous(),
                tokens=tokens.contiguous(), out=out, s_tv=table.stride(0), s_td=table.stride(1), D=width,
                ENTRIES=SUM_ENTRIES, BLOCK=_block(width), num_warps=4,
            )  # fmt: skip
    return out
