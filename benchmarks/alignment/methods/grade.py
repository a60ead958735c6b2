"""Ours: the reward's gradient through the samples themselves, by `grade_kernels.training.Aligner`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.alignment.methods.base import Batch, World
from grade_kernels.training import Aligner, DifferentiableReward, OtherModel, Relaxation
from grade_kernels.training.model import read_language_model
from grade_kernels.training.rewards import Objective

__all__ = ["Grade", "LogProbability"]


class LogProbability:
    """The logarithm of a reward that is a probability: its gradient does not vanish where the probability is small."""

    def __init__(self, reward: DifferentiableReward) -> None:
        self._reward = reward
        self.embedding = reward.embedding

    def __call__(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **columns: Any) -> torch.Tensor:
        probability = self._reward(inputs_embeds, attention_mask, **columns)
        return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


class Grade:
    """One loss a step. The KL is exact in each token's distribution and differentiated as well.

    Args:
        world: the task and the policy.
        log: differentiate the logarithm of the reward.
        relaxation: how the gradient runs back, as `Relaxation` takes it.
    """

    def __init__(self, world: World, *, log: bool = False, **relaxation: Any) -> None:
        task = world.task
        reward = LogProbability(task.reward) if log else task.reward
        self.world = world
        self.modules = [world.policy]
        self.relaxation = Relaxation(**relaxation)
        self.aligner = Aligner(
            read_language_model(world.policy),
            [Objective(reward)],
            task.ending,
            OtherModel(task.reference) if world.beta else None,
            world.beta,
        )

    def losses(self) -> Iterator[torch.Tensor]:
        for step in range(self.world.settings.steps):
            yield self.policy_loss(self.world.batch(step))

    def policy_loss(self, batch: Batch) -> torch.Tensor:
        result = self.aligner.loss(batch.prompts, batch.noise, self.relaxation)
        self.world.tokens += int(result.completion_mask.sum())
        return result.loss

    def prepare(self, steps: int) -> None:
        """There is nothing beside the policy."""
