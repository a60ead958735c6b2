"""`gumbel_ste_embedding`: sample a token and look it up, with a relaxation's gradient behind the lookup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grade_kernels import backends, reference
from grade_kernels.backends.torch.head import PRODUCT_ELEMENTS, Scratch
from grade_kernels.backends.torch.rows import column_chunks
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.registry import define, once_differentiable, public, wanted_gradients
from grade_kernels.ops.transforms import (
    FIRST_ORDER,
    check_order,
    differentiable_gradients,
    records_gradients,
    serving,
    without_wrappers,
)
from grade_kernels.reference import Embedding, GumbelSTEEmbedding, ignored_rows

__all__ = ["GumbelSTEEmbedding", "gumbel_ste_embedding"]


@public
def gumbel_ste_embedding(
    logits: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    estimator: str = "ste",
    noise: GumbelNoise | None = None,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
) -> GumbelSTEEmbedding[Embedding]:
    """Sample tokens from logits and return their embeddings, differentiable in logits and tables.

    The token is `ids = argmax(l + g)`, with one-hot D; `e = E[ids]`, and for `soft` `e = softmax((l + g) / tau) @ E`.
    Given the gradient `de`, let `dY = de @ E.T` (summed over the tables) and `J(p) x = p * (x - p . x)`. Backward is

    | estimator | gradient of the logits | source |
    |---|---|---|
    | `ste` | `J(softmax((l + g) / tau)) dY / tau` | GRADE-STE, arXiv 2601.11574; Jang et al. 2017 |
    | `soft` | the same | GRADE, arXiv 2601.11574 |
    | `st` | `J(softmax(l / tau)) dY / tau` | Bengio, Leonard, Courville 2013 |
    | `reinmax` | `2 J((D + softmax(l / tau)) / 2) dY - J(softmax(l)) dY / 2` | Liu et al. 2023 |

    plus that of `logprobs`. Tables receive `de` at the sampled rows (`soft`: `p.T @ de`). Under transforms of
    `torch.func` and for forward-mode and second derivatives, `grade_kernels.reference` serves the call; `reinmax`, a rule
    for the first derivative and no function's, has no second.

    Args:
        logits: `[..., V]`, float32, float64, bfloat16 or float16. -inf masks a token.
        embedding: a table `[V, D]`, or a tuple of tables, all of which are looked up. Dtypes may differ.
        tau: temperature: a positive number, or a tensor with one value for all rows or one per row, as in
            `gumbel_softmax`. A tensor receives its gradient (`reinmax` defines none, so there it is zero).
        estimator: a name of the table above.
        noise: which noise to use. None draws a fresh seed from torch's default generator.
        ids: int64 `[...]`: return these tokens instead of sampled ones, with the same noise in the relaxation.
        ignore_index: rows of this id are ignored, as `torch.nn.functional.cross_entropy` does: embedding and logprobs
            are 0, no gradient comes of them, and the logits may be anything. None: every id must be a token's.

    Returns:
        `embedding` `[..., D]` in the table's dtype (a tuple for a tuple), `ids` int64 `[...]`, and
        `logprobs = log softmax(l)[ids]`, untempered, float32 (float64 for float64 logits), differentiable.

    Raises:
        TypeError: a tensor of a wrong type, tau that is no number, noise that is no GumbelNoise, ignore_index that is no
            int.
        IndexError: 0-d logits.
        ValueError: an unknown estimator; an empty vocabulary; a table that is not `[V, D]`; ids of a wrong shape or out
            of range; ignore_index without ids; tau not positive and finite or of a wrong shape; row_ids of the wrong
            length; tensors on different devices; on CPU a row of NaN, +inf or only -inf.
    """
    checks.check_logits(logits)
    checks.check_estimator(estimator)
    batch, vocab = logits.shape[:-1], logits.shape[-1]
    tables = checks.check_tables(embedding, vocab, logits)
    rows = logits.reshape(-1, vocab)
    if ids is not None:
        checks.check_ids(ids, batch, logits)
    ignored, safe_ids, open_logits = ignored_rows(ids, checks.canonical_ignore_index(ignore_index, ids), logits)
    if ignored is not None and ids is not None:
        out = gumbel_ste_embedding(open_logits, embedding, tau, estimator=estimator, noise=noise, ids=safe_ids)
        return GumbelSTEEmbedding(*without_ignored(*out, ignored, ids))
    seed, row_ids, vocab_start = checks.canonical_noise(noise, rows.shape[0], logits.device)
    row_tau = checks.canonical_tau(tau, logits.shape, logits.device, checks.compute_dtype(logits.dtype))
    backend = serving(backends.select(logits.device, logits.dtype), logits, row_tau, tables)
    several = isinstance(embedding, (tuple, list))
    if backend == "reference":
        if checks.reads_values_here(rows):
            rows = without_wrappers(rows)
            checks.check_rows(rows, checks.bad_rows(rows))
            checks.check_tau_values(without_wrappers(row_tau))
            if ids is not None:
                checks.check_ids_values(without_wrappers(ids.reshape(-1)), vocab)
        noise = GumbelNoise(seed, row_ids, vocab_start=vocab_start)
        given: Any = tables if several else tables[0]
        check_order(estimator)
        kept_tau = row_tau.view(batch).unsqueeze(-1)
        return reference.gumbel_ste_embedding(logits, given, kept_tau, estimator=estimator, noise=noise, ids=ids)
    flat_ids = None if ids is None else ids.reshape(-1)
    embedded, out_ids, logprobs = _gumbel_ste_embedding(
        rows, tables, row_tau, seed, row_ids, vocab_start, flat_ids, estimator, backend
    )[:3]
    parts = per_table(embedded, tables, batch)
    result: Any = parts if several else parts[0]
    return GumbelSTEEmbedding(result, out_ids.view(batch), logprobs.view(batch))


def per_table(embedded: torch.Tensor, tables: Sequence[torch.Tensor], batch: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Embeddings of all tables, side by side in `[N, ...]`, as a contiguous tensor `[..., D]` for each, in its dtype."""
    widths = [table.shape[1] for table in tables]
    return tuple(
        part.to(table.dtype).contiguous().view(*batch, table.shape[1])
        for part, table in zip(embedded.split(widths, dim=1), tables, strict=True)
    )


def without_ignored(
    embedding: Any, _: torch.Tensor, logprobs: torch.Tensor, ignored: torch.Tensor, ids: torch.Tensor
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A result with zeros in the ignored rows, where it has the ids that were given."""
    several = isinstance(embedding, tuple)
    parts = tuple(torch.where(ignored.unsqueeze(-1), 0.0, e) for e in (embedding if several else (embedding,)))
    return parts if several else parts[0], ids.clone(), torch.where(ignored, 0.0, logprobs)


def joint_dtype(tables: list[torch.Tensor]) -> torch.dtype:
    """The dtype that holds every table's values exactly, so that one tensor can carry all embeddings."""
    dtype = tables[0].dtype
    for table in tables[1:]:
        dtype = torch.promote_types(dtype, table.dtype)
    return dtype


def weights_dtype(tables: list[torch.Tensor], compute: torch.dtype) -> torch.dtype:
    """The dtype of the weights that tables are to be multiplied by: their own where it has 16 bits, less to read."""
    dtype = joint_dtype(tables)
    return dtype if dtype.itemsize == 2 and compute == torch.float32 else compute


def _kernel(
    logits: torch.Tensor,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor | None,
    estimator: str,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    implementation = backends.module(backend)
    if checks.reads_values(tau):
        checks.check_tau_values(tau)
    if ids is not None and checks.reads_values(ids):
        checks.check_ids_values(ids, logits.shape[1])
    sample = implementation.sample(logits, seed, row_ids, vocab_start, True)
    if checks.reads_values(logits):
        checks.check_rows(logits, (sample.ids < 0) | sample.score_max.isnan())
    ids = sample.ids if ids is None else ids.clone()
    chosen = logits.gather(1, ids[:, None]).squeeze(1).to(tau.dtype)
    # NaN in score_max marks a row without a distribution (GPU backends): all that is read off it is NaN.
    poison = sample.score_max - sample.score_max
    logprobs = (chosen - sample.logit_max) - sample.logit_sum.log() + poison
    total = tau.new_empty(0)
    if estimator == "soft":
        embedded, total = _soft_lookup(implementation, logits, tables, tau, seed, row_ids, vocab_start, sample)
    else:
        embedded = torch.cat([table[ids].to(joint_dtype(tables)) for table in tables], dim=1)
        if logits.device.type != "cpu":
            embedded = embedded + poison.to(embedded.dtype)[:, None]
    return embedded, ids, logprobs, sample.score_max, sample.logit_max, sample.logit_sum, total


def _soft_lookup(
    implementation: Any,
    logits: torch.Tensor,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    sample: backends.Sample,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax((l + g) / tau) @ [E_1 E_2 ...]` without a dense softmax, and the softmax's denominators."""
    total = torch.zeros_like(tau)
    sums = [torch.zeros(logits.shape[0], table.shape[1], dtype=tau.dtype, device=tau.device) for table in tables]
    dtype = weights_dtype(tables, tau.dtype)
    for columns in column_chunks(*logits.shape):
        weights, part = implementation.softmax(
            logits[:, columns], tau, seed, row_ids, vocab_start + columns.start, sample.score_max, False, dtype
        )
        total += part
        for acc, table in zip(sums, tables, strict=True):
            acc += implementation.weighted_sum(weights, table[columns])
    embedded = [(acc / total[:, None]).to(table.dtype) for acc, table in zip(sums, tables, strict=True)]
    return torch.cat([part.to(joint_dtype(tables)) for part in embedded], dim=1), total


def _fake(
    logits: torch.Tensor,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor | None,
    estimator: str,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    rows = logits.shape[0]
    embedded = logits.new_empty(rows, sum(table.shape[1] for table in tables), dtype=joint_dtype(tables))
    total = tau.new_empty(rows if estimator == "soft" else 0)
    return embedded, logits.new_empty(rows, dtype=torch.int64), *(tau.new_empty(rows) for _ in range(4)), total


def _backward_kernel(
    dembedded: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    logits: torch.Tensor,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor,
    statistics: list[torch.Tensor],
    estimator: str,
    needs: list[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    implementation = backends.module(backend)
    score_max, logit_max, logit_sum, total = statistics
    widths = [table.shape[1] for table in tables]
    upstream = [part.to(table.dtype) for part, table in zip(dembedded.split(widths, dim=1), tables, strict=True)]
    needs_dlogits, needs_dtau, *needs_tables = needs
    dlogits, dtau = logits.new_empty(0), tau.new_empty(0)
    if needs_dlogits or needs_dtau:
        # dY is written where its product, the gradient of the logits, belongs.
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        implementation.product(upstream[0], tables[0], dlogits)
        scratch = Scratch(logits.shape[0], tau.dtype, tau.device)
        for part, table in zip(upstream[1:], tables[1:], strict=True):
            for columns in column_chunks(logits.shape[0], logits.shape[1], PRODUCT_ELEMENTS):
                place = None if part.dtype == logits.dtype else scratch(columns.stop - columns.start)
                dlogits[:, columns] += implementation.product(part, table[columns], place)
        sample = backends.Sample(ids, score_max, logit_max, logit_sum)
        dtau = implementation.softmax_backward(
            dlogits, logits, tau, seed, row_ids, vocab_start, estimator, sample, dlogprobs, needs_dtau, dlogits
        )
    dtables = []
    for part, table, needed in zip(upstream, tables, needs_tables, strict=True):
        if not needed:
            dtables.append(table.new_empty(0))
        elif estimator != "soft":
            dtables.append(scatter_rows(part, ids, table))
        else:
            dtable = torch.empty_like(table)
            for columns in column_chunks(*logits.shape):
                weights, _ = implementation.softmax(
                    logits[:, columns], tau, seed, row_ids, vocab_start + columns.start, score_max, False, tau.dtype
                )
                dtable[columns] = (weights / total[:, None]).to(table.dtype).T @ part
            dtables.append(dtable)
    return dlogits, dtau, dtables


def scatter_rows(values: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Gradient of `table[ids]`: values summed by id, deterministically and in at least float32, in table's dtype."""
    add = torch.ops.aten.embedding_dense_backward
    if values.dtype in (torch.float32, torch.float64):
        return add(values, ids, table.shape[0], -1, False)
    # Narrow dtypes would lose repeated ids in the sum, so compact the ids and sum in float32 first.
    order = ids.argsort(stable=True)
    ids = ids[order]
    segment = torch.zeros_like(ids)
    segment[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    sums = add(values[order].float(), segment, ids.numel(), -1, False)
    out = torch.zeros_like(table)
    out[ids] = sums[segment].to(table.dtype)  # repeated ids write the same value
    return out


def _backward_fake(
    dembedded: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    logits: torch.Tensor,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor,
    statistics: list[torch.Tensor],
    estimator: str,
    needs: list[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    dense = needs[0] or needs[1]
    return (
        torch.empty(logits.shape if dense else (0,), dtype=logits.dtype, device=logits.device),
        tau.new_empty(tau.shape if dense else (0,)),
        [torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip(tables, needs[2:], strict=True)],
    )


_gumbel_ste_embedding = define(
    "gumbel_ste_embedding(Tensor logits, Tensor[] tables, Tensor tau, Tensor seed, Tensor? row_ids, "
    "SymInt vocab_start, Tensor? ids, str estimator, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
_gumbel_ste_embedding_backward = define(
    "gumbel_ste_embedding_backward(Tensor dembedded, Tensor? dlogprobs, Tensor logits, Tensor[] tables, Tensor tau, "
    "Tensor seed, Tensor? row_ids, SymInt vocab_start, Tensor ids, Tensor[] statistics, str estimator, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor[])",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, tables, tau, seed, row_ids, ctx.vocab_start, _, ctx.estimator, ctx.backend = inputs
    ctx.save_for_backward(logits, tau, seed, row_ids, *output[1:2], *output[3:], *tables)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dembedded: torch.Tensor | None, *rest: torch.Tensor | None) -> tuple[Any, ...]:
    logits, tau, seed, row_ids, ids, score_max, logit_max, logit_sum, total, *tables = ctx.saved_tensors
    dlogprobs = rest[1]
    if dembedded is None and dlogprobs is None:
        return None, [None] * len(tables), *(None,) * 7
    if dembedded is None:
        width = sum(table.shape[1] for table in tables)
        dembedded = torch.zeros(logits.shape[0], width, dtype=joint_dtype(tables), device=logits.device)
    needed = ctx.needs_input_grad
    if records_gradients():
        flags = [needed[0], needed[2], *needed[1]]
        noise = GumbelNoise(seed, row_ids, vocab_start=ctx.vocab_start)
        found = _differentiable(dembedded, dlogprobs, logits, tables, tau, noise, ids, ctx.estimator, flags)
        return found[0], found[2:], found[1], *(None,) * 6
    first, *others, needs_tau = wanted_gradients(ctx, [logits, *tables, tau], [needed[0], *needed[1], needed[2]])
    needs = [first, needs_tau, *others]
    dlogits, dtau, dtables = _gumbel_ste_embedding_backward(
        dembedded, dlogprobs, logits, tables, tau, seed, row_ids, ctx.vocab_start, ids,
        [score_max, logit_max, logit_sum, total], ctx.estimator, needs, ctx.backend,
    )  # fmt: skip
    return (
        dlogits if needs[0] else None,
        [dtable if needed else None for dtable, needed in zip(dtables, needs[2:], strict=True)],
        dtau if needs[1] else None,
        *(None,) * 6,
    )


def _differentiable(
    dembedded: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    logits: torch.Tensor,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    noise: GumbelNoise,
    ids: torch.Tensor,
    estimator: str,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """Gradients of logits, tau and tables that can be differentiated again."""
    if estimator == "reinmax":
        # Its gradient is no function's derivative, so the reference has no graph behind it, either.
        raise NotImplementedError(FIRST_ORDER)

    def forward(logits: torch.Tensor, tau: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = reference.gumbel_ste_embedding(
            logits, tables, tau.unsqueeze(-1), estimator=estimator, noise=noise, ids=ids
        )
        return *out.embedding, out.logprobs

    upstream = [
        part.to(table.dtype)
        for part, table in zip(dembedded.split([table.shape[1] for table in tables], dim=1), tables, strict=True)
    ]
    return differentiable_gradients(forward, (logits, tau, *tables), needs, (*upstream, dlogprobs))


torch.library.register_autograd("grade_kernels::gumbel_ste_embedding", _backward, setup_context=_setup_context)
once_differentiable("gumbel_ste_embedding_backward")
