"""Which runs there are, each of them once: a finished run is a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alignment.jobs import GradientJob, RunJob, Workers
from benchmarks.alignment.methods import METHODS, VARIANTS
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.tasks import Task
from benchmarks.alignment.train import SAMPLES, Run
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
    """Has done what the output folder does not hold yet, and collects everything in `results` as it comes.

    Args:
        task: what is aligned.
        settings: budgets.
        output: folder; finished work is in `runs/`.
        workers: who does it.
    """

    def __init__(self, task: Task, settings: Settings, output: Path, workers: Workers) -> None:
        self.task, self.settings, self.output, self.workers = task, settings, output, workers
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
        settings, chosen = self.settings, self.results.chosen
        main = [name for name in methods if name not in VARIANTS]
        for names in (main, [name for name in methods if name in VARIANTS]):
            self._choose(names)
            self._runs((name, chosen[name], settings.beta, seed) for name in names for seed in settings.seeds[1:])
            if names is main:
                self._variances(methods)
        self._runs(
            (name, chosen[name], beta, seed)
            for seed, beta in itertools.product(settings.seeds, settings.frontier_betas)
            for name in FRONTIER
            if name in methods
        )
        return self.results

    def _choose(self, names: Sequence[str]) -> None:
        """Try every learning rate on the first seed; a variant takes GRADE-STE's where that is known."""
        settings, results = self.settings, self.results
        rates: dict[str, tuple[float, ...]] = dict.fromkeys(names, settings.learning_rates)
        if "grade_ste" in results.chosen:
            rates |= {name: (results.chosen["grade_ste"],) for name in names if name in VARIANTS}
        runs = self._runs((name, rate, settings.beta, settings.seeds[0]) for name in names for rate in rates[name])
        for name in names:
            mine = [run for run in runs if run.method == name]
            results.chosen[name] = max(mine, key=results.objective).learning_rate

    def _runs(self, wanted: Iterable[tuple[str, float, float, int]]) -> list[Run]:
        """Runs by method, learning rate, beta and seed."""
        jobs = [self._job(*run) for run in wanted]
        try:
            self.workers.do(jobs)
        finally:  # also when interrupted, for the report
            runs = [job.result() for job in jobs if job.path.exists()]
            self.results.runs += runs
        return runs

    def _job(self, name: str, rate: float, beta: float, seed: int) -> RunJob:
        label = f"{self.task.name}-{name}-lr{rate:g}-beta{beta:g}-seed{seed}"
        keep = name in CHECKPOINTS and seed == self.settings.seeds[0] and beta == self.settings.beta
        path = self.output / "runs" / f"{label}-{self.identity}.json"
        return RunJob(label, path, name, rate, beta, seed, self._middle(name, rate) if keep else None)

    def _middle(self, name: str, rate: float) -> Path:
        return self.output / "runs" / f"{self.task.name}-{name}-lr{rate:g}-middle-{self.identity}.safetensors"

    def _variances(self, names: Sequence[str]) -> None:
        checkpoints = {"start": None} | {
            f"{METHODS[name].title}, half way": self._middle(name, self.results.chosen[name])
            for name in CHECKPOINTS
            if name in self.results.chosen
        }
        jobs = {
            checkpoint: {name: self._gradients(name, checkpoint, weights, compare=TRUTH in names) for name in names}
            for checkpoint, weights in checkpoints.items()
        }
        everything = [job for found in jobs.values() for some in found.values() for job in some]
        # The unbiased gradient comes first, for the others are multiplied with it.
        self.workers.do([job for job in everything if job.method == TRUTH])
        self.workers.do(everything)
        for checkpoint, found in jobs.items():
            self.results.variances[checkpoint] = {name: [job.result() for job in some] for name, some in found.items()}

    def _gradients(self, name: str, checkpoint: str, weights: Path | None, *, compare: bool) -> list[GradientJob]:
        """A method's gradient at a checkpoint, one job per set of prompts; `compare` with the unbiased one's mean."""

        def path(method: str, prompts: int, suffix: str) -> Path:
            key = settings_hash("start" if weights is None else weights.name, prompts, self.variance_identity)
            return self.output / "runs" / f"{self.task.name}-gradient-{method}-{key}{suffix}"

        return [
            GradientJob(
                f"{self.task.name}: gradient of {name}, {checkpoint}, prompts {prompts}",
                path(name, prompts, ".json"), name, weights, prompts,
                mean=path(name, prompts, ".safetensors") if name == TRUTH else None,
                truth=path(TRUTH, prompts, ".safetensors") if compare and name != TRUTH else None,
            )
            for prompts in range(self.settings.variance_sets)
        ]  # fmt: skip
