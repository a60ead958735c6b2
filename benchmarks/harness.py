"""What every benchmark here is made of: a case, its contestants, paired timing, and where results go.

A benchmark is a function `build(case) -> Contestants` at module level: it makes the inputs and returns the same work
done in several ways, ours first, each a callable without arguments that returns its outputs and gradients. Peak memory
calls `build` again in a process of its own (`benchmarks.memory`). `conftest.py` has the fixtures `race` and `peaks`,
which check, measure and record.
"""

from __future__ import annotations

import csv
import datetime
import functools
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import grade_kernels as gk

OURS = "grade-kernels"
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "op", "backend", "competitor", "device", "dtype", "N", "V", "H", "D", "pass",
    "median_seconds", "ratio_to_ours", "ratio_low", "ratio_high", "peak_bytes", "torch", "machine", "date",
)  # fmt: skip

Contestants = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One operation at one size; H is the hidden size before an LM head, D the width of an embedding table."""

    op: str
    pass_: str  # forward, backward or forward+backward; the CSV's column "pass"
    dtype: str
    N: int
    V: int
    H: int | None = None
    D: int | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        widths = [f"{name}{size}" for name, size in (("H", self.H), ("D", self.D)) if size is not None]
        return "-".join([self.op, self.pass_, self.dtype, str(self.V), f"N{self.N}", *widths])

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


def run_race(benchmark: Any, case: Case, contestants: Contestants, budget: float, rounds: tuple[int, int]) -> Race:
    """Time the contestants in turns, A B C A B C, so that a drift of the machine meets all of them alike.

    Where ours is much the shortest, it is called several times in its turn, up to a fifth of a round or ten times, and
    their mean counts: a turn then has its share of whatever else the machine does.

    Args:
        benchmark: pytest-benchmark's fixture. It times ours; the others run as its untimed set-up.
        case: what is measured.
        contestants: ours first.
        budget: seconds that may be spent, beyond a first call of each.
        rounds: the fewest and the most.
    """
    # The first call compiles, loads and warms; where that may be most of it, the second one says what a call costs.
    costs = []
    for name, work in contestants.items():
        first = seconds(work, case.device)
        again = name.startswith("compiled") or first < budget / 10
        costs.append(seconds(work, case.device) if again else first)
    count = max(rounds[0], min(rounds[1], int(budget / sum(costs))))
    calls = max(1, min(10, int(0.2 * sum(costs) / costs[0])))
    (ours, work), *others = contestants.items()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    call = itertools.count()

    def run_others() -> None:
        if next(call) % calls == 0:
            for name, other in others:
                times[name].append(seconds(other, case.device))

    data: list[float] = []
    benchmark.pedantic(lambda: data.append(seconds(work, case.device)), setup=run_others, rounds=count * calls)
    times[ours] = [statistics.mean(data[i : i + calls]) for i in range(0, len(data), calls)]
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
    unknown: list[str] = field(default_factory=list)  # contestants that were asked for and that no case had
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
        if name == OURS:
            backend = gk.backends.select(torch.device(case.device), case.torch_dtype)
        else:
            backend = "inductor" if name.startswith("compiled") else "aten"
        fields |= {"competitor": name, "backend": backend, "torch": torch.__version__}
        fields |= {"machine": machine(case.device), "date": datetime.date.today().isoformat()}
        return self.rows.setdefault((case, name), fields)

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows.values())

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
                table.append([*_label(case), str(len(times)), f"{1e3 * race.medians[ours]:.2f} ms", *cells])
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
        return lines


def _union(names: Any) -> list[str]:
    return list(dict.fromkeys(name for some in names for name in some))


def _label(case: Case) -> list[str]:
    return [f"{case.op} {case.pass_}", str(case.N), str(case.V), case.dtype]


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
