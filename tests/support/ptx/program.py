"""PTX text as data: kernels, their parameters, shared memory, registers and instructions.

It reads what Triton and nvcc emit for sm_80. What it does not know is a `PtxError` that quotes the line.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["WIDTH", "Instruction", "Kernel", "Parameter", "PtxError", "read_kernels"]

WIDTH = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4}
WIDTH |= {"s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


class PtxError(Exception):
    """PTX that this simulator does not know."""


class Parameter(NamedTuple):
    """A parameter of a kernel: where its bytes lie among all of them."""

    name: str
    offset: int
    size: int


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        parts: of the opcode, such as ("add", "s32").
        operands: as they are written; registers of an inner scope have a name of their own.
        guard: the predicate that decides whether it is executed, and whether it is negated; or None.
        line: in the text, counted from 1.
    """

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    line: int

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' if self.guard[1] else ''}{self.guard[0]} "
        return f"{guard}{'.'.join(self.parts)} {', '.join(self.operands)} (line {self.line})"


@dataclass
class Kernel:
    """A kernel as it is written.

    Attributes:
        name: of the entry.
        parameters: in order.
        shared: symbols in shared memory and where they begin; one that is declared without a size begins behind the others.
        shared_bytes: of all symbols with a size.
        threads: of a block, as the kernel declares them; 0 where it does not.
        registers: names and types.
        body: instructions, and labels as strings.
    """

    name: str
    parameters: list[Parameter]
    shared: dict[str, int]
    shared_bytes: int
    threads: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    body: list[Instruction | str] = field(default_factory=list)


_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(.*?)([\w$]+)(?:\[(\d+)\])?$")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_IGNORED = re.compile(r"^[ \t]*\.(loc|file|pragma|section)\b.*$", re.MULTILINE)


def read_kernels(text: str) -> dict[str, Kernel]:
    """All kernels of a module by name."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    text = _IGNORED.sub("", text)
    kernels = {}
    shared = _shared_of(text)
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
        start = found.end()
        end = _closing(text, start)
        body = text[start:end]
        kernel = Kernel(found[1], _parameters(found[2]), *shared)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", found[3])
        if threads:
            kernel.threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        _read_body(kernel, body, text.count("\n", 0, start) + 1)
        kernels[kernel.name] = kernel
    return kernels


def _closing(text: str, start: int) -> int:
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return start + found.start()
    raise PtxError("a kernel does not end")


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        read = _PARAMETER.match(" ".join(part.split()))
        if read is None:
            raise PtxError(f"a parameter that is not understood: {part}")
        size = WIDTH[read[2]] * int(read[5] or 1)
        # `.ptr .align` says where a pointer points to; `.align` in front of the type is the parameter's own.
        align = int(read[1] or WIDTH[read[2]])
        offset = -(-offset // align) * align
        found.append(Parameter(read[4], offset, size))
        offset += size
    return found


def _shared_of(text: str) -> tuple[dict[str, int], int]:
    symbols, offset, last = {}, 0, []
    for align, kind, name, count in _SHARED.findall(text):
        if count == "" and f"{name}[]" in text:
            last.append(name)
            continue
        size = WIDTH[kind] * int(count or 1)
        step = int(align or WIDTH[kind])
        offset = -(-offset // step) * step
        symbols[name] = offset
        offset += size
    return {**symbols, **dict.fromkeys(last, -(-offset // 16) * 16)}, offset


def _read_body(kernel: Kernel, body: str, line: int) -> None:
    """Split into labels, declarations, scopes and instructions."""
    scopes: list[dict[str, str]] = [{}]
    count, at = 0, 0
    token = re.compile(r"\s*(?:([{}])|([\w$]+):|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*;))")
    body = body.rstrip()
    ends = [i for i, c in enumerate(body) if c == "\n"]
    while at < len(body):
        found = token.match(body, at)
        if found is None:
            raise PtxError(f"line {line + bisect_left(ends, at)} is not understood: {body[at : at + 80].strip()}")
        where = line + bisect_left(ends, found.start(found.lastindex or 0))
        at = found.end()
        if found[1] == "{":
            count += 1
            scopes.append({})
        elif found[1] == "}":
            scopes.pop()
        elif found[2]:
            kernel.body.append(found[2])
        else:
            text = " ".join(found[3].rstrip(";").split())
            if text.startswith(".reg"):
                _, kind, names = text.split(maxsplit=2)
                for name in (name.strip() for name in names.split(",")):
                    many = re.match(r"(.+)<(\d+)>$", name)
                    for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                        own = each if len(scopes) == 1 else f"{each}@{count}"
                        scopes[-1][each] = own
                        kernel.registers[own] = kind.lstrip(".")
            elif text.startswith(".") and not text.startswith(".shared"):
                raise PtxError(f"line {where} is not understood: {text}")
            elif text and not text.startswith(".shared"):
                kernel.body.append(_instruction(text, scopes, where))


def _instruction(text: str, scopes: list[dict[str, str]], line: int) -> Instruction:
    guard = None
    if text.startswith("@"):
        first, text = text.split(maxsplit=1)
        guard = (_renamed(first.lstrip("@!"), scopes), "!" in first)
    opcode, _, rest = text.partition(" ")
    operands = tuple(_renamed(operand, scopes) for operand in _split(rest))
    return Instruction(tuple(opcode.split(".")), operands, guard, line)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _renamed(operand: str, scopes: list[dict[str, str]]) -> str:
    if len(scopes) == 1:
        return operand
    inner = {name: own for scope in scopes[1:] for name, own in scope.items()}
    return re.sub(r"[%\w$.:]+", lambda found: inner.get(found[0], found[0]), operand) if inner else operand
