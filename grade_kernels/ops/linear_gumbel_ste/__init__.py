"""`linear_gumbel_ste`: sample through the LM head and embed the sample, with a backward that never sees the logits.

Which passes over the vocabulary run follows from the estimator, from eps, and from whether a graph is wanted:

| estimator | no graph | graph, eps > 0 | graph, eps = 0 |
|---|---|---|---|
| `ste` | `head_sample` | `head_scores`: sample, normaliser and support | `head_scores` |
| `st` | `head_sample` | `head_sample`, `head_softmax` at tau for the support | `head_scores` |
| `reinmax` | `head_sample` | as `st`, and `head_softmax` at 1 for the support of softmax(l) | `head_scores` |
| `soft` | the lookup | the lookup; backward takes `head_scores` for the support | the lookup |
| `gumbel_rao` | `head_sample` | `head_sample`, and `head_scores` for the support of each draw | `head_scores` |

Backward is sparse (`sparse`) where eps > 0: it visits the tokens of the support, and takes `head_softmax` at 1 for the
gradient of the log-probabilities, unless that support was kept. Rows whose support overflowed, and all rows where
eps = 0, take the dense backward (`dense`): one or two rounds over the vocabulary, chunk by chunk. It repeats the
product of the forward pass, and with eps = 0 only `head_scores` promises the rounding of that very product: `head_sample`
of few rows may use another one.

With noise of given tokens nothing is sampled. In the place of `head_sample`, and before all else where the tokens'
log-probabilities are not known, `head_softmax` at 1 without support finds the logits' log-sum-exp. `head_scores` is for
`ste` alone, and is told the tokens' scores.
"""

from __future__ import annotations

import torch

from grade_kernels import backends
from grade_kernels.backends import Head
from grade_kernels.dtypes import compute_dtype
from grade_kernels.estimators import RAO
from grade_kernels.noise import GumbelNoise, PosteriorNoise
from grade_kernels.ops import checks, tables
from grade_kernels.ops.differentiable import differentiable
from grade_kernels.ops.head import canonical_eps, check_head, needs_graph
from grade_kernels.ops.linear_gumbel_ste import forward
from grade_kernels.ops.linear_gumbel_ste.records import Draw, Gradients, Kept
from grade_kernels.ops.registry import answered_by, public
from grade_kernels.ops.tables import Embedded
from grade_kernels.reference import Embedding, GumbelSTEEmbedding, ignored_rows

__all__ = ["LinearGumbelSTE", "linear_gumbel_ste"]


LinearGumbelSTE = GumbelSTEEmbedding  # one result for both: embedding, ids, logprobs


@public
def linear_gumbel_ste(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    estimator: str = "ste",
    draws: int = 1,
    noise: GumbelNoise | PosteriorNoise | None = None,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
    eps: float = 2**-11,
) -> GumbelSTEEmbedding[Embedding]:
    """Sample tokens from a head's logits and return their embeddings, differentiable in hidden states, head and tables.

    What it computes is `gumbel_ste_embedding(softcap(hidden @ lm_head.T + bias), embedding, ...)`, estimators included,
    but `[N, V]` never exists, neither forward nor backward. Under transforms of `torch.func` and for forward-mode
    derivatives `grade_kernels.reference` serves the call, where it does. There is no second derivative, except under
    `use_backend("reference")`; `reinmax` has none anywhere.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        lm_head: `[V, H]`, hidden's dtype.
        embedding: a table `[V, D]`, or a tuple of tables, all of which are looked up. Dtypes may differ.
        tau: temperature: a positive number, or a tensor with one value for all rows or one per row, as in
            `gumbel_softmax` for logits `[..., V]`. A tensor receives its gradient (`reinmax` defines none, so there it
            is zero).
        bias: `[V]`, optional; -inf masks a token.
        logit_softcap: c in `c * tanh(l / c)`, optional.
        estimator: `ste`, `soft`, `st`, `reinmax` or `gumbel_rao`; see `gumbel_ste_embedding`.
        draws: M of `gumbel_rao`. Each takes a pass over the vocabulary, or with `eps=0` the rounds of a dense backward.
        noise: which noise to use. None draws a fresh seed from torch's default generator. Noise of given tokens
            (`GumbelNoise.given`) returns these; with their log-probabilities it takes no more passes than other noise.
        ids: int64 `[...]`: return these tokens instead of sampled ones, with the same noise in the relaxation. Tokens that
            other noise sampled belong into `GumbelNoise.given`, and need not be repeated here.
        ignore_index: rows of this id are ignored, as in `gumbel_ste_embedding`.
        eps: stochastic support: backward visits a token of probability p with probability `min(1, p / eps)`, on average
            at most `1 / eps` tokens a row in each support it needs, and stays exactly unbiased. 0 is the dense, exact
            backward.

    Returns:
        `embedding` `[..., D]` in the table's dtype (a tuple for a tuple), `ids` int64 `[...]`, and
        `logprobs` `[...]`, float32 (float64 for float64), differentiable.

    Raises:
        TypeError: a tensor of a wrong type, hidden and lm_head of different dtypes, tau or eps that is no number, noise
            that is no GumbelNoise, draws or ignore_index that is no int.
        ValueError: shapes that do not match (with both numbers), an unknown estimator, more draws than it has, ids out of
            range, given tokens that are masked, log-probabilities of them that are none, ignore_index without ids, eps
            outside [0, 1), tau or logit_softcap not positive and finite, row_ids of the wrong length, tensors on different
            devices; on CPU a row without a distribution.
    """
    hidden, lm_head, bias = check_head(hidden, lm_head, bias, logit_softcap)
    checks.check_estimator(estimator, RAO)
    draws = checks.canonical_draws(draws, estimator)
    eps = canonical_eps(eps)
    batch: tuple[int, ...] = hidden.shape[:-1]
    vocab = lm_head.shape[0]
    given = checks.check_tables(embedding, vocab, hidden, "hidden")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if ids is not None:
        checks.check_ids(ids, batch, hidden, "hidden")
    ids = checks.ids_once(ids, noise)
    ignore_index = checks.canonical_ignore_index(ignore_index, ids)
    ignored, safe_ids, open_hidden = ignored_rows(ids, ignore_index, hidden, bias)
    if ignored is not None and ids is not None and safe_ids is not None:
        if isinstance(noise, PosteriorNoise):
            noise, safe_ids = noise.ignoring(ignored, safe_ids), None
        out = linear_gumbel_ste(
            open_hidden, lm_head, embedding, tau, bias=bias, logit_softcap=logit_softcap, estimator=estimator,
            draws=draws, noise=noise, ids=safe_ids, eps=eps,
        )  # fmt: skip
        return tables.without_ignored(out, ignored, ids)
    drawn = checks.canonical_noise(noise, rows.shape[0], hidden.device, batch)
    row_tau = checks.canonical_tau(tau, (*batch, vocab), hidden.device, compute_dtype(hidden.dtype))
    flat_ids = None if ids is None or drawn.posterior is not None else ids.reshape(-1)
    wants_support = needs_graph(hidden, lm_head, bias, row_tau, *given)
    backend = backends.select(hidden.device, hidden.dtype, head=True)
    head = Head(rows, lm_head, bias, logit_softcap)
    call = Draw(head, list(given), row_tau, drawn, flat_ids, estimator, eps, wants_support, backend, draws)
    found = _draw_and_embed(call)
    return tables.shaped(found, batch, embedding)


def _backward(
    draw: Draw, kept: Kept, arrived: Embedded[torch.Tensor | None], wanted: Gradients[bool]
) -> Gradients[torch.Tensor | None]:
    # Its five modules are imported by the first backward pass. Who only samples has no use for them.
    from grade_kernels.ops.linear_gumbel_ste.backward import backward

    return backward(draw, kept, arrived, wanted)


_linear_gumbel_ste = differentiable(
    "linear_gumbel_ste", Draw, Embedded, Kept, Gradients,
    kernel=forward.kernel, fake=forward.fake, backward=_backward,
    unsaved=("ids",),
)  # fmt: skip


@answered_by(forward.by_reference)
def _draw_and_embed(draw: Draw) -> GumbelSTEEmbedding[tuple[torch.Tensor, ...]]:
    found = _linear_gumbel_ste(draw)
    return GumbelSTEEmbedding(tables.split(found.embedded, draw.tables), found.ids, found.logprobs)
