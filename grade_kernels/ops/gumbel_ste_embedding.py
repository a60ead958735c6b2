"""`gumbel_ste_embedding`: sample a token and look it up, with a relaxation's gradient behind the lookup."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from grade_kernels import backends, reference
from grade_kernels.backends import Backend, GradientRule, Noise, Rows, Sample
from grade_kernels.backends.chunks import Scratch, column_chunks
from grade_kernels.dtypes import compute_dtype
from grade_kernels.estimators import RAO
from grade_kernels.noise import GumbelNoise, PosteriorNoise
from grade_kernels.ops import checks, tables
from grade_kernels.ops.differentiable import differentiable
from grade_kernels.ops.posterior import log_normaliser, looked_at, posterior_draw, sampled_rows
from grade_kernels.ops.registry import answered_by, public
from grade_kernels.ops.tables import Embedded
from grade_kernels.ops.transforms import FIRST_ORDER, check_order
from grade_kernels.reference import Embedding, GumbelSTEEmbedding, ignored_rows

__all__ = ["GumbelSTEEmbedding", "gumbel_ste_embedding"]

T = TypeVar("T")


@public
def gumbel_ste_embedding(
    logits: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    estimator: str = "ste",
    draws: int = 1,
    noise: GumbelNoise | PosteriorNoise | None = None,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
) -> GumbelSTEEmbedding[Embedding]:
    """Sample tokens from logits and return their embeddings, differentiable in logits and tables.

    The token is `ids = argmax(l + g)`, with one-hot O; `e = E[ids]`, and for `soft` `e = softmax((l + g) / tau) @ E`.
    Given the gradient `de`, let `dY = de @ E.T` (summed over the tables) and `J(p) x = p * (x - p . x)`. Backward is

    | estimator | gradient of the logits | source |
    |---|---|---|
    | `ste` | `J(softmax((l + g) / tau)) dY / tau` | GRADE-STE, arXiv 2601.11574; Jang et al. 2017 |
    | `soft` | the same | GRADE, arXiv 2601.11574 |
    | `st` | `J(softmax(l / tau)) dY / tau` | Bengio, Leonard, Courville 2013 |
    | `reinmax` | `2 J((O + softmax(l / tau)) / 2) dY - J(softmax(l)) dY / 2` | Liu et al. 2023 |
    | `gumbel_rao` | the mean of the `ste` rule over `draws` draws of g from its posterior given ids | Paulus et al. 2021 |

    plus that of `logprobs`. Tables receive `de` at the sampled rows (`soft`: `p.T @ de`). Under transforms of
    `torch.func` and for forward-mode and second derivatives, `grade_kernels.reference` serves the call; `reinmax`, a rule
    for the first derivative and no function's, has no second.

    Args:
        logits: `[..., V]`, float32, float64, bfloat16 or float16. -inf masks a token.
        embedding: a table `[V, D]`, or a tuple of tables, all of which are looked up. Dtypes may differ.
        tau: temperature: a positive number, or a tensor with one value for all rows or one per row, as in
            `gumbel_softmax`. A tensor receives its gradient (`reinmax` defines none, so there it is zero).
        estimator: a name of the table above.
        draws: M of `gumbel_rao`: its gradient has the mean of that of `ste` and a smaller variance. They are those of
            `GumbelNoise.given` for the same seed and row_ids, with words of their own, for whichever token is returned.
        noise: which noise to use. None draws a fresh seed from torch's default generator. Noise of given tokens
            (`GumbelNoise.given`) returns these.
        ids: int64 `[...]`: return these tokens instead of sampled ones, with the same noise in the relaxation. Tokens that
            other noise sampled belong into `GumbelNoise.given`, and need not be repeated here.
        ignore_index: rows of this id are ignored, as `torch.nn.functional.cross_entropy` does: embedding and logprobs
            are 0, no gradient comes of them, and the logits may be anything. None: every id must be a token's.

    Returns:
        `embedding` `[..., D]` in the table's dtype (a tuple for a tuple), `ids` int64 `[...]`, and
        `logprobs = log softmax(l)[ids]`, untempered, float32 (float64 for float64 logits), differentiable.

    Raises:
        TypeError: a tensor of a wrong type, tau that is no number, noise that is no GumbelNoise, draws or
            ignore_index that is no int.
        IndexError: 0-d logits.
        ValueError: an unknown estimator; more draws than it has; an empty vocabulary; a table that is not `[V, D]`; ids of
            a wrong shape or out of range; given tokens that are masked, or log-probabilities of them that are none;
            ignore_index without ids; tau not positive and finite or of a wrong shape; row_ids of the wrong length; tensors
            on different devices; on CPU a row of NaN, +inf or only -inf.
    """
    checks.check_logits(logits)
    checks.check_estimator(estimator, RAO)
    draws = checks.canonical_draws(draws, estimator)
    batch, vocab = logits.shape[:-1], logits.shape[-1]
    given = checks.check_tables(embedding, vocab, logits)
    rows = logits.reshape(-1, vocab)
    if ids is not None:
        checks.check_ids(ids, batch, logits)
    ids = checks.ids_once(ids, noise)
    ignored, safe_ids, open_logits = ignored_rows(ids, checks.canonical_ignore_index(ignore_index, ids), logits)
    if ignored is not None and ids is not None and safe_ids is not None:
        if isinstance(noise, PosteriorNoise):
            noise, safe_ids = noise.ignoring(ignored, safe_ids), None
        out = gumbel_ste_embedding(
            open_logits, embedding, tau, estimator=estimator, draws=draws, noise=noise, ids=safe_ids
        )
        return tables.without_ignored(out, ignored, ids)
    drawn = checks.canonical_noise(noise, rows.shape[0], logits.device, batch)
    row_tau = checks.canonical_tau(tau, logits.shape, logits.device, compute_dtype(logits.dtype))
    flat_ids = None if ids is None or drawn.posterior is not None else ids.reshape(-1)
    backend = backends.select(logits.device, logits.dtype)
    found = _draw_and_embed(_Draw(rows, list(given), row_tau, drawn, flat_ids, estimator, backend, draws))
    return tables.shaped(found, batch, embedding)


class _Draw(NamedTuple):
    logits: torch.Tensor  # [N, V]
    tables: list[torch.Tensor]  # [V, D]
    tau: torch.Tensor  # [N]
    noise: Noise
    ids: torch.Tensor | None  # [N]
    estimator: str
    backend: str
    draws: int  # of `gumbel_rao`


class _Kept(NamedTuple):
    score_max: torch.Tensor  # [N], as the other statistics of a `Sample`
    logit_max: torch.Tensor
    logit_sum: torch.Tensor
    total: torch.Tensor  # [N] with `soft`: the relaxation's normaliser; else empty


class _Gradients(NamedTuple, Generic[T]):
    logits: T
    tables: list[T]
    tau: T


def _kernel(draw: _Draw) -> tuple[Embedded[torch.Tensor], _Kept]:
    backend, logits, tau, ids = backends.get(draw.backend), draw.logits, draw.tau, draw.ids
    if checks.reads_values(tau):
        checks.check_tau_values(tau)
    if ids is not None and checks.reads_values(ids):
        checks.check_ids_values(ids, logits.shape[1])
    sample = sampled_rows(backend, Rows.of(logits, tau, draw.noise))
    ids = sample.ids if ids is None else ids.clone()
    chosen = logits.gather(1, ids[:, None]).squeeze(1).to(tau.dtype)
    if draw.estimator == RAO and checks.reads_values(chosen):
        checks.check_given_logits(chosen, "ids")
    # NaN in score_max marks a row without a distribution (GPU backends): all that is read off it is NaN.
    poison = sample.score_max - sample.score_max
    logprobs = (chosen - sample.logit_max) - sample.logit_sum.log() + poison
    total = tau.new_empty(0)
    if draw.estimator == "soft":
        embedded, total = _soft_lookup(draw, sample)
    else:
        embedded = tables.look_up(draw.tables, ids, poison)
    return Embedded(embedded, ids, logprobs), _Kept(*sample[1:], total)


def _soft_lookup(draw: _Draw, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax((l + g) / tau) @ [E_1 E_2 ...]` without a dense softmax, and the softmax's denominators."""
    backend, tau = backends.get(draw.backend), draw.tau
    logits, rows = draw.logits, Rows.of(draw.logits, tau, draw.noise.won_with(sample.score_max))
    total = torch.zeros_like(tau)
    sums = [torch.zeros(logits.shape[0], table.shape[1], dtype=tau.dtype, device=tau.device) for table in draw.tables]
    dtype = tables.weights_dtype(draw.tables, tau.dtype)
    for columns in backend.column_chunks(*logits.shape):
        weights, part = backend.softmax(rows.at(columns), sample.score_max, normalize=False, dtype=dtype)
        total += part
        for acc, table in zip(sums, draw.tables, strict=True):
            acc += backend.weighted_sum(weights.squeeze(2), table[columns])
    embedded = [(acc / total[:, None]).to(table.dtype) for acc, table in zip(sums, draw.tables, strict=True)]
    return tables.joined(embedded, draw.tables), total


def _fake(draw: _Draw) -> tuple[Embedded[torch.Tensor], _Kept]:
    rows = draw.logits.shape[0]

    def statistic() -> torch.Tensor:
        return draw.tau.new_empty(rows)

    ids, total = (
        draw.logits.new_empty(rows, dtype=torch.int64),
        draw.tau.new_empty(rows if draw.estimator == "soft" else 0),
    )
    found = Embedded(tables.empty(rows, draw.tables), ids, statistic())
    return found, _Kept(statistic(), statistic(), statistic(), total)


def _by_reference(draw: _Draw) -> GumbelSTEEmbedding[tuple[torch.Tensor, ...]]:
    check_order(draw.estimator)
    noise = looked_at(draw.noise, draw.ids, draw.estimator)
    checks.check_for_reference(draw.logits.detach(), draw.tau, draw.ids, draw.logits.shape[1], noise=noise)
    return _reference_of(draw)


def _reference_of(draw: _Draw) -> GumbelSTEEmbedding[tuple[torch.Tensor, ...]]:
    return reference.gumbel_ste_embedding(
        draw.logits, tuple(draw.tables), draw.tau.unsqueeze(-1),
        estimator=draw.estimator, noise=draw.noise.public_of(draw.tau.shape), ids=draw.ids, draws=draw.draws,
    )  # fmt: skip


def _again(draw: _Draw, found: Embedded[torch.Tensor | None]) -> Embedded[torch.Tensor]:
    """The results of the tokens that were found, as functions that can be differentiated more than once."""
    if draw.estimator == "reinmax":
        # Its gradient is no function's derivative, so the reference has no graph behind it, either.
        raise NotImplementedError(FIRST_ORDER)
    embedding, ids, logprobs = _reference_of(draw._replace(ids=found.ids))
    return Embedded(tables.joined(embedding, draw.tables), ids, logprobs)


def _backward(
    draw: _Draw, kept: _Kept, arrived: Embedded[torch.Tensor | None], wanted: _Gradients[bool]
) -> _Gradients[torch.Tensor | None]:
    backend, logits, tau = backends.get(draw.backend), draw.logits, draw.tau
    rows = Rows.of(logits, tau, draw.noise.won_with(kept.score_max))
    upstream = tables.upstream(arrived.embedded, len(logits), draw.tables)
    dlogits = dtau = None
    if wanted.logits or wanted.tau:
        dlogits = _product_of_all(backend, upstream, draw)
        rule = GradientRule(draw.estimator, arrived.logprobs, wanted.tau)
        sample = Sample(arrived.ids, *kept[:3])
        if draw.estimator == RAO:
            dlogits, dtau = _mean_over_draws(backend, dlogits, rows, sample, rule, draw.draws)
        else:
            dy = dlogits.unsqueeze(2)
            dtau = backend.softmax_backward(dy, rows, sample, rule, dy)
    dtables: list[torch.Tensor | None] = []
    for part, table, needed in zip(upstream, draw.tables, wanted.tables, strict=True):
        if not needed:
            dtables.append(None)
        elif draw.estimator != "soft":
            dtables.append(tables.scatter_rows(part, arrived.ids, table))
        else:
            dtable = torch.empty(table.shape, dtype=table.dtype, device=table.device)
            for columns in backend.column_chunks(*logits.shape):
                weights, _ = backend.softmax(rows.at(columns), kept.score_max, normalize=False, dtype=tau.dtype)
                dtable[columns] = (weights.squeeze(2) / kept.total[:, None]).to(table.dtype).T @ part
            dtables.append(dtable)
    return _Gradients(dlogits, dtables, dtau)


def _mean_over_draws(
    backend: Backend, dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of logits and of tau by the rule `ste`, averaged over draws of posterior noise."""
    # A masked token's noise is NaN.
    chosen = rows.logits.squeeze(2).gather(1, sample.ids[:, None]).squeeze(1).to(rows.tau.dtype)
    normaliser = log_normaliser(sample.logit_max, sample.logit_sum, chosen)
    total, dtau = torch.zeros_like(dy, dtype=rows.tau.dtype), torch.zeros_like(rows.tau)
    dlogprobs = None if rule.dlogprobs is None else rule.dlogprobs * draws  # it comes once
    for m in range(draws):
        noise = posterior_draw(rows.noise, sample.ids, m, normaliser)
        assert noise.posterior is not None
        assert noise.posterior.score_max is not None
        drawn, found = rows._replace(noise=noise), torch.empty_like(dy)
        one = GradientRule("ste", dlogprobs if m == 0 else None, rule.needs_dtau)
        of = sample._replace(score_max=noise.posterior.score_max)
        dtau += backend.softmax_backward(dy.unsqueeze(2), drawn, of, one, found.unsqueeze(2))
        total += found
    return (total / draws).to(dy.dtype), dtau / draws


def _product_of_all(backend: Backend, upstream: Sequence[torch.Tensor], draw: _Draw) -> torch.Tensor:
    """`dY`, the sum of `de @ E.T` over the tables, written where its product, the gradient of the logits, belongs."""
    logits = draw.logits
    dy = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backend.product(upstream[0], draw.tables[0], dy)
    scratch = Scratch(logits.shape[0], draw.tau.dtype, draw.tau.device)
    for part, table in zip(upstream[1:], draw.tables[1:], strict=True):
        for columns in column_chunks(logits.shape[0], logits.shape[1], backend.sizes.product):
            place = None if part.dtype == logits.dtype else scratch(columns.stop - columns.start)
            dy[:, columns] += backend.product(part, table[columns], place)
    return dy


_gumbel_ste_embedding = differentiable(
    "gumbel_ste_embedding", _Draw, Embedded, _Kept, _Gradients,
    kernel=_kernel, fake=_fake, backward=_backward, unsaved=("ids",), reference=_again,
)  # fmt: skip


@answered_by(_by_reference)
def _draw_and_embed(draw: _Draw) -> GumbelSTEEmbedding[tuple[torch.Tensor, ...]]:
    found = _gumbel_ste_embedding(draw)
    return GumbelSTEEmbedding(tables.split(found.embedded, draw.tables), found.ids, found.logprobs)
