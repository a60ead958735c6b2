"""The other way through a head: the library's product, a chunk of the vocabulary at a time, and kernels that read it.

A vendor's library multiplies as fast as a device can, with instructions that Triton may not know, and takes any dtype. So
here its product with a chunk of the head's rows goes to a buffer, which one chunk after another uses. The kernels of
`head_sampling` and `head_relaxation` run over it as they run over tiles: with the same splits, statistics, slots and
launches, in which a tile is loaded and not multiplied. Memory beyond inputs and results is the buffer's.

A chunk is a number of neighbouring splits. In the buffer a chunk's first token is the first of its first split. Columns that
no token has, before the vocabulary or behind it, hold -inf. So every group of four tokens lies at a multiple of 16 bytes, and
no load needs a mask. What chunks there are changes no result: not even candidates depend on it, for their bound comes from
the launches before, as with tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Head
from grade_kernels.backends.torch.products import product
from grade_kernels.backends.triton.head_support import Launch, Plan, Product
from grade_kernels.backends.triton.head_tiles import head_options, is_even, softcapped
from grade_kernels.backends.triton.sizes import HeadTile, TritonSizes
from grade_kernels.backends.triton.targets import Target, compiler_options, current_target

__all__ = ["Chunks", "Tiles", "buffered_logits", "chunk_splits", "chunk_tile", "chunk_tile_options", "product_of"]

# Threads of a row, each with a group of four tokens: what the PTX blocks for candidates know.
THREADS = 4
_SMALL = 2**26  # bytes of a buffer for which nobody asks how much memory is free


@triton.jit
def buffered_logits(p_row, column, bias, softcap, V, first, WIDTH: tl.constexpr, THREADS: tl.constexpr):
    """Logits of tokens `first .. first + WIDTH - 1` in `head_tiles.pieces`, from the buffer's columns from `column` on."""
    PIECE: tl.constexpr = 4 * THREADS
    BM: tl.constexpr = p_row.shape[0]
    b_pieces = ()
    for i in tl.static_range(WIDTH // PIECE):
        o_c = i * PIECE + tl.arange(0, PIECE)
        b_l = tl.load(p_row[:, None] + (column + o_c)[None, :])  # [BM, PIECE]
        if bias is not None:
            b_l += tl.load(bias + tl.minimum(tl.maximum(first + o_c, 0), V - 1))[None, :]
        if softcap is not None:
            b_l = softcapped(b_l, softcap)
        b_even, b_odd = tl.split(tl.reshape(b_l, [BM, THREADS, 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        b_pieces += (b_0, b_1, b_2, b_3)
    return b_pieces


def chunk_tile(sizes: TritonSizes, target: Target) -> HeadTile:
    """The tile of a chunk on a device."""
    if target.backend == "hip":
        # With several warps Triton's AMD compiler lays words out otherwise than logits, and each is drawn twice.
        return sizes.chunk_tile._replace(num_warps=1)
    if target.capability // 10 == 8:
        # On Ampere what a bias and a softcap take would be spilled in longer tiles.
        return sizes.chunk_tile._replace(BN=32)
    return sizes.chunk_tile


def chunk_tile_options(sizes: TritonSizes, target: Target) -> dict[str, Any]:
    """Arguments that describe tiles of a chunk, and compiler options."""
    tile = chunk_tile(sizes, target)
    return {
        **tile._asdict(),
        "TILES": sizes.head_split // tile.columns,
        "THREADS": THREADS,
        "PERMUTED": False,
        "TARGET": target.backend,
        **compiler_options(target.backend),
    }


def chunk_splits(sizes: TritonSizes, rows: int, splits: int, heads: int, device: torch.device) -> int:
    """Splits of a chunk: as many as fit into `sizes.chunk_bytes`, and into a quarter of what is free on the device."""
    split = 4 * rows * heads * sizes.head_split
    room = min(sizes.chunk_bytes, split * splits)
    if room > _SMALL and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that PyTorch holds and does not use is free as well.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = max(_SMALL, min(room, free // 4))
    return max(1, min(splits, room // split))


# What `head_softmax_kernel` takes beside a product with one head.
NO_REF: dict[str, Any] = {
    **dict.fromkeys(("ref_hidden", "ref_weight", "ref_bias", "ref_softcap")),
    **dict.fromkeys(("s_rn", "s_rk", "s_uv", "s_uk", "R"), 0),
    "EVEN_R": False,
}


class Tiles:
    """Logits that kernels multiply for themselves, tile by tile."""

    def __init__(self, sizes: TritonSizes, vocab_start: int, *heads: Head) -> None:
        self.options = head_options(sizes, vocab_start, *heads) | {"start": 0}
        for ref in heads[1:]:
            width = ref.hidden.shape[1]
            self.options |= {
                "ref_hidden": ref.hidden, "s_rn": ref.hidden.stride(0), "s_rk": ref.hidden.stride(1),
                "ref_weight": ref.weight, "s_uv": ref.weight.stride(0), "s_uk": ref.weight.stride(1),
                "ref_bias": ref.bias, "ref_softcap": ref.softcap,
                "R": width, "EVEN_R": is_even(width, self.options["BK"]),
            }  # fmt: skip

    def parts(self, launch: Launch) -> Iterator[tuple[Launch, dict[str, Any]]]:
        """See `Product`."""
        yield launch, self.options


class Chunks:
    """Logits that the library multiplies, a chunk at a time, into one buffer for each head.

    Attributes:
        splits: of a chunk.
        buffers: `[N, columns]` of float32, one for each head.
    """

    def __init__(self, sizes: TritonSizes, vocab_start: int, splits: int, *heads: Head) -> None:
        rows, device = len(heads[0].hidden), heads[0].hidden.device
        self.heads, self.sizes, self.skew = heads, sizes, vocab_start & 3
        self.splits = chunk_splits(sizes, rows, splits, len(heads), device)
        shape = rows, self.splits * sizes.head_split
        self.buffers = [torch.empty(shape, dtype=torch.float32, device=device) for _ in heads]
        self._held = -1
        self.options = {
            **chunk_tile_options(sizes, current_target()),
            "weight": None, "s_hk": 1, "s_wv": 0, "s_wk": 0, "H": 0, "EVEN_K": True,
            "hidden": self.buffers[0], "s_hn": shape[1], "bias": heads[0].bias, "softcap": heads[0].softcap,
            "N": rows, "V": len(heads[0].weight), "group_start": (vocab_start >> 2) & 0xFFFFFFFF, "SKEW": self.skew,
        }  # fmt: skip
        for buffer, ref in zip(self.buffers[1:], heads[1:], strict=True):
            self.options |= NO_REF | {
                "ref_hidden": buffer, "s_rn": shape[1], "s_rk": 1, "ref_bias": ref.bias, "ref_softcap": ref.softcap,
            }  # fmt: skip

    def parts(self, launch: Launch) -> Iterator[tuple[Launch, dict[str, Any]]]:
        """See `Product`. When a part has been yielded, the buffers hold its chunk, until the next is asked for."""
        first, end = launch.first, launch.first + launch.number
        while first < end:
            chunk = first // self.splits
            self._hold(chunk)
            stop = min(end, (chunk + 1) * self.splits)
            yield launch._replace(first=first, number=stop - first), self.options | {"start": chunk * self.splits}
            first = stop

    def _hold(self, chunk: int) -> None:
        """Multiply a chunk, unless the buffers hold it from the launch before."""
        if chunk == self._held:
            return
        first, vocab = chunk * self.splits * self.sizes.head_split - self.skew, len(self.heads[0].weight)
        tokens = slice(max(0, first), min(first + self.buffers[0].shape[1], vocab))
        columns = slice(tokens.start - first, tokens.stop - first)
        for buffer, head in zip(self.buffers, self.heads, strict=True):
            product(head.hidden, head.weight[tokens], buffer[:, columns], self.sizes.product)
            buffer[:, : columns.start].fill_(-torch.inf)
            buffer[:, columns.stop :].fill_(-torch.inf)
        self._held = chunk


def product_of(plan: Plan, sizes: TritonSizes, vocab_start: int, *heads: Head) -> Product:
    """The product with a head, or with a head and a reference's, as a plan wants it."""
    if plan.chunked:
        return Chunks(sizes, vocab_start, plan.splits, *heads)
    return Tiles(sizes, vocab_start, *heads)
