"""PPO with a value model: clipped ratio, generalised advantages, whitened; as TRL's trainer computes them.

Completions of four steps are drawn at once and used in four epochs, one optimiser step each. So the number of tokens,
of scored completions and of optimiser steps is every other method's, and a step sees four times as many completions,
which are up to three steps old. (TRL's own default is four epochs of one minibatch, too.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.alignment.methods.base import (
    Batch,
    World,
    completion_logprobs,
    completion_states,
    sample,
    score,
)
from grade_kernels.training.model import last_hidden_state
from grade_kernels.training.rollout import Rollout

__all__ = ["PPO", "generalised_advantages", "masked_mean", "whiten"]

EPOCHS = 4
CLIP, VALUE_CLIP, VALUE_WEIGHT = 0.2, 0.2, 0.1  # TRL's defaults, as are the two below
GAMMA, LAMBDA = 1.0, 0.95


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens of all completions."""
    return (values * mask).sum() / mask.sum()


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over all tokens; 0 behind an end."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


def generalised_advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Discounted sums of the temporal differences, `[B, T]`; behind an end rewards and values must be 0."""
    advantages = torch.zeros_like(rewards)
    following = later = torch.zeros_like(rewards[:, 0])
    for time in reversed(range(rewards.shape[1])):
        later = rewards[:, time] + GAMMA * following - values[:, time] + GAMMA * LAMBDA * later
        advantages[:, time], following = later, values[:, time]
    return advantages


class ValueModel(nn.Module):
    """Expected return at each token of a completion, from a copy of the start's backbone; 0 everywhere at first."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, drawn: Rollout) -> torch.Tensor:
        """What is expected before each token is drawn, `[B, T]`; 0 behind an end."""
        hidden = last_hidden_state(completion_states(self.backbone, batch.prompts, drawn))
        values = self.head(hidden[:, -drawn.ids.shape[1] - 1 : -1])[..., 0]
        return values * drawn.mask


@dataclass(frozen=True)
class Experience:
    """Completions, and what was known when they were drawn; everything `[B, T]` and without graph."""

    batch: Batch
    drawn: Rollout
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return self.drawn.mask


class PPO:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.world = world
        width = world.task.reference.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        self.value_model = ValueModel(world.task.value_backbone(), width).to(next(world.policy.parameters()).device)
        self.modules = [world.policy, self.value_model]

    def losses(self) -> Iterator[torch.Tensor]:
        for step in range(0, self.world.settings.steps, EPOCHS):
            count = min(EPOCHS, self.world.settings.steps - step)
            experience = self.collect(self.world.batch(step, count))
            for _ in range(count):
                yield self.clipped_loss(experience) + VALUE_WEIGHT * self.value_loss(experience)

    @torch.no_grad()
    def collect(self, batch: Batch) -> Experience:
        """Draw and score completions, and distribute what they earned."""
        world = self.world
        drawn = sample(world, batch)
        logprobs = completion_logprobs(world.policy, batch.prompts, drawn)
        rewards = torch.zeros_like(logprobs)
        if world.beta:
            rewards -= world.beta * (logprobs - completion_logprobs(world.task.reference, batch.prompts, drawn))
        last = drawn.mask.sum(dim=1) - 1
        rewards[torch.arange(len(last)), last] += score(world.task, batch.prompts, drawn).to(rewards.dtype)
        values = self.value_model(batch, drawn)
        advantages = generalised_advantages(rewards, values) * drawn.mask
        return Experience(batch, drawn, logprobs, values, whiten(advantages, drawn.mask), advantages + values)

    def clipped_loss(self, experience: Experience) -> torch.Tensor:
        """The policy's: the worse of ratio and clipped ratio, times the advantage."""
        logprobs = completion_logprobs(self.world.policy, experience.batch.prompts, experience.drawn)
        ratio = (logprobs - experience.logprobs).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses = torch.maximum(-experience.advantages * ratio, -experience.advantages * clipped)
        return masked_mean(losses, experience.mask)

    def value_loss(self, experience: Experience) -> torch.Tensor:
        """The value model's: squared error, the worse of value and clipped value."""
        values = self.value_model(experience.batch, experience.drawn)
        clipped = experience.values + (values - experience.values).clamp(-VALUE_CLIP, VALUE_CLIP)
        errors = torch.maximum((values - experience.returns) ** 2, (clipped - experience.returns) ** 2)
        return 0.5 * masked_mean(errors, experience.mask)

    def policy_loss(self, batch: Batch) -> torch.Tensor:
        return self.clipped_loss(self.collect(batch))

    def prepare(self, steps: int) -> None:
        """Fit the value model to the policy as it is, so that the baseline is a fair one."""
        optimizer = torch.optim.Adam(self.value_model.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            self.value_loss(self.collect(self.world.batch(step))).backward()
            optimizer.step()
