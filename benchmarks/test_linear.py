"""Operations through an LM head against the bare product and against PyTorch: time, and peak memory."""

from __future__ import annotations

from typing import Any

from benchmarks import linear
from benchmarks.harness import OURS, Case

HIDDEN = 1024
# At least this many times as long as ours: 1 / 1.25 of a bare product, and so on.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("linear_gumbel_ste", "forward+backward"): {
        "gemm": 1 / 1.25,
        "gemm chunks": 1 / 1.25,
        "gemm flipped chunks": 1 / 1.25,
        "eager": 7.0,
        "compiled": 5.0,
    },
    ("linear_gumbel_ste eps=0", "forward+backward"): {"gemm": 1 / 4.5, "gemm chunks": 1 / 4.5},
    ("linear_gumbel_ste soft", "forward"): {"gemm": 1 / 2.6, "gemm chunks": 1 / 2.6},
    ("linear_gumbel_sample", "forward"): {},
    ("linear_logprobs", "forward+backward"): {"gemm": 1 / 1.5, "gemm chunks": 1 / 1.5},
    ("linear_kl", "forward+backward"): {"gemm": 1 / 1.5, "gemm chunks": 1 / 1.5},
}


def _case(op: str, step: str, dtype: str, rows: int, vocab: int, device: str) -> Case:
    width = HIDDEN if "ste" in op else None
    return Case(op, step, dtype, rows, vocab, H=HIDDEN, D=width, device=device)


def cases_time(option: Any) -> list[Case]:
    vocab = 151936 if 151936 in option.vocab else max(option.vocab)
    if option.quick:
        return [
            _case("linear_gumbel_ste", "forward+backward", d, option.rows, vocab, option.device) for d in option.dtypes
        ]
    return [
        _case(op, step, dtype, rows, vocab, option.device)
        for op, step in TARGETS
        for dtype in option.dtypes
        for rows in (option.rows, 4 * option.rows)
        if rows == option.rows or op == "linear_gumbel_ste"
    ]


def test_time(case, race):
    contestants = linear.build(case)
    targets = dict(TARGETS[case.op, case.step])
    if case.dtype == "bfloat16" and "eager" in targets:
        targets["eager"] = 8.0
    race(case, contestants, lambda: linear.check(case, contestants[OURS]), targets)


def cases_vocabulary(option: Any) -> list[Case]:
    """Backward alone: its cost follows the support, not the vocabulary."""
    if option.quick:
        return []
    return [
        _case("linear_gumbel_ste", "backward", "float32", option.rows, vocab, option.device) for vocab in option.vocab
    ]


def test_vocabulary(case, race):
    contestants = linear.build(case)
    race(case, contestants, lambda: linear.check(case, contestants[OURS]))


def cases_memory(option: Any) -> list[Case]:
    vocab = 151936 if 151936 in option.vocab else max(option.vocab)
    sweep = [vocab] if option.quick else sorted({vocab, *option.vocab})
    return [
        _case("linear_gumbel_ste", "forward+backward", "float32", 4 * option.rows, size, option.device)
        for size in sweep
    ]


def test_memory(case, peaks):
    assert case.D is not None
    outputs = case.N * (case.D + 2 * HIDDEN) * case.torch_dtype.itemsize
    peaks(
        case,
        linear.build,
        (OURS, "eager", "compiled"),
        lambda seen: min(0.05 * seen.get("eager", float("inf")), 2**26) + outputs,
    )
