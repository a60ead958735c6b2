"""A few instructions as a kernel, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.ptx.machine import execute, translated
from tests.support.ptx.memory import Buffer

__all__ = ["compute", "launch", "module"]

_CLASS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def module(body: str, registers: str, pointers: int, threads: int, shared: int = 0) -> str:
    """A kernel whose parameters are pointers: %p0, %p1 and so on are loaded, and %tid is the thread."""
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.b64 %p{i}, [k_param_{i}];" for i in range(pointers))
    memory = f".shared .align 16 .b8 memory[{shared}];" if shared else ""
    return f"""
.version 8.8
.target sm_80
.address_size 64
{memory}
.visible .entry k({parameters})
.reqntid {threads}
{{
    .reg .b64 %p<{pointers + 1}>;
    .reg .b64 %at<9>;
    .reg .b32 %tid;
    {registers}
    {loads}
    mov.u32 %tid, %tid.x;
    {body}
    ret;
}}
"""


def launch(
    text: str,
    arrays: Sequence[npt.NDArray[Any]],
    threads: int,
    blocks: int = 1,
    unwritten: Sequence[int] = (),
    first: int = 0x10000,
) -> None:
    """Execute a module of `module`; array i is what %p{i} points to, and those in `unwritten` nobody has written."""
    buffers, addresses = [], []
    for i, array in enumerate(arrays):
        data = array.reshape(-1).view(np.uint8)
        addresses.append(first + 0x100000 * i)
        buffers.append(Buffer(addresses[-1], data, np.ones(len(data), bool) if i in unwritten else None))
    parameters = b"".join(address.to_bytes(8, "little") for address in addresses)
    execute(translated(text)["k"], (blocks, 1, 1), threads, parameters, 0, buffers)


def compute(
    instructions: str, given: Sequence[npt.NDArray[Any]], result: npt.DTypeLike, scratch: str = ""
) -> npt.NDArray[Any]:
    """%d for each thread, which has element i of `given[j]` in the register %x{j}; %d has the width of the result."""
    threads = len(given[0])
    out = np.zeros(threads, result)
    lines, registers = [], [f".reg .{_CLASS[out.itemsize]} %d;", ".reg .pred %q<4>;", scratch]
    for j, array in enumerate(given):
        width = array.itemsize
        registers.append(f".reg .{_CLASS[width]} %x{j};")
        lines += [f"mad.wide.u32 %at0, %tid, {width}, %p{j};", f"ld.global.b{8 * width} %x{j}, [%at0];"]
    store = [f"mad.wide.u32 %at0, %tid, {out.itemsize}, %p{len(given)};", f"st.global.b{8 * out.itemsize} [%at0], %d;"]
    body = "\n".join([*lines, instructions, *store])
    launch(module(body, "\n".join(registers), len(given) + 1, threads), [*given, out], threads)
    return out
