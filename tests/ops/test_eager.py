"""Calls that nothing looks at skip torch's dispatcher; all others must not, and both give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import grade_kernels as gk
from grade_kernels.ops.eager import undisturbed
from tests.support.helpers import grads, leaf, randn

NOISE = gk.GumbelNoise(3)


def _softmax(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (gk.gumbel_softmax(logits, tau, noise=NOISE) @ table,)


def _hard(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (gk.gumbel_ste(logits, tau, noise=NOISE) @ table,)


def _embedding(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = gk.gumbel_ste_embedding(logits, (table, table), tau, estimator="st", noise=NOISE)
    return *found.embedding, found.ids, found.logprobs


def _head(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = gk.linear_gumbel_ste(logits, table.T.repeat(5, 1)[:9], table, tau, noise=NOISE, eps=0.1)
    return found.embedding, found.ids, found.logprobs


def _kl(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    head = table.T.repeat(5, 1)[:9]
    return (gk.linear_kl(logits, head, logits.detach() / 2, head.detach(), noise=NOISE, eps=0.1) * tau,)


def _given(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ids = torch.arange(len(logits)) % 2
    found = gk.gumbel_ste_embedding(logits, table, tau, noise=NOISE.given(ids, torch.full(ids.shape, -0.5)))
    return found.embedding, found.ids, found.logprobs


CALLS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "gumbel_softmax": _softmax,
    "gumbel_ste": _hard,
    "gumbel_ste_embedding": _embedding,
    "gumbel_ste_embedding given": _given,
    "linear_gumbel_ste": _head,
    "linear_kl": _kl,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


class Seen(TorchDispatchMode):
    """The operations of the package that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "grade_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def _results(call: Callable[..., tuple[torch.Tensor, ...]], device: str) -> list[torch.Tensor | None]:
    logits, table, tau = (leaf(randn(*s, device=device, seed=k)) for k, s in enumerate(((4, 9), (9, 2), (4, 1))))
    tau = leaf(tau.detach().exp())
    found = call(logits, table, tau)
    loss = sum((x.square().sum() for x in found if x.is_floating_point()), torch.zeros((), device=device))
    return [*(x.detach() for x in found), *grads(loss, logits, table, tau)]


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference is no operation")
@every_call
def test_both_ways_give_the_same(backend: str, device: str, call: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    direct = _results(call, device)
    with Seen() as seen:
        dispatched = _results(call, device)
    assert any(name.endswith("_backward") for name in seen.names)
    assert any(not name.endswith("_backward") for name in seen.names)
    for a, b in zip(direct, dispatched, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@every_call
def test_a_plain_call_skips_the_dispatcher(call: Callable[..., tuple[torch.Tensor, ...]], monkeypatch: Any) -> None:
    """In forward and backward. The profiler, which would see an operation that is dispatched, is disregarded for once."""
    monkeypatch.setattr(torch._C._autograd, "_profiler_enabled", lambda: False)
    with gk.use_backend("torch"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _results(call, "cpu")
    names = {event.name for event in profile.events()}
    assert "aten::mul" in names
    assert not any(name.startswith("grade_kernels::") for name in names), names


@contextmanager
def _below_autograd() -> Iterator[None]:
    with torch._C._AutoDispatchBelowAutograd():
        yield


DISTURBANCES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": Seen,
    "a function mode": TorchFunctionMode,
    "a default device": lambda: torch.device("cpu"),
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward-mode": torch.autograd.forward_ad.dual_level,
    "no autograd": _below_autograd,
}


@pytest.mark.parametrize("disturbance", DISTURBANCES.values(), ids=list(DISTURBANCES))
def test_what_looks_at_calls_is_noticed(disturbance: Callable[[], AbstractContextManager[Any]]) -> None:
    assert undisturbed()
    with disturbance():
        assert not undisturbed()
    assert undisturbed()


def test_transforms_and_tracers_are_noticed() -> None:
    found = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(undisturbed())
        return x.sin()

    x = torch.ones(2)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    torch.func.functionalize(look)(x)
    torch.fx.experimental.proxy_tensor.make_fx(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert found == [False] * len(found)
    assert len(found) >= 5
    for plain in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with plain():
            assert undisturbed()


def test_subclasses_are_dispatched() -> None:
    """They get to see the operation as one, not what its kernel does."""
    names = []

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    y = gk.gumbel_softmax(randn(2, 5).as_subclass(Sub), noise=NOISE)
    assert isinstance(y, Sub)
    assert any("grade_kernels.gumbel_softmax" in name for name in names)


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference is no operation")
def test_tensors_that_are_not_what_their_memory_says(backend: str, device: str) -> None:
    """A negated view, as complex numbers leave behind, and zeros without memory: as logits, and as a gradient."""
    z = torch.complex(randn(4, 9, device=device, seed=0), randn(4, 9, device=device, seed=1))
    negated = z.conj().imag
    assert negated.is_neg()
    zeros = torch._efficientzerotensor((4, 9), device=device)
    logits = leaf(randn(4, 9, device=device, seed=2))
    y = gk.gumbel_softmax(logits, 0.7, noise=NOISE)
    for odd, plain in ((negated, negated.resolve_neg()), (zeros, torch.zeros(4, 9, device=device))):
        assert torch.equal(gk.gumbel_softmax(odd, 0.7, noise=NOISE), gk.gumbel_softmax(plain, 0.7, noise=NOISE))
        assert torch.equal(gk.gumbel_sample(odd, noise=NOISE)[0], gk.gumbel_sample(plain, noise=NOISE)[0])
        (expected,) = torch.autograd.grad(y, logits, plain, retain_graph=True)
        assert torch.equal(torch.autograd.grad(y, logits, odd, retain_graph=True)[0], expected)


def test_no_gradient_arrives() -> None:
    """None from above is None below, as in PyTorch, and no tensor of zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> None:  # type: ignore[override]
            return None

    logits = leaf(randn(2, 5))
    Stop.apply(gk.gumbel_softmax(logits, noise=NOISE)).sum().backward()
    assert logits.grad is None


def test_no_graph_where_autograd_is_left_out() -> None:
    with torch._C._AutoDispatchBelowAutograd():
        assert not gk.gumbel_softmax(leaf(randn(2, 5)), noise=NOISE).requires_grad


def test_a_tensor_that_was_saved_and_changed_is_noticed() -> None:
    logits = leaf(randn(2, 5))
    given = logits * 1
    y = gk.gumbel_softmax(given, noise=NOISE)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("softcap", [3, np.float32(3.0), np.int64(3)], ids=["int", "float32", "int64"])
def test_numbers_of_other_types_are_converted(softcap: Any) -> None:
    """A kernel would otherwise get the number as it is, which Triton refuses and C++ may read as another type."""
    hidden, lm_head = randn(3, 4, seed=1), randn(7, 4, seed=2)

    def run(number: Any) -> torch.Tensor:
        return gk.linear_logprobs(hidden, lm_head, torch.tensor([1, 2, 3]), logit_softcap=number)

    with Seen() as seen:
        expected = run(3.0)
    assert seen.names
    assert torch.equal(run(softcap), expected)
    assert torch.equal(run(3.0), expected)


@every_call
def test_inference_mode_makes_no_graph_where_gradients_are_enabled_inside(call: Callable[..., Any]) -> None:
    logits, table, tau = (torch.nn.Parameter(x) for x in (randn(4, 9, seed=1), randn(9, 2, seed=2), torch.ones(4, 1)))
    with torch.inference_mode(), torch.enable_grad():
        found = call(logits * 1, table, tau)
    assert all(x.is_inference() for x in found if x.is_floating_point())
