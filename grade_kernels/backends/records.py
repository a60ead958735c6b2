"""What passes between operations and backends: noise, rows of logits, a head, and what a pass over the vocabulary leaves.

Shapes: N rows, a vocabulary of V tokens, hidden states of width H, K entries of a support. "compute" is
`grade_kernels.dtypes.compute_dtype` of the logits or of the hidden states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise, PosteriorNoise, exponential_from_words, posterior_domain, seed_on

__all__ = ["GradientRule", "Head", "Noise", "Posterior", "Rows", "Sample", "Softmax", "Support", "offsets_of"]


class Posterior(NamedTuple):
    """That noise is from its posterior, given the best token of each row: `PosteriorNoise`, as operations take it."""

    ids: torch.Tensor  # [N] int64, the given tokens; kernels that see some columns get them counted from the first
    logprobs: torch.Tensor | None  # [N] of these tokens, if known
    draw: int
    # [N] compute, the given tokens' scores T. An operation that is called does not know them; backends are told.
    score_max: torch.Tensor | None = None


class Noise(NamedTuple):
    """Which noise the rows of a call draw: `GumbelNoise` in the form that operations and kernels take."""

    seed: torch.Tensor  # 0-d int64, on the host or on the rows' device
    row_ids: torch.Tensor | None  # [N] int64; None stands for 0 .. N - 1
    vocab_start: int  # global token id of column 0
    posterior: Posterior | None = None

    def at(self, columns: slice) -> "Noise":
        """The noise of some columns."""
        given = self.posterior
        if given is not None:
            given = given._replace(ids=given.ids - columns.start)
        return self._replace(vocab_start=self.vocab_start + columns.start, posterior=given)

    def rows(self, rows: torch.Tensor) -> "Noise":
        """The noise of the rows with these indices."""
        row_ids, given = rows if self.row_ids is None else self.row_ids[rows], self.posterior
        if given is not None:
            logprobs, score_max = (None if x is None else x[rows] for x in (given.logprobs, given.score_max))
            given = Posterior(given.ids[rows], logprobs, given.draw, score_max)
        return self._replace(row_ids=row_ids, posterior=given)

    def prior(self) -> "Noise":
        """The noise of the same rows where no token is given."""
        return self._replace(posterior=None)

    def won_with(self, score_max: torch.Tensor) -> "Noise":
        """The same, with the scores `[N]` of the given tokens if there are any."""
        given = self.posterior
        return self if given is None else self._replace(posterior=given._replace(score_max=score_max))

    def log_exponential_at_ids(self, dtype: torch.dtype) -> torch.Tensor:
        """`log E` `[N]` of the given tokens, with which `T = logsumexp(l) - log E`."""
        given = self.posterior
        assert given is not None
        drawn, domain = self.on(len(given.ids), given.ids.device), posterior_domain(given.draw)
        word, refinement = (drawn.words_at(given.ids, domain=domain + i) for i in range(2))
        return exponential_from_words(word, refinement, dtype).log()

    def public(self) -> GumbelNoise:
        """The same as a user writes it, without given tokens."""
        return GumbelNoise(self.seed, self.row_ids, vocab_start=self.vocab_start)

    def public_of(self, shape: Sequence[int]) -> GumbelNoise | PosteriorNoise:
        """The same as a user writes it, for rows of a batch of this shape."""
        given = self.posterior
        if given is None:
            return self.public()
        logprobs = None if given.logprobs is None else given.logprobs.view(shape)
        return PosteriorNoise(self.public(), given.ids.view(shape), logprobs, given.draw)

    def on(self, rows: int, device: torch.device) -> GumbelNoise:
        """The seed and an identity for each row on a device, where `GumbelNoise` then draws words."""
        row_ids = torch.arange(rows, device=device) if self.row_ids is None else self.row_ids
        return GumbelNoise(seed_on(self.seed, device), row_ids, vocab_start=self.vocab_start)


class Rows(NamedTuple):
    """Rows of given logits, and what they draw. Row `a * B + b` is `logits[a, :, b]`."""

    logits: torch.Tensor  # [A, V, B], any strides
    tau: torch.Tensor  # [N], N = A * B, compute
    noise: Noise

    @staticmethod
    def of(logits: torch.Tensor, tau: torch.Tensor, noise: Noise) -> "Rows":
        """The rows of `[N, V]` logits."""
        return Rows(logits.unsqueeze(2), tau, noise)

    def at(self, columns: slice) -> "Rows":
        """The same rows over some columns."""
        return Rows(self.logits[:, columns], self.tau, self.noise.at(columns))


class GradientRule(NamedTuple):
    """How the gradient of rows of given logits follows from that of their relaxation."""

    estimator: str  # of the table in `ops.gumbel_ste_embedding`
    dlogprobs: torch.Tensor | None = None  # [N] compute, the gradient of the tokens' log-probabilities
    needs_dtau: bool = False


class Head(NamedTuple):
    """A head whose logits are `softcap(hidden @ weight.T + bias)`."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H], same dtype
    bias: torch.Tensor | None  # [V]; backends get it in compute precision and contiguous
    softcap: float | None

    def canonical(self) -> "Head":
        """The head as backends take it."""
        if self.bias is None:
            return self
        return self._replace(bias=self.bias.to(compute_dtype(self.hidden.dtype)).contiguous())

    def rows(self, rows: slice | torch.Tensor) -> "Head":
        """The head over some of the hidden rows."""
        return self._replace(hidden=self.hidden[rows])


class Sample(NamedTuple):
    """The sampled token of each row, and O(N) numbers from which a backward pass finds the distribution again."""

    ids: torch.Tensor  # [N] int64
    score_max: torch.Tensor  # [N] compute, max(l + g)
    logit_max: torch.Tensor  # [N] compute, max(l); empty unless asked for
    logit_sum: torch.Tensor  # [N] compute, sum(exp(l - max(l))); empty unless asked for


class Softmax(NamedTuple):
    """Statistics per row of `p = softmax(l / tau)`, and of a reference r with the same tau where there is one."""

    logit_max: torch.Tensor  # [N] compute
    total: torch.Tensor  # [N], sum(exp((l - logit_max) / tau))
    # [N], sum p (l - logit_max) / tau, or with a reference sum p ((l - logit_max) - (r - ref_max)) / tau
    moment: torch.Tensor
    ref_max: torch.Tensor  # [N], empty without a reference
    ref_total: torch.Tensor


class Support(NamedTuple):
    """Stochastic support: each token kept with probability min(1, p / eps); sorted by row, then by token.

    The value that stands for a kept token's p is max(p, eps), which makes sums over the support unbiased.
    """

    offsets: torch.Tensor  # [N + 1] int64, where each row's entries begin
    tokens: torch.Tensor  # [K] int64
    p: torch.Tensor  # [K] compute, exact probabilities
    overflow: torch.Tensor  # [N] bool: rows whose support did not fit; they have no entries and take the dense backward

    @staticmethod
    def empty(rows: int, like: torch.Tensor) -> "Support":
        """A support without entries, on the device and in the compute precision of `like`."""
        device = like.device
        return Support(
            torch.zeros(rows + 1, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=compute_dtype(like.dtype), device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    @staticmethod
    def joined(parts: Sequence["Support"]) -> "Support":
        """The supports of several blocks of rows, one block after the other."""
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([part.offsets.diff() for part in parts])
        tokens, p, overflow = (torch.cat([part[i] for part in parts]) for i in range(1, 4))
        return Support(offsets_of(counts), tokens, p, overflow)

    def rows(self) -> torch.Tensor:
        """The row `[K]` that each entry belongs to."""
        counts = self.offsets.diff()
        rows = torch.arange(len(counts), device=counts.device)
        return rows.repeat_interleave(counts, output_size=len(self.tokens))

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `[N]` of the entries' values `[K]` per row, in a fixed order."""
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0)

    def without(self, rows: torch.Tensor) -> "Support":
        """The same without the entries of the marked rows (`[N]` bool), which count as overflown."""
        kept = ~rows[self.rows()]
        counts = torch.where(rows, 0, self.offsets.diff())
        return Support(offsets_of(counts), self.tokens[kept], self.p[kept], rows)


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """`[len(counts) + 1]`: where runs of so many entries begin, and where the last ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
