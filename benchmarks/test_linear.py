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
    cases = [
        _case(op, step, dtype, option.rows, vocab, option.device) for op, step in TARGETS for dtype in option.dtypes
    ]
    for dtype in option.dtypes:
        for rows, size in _sweep(option, vocab, option.rows):
            cases.append(_case("linear_gumbel_ste", "forward+backward", dtype, rows, size, option.device))
    return cases


def _sweep(option: Any, vocab: int, rows: int) -> list[tuple[int, int]]:
    """Rows and vocabularies: every vocabulary at `rows`, and a few numbers of rows at `vocab`, without the pair itself."""
    several = sorted({option.rows // 4 or 1, option.rows, 4 * option.rows})
    return [(rows, v) for v in sorted(option.vocab) if v != vocab] + [(n, vocab) for n in several if n != rows]


def test_time(case, race, absent):
    contestants = linear.build(case)
    absent(case.op)
    targets = dict(TARGETS[case.op, case.pass_])
    if case.dtype == "bfloat16" and "eager" in targets:
        targets["eager"] = 8.0
    race(case, contestants, lambda: linear.check(case), targets, others=linear.checks(case, contestants))


def cases_vocabulary(option: Any) -> list[Case]:
    """Backward alone, at one entropy: its cost follows the support, not the vocabulary."""
    if option.quick:
        return []
    return [
        _case("linear_gumbel_ste", "backward", "float32", option.rows, vocab, option.device) for vocab in option.vocab
    ]


def test_vocabulary(case, race):
    contestants = linear.build(case)
    race(case, contestants, lambda: linear.check(case))


def cases_memory(option: Any) -> list[Case]:
    vocab = 151936 if 151936 in option.vocab else max(option.vocab)
    rows = 4 * option.rows
    sweep = [] if option.quick else _sweep(option, vocab, rows)
    return [
        _case("linear_gumbel_ste", "forward+backward", "float32", n, size, option.device)
        for n, size in [(rows, vocab), *sweep]
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
