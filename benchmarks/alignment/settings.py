"""Every number of the experiment, the same for each method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Budgets of a run, and how many runs there are.

    Attributes:
        steps: optimiser steps.
        prompts: different prompts a step.
        completions: completions of each of them; leave-one-out compares these.
        beta: factor of the KL, in nats per completion.
        frontier_betas: its values in further runs, for the reward-KL frontier: one lets the policy drift, one holds it.
        learning_rates: the short list every method chooses from.
        seeds: of prompts and noise; the learning rate is chosen on the first.
        warmup_steps: the learning rate rises over so many steps.
        max_grad_norm: clip of the gradient.
        evaluations: evaluation points along a run, beside its start.
        point_prompts: test prompts at an evaluation point, with one completion each.
        evaluation_prompts: test prompts at the end, and as many of validation.
        variance_draws: gradients at the same prompts.
        variance_sets: sets of prompts that is repeated with; the band is over them.
        value_steps: steps a value model is fitted for, before the variance of PPO's gradient is measured.
    """

    steps: int = 100
    prompts: int = 8
    completions: int = 4
    beta: float = 0.02
    frontier_betas: tuple[float, ...] = (0.002, 0.05)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    evaluations: int = 10
    point_prompts: int = 128
    evaluation_prompts: int = 256
    variance_draws: int = 12
    variance_sets: int = 3
    value_steps: int = 20

    @property
    def batch_size(self) -> int:
        """Completions a step."""
        return self.prompts * self.completions

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """Minutes instead of an hour: enough to see that everything works, and not enough to decide anything."""
        quick = cls(
            steps=24,
            learning_rates=(3e-4, 1e-3),
            frontier_betas=(0.002,),
            seeds=(0, 1),
            evaluations=4,
            point_prompts=32,
            evaluation_prompts=64,
            variance_draws=4,
            variance_sets=2,
            value_steps=4,
            warmup_steps=4,
        )
        return dataclasses.replace(quick, **changes)
