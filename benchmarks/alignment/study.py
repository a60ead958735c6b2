"""Which runs there are, each of them once: a finished run is a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from benchmarks.alignment import variance
from benchmarks.alignment.methods import METHODS, VARIANTS
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.tasks import Task
from benchmarks.alignment.train import SAMPLES, Run, train
from grade_kernels.demo.cache import replace_file
from grade_kernels.demo.config import settings_hash

__all__ = ["FRONTIER", "TRUTH", "Results", "Study"]

# Whose policy of half the steps is a checkpoint of the variance.
CHECKPOINTS = ("grade_ste",)
# Whose gradient is unbiased, and of the unbiased ones the least noisy.
TRUTH = "reinforce"
# Methods that also run with the other betas.
FRONTIER = ("grade_ste", "ste_log", "st", "st_log", "reinforce", "ppo")


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        task: its name.
        notes: about its models.
        settings: budgets.
        prompts: the first test prompts, whose completions the runs keep.
        chosen: learning rate of each method.
        runs: all of them.
        variances: `{checkpoint: {method: [one per set of prompts]}}`: `trace` of the covariance, `norm2` of the mean, and
            its `dot` product with leave-one-out REINFORCE's.
    """

    task: str
    notes: dict[str, Any]
    settings: Settings
    prompts: list[str] = field(default_factory=list)
    chosen: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    variances: dict[str, dict[str, list[dict[str, float | None]]]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Methods with at least one run at their chosen learning rate."""
        return [name for name in self.chosen if self.final(name)]

    def final(self, method: str) -> list[Run]:
        """The runs of a method at its chosen learning rate and the full beta, one per seed."""
        rate = self.chosen.get(method)
        return [r for r in self.runs if (r.method, r.learning_rate, r.beta) == (method, rate, self.settings.beta)]

    def frontier(self, method: str) -> list[list[Run]]:
        """The runs that stand for a method's frontier, by seed: those at its chosen learning rate, with every beta."""
        rate = self.chosen.get(method)
        runs = [r for r in self.runs if (r.method, r.learning_rate) == (method, rate)]
        return [[r for r in runs if r.seed == seed] for seed in dict.fromkeys(r.seed for r in runs)]

    def objective(self, run: Run) -> float:
        """What chooses a learning rate: what every method is asked to raise, on the validation prompts."""
        return run.validation["reward"] - self.settings.beta * run.validation["kl"]


class Study:
    """Runs what the output folder does not hold yet, and collects everything in `results` as it comes.

    Args:
        task: what is aligned.
        settings: budgets.
        output: folder; finished runs are in `runs/`.
        console: for progress.
    """

    def __init__(self, task: Task, settings: Settings, output: Path, console: Console) -> None:
        self.task, self.settings, self.output, self.console = task, settings, output, console
        prompts = [str(task.tokenizer.decode(ids, skip_special_tokens=True)) for ids in task.test.ids[:SAMPLES]]
        self.results = Results(task.name, task.notes, settings, [prompt.strip() for prompt in prompts])
        # Seeds and rates are a run's own; a study with more of them finds the runs of a smaller one.
        mine = {**asdict(settings), "seeds": None, "learning_rates": None, "beta": None, "frontier_betas": None}
        spreads = ("variance_draws", "variance_sets", "value_steps")
        sizes = ("prompts", "completions", "variance_draws", "value_steps")
        self.identity = settings_hash("run 1", task.identity, {k: v for k, v in mine.items() if k not in spreads})
        self.variance_identity = settings_hash("variance 1", task.identity, {k: mine[k] for k in sizes})

    def run(self, methods: Sequence[str]) -> Results:
        """For the named methods: learning rates and seeds, gradient variance, and the runs with other betas."""
        main = [name for name in methods if name not in VARIANTS]
        for names in (main, [name for name in methods if name in VARIANTS]):
            for name in names:
                self._choose(name)
            for name in names:
                for seed in self.settings.seeds[1:]:
                    self._one(name, self.results.chosen[name], self.settings.beta, seed)
            if names is main:
                self._variances(methods)
        for seed, beta in itertools.product(self.settings.seeds, self.settings.frontier_betas):
            for name in (name for name in FRONTIER if name in methods):
                self._one(name, self.results.chosen[name], beta, seed)
        return self.results

    def _choose(self, name: str) -> None:
        """Try every learning rate on the first seed; a variant takes GRADE-STE's where that is known."""
        settings, results = self.settings, self.results
        if name in VARIANTS and "grade_ste" in results.chosen:
            results.chosen[name] = results.chosen["grade_ste"]
            self._one(name, results.chosen[name], settings.beta, settings.seeds[0])
            return
        runs = [self._one(name, rate, settings.beta, settings.seeds[0]) for rate in settings.learning_rates]
        results.chosen[name] = max(runs, key=results.objective).learning_rate

    def _one(self, name: str, rate: float, beta: float, seed: int) -> Run:
        label = f"{self.task.name}-{name}-lr{rate:g}-beta{beta:g}-seed{seed}"
        path = self.output / "runs" / f"{label}-{self.identity}.json"
        if path.exists():
            run = Run.from_dict(json.loads(path.read_text()))
        else:
            keep = name in CHECKPOINTS and seed == self.settings.seeds[0] and beta == self.settings.beta
            with _progress(self.console, label, self.settings.steps) as advance:
                run = train(
                    self.task, METHODS[name], self.settings, learning_rate=rate, beta=beta, seed=seed,
                    middle=self._middle(name, rate) if keep else None, on_step=advance,
                )  # fmt: skip
            _write(path, asdict(run))
            self.console.print(
                f"{label}: reward {run.test['reward']:.3f}, KL {run.test['kl']:.2f}, "
                f"perplexity {run.test['perplexity']:.1f}, {run.points[-1].cpu_seconds:.0f} s of CPU"
            )
        self.results.runs.append(run)
        return run

    def _middle(self, name: str, rate: float) -> Path:
        return self.output / "runs" / f"{self.task.name}-{name}-lr{rate:g}-middle-{self.identity}.safetensors"

    def _variances(self, names: Sequence[str]) -> None:
        checkpoints = {"start": None} | {
            f"{METHODS[name].title}, half way": self._middle(name, self.results.chosen[name])
            for name in CHECKPOINTS
            if name in self.results.chosen
        }
        # The unbiased gradient comes first, for the others are multiplied with it.
        order = sorted(names, key=lambda name: name != TRUTH)
        for checkpoint, weights in checkpoints.items():
            found: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
            with _progress(self.console, f"{self.task.name}: gradients at {checkpoint}", len(names)) as advance:
                for done, name in enumerate(order, start=1):
                    for prompts in range(self.settings.variance_sets):
                        found[name].append(self._spread(name, weights, prompts, compare=TRUTH in names))
                    advance(done)
            self.results.variances[checkpoint] = found

    def _spread(self, name: str, weights: Path | None, prompts: int, *, compare: bool) -> dict[str, float | None]:
        """A method's gradient at a checkpoint and a set of prompts; `compare` with the unbiased one's mean."""

        def path(method: str, suffix: str) -> Path:
            key = settings_hash("start" if weights is None else weights.name, prompts, self.variance_identity)
            return self.output / "runs" / f"{self.task.name}-gradient-{method}-{key}{suffix}"

        if path(name, ".json").exists():
            return json.loads(path(name, ".json").read_text())
        state = load_file(weights) if weights else {}
        stream = list(METHODS).index(name)
        spread = variance.measure(self.task, METHODS[name], self.settings, state, prompts=prompts, stream=stream)
        dot = None
        if name == TRUTH:
            path(name, "").parent.mkdir(parents=True, exist_ok=True)
            save_file({"mean": spread.mean}, path(name, ".safetensors"))
        elif compare:
            dot = float(spread.mean @ load_file(path(TRUTH, ".safetensors"))["mean"])
        found = {"trace": spread.trace, "norm2": spread.norm2, "dot": dot}
        _write(path(name, ".json"), found)
        return found


def _write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1)

    def write(temporary: Path) -> None:
        temporary.write_text(text + "\n")

    replace_file(path, write)


@contextmanager
def _progress(console: Console, label: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(label, total=total)
        yield lambda done: progress.update(bar, completed=done)
