"""Executes a kernel: all threads of some blocks of the grid in step, an instruction at a time.

Where threads part, those at the earliest basic block go first (`Translation.rank`), so that they meet again. Threads of a
block of the grid wait at a barrier until all of them are there; if that cannot happen, it is an `ExecutionError`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.ptx.memory import PENDING, UNSIGNED, WRITTEN, Buffer, ExecutionError, Global, Shared
from tests.support.ptx.program import PtxError, read_kernels
from tests.support.ptx.translation import Translation

__all__ = ["execute", "translated"]

Array = npt.NDArray[Any]
WARP = 32
LANES_AT_A_TIME = 8192  # threads in step: with more, arrays leave the cache
MOST_STEPS = 2_000_000  # basic blocks, until a loop is taken for endless


@functools.lru_cache(maxsize=256)
def translated(text: str) -> dict[str, Translation]:
    """All kernels of a module."""
    return {name: Translation(kernel) for name, kernel in read_kernels(text).items()}


def execute(
    translation: Translation,
    grid: tuple[int, int, int],
    threads: int,
    parameters: bytes,
    shared_bytes: int,
    buffers: Sequence[Buffer],
) -> None:
    """Launch: buffers that the kernel writes are changed.

    Raises:
        ExecutionError: for what a GPU would not define.
    """
    if threads % WARP:
        raise PtxError("blocks of whole warps alone are known")
    size = max(shared_bytes, translation.kernel.shared_bytes)
    memory = Global(list(buffers), translation.granules["global"], threads)
    count = grid[0] * grid[1] * grid[2]
    for watch_reads in (False, True):
        memory.watch_reads = watch_reads
        step = max(1, LANES_AT_A_TIME // threads)
        for first in range(0, count, step):
            blocks = range(first, min(count, first + step))
            with np.errstate(all="ignore"):
                _Machine(translation, grid, threads, parameters, size, memory, blocks).run()
        # Who reads needs no note where nobody writes, which is known at the end.
        if watch_reads or not any(s and r for s, r in zip(memory.stored, memory.loaded, strict=True)):
            break
        memory.fill()
    memory.copy_back()


class _Machine:
    def __init__(
        self,
        translation: Translation,
        grid: tuple[int, int, int],
        threads: int,
        parameters: bytes,
        shared_bytes: int,
        memory: Global,
        blocks: range,
    ) -> None:
        self.translation, self.threads, self.memory = translation, threads, memory
        self.count = len(blocks) * threads
        self.first = blocks.start * threads
        self.lanes = np.arange(self.count) + self.first
        self.lane = np.arange(self.count, dtype=np.uint32) % WARP
        self.shared = Shared(len(blocks), shared_bytes, translation.granules["shared"], threads)
        self.epochs = np.zeros(self.count, np.int32)
        self.alive = np.ones(self.count, bool)
        self.bytes = np.frombuffer(parameters + bytes(16), np.uint8)
        block = np.repeat(np.arange(blocks.start, blocks.stop), threads).astype(np.uint32)
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        x, y, _ = grid
        self.specials = {
            "%tid.x": thread, "%tid.y": np.zeros(1, np.uint32), "%tid.z": np.zeros(1, np.uint32),
            "%ntid.x": np.full(1, threads, np.uint32), "%laneid": self.lane, "%warpid": thread // np.uint32(WARP),
            "%ctaid.x": block % np.uint32(x), "%ctaid.y": block // np.uint32(x) % np.uint32(y),
            "%ctaid.z": block // np.uint32(x * y),
            "%lanemask_lt": (np.uint32(1) << self.lane) - np.uint32(1), "%lanemask_eq": np.uint32(1) << self.lane,
            **{f"%nctaid.{axis}": np.full(1, n, np.uint32) for axis, n in zip("xyz", grid, strict=True)},
        }  # fmt: skip
        # An unusual number, so that a register that nothing was put into shows.
        self.registers: list[Array] = [
            np.zeros(1, bool)
            if width == 0
            else np.full(1, 0xFFF5FFF5FFF5FFF5 & ((1 << 8 * width) - 1), UNSIGNED[width])
            for width in translation.widths
        ]
        self.copies: list[list[Any]] = []
        self.issued = np.zeros(self.count, np.int64)

    # Threads that part and meet

    def run(self) -> None:
        blocks, rank = self.translation.blocks, self.translation.rank
        ready: dict[int, Array] = {0: self.alive.copy()}
        waiting: dict[int, Array] = {}
        for _ in range(MOST_STEPS):
            if not ready:
                if not waiting:
                    return
                ready = self._pass_barrier(waiting)
                continue
            at = min(ready, key=rank.__getitem__)
            mask = ready.pop(at)
            block = blocks[at]
            everyone = bool(mask.all())
            self.translation.function(at, not everyone)(self.registers, self, None if everyone else mask)
            goes = mask
            if block.guard is not None:
                p = self.registers[block.guard[0]]
                goes = mask & (~p if block.guard[1] else p)
            stays = mask & ~goes if block.guard is not None else None
            if block.end == "next":
                _join(ready, at + 1, mask)
                continue
            if block.end == "bra":
                _join(ready, block.target, goes)
            elif block.end == "ret":
                self.alive &= ~goes
            else:
                self._whole_warps(goes, "a barrier")
                _join(waiting, at + 1, goes)
            if stays is not None:
                _join(ready, at + 1, stays)
        raise ExecutionError("a loop that does not end")

    def _pass_barrier(self, waiting: dict[int, Array]) -> dict[int, Array]:
        """All threads wait. Those of blocks that have arrived as a whole go on."""
        arrived = np.zeros(self.count, bool)
        for mask in waiting.values():
            arrived |= mask
        by_block = arrived.reshape(-1, self.threads)
        part = by_block.any(1) & ~by_block.all(1)
        if part.any():
            where = ", ".join(self.translation.blocks[at - 1].label for at in waiting)
            raise ExecutionError(
                f"a barrier ({where}) that some threads of block {np.flatnonzero(part)[0]} never reach"
            )
        self.epochs[arrived] += 1
        ready = dict(waiting)
        waiting.clear()
        return ready

    def _whole_warps(self, mask: Array, what: str) -> None:
        warps = mask.reshape(-1, WARP)
        part = warps.any(1) & ~warps.all(1)
        if part.any():
            raise ExecutionError(f"{what} that a part of warp {np.flatnonzero(part)[0]} executes alone")

    # What instructions ask for

    def special(self, name: str) -> Array:
        return self.specials[name]

    def parameters(
        self, address: Array, offset: int, size: int, count: int, mask: Array | None, line: int
    ) -> list[Array]:
        at = address.astype(np.int64) + offset
        outside = (at < 0) | (at + size * count > len(self.bytes) - 16)
        if outside.any():
            if mask is None or (outside & mask).any():
                raise ExecutionError(f"line {line} of the PTX: a read outside of the kernel's parameters")
            at = np.where(outside, 0, at)  # of threads that are elsewhere
        found = self.bytes[at[:, None] + np.arange(size * count)]
        view = np.ascontiguousarray(found).view(UNSIGNED[size])
        return [np.ascontiguousarray(view[:, i]) for i in range(count)]

    def _chosen(self, mask: Array | None) -> Array | None:
        """Numbers of the lanes that act; None for all."""
        if mask is None:
            return None
        mask = np.broadcast_to(mask, (self.count,))
        return None if mask.all() else np.flatnonzero(mask)

    def _addresses(self, address: Array, offset: int, chosen: Array | None) -> Array:
        each = np.broadcast_to(address, (self.count,))
        each = each if chosen is None else each[chosen]
        return each.astype(np.int64) + offset

    def _spread(self, values: list[Array], chosen: Array | None) -> list[Array]:
        if chosen is None:
            return values
        spread = [np.zeros(self.count, v.dtype) for v in values]
        for full, value in zip(spread, values, strict=True):
            full[chosen] = value
        return spread

    def _none(self, size: int, count: int) -> list[Array]:
        return [np.zeros(1, UNSIGNED[size])] * count

    def _lanes(self, chosen: Array | None) -> tuple[Array, Array]:
        return (self.lanes, self.epochs) if chosen is None else (self.lanes[chosen], self.epochs[chosen])

    def load_global(
        self, address: Array, offset: int, size: int, count: int, mask: Array | None, line: int
    ) -> list[Array]:
        chosen = self._chosen(mask)
        if chosen is not None and not len(chosen):
            return self._none(size, count)
        with _At(line):
            at = self._addresses(address, offset, chosen)
            return self._spread(self.memory.load(at, size, count, *self._lanes(chosen)), chosen)

    def store_global(
        self, address: Array, offset: int, size: int, values: list[Array], mask: Array | None, line: int
    ) -> None:
        chosen = self._chosen(mask)
        if chosen is not None and not len(chosen):
            return
        with _At(line):
            at = self._addresses(address, offset, chosen)
            self.memory.store(at, size, self._picked(values, chosen), *self._lanes(chosen))

    def _picked(self, values: list[Array], chosen: Array | None) -> list[Array]:
        full = [np.broadcast_to(v, (self.count,)) for v in values]
        return full if chosen is None else [v[chosen] for v in full]

    def load_shared(
        self, address: Array, offset: int, size: int, count: int, mask: Array | None, line: int
    ) -> list[Array]:
        chosen = self._chosen(mask)
        if chosen is not None and not len(chosen):
            return self._none(size, count)
        with _At(line):
            addresses = self._addresses(address, offset, chosen)
            return self._spread(self._load_shared(addresses, size, count, *self._lanes(chosen)), chosen)

    def _load_shared(self, addresses: Array, size: int, count: int, lanes: Array, epochs: Array) -> list[Array]:
        at = self.shared.locate(addresses, size * count, lanes, "a read", self.first)
        return self.shared.load(at, addresses, size, count, lanes, epochs)

    def store_shared(
        self, address: Array, offset: int, size: int, values: list[Array], mask: Array | None, line: int
    ) -> None:
        chosen = self._chosen(mask)
        if chosen is not None and not len(chosen):
            return
        with _At(line):
            addresses = self._addresses(address, offset, chosen)
            lanes, epochs = self._lanes(chosen)
            at = self.shared.locate(addresses, size * len(values), lanes, "a write", self.first)
            self.shared.store(at, addresses, size, self._picked(values, chosen), lanes, epochs)

    # Copies that run beside the threads

    def copy(
        self,
        to: Array,
        to_offset: int,
        of: Array,
        of_offset: int,
        size: int,
        taken: Array,
        mask: Array | None,
        line: int,
    ) -> None:
        """`cp.async`: bytes beyond `taken` become zero. What arrives may be read once its thread has waited."""
        chosen = self._chosen(mask)
        if chosen is not None and not len(chosen):
            return
        with _At(line):
            lanes, epochs = self._lanes(chosen)
            addresses = self._addresses(to, to_offset, chosen)
            at = self.shared.locate(addresses, size, lanes, "a copy", self.first)
            granules = self.shared.start(at, addresses, size, lanes, epochs)
            word = min(size, 4)
            sources = self._addresses(of, of_offset, chosen)
            (count,) = self._picked([taken], chosen)
            values = np.zeros((len(lanes), size // word), UNSIGNED[word])
            for bytes_taken in np.unique(count).tolist():
                if bytes_taken % word or bytes_taken > size:
                    raise ExecutionError(f"a copy of {bytes_taken} of {size} bytes")
                if bytes_taken:
                    some = np.flatnonzero(count == bytes_taken)
                    found = self.memory.load(sources[some], word, bytes_taken // word, lanes[some], epochs[some])
                    values[some, : bytes_taken // word] = np.stack(found, 1)
            index = lanes - self.first
            self.copies.append([index, self.issued[index], at, granules, values, word])

    def commit(self, mask: Array | None) -> None:
        self.issued += 1 if mask is None else mask

    def wait(self, left: int, mask: Array | None) -> None:
        """Until at most `left` groups of a thread are on their way; -1: none, committed or not."""
        kept = []
        for index, group, at, granules, values, word in self.copies:
            done = np.ones(len(index), bool) if left < 0 else group < self.issued[index] - left
            if mask is not None:
                done &= np.broadcast_to(mask, (self.count,))[index]
            if done.any():
                base = at[done] // word
                self.shared.views[word][base[:, None] + np.arange(values.shape[1])] = values[done]
                self.shared.state[granules[done]] = np.where(
                    self.shared.state[granules[done]] == PENDING, WRITTEN, self.shared.state[granules[done]]
                )
                self.shared.written_in[granules[done]] = self.epochs[index[done], None]
            rest = ~done
            if rest.any():
                kept.append([index[rest], group[rest], at[rest], granules[rest], values[rest], word])
        self.copies = kept

    # A warp together

    def _members(self, members: Array, mask: Array | None, line: int) -> Array:
        """[warps, 32]: who takes part, by the instruction; all of them must be here."""
        with _At(line):
            here = np.ones(self.count, bool) if mask is None else np.broadcast_to(mask, (self.count,))
            here = here.reshape(-1, WARP)
            said = (
                np.broadcast_to(members, (self.count,)).reshape(-1, WARP)[:, :, None]
                >> np.arange(WARP, dtype=np.uint32)
            ) & 1
            missing = here & (said.astype(bool) & ~here[:, None, :]).any(2)
            if missing.any():
                raise ExecutionError(f"warp {np.flatnonzero(missing.any(1))[0]} waits for threads that are elsewhere")
            alone = here & ~said[:, np.arange(WARP), np.arange(WARP)].astype(bool)
            if alone.any():
                raise ExecutionError("a thread executes an instruction of its warp that does not name it")
            return here

    def _all_here(self, members: Array, mask: Array | None) -> bool:
        return mask is None and members.shape == (1,) and int(members[0]) == 0xFFFFFFFF

    def shuffle(
        self, mode: str, a: Array, b: Array, c: Array, members: Array, mask: Array | None, line: int
    ) -> tuple[Array, Array]:
        here = None if self._all_here(members, mask) else self._members(members, mask, line)
        lane = self.lane.astype(np.int64)
        b = b.astype(np.int64) & 31
        segment, clamp = (c.astype(np.int64) >> 8) & 31, c.astype(np.int64) & 31
        low = lane & segment
        last = low | (clamp & ~segment)
        if mode == "up":
            source, inside = lane - b, lane - b >= last
        elif mode == "idx":
            source = low | (b & ~segment & 31)
            inside = source <= last
        else:
            source = lane + b if mode == "down" else lane ^ b
            inside = source <= last
        source = np.where(inside, source, lane)
        place = source + np.arange(self.count) // WARP * WARP
        if here is not None:
            with _At(line):
                if (here.reshape(-1) & ~here.reshape(-1)[place]).any():
                    raise ExecutionError("a shuffle from a thread that does not take part")
        return np.broadcast_to(a, (self.count,))[place], np.broadcast_to(inside, (self.count,))

    def vote(self, mode: str, p: Array, members: Array, mask: Array | None, line: int) -> Array:
        here = self._members(members, mask, line)
        each = np.broadcast_to(p, (self.count,)).reshape(-1, WARP)
        if mode == "ballot":
            bits = (each & here).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
            return np.repeat(bits.sum(1).astype(np.uint32), WARP)
        yes, no = (each & here).any(1), (~each & here).any(1)
        return np.repeat({"any": yes, "all": ~no, "uni": ~(yes & no)}[mode], WARP)

    def reduce(self, mode: str, a: Array, members: Array, mask: Array | None, line: int) -> Array:
        here = self._members(members, mask, line)
        each = np.broadcast_to(a, (self.count,)).reshape(-1, WARP)
        full = -1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max
        function, neutral = {
            "add": (np.add, 0), "min": (np.minimum, np.iinfo(a.dtype).max), "max": (np.maximum, np.iinfo(a.dtype).min),
            "and": (np.bitwise_and, full), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
        }[mode]  # fmt: skip
        given = np.where(here, each, np.array(neutral, a.dtype))
        return np.repeat(function.reduce(given, axis=1, dtype=a.dtype), WARP)

    def active(self, mask: Array | None) -> Array:
        return self.vote("ballot", np.ones(1, bool) if mask is None else mask, self._here_bits(mask), mask, 0)

    def _here_bits(self, mask: Array | None) -> Array:
        here = np.ones(self.count, bool) if mask is None else np.broadcast_to(mask, (self.count,))
        bits = here.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
        return np.repeat(bits.sum(1).astype(np.uint32), WARP)

    def matrices(
        self, address: Array, offset: int, count: int, trans: bool, mask: Array | None, line: int
    ) -> list[Array]:
        """`ldmatrix`: rows of 16 bytes, whose addresses threads 8 i to 8 i + 7 hold for matrix i."""
        with _At(line):
            chosen = self._chosen(mask)
            if mask is not None:
                self._whole_warps(np.broadcast_to(mask, (self.count,)), "ldmatrix")
            rows = np.broadcast_to(address, (self.count,)).astype(np.int64).reshape(-1, WARP) + offset
            here = slice(None) if chosen is None else chosen[::WARP] // WARP
            if (rows[here, : 8 * count] % 16).any():
                raise ExecutionError("ldmatrix: a row that is not aligned to 16 bytes")
            lane = np.arange(WARP)
            out = []
            for i in range(count):
                if trans:
                    parts = [rows[:, 8 * i + 2 * (lane % 4) + h] + 2 * (lane // 4) for h in (0, 1)]
                else:
                    parts = [rows[:, 8 * i + lane // 4] + 4 * (lane % 4)]
                found = []
                for part in parts:
                    each = part.reshape(-1)
                    each = each if chosen is None else each[chosen]
                    found += self._spread(self._load_shared(each, 4 // len(parts), 1, *self._lanes(chosen)), chosen)
                out.append(found[0] if not trans else found[0].astype(np.uint32) | (found[1].astype(np.uint32) << 16))
            return out

    def multiply(
        self, shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array], mask: Array | None, line: int
    ) -> list[Array]:
        """`mma`: products and sums in float64, rounded once."""
        if mask is not None:
            with _At(line):
                self._whole_warps(np.broadcast_to(mask, (self.count,)), "mma")
        inner = int(shape[shape.index("k") + 1 :])
        each = 1 if kind == "tf32" else 2  # elements in a register
        if shape[: shape.index("k")] != "m16n8" or len(a) * 4 * each != 2 * inner or len(b) * 4 * each != inner:
            raise PtxError(f"a product of kind {shape}.{kind}")
        # Registers of A go down by 8 rows first, then along the inner dimension; [i_k, i_row, warp, g, t, element].
        x = self._elements(a, kind).reshape(len(a) // 2, 2, -1, 8, 4, each)
        x = x.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, inner)
        y = self._elements(b, kind).reshape(len(b), -1, 8, 4, each)
        y = y.transpose(1, 0, 3, 4, 2).reshape(-1, inner, 8)
        z = np.stack([np.broadcast_to(v, (self.count,)) for v in c]).view(np.float32)
        z = z.reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        out = (np.matmul(x, y) + z).astype(np.float32)
        out = out.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.count)
        return list(np.ascontiguousarray(out))

    def _elements(self, registers: list[Array], kind: str) -> Array:
        """[registers, threads, elements in each] in float64."""
        words = np.stack([np.broadcast_to(r, (self.count,)) for r in registers])
        if kind == "tf32":
            return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        parts = words.view(np.uint16)
        if kind == "bf16":
            return (parts.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return parts.view(np.float16).astype(np.float64)


class _At:
    """Names the line in what goes wrong."""

    def __init__(self, line: int) -> None:
        self.line = line

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ExecutionError) and "line" not in str(error):
            error.args = (f"line {self.line} of the PTX: {error.args[0]}",)


def _join(fronts: dict[int, Array], at: int, mask: Array) -> None:
    if mask.any():
        fronts[at] = fronts[at] | mask if at in fronts else mask
