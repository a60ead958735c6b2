"""Memory traffic of Triton kernels, counted in Triton's interpreter: bytes loaded and stored, by kernel and parameter.

Every element that a kernel asks for counts, masked ones don't, so this is what reaches the caches; what a cache or a
coalescing load serves twice from one read is counted twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

__all__ = ["Traffic", "counted"]


@dataclass
class Traffic:
    """Bytes by (kernel, parameter), and the largest size in bytes of each such tensor."""

    loaded: Counter[tuple[str, str]] = field(default_factory=Counter)
    stored: Counter[tuple[str, str]] = field(default_factory=Counter)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)

    def of(self, kernel: str) -> int:
        """Bytes that a kernel moved, over all of its launches."""
        return sum(n for counter in (self.loaded, self.stored) for (name, _), n in counter.items() if name == kernel)

    def least(self, kernel: str) -> int:
        """Bytes of every tensor that a kernel loaded from, once, and of every tensor that it stored to, once."""
        touched = [*self.loaded, *self.stored]  # a tensor that is read and written counts twice
        return sum(self.sizes[key] for key in touched if key[0] == kernel)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what kernels launched inside load and store.

    Raises:
        RuntimeError: kernels are compiled here: TRITON_INTERPRET was not 1 when Triton was imported.
    """
    if not interpreter.triton.knobs.runtime.interpret:
        raise RuntimeError(
            "traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    traffic = Traffic()
    launched: list[tuple[tuple[str, str], int, int]] = []  # key, first address, end
    start, load, store = (
        interpreter.GridExecutor._init_args_hst,
        interpreter.InterpreterBuilder.create_masked_load,
        interpreter.InterpreterBuilder.create_masked_store,
    )

    def begin(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        host, host_kwargs = start(self, args, kwargs)
        launched.clear()
        named = {**dict(zip(self.arg_names, host, strict=False)), **host_kwargs}
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                key = (self.fn.__name__, name)
                span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                launched.append((key, tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()))
                traffic.sizes[key] = max(traffic.sizes.get(key, 0), tensor.numel() * tensor.element_size())
        return host, host_kwargs

    def count(counter: Counter[tuple[str, str]], pointers: Any, mask: Any) -> None:
        active = np.broadcast_to(mask.data, pointers.data.shape)
        if not active.any():
            return
        address = int(pointers.data[active].flat[0])
        size = pointers.get_element_ty().primitive_bitwidth // 8
        # A load's addresses come from one pointer.
        counter[next(key for key, first, end in launched if first <= address < end)] += int(active.sum()) * size

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count(traffic.loaded, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count(traffic.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", begin),
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_store", masked_store),
    ):
        yield traffic
