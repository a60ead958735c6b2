"""Operations over given logits against PyTorch: time, and the peak memory of forward and backward."""

from __future__ import annotations

from typing import Any

from benchmarks import rows
from benchmarks.harness import OURS, Case

WIDTH = 1024  # of the embedding table
STEPS = {
    "gumbel_sample": ("forward",),
    "gumbel_ste": ("forward", "forward+backward"),
    "gumbel_softmax": ("forward+backward",),
    "gumbel_ste_embedding": ("forward+backward",),
}
# The least that is asked for from V = 32,000 up: how many times as long as ours a contestant takes.
TARGETS = {
    ("gumbel_sample", "forward"): {"eager": 30.0, "compiled": 8.0},
    ("gumbel_ste", "forward"): {"eager": 16.0},
    ("gumbel_ste", "forward+backward"): {"eager": 10.0},
}


def _case(op: str, step: str, dtype: str, vocab: int, option: Any) -> Case:
    width = WIDTH if op == "gumbel_ste_embedding" else None
    return Case(op, step, dtype, option.rows, vocab, D=width, device=option.device)


def cases_time(option: Any) -> list[Case]:
    return [
        _case(op, step, dtype, vocab, option)
        for op, steps in STEPS.items()
        for step in steps
        if not option.quick or (op, step) in TARGETS
        for dtype in option.dtypes
        for vocab in option.vocab
    ]


def test_time(case, race):
    contestants = rows.build(case)
    targets = TARGETS.get((case.op, case.pass_), {}) if case.V >= 32000 else {}
    race(case, contestants, lambda: rows.check(case, contestants[OURS]), targets)


def cases_memory(option: Any) -> list[Case]:
    """Every vocabulary for the operation with a target, the usual one for the others."""
    largest = 151936 if 151936 in option.vocab else max(option.vocab)
    sweep = [_case("gumbel_ste", "forward+backward", option.dtypes[0], vocab, option) for vocab in option.vocab]
    narrow = [_case("gumbel_ste", "forward+backward", dtype, largest, option) for dtype in option.dtypes[1:]]
    others = [
        _case(op, steps[-1], option.dtypes[0], largest, option) for op, steps in STEPS.items() if op != "gumbel_ste"
    ]
    return sweep if option.quick else sweep + narrow + others


def test_memory(case, peaks):
    output = case.N * (8 if case.op == "gumbel_sample" else (case.D or case.V) * case.torch_dtype.itemsize)
    gradient = 0 if case.pass_ == "forward" else case.N * case.V * case.torch_dtype.itemsize
    # Page tables and allocator blocks: what a call without any output of size would show.
    floor = 2**20
    peaks(case, rows.build, (OURS, "eager", "compiled"), lambda _: 1.05 * (output + gradient) + floor)
