"""PyTorch around the operations: torch.compile, opcheck, autocast, checkpointing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import grade_kernels as gk
from tests.support.helpers import ESTIMATORS, leaf, masked, noise_of, randn
from tests.support.needs import needs

# What torch's machinery sees is the operation, whichever backend serves it.
pytestmark = pytest.mark.cover(1)

V, D, N = 17, 3, 2


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _softmax(hard: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda logits, table, tau, noise: (gk.gumbel_softmax(logits, tau, hard, noise=noise),)


def _embedding(estimator: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(logits: torch.Tensor, table: torch.Tensor, tau: Any, noise: Any) -> tuple[torch.Tensor, ...]:
        out = gk.gumbel_ste_embedding(logits, (table, table.sin()), tau, estimator=estimator, noise=noise)
        return *out.embedding, out.ids, out.logprobs

    return call


def _given(
    call: Callable[..., tuple[torch.Tensor, ...]], known: bool = False
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same with noise of given tokens."""

    def given(
        logits: torch.Tensor, table: torch.Tensor, tau: Any, noise: gk.GumbelNoise | None
    ) -> tuple[torch.Tensor, ...]:
        noise = gk.GumbelNoise.from_generator() if noise is None else noise
        ids = torch.arange(logits.shape[0], device=logits.device)
        logprobs = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1) if known else None
        return call(logits, table, tau, noise.given(ids, logprobs))

    return given


CALLS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "gumbel_sample": lambda logits, table, tau, noise: (gk.gumbel_sample(logits, noise=noise),),
    "gumbel_softmax": _softmax(False),
    "gumbel_softmax hard": _softmax(True),
    "gumbel_ste": lambda logits, table, tau, noise: (gk.gumbel_ste(logits, tau, noise=noise),),
    **{f"gumbel_ste_embedding {name}": _embedding(name) for name in ESTIMATORS},
    "gumbel_softmax given": _given(_softmax(False)),
    "gumbel_ste given": _given(_softmax(True), known=True),
    "gumbel_ste_embedding given": _given(_embedding("ste")),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def results(call: Callable[..., tuple[torch.Tensor, ...]], device: str, tau: Any, seed: Any) -> list:
    """All outputs and all gradients of one call; `seed` may be None."""
    logits, table = leaf(randn(N, V, device=device)), leaf(randn(V, D, device=device, seed=1))
    t = leaf(tau) if isinstance(tau, torch.Tensor) else tau
    outputs = call(logits, table, t, seed)
    floating = [y for y in outputs if y.requires_grad]
    found = list(outputs)
    if floating:
        loss = sum(((y.double() ** 2) * (1 + i)).sum() for i, y in enumerate(floating))
        inputs = [x for x in (logits, table, t) if isinstance(x, torch.Tensor)]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        found += [x.new_zeros(()) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return found


def with_seed(call: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def seeded(logits: torch.Tensor, table: torch.Tensor, tau: Any, seed: Any) -> tuple[torch.Tensor, ...]:
        return call(logits, table, tau, gk.GumbelNoise(seed))

    return seeded


def assert_all_close(ours: list, theirs: list) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- torch.compile


@every_call
def test_compile(backend: str, device: str, call: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """One graph, forward and backward, that other values of seed and tau tensors do not recompile."""
    # What AOTAutograd makes of the reference, which is plain PyTorch, is slow, and no code of ours.
    counter = CompileCounterWithBackend("eager" if backend == "reference" else "aot_eager")
    compiled = torch.compile(with_seed(call), backend=counter, fullgraph=True)
    for tau, seed in ((0.5, 1), (0.7, 2), (1.3, -3)):
        arguments = (device, torch.tensor(tau, device=device), torch.tensor(seed, device=device))
        assert_all_close(results(compiled, *arguments), results(with_seed(call), *arguments))
    assert counter.frame_count == 1


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "slow to compile, and no other code decides there")
@pytest.mark.parametrize("name", ["gumbel_sample", "gumbel_ste", "gumbel_ste_embedding soft"])
def test_compile_with_numbers(backend: str, device: str, interpreted: bool, name: str) -> None:
    """An annealed float tau costs one more compilation, when it turns out to vary (it may restart once)."""
    call = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(with_seed(call), backend=counter, fullgraph=True)
    for tau in (0.5, 0.75, 1.25, 1.5, 2.0)[: 3 if interpreted else None]:
        seed = torch.tensor(7, device=device)
        assert_all_close(results(compiled, device, tau, seed), results(with_seed(call), device, tau, seed))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["gumbel_sample", "gumbel_ste", "gumbel_ste_embedding ste"])
def test_compile_without_noise(backend: str, device: str, interpreted: bool, name: str) -> None:
    """The seed is drawn inside the graph: repeatable under torch.manual_seed, and not a constant."""
    compiled = torch.compile(CALLS[name], backend="eager" if backend == "reference" else "aot_eager", fullgraph=True)
    logits, table = torch.zeros(3 if interpreted else 8, V, device=device), randn(V, D, device=device)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append([compiled(logits, table, 1.0, None)[0] for _ in range(2)])
    assert not torch.equal(*runs[0])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "slow to compile, and no other code decides there")
def test_compile_with_row_ids_and_an_int_seed(backend: str, device: str) -> None:
    """The whole noise made inside the graph, on a shard, for any number of rows without recompiling for each."""
    counter = CompileCounterWithBackend("aot_eager")

    def f(logits: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
        return gk.gumbel_softmax(logits, 0.5, noise=gk.GumbelNoise(5, row_ids, vocab_start=3))

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for n in (3, 4, 6):
        logits, row_ids = randn(n, V, device=device), torch.arange(n, device=device) * 2**40
        torch.testing.assert_close(compiled(logits, row_ids), f(logits, row_ids))
        counts.append(counter.frame_count)  # a first compilation may restart, which counts
    assert counts[0] == counts[-1]


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "slow to compile, and no other code decides there")
def test_compile_with_an_int_seed_that_changes(backend: str, device: str) -> None:
    """An int costs one more compilation, when it turns out to vary; a tensor none."""
    counter = CompileCounterWithBackend("aot_eager")

    def f(logits: torch.Tensor, seed: int) -> torch.Tensor:
        return gk.gumbel_softmax(logits, 0.5, noise=gk.GumbelNoise(seed))

    compiled, logits = torch.compile(f, backend=counter, fullgraph=True), randn(3, V, device=device)
    for seed in (5, 7, 8, 2**40):
        torch.testing.assert_close(compiled(logits, seed), f(logits, seed))
    assert counter.frame_count <= 3  # it may restart once


def test_compile_follows_the_backend() -> None:
    """A backend chosen after compilation is not ignored."""
    logits = randn(2, V)
    compiled = torch.compile(
        lambda x: gk.gumbel_sample(x, noise=gk.GumbelNoise(5)), backend="aot_eager", fullgraph=True
    )
    with gk.use_backend("reference"):
        expected = compiled(logits)
    seen = []
    chosen = gk.backends.get("torch")
    with gk.use_backend("torch"), pytest.MonkeyPatch.context() as patch:
        sample = chosen.sample
        patch.setattr(chosen, "sample", lambda *args: seen.append(1) or sample(*args))
        assert torch.equal(compiled(logits), expected)
    assert seen


@pytest.mark.takes_long(
    "inductor calls the C++ compiler; a table asks more of it", lambda name: "embedding" not in name
)
@pytest.mark.parametrize("name", ["gumbel_softmax hard", "gumbel_ste_embedding ste"])
def test_compile_by_default(name: str) -> None:
    """As a user calls it: no backend chosen, inductor, parameters and a loss around it."""
    call = with_seed(CALLS[name])
    arguments = ("cpu", torch.tensor(0.5), torch.tensor(1))
    assert_all_close(results(torch.compile(call, fullgraph=True), *arguments), results(call, *arguments))


# --- opcheck

ALL_UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_arguments(backend: str, device: str) -> dict[str, list[tuple]]:
    """Arguments for every operation that is registered, covering each optional one present and absent."""
    logits = leaf(masked(randn(N, V, device=device)))
    tau = leaf(torch.tensor([0.5, 1.5], device=device))
    seed, rows = torch.tensor(3, device=device), torch.tensor([5, -(2**40)], device=device)
    tables = [leaf(randn(V, D, device=device, seed=1)), leaf(randn(V, 2, device=device, dtype=torch.bfloat16))]
    ids = torch.tensor([1, 8], device=device)
    vector, matrix = torch.ones(N, device=device), randn(N, V, device=device, seed=4)
    frozen = [t.detach() for t in (logits, tau, *tables)]
    plain_logits, plain_tau, plain_tables = frozen[0], frozen[1], frozen[2:]
    prior = (None,) * 4  # no posterior
    common = (seed, rows, 4, *prior)
    _, score_max = torch.ops.grade_kernels.gumbel_softmax(plain_logits, plain_tau, True, *common, -1, False, backend)
    arguments: dict[str, list[tuple]] = {
        "gumbel_sample": [(plain_logits, *common, backend), (plain_logits, seed, None, 0, *prior, backend)],
        "gumbel_softmax": [
            (logits, tau, hard, seed, r, 4, *prior, -1, hard, backend) for r in (rows, None) for hard in (False, True)
        ],
        "gumbel_softmax_backward": [
            (matrix, plain_logits, plain_tau, True, *common, -1, False, backend, score_max, [True, needs])
            for needs in (False, True)
        ],
        "gumbel_ste_embedding": [],
        "gumbel_ste_embedding_backward": [],
    }
    for estimator in ESTIMATORS:
        forward = [
            (logits, tables, tau, *common, given, estimator, backend, 1)
            for given in ((None, ids) if estimator == "ste" else (ids,))
        ]
        arguments["gumbel_ste_embedding"] += forward
        out = torch.ops.grade_kernels.gumbel_ste_embedding(
            plain_logits, plain_tables, plain_tau, *common, ids, estimator, backend, 1
        )
        frozen_arguments = (plain_logits, plain_tables, plain_tau, *common, None, estimator, backend, 1)
        dlogprobs, wanted = {"ste": (vector, [True] * 4), "soft": (None, [True, True, False, False]),
                             "st": (None, [False, False, True, False]),
                             "reinmax": (vector, [False, False, False, True])}[estimator]  # fmt: skip
        arguments["gumbel_ste_embedding_backward"].append(
            (torch.ones_like(out[0]), out[1], dlogprobs, *frozen_arguments, *out[3:], wanted)
        )
    return arguments


@pytest.mark.uncollect_if(
    lambda backend: backend == "reference", "the reference registers no operation: it is plain autograd"
)
@pytest.mark.usefixtures("poison")
def test_every_operation_passes_opcheck(backend: str, device: str, interpreted: bool) -> None:
    """With poisoned memory: an output that a kernel leaves unwritten differs between two runs."""
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("grade_kernels::") and not name.startswith("grade_kernels::linear_")  # tested on their own
    }
    arguments = op_arguments(backend, device)
    assert registered == set(arguments), "an operation without arguments here is an operation without opcheck"
    for name, several in arguments.items():
        packet = getattr(torch.ops.grade_kernels, name)
        op = getattr(packet, *packet.overloads())
        # A backward has no autograd formula of its own, and what it does to shapes is seen in the compiled forward.
        utilities = ("test_schema", "test_faketensor") if name.endswith("_backward") else ALL_UTILITIES
        for args in several[:: 3 if interpreted else 1]:
            torch.library.opcheck(op, args, test_utils=utilities)


# --- autocast


@pytest.mark.uncollect_if(
    lambda backend: backend == "reference", "plain autograd: its backward follows the autocast that it runs in"
)
@every_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(
    backend: str, device: str, call: Callable[..., tuple[torch.Tensor, ...]], dtype: torch.dtype
) -> None:
    """Arithmetic inside an operation is its own: what float32 logits give does not depend on autocast around it."""
    arguments = (device, torch.tensor(0.5, device=device), torch.tensor(1, device=device))
    expected = results(with_seed(call), *arguments)
    with torch.autocast(device, dtype):
        ours = results(with_seed(call), *arguments)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_through_a_head(backend: str, device: str) -> None:
    """A linear head under autocast makes narrow logits, whose gradient reaches wide weights."""
    hidden, weight = randn(N, 4, device=device), leaf(randn(V, 4, device=device, seed=1))
    table = leaf(randn(V, D, device=device, seed=2))
    with torch.autocast(device, torch.bfloat16):
        out = gk.gumbel_ste_embedding(torch.nn.functional.linear(hidden, weight), table, 0.5, noise=noise_of())
        loss = out.embedding.sum() + out.logprobs.sum()
    dweight, dtable = torch.autograd.grad(loss, (weight, table))
    assert out.embedding.dtype == dweight.dtype == dtable.dtype == torch.float32
    assert dweight.abs().sum() > 0


# --- PyTorch's defaults


@every_call
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_defaults_change_nothing(
    backend: str, device: str, call: Callable[..., tuple[torch.Tensor, ...]], default: Any, defaults: Any
) -> None:
    """What a call makes has the dtype and the device of its arguments, not the ones that tensors have by default."""
    arguments = (device, torch.tensor(0.5, device=device), 1)
    expected = results(with_seed(call), *arguments)
    defaults(default)
    for a, b in zip(results(with_seed(call), *arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- checkpoint


@pytest.mark.uncollect_if(lambda call: call is CALLS["gumbel_sample"], "has no gradient to recompute for")
@every_call
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_checkpoint(
    backend: str, device: str, call: Callable[..., tuple[torch.Tensor, ...]], reentrant: bool, given: bool
) -> None:
    """Recomputation draws the same noise: from the restored generator, or from the noise that was given."""
    noise = gk.GumbelNoise(torch.tensor(3, device=device)) if given else None
    seen: list[list[torch.Tensor]] = []

    def body(logits: torch.Tensor, table: torch.Tensor, tau: Any, noise: Any) -> tuple[torch.Tensor, ...]:
        out = call(logits.sin(), table, tau, noise)
        seen.append([y.detach() for y in out])
        return out

    def checkpointed(*args: Any) -> tuple[torch.Tensor, ...]:
        return checkpoint(body, *args, use_reentrant=reentrant, preserve_rng_state=not given)

    tau = torch.tensor(0.5, device=device)
    torch.manual_seed(3)
    expected = results(body, device, tau, noise)
    seen.clear()
    torch.manual_seed(3)

    def run() -> list:
        if not reentrant:
            return results(checkpointed, device, tau, noise)
        # Reentrant checkpoints work with .backward() only.
        logits, table = leaf(randn(N, V, device=device)), leaf(randn(V, D, device=device, seed=1))
        t = leaf(tau)
        outputs = checkpointed(logits, table, t, noise)
        torch.manual_seed(99)  # recomputation has to restore the generator, not to find it
        sum(((y.double() ** 2) * (1 + i)).sum() for i, y in enumerate(y for y in outputs if y.requires_grad)).backward()
        return [*outputs, *(torch.zeros(()) if x.grad is None else x.grad for x in (logits, table, t))]

    with set_checkpoint_early_stop(False):  # so that the recomputation reaches the end of the body
        assert_all_close(run(), expected)
    assert len(seen) == 2, "the body ran once, so nothing was recomputed"
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# --- modules around it


def test_training_step_with_double_use(backend: str, device: str) -> None:
    """Two operations share a table and logits in one graph, and gradients accumulate over two backwards."""
    logits, table = leaf(randn(N, V, device=device)), leaf(randn(V, D, device=device, seed=1))
    total = [torch.zeros_like(logits), torch.zeros_like(table)]
    for seed in (1, 2):
        first = gk.gumbel_ste_embedding(logits, table, 0.5, noise=noise_of(seed))
        second = gk.gumbel_softmax(logits, 0.5, True, noise=noise_of(seed + 10)) @ table
        loss = (first.embedding * second).sum() + first.logprobs.sum()
        loss.backward(retain_graph=True)
        for acc, g in zip(total, torch.autograd.grad(loss, (logits, table)), strict=True):
            acc += g
    torch.testing.assert_close(logits.grad, total[0])
    torch.testing.assert_close(table.grad, total[1])


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "plain autograd saves probabilities, not logits")
def test_inputs_changed_between_forward_and_backward_are_noticed(backend: str, device: str) -> None:
    """Backward reads the logits again, so autograd must refuse when they have been overwritten."""
    logits = leaf(randn(N, V, device=device)) * 1
    y = gk.gumbel_softmax(logits, 0.5, noise=noise_of())
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().sum().backward()


@pytest.mark.uncollect_if(lambda backend, device: device != "cpu" or backend == "triton", "memory is torch's own")
@needs("a system that can fork", hasattr(os, "fork"))
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_writes_to_a_one_hot_of_its_own(backend: str, device: str) -> None:
    """Also to a large one, which may stand on memory that a backend maps itself."""
    y = gk.gumbel_ste(torch.zeros(2, 2**19), noise=noise_of())
    child = os.fork()
    if child == 0:
        y[0, :2] = 7.0
        os._exit(0)
    os.waitpid(child, 0)
    assert y.sum() == 2


def test_import_is_quiet() -> None:
    """Importing the package neither initialises a GPU nor imports Triton, and prints nothing."""
    import subprocess
    import sys

    code = (
        "import sys, torch, grade_kernels as gk; assert not torch.cuda.is_initialized(); "
        "assert 'triton' not in sys.modules; assert 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


# --- meta tensors


def meta_calls() -> dict[str, Callable[[], Any]]:
    """Every operation on meta tensors that want gradients, with support and without."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta", requires_grad=True)

    logits, hidden, head, table, tau = tensor(2, 3, 7), tensor(2, 3, 5), tensor(7, 5), tensor(7, 4), tensor(1)
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    found: dict[str, Callable[[], Any]] = {
        "gumbel_sample": lambda: gk.gumbel_sample(logits),
        "gumbel_softmax": lambda: gk.gumbel_softmax(logits, tau),
        "gumbel_ste dim": lambda: gk.gumbel_ste(logits, tau, dim=1),
        "linear_gumbel_sample": lambda: gk.linear_gumbel_sample(hidden, head),
    }
    for estimator in ESTIMATORS:
        found[f"gumbel_ste_embedding {estimator}"] = lambda e=estimator: gk.gumbel_ste_embedding(
            logits, (table, table), tau, estimator=e, ids=ids, ignore_index=-100
        )
    for eps in (0.0, 0.1):
        for estimator in ESTIMATORS:
            found[f"linear_gumbel_ste {estimator} {eps}"] = lambda e=estimator, eps=eps: gk.linear_gumbel_ste(
                hidden, head, table, tau, estimator=e, eps=eps
            )
        found |= {
            f"linear_logprobs {eps}": lambda eps=eps: gk.linear_logprobs(hidden, head, ids, eps=eps, ignore_index=-1),
            f"linear_kl {eps}": lambda eps=eps: gk.linear_kl(hidden, head, hidden, head, eps=eps),
            f"linear_entropy {eps}": lambda eps=eps: gk.linear_entropy(hidden, head, eps=eps),
        }
    return found


@pytest.mark.parametrize("name", meta_calls())
@pytest.mark.parametrize("backend_name", [None, "torch", "reference"])
def test_meta_tensors(name: str, backend_name: str | None) -> None:
    """Shapes without values, forward and backward: results lie there, too, and so do the gradients."""
    with gk.use_backend(backend_name):
        out = torch.utils._pytree.tree_leaves(meta_calls()[name]())
        assert all(x.device.type == "meta" and x.shape[:1] == (2,) for x in out)
        if "sample" not in name:
            total = sum(x.sum() for x in out if x.is_floating_point())
            assert isinstance(total, torch.Tensor)
            total.backward()


# --- the compiler's cache on disk

UPGRADED = """
import sys
from typing import Generic, NamedTuple, TypeVar
import torch
from torch._dynamo.utils import counters
from grade_kernels.ops.differentiable import differentiable

T = TypeVar("T")
class X(NamedTuple):
    x: torch.Tensor
class Y(NamedTuple, Generic[T]):
    y: T
class Dx(NamedTuple, Generic[T]):
    x: T
class Old(NamedTuple):
    twice: torch.Tensor
class New(NamedTuple):
    double: torch.Tensor

def kernel(given):
    return Y(given.x * 2), kept(torch.full_like(given.x, 2.0))

kept = {"old": Old, "new": New}[sys.argv[1]]
double = differentiable("of_the_test", X, Y, kept, Dx, kernel=kernel, fake=kernel,
                        backward=lambda given, kept, arrived, wanted: Dx(arrived.y * kept[0]))
x = torch.ones(3, requires_grad=True)
torch.compile(lambda x: double(X(x)).y.sum())(x).backward()
assert torch.equal(x.grad, torch.full((3,), 2.0))
print("hits", counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.takes_long("three processes compile; opcheck looks at the schemas")
def test_cached_graphs_of_another_backward_schema_are_not_used(tmp_path: Path) -> None:
    """Across processes, as after an upgrade: a graph on disk serves the schemas that it was made for, and no others."""

    def hits(version: str) -> str:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0"}
        done = subprocess.run([sys.executable, "-c", UPGRADED, version], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [hits(version) for version in ("old", "old", "new")] == ["hits 0", "hits 1", "hits 0"]
