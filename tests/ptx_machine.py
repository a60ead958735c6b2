"""A warp that runs the little PTX of `grade_kernels.backends.triton.head_ptx`, so that it is tested without a GPU.

Registers are numpy arrays of 32 lanes. Nothing but the instructions that occur is known, and anything else is an error.
Meanings are those of NVIDIA's PTX ISA 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

LANES = 32
_ALL = (1 << LANES) - 1
_DTYPES = {"b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "s64": np.int64}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {"gt": np.greater, "lt": np.less, "ne": np.not_equal}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0),
}


class Warp:
    """Runs one block.

    Args:
        operands: `$0`, `$1`, ... as arrays `[32]`; outputs are written in place.
        memory: bytes that stores may reach, addressed from 0.
    """

    def __init__(self, operands: list[np.ndarray], memory: np.ndarray | None = None) -> None:
        self.values: dict[str, np.ndarray] = {f"${i}": x for i, x in enumerate(operands)}
        self.memory = np.zeros(0, np.uint8) if memory is None else memory
        self.written: list[int] = []  # addresses, in order
        lane = np.arange(LANES, dtype=np.uint32)
        self.values["%laneid"] = lane
        self.values["%lanemask_lt"] = ((np.uint64(1) << lane.astype(np.uint64)) - np.uint64(1)).astype(np.uint32)

    def run(self, block: str) -> None:
        """Run to the end of the block."""
        text = block.strip()
        assert text.startswith("{")
        assert text.endswith("}")
        statements = [s.strip() for s in re.split(r"[;\n]", text[1:-1]) if s.strip()]
        labels = {s[:-1]: i for i, s in enumerate(statements) if s.endswith(":")}
        at = 0
        with np.errstate(over="ignore"):
            while at < len(statements):
                target = self._step(statements[at])
                at = at + 1 if target is None else labels[target]

    def _step(self, statement: str) -> str | None:
        """Run a statement; returns the label it jumps to."""
        if statement.endswith(":"):
            return None
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            dtype = np.bool_ if kind == ".pred" else _DTYPES[kind[1:]]
            for name in names.split(","):  # what is read before it is written must not go unnoticed
                poison = True if dtype is np.bool_ else np.nan if dtype is np.float32 else 0xDEADBEEF
                self.values[name.strip()] = np.full(LANES, poison, dtype)
            return None
        guard = np.ones(LANES, bool)
        if match := re.match(r"@(!?)(\w+)\s+", statement):
            guard = self.values[match[2]] != bool(match[1])
            statement = statement[match.end() :]
        operation, _, rest = statement.partition(" ")
        arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        name, *kinds = operation.split(".")
        if name == "bra":
            assert kinds == ["uni"]
            assert guard.all() or not guard.any(), "a jump that a warp takes together is taken by a part of it"
            return arguments[0] if guard.all() else None
        if name == "st":
            assert kinds == ["global", "v2", "b32"]
            self._store(guard, arguments)
            return None
        self._write(arguments[0], self._value(name, kinds, arguments), guard)
        return None

    def _value(self, name: str, kinds: list[str], arguments: list[str]) -> np.ndarray:
        dtype = _DTYPES.get(kinds[-1], np.uint32)
        if name == "mov":
            return self._read(arguments[1], dtype)
        if name in _ARITHMETIC:
            assert len(arguments) == 3
            return _ARITHMETIC[name](*(self._read(x, dtype) for x in arguments[1:])).astype(dtype)
        if name == "setp":
            found = _COMPARE[kinds[0]](*(self._read(x, dtype) for x in arguments[1:3]))
            if len(kinds) == 3:
                other = self.values[arguments[3]]
                found = found | other if kinds[1] == "or" else found & other
            return found
        if name == "selp":
            return np.where(self.values[arguments[3]], *(self._read(x, dtype) for x in arguments[1:3]))
        if name == "vote":
            assert int(arguments[2], 0) == _ALL
            votes = self.values[arguments[1]]
            if kinds[1] == "any":
                return np.full(LANES, votes.any())
            return np.full(LANES, sum(1 << i for i in range(LANES) if votes[i]), np.uint32)
        if name == "shfl":
            assert kinds[:2] == ["sync", "idx"]
            assert arguments[3:] == ["31", "0xffffffff"]
            return self._read(arguments[1], np.uint32)[self._read(arguments[2], np.uint32)]
        if name == "popc":
            return np.array([int(x).bit_count() for x in self._read(arguments[1], np.uint32)], np.uint32)
        if name == "mul":
            assert kinds == ["wide", "u32"]
            return self._read(arguments[1], np.uint32).astype(np.uint64) * self._read(arguments[2], np.uint32)
        if name == "mad" and kinds[0] == "lo":
            a, b, c = (self._read(x, np.uint32) for x in arguments[1:])
            return a * b + c
        if name == "mad":
            assert kinds == ["wide", "s32"]
            a, b = (self._read(x, np.int32).astype(np.int64) for x in arguments[1:3])
            return (a * b + self._read(arguments[3], np.int64)).view(np.uint64)
        if name == "cvt":
            assert kinds == ["rn", "f32", "u32"]
            return self._read(arguments[1], np.uint32).astype(np.float32)
        if name == "fma":
            a, b, c = (self._read(x, np.float32).astype(np.float64) for x in arguments[1:])
            return (a * b + c).astype(np.float32)
        if name == "lg2":
            return np.log2(self._read(arguments[1], np.float32))
        raise NotImplementedError(name)

    def _read(self, name: str, dtype: type) -> np.ndarray:
        if name in self.values:
            value = self.values[name]
            assert value.itemsize == np.dtype(dtype).itemsize, f"{name} is {value.dtype}, but read as {dtype.__name__}"
            return value.view(dtype)
        if name.startswith("0f"):
            return np.full(LANES, int(name[2:], 16), np.uint32).view(np.float32)
        return (
            np.full(LANES, int(name, 0) % 2 ** (8 * np.dtype(dtype).itemsize))
            .astype(f"u{np.dtype(dtype).itemsize}")
            .view(dtype)
        )

    def _write(self, name: str, value: np.ndarray, guard: np.ndarray) -> None:
        if name.startswith("{"):  # two halves of a wide register
            halves = value.view(np.uint32).reshape(LANES, 2)
            for half, register in enumerate(name[1:-1].split(",")):
                self._write(register.strip(), halves[:, half], guard)
            return
        register = self.values[name]
        register[guard] = np.ascontiguousarray(value).view(register.dtype)[guard]

    def _store(self, guard: np.ndarray, arguments: list[str]) -> None:
        addresses = self._read(arguments[0][1:-1], np.int64)
        words = [self._read(x.strip(), np.uint32 if x.strip() not in self.values else self.values[x.strip()].dtype.type)
                 for x in arguments[1][1:-1].split(",")]  # fmt: skip
        for lane in np.flatnonzero(guard):
            address = int(addresses[lane])
            assert address % 8 == 0
            assert 0 <= address <= len(self.memory) - 8
            self.written.append(address)
            self.memory[address : address + 8] = np.array([w.view(np.uint32)[lane] for w in words]).view(np.uint8)
