"""Gradients at a fixed policy, drawn again and again at the same prompts.

Of an estimator with draws `g_1..g_D`, mean m and trace of the sample covariance T, `|m|^2 - T / D` estimates the
squared norm of the true mean without bias, and the relative variance is T over that. The KL's gradient is left out
(beta = 0): it is exact for some methods and sampled for others, and the question is the reward's.

REINFORCE with the leave-one-out baseline is unbiased, so its mean stands for the true gradient: an estimator's cosine
to it, again with unbiased norms, tells its bias in direction. A norm can drown in noise, so figures over several sets of
prompts are ratios of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.alignment.methods import Batch, Method, World
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.tasks import Task
from benchmarks.alignment.train import trainable
from grade_kernels import GumbelNoise

__all__ = ["Spread", "measure", "spread"]

FIRST_STEP = 10_000  # the prompts and sequences of steps that no run comes to


@dataclass(frozen=True)
class Spread:
    """Statistics of several gradients.

    Attributes:
        trace: of the covariance.
        norm2: squared norm of the true mean, estimated without bias, so it may be negative.
        mean: mean gradient, `[parameters]`.
    """

    trace: float
    norm2: float
    mean: torch.Tensor


def spread(gradients: list[torch.Tensor]) -> Spread:
    """Statistics of at least two gradients `[parameters]`."""
    draws = torch.stack(gradients).double()
    mean = draws.mean(dim=0)
    trace = float((draws - mean).square().sum()) / (len(draws) - 1)
    norm2 = float(mean.square().sum()) - trace / len(draws)
    return Spread(trace, norm2, mean.float())


def measure(
    task: Task, method: Method, settings: Settings, state: dict[str, torch.Tensor], *, prompts: int, stream: int
) -> Spread:
    """Statistics of a method's gradient at one policy and one set of prompts.

    Args:
        task: the task.
        method: whose gradient.
        settings: how large a batch is, and how many draws.
        state: the policy's trainable parameters; none for the start.
        prompts: which set of prompts.
        stream: which noise. Means of different streams are independent.
    """
    policy = task.start()
    own = trainable(policy)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    world = World(task, settings, policy, beta=0.0, seed=prompts)
    learner = method.make(world)
    learner.prepare(settings.value_steps)
    fixed = world.batch(FIRST_STEP).prompts
    gradients = []
    for draw in range(settings.variance_draws):
        first = (FIRST_STEP + stream * settings.variance_draws + draw) * settings.batch_size
        noise = GumbelNoise(prompts, first + torch.arange(settings.batch_size))
        loss = learner.policy_loss(Batch(fixed, noise))
        parts = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(own.values(), parts, strict=True))
        gradients.append(torch.cat([part.flatten() for part in zeros]))
    return spread(gradients)
