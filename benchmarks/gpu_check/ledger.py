"""A plugin of pytest that writes down every test as it starts and ends, and goes on where an earlier process stopped.

A fault of a GPU may end the process, or leave a device on which everything fails after. So each line is on disk before
the next test starts. Tests that have ended are not run again. The next to run are those of our own kernels; of these, one
case of every test comes before a second case of any.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

BROKEN = "CUDA error", "HIP error"  # after such an error, nothing else works in the process
PLAIN = "reference", "torch"  # backends without kernels of ours
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The lines of a ledger; one that a killed process wrote half of is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


@dataclass
class Tally:
    """What a ledger says of some tests."""

    outcomes: dict[str, Record] = field(default_factory=dict)  # by test
    running: str | None = None  # a test that started and has not ended
    left: int | None = None  # that had not run when the last process stopped; None: it did not say, or could not know

    @staticmethod
    def of(records: list[Record]) -> Tally:
        tally = Tally()
        for record in records:
            if "start" in record:
                tally.running, tally.left = record["start"], None
            elif "end" in record:
                tally.outcomes[record["end"]] = record
                tally.running = None
            elif "left" in record:
                tally.left = record["left"]
        return tally

    def kernels(self) -> dict[str, dict[str, int]]:
        """By Triton kernel, how many tests launched it, and how many of these passed."""
        return self._count(lambda record: record.get("kernels", ()))

    def backends(self) -> dict[str, dict[str, int]]:
        """By backend, how many tests ran on it, and how many of these passed."""
        return self._count(lambda record: filter(None, [record.get("backend")]))

    def _count(self, names: Callable[[Record], Iterable[str]]) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for record in self.outcomes.values():
            for name in names(record) if record["outcome"] != "skipped" else ():
                count = counts.setdefault(name, {"cases": 0, "passed": 0})
                count["cases"] += 1
                count["passed"] += record["outcome"] == "passed"
        return dict(sorted(counts.items()))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu-check")
    group.addoption("--ledger", type=Path, required=True, help="the file of what has run")
    group.addoption("--ledger-step", default="", help="the step that these tests belong to")
    group.addoption("--ledger-seconds", type=float, default=float("inf"), help="no test starts after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    config.pluginmanager.register(Ledger(option.ledger, option.ledger_step, option.ledger_seconds))


class Ledger:
    """Writes the file, and chooses what runs next."""

    def __init__(self, path: Path, step: str, seconds: float) -> None:
        self.step = step
        self.ended = Tally.of(read(path)).outcomes
        self.file: IO[str] = path.open("a")
        self.deadline = time.monotonic() + seconds
        self.launched: set[str] = set()
        self.backends: dict[str, str | None] = {}
        self.outcome: Record = {}
        self.left: int | None = 0
        self.uncollected = False
        watch_launches(self.launched)

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.uncollected |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        """Behind the suite's own selection, which depends on what it is given."""
        yield
        turns: Counter[str] = Counter()
        order = {}
        for item in items:
            test = item.nodeid.partition("[")[0]
            self.backends[item.nodeid] = backend = backend_of(item)
            order[item] = backend in PLAIN, turns[test]
            turns[test] += 1
        items[:] = sorted((item for item in items if item.nodeid not in self.ended), key=order.__getitem__)
        self.left = None if self.uncollected else len(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True, which says that the test has been dealt with, where it has to wait for the next process."""
        if time.monotonic() < self.deadline:
            return None
        item.session.shouldstop = "the time is up"
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.launched.clear()
        about = {"step": self.step, "backend": self.backends.get(nodeid)}
        self.outcome = {"end": nodeid, **about, "outcome": "passed", "seconds": 0.0}
        self.write({"start": nodeid, **about})

    def pytest_runtest_logfinish(self) -> None:
        self.write(self.outcome | {"kernels": sorted(self.launched)})
        self.left = None if self.left is None else self.left - 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcome["seconds"] = round(self.outcome["seconds"] + report.duration, 3)
        if report.failed or report.skipped:
            self.outcome |= {"outcome": report.outcome, "message": _last_line(report)}

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.excinfo is not None and any(word in str(call.excinfo.value) for word in BROKEN):
            node.session.shouldstop = "the device can not be used from this process any more"

    def pytest_sessionfinish(self) -> None:
        self.write({"left": self.left})
        self.file.close()


def backend_of(item: pytest.Item) -> str | None:
    """The backend that a test runs on, of those that run on several."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    given = [parameters[name] for name in ("gpu_backend", "rows_backend", "place") if name in parameters]
    return getattr(given[0], "backend", given[0]) if given else None


def _last_line(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip()[:1000]


def watch_launches(names: set[str]) -> None:
    """From now on, put the names of Triton kernels that are launched into a set."""
    try:
        from triton.runtime.jit import JITFunction, KernelInterface
    except ImportError:
        return
    for kind in (KernelInterface, JITFunction):
        launcher = vars(kind).get("__getitem__")
        if launcher is not None:
            kind.__getitem__ = _noting(launcher, names)


def _noting(launcher: Any, names: set[str]) -> Any:
    def launch(kernel: Any, grid: Any) -> Any:
        names.add(kernel.fn.__name__)
        return launcher(kernel, grid)

    return launch
