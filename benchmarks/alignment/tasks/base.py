"""What the experiment needs of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grade_kernels.training import DifferentiableReward

__all__ = ["Prompts", "Task"]


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left, `[N, P]`."""

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad: int) -> Prompts:
        """Tokens of several lengths, padded."""
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
        return cls(ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]))

    def rows(self, rows: slice | torch.Tensor) -> Prompts:
        """Some of the prompts, without padding that none of them needs."""
        ids, mask = self.ids[rows], self.mask[rows]
        start = ids.shape[1] - int(mask.sum(dim=1).max())
        return Prompts(ids[:, start:], mask[:, start:])

    def __len__(self) -> int:
        return len(self.ids)


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
    def end(self) -> int | None:
        """The token that ends a completion; None where nothing does."""
        return int(self.tokenizer.eos_token_id) if self.ends else None

    @property
    def pad(self) -> int:
        """What stands behind an end."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)
