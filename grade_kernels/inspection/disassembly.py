"""Machine code as a list of instructions, for NVIDIA by CUDA's tools and for AMD from the assembly that Triton keeps."""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.nvidia.compiler import sm_arch_from_capability

__all__ = ["Instruction", "Program", "disassemble"]


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode: with its suffixes.
        predicated: whether only threads (or, branching, warps) that meet a condition run it.
        target: of a branch, the position of the instruction that it goes to; else None.
        ends: whether what follows is reached from elsewhere only.
    """

    opcode: str
    predicated: bool
    target: int | None
    ends: bool


class Program(NamedTuple):
    """A kernel's instructions, and per thread: registers, bytes of stack, and registers or accesses spilled; for NVIDIA also
    its sums across lanes that take a product of the lane's own (see `unequal_sums`).
    """

    code: list[Instruction]
    registers: int
    stack: int
    spills: int
    unequal: int = 0


def disassemble(compiled: Sequence[Any]) -> list[Program]:
    """The machine code of what `triton.compile` returned, all for one target.

    Raises:
        FileNotFoundError: a tool that disassembles it is not there.
    """
    if "cubin" in compiled[0].asm:
        arch = sm_arch_from_capability(compiled[0].metadata.target.arch)
        programs = _nvidia([kernel.asm["cubin"] for kernel in compiled], arch)
        return [
            program._replace(unequal=unequal_sums(kernel.asm["ptx"]))
            for kernel, program in zip(compiled, programs, strict=True)
        ]
    return [_amd(kernel.asm["amdgcn"]) for kernel in compiled]


def unequal_sums(ptx: str) -> int:
    """Multiply-adds that add another lane's product to the lane's own: sums that differ between lanes in their last bit.

    Each lane rounds the other's product and not its own. `grade_kernels.backends.triton.scores` says how that is avoided.
    """
    others: set[str] = set()  # registers that hold another lane's number; each register is written once
    found = 0
    for line in ptx.splitlines():
        if shuffled := re.match(r"\s*shfl\.sync\.bfly\.b32\s+(%\w+)", line):
            others.add(shuffled[1])
        elif moved := re.match(r"\s*mov\.b(?:32|64)\s+(%\w+),\s*(.*);", line):
            if others.intersection(re.findall(r"%\w+", moved[2])):
                others.add(moved[1])
        elif added := re.match(r"\s*fma\.rn\S*\.f(?:32|64)\s+%\w+,.*,\s*(%\w+);", line):
            found += added[1] in others
    return found


@functools.cache
def _tool(name: str) -> str:
    try:
        return str(getattr(knobs.nvidia, name).path)  # what Triton ships, or TRITON_<NAME>_PATH
    except RuntimeError:
        path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(
            f"{name}, which reads NVIDIA's machine code, is neither in the Triton package nor on PATH: "
            f"install a Triton wheel that has it or the CUDA toolkit, or set TRITON_{name.upper()}_PATH"
        )
    return path


def _nvidia(cubins: Sequence[bytes], arch: str) -> list[Program]:
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        # One after the other: nvdisasm takes 0.2 s to start, and a hundredth to read a kernel.
        path.write_bytes(b"".join(texts))
        listing = _output([_tool("nvdisasm"), "--binary", arch.replace("sm_", "SM"), str(path)])
        usages = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usages.append(_output([_tool("cuobjdump"), "-res-usage", str(path)]))
    lines = [(int(address, 16), words) for address, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing)]
    programs, start = [], 0
    for text, usage in zip(texts, usages, strict=True):
        inside = [(address - start, words) for address, words in lines if start <= address < start + len(text)]
        numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        code = _instructions(inside, start)
        spills = sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in code)
        programs.append(Program(code, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], spills))
        start += len(text)
    return programs


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _text(cubin: bytes) -> bytes:
    """The machine code in an ELF file of one kernel."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each section: name, type, flags, address, offset, size.
    headers = [struct.unpack_from("<2I4Q", cubin, sections + size * i) for i in range(count)]
    found = [h[4:6] for h in headers if cubin.startswith(b".text.", headers[names][4] + h[0])]
    if len(found) != 1:
        raise ValueError(f"expected one kernel in a cubin, got {len(found)}")
    offset, length = found[0]
    return cubin[offset : offset + length]


def _instructions(lines: Sequence[tuple[int, str]], start: int) -> list[Instruction]:
    """Instructions from addresses and text; addresses in the text are `start` more."""
    places = {address: i for i, (address, _) in enumerate(lines)}
    code = []
    for i, (_, text) in enumerate(lines):
        guard, opcode, rest = re.fullmatch(r"(@\S+\s+)?(\S+)\s*(.*)", text).groups()  # type: ignore[union-attr]
        target = None
        # A call comes back to what follows; on sm_80 it is also the way out of some loops.
        if opcode.startswith(("BRA", "CALL")):
            target = places.get(int(rest.split("0x")[-1], 16) - start) if "0x" in rest else None
        # A branch has its condition in front, or as an operand.
        predicated = (
            guard is not None or opcode.startswith("CALL") or (target is not None and not rest.startswith("0x"))
        )
        ends = opcode.startswith(("BRA", "EXIT", "RET")) and not predicated
        if target == i:  # what pads the end
            break
        code.append(Instruction(opcode, predicated, target, ends))
    return code


def _amd(assembly: str) -> Program:
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    numbers = {name: int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1]) for name in names}
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        text = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.LBB\w+):", text):
            labels[label[1]] = len(lines)
        elif re.match(r"[a-z]+_", text) and not text.endswith(":"):
            lines.append(text)
    code = []
    for text in lines:
        opcode = text.split()[0]
        target = labels.get(text.split()[-1]) if "branch" in opcode else None
        code.append(Instruction(opcode, "cbranch" in opcode, target, opcode in ("s_branch", "s_endpgm")))
    # Scalar registers spill into lanes of vector registers; only these touch memory.
    return Program(code, numbers["vgpr_count"], numbers["private_segment_fixed_size"], numbers["vgpr_spill_count"])
