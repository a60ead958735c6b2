"""What a study consists of, each piece of work a file, and who does it: this process or several at once."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from benchmarks.alignment import variance
from benchmarks.alignment.methods import METHODS
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.tasks import Task
from benchmarks.alignment.train import Run, train
from grade_kernels.demo.cache import replace_text

__all__ = ["GradientJob", "Job", "RunJob", "Workers"]


class Job(Protocol):
    """Work that ends in a file."""

    @property
    def label(self) -> str:
        """What the progress bar says."""

    @property
    def path(self) -> Path:
        """The file; where it is, the work is done."""

    def do(self, task: Task, settings: Settings, on_step: Callable[[int], None]) -> str:
        """Write the file; returns a line about it. Told of every finished step."""


@dataclass(frozen=True)
class RunJob:
    """A run of a method; `middle` is where the policy of half the steps is kept."""

    label: str
    path: Path
    method: str
    learning_rate: float
    beta: float
    seed: int
    middle: Path | None

    def do(self, task: Task, settings: Settings, on_step: Callable[[int], None]) -> str:
        """See `Job`."""
        run = train(
            task, METHODS[self.method], settings, learning_rate=self.learning_rate, beta=self.beta, seed=self.seed,
            middle=self.middle, on_step=on_step,
        )  # fmt: skip
        _write(self.path, asdict(run))
        return (
            f"{self.label}: reward {run.test['reward']:.3f}, KL {run.test['kl']:.2f}, "
            f"perplexity {run.test['perplexity']:.1f}, {run.points[-1].cpu_seconds:.0f} s of CPU"
        )

    def result(self) -> Run:
        """The finished run."""
        return Run.from_dict(json.loads(self.path.read_text()))


@dataclass(frozen=True)
class GradientJob:
    """The spread of a method's gradient at a checkpoint (None: the start) and a set of prompts.

    The mean gradient is kept in `mean`, or multiplied with the one that is kept in `truth`.
    """

    label: str
    path: Path
    method: str
    weights: Path | None
    prompts: int
    mean: Path | None
    truth: Path | None

    def do(self, task: Task, settings: Settings, on_step: Callable[[int], None]) -> str:
        """See `Job`."""
        state = load_file(self.weights) if self.weights else {}
        stream = list(METHODS).index(self.method)
        spread = variance.measure(task, METHODS[self.method], settings, state, prompts=self.prompts, stream=stream)
        if self.mean is not None:
            self.mean.parent.mkdir(parents=True, exist_ok=True)
            save_file({"mean": spread.mean}, self.mean)
        dot = None if self.truth is None else float(spread.mean @ load_file(self.truth)["mean"])
        _write(self.path, {"trace": spread.trace, "norm2": spread.norm2, "dot": dot})
        on_step(settings.steps)
        return f"{self.label}: trace {spread.trace:.3g}, squared mean {spread.norm2:.3g}"

    def result(self) -> dict[str, float | None]:
        """The finished statistics."""
        found: dict[str, float | None] = json.loads(self.path.read_text())
        return found


class Workers:
    """Does jobs whose files are missing: in this process, or several at once in processes of their own.

    Args:
        task: what is aligned.
        settings: budgets.
        console: for progress.
        build: makes the same task in another process; it must be picklable.
        count: processes; with 1 there are no others.
    """

    def __init__(
        self, task: Task, settings: Settings, console: Console, build: Callable[[], Task] | None = None, count: int = 1
    ) -> None:
        self._task, self._settings, self._console = task, settings, console
        self._pool = None
        if count > 1 and build is not None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(build, settings))

    def do(self, jobs: Sequence[Job]) -> None:
        """Do those that are not done."""
        missing = [job for job in jobs if not job.path.exists()]
        if self._pool is None:
            for job in missing:
                with _progress(self._console, job.label, self._settings.steps) as advance:
                    line = job.do(self._task, self._settings, advance)
                self._console.print(line)
        elif missing:
            futures: list[Future[str]] = [self._pool.submit(_do, job) for job in missing]
            with _progress(self._console, f"{missing[0].label} and the like", len(missing)) as advance:
                for done, future in enumerate(as_completed(futures), start=1):
                    self._console.print(future.result())
                    advance(done)

    def close(self) -> None:
        """Stop at once: what is under way is lost."""
        if self._pool is not None:
            for process in multiprocessing.active_children():
                process.terminate()
            self._pool.shutdown(cancel_futures=True)


_HERE: list[tuple[Task, Settings]] = []  # in a worker's process: what it works on


def _begin(build: Callable[[], Task], settings: Settings) -> None:
    # Whoever interrupts also closes; a worker has nothing to say about it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    _HERE.append((build(), settings))


def _do(job: Job) -> str:
    task, settings = _HERE[0]
    return job.do(task, settings, lambda step: None)


def _write(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=1) + "\n")


@contextmanager
def _progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(label, total=total)
        yield lambda done: progress.update(bar, completed=done)
