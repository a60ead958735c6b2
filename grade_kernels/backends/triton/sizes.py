"""How the Triton kernels cut their work up. Results depend on it no further than rounding."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from grade_kernels.backends.chunks import Sizes

__all__ = ["HeadTile", "TritonSizes"]


class HeadTile(NamedTuple):
    """A tile of the product with a head, by the names that kernels know it by.

    Attributes:
        BM, BN, BK: rows, columns, and the step through the width.
        num_warps, num_stages: of a program, and of its loads in flight.
        BN2: columns of a second product with the same rows of hidden, beside the first; BN and BN2 are powers of two.
        SERIALISE: a group of tokens waits for the statistics of the one before. Else a large tile's registers run out.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    BN2: int = 0
    SERIALISE: bool = False

    @property
    def columns(self) -> int:
        """All columns of a tile."""
        return self.BN + self.BN2

    def __str__(self) -> str:
        second = f"+{self.BN2}" if self.BN2 else ""
        return f"{self.BM}x{self.BN}{second}x{self.BK}x{self.num_warps}x{self.num_stages}"


# By products per tile. Registers leave room for two programs on a multiprocessor: while one waits for its product, the
# other handles the logits of its own.
_TILES = {1: HeadTile(128, 64, 32, 4, 4), 2: HeadTile(128, 32, 32, 4, 4)}
# float32 is multiplied in true float32, which no tensor core does.
_TILE_FLOAT32 = HeadTile(64, 64, 16, 8, 2)
# By (capability // 10, products), where the tiles above do not serve. The capability is 0 outside NVIDIA.
_TILES_FEW_ROWS = {
    # An AMD compute unit has 64 KiB for all of its programs. With two stages several programs fit.
    (0, 1): HeadTile(128, 64, 32, 4, 2),
    # Where NVIDIA's warps multiply by themselves, Triton lays four of them one below the other over 32 columns, and two by
    # two over 64. A row must lie in one warp. So 64 columns are two products of 32.
    # On Ampere a fourth stage's addresses would be spilled.
    (8, 1): HeadTile(128, 32, 32, 4, 3, BN2=32),
    (8, 2): HeadTile(128, 32, 32, 4, 3),
    (12, 1): HeadTile(128, 32, 32, 4, 4, BN2=32, SERIALISE=True),
}
# The same for more rows than a tile has. With small tiles the cache would feed tensor cores more slowly than they multiply.
# A thread of a row meets the same groups in the same order in either, so a row's results are the same.
_TILES_MANY_ROWS = {
    (0, 2): HeadTile(128, 64, 32, 4, 2),
    (8, 2): HeadTile(128, 32, 32, 8, 3, BN2=32),
    # Two thirds of Hopper's registers hold the product. One program fits.
    (9, 1): HeadTile(128, 256, 32, 8, 3, BN2=64, SERIALISE=True),
    (9, 2): HeadTile(128, 128, 32, 8, 3, SERIALISE=True),
    (12, 2): HeadTile(128, 32, 32, 8, 4, BN2=32),
}
# The first Triton that keeps a tile of many rows in registers. Older ones spill some of them, which takes longer than the
# traffic that the large tile saves.
_MANY_ROWS_SINCE = {(9, 1): (3, 9), (9, 2): (3, 8)}
# By version of Triton, too: in place of a tile of few rows that this version would spill for.
_TILES_OF_VERSION = {((3, 8), (12, 1)): HeadTile(128, 32, 32, 4, 3, BN2=32, SERIALISE=True)}
# Where logits are read from memory, four threads take 64 bytes of a row, and a warp eight rows. Larger tiles would take
# registers of other warps, which hide how long memory takes.
_TILE_CHUNK = HeadTile(32, 64, 0, 4, 2)


def _chunk_bytes() -> int:
    """The default of `TritonSizes.chunk_bytes`."""
    given = os.environ.get("GRADE_KERNELS_CHUNK_MIB") or "256"
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(f"GRADE_KERNELS_CHUNK_MIB must be a positive whole number of MiB, got {given!r}")
    return int(given) * 2**20


@dataclass(frozen=True)
class TritonSizes(Sizes):
    """`Sizes`, and those of the Triton kernels. None depends on the batch or on how large a device is.

    Attributes:
        lanes: neighbouring tokens of a strip (see `strips`); None for four in each thread of a program.
        most_strips: strips that a tile of a row has at most.
        row_split: tokens of a row that one program scans, rounded up to whole tiles.
        reread_bytes: of rows that are read twice, taken at a time, so that the second time comes from the cache. It is less
            than half of what any GPU's cache holds that predictions are made for.
        tile_groups: groups of four tokens of a tile of rows (see `row_tiles`) at least.
        tile_tokens: tokens of a row, times its rows where they are neighbours in memory, up to which a row is one tile.
        head_split: tokens that one program multiplies with; a multiple of every tile's columns.
        tile_float32: the tile of float32.
        tiles: by products per tile.
        tiles_few_rows, tiles_many_rows: by (capability // 10, products), where others than `tiles` serve.
        many_rows_since: the first version of Triton, if not any, whose code for a tile of many rows is good.
        chunk_tile: the tile of kernels that read logits from a chunk (see `head_chunks`).
        chunk_bytes: of the logits that one chunk after another uses, at most: 256 MiB, or as many MiB as the environment
            variable GRADE_KERNELS_CHUNK_MIB says when a backend is first used.
        chunk_least: columns that a chunk has at least where rows can be taken apart instead.
        head_chunk: see `Sizes`. A GPU is idle in a small product. The terms of the exact backward take several times as much.
        split_slots: candidates that a split has room for; None for what it may collect.
        slot_bytes: of all rows' candidates that are held at a time.
        batch_rows: rows that are held at a time at least. A batch's first launches have few programs, and would leave most of
            a GPU idle if a batch had few tiles of rows.
    """

    lanes: int | None = None
    most_strips: int = 4
    row_split: int = 8192
    reread_bytes: int = 2**24
    tile_groups: int = 512
    tile_tokens: int = 4096
    head_split: int = 640
    tile_float32: HeadTile = _TILE_FLOAT32
    tiles: Mapping[int, HeadTile] = field(default_factory=lambda: _TILES)
    tiles_few_rows: Mapping[tuple[int, int], HeadTile] = field(default_factory=lambda: _TILES_FEW_ROWS)
    tiles_many_rows: Mapping[tuple[int, int], HeadTile] = field(default_factory=lambda: _TILES_MANY_ROWS)
    many_rows_since: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=lambda: _MANY_ROWS_SINCE)
    chunk_tile: HeadTile = _TILE_CHUNK
    chunk_bytes: int = field(default_factory=_chunk_bytes)
    chunk_least: int = 3840
    head_chunk: int = 2**23
    split_slots: int | None = None
    slot_bytes: int = 2**27
    batch_rows: int = 128

    def head_tile(
        self, dtype: torch.dtype, products: int, capability: int, many_rows: bool, triton: tuple[int, int]
    ) -> HeadTile:
        """The tile that a version of Triton compiles well.

        Args:
            dtype: of hidden states and head.
            products: per tile.
            capability: the compute capability; 0 outside NVIDIA.
            many_rows: whether there are more rows than a tile has, and a large one serves.
            triton: the version, such as (3, 9).
        """
        if dtype == torch.float32:
            return self.tile_float32
        key = capability // 10, products
        few = self.tiles_few_rows.get(key, self.tiles[products])
        few = _TILES_OF_VERSION.get((triton, key), few)
        many_rows = many_rows and triton >= self.many_rows_since.get(key, triton)
        return self.tiles_many_rows.get(key, few) if many_rows else few
