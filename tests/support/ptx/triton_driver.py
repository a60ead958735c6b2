"""A driver with which Triton compiles for sm_80 and launches in the simulator, with tensors on the CPU.

`install()` makes it the active one. From then on `kernel[grid](...)` takes the way that it takes on a GPU: arguments are
specialised, the kernel is compiled, and its PTX is launched. The assembler behind it is not run.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

import numpy as np
import torch

from tests.support.ptx.machine import execute, translated
from tests.support.ptx.memory import Buffer

__all__ = ["CAPABILITY", "LAUNCHED", "buffers_of", "install", "poison_empty"]

CAPABILITY = 80
LAUNCHED: Counter[str] = Counter()  # kernels by name: how often each was launched
_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}
_UNWRITTEN = 0xFFF5FFF5FFF5FFF5  # a NaN in every floating dtype, and no likely integer


def _pattern(dtype: torch.dtype) -> int | None:
    return None if dtype == torch.bool else _UNWRITTEN & ((1 << 8 * dtype.itemsize) - 1)


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return torch.empty_quietly(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[attr-defined]


def buffers_of(tensors: list[torch.Tensor]) -> list[Buffer]:
    """The memory behind tensors, each once. Where `poison_empty` left its mark, nobody wrote."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in found:
            data = _bytes_of(storage)
            pattern, width = _pattern(tensor.dtype), tensor.dtype.itemsize
            unwritten = None
            if pattern is not None:
                whole = data[: len(data) // width * width].view(f"u{width}")
                unwritten = np.repeat(whole == np.array(pattern, whole.dtype), width)
                unwritten = np.concatenate([unwritten, np.zeros(len(data) - len(unwritten), bool)])
            found[storage.data_ptr()] = Buffer(storage.data_ptr(), data, unwritten)
    return list(found.values())


def poison_empty() -> None:
    """Mark the memory of new tensors that nobody wrote, so that a kernel that reads it is found."""
    for name in ("empty", "empty_like", "empty_strided"):
        plain = getattr(torch, name)
        setattr(torch, name, _marked(plain))
    torch.empty_quietly = torch.empty.plain  # type: ignore[attr-defined]
    torch.Tensor.new_empty = _marked(torch.Tensor.new_empty)  # type: ignore[method-assign, assignment]


def _marked(plain: Any) -> Any:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor: torch.Tensor = plain(*args, **kwargs)
        pattern = _pattern(tensor.dtype)
        if pattern is not None and tensor.device.type == "cpu" and type(tensor) is torch.Tensor and tensor.numel():
            storage = tensor.untyped_storage()
            if storage.nbytes() % tensor.dtype.itemsize == 0:
                _bytes_of(storage).view(f"u{tensor.dtype.itemsize}")[:] = pattern
        return tensor

    empty.plain = plain  # type: ignore[attr-defined]
    return empty


class _Utilities:
    """What Triton asks of a device's library."""

    def load_binary(self, name: str, kernel: bytes | str, shared: int, device: int) -> tuple[Any, ...]:
        text = kernel.decode() if isinstance(kernel, bytes) else kernel
        return None, translated(text)[name], 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 166912, "multiprocessor_count": 108, "warpSize": 32, "max_num_regs": 65536}


class _Launcher:
    """Lays a kernel's arguments into its parameters and executes it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.kinds = list(src.signature.values())
        self.threads = 32 * metadata.num_warps
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Behind the function: packed metadata, launch metadata, two hooks, then the kernel's arguments.
        arguments = rest[-len(self.kinds) :]
        parameters = bytearray()
        tensors = []
        places = iter(function.kernel.parameters)
        for kind, value in zip(self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            place = next(places)
            if kind[0] == "*":
                tensors.append(value)
                packed = struct.pack("<Q", value.data_ptr())
            else:
                packed = struct.pack(f"<{_FORMATS[kind]}", value)
            assert len(packed) == place.size, (kind, place)
            parameters += bytes(place.offset - len(parameters)) + packed
        for place in places:  # scratch memory, of which these kernels use none
            parameters += bytes(place.offset - len(parameters)) + bytes(place.size)
        if x * y * z:
            LAUNCHED[function.kernel.name] += 1
            execute(function, (x, y, z), self.threads, bytes(parameters), self.shared, buffers_of(tensors))


class _Driver:
    """The parts of Triton's interface of a driver that launching needs."""

    def __init__(self) -> None:
        self.utils = _Utilities()
        self.launcher_cls = _Launcher

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(CAPABILITY, 10)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    """From now on Triton's kernels are compiled for sm_80 and run in the simulator."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    make, add = CUDABackend.__init__, CUDABackend.add_stages

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.binary_ext = "ptx"

    def add_stages(self: Any, stages: dict[str, Any], *args: Any) -> None:
        add(self, stages, *args)
        del stages["cubin"]

    CUDABackend.__init__, CUDABackend.add_stages = init, add_stages
    triton.runtime.driver.set_active(_Driver())
    poison_empty()
