"""torch.export, and packages of AOTInductor: every operation without a graph, its noise drawn where it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import grade_kernels as gk
from tests.support.helpers import randn
from tests.support.needs import needs

Tensor = torch.Tensor


def _has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


class Everything(torch.nn.Module):
    """All operations whose noise is None, in one program: a package takes most of a minute to compile."""

    def forward(self, logits: Tensor, hidden: Tensor, head: Tensor, table: Tensor, ids: Tensor) -> dict[str, Tensor]:
        random = {
            "gumbel_sample": gk.gumbel_sample(logits),
            "gumbel_sample dim": gk.gumbel_sample(logits, 0),
            "gumbel_softmax": gk.gumbel_softmax(logits, 0.5),
            "gumbel_softmax dim": gk.gumbel_softmax(logits, 0.5, dim=0),
            "gumbel_ste": gk.gumbel_ste(logits),
            "gumbel_ste_embedding": gk.gumbel_ste_embedding(logits, table).embedding,
            "linear_gumbel_sample": gk.linear_gumbel_sample(hidden, head)[0],
            "linear_gumbel_ste": gk.linear_gumbel_ste(hidden, head, table).embedding,
        }
        fixed = {
            "linear_logprobs": gk.linear_logprobs(hidden, head, ids, ignore_index=-100),
            "linear_kl": gk.linear_kl(hidden, head, hidden + 1, head),
            "linear_entropy": gk.linear_entropy(hidden, head),
        }
        return random | fixed


def arguments() -> tuple[Tensor, ...]:
    ids = torch.tensor([1, -100, 3, 4])
    return randn(4, 50), randn(4, 8), randn(50, 8, seed=1), randn(50, 3, seed=2), ids


def check(run: Callable[..., dict[str, Tensor]]) -> None:
    """Statistics are those of eager mode; samples are samples, fresh at each call."""
    given = arguments()
    table = given[3]
    first, second = run(*given), run(*given)
    expected: dict[str, Any] = Everything()(*given)
    assert first.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = first[name]
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        if name.startswith("linear_") and "gumbel" not in name:
            torch.testing.assert_close(ours, theirs)
        else:
            assert not torch.equal(ours, second[name])
    assert ((first["gumbel_sample"] >= 0) & (first["gumbel_sample"] < 50)).all()
    torch.testing.assert_close(first["gumbel_softmax dim"].sum(0), torch.ones(50))
    assert torch.equal(first["gumbel_ste"].sum(-1), torch.ones(4))
    for name in ("gumbel_ste_embedding", "linear_gumbel_ste"):
        assert ((first[name][:, None] == table).all(-1).sum(1) == 1).all()


@pytest.mark.uncollect_if(
    lambda backend, device: device != "cpu" or backend == "triton", "the host's kernels decide here"
)
@pytest.mark.takes_long("the program has the backend's name alone", lambda backend: backend in ("reference", "torch"))
def test_exported(backend: str, device: str) -> None:
    program = torch.export.export(Everything(), arguments())
    check(program.module())


def test_no_call_takes_a_generator() -> None:
    """AOTInductor has no way to hand one over, not even None."""
    program = torch.export.export(Everything(), arguments())
    draws = [str(node.target) for node in program.graph.nodes if "randint" in str(node.target)]
    assert draws
    assert not [name for name in draws if "generator" in name]


@pytest.mark.takes_long("a C++ compiler builds the package; test_exported exports the same calls")
@needs("a C++ compiler", _has_compiler())
def test_packaged(tmp_path: Path) -> None:
    program = torch.export.export(Everything(), arguments())
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "everything.pt2"))
    check(torch._inductor.aoti_load_package(path))
