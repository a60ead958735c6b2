"""What a backend is: the functions that operations call, over canonical arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from grade_kernels.backends.chunks import Sizes, column_chunks, support_capacity
from grade_kernels.backends.layouts import flat, written_flat
from grade_kernels.backends.records import GradientRule, Head, Noise, Rows, Sample, Softmax, Support

__all__ = ["Backend", "softcapped"]


class Backend(ABC):
    """Kernels for rows of given logits, and for rows of a head's logits, which are never in memory as a whole.

    `logits` are `[N, V]`, or `[A, V, B]` in `Rows`, with any strides, in float32, float64, bfloat16 or float16. "compute"
    is float64 for float64 and float32 for the rest, and all arithmetic happens in it. `tau` is `[N]` in compute. g is the
    noise. Where `noise.posterior` is there, l + g are the scores given that its tokens won: T at the token, and elsewhere
    `-log(exp(-T) + E exp(-l))`, with T its `score_max` and E from its own words. `sample` and `head_sample` never get it.

    A backend is called with tensors that it `serves`. A class that does better than its base at something overrides it,
    and calls `super()` for what its own kernels leave out.

    Attributes:
        name: what users choose it by.
        most_repeated_rows: rows up to which `repeated_sampler` may be faster than `head_sample`; 0 where it never is.
        sizes: how much is held at a time.
    """

    name: ClassVar[str]
    most_repeated_rows: ClassVar[int] = 0

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.sizes = Sizes() if sizes is None else sizes

    # Where it runs

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """None if the backend can run on this machine at all, else the reason why it cannot."""

    @abstractmethod
    def why_not_device(self, device: torch.device) -> str | None:
        """None if the backend, where it is available, can serve tensors on a device, else the reason why it cannot."""

    @abstractmethod
    def serves(self, *dtypes: torch.dtype, head: bool) -> bool:
        """Whether there are kernels for tensors of these dtypes: for rows of logits, or with `head` through a head.

        Where there are none, the `torch` backend serves the call.
        """

    # Rows of given logits

    @abstractmethod
    def sample(self, logits: torch.Tensor, noise: Noise, logsumexp: bool) -> Sample:
        """`ids = argmax(l + g)`, `score_max = max(l + g)`, and with logsumexp `max(l)` and `sum(exp(l - max(l)))`.

        Ties go to the smaller id. On CPUs a row that holds NaN, +inf or only -inf is marked by id -1; on GPUs its id is
        in range and its score_max is NaN.
        """

    @abstractmethod
    def one_hot(self, sample: Sample, vocab: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, V]`: one_hot(ids), exactly; on GPUs NaN throughout a row whose score_max is NaN.

        It is written to `out` where that is given, which is contiguous.
        """

    def blank(self, like: torch.Tensor, vocab: int, hard: bool) -> torch.Tensor:
        """Contiguous memory for the result of `gumbel_softmax`, with the shape, dtype and device of `like`.

        `vocab` says how many of its numbers are a row. What it holds is of no account. A backend that writes only the ones
        of a hard sample overrides this, and gives zeros.
        """
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def gumbel_softmax(self, rows: Rows, hard: bool, out: torch.Tensor) -> torch.Tensor:
        """Write `softmax((l + g) / tau)`, or with hard `one_hot(argmax(l + g))`, to `out`; returns `max(l + g)` `[N]`.

        With posterior noise these are `one_hot(ids)` and T. `out` is `[A, V, B]` in the logits' dtype, with any strides; with
        hard it holds zeros, or is as `blank` made it. What is returned is NaN for a row that holds NaN, +inf or only -inf.
        """
        given = rows.noise.posterior
        if given is None or given.score_max is None:
            found = self.sample(flat(rows.logits), rows.noise, False)
        else:
            nothing = given.score_max.new_empty(0)
            found = Sample(given.ids, given.score_max.clone(), nothing, nothing)
        if hard:
            with written_flat(out) as y:
                self.one_hot(found, out.shape[1], out.dtype, y)
        else:
            self.softmax(rows, found.score_max, normalize=True, dtype=out.dtype, out=out)
        score_max = found.score_max
        # On CPUs a bad row is marked by its id.
        return score_max.masked_fill_(found.ids < 0, torch.nan) if score_max.device.type == "cpu" else score_max

    def relax_at(
        self, logits: torch.Tensor, dim: int, tau: float, seed: int, hard: bool, keeps: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`gumbel_softmax` in one step: logits of any shape with the vocabulary at dim, one tau, default row identities.

        Returns the result, contiguous, and where `keeps` also `max(l + g)` `[N]`, for `relax_at_backward`. No result: the
        backend leaves the call to `gumbel_softmax`, as it does where an argument or a row is bad.
        """
        return None, None

    def relax_at_backward(
        self,
        dy: torch.Tensor,
        logits: torch.Tensor,
        dim: int,
        tau: float,
        seed: int,
        score_max: torch.Tensor,
    ) -> torch.Tensor | None:
        """The gradient of the logits, contiguous; None: the backend leaves the call to `softmax_backward`."""
        return None

    @abstractmethod
    def softmax(
        self,
        rows: Rows,
        score_max: torch.Tensor,
        *,
        normalize: bool,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `exp((l + g - score_max) / tau)` `[A, V, B]` in `dtype`, and their sum `[N]`.

        With normalize the weights are divided by the sum. They are written to `out` (of `dtype`, with any strides) where it
        is given.
        """

    @abstractmethod
    def softmax_backward(
        self, dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, out: torch.Tensor
    ) -> torch.Tensor:
        """Write the gradient of the logits to `out` `[A, V, B]`, which may be `dy` itself; returns that of tau `[N]`.

        It is the estimator's rule (the table in `ops.gumbel_ste_embedding`) given `dy` `[A, V, B]`, plus
        `dlogprobs * (one_hot(ids) - softmax(l))` where dlogprobs is given. Both have the logits' dtype and any strides.
        Statistics of the sample that the estimator does not use may be empty. The gradient of tau is meaningful with
        needs_dtau only; `reinmax` defines none.
        """

    # Through a head: passes over the vocabulary

    @abstractmethod
    def head_sample(self, head: Head, noise: Noise) -> Sample:
        """`sample` with logsumexp of the head's logits."""

    @abstractmethod
    def head_scores(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float
    ) -> tuple[Sample, torch.Tensor, Support]:
        """What `head_sample` returns, `sum(exp((l + g - score_max) / tau))` `[N]`, and the stochastic support.

        The support is of `p = softmax((l + g) / tau)`; for eps = 0 it is empty.
        """

    @abstractmethod
    def head_softmax(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float, ref: Head | None = None
    ) -> tuple[Softmax, Support]:
        """Statistics of `p = softmax(l / tau)`, without Gumbel noise, and its support, which for eps = 0 is empty.

        `noise` is used for the support only: its words of DOMAIN_SUPPORT decide it. `ref` is a second head over the same
        vocabulary.
        """

    @abstractmethod
    def head_logits_at(self, head: Head, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Single logits `[K]`, in the precision of those that the passes above saw."""

    def repeated_sampler(self, head: Head) -> Callable[[torch.Tensor, Noise], torch.Tensor | None]:
        """A function of hidden rows and noise that gives the ids of `head_sample` through one head, step after step.

        The head's weight must not change. The function returns None where the caller must ask `head_sample`.
        """
        return lambda hidden, noise: self.head_sample(head._replace(hidden=hidden), noise).ids

    # Products with rows of a table

    @abstractmethod
    def gather_dot(
        self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """`x[rows] . table[tokens]` `[K]`, in compute precision."""

    @abstractmethod
    def gather_sum(
        self, values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a row's entries of `value * table[token]`, `[N, H]`; offsets `[N + 1]` say where rows begin."""

    @abstractmethod
    def scatter_sum(
        self, values: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """Sum over entries of `value * x[row]` at row `token`, `[V, H]` in the dtype and with the rows of `table`."""

    @abstractmethod
    def product(self, x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ table.T` `[N, C]` in compute precision, as the logits that the passes above saw.

        If `out` is given, it has unit stride along tokens. The result goes there, and its only rounding is to out's dtype.
        """

    @abstractmethod
    def weighted_sum(self, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Values `[N, C] @ table [C, H]`, in compute precision.

        Values are rounded to the table's dtype first unless `exact_weights(table.dtype)`.
        """

    @abstractmethod
    def exact_weights(self, dtype: torch.dtype) -> bool:
        """Whether `weighted_sum` with a table of this dtype takes values as they are."""

    @abstractmethod
    def weight_terms(
        self, weights: torch.Tensor, dy: torch.Tensor, slope: torch.Tensor | None, out: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        """Terms of a sum of `weights * (dy - mean)` for one chunk `[N, C]`, while the mean of dy is not yet known.

        Adds the chunk to `sums` `[2, N]`, the sums so far of weights and of weights * dy. The second by the first is the
        mean so far. Writes `weights * (dy - mean)` to `out[0]` and `weights` to `out[1]`, each times slope if there is one,
        and rounded to out's dtype. Returns how far the mean moved `[N]`.
        """

    # Shared by all

    def column_chunks(self, rows: int, vocab: int) -> Iterator[slice]:
        """Slices that cover the vocabulary, as many columns as PyTorch operations take at a time."""
        return column_chunks(rows, vocab, self.sizes.chunk)

    def head_chunks(self, head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
        """Columns and logits `[N, columns]` in compute precision, chunk by chunk, by `product`.

        Heads of one vocabulary and as many rows have the same chunks.
        """
        for columns in column_chunks(head.hidden.shape[0], head.weight.shape[0], self.sizes.head_chunk):
            logits = self.product(head.hidden, head.weight[columns])
            if head.bias is not None:
                logits += head.bias[columns]
            yield columns, softcapped(logits, head.softcap)

    def support_capacity(self, eps: float, vocab: int) -> int:
        """Entries that a row's support may take; with more it overflows."""
        return support_capacity(eps, vocab) if self.sizes.support is None else self.sizes.support


def softcapped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`softcap * tanh(l / softcap)`, as in Gemma 2; a masked logit stays masked."""
    if softcap is None:
        return logits
    return torch.where(logits == -torch.inf, -torch.inf, softcap * torch.tanh(logits / softcap))
