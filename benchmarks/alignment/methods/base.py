"""What every method is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from benchmarks.alignment.settings import Settings
from benchmarks.alignment.tasks import Task
from grade_kernels import GumbelNoise
from grade_kernels.training import Prompts
from grade_kernels.training.model import read_language_model
from grade_kernels.training.rollout import Rollout, rollout

__all__ = [
    "Batch",
    "Learner",
    "Method",
    "World",
    "complete",
    "completion_logits",
    "completion_logprobs",
    "completion_states",
    "sample",
    "score",
]


class Batch(NamedTuple):
    """Prompts, each several times in a row, and the noise that completes them."""

    prompts: Prompts
    noise: GumbelNoise


@dataclass
class World:
    """A task, a policy and a supply of batches.

    Attributes:
        task: the task.
        settings: budgets.
        policy: what learns.
        beta: factor of the KL to the task's reference.
        seed: of prompts and noise.
        tokens: how many tokens were generated for learning so far.
    """

    task: Task
    settings: Settings
    policy: nn.Module
    beta: float
    seed: int
    tokens: int = 0

    def batch(self, step: int, steps: int = 1) -> Batch:
        """The prompts of one or several steps, the same for every method; the noise belongs to step and row."""
        settings = self.settings
        prompts = torch.arange(settings.prompts * steps) + step * settings.prompts
        rows = prompt_rows(len(self.task.train), prompts, self.seed).repeat_interleave(settings.completions)
        sequences = torch.arange(settings.batch_size * steps) + step * settings.batch_size
        return Batch(self.task.train.rows(rows), GumbelNoise(self.seed, sequences))


class Learner(Protocol):
    """A method at work on a world."""

    modules: list[nn.Module]
    """What is optimised, the policy first; gradients are clipped one by one."""

    def losses(self) -> Iterator[torch.Tensor]:
        """One loss for every optimiser step; the step is taken before the next is asked for."""

    def policy_loss(self, batch: Batch) -> torch.Tensor:
        """A loss whose gradient is the method's estimate for one batch that was drawn by the policy itself."""

    def prepare(self, steps: int) -> None:
        """Before the gradient is studied at a fixed policy: learn what belongs to it, and leave the policy alone."""


@dataclass(frozen=True)
class Method:
    """A name and what makes a learner.

    Attributes:
        name: on the command line and in files.
        title: in tables.
        make: the learner for a world.
    """

    name: str
    title: str
    make: Callable[[World], Learner]


def prompt_rows(count: int, sequences: torch.Tensor, seed: int) -> torch.Tensor:
    """Which of `count` prompts each sequence of a run gets: one shuffled pass over all of them after the other."""
    rows = torch.empty_like(sequences)
    for epoch in (sequences // count).unique().tolist():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen = sequences // count == epoch
        rows[chosen] = order[sequences[chosen] % count]
    return rows


def complete(policy: nn.Module, task: Task, batch: Batch) -> Rollout:
    """A policy's completions of a batch."""
    return rollout(read_language_model(policy), batch.prompts, task.ending, batch.noise)


def sample(world: World, batch: Batch) -> Rollout:
    """Completions of a batch, from the policy's own distribution."""
    drawn = complete(world.policy, world.task, batch)
    world.tokens += int(drawn.mask.sum())
    return drawn


@torch.no_grad()
def score(task: Task, prompts: Prompts, drawn: Rollout) -> torch.Tensor:
    """The reward of sampled tokens, `[B]`."""
    table = getattr(task.reward.embedding, "weight", task.reward.embedding)
    mask = torch.cat([prompts.mask, drawn.mask], dim=1)
    return task.reward(table[torch.cat([prompts.ids, drawn.ids], dim=1)], mask)


def completion_states(model: Any, prompts: Prompts, drawn: Rollout, **options: Any) -> Any:
    """One pass of a model over prompts and completions, positions counting real tokens."""
    ids, mask = torch.cat([prompts.ids, drawn.ids], dim=1), torch.cat([prompts.mask, drawn.mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **options)


def completion_logits(model: nn.Module, prompts: Prompts, drawn: Rollout) -> torch.Tensor:
    """The logits each token of the completions was or would be drawn from, `[B, T, V]`."""
    time = drawn.ids.shape[1]
    return completion_states(model, prompts, drawn).logits[:, -time - 1 : -1].float()


def completion_logprobs(model: nn.Module, prompts: Prompts, drawn: Rollout) -> torch.Tensor:
    """Log-probability of each token, `[B, T]`; 0 behind the end."""
    logprobs = completion_logits(model, prompts, drawn).log_softmax(dim=-1)
    return torch.where(drawn.mask.bool(), logprobs.gather(-1, drawn.ids[..., None])[..., 0], 0.0)
