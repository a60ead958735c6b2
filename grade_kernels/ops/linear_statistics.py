"""`linear_logprobs`, `linear_kl` and `linear_entropy`: statistics of a head's distribution, without its logits."""

from __future__ import annotations

from typing import Any

import torch

from grade_kernels import backends, reference
from grade_kernels.backends import Head, Softmax, Support
from grade_kernels.backends.torch.head import head_chunks
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.head import (
    Entries,
    HeadGradients,
    canonical_eps,
    check_head,
    check_reference_rows,
    fake_gradients,
    make_head,
    needs_graph,
    row_of_entries,
    select_backend,
)
from grade_kernels.ops.registry import define, once_differentiable, public, wanted_gradients
from grade_kernels.ops.transforms import serving, without_wrappers
from grade_kernels.reference import ignored_rows

__all__ = ["linear_entropy", "linear_kl", "linear_logprobs"]


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
            `min(1, p / eps)`, which leaves the gradient unbiased. 0 visits every token, exactly.
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
    ref: tuple[Any, Any, Any] | None = None,
) -> torch.Tensor:
    hidden, lm_head, bias = check_head(hidden, lm_head, bias, logit_softcap)
    eps = canonical_eps(eps)
    compute = checks.compute_dtype(hidden.dtype)
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
    backend = select_backend(serving(backends.select(hidden.device, hidden.dtype), hidden, lm_head, bias), hidden.dtype)
    num_rows = hidden.numel() // hidden.shape[-1]
    if backend == "reference":
        if noise is not None:  # nothing is drawn there, but what is wrong stays wrong
            checks.canonical_noise(noise, num_rows, hidden.device)
        check_reference_rows(hidden, lm_head, bias, logit_softcap)
        if ref_hidden is not None and ref_lm_head is not None:
            check_reference_rows(ref_hidden, ref_lm_head, ref_bias, logit_softcap, "ref_")
        options: dict[str, Any] = {"bias": bias, "logit_softcap": logit_softcap, "temperature": temperature}
        if ref_hidden is not None and ref_lm_head is not None:
            return reference.linear_kl(hidden, lm_head, ref_hidden, ref_lm_head, ref_bias=ref_bias, **options)
        if kind == "entropy":
            return reference.linear_entropy(hidden, lm_head, **options)
        assert ids is not None
        if checks.reads_values_here(ids):
            checks.check_ids_values(without_wrappers(ids.reshape(-1)), lm_head.shape[0])
        return reference.linear_logprobs(hidden, lm_head, ids, **options)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if ref_hidden is not None and ref_lm_head is not None:
        ref_hidden = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
        ref_lm_head, ref_bias = ref_lm_head.detach(), None if ref_bias is None else ref_bias.detach()
    tau = torch.full((rows.shape[0],), temperature, dtype=compute, device=hidden.device)
    collect = eps > 0 and needs_graph(hidden, lm_head, bias)
    if noise is None and eps == 0:  # nothing is drawn, not even a seed
        noise = GumbelNoise(0)
    # Else without a graph, too: a reentrant checkpoint's first forward must leave the generator as its second one will.
    seed, row_ids, vocab_start = checks.canonical_noise(noise, num_rows, hidden.device)
    flat_ids = None if ids is None else ids.reshape(-1)
    value = _linear_statistic(
        rows, lm_head, bias, logit_softcap, ref_hidden, ref_lm_head, ref_bias, flat_ids, tau, seed,
        row_ids, vocab_start, kind, eps, collect, backend,
    )[0]  # fmt: skip
    return value.view(batch)


def _kernel(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    ref_hidden: torch.Tensor | None,
    ref_lm_head: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    kind: str,
    eps: float,
    collect: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    implementation = backends.module(backend)
    head = make_head(hidden, lm_head, bias, softcap)
    if ids is not None and checks.reads_values(ids):
        checks.check_ids_values(ids, lm_head.shape[0])
    ref = None
    if ref_hidden is not None and ref_lm_head is not None:
        ref = make_head(ref_hidden, ref_lm_head, ref_bias, softcap)
    sums, support = implementation.head_softmax(head, tau, seed, row_ids, vocab_start, eps if collect else 0.0, ref)
    sums = Softmax(*(x.to(tau.dtype) for x in sums))  # a float64 reference does not widen a narrower policy's result
    if checks.reads_values(hidden):
        checks.check_head_rows(~(sums.logit_max.isfinite() & sums.total.isfinite()))
        if ref is not None:
            checks.check_head_rows(~(sums.ref_max.isfinite() & (sums.ref_total > 0)), "ref_")
    if kind == "logprobs":
        assert ids is not None
        rows = torch.arange(len(ids), device=ids.device)
        chosen = implementation.head_logits_at(head, rows, ids)
        value = (chosen - sums.logit_max) / tau - sums.total.log()
    elif kind == "entropy":
        value = sums.total.log() - sums.moment
    else:
        value = sums.moment - (sums.total.log() - sums.ref_total.log())
    statistics = torch.stack([value, sums.logit_max, sums.total])
    if ref is not None:
        statistics = torch.cat([statistics, torch.stack([sums.ref_max, sums.ref_total])])
    return value.clone(), statistics, support.offsets, support.tokens, support.p, support.overflow


def _fake(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    ref_hidden: torch.Tensor | None,
    ref_lm_head: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    kind: str,
    eps: float,
    collect: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    rows = hidden.shape[0]
    entries = torch.library.get_ctx().new_dynamic_size() if collect else 0
    return (
        tau.new_empty(rows),
        tau.new_empty(3 if ref_hidden is None else 5, rows),
        tau.new_empty(rows + 1, dtype=torch.int64),
        tau.new_empty(entries, dtype=torch.int64),
        tau.new_empty(entries),
        tau.new_empty(rows, dtype=torch.bool),
    )


def _slope(kind: str, logp: torch.Tensor, logr: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """What p is multiplied by in the derivative of a statistic with respect to `l / tau`."""
    if kind == "logprobs":
        return -torch.ones_like(logp)
    if kind == "entropy":
        return -(logp + value)
    assert logr is not None
    return logp - logr - value


def _backward_kernel(
    dvalue: torch.Tensor,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    ref_hidden: torch.Tensor | None,
    ref_lm_head: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    tau: torch.Tensor,
    statistics: torch.Tensor,
    offsets: torch.Tensor,
    tokens: torch.Tensor,
    p: torch.Tensor,
    overflow: torch.Tensor,
    kind: str,
    eps: float,
    needs: list[bool],
    backend: str,
) -> list[torch.Tensor]:
    implementation = backends.module(backend)
    head = make_head(hidden, lm_head, bias, softcap)
    ref = None
    if ref_hidden is not None and ref_lm_head is not None:
        ref = make_head(ref_hidden, ref_lm_head, ref_bias, softcap)
    gradients = HeadGradients(implementation, head, (needs[0], needs[1], needs[2]))
    scale = dvalue.to(tau.dtype) / tau
    value, logit_max, total, *ref_statistics = statistics.unbind()
    support = Support(offsets, tokens, p, overflow)
    rows = row_of_entries(support)
    logr = None
    if ref is not None:
        ref_max, ref_total = ref_statistics
        logr = (implementation.head_logits_at(ref, rows, tokens) - ref_max[rows]) / tau[rows] - ref_total.log()[rows]
    values = scale[rows] * p.clamp_min(eps) * _slope(kind, p.log(), logr, value[rows])
    parts = [Entries(rows, tokens, values, offsets)]
    if ids is not None:
        # A masked token's own logit is a constant.
        parts.append(
            Entries(torch.arange(len(ids), device=ids.device), ids, torch.where(value == -torch.inf, 0.0, scale))
        )
    gradients.add_entries(Entries.joined(parts))
    dense = torch.arange(len(tau), device=tau.device) if eps == 0 else overflow.nonzero().squeeze(1)
    if len(dense):
        _add_dense(
            gradients,
            dense,
            Softmax(logit_max, total, value, *(ref_statistics or (value, value))),
            ref,
            tau,
            scale,
            kind,
        )
    return gradients.results(bias)


def _add_dense(
    gradients: HeadGradients,
    dense: torch.Tensor,
    sums: Softmax,
    ref: Head | None,
    tau: torch.Tensor,
    scale: torch.Tensor,
    kind: str,
) -> None:
    """The exact gradient of the rows in `dense`, apart from the sampled token's own entry."""
    sums = Softmax(*(x[dense, None] for x in sums))
    tau, scale = tau[dense, None], scale[dense, None]
    ref_chunks = None
    if ref is not None:
        ref_chunks = head_chunks(ref._replace(hidden=ref.hidden[dense]), gradients.implementation.product)

    def rule(columns: slice, logits: torch.Tensor) -> torch.Tensor:
        logp = (logits - sums.logit_max) / tau - sums.total.log()
        logr = None
        if ref_chunks is not None:
            logr = (next(ref_chunks)[1] - sums.ref_max) / tau - sums.ref_total.log()
        p = logp.exp()
        return torch.where(p > 0, scale * p * _slope(kind, logp, logr, sums.moment), 0.0)

    gradients.add_dense(dense, rule)


def _backward_fake(
    dvalue: torch.Tensor,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    ref_hidden: torch.Tensor | None,
    ref_lm_head: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    tau: torch.Tensor,
    statistics: torch.Tensor,
    offsets: torch.Tensor,
    tokens: torch.Tensor,
    p: torch.Tensor,
    overflow: torch.Tensor,
    kind: str,
    eps: float,
    needs: list[bool],
    backend: str,
) -> list[torch.Tensor]:
    return fake_gradients(hidden, lm_head, bias, needs)


_linear_statistic = define(
    "linear_statistic(Tensor hidden, Tensor lm_head, Tensor? bias, float? softcap, Tensor? ref_hidden, "
    "Tensor? ref_lm_head, Tensor? ref_bias, Tensor? ids, Tensor tau, Tensor seed, Tensor? row_ids, "
    "SymInt vocab_start, str kind, float eps, bool collect, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
_linear_statistic_backward = define(
    "linear_statistic_backward(Tensor dvalue, Tensor hidden, Tensor lm_head, Tensor? bias, float? softcap, "
    "Tensor? ref_hidden, Tensor? ref_lm_head, Tensor? ref_bias, Tensor? ids, Tensor tau, Tensor statistics, "
    "Tensor offsets, Tensor tokens, Tensor p, Tensor overflow, str kind, float eps, bool[] needs, str backend) "
    "-> Tensor[]",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, lm_head, bias, ctx.softcap, *ref, ids, tau, _, _, _, ctx.kind, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, lm_head, bias, *ref, ids, tau, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dvalue: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dvalue is None:
        return (None,) * 16
    hidden, lm_head, bias, *rest = ctx.saved_tensors
    needs = wanted_gradients(ctx, [hidden, lm_head, bias], [*ctx.needs_input_grad[:3]])
    gradients = _linear_statistic_backward(
        dvalue, hidden, lm_head, bias, ctx.softcap, *rest, ctx.kind, ctx.eps, needs, ctx.backend
    )
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * 13


torch.library.register_autograd("grade_kernels::linear_statistic", _backward, setup_context=_setup_context)
once_differentiable("linear_statistic_backward")
