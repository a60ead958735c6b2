"""One run: a method, a learning rate, a beta and a seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.alignment.evaluation import evaluate
from benchmarks.alignment.methods import Method, World
from benchmarks.alignment.process import Memory
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.tasks import Task

__all__ = ["SAMPLES", "Point", "Run", "train", "trainable"]

SAMPLES = 8  # completions that a run keeps


@dataclass(frozen=True)
class Point:
    """The policy after so many steps, on the test prompts.

    Attributes:
        step: optimiser steps so far.
        tokens: generated so far, for learning.
        seconds: of learning so far, by the wall clock.
        cpu_seconds: of learning so far, of this process: what other programs of the machine do not change much.
        reward: and the rest as in `Evaluation`.
    """

    step: int
    tokens: int
    seconds: float
    cpu_seconds: float
    reward: float
    kl: float
    perplexity: float
    distinct_2: float


@dataclass
class Run:
    """What a run leaves.

    Attributes:
        method: name.
        learning_rate: the peak.
        beta: factor of the KL.
        seed: of prompts and noise.
        points: the policy along the way, from its start on.
        test: `Evaluation` at the end, its first completions alone.
        validation: the same on the validation prompts.
        peak_mib: memory at its highest above what was there before the first step, or None where nobody can say.
    """

    method: str
    learning_rate: float
    beta: float
    seed: int
    points: list[Point] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    peak_mib: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """What `asdict` made."""
        return cls(**{**values, "points": [Point(**point) for point in values["points"]]})


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def train(
    task: Task,
    method: Method,
    settings: Settings,
    *,
    learning_rate: float,
    beta: float,
    seed: int,
    middle: Path | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Run:
    """Align the task's policy from its start, and measure along the way.

    Args:
        task: what is aligned.
        method: how.
        settings: budgets.
        learning_rate: reached after the warm-up, and kept.
        beta: factor of the KL.
        seed: of prompts and noise.
        middle: where the policy of half the steps is kept.
        on_step: told the number of each finished step.

    Raises:
        RuntimeError: a gradient is not finite.
    """
    policy = task.start()
    world = World(task, settings, policy, beta, seed)
    learner = method.make(world)
    parameters = [list(trainable(module).values()) for module in learner.modules]
    # The scale of the gradient changes within tens of steps, so its second moment gets a memory of 50, not 1000.
    optimizer = torch.optim.Adam([p for some in parameters for p in some], lr=learning_rate, betas=(0.9, 0.98))
    run = Run(method.name, learning_rate, beta, seed)
    held_out = slice(settings.evaluation_prompts)
    marks = {round(settings.steps * i / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    wall = cpu = 0.0

    def measure(step: int) -> None:
        found = evaluate(policy, task, task.test.rows(slice(settings.point_prompts)))
        run.points.append(
            Point(step, world.tokens, wall, cpu, found.reward, found.kl, found.perplexity, found.distinct_2)
        )

    measure(0)
    losses = learner.losses()
    memory = Memory()
    for step in range(1, settings.steps + 1):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / settings.warmup_steps)
        optimizer.zero_grad(set_to_none=True)
        next(losses).backward()
        for some in parameters:
            nn.utils.clip_grad_norm_(some, settings.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        wall += time.perf_counter() - wall_start
        cpu += time.process_time() - cpu_start
        memory.note()
        if step in marks:
            measure(step)
            memory.restart()
        if middle is not None and step == settings.steps // 2:
            middle.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in trainable(policy).items()}, middle)
        on_step(step)
    run.peak_mib = memory.peak_mib
    for name, prompts in (("test", task.test), ("validation", task.validation)):
        found = asdict(evaluate(policy, task, prompts.rows(held_out)))
        setattr(run, name, {**found, "completions": found["completions"][:SAMPLES]})
    return run
