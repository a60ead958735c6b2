"""What operations do with embedding tables: look rows up, carry several tables' rows in one tensor, and sum gradients."""

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

import torch
from typing_extensions import NamedTuple

from grade_kernels.reference import Embedding, GumbelSTEEmbedding

__all__ = ["Embedded", "joint_dtype", "look_up", "scatter_rows", "split", "weights_dtype"]

T = TypeVar("T")


class Embedded(NamedTuple, Generic[T]):
    """What an operation that draws and embeds returns, of tensors; or with gradients in the place of those."""

    embedded: T  # [N, D_1 + D_2 + ...], in the tables' joint dtype
    ids: torch.Tensor  # [N] int64
    logprobs: T  # [N]


def joint_dtype(tables: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that holds every table's values exactly, so that one tensor can carry all embeddings."""
    dtype = tables[0].dtype
    for table in tables[1:]:
        dtype = torch.promote_types(dtype, table.dtype)
    return dtype


def weights_dtype(tables: Sequence[torch.Tensor], compute: torch.dtype) -> torch.dtype:
    """The dtype of the weights that tables are to be multiplied by: their own where it has 16 bits, less to read."""
    dtype = joint_dtype(tables)
    return dtype if dtype.itemsize == 2 and compute == torch.float32 else compute


def joined(parts: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of the rows of each table."""
    dtype = joint_dtype(tables)
    return torch.cat([part.to(dtype) for part in parts], dim=1)


def split(embedded: torch.Tensor, tables: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The rows of each table, in its dtype."""
    parts = embedded.split([table.shape[1] for table in tables], dim=1)
    return tuple(part.to(table.dtype) for part, table in zip(parts, tables, strict=True))


def shaped(
    found: GumbelSTEEmbedding[tuple[torch.Tensor, ...]], batch: Sequence[int], embedding: Embedding
) -> GumbelSTEEmbedding[Embedding]:
    """The result of flat rows as the caller gets it: of the batch's shape, and one tensor where one table was given."""
    parts = tuple(x.contiguous().view(*batch, x.shape[1]) for x in found.embedding)
    result = parts if isinstance(embedding, (tuple, list)) else parts[0]
    return GumbelSTEEmbedding(cast("Embedding", result), found.ids.view(batch), found.logprobs.view(batch))


def without_ignored(
    found: GumbelSTEEmbedding[Embedding], ignored: torch.Tensor, ids: torch.Tensor
) -> GumbelSTEEmbedding[Embedding]:
    """A result with zeros in the ignored rows, and with the ids that were given."""

    def zeroed(x: torch.Tensor) -> torch.Tensor:
        return torch.where(ignored.unsqueeze(-1), 0.0, x)

    given = found.embedding
    embedding = tuple(map(zeroed, given)) if isinstance(given, tuple) else zeroed(given)
    return GumbelSTEEmbedding(cast("Embedding", embedding), ids.clone(), torch.where(ignored, 0.0, found.logprobs))


def look_up(tables: Sequence[torch.Tensor], ids: torch.Tensor, poison: torch.Tensor) -> torch.Tensor:
    """Rows `ids` of all tables, side by side.

    On a GPU poison `[N]` is NaN for a row without a distribution, and then so is the row's result.
    """
    embedded = joined([table[ids] for table in tables], tables)
    return embedded if ids.device.type == "cpu" else embedded + poison.to(embedded.dtype)[:, None]


def empty(rows: int, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """`look_up` without data."""
    width = sum(table.shape[1] for table in tables)
    return torch.empty(rows, width, dtype=joint_dtype(tables), device=tables[0].device)


def upstream(dembedded: torch.Tensor | None, rows: int, tables: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The gradient of each table's rows, in its dtype; zero where none arrived."""
    if dembedded is None:
        return [table.new_zeros(rows, table.shape[1]) for table in tables]
    return split(dembedded, tables)


def scatter_rows(values: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Gradient of `table[ids]`: values summed by id, deterministically and in at least float32, in table's dtype."""
    add = torch.ops.aten.embedding_dense_backward
    if values.dtype in (torch.float32, torch.float64):
        return add(values, ids, table.shape[0], -1, False)
    # Narrow dtypes would lose repeated ids in the sum, so compact the ids and sum in float32 first.
    order = ids.argsort(stable=True)
    ids = ids[order]
    segment = torch.zeros_like(ids)
    segment[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    sums = add(values[order].float(), segment, ids.numel(), -1, False)
    out = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    out[ids] = sums[segment].to(table.dtype)  # repeated ids write the same value
    return out
