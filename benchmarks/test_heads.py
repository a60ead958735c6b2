"""Each way through an LM head at sizes of training language models, on an accelerator, or at sizes that `--heads` gives."""

from __future__ import annotations

from typing import Any

from benchmarks import linear
from benchmarks.harness import Case

# Rows, hidden size, vocabulary: long and short batches of 8-billion-parameter models, a step of sampling with a small one.
HEADS = ((8192, 4096, 151936), (4096, 4096, 128256), (256, 4096, 151936), (64, 1024, 151936))
STEPS = {
    "linear_logprobs": "forward+backward",
    "linear_gumbel_ste": "forward+backward",
    "linear_kl": "forward+backward",
    "linear_gumbel_sample": "forward",
}
WIDTH = 1024  # of the embedding table


def heads(option: Any) -> tuple[tuple[int, int, int], ...]:
    return option.heads or (HEADS if option.device != "cpu" else ())


def case(op: str, size: tuple[int, int, int], device: str) -> Case:
    """In bfloat16, as models are trained."""
    rows, hidden, vocab = size
    width = WIDTH if op == "linear_gumbel_ste" else None
    return Case(op, STEPS[op], "bfloat16", rows, vocab, H=hidden, D=width, device=device)


def cases_heads(option: Any) -> list[Case]:
    return [case(op, size, option.device) for op in STEPS for size in heads(option)]


def test_heads(case, race, absent):
    contestants = linear.build(case)
    absent(case.op)
    race(case, contestants, lambda: linear.check(case), others=linear.checks(case, contestants))
