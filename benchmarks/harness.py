"""What every benchmark here is made of: a case, its contestants, paired timing, and where results go.

A benchmark is a function `build(case) -> Contestants` at module level: it makes the inputs and returns the same work
done in several ways, ours first, each a callable without arguments that returns its outputs and gradients. Peak memory
calls `build` again in a process of its own (`benchmarks.memory`). `conftest.py` has the fixtures `race` and `peaks`,
which check, measure and record.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import grade_kernels as gk
from benchmarks import rivals

OURS = "grade-kernels"
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "op", "backend", "competitor", "device", "dtype", "N", "V", "H", "D", "shape", "threads", "pass",
    "median_seconds", "ratio_to_ours", "ratio_low", "ratio_high", "peak_bytes", "torch", "machine", "date",
)  # fmt: skip

TURN = 1e-3  # seconds that a contestant is called for, at least, before the next one is
Contestants = dict[str, Callable[[], Any]]


def is_ours(name: str) -> bool:
    """Whether a contestant is ours, or one of its ways, which are called "grade-kernels" and what they are."""
    return name == OURS or name.startswith(f"{OURS} ")


@dataclass(frozen=True)
class Case:
    """One operation at one size; H is the hidden size before an LM head, D the width of an embedding table.

    Logits that are more than `[N, V]` have a shape by name, and a case may have its own number of threads.
    """

    op: str
    pass_: str  # forward, backward or forward+backward; the CSV's column "pass"
    dtype: str
    N: int
    V: int
    H: int | None = None
    D: int | None = None
    device: str = "cpu"
    shape: str | None = None
    threads: int | None = None

    def __str__(self) -> str:
        widths = [f"{name}{size}" for name, size in (("H", self.H), ("D", self.D)) if size is not None]
        shape = [] if self.shape is None else [re.sub(r"\W+", "-", self.shape).strip("-")]
        threads = [] if self.threads is None else [f"threads{self.threads}"]
        return "-".join([self.op, self.pass_, self.dtype, str(self.V), f"N{self.N}", *widths, *shape, *threads])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` at its best: specialised to the shape, and an error rather than a silent return to eager."""

    @functools.cache
    def make() -> Callable[..., Any]:  # on the first call: the import alone takes seconds
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *arguments: make()(*arguments)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Time of one call, on an accelerator by the device's own events; its results are freed after the clock has stopped."""
    if device != "cpu":
        before, after = (torch.Event(device, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize()
        before.record()
        result = work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3
    start = time.perf_counter()
    result = work()
    stop = time.perf_counter()
    del result
    return stop - start


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Torch on so many threads, for as long as a case takes; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def why_not(name: str, work: Callable[[], Any], check: Callable[[], None] | None, device: str) -> str | None:
    """What keeps a contestant out of a race, found by calling it once and checking its result: None if nothing does.

    Another library's fault, or a device that is too small for it, must not lose the others' figures.

    Raises:
        RuntimeError: it failed in such a way that the device can not be used from this process any more.
    """
    try:
        if check is None:
            work()
        else:
            check()
        synchronize(device)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        return None
    try:
        synchronize(device)
    except Exception as error:
        raise RuntimeError(f"{name} left the device unusable: {reason}") from error
    if device != "cpu":
        torch.accelerator.empty_cache()
    return reason


def synchronize(device: str) -> None:
    """Wait for what was asked of an accelerator, which is when its faults show."""
    if device != "cpu":
        torch.accelerator.synchronize()


def _cost(name: str, work: Callable[[], Any], device: str, budget: float) -> float:
    """Seconds of a call once it is warm: the first one compiles, loads and warms, which may be most of it."""
    first = seconds(work, device)
    if first > budget / 10 and not name.startswith("compiled"):
        return first
    again = seconds(work, device)
    return min(again, *(seconds(work, device) for _ in range(5))) if again < budget / 100 else again


def run_race(benchmark: Any, case: Case, contestants: Contestants, budget: float, rounds: tuple[int, int]) -> Race:
    """Time the contestants in turns, A B C A B C, so that a drift of the machine meets all of them alike.

    A call of a few microseconds is shorter than what the machine does besides. So in a turn every contestant is called
    until it has taken TURN seconds. Where ours is much the shortest, its turn has up to ten calls, or as many as take a
    fifth of a round. The mean over a turn counts: a turn then has its share of whatever else the machine does. Where a call
    of every contestant is shorter than a turn, that share is all or nothing, and the median of the turn's calls counts.

    Args:
        benchmark: pytest-benchmark's fixture. It times our turns; the others' run as its untimed set-up.
        case: what is measured.
        contestants: ours first.
        budget: seconds that may be spent, beyond a few first calls of each.
        rounds: the fewest and the most.
    """
    costs = {name: _cost(name, work, case.device, budget) for name, work in contestants.items()}
    calls = {name: math.ceil(TURN / cost) for name, cost in costs.items()}
    calls[OURS] = max(calls[OURS], min(10, int(0.2 * sum(costs.values()) / costs[OURS])))
    count = max(rounds[0], min(rounds[1], int(budget / sum(costs[name] * calls[name] for name in costs))))
    times: dict[str, list[float]] = {name: [] for name in contestants}

    average = statistics.median if max(costs.values()) < TURN else statistics.fmean

    def take_turn(name: str) -> None:
        times[name].append(average([seconds(contestants[name], case.device) for _ in range(calls[name])]))

    def others() -> None:
        for name in list(contestants)[1:]:
            take_turn(name)

    benchmark.pedantic(take_turn, args=(OURS,), setup=others, rounds=count)
    benchmark.extra_info["calls"] = calls
    return Race(times)


@dataclass
class Race:
    """Seconds of every round by contestant, ours first."""

    times: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.times.items()}

    def ratios(self, name: str) -> list[float]:
        """How many times as long as ours a contestant took, round by round."""
        ours = next(iter(self.times.values()))
        return [theirs / mine for theirs, mine in zip(self.times[name], ours, strict=True)]

    def ratio(self, name: str) -> float:
        return statistics.median(self.ratios(name))

    def spread(self, name: str) -> tuple[float, float]:
        """Lower and upper quartile of the ratios."""
        low, _, high = statistics.quantiles(self.ratios(name), method="inclusive")
        return low, high


@dataclass
class Results:
    """All that was measured in a session: the CSV, and the tables at the end."""

    rows: dict[tuple[Case, str], dict[str, Any]] = field(default_factory=dict)
    races: dict[Case, tuple[Race, dict[str, float]]] = field(default_factory=dict)
    memory: dict[Case, tuple[dict[str, int], float | None]] = field(default_factory=dict)
    contestants: set[str] = field(default_factory=set)  # of all cases, whether or not they were raced against
    absent: dict[str, str] = field(default_factory=dict)  # other libraries that take no part, and why
    left_out: dict[tuple[Case, str], str] = field(
        default_factory=dict
    )  # contestants that failed or were wrong, and how
    unknown: list[str] = field(default_factory=list)  # contestants that were asked for and that no case had
    slower: list[str] = field(default_factory=list)  # than eager PyTorch
    regressions: list[str] = field(default_factory=list)  # against a saved run

    def add_race(self, case: Case, race: Race, targets: dict[str, float]) -> None:
        """Targets: by contestant, the least ratio to ours that is asked for."""
        self.races[case] = race, targets
        for name, median in race.medians.items():
            low, high = race.spread(name)
            self._row(case, name).update(
                median_seconds=f"{median:.6g}", ratio_to_ours=f"{race.ratio(name):.4g}",
                ratio_low=f"{low:.4g}", ratio_high=f"{high:.4g}",
            )  # fmt: skip

    def add_peaks(self, case: Case, peaks: dict[str, int], limit: float | None) -> None:
        """Limit: the most bytes that are asked of ours."""
        self.memory[case] = peaks, limit
        for name, peak in peaks.items():
            self._row(case, name).update(peak_bytes=peak)

    def _row(self, case: Case, name: str) -> dict[str, Any]:
        fields = asdict(case)
        fields["pass"] = fields.pop("pass_")
        if is_ours(name):
            backend = gk.backends.select(torch.device(case.device), case.torch_dtype)
        else:
            backend = rivals.library(name) or ("inductor" if name.startswith("compiled") else "aten")
        fields |= {"competitor": name, "backend": backend, "torch": torch.__version__}
        fields |= {"machine": machine(case.device), "date": datetime.date.today().isoformat()}
        return self.rows.setdefault((case, name), fields)

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows.values())

    def write_notes(self, path: Path) -> None:
        """Who took no part, and why, as JSON: other libraries, and contestants of single cases."""
        left_out = [{"case": str(case), "name": name, "why": why} for (case, name), why in self.left_out.items()]
        path.write_text(json.dumps({"absent": self.absent, "left_out": left_out}, indent=1))

    def tables(self) -> list[str]:
        """Times and memory in words, a target beside each figure that has one."""
        lines = []
        if self.races:
            names = _union(race.times for race, _ in self.races.values())[1:]
            lines += ["Time: ours, and how many times as long the others took (medians over paired rounds)"]
            table = [["", "N", "V", "dtype", "rounds", "ours", *names]]
            for case, (race, targets) in self.races.items():
                cells = [_ratio_cell(race, name, targets.get(name)) for name in names]
                ours, times = next(iter(race.times.items()))
                table.append([*_label(case), str(len(times)), duration(race.medians[ours]), *cells])
            lines += _aligned(table)
        if self.memory:
            names = _union(peaks for peaks, _ in self.memory.values())
            lines += ["", "Peak memory above the inputs, MiB"]
            table = [["", "N", "V", "dtype", *names, "asked of ours"]]
            for case, (peaks, limit) in self.memory.items():
                cells = [f"{peaks[name] / 2**20:.1f}" if name in peaks else "" for name in names]
                verdict = ""
                if limit is not None:
                    verdict = f"<= {limit / 2**20:.1f}{'' if next(iter(peaks.values())) <= limit else ' MISSED'}"
                table.append([*_label(case), *cells, verdict])
            lines += _aligned(table)
        if self.absent:
            lines += ["", "Not raced against:", *(f"  {name}: {why}" for name, why in self.absent.items())]
        if self.left_out:
            lines += ["", "Left out of a race:"]
            lines += [f"  {case}, {name}: {why}" for (case, name), why in self.left_out.items()]
        return lines


def _union(names: Any) -> list[str]:
    return list(dict.fromkeys(name for some in names for name in some))


def duration(seconds: float) -> str:
    """In milliseconds, or in microseconds where it is less than one."""
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def _label(case: Case) -> list[str]:
    threads = [] if case.threads is None else [f"{case.threads} thread{'s' if case.threads > 1 else ''}"]
    title = ", ".join([f"{case.op} {case.pass_}", *filter(None, [case.shape]), *threads])
    return [title, str(case.N), str(case.V), case.dtype]


def _ratio_cell(race: Race, name: str, target: float | None) -> str:
    if name not in race.times:
        return ""
    ratio = race.ratio(name)
    if target is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} (>= {target:g}{'' if ratio >= target else ' MISSED'})"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def machine(device: str) -> str:
    """What a case runs on: the accelerator's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def cpu_name() -> str:
    """The processor's name, with the vector extension that torch uses there."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
