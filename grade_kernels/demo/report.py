"""What the demo found: measured on held-out test prompts, printed, drawn and saved."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel

from grade_kernels.demo.align import Record
from grade_kernels.demo.cache import replace_file, replace_text
from grade_kernels.demo.corpus import POSITIVE, tidy, verdict_of
from grade_kernels.demo.models import completion_loss
from grade_kernels.demo.speed import Speed
from grade_kernels.demo.tokenizer import with_start
from grade_kernels.training import GRADETrainer

__all__ = ["DemoResult", "Evaluation", "draw", "evaluate", "load_result", "print_report", "save_result"]


@dataclass(frozen=True)
class Evaluation:
    """A policy on one set of prompts, one completion per prompt.

    Attributes:
        reward: mean P(positive) of the reward model.
        positive: share of completions that are well formed and positive by the grammar, which is nobody's reward.
        well_formed: share of completions that the grammar accepts.
        kl: KL to the start policy, nats per completion.
        perplexity: of the completions, under the start policy.
        distinct_2: distinct bigrams of words over all of them.
        distinct: share of completions that no other equals.
        tokens: mean length.
        completions: the texts.
    """

    reward: float
    positive: float
    well_formed: float
    kl: float
    perplexity: float
    distinct_2: float
    distinct: float
    tokens: float
    completions: list[str]


def evaluate(trainer: GRADETrainer, start: GPT2LMHeadModel, prompts: Sequence[str]) -> Evaluation:
    """Sample one completion per prompt from the policy as it is and measure.

    Args:
        trainer: of the policy. Its evaluations all have the same noise, whatever the policy.
        start: the policy before alignment.
        prompts: beginnings of reviews.
    """
    tokenizer = trainer.processing_class
    rows: Any = [{"prompt": with_start(prompt)} for prompt in prompts]
    output = trainer.predict(rows)
    metrics = output.metrics or {}
    tokens = [_up_to_end(row.tolist(), tokenizer.eos_token_id) for row in output.predictions]  # type: ignore[union-attr]
    completions = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]
    verdicts = [verdict_of(completion) for completion in completions]
    words = [completion.split() for completion in completions]
    bigrams = [pair for text in words for pair in itertools.pairwise(text)]
    return Evaluation(
        reward=metrics["test_reward"],
        positive=verdicts.count(POSITIVE) / len(verdicts),
        well_formed=1 - verdicts.count(None) / len(verdicts),
        kl=metrics["test_kl"],
        perplexity=_perplexity(start, [tokenizer(row["prompt"])["input_ids"] for row in rows], tokens),
        distinct_2=len(set(bigrams)) / max(1, len(bigrams)),
        distinct=len(set(completions)) / len(completions),
        tokens=metrics["test_completions/mean_length"],
        completions=completions,
    )


def _up_to_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


@torch.no_grad()
def _perplexity(policy: GPT2LMHeadModel, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """Of the completions, per token."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return math.exp(completion_loss(policy, ids, mask, torch.tensor([len(prompt) for prompt in prompts])).item())


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo reports. `identity` and `steps` say which run it was."""

    identity: str
    steps: int
    policy_perplexity: float
    reward_accuracy: float
    prompts: list[str]
    before: Evaluation
    after: Evaluation
    records: list[Record]
    speeds: list[Speed]


def save_result(path: Path, result: DemoResult) -> None:
    """Write `results.json`."""
    replace_text(path, json.dumps(asdict(result), indent=2) + "\n")


def load_result(path: Path) -> DemoResult:
    """Read what `save_result` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        data["before"], data["after"] = Evaluation(**data["before"]), Evaluation(**data["after"])
        data["records"] = [Record(**record) for record in data["records"]]
        data["speeds"] = [Speed(**speed) for speed in data["speeds"]]
        return DemoResult(**data)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can not be read") from error


# --------------------------------------------------------------------------------------------------------- for people


def print_report(result: DemoResult, samples: int, console: Console) -> None:
    """The tables."""
    console.print(_evaluation_table(result))
    console.print(_sample_table(result, samples))
    if result.speeds:
        console.print(_speed_table(result.speeds))


def _evaluation_table(result: DemoResult) -> Table:
    table = Table(title=f"{len(result.before.completions)} held-out test prompts", title_justify="left")
    table.add_column("")
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    lines = (
        ("reward: P(positive)", "reward", "{:.3f}"),
        ("positive by the grammar's own reading", "positive", "{:.1%}"),
        ("well formed by the grammar's own reading", "well_formed", "{:.1%}"),
        ("KL to the start policy, nats per completion", "kl", "{:.2f}"),
        ("perplexity under the start policy", "perplexity", "{:.2f}"),
        ("diversity: distinct-2", "distinct_2", "{:.3f}"),
        ("diversity: completions that are distinct", "distinct", "{:.1%}"),
        ("tokens per completion", "tokens", "{:.1f}"),
    )
    for title, name, form in lines:
        # abs: a KL of minus nothing is nothing.
        table.add_row(title, *(form.format(abs(getattr(side, name))) for side in (result.before, result.after)))
    return table


def _sample_table(result: DemoResult, samples: int) -> Table:
    table = Table(title="The same prompts and the same noise", title_justify="left", show_lines=True)
    for title in ("prompt", "before", "after"):
        table.add_column(title, ratio=1)
    for row in list(zip(result.prompts, result.before.completions, result.after.completions, strict=True))[:samples]:
        table.add_row(*map(tidy, row))
    return table


def _speed_table(speeds: Sequence[Speed]) -> Table:
    title = "The sampling layer, head to embedding, forward and backward, against plain PyTorch"
    caption = (
        "plain: F.gumbel_softmax(hidden @ head.T, hard=True) @ table; memory: growth of the resident set at its peak"
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", show_lines=True)
    for column in ("rows, vocab, width", "", "median time", "memory"):
        table.add_column(column, justify="right")
    for speed in speeds:
        shape = f"{speed.rows}, {speed.vocab}, {speed.width}"
        if speed.plain_ms is None or speed.ours_ms is None or speed.plain_mb is None or speed.ours_mb is None:
            table.add_row(shape, "[red]wrong[/red]", "[red]differs from plain,[/red]", "[red]so no speed[/red]")
            continue
        table.add_row(
            shape,
            "plain\ngrade-kernels\n",
            f"{speed.plain_ms:.1f} ms\n{speed.ours_ms:.1f} ms\n[bold]{speed.plain_ms / speed.ours_ms:.1f}x",
            f"{speed.plain_mb:.1f} MiB\n{speed.ours_mb:.1f} MiB\n[bold]{speed.plain_mb / max(speed.ours_mb, 0.1):.1f}x",
        )
    return table


def draw(path: Path, result: DemoResult) -> None:
    """The reward and KL of every step of alignment, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [record.step for record in result.records]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    left.plot(steps, [record.reward for record in result.records], color="tab:green", label="reward, training batches")
    left.plot(
        [0, result.steps],
        [result.before.reward, result.after.reward],
        "o",
        color="black",
        label="reward, held-out test prompts",
    )
    left.set(xlabel="step", ylabel="reward: P(positive)", ylim=(0, 1), title="GRADE-STE alignment")
    right = left.twinx()
    right.plot(steps, [record.kl for record in result.records], color="tab:orange", alpha=0.7, label="KL")
    right.set(ylabel="KL to the start policy, nats per completion")
    right.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=144))
    plt.close(figure)
