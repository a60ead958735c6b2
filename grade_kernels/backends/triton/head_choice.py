"""Which of the two ways goes through a head: the kernels' own tiles, or the library's product in chunks.

Tiles read and write no logits. Chunks inherit the library's product, which on some devices is faster by more than that costs.
Neither can be known beforehand for a device that nobody has tried. So both are timed, once for each class of shapes on each
device, when the first call of that class comes. What was found is kept in a file, and in this process for good: backward must
go the way that forward went.

Nothing can be timed while a CUDA graph is captured, nor where kernels are interpreted. There the choice is what the file
says, or else a prediction.
"""

from __future__ import annotations

import functools
import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from grade_kernels.backends.records import Head
from grade_kernels.backends.triton.targets import INTERPRETED, current_target
from grade_kernels.cache import cache_folder, keep

__all__ = ["WAYS", "Choices", "Measured", "ShapeClass", "choices", "environment", "predicted"]

WAYS = ("tiles", "chunks")
ROUNDS = 3  # each way is timed so often, in turns, and its best time counts
_FORMAT = 1


class ShapeClass(NamedTuple):
    """Calls for which one choice is made."""

    dtype: str
    rows: int  # up to so many, a power of two
    vocab: int
    width: int
    bias: bool
    softcap: bool
    reference: str  # "", or dtype and width of a reference's head

    @staticmethod
    def of(heads: tuple[Head, ...]) -> ShapeClass:
        """That of a head, or of a head and a reference's."""
        hidden = heads[0].hidden
        reference = "".join(f"{_name(ref.hidden.dtype)} {ref.hidden.shape[1]}" for ref in heads[1:])
        return ShapeClass(
            _name(hidden.dtype), 1 << (len(hidden) - 1).bit_length(), len(heads[0].weight), hidden.shape[1],
            any(head.bias is not None for head in heads), any(head.softcap is not None for head in heads), reference,
        )  # fmt: skip

    def __str__(self) -> str:
        extras = "".join(f", {name}" for name in ("bias", "softcap") if getattr(self, name))
        reference = f", reference {self.reference}" if self.reference else ""
        return f"{self.dtype}, up to {self.rows} rows, {self.vocab} tokens, width {self.width}{extras}{reference}"


class Measured(NamedTuple):
    """What is known of a class. Seconds are of whichever pass was timed, and None of a way that failed."""

    way: str
    seconds: Mapping[str, float | None]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(entry: object) -> Measured | None:
    """An entry of the file, None if it is none."""
    if not isinstance(entry, dict) or entry.get("way") not in WAYS or not isinstance(entry.get("seconds"), dict):
        return None
    seconds = {way: entry["seconds"].get(way) for way in WAYS}
    if not all(s is None or isinstance(s, (int, float)) for s in seconds.values()):
        return None
    return Measured(entry["way"], seconds)


def predicted(shape: ShapeClass, backend: str, capability: int) -> str:
    """The way that is expected to be faster, by `grade-kernels inspect`.

    Args:
        shape: the class.
        backend, capability: of `Target`.
    """
    if backend != "cuda":
        return "tiles"
    if shape.dtype == "float32":
        return "chunks"  # Triton's product in true float32 is far from the library's
    if 100 <= capability < 120 or (90 <= capability < 100 and shape.reference):
        return "chunks"
    return "chunks" if (shape.bias or shape.softcap) and shape.rows > 128 else "tiles"


def environment(device: torch.device, chunk_bytes: int) -> str:
    """What times depend on besides a class of shapes, as one string."""
    from grade_kernels import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, grade-kernels {__version__}, "
        f"chunks of {chunk_bytes / 2**20:g} MiB"
    )


class Choices:
    """Choices that were made, in this process and in the file of earlier ones.

    Args:
        path: the file; None for none.
        clock: seconds.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path, self.clock = path, clock
        self._lock = threading.RLock()
        self._made: dict[tuple[str, ShapeClass], str] = {}

    def choose(
        self,
        where: str,
        shape: ShapeClass,
        run: Callable[[str], object] | None,
        synchronize: Callable[[], object],
        fallback: str,
    ) -> str:
        """The way for a class of shapes.

        Args:
            where: an `environment`.
            shape: the class.
            run: does the work by a way; None where nothing may be timed.
            synchronize: waits until the device has done it.
            fallback: the way if nothing is known and nothing may be timed.
        """
        key = where, shape
        if (way := self._made.get(key)) is not None:
            return way
        with self._lock:  # a second thread waits, and finds what this one has measured
            if key not in self._made:
                known = self.known(where).get(str(shape))
                if known is not None:
                    self._made[key] = known.way
                elif run is None:
                    self._made[key] = fallback
                else:
                    measured, lasts = self._measure(run, synchronize)
                    self._made[key] = measured.way
                    if lasts:
                        self._keep(where, shape, measured)
            return self._made[key]

    def known(self, where: str) -> dict[str, Measured]:
        """What the file says of an environment, by class. What no such file can say is left out, with a warning."""
        environments, fault = self._read()
        if fault is not None:
            self._warn(fault)
        found = {}
        for shape, entry in environments.get(where, {}).items():
            if (measured := _measured(entry)) is None:
                self._warn(f"what it says of {shape!r} makes no sense")
            else:
                found[shape] = measured
        return found

    def _measure(self, run: Callable[[str], object], synchronize: Callable[[], object]) -> tuple[Measured, bool]:
        """Both ways in turns. A way that fails is not chosen; if both do, the error of the last is raised.

        Returns:
            What was found, and whether it will be found again: memory that lacks now may be there another time.
        """
        best: dict[str, float | None] = dict.fromkeys(WAYS)
        failed: dict[str, Exception] = {}
        for i in range(1 + ROUNDS):  # kernels are compiled in the first round, which does not count
            for way in WAYS:
                if way in failed:
                    continue
                try:
                    synchronize()
                    start = self.clock()
                    run(way)
                    synchronize()
                except Exception as error:  # a compiler, a library or a device that cannot do it fails in its own way
                    failed[way] = error
                    continue
                took, so_far = self.clock() - start, best[way]
                if i:
                    best[way] = took if so_far is None else min(took, so_far)
        for way, reason in failed.items():
            best[way] = None
            if len(failed) == len(WAYS):
                raise reason
            warnings.warn(
                f"the way through a head by {way} fails here, so the other is taken: {reason!r}", stacklevel=4
            )
        times = {way: seconds for way, seconds in best.items() if seconds is not None}
        lasts = not any(isinstance(reason, torch.OutOfMemoryError) for reason in failed.values())
        return Measured(min(times, key=lambda way: times[way]), best), lasts

    def _read(self) -> tuple[dict[str, dict[str, object]], str | None]:
        """The file's environments and None; or none and why, if there is a file and it was not written here."""
        if self.path is None:
            return {}, None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, RecursionError) as error:
            return {}, str(error)
        found = content.get("environments") if isinstance(content, dict) and content.get("format") == _FORMAT else None
        if not isinstance(found, dict) or not all(isinstance(shapes, dict) for shapes in found.values()):
            return {}, "its content is of another kind"
        return found, None

    def _keep(self, where: str, shape: ShapeClass, measured: Measured) -> None:
        """Add to the file, which other processes may have written meanwhile."""
        if self.path is not None:
            environments, _ = self._read()
            environments.setdefault(where, {})[str(shape)] = {"way": measured.way, "seconds": dict(measured.seconds)}
            keep(self.path, json.dumps({"format": _FORMAT, "environments": environments}, indent=1))

    def _warn(self, reason: str) -> None:
        warnings.warn(f"{self.path}: {reason}; ways through a head are measured anew", stacklevel=5)


@functools.cache
def choices() -> Choices:
    """Those of this process."""
    try:
        return Choices(cache_folder() / "head.json")
    except RuntimeError:  # a user without a home
        return Choices(None)


def choose(heads: tuple[Head, ...], chunk_bytes: int, run: Callable[[str], object]) -> str:
    """The way for these heads; `run` does a pass through them by a way."""
    shape, device, target = ShapeClass.of(heads), heads[0].hidden.device, current_target()
    fallback = predicted(shape, target.backend, target.capability)
    if INTERPRETED:
        return fallback
    accelerator = torch.get_device_module(device)
    busy = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return choices().choose(
        environment(device, chunk_bytes), shape, None if busy else run, lambda: accelerator.synchronize(device), fallback
    )  # fmt: skip
