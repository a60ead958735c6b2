"""A policy on held-out prompts: reward, distance from the start, diversity and fluency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.alignment.methods.base import Batch, complete, completion_logits, score
from benchmarks.alignment.tasks import Task
from grade_kernels import GumbelNoise
from grade_kernels.training import Prompts
from grade_kernels.training.model import evaluating

__all__ = ["Evaluation", "distinct", "evaluate"]

NOISE = 2**40  # seeds of evaluation, far from those of training


@dataclass(frozen=True)
class Evaluation:
    """One completion per prompt.

    Attributes:
        reward: mean reward.
        reward_std: its standard deviation over prompts.
        kl: KL to the start, nats per completion: exact in each token's distribution, summed over a completion.
        perplexity: of the completions under the start: low for bland or repeated text, high for what it never wrote.
        distinct_1: distinct words over all words.
        distinct_2: distinct pairs of words over all pairs.
        judged: share of completions that an independent judge finds to be what was asked for; None without a judge.
        tokens: mean length.
        completions: the texts.
    """

    reward: float
    reward_std: float
    kl: float
    perplexity: float
    distinct_1: float
    distinct_2: float
    judged: float | None
    tokens: float
    completions: list[str]


@torch.no_grad()
def evaluate(policy: nn.Module, task: Task, prompts: Prompts, *, seed: int = 0) -> Evaluation:
    """Sample one completion per prompt and measure. The same seed is the same noise, whatever the policy."""
    drawn = complete(policy, task, Batch(prompts, GumbelNoise(NOISE + seed)))
    rewards = score(task, prompts, drawn)
    with evaluating(policy):
        ours = completion_logits(policy, prompts, drawn).log_softmax(dim=-1)
    start = completion_logits(task.reference, prompts, drawn).log_softmax(dim=-1)
    kl = ((ours.exp() * (ours - start)).sum(dim=-1) * drawn.mask).sum(dim=1)
    surprise = -start.gather(-1, drawn.ids[..., None])[..., 0] * drawn.mask
    completions = [
        str(task.tokenizer.decode(row[keep.bool()], skip_special_tokens=True)).strip()
        for row, keep in zip(drawn.ids, drawn.mask, strict=True)
    ]
    return Evaluation(
        reward=rewards.mean().item(),
        reward_std=rewards.std().item(),
        kl=kl.mean().item(),
        perplexity=math.exp((surprise.sum() / drawn.mask.sum()).item()),
        distinct_1=distinct(completions, 1),
        distinct_2=distinct(completions, 2),
        judged=None if task.judge is None else sum(map(task.judge, completions)) / len(completions),
        tokens=drawn.mask.sum(dim=1).float().mean().item(),
        completions=completions,
    )


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all of them."""
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
