"""The operations through an LM head, and the ways to do the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

import grade_kernels as gk
from benchmarks.harness import OURS, Case, Contestants, compiled

TAU = 1.0
ENTROPY = 3.5  # nats, of the logits' softmax
SEED = 20260101
CHUNK = 4096  # columns of the chunked bare product
# Logits of 20 in bfloat16 are off by up to 0.06, and so are their weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def deviation(vocab: int) -> float:
    """Standard deviation at which `vocab` normal logits have the entropy above (by their quantiles, not by a draw)."""
    normal = torch.special.ndtri((torch.arange(vocab, dtype=torch.float64) + 0.5) / vocab)
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        peaked = torch.special.entr((middle * normal).softmax(0)).sum() < ENTROPY
        low, high = (low, middle) if peaked else (middle, high)
    return low


class Inputs:
    """Hidden states that need a gradient, a frozen head and a frozen table; for KL a reference of the same kind."""

    def __init__(self, case: Case) -> None:
        assert case.H is not None
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=generator).mul_(scale).to(case.device, case.torch_dtype)

        self.hidden = normal(case.N, case.H).requires_grad_()
        spread = deviation(case.V) / case.H**0.5
        self.head = normal(case.V, case.H, scale=spread)
        self.table = None if case.D is None else normal(case.V, case.D)
        self.upstream = normal(case.N, case.D or 1)
        self.ids = torch.randint(0, case.V, (case.N,), generator=generator).to(case.device)
        if case.op == "linear_kl":
            self.ref_hidden, self.ref_head = normal(case.N, case.H), normal(case.V, case.H, scale=spread)


def _ours(op: str, x: Inputs, **options: Any) -> torch.Tensor:
    if op.startswith("linear_gumbel_ste"):
        assert x.table is not None
        if op.endswith("eps=0"):
            options["eps"] = 0.0
        if op.endswith("soft"):
            options["estimator"] = "soft"
        return gk.linear_gumbel_ste(x.hidden, x.head, x.table, TAU, **options).embedding
    if op == "linear_gumbel_sample":
        return gk.linear_gumbel_sample(x.hidden, x.head, **options)[0]
    if op == "linear_kl":
        return gk.linear_kl(x.hidden, x.head, x.ref_hidden, x.ref_head, **options)
    return gk.linear_logprobs(x.hidden, x.head, x.ids, **options)


def _theirs(op: str) -> Callable[[Inputs], torch.Tensor]:
    def embed(x: Inputs) -> torch.Tensor:
        return F.gumbel_softmax(x.hidden @ x.head.T, TAU, hard=not op.endswith("soft")) @ x.table

    def sample(x: Inputs) -> torch.Tensor:
        return F.gumbel_softmax(x.hidden @ x.head.T, TAU, hard=True)

    def kl(x: Inputs) -> torch.Tensor:
        logp = (x.hidden @ x.head.T).log_softmax(-1)
        return (logp.exp() * (logp - (x.ref_hidden @ x.ref_head.T).log_softmax(-1))).sum(-1)

    def logprobs(x: Inputs) -> torch.Tensor:
        return -F.cross_entropy(x.hidden @ x.head.T, x.ids, reduction="none")

    if op.startswith("linear_gumbel_ste"):
        return embed
    return {"linear_gumbel_sample": sample, "linear_kl": kl, "linear_logprobs": logprobs}[op]


def _step(case: Case, function: Callable[[], torch.Tensor], x: Inputs) -> tuple[torch.Tensor, ...]:
    if case.pass_ == "forward":
        with torch.no_grad():
            return (function(),)
    y = function()
    upstream = x.upstream if y.dim() == 2 else torch.ones_like(y)
    return y, *torch.autograd.grad(y, x.hidden, upstream)


def _backward_alone(x: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    y = _ours("linear_gumbel_ste", x, noise=gk.GumbelNoise(SEED))
    return lambda: torch.autograd.grad(y, x.hidden, x.upstream, retain_graph=True)


def _products(case: Case, x: Inputs) -> Contestants:
    """The bare matrix product that no method can avoid (two for KL): whole, and by chunks into one buffer."""
    pairs = [(x.hidden.detach(), x.head)]
    if case.op == "linear_kl":
        pairs.append((x.ref_hidden, x.ref_head))
    width = min(CHUNK, case.V)
    buffer = torch.empty(case.N, width, dtype=case.torch_dtype, device=case.device)
    flipped = torch.empty(width, case.N, dtype=case.torch_dtype, device=case.device)

    def chunks(hidden: torch.Tensor, head: torch.Tensor) -> None:
        for part in head.split(width):
            torch.mm(hidden, part.T, out=buffer if len(part) == width else None)

    def flipped_chunks(hidden: torch.Tensor, head: torch.Tensor) -> None:
        columns = hidden.T.contiguous()
        for part in head.split(width):
            torch.mm(part, columns, out=flipped if len(part) == width else None)

    return {
        "gemm": lambda: [hidden @ head.T for hidden, head in pairs],
        "gemm chunks": lambda: [chunks(*pair) for pair in pairs],
        "gemm flipped chunks": lambda: [flipped_chunks(*pair) for pair in pairs],
    }


def build(case: Case) -> Contestants:
    """Ours, the bare product, eager and compiled PyTorch, and for log-probabilities PyTorch's fused loss."""
    x = Inputs(case)
    if case.pass_ == "backward":
        return {OURS: _backward_alone(x)}
    theirs = _theirs(case.op)
    squeezed = compiled(theirs)
    contestants: Contestants = {OURS: lambda: _step(case, lambda: _ours(case.op, x), x)}
    contestants |= _products(case, x)
    contestants["eager"] = lambda: _step(case, lambda: theirs(x), x)
    contestants["compiled"] = lambda: _step(case, lambda: squeezed(x), x)
    if case.op == "linear_logprobs" and hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()

        def fused(options: Any) -> Callable[[], Any]:
            # It has no per-row result in chunks; the sum's gradient is the same work.
            return lambda: _step(
                case, lambda: F.linear_cross_entropy(x.hidden, x.head, x.ids, reduction="sum", options=options), x
            )

        contestants |= {"linear_cross_entropy": fused(None), "linear_cross_entropy chunked": fused(chunked)}
    if case.op == "linear_logprobs":
        contestants |= {
            name: lambda work=work: _step(case, lambda: work(x), x) for name, work in _peers(case.device).items()
        }
    return contestants


def _peers(device: str) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    """Log-probabilities of given tokens in other libraries, of those that are installed and run on the device."""
    found: dict[str, Callable[[Inputs], torch.Tensor]] = {}
    with suppress(ImportError):
        from trl.trainer.utils import selective_log_softmax

        found["trl"] = lambda x: selective_log_softmax(x.hidden @ x.head.T, x.ids)
    with suppress(ImportError):
        import cut_cross_entropy

        way = "torch_compile" if device == "cpu" else "cce"
        found["cut-cross-entropy"] = lambda x: (
            -cut_cross_entropy.linear_cross_entropy(x.hidden, x.head, x.ids, reduction="none", impl=way)
        )
    if device != "cpu":
        with suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            found["liger"] = lambda x: -liger_fused_linear_cross_entropy(x.hidden, x.head, x.ids, reduction="none")
    return found


def check(case: Case, ours: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Compare what is going to be timed with the reference in float32, on the first row.

    Narrow logits may change which token wins, so the reference is given ours, whose score must be the best but for
    their rounding. With a stochastic support the gradient is random, so it is compared at `eps=0`.

    Raises:
        AssertionError: a sample, value or gradient differs.
    """
    if case.pass_ == "backward":
        case = Case(case.op, "forward+backward", case.dtype, case.N, case.V, case.H, case.D, case.device)
    x, first = Inputs(case), Inputs(case)
    first.hidden, first.upstream = first.hidden.detach()[:1].float().requires_grad_(), first.upstream[:1].float()
    first.head, first.ids = first.head.float(), first.ids[:1]
    first.table = None if first.table is None else first.table.float()
    options: dict[str, Any] = {} if case.op == "linear_gumbel_sample" else {"eps": 0.0}
    given: dict[str, Any] = {}
    if "gumbel" in case.op:
        options["noise"] = gk.GumbelNoise(SEED)
        ids = gk.linear_gumbel_sample(x.hidden, x.head, noise=options["noise"])[0][:1]
        logits = (first.hidden @ first.head.T).detach()
        scores = logits + options["noise"].dense(1, case.V).to(logits.device)
        slack = 2.0 * torch.finfo(case.torch_dtype).eps * logits.abs().max()
        assert scores[0, ids] >= scores.max() - slack, f"{case}: another sample than the reference's"
        if case.op == "linear_gumbel_sample":
            return
        given["ids"] = ids
    if case.op == "linear_kl":
        first.ref_hidden, first.ref_head = first.ref_hidden[:1].float(), first.ref_head.float()
    full = _step(case, lambda: _ours(case.op, x, **options), x)
    with gk.use_backend("reference"):
        truth = _step(case, lambda: _ours(case.op, first, **options, **given), first)
    for what, mine, expected in zip(("output", "gradient"), full, truth, strict=False):
        mine, expected = mine.detach()[:1].double(), expected.detach().double()
        error = (mine - expected).norm() / expected.norm()
        assert error <= TOLERANCE[case.dtype], f"{case}: relative error of the {what} is {error:.1e}"
