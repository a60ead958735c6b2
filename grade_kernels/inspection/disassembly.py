"""Machine code as a list of instructions, for NVIDIA by CUDA's tools and for AMD from the assembly that Triton keeps."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs

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
    """A kernel's instructions, and per thread: registers, bytes of stack, and registers or accesses spilled."""

    code: list[Instruction]
    registers: int
    stack: int
    spills: int


def disassemble(compiled: Any) -> Program:
    """The machine code of what `triton.compile` returned.

    Raises:
        FileNotFoundError: the tool that disassembles it is not there.
    """
    return _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])


@functools.cache
def _cuobjdump() -> str:
    try:
        return str(knobs.nvidia.cuobjdump.path)  # what Triton ships, or TRITON_CUOBJDUMP_PATH
    except RuntimeError:
        path = shutil.which("cuobjdump")
    if path is None:
        raise FileNotFoundError(
            "cuobjdump, which disassembles NVIDIA's machine code, is neither in the Triton package nor on PATH: "
            "install a Triton wheel that has it or the CUDA toolkit, or set TRITON_CUOBJDUMP_PATH"
        )
    return path


def _nvidia(cubin: bytes) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_cuobjdump(), "-sass", "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", done.stdout)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    code = []
    for i, (_, text) in enumerate(lines):
        guard, opcode, rest = re.fullmatch(r"(@\S+\s+)?(\S+)\s*(.*)", text).groups()  # type: ignore[union-attr]
        target = None
        # A call comes back to what follows; on sm_80 it is also the way out of some loops.
        if opcode.startswith(("BRA", "CALL")):
            target = places.get(int(rest.split("0x")[-1], 16)) if "0x" in rest else None
        # A branch has its condition in front, or as an operand.
        predicated = (
            guard is not None or opcode.startswith("CALL") or (target is not None and not rest.startswith("0x"))
        )
        ends = opcode.startswith(("BRA", "EXIT", "RET")) and not predicated
        if target == i:  # what pads the end
            break
        code.append(Instruction(opcode, predicated, target, ends))
    spills = sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in code)
    return Program(code, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], spills)


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
