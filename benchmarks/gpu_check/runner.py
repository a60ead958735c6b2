"""Runs steps one after another, each in a process of its own, and keeps what they found in a folder.

A folder holds the file of the machine, the ledger of all tests, and for every step a folder with its log, its figures and
`result.json`. A step whose result says that it has ended is not run again unless it is asked for.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import ledger
from benchmarks.gpu_check.steps import Step, file_name, filled
from benchmarks.harness import ROOT

PASSED, FAILED, WAITING = "passed", "failed", "waiting"  # the last: for time; the next call goes on with it
LEAST = 15.0  # seconds: with less than that left, no step begins
GRACE = 60.0  # seconds that a process may take to end by itself once its time is up
TAIL = 25  # lines of a failed step's log that a result keeps


@dataclass
class Result:
    """What a step found."""

    name: str
    kind: str
    commit: str = ""  # of the package
    state: str = WAITING
    seconds: float = 0.0
    why: str = ""  # of a state that is not `passed`
    rows: list[dict[str, str]] = field(default_factory=list)  # of benchmarks.csv
    notes: dict[str, Any] = field(default_factory=dict)  # benchmarks' notes.json, or what the training step wrote
    tests: dict[str, Any] = field(default_factory=dict)  # how many passed, failed, and so on; the failed ones
    tail: list[str] = field(default_factory=list)  # of its log


class Runner:
    """The steps of one folder.

    Args:
        folder: where results are.
        commit: of the package, which every result notes.
        seconds: that may be spent.
        say: called with a line as something begins or ends.
    """

    def __init__(self, folder: Path, commit: str, seconds: float, say: Callable[[str], None]) -> None:
        self.folder, self.commit, self.say = folder, commit, say
        self.end = time.monotonic() + seconds

    @property
    def ledger(self) -> Path:
        return self.folder / "tests.jsonl"

    def room(self, step: Step) -> Path:
        return self.folder / file_name(step)

    def result(self, step: Step) -> Result:
        """What is known of a step."""
        path = self.room(step) / "result.json"
        return Result(**json.loads(path.read_text())) if path.exists() else Result(step.name, step.kind)

    def forget(self, step: Step) -> None:
        """Let a step run again from its beginning; of tests, those that did not pass."""
        shutil.rmtree(self.room(step), ignore_errors=True)
        if step.kind == "tests" and self.ledger.exists():
            ends = [record for record in ledger.read(self.ledger) if "end" in record]
            records = [record for record in ends if record["step"] != step.name or record["outcome"] == "passed"]
            self.ledger.write_text("".join(json.dumps(record) + "\n" for record in records))

    def run(self, steps: Collection[Step], wrote: Callable[[], None]) -> None:
        """Run what has not ended yet, as far as the time goes; `wrote` is called after every step.

        Raises:
            KeyboardInterrupt: after the step's process has been ended and what it found is kept.
        """
        for step in steps:
            if self.result(step).state != WAITING:
                continue
            if self.left() < LEAST:
                break
            self.say(f"{step.name} ...")
            start = time.monotonic()
            result = Result(step.name, step.kind, self.commit, why="interrupted")
            try:
                getattr(self, f"_{'tests' if step.kind == 'tests' else 'command'}")(step, result)
            finally:
                result.seconds = round(time.monotonic() - start, 1)
                self.keep(step, result)
                self.say(
                    f"{step.name}: {result.state} after {result.seconds:.0f} s{f', {result.why}' if result.why else ''}"
                )
                wrote()

    def left(self) -> float:
        return self.end - time.monotonic()

    def keep(self, step: Step, result: Result) -> None:
        """Write a result so that a reader never sees half of it."""
        path = self.room(step) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(result), indent=1))
        new.replace(path)

    def _command(self, step: Step, result: Result) -> None:
        """A step of one process. A contestant that ends the process is left out of a second try."""
        room, crashed = self.room(step), dict[str, str]()
        while True:
            self._clean(room)
            begun_with = self.left()
            without = ("--without", ",".join(crashed)) if crashed else ()
            status = self._process(
                [*filled(step, room, self.ledger), *without], room / "log.txt", min(step.limit, begun_with)
            )
            trial = room / "trial"
            if status is None or status == 0 or not trial.exists():
                break
            name = trial.read_text()
            if name in crashed or self.left() < LEAST:
                break
            crashed[name] = ended(status)
            self.say(f"  {name}: {crashed[name]}; again without it")
        self._read(room, result)
        result.notes.setdefault("crashed", crashed)
        if status == 0:
            result.state, result.why = PASSED, ""
        elif status is None and begun_with < step.limit:
            result.why = "out of time"
        else:
            result.state = FAILED
            result.why = f"took more than {step.limit:.0f} s" if status is None else ended(status)
            result.tail = (room / "log.txt").read_text(errors="replace").splitlines()[-TAIL:]

    def _tests(self, step: Step, result: Result) -> None:
        """Tests in one process after another: one that ends early is followed by another, without the test that ended it."""
        room = self.room(step)
        room.mkdir(parents=True, exist_ok=True)
        end, own = time.monotonic() + min(step.limit, self.left()), step.limit <= self.left()
        tally = ledger.Tally()
        while True:
            seconds = end - time.monotonic()
            command = [
                *filled(step, room, self.ledger),
                "--ledger-step",
                step.name,
                "--ledger-seconds",
                f"{seconds:.0f}",
            ]
            status = self._process(command, room / "log.txt", seconds + GRACE)
            known = len(tally.outcomes)
            tally = ledger.Tally.of(ledger.read(self.ledger))
            if tally.running is not None:
                self._close(step, tally.running, "took too long" if status is None else ended(status))
                tally = ledger.Tally.of(ledger.read(self.ledger))
            over = end - time.monotonic() < LEAST
            stuck = not over and len(tally.outcomes) == known  # something other than a test or the time ends pytest
            if tally.left == 0 or stuck or over:
                break
        mine = [record for record in tally.outcomes.values() if record["step"] == step.name]
        count = {what: sum(record["outcome"] == what for record in mine) for what in ("passed", "failed", "skipped")}
        failed = {r["end"]: r.get("message", "") for r in mine if r["outcome"] == "failed"}
        result.tests = count | {"left": tally.left, "messages": failed}
        result.notes |= {"kernels": tally.kernels(), "backends": tally.backends()}
        result.why = f"{len(failed)} tests failed" if failed else ""
        if stuck:
            result.state, result.why = FAILED, f"pytest {ended(status or 0)}"
            result.tail = (room / "log.txt").read_text(errors="replace").splitlines()[-TAIL:]
        elif tally.left != 0 and not own:
            result.why = f"out of time; so far {result.why}" if failed else "out of time"
        else:
            result.state = FAILED if failed else PASSED

    def _close(self, step: Step, test: str, how: str) -> None:
        """Note the end of a test whose process could not."""
        record = {"end": test, "step": step.name, "outcome": "failed", "seconds": 0.0, "message": how}
        with self.ledger.open("a") as file:
            file.write("\n" + json.dumps(record) + "\n")

    def _clean(self, room: Path) -> None:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)

    def _read(self, room: Path, result: Result) -> None:
        """What a step has left in its folder."""
        table = room / "benchmarks.csv"
        if table.exists():
            with table.open(newline="") as file:
                result.rows = list(csv.DictReader(file))
        for name in ("notes.json", "training.json"):
            if (room / name).exists():
                result.notes |= json.loads((room / name).read_text())
        if result.kind == "doctor":
            result.tail = (room / "log.txt").read_text(errors="replace").splitlines()

    def _process(self, arguments: list[str], log: Path, limit: float) -> int | None:
        """The exit status of Python with these arguments, or None if its time was up before it ended.

        It has a session of its own: an interrupt reaches this process alone, which then ends the other with all its children.
        """
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        environment.pop("PYTEST_XDIST_WORKER", None)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(max(0.0, limit))
            except subprocess.TimeoutExpired:
                return None
            finally:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, if it has not ended."""
    for kill, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, kill)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def ended(status: int) -> str:
    """In words how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"
