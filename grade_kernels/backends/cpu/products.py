"""Products with a head's weight, by csrc/cpu/products/products.h where it has kernels, else by PyTorch.

They are computed as `weight[chunk] @ hidden.T`, which is faster than its transpose. Hidden rows then lie side by side, one
in each lane of the kernels that read the product, so no kernel has to add up the lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from grade_kernels.backends.native import cpu_kernels, unit_stride
from grade_kernels.backends.records import Head
from grade_kernels.dtypes import compute_dtype

__all__ = ["LANES", "HeadProduct", "has_product", "head_products", "packed", "padded"]

LANES = 16  # kHeadLanes of csrc/cpu


def has_product(x: torch.Tensor) -> bool:
    """Whether products of x go to csrc/cpu/products/products.h."""
    return x.numel() > 0 and x.dtype != torch.float64 and bool(cpu_kernels().has_product(x))


def packed(x: torch.Tensor) -> torch.Tensor:
    """x as csrc/cpu/products/products.h wants it."""
    out = x.new_empty(cpu_kernels().packed_numbers(x), dtype=torch.int16)
    cpu_kernels().product_pack(unit_stride(x), out)
    return out


def padded(rows: int) -> int:
    """Rows up to a whole number of lanes."""
    return max(1, -(-rows // LANES)) * LANES


class HeadProduct:
    """`weight @ hidden.T` in float32, some rows of the weight at a time, in one buffer. Columns are padded to whole lanes.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`, in hidden's dtype.
        width: rows of the weight that are taken at a time, at most.
        elements: how much PyTorch's product widens at a time where it has to.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, width: int, elements: int) -> None:
        self.weight, self.rows, self.elements = weight, len(hidden), elements
        # Sums that were rounded to 16 bits would bias what is made of them (see `torch.products.product`).
        self.buffer = hidden.new_empty(min(width, len(weight)), padded(self.rows), dtype=compute_dtype(hidden.dtype))
        self.own = has_product(hidden)
        if self.own:
            self.hidden = packed(hidden)
        else:
            self.hidden = hidden.new_zeros(hidden.shape[1], padded(self.rows), dtype=self.buffer.dtype)
            self.hidden[:, : self.rows] = hidden.T

    def __call__(self, chunk: slice) -> torch.Tensor:
        """The product of one chunk of the weight, until the next is asked for."""
        out = self.buffer[: chunk.stop - chunk.start]
        if not self.own and self.weight.dtype == out.dtype:
            return torch.mm(self.weight[chunk], self.hidden, out=out)
        if not self.own:
            step = max(1, self.elements // max(1, self.weight.shape[1]))
            for i in range(chunk.start, chunk.stop, step):
                part = slice(i, min(i + step, chunk.stop))
                torch.mm(
                    self.weight[part].to(out.dtype), self.hidden, out=out[i - chunk.start : part.stop - chunk.start]
                )
            return out
        cpu_kernels().packed_product(self.hidden, self.rows, unit_stride(self.weight[chunk]), False, out)
        return out


def head_products(
    head: Head, ref: Head | None, width: int, elements: int
) -> Callable[[slice], tuple[torch.Tensor, torch.Tensor | None]]:
    """A function that returns a chunk's products, and the reference's in the same layout, in float32.

    Where both heads have one weight, it is read once.
    """
    if ref is None:
        product = HeadProduct(head.hidden, head.weight, width, elements)
        return lambda chunk: (product(chunk), None)
    lanes = padded(len(head.hidden))
    if _same(head.weight, ref.weight):
        apart = head.hidden.new_zeros(lanes - len(head.hidden), head.hidden.shape[1])
        both = HeadProduct(torch.cat([head.hidden, apart, ref.hidden, apart]), head.weight, width, elements)

        def split(chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            out = both(chunk)
            return out[:, :lanes], out[:, lanes:]

        return split
    products = [HeadProduct(h.hidden, h.weight, width, elements) for h in (head, ref)]
    return lambda chunk: (products[0](chunk).float(), products[1](chunk).float())  # one of them may be in float64


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are the same memory seen in the same way."""
    alike = x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
    return alike and x.data_ptr() == y.data_ptr()
