"""`linear_logprobs`, `linear_kl` and `linear_entropy`: statistics of a head's distribution, without its logits."""

from typing import Generic, TypedDict, TypeVar

import torch
from typing_extensions import NamedTuple

from grade_kernels import backends, reference
from grade_kernels.backends import Head, Noise, Softmax, Support
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.differentiable import differentiable
from grade_kernels.ops.head import canonical_eps, check_head, check_reference_rows, fake_support, needs_graph
from grade_kernels.ops.head_gradients import Entries, HeadGradients, PerHead
from grade_kernels.ops.registry import answered_by, public
from grade_kernels.ops.transforms import reference_serves
from grade_kernels.reference import ignored_rows

__all__ = ["linear_entropy", "linear_kl", "linear_logprobs"]

T = TypeVar("T")


@public
def linear_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = None,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """Log-probability of given tokens, `log softmax(l / temperature)[ids]`, `l = softcap(hidden @ lm_head.T + bias)`.

    Under transforms of `torch.func` and for forward-mode derivatives `grade_kernels.reference` serves the call, with the
    logits in memory. There is no second derivative, except under `use_backend("reference")`.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        lm_head: `[V, H]`, hidden's dtype.
        ids: int64 `[...]`.
        bias: `[V]`, optional; -inf masks a token.
        logit_softcap: c in `c * tanh(l / c)`, optional.
        temperature: a positive number.
        ignore_index: rows of this id are ignored, as `torch.nn.functional.cross_entropy` does: their result is 0, no
            gradient comes of them, and their hidden states may be anything. None: every id must be a token's.
        eps: stochastic support of the backward pass: a token of probability p is visited with probability
            `min(1, p / eps)`, on average at most `1 / eps` tokens a row, which leaves the gradient unbiased. 0 visits every
            token, exactly.
        noise: seed and row identities of those visits. None draws a fresh seed from torch's default generator.

    Returns:
        `[...]`, float32 (float64 for float64). Gradients go to hidden, lm_head and bias.

    Raises:
        TypeError: a tensor of a wrong type, hidden and lm_head of different dtypes, ignore_index that is no int.
        ValueError: shapes that do not match (with both numbers), ids out of range, eps outside [0, 1), temperature or
            logit_softcap not positive, tensors on different devices; on CPU a row without a distribution.
    """
    return _statistic(
        "logprobs", hidden, lm_head, bias, logit_softcap, temperature, eps, noise, ids=ids, ignore_index=ignore_index
    )


@public
def linear_kl(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """Divergence of the policy from a reference, `KL(softmax(l / temperature) || softmax(r / temperature))`, in nats.

    Arguments, errors and the result's shape as in `linear_logprobs`; the reference's head may have another H. The
    reference is a constant: its tensors get no gradient.
    """
    return _statistic(
        "kl", hidden, lm_head, bias, logit_softcap, temperature, eps, noise, ref=(ref_hidden, ref_lm_head, ref_bias)
    )


@public
def linear_entropy(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """Entropy `-sum p log p` of `p = softmax(l / temperature)`, in nats. Arguments as in `linear_logprobs`."""
    return _statistic("entropy", hidden, lm_head, bias, logit_softcap, temperature, eps, noise)


def _statistic(
    kind: str,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    logit_softcap: float | None,
    temperature: float,
    eps: float,
    noise: GumbelNoise | None,
    *,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
    ref: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    hidden, lm_head, bias = check_head(hidden, lm_head, bias, logit_softcap)
    eps = canonical_eps(eps)
    compute = compute_dtype(hidden.dtype)
    temperature = checks.positive_number("temperature", temperature, compute)
    batch = hidden.shape[:-1]
    if kind == "logprobs":
        checks.check_ids(ids, batch, hidden, "hidden")
    ignored, safe_ids, open_hidden = ignored_rows(ids, checks.canonical_ignore_index(ignore_index, ids), hidden)
    if ignored is not None:
        value = _statistic(
            kind, open_hidden, lm_head, bias, logit_softcap, temperature, eps, noise, ids=safe_ids, ref=ref
        )
        return torch.where(ignored, 0.0, value)
    ref_hidden = ref_lm_head = ref_bias = None
    if ref is not None:
        ref_hidden, ref_lm_head, ref_bias = check_head(*ref, logit_softcap, prefix="ref_")
        if ref_lm_head.shape[0] != lm_head.shape[0]:
            raise ValueError(f"ref_lm_head has {ref_lm_head.shape[0]} tokens, but lm_head has {lm_head.shape[0]}")
        if ref_hidden.shape[:-1] != batch:
            raise ValueError(f"ref_hidden must have shape {(*batch, 'H')}, got {tuple(ref_hidden.shape)}")
        checks.check_same_device("ref_hidden", ref_hidden, "hidden", hidden)
    rows, ref_head = hidden.reshape(-1, hidden.shape[-1]), None
    if ref_hidden is not None and ref_lm_head is not None:
        ref_bias = None if ref_bias is None else ref_bias.detach()
        ref_rows = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
        ref_head = Head(ref_rows, ref_lm_head.detach(), ref_bias, logit_softcap)
    tau = torch.full((rows.shape[0],), temperature, dtype=compute, device=hidden.device)
    backend = backends.select(hidden.device, hidden.dtype, head=True)
    head = Head(rows, lm_head, bias, logit_softcap)
    if noise is None and (eps == 0 or reference_serves(backend, head)):  # nothing is drawn, not even a seed
        noise = GumbelNoise(0)
    # Otherwise a seed is drawn even if no graph is wanted. Reentrant checkpointing runs forward once without and once with a
    # graph, and both must leave the generator in the same state.
    drawn = checks.canonical_noise(noise, rows.shape[0], hidden.device)
    flat_ids = None if ids is None else ids.reshape(-1)
    wants_support = eps > 0 and needs_graph(hidden, lm_head, bias)
    call = _Call(head, ref_head, flat_ids, tau, drawn, kind, eps, wants_support, backend)
    return _statistic_of(call).view(batch)


class _Call(NamedTuple):
    head: Head
    ref: Head | None
    ids: torch.Tensor | None  # [N]
    tau: torch.Tensor  # [N]
    noise: Noise
    kind: str  # "logprobs", "kl" or "entropy"
    eps: float
    wants_support: bool
    backend: str


class _Statistic(NamedTuple, Generic[T]):
    value: T  # [N]


class _Kept(NamedTuple):
    rows: torch.Tensor  # [3 or 5, N], see `_Rows`
    support: Support


class _Rows(NamedTuple):
    """What is kept of each row."""

    value: torch.Tensor  # the statistic
    logit_max: torch.Tensor
    total: torch.Tensor  # sum(exp((l - logit_max) / tau))
    ref_max: torch.Tensor | None = None  # the same of the reference
    ref_total: torch.Tensor | None = None

    def at(self, rows: torch.Tensor) -> "_Rows":
        """Of some rows, as columns `[rows, 1]`."""
        value, logit_max, total, ref_max, ref_total = (None if x is None else x[rows, None] for x in self)
        assert value is not None
        assert logit_max is not None
        assert total is not None
        return _Rows(value, logit_max, total, ref_max, ref_total)


class _Gradients(NamedTuple, Generic[T]):
    head: PerHead[T]


def _kernel(call: _Call) -> tuple[_Statistic[torch.Tensor], _Kept]:
    backend, head, tau, ids = backends.get(call.backend), call.head.canonical(), call.tau, call.ids
    ref = None if call.ref is None else call.ref.canonical()
    if ids is not None and checks.reads_values(ids):
        checks.check_ids_values(ids, head.weight.shape[0])
    sums, support = backend.head_softmax(head, tau, call.noise, call.eps if call.wants_support else 0.0, ref)
    sums = Softmax(*(x.to(tau.dtype) for x in sums))  # a float64 reference does not widen a narrower policy's result
    if checks.reads_values(head.hidden):
        checks.check_head_rows(~(sums.logit_max.isfinite() & sums.total.isfinite()))
        if ref is not None:
            checks.check_head_rows(~(sums.ref_max.isfinite() & (sums.ref_total > 0)), "ref_")
    if call.kind == "logprobs":
        assert ids is not None
        rows = torch.arange(len(ids), device=ids.device)
        value = (backend.head_logits_at(head, rows, ids) - sums.logit_max) / tau - sums.total.log()
    elif call.kind == "entropy":
        value = sums.total.log() - sums.moment
    else:
        value = sums.moment - (sums.total.log() - sums.ref_total.log())
    parts = [value, sums.logit_max, sums.total, *(() if ref is None else (sums.ref_max, sums.ref_total))]
    return _Statistic(value.clone()), _Kept(torch.stack(parts), support)


def _fake(call: _Call) -> tuple[_Statistic[torch.Tensor], _Kept]:
    rows, parts = call.head.hidden.shape[0], 3 if call.ref is None else 5
    return _Statistic(call.tau.new_empty(rows)), _Kept(
        call.tau.new_empty(parts, rows), fake_support(rows, call.tau, call.wants_support)
    )


class _Options(TypedDict):
    bias: torch.Tensor | None
    logit_softcap: float | None
    temperature: torch.Tensor


def _by_reference(call: _Call) -> torch.Tensor:
    check_reference_rows(call.head)
    if call.ref is not None:
        check_reference_rows(call.ref, "ref_")
    hidden, weight, bias, softcap = call.head
    options = _Options(bias=bias, logit_softcap=softcap, temperature=call.tau[:, None])
    if call.ref is not None:
        ref = call.ref
        return reference.linear_kl(hidden, weight, ref.hidden, ref.weight, ref_bias=ref.bias, **options)
    if call.kind == "entropy":
        return reference.linear_entropy(hidden, weight, **options)
    assert call.ids is not None
    checks.check_for_reference(None, ids=call.ids, vocab_size=weight.shape[0])
    return reference.linear_logprobs(hidden, weight, call.ids, **options)


def _slope(kind: str, logp: torch.Tensor, logr: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """What p is multiplied by in the derivative of a statistic with respect to `l / tau`."""
    if kind == "logprobs":
        return -torch.ones_like(logp)
    if kind == "entropy":
        return -(logp + value)
    assert logr is not None
    return logp - logr - value


def _backward(
    call: _Call, kept: _Kept, arrived: _Statistic[torch.Tensor], wanted: _Gradients[bool]
) -> _Gradients[torch.Tensor | None]:
    backend, tau, ids, support = backends.get(call.backend), call.tau, call.ids, kept.support
    ref = None if call.ref is None else call.ref.canonical()
    gradients = HeadGradients(backend, call.head.canonical(), wanted.head)
    scale = arrived.value.to(tau.dtype) / tau
    of = _Rows(*kept.rows.unbind())
    rows = support.rows()
    logr = None
    if ref is not None and of.ref_max is not None and of.ref_total is not None:
        ref_logits = backend.head_logits_at(ref, rows, support.tokens)
        logr = (ref_logits - of.ref_max[rows]) / tau[rows] - of.ref_total.log()[rows]
    p = support.p
    values = scale[rows] * p.clamp_min(call.eps) * _slope(call.kind, p.log(), logr, of.value[rows])
    parts = [Entries(rows, support.tokens, values, support.offsets)]
    if ids is not None:
        # A masked token's own logit is a constant.
        sampled = torch.where(of.value == -torch.inf, 0.0, scale)
        parts.append(Entries(torch.arange(len(ids), device=ids.device), ids, sampled))
    gradients.add_entries(Entries.joined(parts))
    every = torch.arange(len(tau), device=tau.device)
    dense = every if call.eps == 0 else support.overflow.nonzero().squeeze(1)
    if len(dense):
        _add_dense(gradients, dense, call.kind, of, ref, tau, scale)
    return _Gradients(gradients.results(call.head.bias))


def _add_dense(
    gradients: HeadGradients,
    dense: torch.Tensor,
    kind: str,
    of: _Rows,
    ref: Head | None,
    tau: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """The exact gradient of the rows in `dense`, apart from the sampled token's own entry."""
    of = of.at(dense)
    tau, scale = tau[dense, None], scale[dense, None]
    ref_chunks = None if ref is None else gradients.backend.head_chunks(ref.rows(dense))

    def rule(columns: slice, logits: torch.Tensor) -> torch.Tensor:
        logp = (logits - of.logit_max) / tau - of.total.log()
        logr = None
        if ref_chunks is not None and of.ref_max is not None and of.ref_total is not None:
            logr = (next(ref_chunks)[1] - of.ref_max) / tau - of.ref_total.log()
        p = logp.exp()
        return torch.where(p > 0, scale * p * _slope(kind, logp, logr, of.value), 0.0)

    gradients.add_dense(dense, rule)


_linear_statistic = differentiable(
    "linear_statistic", _Call, _Statistic, _Kept, _Gradients,
    kernel=_kernel, fake=_fake, backward=_backward,
)  # fmt: skip


@answered_by(_by_reference)
def _statistic_of(call: _Call) -> torch.Tensor:
    return _linear_statistic(call).value
