"""A kernel's PTX as Python: each basic block becomes a function of the registers of all threads.

A register is an array with an element for each thread, of unsigned integers of its width (booleans for predicates), or with
one element that all threads have. A block of instructions exists twice: for all threads, and for those of a mask.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.ptx.arithmetic import HELPERS
from tests.support.ptx.program import WIDTH, Instruction, Kernel, PtxError

__all__ = ["Block", "Translation"]

_DTYPE = {"f16": "f2", "f32": "f4", "f64": "f8"}
_ENDS = {"bra", "ret", "exit"}
# What a load or store may say beside its type: caches, which hold nothing here, and that no other thread is in the way.
_CACHE = re.compile(
    r"global|shared|param|nc|ca|cg|cs|cv|wb|wt|weak|volatile|relaxed|gpu|cta|sys|level\w*|(L1|L2)::\w+|v2|v4"
)
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
_PLAIN = {"and": "&", "or": "|", "xor": "^"}


@dataclass
class Block:
    """A basic block.

    Attributes:
        label: where it begins, for messages.
        instructions: without the one that ends it.
        end: "next", "bra", "ret" or "barrier".
        guard: of its end, as a register's index and whether it is negated.
        to: the label that a branch leads to.
        target: the block there.
        functions: (R, M, m) for all threads and for those of the mask m; made when first wanted.
    """

    label: str
    instructions: list[Instruction]
    end: str = "next"
    guard: tuple[int, bool] | None = None
    to: str = ""
    target: int = -1
    functions: list[Callable[..., None] | None] = field(default_factory=lambda: [None, None])


class Translation:
    """A kernel's blocks, and code for them.

    Attributes:
        kernel: what is translated.
        blocks: in the order of the text.
        index: of each register.
        granules: the fewest bytes that one access takes, of global and of shared memory.
        rank: of each block in an order in which threads that part meet again: the earliest go first.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.kinds = ["b32" if k == "f32" else k for k in kernel.registers.values()]
        self.widths = [WIDTH[kind] for kind in kernel.registers.values()]
        self.constants: list[Any] = []
        self.known: dict[tuple[str, bytes], int] = {}
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.granules = {"global": 16, "shared": 16}
        self.blocks = self._split()
        self.rank = _ranks(self.blocks)
        for block in self.blocks:  # so that what is unknown is said at once
            for instruction in block.instructions:
                self._emit(instruction, False)

    def _split(self) -> list[Block]:
        blocks, labels = [Block("entry", [])], {}
        for item in self.kernel.body:
            if isinstance(item, str):
                if blocks[-1].instructions:
                    blocks.append(Block(item, []))
                labels[item] = len(blocks) - 1
                continue
            kind = item.parts[0]
            if kind in _ENDS or kind in ("bar", "barrier"):
                block = blocks[-1]
                block.guard = None if item.guard is None else (self.index[item.guard[0]], item.guard[1])
                block.end = "bra" if kind == "bra" else "ret" if kind in ("ret", "exit") else "barrier"
                if kind == "bra":
                    block.to = item.operands[0]
                if block.end == "barrier" and (
                    item.parts not in (("bar", "sync"), ("barrier", "sync"), ("barrier", "sync", "aligned"))
                    or item.operands != ("0",)
                    or item.guard is not None
                ):
                    raise PtxError(f"unknown barrier: {item}")
                blocks.append(Block(f"behind line {item.line}", []))
            else:
                blocks[-1].instructions.append(item)
        for block in blocks:
            if block.end == "bra":
                block.target = labels[block.to]
        return blocks

    def function(self, which: int, masked: bool) -> Callable[..., None]:
        """A block's code."""
        block = self.blocks[which]
        found = block.functions[masked]
        if found is None:
            lines = [f"    {line}" for item in block.instructions for line in self._emit(item, masked)]
            code = "def run(R, M, m):\n" + "\n".join(lines or ["    pass"])
            space: dict[str, Any] = {**HELPERS, "K": self.constants}
            exec(compile(code, f"<{self.kernel.name}: {block.label}>", "exec"), space)
            found = block.functions[masked] = space["run"]
        return found

    # Operands

    def _constant(self, value: Any, dtype: str) -> str:
        array = np.array([value], dtype)
        key = dtype, array.tobytes()
        if key not in self.known:
            self.known[key] = len(self.constants)
            self.constants.append(array)
        return f"K[{self.known[key]}]"

    def _value(self, operand: str, kind: str) -> str:
        """An operand as an array of the type."""
        if kind == "pred":
            negated = operand.startswith("!")
            operand = operand.lstrip("!")
            return f"~R[{self.index[operand]}]" if negated else f"R[{self.index[operand]}]"
        width = WIDTH[kind]
        dtype = _dtype(kind)
        if operand in self.index:
            i = self.index[operand]
            own = self.widths[i]
            if own < width:
                raise PtxError(f"{operand} is narrower than {kind}")
            text = f"R[{i}]" if own == width else f"R[{i}].astype(u{width})"
            return text if dtype[0] == "u" else f"{text}.view({dtype})"
        if operand.startswith("%"):
            text = f"M.special({operand!r})"
            return text if width == 4 else f"{text}.astype(u{width})"
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", operand):
            bits = int(found[1] or found[2], 16)
            if (4 if found[1] else 8) != width:
                exact = struct.unpack("<f" if found[1] else "<d", bits.to_bytes(4 if found[1] else 8, "little"))[0]
                return self._constant(exact, dtype)
            text = self._constant(bits, f"u{width}")
            return text if dtype[0] == "u" else f"{text}.view({dtype})"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            bits = int(operand.rstrip("U"), 0) & ((1 << 8 * width) - 1)
            text = self._constant(bits, f"u{width}")
            return text if dtype[0] == "u" else f"{text}.view({dtype})"
        for table in (self.kernel.shared, self.parameters):
            if operand in table:
                return self._constant(table[operand], f"u{width}")
        raise PtxError(f"unknown operand {operand}")

    def _put(self, operand: str, text: str, kind: str, mask: str | None) -> list[str]:
        """Store an array of the type in a register."""
        if operand == "_":
            return []
        i = self.index[operand]
        own = self.widths[i]
        if kind != "pred":
            width, dtype = WIDTH[kind], _dtype(kind)
            if own > width:
                text = f"({text}).astype(i{own}).view(u{own})" if dtype[0] == "i" else f"({text}).astype(u{own})"
            elif own < width:
                raise PtxError(f"{operand} is narrower than {kind}")
            elif dtype[0] != "u":
                text = f"({text}).view(u{own})"
        return [f"R[{i}] = {text}" if mask is None else f"R[{i}] = where({mask}, {text}, R[{i}])"]

    def _address(self, operand: str) -> tuple[str, int]:
        """A base and an offset."""
        inside = operand.strip("[] ")
        found = re.fullmatch(r"([%\w$.@]+)\s*(?:\+\s*(-?\w+))?", inside)
        if found is None:
            raise PtxError(f"unknown address {operand}")
        return found[1], int(found[2] or "0", 0)

    # Instructions

    def _emit(self, item: Instruction, masked: bool) -> list[str]:
        try:
            mask = "m" if masked else None
            before: list[str] = []
            if item.guard is not None:
                p = f"{'~' if item.guard[1] else ''}R[{self.index[item.guard[0]]}]"
                before = [f"g = {p}" if mask is None else f"g = {p} & m"]
                mask = "g"
            lines = self._instruction(item, mask)
        except (PtxError, KeyError, IndexError) as error:
            raise PtxError(f"unknown instruction: {item}: {error}") from error
        return [*before, *(f"{line}  # {item.line}" for line in lines)]

    def _instruction(self, item: Instruction, mask: str | None) -> list[str]:
        name, *rest = item.parts
        method = getattr(self, f"_{name}_", None)
        if method is None:
            if name not in _FORMULAS:
                raise PtxError("its opcode")
            return self._formula(item, mask)
        return method(item, rest, mask)

    def _formula(self, item: Instruction, mask: str | None) -> list[str]:
        name, *rest = item.parts
        kind = rest[-1]
        result, operands, formula = _FORMULAS[name](kind, rest[:-1])
        given = item.operands[1:]
        if len(given) != len(operands):
            raise PtxError("the number of operands")
        values = [self._value(operand, k) for operand, k in zip(given, operands, strict=True)]
        if "ftz" in rest:
            values = [f"ftz({v})" if _dtype(k)[0] == "f" else v for v, k in zip(values, operands, strict=True)]
        text = formula.format(*values)
        if "ftz" in rest:
            text = f"ftz({text})"
        return self._put(item.operands[0], text, result, mask)

    def _mov_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        (kind,) = rest
        to, of = item.operands
        if kind == "pred" and of in ("0", "1", "-1"):
            return self._put(to, f"K[{self._boolean(of != '0')}]", "pred", mask)
        if to.startswith("{"):
            parts = _vector(to)
            width = WIDTH[kind] // len(parts)
            lines = [f"t = {self._value(of, f'u{8 * WIDTH[kind]}')}"]
            for i, part in enumerate(parts):
                shifted = f"t >> u{WIDTH[kind]}({8 * width * i})" if i else "t"
                lines += self._put(part, f"({shifted}).astype(u{width})", f"b{8 * width}", mask)
            return lines
        if of.startswith("{"):
            low, high = _vector(of)
            half = f"u{4 * WIDTH[kind]}"
            return self._put(
                to, f"halves({self._value(low, half)}, {self._value(high, half)})", f"b{8 * WIDTH[kind]}", mask
            )
        plain = kind if kind == "pred" else f"b{8 * WIDTH[kind]}"
        return self._put(to, self._value(of, plain), plain, mask)

    def _boolean(self, value: bool) -> int:
        return int(self._constant(value, "bool")[2:-1])

    def _cvta_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        if rest != ["to", "global", "u64"]:
            raise PtxError("its kind")
        return self._put(item.operands[0], self._value(item.operands[1], "u64"), "u64", mask)

    def _setp_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        compare, *more, kind = rest
        more = [m for m in more if m != "ftz"]
        a, b = (self._value(x, _typed(kind, compare)) for x in item.operands[1:3])
        if kind == "bf16":
            a, b = f"from_bf16({a})", f"from_bf16({b})"
        if "ftz" in rest:
            a, b = f"ftz({a})", f"ftz({b})"
        if kind[0] == "f" or kind == "bf16":
            if compare in ("num", "nan"):
                text = f"np.isnan({a}) | np.isnan({b})"
                text = f"~({text})" if compare == "num" else text
            elif compare in _UNORDERED:
                opposite = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
                symbol = opposite[_UNORDERED[compare]]
                text = f"~(({a} {symbol} {b}){f' & ~np.isnan({a}) & ~np.isnan({b})' if symbol == '!=' else ''})"
            elif compare == "ne":
                text = f"({a} != {b}) & ~np.isnan({a}) & ~np.isnan({b})"
            else:
                text = f"({a} {_COMPARE[compare]} {b})"
        else:
            text = f"({a} {_COMPARE[compare]} {b})"
        lines = [f"t = {text}"]
        result, _, opposite_result = item.operands[0].partition("|")
        if more:
            c = self._value(item.operands[3], "pred")
            lines = [f"t, o = ({text}) {_PLAIN[more[0]]} {c}, ~({text}) {_PLAIN[more[0]]} {c}"]
        lines += self._put(result, "t", "pred", mask)
        if opposite_result:
            lines += self._put(opposite_result, "o" if more else "~t", "pred", mask)
        return lines

    def _cvt_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        *how, to, of = rest
        rounding = [h for h in how if h not in ("ftz", "sat", "rn", "rna")]
        if "sat" in how:
            raise PtxError("saturation")
        if to in ("bf16x2", "f16x2") and of == "f32":
            high, low = (self._value(x, "f32") for x in item.operands[1:])
            down = "to_bf16({})" if to == "bf16x2" else "({}).astype(f2).view(u2)"
            return self._put(item.operands[0], f"halves({down.format(low)}, {down.format(high)})", "b32", mask)
        value = self._value(item.operands[1], of)
        if "ftz" in how and _dtype(of)[0] == "f":
            value = f"ftz({value})"
        if of == "bf16":
            value, of = f"from_bf16({value})", "f32"
        floats = _dtype(of)[0] == "f", to == "bf16" or _dtype(to)[0] == "f"
        if to == "bf16":
            if of != "f32":
                raise PtxError("its types")
            text, to = f"to_bf16({value})", "b16"
        elif floats == (True, False):
            text = f"to_int({value}, {_dtype(to)}, {rounding[0]!r})"
        elif floats == (True, True) and rounding and to == of:
            text = (
                f"{ {'rzi': 'np.trunc', 'rni': 'np.rint', 'rmi': 'np.floor', 'rpi': 'np.ceil'}[rounding[0]] }({value})"
            )
        elif rounding and floats[1]:
            raise PtxError("its rounding")
        else:
            text = f"({value}).astype({_dtype(to)})"
        return self._put(item.operands[0], text, to, mask)

    def _shfl_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        _, mode, _ = rest
        to, _, inside = item.operands[0].partition("|")
        a, b, c, members = (self._value(x, "b32") for x in item.operands[1:])
        lines = [f"t, o = M.shuffle({mode!r}, {a}, {b}, {c}, {members}, {mask}, {item.line})"]
        lines += self._put(to, "t", "b32", mask)
        return lines + (self._put(inside, "o", "pred", mask) if inside else [])

    def _vote_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        _, mode, kind = rest
        p, members = self._value(item.operands[1], "pred"), self._value(item.operands[2], "b32")
        return self._put(item.operands[0], f"M.vote({mode!r}, {p}, {members}, {mask}, {item.line})", kind, mask)

    def _redux_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        _, mode, kind = rest
        a, members = self._value(item.operands[1], kind), self._value(item.operands[2], "b32")
        return self._put(item.operands[0], f"M.reduce({mode!r}, {a}, {members}, {mask}, {item.line})", kind, mask)

    def _activemask_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        return self._put(item.operands[0], f"M.active({mask})", "b32", mask)

    def _createpolicy_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        return self._put(item.operands[0], self._value("0", "b64"), "b64", mask)  # a hint to a cache

    def _space(self, rest: list[str]) -> str:
        for part in rest[:-1]:
            if not _CACHE.fullmatch(part):
                raise PtxError(part)
        found = [part for part in rest if part in self.granules or part == "param"]
        if len(found) != 1:
            raise PtxError("its memory")
        return found[0]

    def _ld_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        space, kind = self._space(rest), rest[-1]
        to = _vector(item.operands[0]) if item.operands[0].startswith("{") else [item.operands[0]]
        size, dtype = WIDTH[kind], _dtype(kind)
        base, offset = self._address(item.operands[1])
        if space == "param":
            address = self._value(base, "u64")
            lines = [f"t = M.parameters({address}, {offset}, {size}, {len(to)}, {mask}, {item.line})"]
        else:
            self.granules[space] = min(self.granules[space], size * len(to))
            address = self._value(base, "u64" if space == "global" else "u32")
            lines = [f"t = M.load_{space}({address}, {offset}, {size}, {len(to)}, {mask}, {item.line})"]
        for i, name in enumerate(to):
            text = f"t[{i}]" if dtype[0] == "u" else f"t[{i}].view({dtype})"
            lines += self._put(name, text, kind, mask)
        return lines

    def _st_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        space, kind = self._space(rest), rest[-1]
        of = _vector(item.operands[1]) if item.operands[1].startswith("{") else [item.operands[1]]
        size = WIDTH[kind]
        base, offset = self._address(item.operands[0])
        self.granules[space] = min(self.granules[space], size * len(of))
        address = self._value(base, "u64" if space == "global" else "u32")
        values = ", ".join(self._value(x, f"u{8 * size}") for x in of)
        return [f"M.store_{space}({address}, {offset}, {size}, [{values}], {mask}, {item.line})"]

    def _cp_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        if rest[:2] == ["async", "commit_group"]:
            return [f"M.commit({mask})"]
        if rest[:2] in (["async", "wait_group"], ["async", "wait_all"]):
            return [f"M.wait({item.operands[0] if item.operands else -1}, {mask})"]
        if rest[0] != "async" or rest[1] not in ("ca", "cg") or rest[2:4] != ["shared", "global"]:
            raise PtxError("its kind")
        (to, to_offset), (of, of_offset) = self._address(item.operands[0]), self._address(item.operands[1])
        size = int(item.operands[2], 0)
        taken = self._value(item.operands[3], "u32") if len(item.operands) > 3 else self._constant(size, "u4")
        self.granules = {space: min(granule, size) for space, granule in self.granules.items()}
        pointers = f"{self._value(to, 'u32')}, {to_offset}, {self._value(of, 'u64')}, {of_offset}"
        return [f"M.copy({pointers}, {size}, {taken}, {mask}, {item.line})"]

    def _ldmatrix_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        to = _vector(item.operands[0])
        base, offset = self._address(item.operands[1])
        trans = "trans" in rest
        if rest[-1] != "b16" or "m8n8" not in rest or f"x{len(to)}" not in rest:
            raise PtxError("its kind")
        self.granules["shared"] = min(self.granules["shared"], 2 if trans else 4)
        lines = [f"t = M.matrices({self._value(base, 'u32')}, {offset}, {len(to)}, {trans}, {mask}, {item.line})"]
        for i, name in enumerate(to):
            lines += self._put(name, f"t[{i}]", "b32", mask)
        return lines

    def _mma_(self, item: Instruction, rest: list[str], mask: str | None) -> list[str]:
        if rest[:2] != ["sync", "aligned"] or rest[3:5] != ["row", "col"] or rest[5] != "f32" or rest[8] != "f32":
            raise PtxError("its kind")
        to, a, b, c = (_vector(x) for x in item.operands)
        parts = [", ".join(self._value(x, "b32") for x in v) for v in (a, b, c)]
        lines = [
            f"t = M.multiply({rest[2]!r}, {rest[6]!r}, [{parts[0]}], [{parts[1]}], [{parts[2]}], {mask}, {item.line})"
        ]
        for i, name in enumerate(to):
            lines += self._put(name, f"t[{i}]", "f32", mask)
        return lines


def _ranks(blocks: list[Block]) -> list[int]:
    """Blocks in an order in which each comes before what follows it, but for the way back in a loop.

    What leaves a loop comes behind the loop: of two successors the one that is later in the text is visited first, which puts
    it last.
    """
    found: list[int] = []
    seen = {0}
    path = [(0, iter(_successors(blocks, 0)))]
    while path:
        at, successors = path[-1]
        following = next(successors, None)
        if following is None:
            found.append(at)
            path.pop()
        elif following not in seen:
            seen.add(following)
            path.append((following, iter(_successors(blocks, following))))
    rank = [len(blocks)] * len(blocks)
    for place, at in enumerate(reversed(found)):
        rank[at] = place
    return rank


def _successors(blocks: list[Block], at: int) -> list[int]:
    block = blocks[at]
    found = {block.target} if block.end == "bra" else set()
    if (block.end not in ("bra", "ret") or block.guard is not None) and at + 1 < len(blocks):
        found.add(at + 1)
    return sorted(found, reverse=True)


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _dtype(kind: str) -> str:
    """NumPy's for a type."""
    return _DTYPE.get(kind) or f"{'i' if kind[0] == 's' else 'u'}{WIDTH[kind]}"


def _typed(kind: str, compare: str) -> str:
    """`setp.lo.b32` and its kind compare unsigned numbers."""
    return f"u{kind[1:]}" if kind[0] == "b" and kind != "bf16" else kind


Formula = tuple[str, list[str], str]


def _same(count: int, of_integers: str, of_floats: str = "") -> Callable[[str, Sequence[str]], Formula]:
    """An instruction whose operands all have its type."""

    def formula(kind: str, how: Sequence[str]) -> Formula:
        _expect(how, "rn", "ftz", "approx", "full")
        text = of_floats if _dtype(kind)[0] == "f" else of_integers
        if not text or kind in ("bf16", "f16", "f16x2", "bf16x2"):
            raise PtxError(f"its type {kind}")
        return kind, [kind] * count, text

    return formula


def _expect(how: Sequence[str], *known: str) -> None:
    if unknown := [h for h in how if h not in known]:
        raise PtxError(f"its modifier {unknown[0]}")


def _unsigned(kind: str) -> str:
    return kind if kind[0] == "f" else f"u{8 * WIDTH[kind]}"


def _added(symbol: str) -> Callable[[str, Sequence[str]], Formula]:
    def formula(kind: str, how: Sequence[str]) -> Formula:
        _expect(how, "rn", "ftz")
        plain = _unsigned(kind)
        if kind == "f16" or not plain[1:].isdigit():
            raise PtxError(f"its type {kind}")
        return plain, [plain, plain], f"({{0}} {symbol} {{1}})"

    return formula


def _mul(kind: str, how: Sequence[str]) -> Formula:
    if kind[0] == "f":
        _expect(how, "rn", "ftz")
        return kind, [kind, kind], "({0} * {1})"
    if how == ["lo"]:
        return _unsigned(kind), [_unsigned(kind)] * 2, "({0} * {1})"
    if how == ["hi"]:
        return kind, [kind, kind], "mulhi({0}, {1})"
    _expect(how, "wide")
    return f"{kind[0]}{16 * WIDTH[kind]}", [kind, kind], "wide({0}, {1})"


def _mad(kind: str, how: Sequence[str]) -> Formula:
    result, operands, product = _mul(kind, how)
    plain = _unsigned(result)
    view = f".view(u{WIDTH[result]})" if _dtype(result)[0] == "i" else ""
    return plain, [*operands, plain], f"({product}{view} + {{2}})"


def _fma(kind: str, how: Sequence[str]) -> Formula:
    _expect(how, "rn", "ftz")
    return kind, [kind] * 3, {"f32": "fma4({0}, {1}, {2})", "f64": "fma8({0}, {1}, {2})"}[kind]


def _extreme(name: str) -> Callable[[str, Sequence[str]], Formula]:
    def formula(kind: str, how: Sequence[str]) -> Formula:
        if _dtype(kind)[0] != "f":
            _expect(how)
            return kind, [kind, kind], f"np.{name}imum({{0}}, {{1}})"
        _expect(how, "NaN", "ftz")
        return kind, [kind, kind], f"{'nan' if 'NaN' in how else 'f'}{name}({{0}}, {{1}})"

    return formula


def _bits(symbol: str) -> Callable[[str, Sequence[str]], Formula]:
    def formula(kind: str, how: Sequence[str]) -> Formula:
        _expect(how)
        return kind, [kind, kind], f"({{0}} {symbol} {{1}})"

    return formula


def _shift(function: str) -> Callable[[str, Sequence[str]], Formula]:
    def formula(kind: str, how: Sequence[str]) -> Formula:
        _expect(how)
        return kind, [kind, "u32"], f"{function}({{0}}, {{1}})"

    return formula


def _neg(kind: str, how: Sequence[str]) -> Formula:
    _expect(how, "ftz")
    return (kind, [kind], "(-{0})") if kind[0] == "f" else (_unsigned(kind), [_unsigned(kind)], "(~{0} + np.uint8(1))")


def _selp(kind: str, how: Sequence[str]) -> Formula:
    plain = f"b{8 * WIDTH[kind]}"
    return plain, [plain, plain, "pred"], "where({2}, {0}, {1})"


def _lop3(kind: str, how: Sequence[str]) -> Formula:
    return kind, [kind] * 3 + ["u32"], "lop3({0}, {1}, {2}, int({3}[0]))"


def _shf(kind: str, how: Sequence[str]) -> Formula:
    return kind, [kind] * 3, f"funnel({{0}}, {{1}}, {{2}}, {how[0] == 'l'}, {how[1] == 'clamp'})"


def _rcp(kind: str, how: Sequence[str]) -> Formula:
    if kind == "f64" and "approx" in how:
        return kind, [kind], "rcp_approx8({0})"
    _expect(how, "rn", "approx", "ftz")
    return kind, [kind], f"({_dtype(kind)}(1) / {{0}})"


_FORMULAS: dict[str, Callable[[str, list[str]], Formula]] = {
    "add": _added("+"), "sub": _added("-"), "mul": _mul, "mad": _mad, "fma": _fma,
    "div": _same(2, "quotient({0}, {1})", "({0} / {1})"), "rem": _same(2, "remainder({0}, {1})"),
    "min": _extreme("min"), "max": _extreme("max"), "abs": _same(1, "np.abs({0})", "np.abs({0})"), "neg": _neg,
    "and": _bits("&"), "or": _bits("|"), "xor": _bits("^"), "not": lambda kind, how: (kind, [kind], "(~{0})"),
    "shl": _shift("shift_left"), "shr": _shift("shift_right"), "selp": _selp, "lop3": _lop3, "shf": _shf,
    "bfe": lambda kind, how: (kind, [kind, "u32", "u32"], "bfe({0}, {1}, {2})"),
    "bfi": lambda kind, how: (kind, [kind, kind, "u32", "u32"], "bfi({0}, {1}, {2}, {3})"),
    "prmt": lambda kind, how: (kind, [kind] * 3, "prmt({0}, {1}, {2})"),
    "popc": lambda kind, how: ("u32", [kind], "popc({0})"),
    "ex2": _same(1, "", "ex2({0})"), "lg2": _same(1, "", "lg2({0})"), "rcp": _rcp,
    "sqrt": _same(1, "", "np.sqrt({0})"), "rsqrt": _same(1, "", "(1 / np.sqrt({0}.astype(f8))).astype({0}.dtype)"),
}  # fmt: skip
