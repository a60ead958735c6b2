"""What is logged of completions: numbers of each, their summary by TRL's names, and a table to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.table import Table

from grade_kernels.training.aligner import GradeLoss
from grade_kernels.training.callbacks import completions_table
from grade_kernels.training.prompt_tokens import Prompt, is_conversation, prompt_text
from grade_kernels.training.prompts import PromptBatch
from grade_kernels.training.records import Ending
from grade_kernels.training.rewards import Objective
from grade_kernels.training.text_rewards import TextRewards

if TYPE_CHECKING:
    from transformers import TrainerState

__all__ = ["Averages", "Evaluation", "Rows", "Shown", "completion_rows", "shown_table", "summary", "text_rows"]

Rows = dict[str, torch.Tensor]
"""One number of each completion, `[B]`, by name."""


class Averages:
    """Numbers by name, of which the mean is logged."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """One more number."""
        self._values[name].append(value)

    def means(self) -> dict[str, float]:
        """The mean of each."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}

    def clear(self) -> None:
        """Begin anew."""
        self._values.clear()


@dataclass
class Evaluation:
    """What an evaluation found so far.

    Attributes:
        rows: numbers of every completion, in parts `[batch]`, by name.
        averages: what functions of text logged by themselves.
    """

    rows: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    averages: Averages = field(default_factory=Averages)

    def metrics(self) -> dict[str, float]:
        """All metrics; those of the completions have the say where a function of text logged by the same name."""
        return self.averages.means() | summary({name: torch.cat(parts) for name, parts in self.rows.items()})


class Shown(NamedTuple):
    """Completions for the table: what they are, their numbers, and columns that functions of text added."""

    prompts: Sequence[Prompt]
    out: GradeLoss
    rows: Rows
    columns: dict[str, Sequence[object]]


def completion_rows(
    batch: PromptBatch, out: GradeLoss, ending: Ending, objectives: Sequence[Objective], *, with_kl: bool
) -> Rows:
    """What is known of each completion of this process without its text.

    Args:
        batch: the prompts.
        out: their completions.
        ending: how these end.
        objectives: the rewards, in the order of `out.values`.
        with_kl: whether there is a reference.
    """
    lengths = out.completion_mask.sum(dim=1)
    rows = {
        "reward": out.rewards,
        "entropy": -out.logprobs.sum(dim=1) / lengths,
        "completions/length": lengths,
        "completions/clipped_ratio": ~ending.ended(out.completion_ids, out.completion_mask),
        "tokens": lengths + batch["attention_mask"].sum(dim=1),
    }
    if with_kl:
        rows["kl"] = out.kl
    if out.mismatch is not None:
        rows |= out.mismatch.metrics(out.completion_mask)
    rows |= {f"rewards/{o.name}": value for o, value in zip(objectives, out.values, strict=True)}
    return {name: value.detach().float() for name, value in rows.items()}


def text_rows(
    rewards: TextRewards,
    batch: PromptBatch,
    out: GradeLoss,
    texts: Sequence[str],
    *,
    state: TrainerState,
    averages: Averages,
    columns: dict[str, Sequence[object]],
) -> Rows:
    """The numbers that functions of text give to each completion of this process.

    Args:
        rewards: the functions.
        batch: the prompts.
        out: their completions.
        texts: these as text.
        state: the trainer's, for functions that ask for it.
        averages: where functions log numbers of their own.
        columns: where functions put columns of their own for the table.
    """
    completions = [
        [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
        for prompt, text in zip(batch["prompts"], texts, strict=True)
    ]
    tokens = [row[mask.bool()].tolist() for row, mask in zip(out.completion_ids, out.completion_mask, strict=True)]
    helpers = {
        "trainer_state": state,
        "log_metric": lambda name, value: averages.add(name, float(value)),
        "log_extra": lambda column, values: columns.update({column: list(values)}),
    }
    scores = rewards(batch["prompts"], completions, tokens, batch["columns"], helpers)
    device = out.completion_ids.device
    return {f"rewards/{name}": torch.tensor(numbers).to(device).float() for name, numbers in scores.items()}


def summary(rows: Rows) -> dict[str, float]:
    """Metrics by TRL's names; `kl` is in nats per completion, `entropy` is estimated from the sampled tokens."""
    metrics = {}
    for name, value in rows.items():
        if name.startswith("rewards/"):
            metrics[f"{name}/mean"] = value.nanmean().item()
            known = value[~value.isnan()]
            metrics[f"{name}/std"] = known.std(correction=0).item() if len(known) else float("nan")
        elif name == "completions/length":
            metrics["completions/mean_length"] = value.mean().item()
            metrics["completions/min_length"] = value.min().item()
            metrics["completions/max_length"] = value.max().item()
        elif name.startswith("sampling/") and name.endswith(("/min", "/max")):
            metrics[name] = (value.min() if name.endswith("/min") else value.max()).item()
        elif name != "tokens":
            metrics[name] = value.mean().item()
    if "reward" in rows:
        metrics["reward_std"] = rows["reward"].std(correction=0).item()
    return metrics


def shown_table(shown: Shown, texts: Sequence[str], title: str, *, unique: bool, most: int | None) -> Table:
    """The completions of one batch as a table.

    Args:
        shown: the completions.
        texts: these as text.
        title: of the table.
        unique: only the first completion of each prompt.
        most: how many rows at most; None for all.
    """
    named = [prompt_text(prompt) for prompt in shown.prompts]
    kept = [i for i in range(len(named)) if not unique or named[i] not in named[:i]][:most]
    columns: dict[str, Sequence[object]] = {
        name: [value[i].item() for i in kept]
        for name, value in shown.rows.items()
        if name in ("reward", "kl") or "rewards/" in name
    }
    columns |= {name: [values[i] for i in kept] for name, values in shown.columns.items()}
    return completions_table([named[i] for i in kept], [texts[i] for i in kept], columns, title)
