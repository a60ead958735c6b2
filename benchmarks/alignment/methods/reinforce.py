"""REINFORCE: with the leave-one-out baseline (RLOO with one iteration), and plain, as the paper compares with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.alignment.methods.base import Batch, World, completion_logprobs, sample, score

__all__ = ["Reinforce", "leave_one_out"]


def leave_one_out(returns: torch.Tensor, group: int) -> torch.Tensor:
    """Each return less the mean of the others of its prompt, `[B]`; `group` rows in a row share a prompt."""
    groups = returns.view(-1, group)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group - 1)
    return (groups - others).flatten()


class Reinforce:
    """`-mean(advantage * log p(completion))`; the return is the reward less beta times the sampled log-ratio."""

    def __init__(self, world: World, *, baseline: bool) -> None:
        self.world, self.baseline = world, baseline
        self.modules = [world.policy]

    def losses(self) -> Iterator[torch.Tensor]:
        for step in range(self.world.settings.steps):
            yield self.policy_loss(self.world.batch(step))

    def policy_loss(self, batch: Batch) -> torch.Tensor:
        world = self.world
        drawn = sample(world, batch)
        logprobs = completion_logprobs(world.policy, batch.prompts, drawn).sum(dim=1)
        returns = score(world.task, batch.prompts, drawn)
        if world.beta:
            with torch.no_grad():
                reference = completion_logprobs(world.task.reference, batch.prompts, drawn).sum(dim=1)
            returns = returns - world.beta * (logprobs.detach() - reference)
        advantages = leave_one_out(returns, world.settings.completions) if self.baseline else returns
        return -(advantages * logprobs).mean()

    def prepare(self, steps: int) -> None:
        """There is nothing beside the policy."""
