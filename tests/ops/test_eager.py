"""Calls that nothing looks at skip torch's dispatcher; all others must not, and both give the same."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import grade_kernels as gk
from grade_kernels import backends
from grade_kernels.noise import fresh_number, fresh_seed
from grade_kernels.ops.eager import undisturbed
from tests.support import ROOT
from tests.support.helpers import DTYPES, grads, leaf, randn
from tests.support.needs import needs_backend

NOISE = gk.GumbelNoise(3)


def _softmax(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (gk.gumbel_softmax(logits, tau, noise=NOISE) @ table,)


def _number(logits: torch.Tensor, table: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """With a tau that is no tensor, which a backend may serve in one step."""
    return (gk.gumbel_softmax(logits, 0.7, noise=NOISE) @ table * tau.sum(),)


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
    "gumbel_softmax, tau a number": _number,
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


LOGITS: dict[str, Callable[[], tuple[torch.Tensor, int]]] = {
    "one row of two": lambda: (randn(1, 2), -1),
    "rows": lambda: (randn(20, 8), -1),
    "wide rows": lambda: (randn(3, 300), 1),
    "one row": lambda: (randn(7), 0),
    "one token": lambda: (randn(5, 1), -1),
    "no rows": lambda: (randn(0, 3), -1),
    "columns": lambda: (randn(9, 70), 0),
    "a slice": lambda: (randn(20, 30)[:, 3:11], -1),
    "a dimension in between": lambda: (randn(4, 9, 5), -2),
    "channels last": lambda: (randn(2, 5, 3, 4).to(memory_format=torch.channels_last), 1),
    "expanded": lambda: (randn(1, 6).expand(4, 6), -1),
    "rows that are no view": lambda: (randn(3, 4, 5).transpose(0, 1), -1),
    "nine dimensions": lambda: (randn(1, 2, 1, 2, 1, 2, 1, 2, 3), 7),
    "a row that is masked but for one": lambda: (torch.tensor([[-torch.inf, 1.0, -torch.inf]]), -1),
}


def _with_gradients(logits: torch.Tensor, dim: int, hard: bool, noise: gk.GumbelNoise | None) -> list[torch.Tensor]:
    """The result without a graph and with one, and gradients of that: of plain memory and of an odd layout."""
    torch.manual_seed(3)
    without = gk.gumbel_softmax(logits, 0.7, hard, dim=dim, noise=noise)
    torch.manual_seed(3)
    given = leaf(logits.detach())
    y = gk.gumbel_softmax(given, 0.7, hard, dim=dim, noise=noise)
    found = [without, y.detach()]
    for upstream in (randn(*y.shape).to(y), randn(*reversed(y.shape)).to(y).permute(*reversed(range(y.dim())))):
        found += torch.autograd.grad(y, given, upstream, retain_graph=True)
    return found


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference is no operation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("noise", [None, NOISE], ids=["fresh", "given"])
@pytest.mark.parametrize("make", LOGITS.values(), ids=list(LOGITS))
def test_one_step_gives_what_the_operation_gives(
    backend: str, device: str, make: Any, noise: gk.GumbelNoise | None, hard: bool, dtype: torch.dtype
) -> None:
    """The same bits in the same layout, from the same state of torch's generator, also where the backend declines."""
    logits, dim = make()
    logits = logits.to(device, dtype)
    direct = _with_gradients(logits, dim, hard, noise)
    with Seen() as seen:
        expected = _with_gradients(logits, dim, hard, noise)
    assert seen.names
    for a, b in zip(direct, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.is_contiguous()


@needs_backend("cpu")
def test_calls_of_logits_and_numbers_take_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the long way")

    with gk.use_backend("cpu"):
        for name in ("gumbel_softmax", "softmax_backward"):
            monkeypatch.setattr(backends.get("cpu"), name, refuse)
        for tau in (0.7, 1):
            logits = leaf(randn(2, 5))
            gk.gumbel_softmax(logits.detach(), tau)
            gk.gumbel_softmax(logits, tau, True, noise=NOISE).square().sum().backward()
            assert logits.grad is not None
        for other in (np.float32(0.7), torch.tensor(0.7)):
            with pytest.raises(AssertionError, match="the long way"):
                gk.gumbel_softmax(logits, other)  # type: ignore[arg-type]


def test_a_backward_pass_that_is_looked_at_is_dispatched(backend: str, device: str) -> None:
    """Though the forward pass was not, and took one step."""
    logits, upstream = leaf(randn(4, 9, device=device)), randn(4, 9, device=device)
    y = gk.gumbel_softmax(logits, 0.7, noise=NOISE)
    (expected,) = torch.autograd.grad(y, logits, upstream, retain_graph=True)
    with Seen() as seen:
        (found,) = torch.autograd.grad(y, logits, upstream, retain_graph=True)
    assert seen.names == ([] if backend == "reference" else ["gumbel_softmax_backward"])
    assert torch.equal(found, expected)
    (first,) = torch.autograd.grad(y, logits, upstream, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits, retain_graph=True)
    given = leaf(logits.detach())
    (first,) = torch.autograd.grad(
        gk.reference.gumbel_softmax(given, 0.7, noise=NOISE), given, upstream, create_graph=True
    )
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), given)[0])
    batch = torch.stack([upstream, -upstream])
    (found,) = torch.autograd.grad(y, logits, batch, is_grads_batched=True)
    assert torch.equal(found, torch.stack([expected, -expected]))


@needs_backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.double, lambda x: x[:1]])
def test_saved_tensors_that_come_back_as_others_are_noticed(change: Callable[[Any], Any], dtype: torch.dtype) -> None:
    """A kernel that took them for what was saved would read memory that is not theirs."""
    wide = torch.promote_types(dtype, torch.float32)
    with gk.use_backend("cpu"):
        logits = leaf(randn(4, 9, dtype=dtype))
        # What has so many dimensions comes back as it was: the rows' numbers, the logits, nothing.
        for kept in (1, 2, 3):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: x, lambda x, kept=kept: x if x.dim() == kept else change(x)
            ):
                y = gk.gumbel_softmax(logits, 0.7, noise=NOISE)
            saved = [(x.dtype, tuple(x.shape)) for x in y.grad_fn.saved_tensors]
            if saved != [(dtype, (4, 9)), (wide, (4,))]:
                with pytest.raises(RuntimeError, match=r"dtype and shape|a number for each row|expected scalar type"):
                    y.sum().backward()


@needs_backend("cpu")
@pytest.mark.parametrize(
    "call",
    [
        lambda x: gk.gumbel_softmax(x, torch.tensor(0.7)),
        lambda x: gk.gumbel_ste_embedding(x, torch.ones(9, 2)).embedding,
        lambda x: gk.linear_gumbel_ste(x, torch.ones(7, 9), torch.ones(7, 2)).embedding,
    ],
    ids=["gumbel_softmax", "gumbel_ste_embedding", "linear_gumbel_ste"],
)
def test_saved_numbers_of_another_dtype_are_noticed(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """In operations, too."""
    with gk.use_backend("cpu"):
        logits = leaf(randn(4, 9))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: x, lambda x: x.bfloat16() if x.dim() == 1 and x.is_floating_point() else x
        ):
            y = call(logits)
        with pytest.raises(RuntimeError, match="expected scalar type Float but found BFloat16"):
            y.sum().backward()


def test_a_seed_as_a_number_is_the_seed_that_a_tensor_would_hold() -> None:
    """From the same state of the generator, in inference mode and outside it, in each thread."""

    def look() -> None:
        for inference in (True, False):
            with torch.inference_mode(inference):
                for _ in range(3):
                    state = torch.get_rng_state()
                    expected = fresh_seed().item()
                    after = torch.get_rng_state()
                    torch.set_rng_state(state)
                    found.append(fresh_number() == expected)
                    found.append(torch.equal(torch.get_rng_state(), after))

    found: list[bool] = []
    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True] * 24


def test_an_import_that_is_traced_leaves_nothing_of_the_tracer() -> None:
    code = (
        "import torch\n"
        "from torch._subclasses import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    import grade_kernels as gk\n"
        "print(type(gk.gumbel_softmax(torch.zeros(2, 3))).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "Tensor", run.stderr
