"""PyTorch around the operations through the head: compile, opcheck, autocast, checkpoint, autograd's corners."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import grade_kernels as gk
from tests.support.helpers import ESTIMATORS, leaf, noise_of, randn

# What torch's machinery sees is the operation, whichever backend serves it.
pytestmark = pytest.mark.cover(1)

N, H, V, D = 3, 4, 19, 2


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _ste(estimator: str, eps: float) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(hidden: Any, head: Any, bias: Any, table: Any, tau: Any, noise: Any) -> tuple[torch.Tensor, ...]:
        out = gk.linear_gumbel_ste(
            hidden, head, (table, table.sin()), tau, bias=bias, logit_softcap=5.0, estimator=estimator, noise=noise,
            eps=eps,
        )  # fmt: skip
        return *out.embedding, out.logprobs, out.ids

    return call


def _given(call: Callable[..., tuple[torch.Tensor, ...]], known: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same with noise of given tokens."""

    def given(hidden: Any, head: Any, bias: Any, table: Any, tau: Any, noise: Any) -> tuple[torch.Tensor, ...]:
        noise = gk.GumbelNoise.from_generator() if noise is None else noise
        ids = torch.arange(hidden.shape[0], device=hidden.device) % V
        logprobs = torch.full(ids.shape, -2.0, device=hidden.device) if known else None
        return call(hidden, head, bias, table, tau, noise.given(ids, logprobs))

    return given


def _statistics(eps: float) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(hidden: Any, head: Any, bias: Any, table: Any, tau: Any, noise: Any) -> tuple[torch.Tensor, ...]:
        ids = torch.arange(hidden.shape[0], device=hidden.device)
        return (
            gk.linear_logprobs(hidden, head, ids, bias=bias, temperature=0.7, eps=eps),
            gk.linear_kl(hidden, head, hidden.cos(), head, logit_softcap=4.0, eps=eps),
            gk.linear_entropy(hidden, head, bias=bias, eps=eps),
        )

    return call


def _sample(hidden: Any, head: Any, bias: Any, table: Any, tau: Any, noise: Any) -> tuple[torch.Tensor, ...]:
    return gk.linear_gumbel_sample(hidden, head, bias=bias, noise=noise)[::-1]


CALLS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    **{f"{name} {eps}": _ste(name, eps) for name in ESTIMATORS for eps in (0.0, 0.05)},
    "ste 0.05 given": _given(_ste("ste", 0.05), known=False),
    "soft 0.05 given": _given(_ste("soft", 0.05), known=True),
    "statistics exact": _statistics(0.0),
    "sample": _sample,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def results(call: Callable[..., Any], device: str, tau: torch.Tensor, noise: Any, n: int = N) -> list[torch.Tensor]:
    """All outputs and all gradients of one call."""
    inputs = [randn(n, H, device=device), randn(V, H, seed=1, device=device), randn(V, seed=2, device=device),
              randn(V, D, seed=3, device=device), tau]  # fmt: skip
    inputs = [leaf(x) for x in inputs]
    outputs = call(*inputs, noise)
    floating = [y for y in outputs if y.requires_grad]
    found = list(outputs)
    if floating:
        loss = sum(((y.double() ** 2) * (1 + i)).sum() for i, y in enumerate(floating))
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        found += [x.new_zeros(()) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return found


def assert_all_close(ours: list, theirs: list, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def seeded(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: call(*args[:-1], gk.GumbelNoise(args[-1]))


# --- torch.compile


@pytest.mark.uncollect_if(
    lambda backend, interpreted, call: (
        backend == "reference" or (interpreted and call not in (CALLS["ste 0.05"], CALLS["statistics exact"]))
    ),
    "slow, and no other code decides there",
)
@every_call
def test_compile(backend: str, device: str, interpreted: bool, call: Callable[..., Any]) -> None:
    """One graph, forward and backward, that other values of seed and tau do not recompile, whatever the support."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(seeded(call), backend=counter, fullgraph=True)
    for tau, seed in ((0.5, 1), (0.7, 2), (1.3, -3)):
        arguments = (device, torch.tensor(tau, device=device), torch.tensor(seed, device=device))
        assert_all_close(results(compiled, *arguments), results(seeded(call), *arguments))
    assert counter.frame_count == 1


def test_compile_of_rounded_statistics(backend: str, device: str) -> None:
    """Their seed is drawn inside the graph: repeatable under torch.manual_seed, and another one at each call."""
    call = _statistics(0.25)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    tau = torch.tensor(1.0, device=device)
    torch.manual_seed(5)
    first, second = (results(compiled, device, tau, None) for _ in range(2))
    torch.manual_seed(5)
    assert_all_close(results(compiled, device, tau, None), first)
    assert_all_close(second[:3], first[:3])
    if backend != "reference":
        assert not torch.equal(first[3], second[3])
    assert counter.frame_count == 1


@pytest.mark.uncollect_if(lambda backend: backend not in ("reference", "torch"), "meta tensors are served by these two")
def test_shapes_without_data(backend: str, device: str) -> None:
    """Where no graph is wanted, no shape depends on values, so even meta tensors pass through."""
    hidden, head, table = (torch.empty(*shape, device="meta") for shape in ((2, N, H), (V, H), (V, D)))
    ids = torch.empty(2, N, dtype=torch.int64, device="meta")
    out = gk.linear_gumbel_ste(hidden, head, table, noise=gk.GumbelNoise(1))
    for value in (
        out.ids, out.logprobs, *gk.linear_gumbel_sample(hidden, head, noise=gk.GumbelNoise(1)),
        gk.linear_logprobs(hidden, head, ids), gk.linear_entropy(hidden, head),
        gk.linear_kl(hidden, head, hidden, head),
    ):  # fmt: skip
        assert value.shape == (2, N)
        assert value.device.type == "meta"


def test_compile_by_default() -> None:
    """As a user calls it: inductor, no backend chosen, a loss around it."""
    for call in (_ste("ste", 2**-11), _ste("soft", 0.0)):
        arguments = ("cpu", torch.tensor(0.5), torch.tensor(1))
        assert_all_close(
            results(torch.compile(seeded(call), fullgraph=True), *arguments), results(seeded(call), *arguments)
        )


@pytest.mark.uncollect_if(
    lambda backend, interpreted: backend == "reference" or interpreted, "slow, and no other code decides there"
)
def test_compile_with_any_number_of_rows(backend: str, device: str, interpreted: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(seeded(_ste("ste", 0.05)), backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for n in (3, 4, 6):
        arguments = (device, torch.tensor(0.5, device=device), torch.tensor(n, device=device), n)
        assert_all_close(results(compiled, *arguments), results(seeded(_ste("ste", 0.05)), *arguments))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


# --- opcheck


def op_arguments(backend: str, device: str) -> dict[str, list[tuple]]:
    """Arguments for every operation through the head, with each optional one present and absent."""
    hidden, head = leaf(randn(N, H, device=device)), leaf(randn(V, H, device=device, seed=1))
    bias = leaf(randn(V, device=device, seed=2))
    tables = [leaf(randn(V, D, device=device, seed=3)), leaf(randn(V, 3, dtype=torch.bfloat16, device=device, seed=4))]
    tau = leaf(torch.tensor([0.5, 1.0, 1.5], device=device))
    seed, row_ids = torch.tensor(3, device=device), torch.tensor([5, -(2**40), 0], device=device)
    ids, dlogprobs = torch.tensor([1, 8, 1], device=device), torch.ones(N, device=device)
    ops, prior = torch.ops.grade_kernels, (None,) * 4  # no posterior
    arguments: dict[str, list[tuple]] = {
        "linear_gumbel_sample": [
            (hidden.detach(), head.detach(), b, cap, seed, rows, 4, *prior, backend)
            for b, cap, rows in ((None, None, None), (bias.detach(), 4.0, row_ids))
        ],
        "linear_gumbel_ste": [], "linear_gumbel_ste_backward": [],
        "linear_statistic": [], "linear_statistic_backward": [],
    }  # fmt: skip
    for estimator in ESTIMATORS:
        for eps in (0.0, 0.1):
            for b, cap, rows, given in ((bias, 4.0, row_ids, ids), (None, None, None, None)):
                args = (
                    hidden,
                    head,
                    b,
                    cap,
                    tables,
                    tau,
                    seed,
                    rows,
                    4,
                    *prior,
                    given,
                    estimator,
                    eps,
                    True,
                    backend,
                    1,
                )
                arguments["linear_gumbel_ste"].append(args)
                plain = tuple(
                    [x.detach() for x in a] if isinstance(a, list) else a.detach() if isinstance(a, torch.Tensor) else a
                    for a in args
                )
                out = ops.linear_gumbel_ste(*plain)
                everything = [True, True, b is not None, True, True, True]
                for upstream, wanted in ((dlogprobs, everything), (None, [True, False, False, False, True, False])):
                    arguments["linear_gumbel_ste_backward"].append(
                        (torch.ones_like(out[0]), out[1], upstream, *plain[:13], None, *plain[14:], *out[3:], wanted)
                    )
    for kind in ("logprobs", "kl", "entropy"):
        for eps in (0.0, 0.1):
            ref = (hidden.detach().sin(), head.detach(), bias.detach(), None) if kind == "kl" else (None,) * 4
            given = ids if kind == "logprobs" else None
            for b, cap, rows in ((bias, 4.0, row_ids), (None, None, None)):
                args = (
                    hidden,
                    head,
                    b,
                    cap,
                    *ref,
                    given,
                    tau.detach(),
                    seed,
                    rows,
                    0,
                    *prior,
                    kind,
                    eps,
                    True,
                    backend,
                )
                arguments["linear_statistic"].append(args)
                plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
                out = ops.linear_statistic(*plain)
                wanted = [True, True, b is not None]
                arguments["linear_statistic_backward"].append((dlogprobs, *plain, *out[1:], wanted))
    return arguments


@pytest.mark.uncollect_if(
    lambda backend: backend == "reference", "the reference registers no operation: it is plain autograd"
)
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ["linear_gumbel_sample", "linear_gumbel_ste", "linear_gumbel_ste_backward",
                                  "linear_statistic", "linear_statistic_backward"])  # fmt: skip
def test_opcheck(backend: str, device: str, interpreted: bool, name: str) -> None:
    """With poisoned memory: an output that a kernel leaves unwritten differs between two runs."""
    registered = {
        x.split("::")[1].split(".")[0]
        for x in torch._C._dispatch_get_all_op_names()
        if x.startswith("grade_kernels::linear")
    }
    arguments = op_arguments(backend, device)
    assert registered == set(arguments), "an operation without arguments here is an operation without opcheck"
    every = 9 if interpreted else 3 if name.endswith("_backward") else 1
    packet = getattr(torch.ops.grade_kernels, name)
    op = getattr(packet, *packet.overloads())
    for i, args in enumerate(arguments[name][::every]):
        utilities = ["test_schema", "test_faketensor"]
        # A backward has no autograd formula of its own, and what it does to shapes is seen when the forward is
        # compiled: every third time, which goes through all estimators or kinds, each with eps and without.
        if not name.endswith("_backward"):
            utilities += ["test_autograd_registration"] + ["test_aot_dispatch_dynamic"] * (i % 3 == 0)
        torch.library.opcheck(op, args, test_utils=utilities)


# --- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(backend: str, device: str, dtype: torch.dtype) -> None:
    """Hidden and head in float32 compute as if they had been cast; gradients and the rest stay as they are."""
    hidden, head = leaf(randn(N, H, device=device)), leaf(randn(V, H, device=device, seed=1))
    table, noise = leaf(randn(V, D, device=device, seed=3)), noise_of()
    for eps in (0.0, 0.1):
        with torch.autocast(device, dtype):
            out = gk.linear_gumbel_ste(hidden, head, table, 0.7, noise=noise, eps=eps)
            entropy = gk.linear_entropy(hidden, head, eps=0.0)
            ids, _ = gk.linear_gumbel_sample(hidden, head, noise=noise)
            logits = F.linear(hidden, head)
        assert out.embedding.dtype == torch.float32
        assert out.logprobs.dtype == entropy.dtype == torch.float32
        narrow = [leaf(x.detach().to(dtype)) for x in (hidden, head)]
        same = gk.linear_gumbel_ste(*narrow, table, 0.7, noise=noise, eps=eps)
        for a, b in zip(out, same, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(ids, same.ids)
        expected = -(logits.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)
        torch.testing.assert_close(entropy, expected, rtol=2e-2, atol=2e-2)
        ours = torch.autograd.grad(out.embedding.sum() + out.logprobs.sum() + entropy.sum(), (hidden, head, table))
        theirs = torch.autograd.grad(
            same.embedding.sum() + same.logprobs.sum() + gk.linear_entropy(*narrow, eps=0.0).sum(), (*narrow, table)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b.float(), rtol=2e-2, atol=2e-2)


def test_autocast_with_mixed_dtypes(backend: str, device: str) -> None:
    """A narrow backbone under a wide head: autocast brings them together, as for F.linear; without it, an error."""
    hidden, head = randn(N, H, device=device).bfloat16(), randn(V, H, device=device, seed=1)
    with torch.autocast(device, torch.bfloat16):
        gk.linear_entropy(hidden, head)
        gk.linear_kl(hidden, head, hidden.float(), head)
    with pytest.raises(TypeError):
        gk.linear_entropy(hidden, head)


# --- PyTorch's defaults


@every_call
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_defaults_change_nothing(
    backend: str, device: str, call: Callable[..., Any], default: Any, defaults: Any
) -> None:
    """What a call makes has the dtype and the device of its arguments, not the ones that tensors have by default."""
    arguments = (device, torch.tensor(0.5, device=device), 1, 2 * N)
    expected = results(seeded(call), *arguments)
    defaults(default)
    assert_all_close(results(seeded(call), *arguments), expected, 1e-6)


# --- checkpoint


@pytest.mark.uncollect_if(
    lambda interpreted, name: interpreted and name not in ("ste 0.05", "statistics exact"), "slow in the interpreter"
)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "sample"])
def test_checkpoint(backend: str, device: str, interpreted: bool, name: str, reentrant: bool) -> None:
    """Recomputation finds the noise again: the generator's, restored."""
    call, seen = CALLS[name], []

    def body(*args: Any) -> tuple[torch.Tensor, ...]:
        out = call(args[0].sin(), *args[1:], None)
        seen.append([y.detach() for y in out])
        return out

    def run(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        inputs = [leaf(randn(8, H, device=device)), leaf(randn(V, H, seed=1, device=device)),
                  leaf(randn(V, seed=2, device=device)), leaf(randn(V, D, seed=3, device=device)),
                  leaf(torch.tensor(0.7, device=device))]  # fmt: skip
        outputs = checkpoint(body, *inputs, use_reentrant=reentrant) if checkpointed else body(*inputs)
        torch.manual_seed(99)
        sum((y.double() ** 2).sum() for y in outputs if y.requires_grad).backward()
        return [*outputs, *(torch.zeros(()) if x.grad is None else x.grad for x in inputs)]

    expected = run(False)
    seen.clear()
    ours = run(True)
    assert_all_close(ours, expected)
    assert len(seen) >= 1 + reentrant


def test_checkpoint_of_rounded_statistics(backend: str, device: str) -> None:
    """Recomputation finds the seed of the rounding again, and what is drawn after it."""
    for reentrant in (False, True):
        found = []
        for checkpointed in (False, True):
            torch.manual_seed(4)
            hidden, head = leaf(randn(8, H, device=device)), randn(V, H, seed=1, device=device)

            def body(x: torch.Tensor, head: torch.Tensor = head) -> torch.Tensor:
                ids = torch.zeros(len(x), dtype=torch.int64, device=device)
                divergence = gk.linear_kl(x.sin(), head, x.cos(), head, eps=0.25)
                logprobs = gk.linear_logprobs(x.sin(), head, ids, eps=0.25)
                entropy = gk.linear_entropy(x.sin(), head, eps=0.25)
                return divergence + logprobs + entropy + gk.gumbel_sample(x) * x.sum(dim=1)

            out = checkpoint(body, hidden, use_reentrant=reentrant) if checkpointed else body(hidden)
            out.sum().backward()
            found.append((out.detach(), hidden.grad))
        torch.testing.assert_close(*found)


# --- autograd's corners


def test_two_backwards_accumulate(backend: str, device: str) -> None:
    hidden, head = leaf(randn(N, H, device=device)), leaf(randn(V, H, device=device, seed=1))
    table = leaf(randn(V, D, device=device, seed=3))
    out = gk.linear_gumbel_ste(hidden, head, table, 0.7, noise=noise_of(), eps=0.1)
    loss = out.embedding.square().sum() + out.logprobs.sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in (hidden, head, table)]
    loss.backward()
    for x, g in zip((hidden, head, table), once, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)


def test_backward_that_reaches_no_output(backend: str, device: str) -> None:
    """An upstream function that sends None leaves zeros or nothing, not an error."""

    class Blocked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> None:
            return None

    hidden, head = leaf(randn(N, H, device=device)), randn(V, H, device=device, seed=1)
    table = randn(V, D, device=device, seed=3)
    out = gk.linear_gumbel_ste(hidden, head, table, 0.7, noise=noise_of())
    (Blocked.apply(out.embedding).sum() + Blocked.apply(gk.linear_entropy(hidden, head)).sum()).backward()
    assert hidden.grad is None or not hidden.grad.any()


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "plain autograd saves what it saves")
def test_inputs_changed_between_forward_and_backward_are_noticed(backend: str, device: str) -> None:
    """Backward reads hidden states, head and tables again."""
    for changed in range(3):
        tensors = [leaf(x) * 1 for x in (randn(N, H, device=device), randn(V, H, device=device, seed=1),
                                         randn(V, D, device=device, seed=3))]  # fmt: skip
        out = gk.linear_gumbel_ste(*tensors, 0.7, noise=noise_of(), eps=0.1)
        with torch.no_grad():
            tensors[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.embedding.sum().backward()


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "plain autograd has them")
def test_second_derivatives_are_refused(backend: str, device: str) -> None:
    """They are not implemented: an error or a warning, never silent zeros."""
    hidden, head = leaf(randn(N, H, device=device)), randn(V, H, device=device, seed=1)
    value = gk.linear_entropy(hidden, head, eps=0.0).sum()
    (first,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.square().sum(), hidden)


def test_row_ids_identify_rows(backend: str, device: str) -> None:
    """Equal identities draw equal noise, negative and 64-bit ones included; default identities are flat indices."""
    hidden, head = randn(1, H, device=device).expand(6, H), randn(V, H, device=device, seed=1) * 0.1
    row_ids = torch.tensor([5, -(2**62), 5, 2**33, -(2**62), 2**33 + 1], device=device)
    out = gk.linear_gumbel_ste(hidden, head, torch.eye(V, device=device), estimator="soft", noise=gk.GumbelNoise(3, row_ids))  # fmt: skip # noqa: E501
    rows = out.embedding
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[4])
    assert not torch.allclose(rows[0], rows[1])
    assert not torch.allclose(rows[3], rows[5])
    flat = gk.linear_gumbel_ste(hidden.reshape(2, 3, H), head, torch.eye(V, device=device), estimator="soft",
                                noise=gk.GumbelNoise(3))  # fmt: skip
    given = gk.linear_gumbel_ste(hidden, head, torch.eye(V, device=device), estimator="soft",
                                 noise=gk.GumbelNoise(3, torch.arange(6, device=device)))  # fmt: skip
    assert torch.equal(flat.embedding.reshape(6, V), given.embedding)
