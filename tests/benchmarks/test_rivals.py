"""Other libraries in the races: found where they are installed, checked before they are timed, never a failure of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import grade_kernels as gk
from benchmarks import linear, rivals
from benchmarks.harness import OURS, Case, Results, why_not
from benchmarks.rivals import ACCELERATORS, HeadInputs, Rival, Work
from tests.support.needs import needs_backend

LOGPROBS = Case("linear_logprobs", "forward+backward", "float32", 7, 101, H=16)
STE = Case("linear_gumbel_ste", "forward+backward", "float32", 7, 101, H=16, D=8)
KL = Case("linear_kl", "forward+backward", "float32", 7, 101, H=16)


def logprobs(x: HeadInputs) -> torch.Tensor:
    return (x.hidden @ x.head.T).log_softmax(-1).gather(-1, x.ids[:, None])[:, 0]


def kl(x: HeadInputs) -> torch.Tensor:
    logp, ref = ((hidden @ head.T).log_softmax(-1) for hidden, head in ((x.hidden, x.head), (x.ref_hidden, x.ref_head)))
    return (logp.exp() * (logp - ref)).sum(-1)


def rival(
    work: Work | Exception, package: str = "torch", needs: str | None = None, op: str = "linear_logprobs"
) -> Rival:
    def load(device: str) -> Work:
        if isinstance(work, Exception):
            raise work
        return work

    return Rival("them", package, op, load, needs)


def verdict(monkeypatch: pytest.MonkeyPatch, work: Work, case: Case = LOGPROBS) -> str | None:
    """Why a rival has no part in the race, or None."""
    monkeypatch.setattr(rivals, "RIVALS", (rival(work, op=case.op),))
    contestants = linear.build(case)
    return why_not("them", contestants["them"], linear.checks(case, contestants)["them"], "cpu")


@pytest.mark.parametrize("found", [(logprobs, LOGPROBS), (lambda x: logprobs(x).sum(), LOGPROBS), (kl, KL)])
def test_a_right_result_takes_part(found: tuple[Work, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(monkeypatch, *found) is None


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda y: y * 1.01, "output"),
        (lambda y: y.detach() + 1.01 * (y - y.detach()), "gradient"),
        (lambda y: y.sum() * 1.01, "output"),
        (lambda y: (y.detach() + 1.01 * (y - y.detach())).sum(), "gradient"),
        (lambda y: torch.where(torch.arange(len(y)) == len(y) - 1, torch.nan, y), "output"),
    ],
)
def test_a_wrong_result_gets_no_number(
    spoil: Callable[[torch.Tensor], torch.Tensor], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of values per row and of their sum, and where one row alone is wrong."""
    reason = verdict(monkeypatch, lambda x: spoil(logprobs(x)))
    assert reason is not None
    assert f"relative error of the {what} is" in reason


def test_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: HeadInputs) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    def fills(x: HeadInputs) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert verdict(monkeypatch, fails) == "RuntimeError: no kernel for this"
    assert verdict(monkeypatch, fills) == "out of memory"


def test_a_device_that_a_fault_has_broken_ends_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later figure would be lost as well, so the process has to end."""

    def faults(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("benchmarks.harness.synchronize", faults)
    with pytest.raises(RuntimeError, match="them left the device unusable: RuntimeError: CUDA error"):
        why_not("them", lambda: None, None, "cuda")


def test_why_one_is_absent() -> None:
    """In one line each: not installed, no code for the device, or whatever it raises when it is imported."""
    lacks = rival(AttributeError("module 'trl' has no kernels"))
    assert rival(logprobs, package="no-package-of-this-name").found("cpu") == "not installed"
    assert rival(logprobs, needs=ACCELERATORS).found("cpu") == f"{torch.__version__} needs an accelerator"
    assert rival(logprobs, needs=ACCELERATORS).found("cuda") is logprobs
    expected = f"{torch.__version__} can not be used: AttributeError: module 'trl' has no kernels"
    assert lacks.found("cpu") == expected


def test_they_are_found_by_operation() -> None:
    for op in {rival.op for rival in rivals.RIVALS}:
        present, absent = rivals.of(op, "cpu")
        assert present.keys().isdisjoint(absent)
        assert present.keys() | absent.keys() == {rival.name for rival in rivals.RIVALS if rival.op == op}
    assert rivals.library(OURS) is None
    assert rivals.library("linear_cross_entropy") == f"torch {torch.__version__}"


def test_the_report_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(absent={"quack (linear_logprobs)": "quack-kernels not installed"})
    results.left_out[LOGPROBS, "liger"] = "out of memory"
    lines = results.tables()
    assert "  quack (linear_logprobs): quack-kernels not installed" in lines
    assert f"  {LOGPROBS}, liger: out of memory" in lines


@pytest.mark.parametrize("case", [LOGPROBS, KL, STE], ids=lambda case: case.op)
@needs_backend("triton")
def test_both_ways_through_a_head_are_checked_and_raced(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter; what a call takes by itself comes first, and a way that is wrong gets no number."""
    with gk.use_backend("triton"):
        assert list(linear.ways("cpu")) == [OURS, f"{OURS} tiles", f"{OURS} chunks"]
        contestants = linear.build(case)
        assert list(contestants)[:3] == list(linear.ways("cpu"))
        linear.check(case)
        checks = linear.checks(case, contestants)
        name = f"{OURS} chunks"
        assert why_not(name, contestants[name], checks[name], "cpu") is None
        right = linear._ours

        def wrong(op: str, x: linear.Inputs, library: Any = gk, **options: Any) -> torch.Tensor:
            return (1.01 if library is gk else 1.0) * right(op, x, library, **options)

        monkeypatch.setattr(linear, "_ours", wrong)
        reason = why_not(name, contestants[name], checks[name], "cpu")
        assert reason is not None
        assert "relative error of the output" in reason


@pytest.mark.parametrize("found", rivals.RIVALS, ids=lambda rival: f"{rival.name}-{rival.op}")
def test_those_that_are_installed_are_right(found: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    work = found.found("cpu")
    if isinstance(work, str):
        pytest.skip(f"{found.package} {work}")
    assert verdict(monkeypatch, work, KL if found.op == KL.op else LOGPROBS) is None
