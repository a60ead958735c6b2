"""What only a GPU has: CUDA graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import grade_kernels as gk
from tests.support.helpers import randn
from tests.support.needs import needs, needs_backend

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[pytest.param(name, marks=needs_backend(name)) for name in ("torch", "triton", "cuda")])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend that serves every call of the test on the GPU."""
    with gk.use_backend(request.param):
        yield request.param


def _step(logits: torch.Tensor, table: torch.Tensor, noise: gk.GumbelNoise) -> list[torch.Tensor]:
    """The operations on given logits, forward and backward."""
    x = logits.detach().requires_grad_()
    ids = gk.gumbel_sample(x, noise=noise)
    hard, soft = gk.gumbel_ste(x, 0.7, noise=noise), gk.gumbel_softmax(x, 0.7, noise=noise)
    embedded, _, logprobs = gk.gumbel_ste_embedding(x, table, 0.7, noise=noise)
    weights = torch.linspace(-1, 1, x.shape[1], device=x.device)
    loss = (hard * weights).sum() + (soft * weights).sum() + embedded.sum() + logprobs.sum()
    return [ids, hard.detach(), soft.detach(), embedded.detach(), logprobs.detach(), *torch.autograd.grad(loss, x)]


def _assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours.cpu(), theirs.cpu()), i


@pytest.mark.uncollect_if(
    lambda gpu_backend: gpu_backend == "torch", "plain PyTorch operations are PyTorch's to capture"
)
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_captured_in_a_graph(gpu_backend: str, place: str) -> None:
    """A graph replays with whatever its logits and its seed hold by then; a seed on the host is a constant of it."""
    logits, table = randn(8, 5000, device="cuda"), randn(5000, 16, device="cuda")
    seed = torch.tensor(1, device=place)
    noise = gk.GumbelNoise(seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(logits, table, noise)  # compiles what is compiled at the first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(logits, table, noise)
    for value in (5, -6):
        if place == "cuda":
            seed.fill_(value)
        logits.copy_(randn(8, 5000, seed=abs(value)))
        graph.replay()
        _assert_equal(captured, _step(logits, table, noise))


def test_on_another_stream(gpu_backend: str) -> None:
    """Work is queued where torch's current stream is: behind logits that are late."""
    logits, table, noise = randn(8, 5000, device="cuda"), randn(5000, 16, device="cuda"), gk.GumbelNoise(3)
    expected = _step(logits, table, noise)
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms: who does not wait for them reads zeros
        late.copy_(logits)
        found = _step(late, table, noise)
    stream.synchronize()
    _assert_equal(found, expected)


def test_never_waits_for_the_device(gpu_backend: str) -> None:
    """Nothing is read back or copied while the host waits, wherever seed and tau are."""
    logits, table = randn(8, 5000, device="cuda"), randn(5000, 16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (3, torch.full((), 3, device="cuda")):
            noise = gk.GumbelNoise(seed)
            _step(logits, table, noise)
            for tau in (torch.tensor(0.7), torch.full((), 0.7, device="cuda")):
                gk.gumbel_softmax(logits, tau, noise=noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs("two GPUs", torch.cuda.device_count() > 1)
def test_on_another_device(gpu_backend: str) -> None:
    """Tensors say where work is done, the current device does not, and it stays what it was."""
    results = []
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            noise = gk.GumbelNoise(torch.tensor(3, device="cuda:0"), torch.arange(8, device=device))
            results.append(_step(randn(8, 5000, device=device), randn(5000, 16, device=device), noise))
            assert torch.cuda.current_device() == 0
    assert all(part.device == torch.device("cuda:1") for part in results[1])
    _assert_equal(*results)


@pytest.mark.uncollect_if(
    lambda gpu_backend: gpu_backend == "torch", "its results depend on the batch in the last bits"
)
def test_more_than_2_31_elements(gpu_backend: str) -> None:
    """The last rows of a tensor that 32 bits cannot index, against the same rows alone."""
    vocab, last = 131_073, 8
    rows = 2**31 // vocab + 2 * last
    if torch.cuda.mem_get_info()[0] < 6 * rows * vocab * torch.bfloat16.itemsize:
        pytest.skip("not enough memory on this GPU")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    dy = torch.linspace(-1, 1, vocab, dtype=torch.bfloat16, device="cuda")
    row_ids = torch.arange(rows, device="cuda")

    def run(part: slice) -> tuple[torch.Tensor, ...]:
        x = logits[part].detach().requires_grad_()
        y = gk.gumbel_ste(x, 0.7, noise=gk.GumbelNoise(3, row_ids[part]))
        (dx,) = torch.autograd.grad(y, x, dy.expand_as(y))
        return y[-last:].detach().clone(), dx[-last:].clone()

    for whole, alone in zip(run(slice(None)), run(slice(-last, None)), strict=True):
        assert torch.equal(whole, alone)
