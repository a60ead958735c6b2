"""Derivatives beyond one backward pass: transforms of torch.func, forward mode, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import grade_kernels as gk
from grade_kernels.backends import Noise
from grade_kernels.ops.gumbel_softmax import _Draw, _gumbel_softmax
from tests.support.helpers import ESTIMATORS, leaf, noise_of, randn

# What torch's transforms see is the operation, whichever backend serves it.
pytestmark = pytest.mark.cover(1)

N, H, V, D = 3, 4, 7, 2
Tensor = torch.Tensor
Function = Callable[[Any, Tensor, Tensor], Tensor]


# Made here, since vmap refuses calls of a generator.
TABLE, HEAD = randn(V, D, dtype=torch.float64, seed=3), randn(V, V, dtype=torch.float64, seed=5)
IDS = torch.tensor([1, 0, 5])


def _table(x: Tensor) -> Tensor:
    return TABLE.to(x.device)


def _head(x: Tensor) -> Tensor:
    return HEAD.to(x.device)


def _ids(x: Tensor) -> Tensor:
    return IDS.to(x.device)


def _given(x: Tensor) -> gk.PosteriorNoise:
    """Noise of given tokens."""
    return noise_of().given(_ids(x))


def _row(name: str, noise: Callable[[Tensor], Any] = lambda x: noise_of()) -> Function:
    """`gumbel_ste_embedding` with one estimator, of a library (ours or the reference), as a function of logits and tau."""

    def call(where: Any, x: Tensor, tau: Tensor) -> Tensor:
        out = where.gumbel_ste_embedding(x, _table(x), tau, estimator=name, noise=noise(x))
        return out.embedding.square().sum() + out.logprobs.sum()

    return call


def _weigh(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum()


ROWS: dict[str, Function] = {
    "gumbel_softmax": lambda where, x, tau: where.gumbel_softmax(x, tau, noise=noise_of()).square().sum(),
    "gumbel_softmax dim": lambda where, x, tau: _weigh(where.gumbel_softmax(x, tau, dim=0, noise=noise_of())),
    "gumbel_ste": lambda where, x, tau: _weigh(where.gumbel_ste(x, tau, noise=noise_of())),
    **{f"gumbel_ste_embedding {name}": _row(name) for name in ESTIMATORS},
    "gumbel_softmax given": lambda where, x, tau: where.gumbel_softmax(x, tau, noise=_given(x)).square().sum(),
    "gumbel_ste_embedding given": _row("ste", _given),
}


def _linear(name: str, noise: Callable[[Tensor], Any] = lambda x: noise_of()) -> Function:
    def call(where: Any, x: Tensor, tau: Tensor) -> Tensor:
        out = where.linear_gumbel_ste(x, _head(x), _table(x), tau, estimator=name, noise=noise(x), eps=0.0)
        return out.embedding.square().sum() + out.logprobs.sum()

    return call


HEADS: dict[str, Function] = {
    **{f"linear_gumbel_ste {name}": _linear(name) for name in ESTIMATORS},
    "linear_gumbel_ste given": _linear("ste", _given),
    "linear_logprobs": lambda where, x, tau: _weigh(where.linear_logprobs(x, _head(x), _ids(x), eps=0.0)),
    "linear_kl": lambda where, x, tau: _weigh(where.linear_kl(x, _head(x), x.detach() + 1, _head(x), eps=0.0)),
    "linear_entropy": lambda where, x, tau: _weigh(where.linear_entropy(x, _head(x), eps=0.0)),
}
ALL = {**ROWS, **HEADS}
every_function = pytest.mark.parametrize("call", ALL.values(), ids=ALL)
TWICE = {name: call for name, call in ROWS.items() if "reinmax" not in name}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(device: str) -> tuple[Tensor, Tensor]:
    return randn(N, V, dtype=torch.float64, device=device), torch.tensor(0.7, dtype=torch.float64, device=device)


def truth(call: Function, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by plain autograd through the reference."""
    x, tau = leaf(x), leaf(tau)
    dx, dtau = torch.autograd.grad(call(gk.reference, x, tau), (x, tau), allow_unused=True)
    return dx, torch.zeros_like(tau) if dtau is None else dtau


@every_function
def test_first_derivatives(backend: str, device: str, call: Function) -> None:
    """grad, vjp, jacrev, jacfwd and jvp give the gradient, of logits or hidden states and of tau."""
    x, tau = inputs(device)
    dx, dtau = truth(call, x, tau)
    assert dx.abs().max() > 1e-3

    def f(x: Tensor, tau: Tensor) -> Tensor:
        return call(gk, x, tau)

    torch.testing.assert_close(torch.func.grad(f, argnums=(0, 1))(x, tau), (dx, dtau))
    torch.testing.assert_close(torch.func.grad_and_value(f)(x, tau), (dx, call(gk.reference, x, tau)))
    one = torch.ones((), dtype=torch.float64, device=device)
    torch.testing.assert_close(torch.func.vjp(f, x, tau)[1](one), (dx, dtau))
    torch.testing.assert_close(torch.func.jacrev(f)(x, tau), dx)
    torch.testing.assert_close(torch.func.jacfwd(f)(x, tau), dx)
    direction = randn(N, V, dtype=torch.float64, device=device, seed=9)
    torch.testing.assert_close(torch.func.jvp(f, (x, tau), (direction, one))[1], (dx * direction).sum() + dtau)


@every_function
def test_mapped_derivatives(backend: str, device: str, call: Function) -> None:
    """vmap(grad) over a batch, the second of two dimensions, and within another vmap: one after the other."""
    tau = torch.tensor(0.7, dtype=torch.float64, device=device)
    batch = randn(2, 2, N, V, dtype=torch.float64, device=device, seed=4)
    expected = torch.stack([torch.stack([truth(call, x, tau)[0] for x in part]) for part in batch])
    one = torch.func.grad(lambda x: call(gk, x, tau))
    torch.testing.assert_close(torch.func.vmap(one)(batch[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(one, in_dims=1)(batch[0].transpose(0, 1)), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(one))(batch), expected)


@every_function
def test_hessian(backend: str, device: str, call: Function, request: pytest.FixtureRequest) -> None:
    """The Hessian is that of autograd through the reference; an estimator that defines none says so."""
    x, tau = inputs(device)
    if "reinmax" in request.node.name:
        with pytest.raises(NotImplementedError, match="reinmax"):
            torch.func.hessian(lambda x: call(gk, x, tau))(x)
        return
    expected = torch.autograd.functional.hessian(lambda x: call(gk.reference, x, tau), x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.hessian(lambda x: call(gk, x, tau))(x), expected)


@pytest.mark.takes_long("seconds of compilation a case; the same transforms run uncompiled, and other tests compile")
@pytest.mark.parametrize(
    "name", ["gumbel_softmax", "gumbel_ste_embedding ste", "linear_gumbel_ste ste", "linear_entropy"]
)
def test_compiled_transforms(backend: str, device: str, name: str) -> None:
    """One graph of a transform, a transform of a graph, and the same graph without it afterwards."""
    call, (x, tau) = ALL[name], inputs(device)
    expected, value = truth(call, x, tau)[0], call(gk.reference, x, tau)

    def f(x: Tensor) -> Tensor:
        return call(gk, x, tau)

    compiled = torch.compile(torch.func.grad(f), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled = torch.compile(torch.func.vmap(torch.func.grad(f)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[None]), expected[None])
    plain = torch.compile(f, backend="aot_eager")
    torch.testing.assert_close(plain(x), value)
    torch.testing.assert_close(torch.func.grad(plain)(x), expected)
    torch.testing.assert_close(plain(x), value)


@every_function
def test_upstream_gradients_that_are_mapped(backend: str, device: str, call: Function) -> None:
    """vmap over torch.autograd.grad, with a graph that was made outside: the kernels' own backward, one at a time."""
    x, tau = inputs(device)
    x = leaf(x)
    value = call(gk, x, tau)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    mapped = torch.func.vmap(lambda dy: torch.autograd.grad(value, x, dy, retain_graph=True)[0])(scales)
    torch.testing.assert_close(mapped, scales[:, None, None] * truth(call, x, tau)[0])


@every_function
def test_batched_gradients(backend: str, device: str, call: Function) -> None:
    """Upstream gradients stacked by the vmap of torch.autograd, which is not that of torch.func; also one within another."""
    x, tau = inputs(device)
    x = leaf(x)
    dx, _ = truth(call, x, tau)
    value = call(gk, x, tau)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    (stacked,) = torch.autograd.grad(value, x, scales, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(stacked, scales[:, None, None] * dx)

    def scaled(a: Tensor, b: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, a * b, retain_graph=True)[0]

    nested = _vmap(lambda a: _vmap(lambda b: scaled(a, b))(scales[:2]))(scales)
    torch.testing.assert_close(nested, scales[:, None, None, None] * scales[:2, None, None] * dx)


@every_function
def test_vectorized_jacobian(backend: str, device: str, call: Function) -> None:
    x, tau = inputs(device)
    jacobian = torch.autograd.functional.jacobian(lambda x: call(gk, x, tau) * x.new_tensor([1, 2]), x, vectorize=True)
    torch.testing.assert_close(jacobian, truth(call, x, tau)[0] * x.new_tensor([1, 2])[:, None, None])


def test_batched_gradients_of_several_tables(backend: str, device: str) -> None:
    """Some results and some arguments have no gradient, arguments and gradients are lists: `gradcheck` compares all."""
    x = randn(2, 5, dtype=torch.float64, device=device)
    a, b = (randn(5, d, dtype=torch.float64, device=device, seed=d) for d in (1, 2))

    def f(a: Tensor) -> Tensor:
        return gk.gumbel_ste_embedding(x, (a, b), noise=noise_of()).embedding[0]

    assert torch.autograd.gradcheck(f, (leaf(a),), check_batched_grad=True)


@pytest.mark.parametrize(
    "name", ["gumbel_softmax", "gumbel_ste_embedding ste", "linear_gumbel_ste ste", "linear_entropy"]
)
def test_traced_transforms(backend: str, device: str, name: str) -> None:
    """A tracer's tensors have no values to check: linearize, and make_fx of a gradient."""
    call = ALL[name]
    x, tau = inputs(device)
    dx, _ = truth(call, x, tau)

    def f(x: Tensor) -> Tensor:
        return call(gk, x, tau)

    value, tangent = torch.func.linearize(f, x)
    torch.testing.assert_close(value, call(gk.reference, x, tau))
    torch.testing.assert_close(tangent(x), (dx * x).sum())
    torch.testing.assert_close(make_fx(torch.func.grad(f))(x)(x), dx)


def test_samples_under_transforms(backend: str, device: str) -> None:
    """Sampling has no derivative, but may stand in a function that has one."""
    x = randn(2, N, V, dtype=torch.float64, device=device)
    expected = torch.stack([gk.gumbel_sample(part, noise=noise_of()) for part in x])
    assert torch.equal(torch.func.vmap(lambda x: gk.gumbel_sample(x, noise=noise_of()))(x), expected)
    head = _head(x)
    ids, logprobs = torch.func.vmap(lambda x: gk.linear_gumbel_sample(x, head, noise=noise_of()))(x)
    for i in range(2):
        one = gk.linear_gumbel_sample(x[i], head, noise=noise_of())
        assert torch.equal(ids[i], one[0])
        torch.testing.assert_close(logprobs[i], one[1])
    grad = torch.func.grad(lambda x: x.gather(-1, gk.gumbel_sample(x, noise=noise_of())[:, None]).sum())(x[0])
    assert torch.equal(grad, torch.nn.functional.one_hot(expected[0], V).double())


def test_values_are_checked_behind_the_wrappers(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without a distribution, a tau and an id that are wrong raise under vmap(grad), too."""
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    x = randn(2, N, V, dtype=torch.float64, device=device)
    bad = x.clone()
    bad[1, 2, 3] = torch.nan
    mapped = torch.func.vmap(torch.func.grad(lambda x: gk.gumbel_softmax(x, noise=noise_of()).sum()))
    mapped(x)
    with pytest.raises(ValueError, match=r"logits.*row 5 holds NaN"):
        mapped(bad)
    tau = torch.tensor([1.0, -2.0], dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"tau must be positive.*-2"):
        torch.func.vmap(lambda x, t: gk.gumbel_softmax(x, t, noise=noise_of()))(x, tau)
    ids, table = torch.tensor([[0, 1, 2], [0, V, 2]], device=device), _table(x)
    with pytest.raises(ValueError, match=f"ids must lie in .*got {V}"):
        torch.func.vmap(lambda x, i: gk.gumbel_ste_embedding(x, table, noise=noise_of(), ids=i).embedding)(x, ids)
    head = _head(x)
    with pytest.raises(ValueError, match="row 5"):
        torch.func.vmap(lambda x: gk.linear_entropy(x, head))(bad)


def test_functional_call(backend: str, device: str) -> None:
    """A module whose head and temperature are handed in, plainly and under grad and vmap."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Parameter(torch.ones(V, H, device=device))
            self.tau = torch.nn.Parameter(torch.ones(1, device=device))

        def forward(self, hidden: Tensor) -> Tensor:
            out = gk.linear_gumbel_ste(hidden, self.head, self.head, self.tau, noise=noise_of(), eps=0.0)
            return out.embedding.square().sum() + out.logprobs.sum()

    model, hidden = Model(), randn(N, H, device=device, seed=2)
    parameters = {"head": randn(V, H, device=device), "tau": torch.tensor([1.5], device=device)}
    for p, value in zip(model.parameters(), parameters.values(), strict=True):
        p.data.copy_(value)
    loss = model(hidden)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    torch.testing.assert_close(torch.func.functional_call(Model(), parameters, hidden), loss.detach())

    def f(p: dict[str, Tensor], hidden: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, hidden)

    torch.testing.assert_close(torch.func.grad(f)(parameters, hidden), expected, rtol=1e-4, atol=1e-5)
    several = {name: torch.stack([p, p]) for name, p in parameters.items()}
    mapped = torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(several, hidden)
    for name, p in expected.items():
        torch.testing.assert_close(mapped[name][1], p, rtol=1e-4, atol=1e-5)


def test_randomness_of_vmap(backend: str, device: str) -> None:
    """Without noise, vmap's own flag decides whether mapped calls share a seed."""
    x = torch.zeros(4, N, 1000, device=device)
    same = torch.func.vmap(gk.gumbel_sample, randomness="same")(x)
    different = torch.func.vmap(gk.gumbel_sample, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(gk.gumbel_sample)(x)


# --- forward mode


@every_function
def test_dual_numbers(backend: str, device: str, call: Function) -> None:
    x, tau = inputs(device)
    dx, dtau = truth(call, x, tau)
    direction = randn(N, V, dtype=torch.float64, device=device, seed=9)
    with forward_ad.dual_level():
        dual_x, dual_tau = forward_ad.make_dual(x, direction), forward_ad.make_dual(tau, torch.ones_like(tau))
        tangent = forward_ad.unpack_dual(call(gk, dual_x, dual_tau)).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, (dx * direction).sum() + dtau)
        # Without tangents the call is the ordinary one.
        torch.testing.assert_close(call(gk, x, tau), call(gk.reference, x, tau))


# --- second derivatives


@pytest.mark.parametrize("call", TWICE.values(), ids=TWICE)
def test_second_derivatives(backend: str, device: str, call: Function) -> None:
    """A gradient's square has the gradient that the reference gives it, of logits and tau, however tau was made."""
    x, _ = inputs(device)

    def penalised(where: Any) -> tuple[Tensor, ...]:
        logits, scale = leaf(x), leaf(torch.tensor(0.7, dtype=torch.float64, device=device))
        tau = scale + 0.1 * logits.square().mean()  # depends on the other input
        loss = call(where, logits, tau)
        first = torch.autograd.grad(loss, (logits, scale), create_graph=True)
        second = torch.autograd.grad(loss + sum(g.square().sum() for g in first), (logits, scale))
        return *first, *second

    ours, expected = penalised(gk), penalised(gk.reference)
    assert (expected[2] - expected[0]).abs().max() > 1e-4
    torch.testing.assert_close(ours, expected)


def test_second_derivatives_of_tables_and_upstream(backend: str, device: str, interpreted: bool) -> None:
    x = randn(2, 5, dtype=torch.float64, device=device)
    tables = tuple(randn(5, d, dtype=torch.float64, device=device, seed=d).requires_grad_() for d in (2, 3))
    for estimator in ("soft",) if interpreted else ("ste", "soft", "st"):

        def f(x: Tensor, tau: Tensor, a: Tensor, b: Tensor, estimator: str = estimator) -> tuple[Tensor, ...]:
            out = gk.gumbel_ste_embedding(x, (a, b), tau, estimator=estimator, noise=noise_of())
            return *out.embedding, out.logprobs

        tau = torch.tensor([0.6, 1.4], dtype=torch.float64, device=device)
        if estimator == "soft":  # a straight-through gradient is not its forward's derivative
            assert torch.autograd.gradgradcheck(f, (leaf(x), leaf(tau), *tables), fast_mode=True)
        outs = f(leaf(x), leaf(tau), *tables)
        assert all(g is not None for g in torch.autograd.grad([o.sum() for o in outs], tables, create_graph=True))


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "plain autograd")
def test_where_there_is_no_second_derivative(backend: str, device: str) -> None:
    """The error names what does work."""
    x, head = leaf(randn(N, H, device=device)), randn(V, H, device=device, seed=1)
    (first,) = torch.autograd.grad(gk.linear_entropy(x, head, eps=0.0).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative.*use_backend\('reference'\)"):
        torch.autograd.grad(first.square().sum(), x)
    logits = leaf(randn(N, V, device=device))
    out = gk.gumbel_ste_embedding(logits, _table(logits).float(), estimator="reinmax", noise=noise_of())
    with pytest.raises(NotImplementedError, match=r"reinmax.*'ste', 'soft' or 'st'"):
        torch.autograd.grad(out.embedding.sum(), logits, create_graph=True)


def test_operations_themselves_refuse_tangents() -> None:
    """Whoever calls a registered operation past the public function is told as well, not given zeros."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.zeros(2, 3), torch.ones(2, 3))
        with pytest.raises(NotImplementedError, match=r"forward-mode.*use_backend\('reference'\)"):
            _gumbel_softmax(_Draw(x, torch.ones(2), True, Noise(torch.tensor(1), None, 0), -1, False, "torch"))
