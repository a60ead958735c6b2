"""What the kernels of this package are measured against: Gumbel noise as it is usually drawn.

One Philox call per logit, of whose four words one is used, and `-log(-log(u))`. Never launched; `inspect` compiles it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "head_sample_kernel", "sample_kernel"]

BLOCK = 2048


@triton.jit
def _noisy(b_l, seed, offsets):
    """Logits plus noise of a 24-bit uniform number, kept from 0 as usual."""
    u = tl.maximum(tl.rand(seed, offsets), 1e-20)
    return b_l - tl.log(-tl.log(u))


@triton.jit(do_not_specialize=["V"])
def sample_kernel(logits, seed, ids, s_n, V, BLOCK: tl.constexpr):
    """The sampled token of one row of logits."""
    i_n = tl.program_id(0).to(tl.int64)
    key = tl.load(seed)
    p_row = logits + i_n * s_n
    b_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_id = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, V, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        b_l = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_s = _noisy(b_l, key, i_n.to(tl.int32) * V + o_v)
        b_id = tl.where(b_s > b_best, o_v, b_id)
        b_best = tl.maximum(b_best, b_s)
    m_best = tl.max(b_best, 0)
    tl.store(ids + i_n, tl.min(tl.where(b_best == m_best, b_id, V), 0).to(tl.int64))


@triton.jit(do_not_specialize=["N", "V"])
def head_sample_kernel(
    hidden, weight, seed, best, index, s_hn, s_wv, N, V, H,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The best score of BM rows in TILES tiles of the vocabulary, and its token."""
    blocks = tl.cdiv(N, BM)
    i_b, i_s = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key = tl.load(seed)
    o_n = i_b * BM + tl.arange(0, BM)
    p_a = hidden + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * s_hn
    o_k = tl.arange(0, BK)
    b_best = tl.full((BM,), float("-inf"), tl.float32)
    b_id = tl.zeros((BM,), tl.int32)
    for i_t in range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V, BN))):
        o_v = i_t * BN + tl.arange(0, BN)
        p_b = weight + tl.minimum(o_v, V - 1).to(tl.int64)[:, None] * s_wv
        b_acc = tl.zeros((BM, BN), tl.float32)
        for i_k in range(0, tl.cdiv(H, BK)):
            b_a, b_b = tl.load(p_a + (i_k * BK + o_k)[None, :]), tl.load(p_b + (i_k * BK + o_k)[None, :])
            b_acc = tl.dot(b_a, tl.trans(b_b), b_acc)
        b_s = tl.where((o_v < V)[None, :], _noisy(b_acc, key, o_n[:, None] * V + o_v[None, :]), float("-inf"))
        m_best, i_v = tl.max(b_s, 1, return_indices=True)
        b_id = tl.where(m_best > b_best, i_t * BN + i_v, b_id)
        b_best = tl.maximum(b_best, m_best)
    o_p = o_n * tl.cdiv(V, BN * TILES) + i_s
    tl.store(best + o_p, b_best, mask=o_n < N)
    tl.store(index + o_p, b_id, mask=o_n < N)
