"""What the experiment needs of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from grade_kernels.training import DifferentiableReward, Ending, Prompts

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A policy to align.

    Attributes:
        name: what files are called.
        identity: a hash of everything the task was made from.
        start: makes the policy as it is before alignment, in eval mode, its trainable parameters requiring gradient.
        value_backbone: makes what PPO's value model reads prompts and completions with.
        reference: the start, frozen.
        reward: probability of the wanted label, a differentiable function of embeddings.
        tokenizer: the policy's and the reward's.
        train: prompts of the alignment.
        validation: prompts that choose learning rates.
        test: prompts for the report alone.
        max_new_tokens: completions are cut off there.
        notes: how good the models are, for the report.
        ends: whether a completion may end before; otherwise all are equally long.
        judge: whether a completion really has the wanted label, where somebody other than the reward can tell.
    """

    name: str
    identity: str
    start: Callable[[], nn.Module]
    value_backbone: Callable[[], nn.Module]
    reference: nn.Module
    reward: DifferentiableReward
    tokenizer: Any
    train: Prompts
    validation: Prompts
    test: Prompts
    max_new_tokens: int
    notes: dict[str, float | int | str]
    ends: bool = True
    judge: Callable[[str], bool] | None = None

    @property
    def ending(self) -> Ending:
        """How completions end; an end of sequence doubles as padding where the tokenizer has none."""
        end, pad = int(self.tokenizer.eos_token_id), self.tokenizer.pad_token_id
        return Ending((end,) if self.ends else (), end if pad is None else int(pad), self.max_new_tokens)
