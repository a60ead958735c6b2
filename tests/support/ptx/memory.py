"""Memory that watches: every access must fall on bytes that exist, reads on bytes that somebody wrote, and no two threads
may touch one byte without a barrier between them, if one of them writes.

Bytes are watched in granules: as many neighbours as every access of a kernel takes together.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["OUTSIDE", "PENDING", "UNSIGNED", "UNWRITTEN", "WRITTEN", "Buffer", "ExecutionError", "Global", "Shared"]

Array = npt.NDArray[np.generic]
Lanes = npt.NDArray[np.int64]  # numbers of threads, counted through all blocks of a grid

UNSIGNED: dict[int, np.dtype[np.unsignedinteger[npt.NBitBase]]] = {
    1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64),
}  # fmt: skip
OUTSIDE, UNWRITTEN, PENDING, WRITTEN = range(4)  # pending: a copy into it was started, and nobody waited for it
NOBODY, SEVERAL = -1, -2  # SEVERAL: of several blocks, where there are several
_FIRST_BLOCK = -10  # this less the number of a block: several threads of it


class ExecutionError(Exception):
    """What a GPU would do silently, or not define."""


class Buffer(NamedTuple):
    """Memory outside of the simulator.

    Attributes:
        address: where it begins.
        data: its bytes.
        unwritten: for each byte whether nobody wrote it, or None if somebody wrote all.
    """

    address: int
    data: npt.NDArray[np.uint8]
    unwritten: npt.NDArray[np.bool_] | None = None


class Watched:
    """Bytes, and for each granule its state, who wrote it last and in which epoch of his block, and who read it.

    An epoch is the time between two barriers of a block.
    """

    def __init__(self, size: int, granule: int, name: str) -> None:
        self.name, self.granule = name, granule
        self.bytes = np.zeros(-(-size // 16) * 16 + 16, np.uint8)
        self.views = {width: self.bytes.view(dtype) for width, dtype in UNSIGNED.items()}
        count = len(self.bytes) // granule
        self.state = np.full(count, OUTSIDE, np.uint8)
        self.writer, self.written_in = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
        self.reader, self.read_in = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)

    def granules(self, at: Lanes, size: int) -> Lanes:
        """[accesses, granules of each] for accesses that begin at these bytes."""
        first = at // self.granule
        many = size // self.granule
        return first[:, None] if many == 1 else first[:, None] + np.arange(many)

    def check_state(self, granules: Lanes, addresses: Array, lanes: Lanes, what: str, reads: bool) -> None:
        state = self.state[granules]
        if (state == OUTSIDE).any():
            self.fail(state == OUTSIDE, addresses, lanes, f"{what} outside of every buffer")
        if reads and (state != WRITTEN).any():
            if (state == PENDING).any():
                self.fail(state == PENDING, addresses, lanes, f"{what} of bytes whose copy nobody waited for")
            self.fail(state != WRITTEN, addresses, lanes, f"{what} of bytes that nobody wrote")

    def fail(self, bad: npt.NDArray[np.bool_], addresses: Array, lanes: Lanes, what: str) -> None:
        which = np.flatnonzero(bad.any(1) if bad.ndim == 2 else bad)
        first = which[0]
        raise ExecutionError(
            f"{self.name} memory: {what}: {len(which)} accesses, the first by thread {lanes[first]} of the grid at "
            f"{int(addresses[first]):#x}"
        )

    def others(self, who: Array, when: Array, lanes: Lanes, epochs: Array, threads: int) -> npt.NDArray[np.bool_]:
        """Where somebody else was, without a barrier between."""
        lanes, epochs = lanes[:, None], epochs[:, None]
        other = (who != lanes) & (who != NOBODY)
        if not other.any():
            return other
        return other & ((who // threads != lanes // threads) | (when == epochs))


class Shared(Watched):
    """Shared memory of several blocks. Nothing in it is written when a block begins."""

    def __init__(self, blocks: int, size: int, granule: int, threads: int) -> None:
        self.size, self.threads = size, threads
        self.pitch = -(-size // 16) * 16 + 16  # between blocks lie bytes that do not exist
        super().__init__(blocks * self.pitch, granule, "shared")
        inside = np.arange(len(self.state)) * granule
        self.state[(inside % self.pitch < size) & (inside < blocks * self.pitch)] = UNWRITTEN

    def locate(self, addresses: Array, width: int, lanes: Lanes, what: str, first: int) -> Lanes:
        """Bytes of accesses; `first` is the grid's thread with which this memory's first block begins."""
        at = addresses.astype(np.int64)
        beyond = (at < 0) | (at + width > self.size)
        if beyond.any():
            self.fail(beyond, addresses, lanes, f"{what} outside of the block's {self.size} bytes")
        if (at % width).any():
            self.fail(at % width != 0, addresses, lanes, f"{what} that is not aligned to {width} bytes")
        return (lanes - first) // self.threads * self.pitch + at

    def note_reads(self, granules: Lanes, lanes: Lanes, epochs: Array) -> None:
        who, when = self.reader[granules], self.read_in[granules]
        mine, now = lanes[:, None], epochs[:, None].astype(np.int32)
        several = (when == now) & (who != NOBODY) & (who != mine)
        self.reader[granules] = np.where(several, SEVERAL, mine)
        self.read_in[granules] = now
        again = self.reader[granules]
        clash = (again != mine) & (again != SEVERAL)  # several lanes of this one instruction
        if clash.any():
            self.reader[granules[clash]] = SEVERAL

    def load(self, at: Lanes, addresses: Array, size: int, count: int, lanes: Lanes, epochs: Array) -> list[Array]:
        granules = self.granules(at, size * count)
        self.check_state(granules, addresses, lanes, "a read", True)
        other = (self.writer[granules] != lanes[:, None]) & (self.written_in[granules] == epochs[:, None])
        if other.any():
            self.fail(other, addresses, lanes, "a race: a read of what another thread wrote since the last barrier")
        self.note_reads(granules, lanes, epochs)
        view, base = self.views[size], at // size
        return [view[base + i] for i in range(count)]

    def check_write(self, granules: Lanes, addresses: Array, lanes: Lanes, epochs: Array) -> npt.NDArray[np.bool_]:
        """Where another thread wrote since the last barrier; a read by another thread is a fault."""
        self.check_state(granules, addresses, lanes, "a write", False)
        now, mine = epochs[:, None], lanes[:, None]
        who = self.reader[granules]
        read = (who != mine) & (who != NOBODY) & (self.read_in[granules] == now)
        if read.any():
            self.fail(read, addresses, lanes, "a race: a write of what another thread read since the last barrier")
        who = self.writer[granules]
        return (who != mine) & (who != NOBODY) & (self.written_in[granules] == now)

    def store(self, at: Lanes, addresses: Array, size: int, values: list[Array], lanes: Lanes, epochs: Array) -> None:
        granules = self.granules(at, size * len(values))
        other = self.check_write(granules, addresses, lanes, epochs).any(1)
        view, base = self.views[size], at // size
        for i, value in enumerate(values):
            put(self, view, base + i, value, other, addresses, lanes)
        self.state[granules], self.writer[granules] = WRITTEN, lanes[:, None]
        self.written_in[granules] = epochs[:, None]

    def start(self, at: Lanes, addresses: Array, size: int, lanes: Lanes, epochs: Array) -> Lanes:
        """A copy into these bytes begins."""
        granules = self.granules(at, size)
        other = self.check_write(granules, addresses, lanes, epochs)
        if other.any():
            self.fail(other, addresses, lanes, "a race: a copy to where another thread wrote since the last barrier")
        self.state[granules], self.writer[granules] = PENDING, lanes[:, None]
        self.written_in[granules] = epochs[:, None]
        return granules


def put(
    memory: Watched, view: Array, at: Lanes, value: Array, other: npt.NDArray[np.bool_], addresses: Array, lanes: Lanes
) -> None:
    """Store, and refuse threads that disagree. That threads store one value several times is no fault."""
    if other.any():
        differs = other & (view[at] != value)
        if differs.any():
            memory.fail(differs, addresses, lanes, "a race: another thread wrote another value since the last barrier")
    view[at] = value
    differs = view[at] != value
    if differs.any():
        memory.fail(
            differs, addresses, lanes, "threads disagree: one instruction stores different values to one address"
        )


class Global(Watched):
    """Buffers, copied in, so that a write beside them hits nothing."""

    def __init__(self, buffers: list[Buffer], granule: int, threads: int) -> None:
        self.buffers, self.threads = sorted(buffers, key=lambda b: b.address), threads
        places, end = [], 16
        for buffer in self.buffers:
            begin = -(-end // 16) * 16 + buffer.address % 16
            places.append(begin)
            end = begin + len(buffer.data) + 16
        super().__init__(end, granule, "global")
        self.starts = [b.address for b in self.buffers]
        self.ends = np.array([b.address + len(b.data) for b in self.buffers], np.int64)
        self.moves = np.array([p - b.address for p, b in zip(places, self.buffers, strict=True)], np.int64)
        self.places = places
        self.stored, self.loaded = [False] * len(places), [False] * len(places)
        self.watch_reads = False
        self.fill()

    def fill(self) -> None:
        """As it was before the launch."""
        self.writer[:], self.reader[:] = NOBODY, NOBODY
        for place, buffer in zip(self.places, self.buffers, strict=True):
            end = place + len(buffer.data)
            self.bytes[place:end] = buffer.data
            first, last = place // self.granule, -(-end // self.granule)
            self.state[first:last] = WRITTEN
            if buffer.unwritten is not None and buffer.unwritten.any():
                self.state[np.flatnonzero(buffer.unwritten[:: self.granule]) + first] = UNWRITTEN

    def copy_back(self) -> None:
        for place, buffer, stored in zip(self.places, self.buffers, self.stored, strict=True):
            if stored:
                buffer.data[:] = self.bytes[place : place + len(buffer.data)]

    def locate(self, addresses: Array, width: int, lanes: Lanes, what: str) -> tuple[Lanes, list[int]]:
        """Bytes of accesses, and the buffers that they are in."""
        at = addresses.astype(np.int64)
        if (at % width).any():
            self.fail(at % width != 0, addresses, lanes, f"{what} that is not aligned to {width} bytes")
        which = bisect_right(self.starts, int(at.min())) - 1
        if which >= 0 and int(at.max()) + width <= self.ends[which]:
            return at + self.moves[which], [which]
        each = np.searchsorted(np.array(self.starts, np.int64), at, "right") - 1
        outside = (each < 0) | (at + width > self.ends[np.maximum(each, 0)])
        if outside.any():
            self.fail(outside, addresses, lanes, f"{what} outside of every buffer")
        return at + self.moves[each], np.unique(each).tolist()

    def load(self, addresses: Array, size: int, count: int, lanes: Lanes, epochs: Array) -> list[Array]:
        at, within = self.locate(addresses, size * count, lanes, "a read")
        granules = self.granules(at, size * count)
        self.check_state(granules, addresses, lanes, "a read", True)
        for i in within:
            self.loaded[i] = True
        if any(self.stored[i] for i in within):
            other = self.others(self.writer[granules], self.written_in[granules], lanes, epochs, self.threads)
            if other.any():
                self.fail(other, addresses, lanes, "a race: a read of what another thread wrote, no barrier between")
        if self.watch_reads:
            self.note_reads(granules, lanes, epochs)
        view, base = self.views[size], at // size
        return [view[base + i] for i in range(count)]

    def note_reads(self, granules: Lanes, lanes: Lanes, epochs: Array) -> None:
        mine, now = np.broadcast_to(lanes[:, None], granules.shape), epochs[:, None]
        who, block = self.reader[granules], mine // self.threads
        # A reader of another block is never forgotten: nothing orders blocks. One of this block is, behind a barrier.
        elsewhere = (who != NOBODY) & (self.block_of(who) != block)
        here = (who != NOBODY) & (who != mine) & (self.read_in[granules] == now)
        self.reader[granules] = np.where(elsewhere, SEVERAL, np.where(here, _FIRST_BLOCK - block, mine))
        self.read_in[granules] = now
        again = self.reader[granules]
        clash = (again >= 0) & (again != mine)  # several lanes of this one instruction
        if clash.any():
            same = self.block_of(again) == block
            self.reader[granules[clash]] = np.where(same, _FIRST_BLOCK - block, SEVERAL)[clash]

    def block_of(self, who: Array) -> Array:
        """The block of a reader; of `SEVERAL` one that does not exist."""
        return np.where(who >= 0, who // self.threads, _FIRST_BLOCK - who)

    def store(self, addresses: Array, size: int, values: list[Array], lanes: Lanes, epochs: Array) -> None:
        at, within = self.locate(addresses, size * len(values), lanes, "a write")
        granules = self.granules(at, size * len(values))
        self.check_state(granules, addresses, lanes, "a write", False)
        for i in within:
            self.stored[i] = True
        if self.watch_reads:
            who, mine = self.reader[granules], lanes[:, None]
            near = (who != mine) & (self.read_in[granules] == epochs[:, None])
            other = (who != NOBODY) & (near | (self.block_of(who) != mine // self.threads))
            if other.any():
                self.fail(other, addresses, lanes, "a race: a write of what another thread read, no barrier between")
        who, when = self.writer[granules], self.written_in[granules]
        other = self.others(who, when, lanes, epochs, self.threads).any(1)
        view, base = self.views[size], at // size
        for i, value in enumerate(values):
            put(self, view, base + i, value, other, addresses, lanes)
        self.state[granules], self.writer[granules] = WRITTEN, lanes[:, None]
        self.written_in[granules] = epochs[:, None]
