"""Ours: the reward's gradient through the samples themselves, by `grade_kernels.training.grade_loss`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.alignment.methods.base import Batch, World
from grade_kernels.training import DifferentiableReward, grade_loss

__all__ = ["Grade", "LogProbability"]


class LogProbability:
    """The logarithm of a reward that is a probability: its gradient does not vanish where the probability is small."""

    def __init__(self, reward: DifferentiableReward) -> None:
        self._reward = reward
        self.embedding = reward.embedding

    def __call__(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **columns: Any) -> torch.Tensor:
        probability = self._reward(inputs_embeds, attention_mask, **columns)
        return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


@dataclass(frozen=True)
class GradeSettings:
    """How the gradient runs back; see `grade_loss`. With `log`, the logarithm of the reward is differentiated."""

    estimator: str = "ste"
    tau: float = 1.0
    feedback_hops: int = 4
    log: bool = False


class Grade:
    """One `grade_loss` a step. The KL is exact in each token's distribution and differentiated as well."""

    def __init__(self, world: World, **settings: Any) -> None:
        self.world = world
        self.settings = GradeSettings(**settings)
        self.modules = [world.policy]
        self.reward = LogProbability(world.task.reward) if self.settings.log else world.task.reward

    def losses(self) -> Iterator[torch.Tensor]:
        for step in range(self.world.settings.steps):
            yield self.policy_loss(self.world.batch(step))

    def policy_loss(self, batch: Batch) -> torch.Tensor:
        world, task, settings = self.world, self.world.task, self.settings
        result = grade_loss(
            world.policy, self.reward, batch.prompts.ids, batch.prompts.mask,
            max_new_tokens=task.max_new_tokens, noise=batch.noise,
            tau=settings.tau, estimator=settings.estimator, feedback_hops=settings.feedback_hops,
            ref_model=task.reference if world.beta else None, beta=world.beta, eos_token_id=task.end,
            pad_token_id=task.pad,
        )  # fmt: skip
        world.tokens += int(result.completion_mask.sum())
        return result.loss

    def prepare(self, steps: int) -> None:
        """There is nothing beside the policy."""
