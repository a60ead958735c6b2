"""The noise contract: Gumbel noise as a pure function of (seed, row identity, token id).

Noise is regenerated wherever it is needed and stored nowhere, so every backend, tile size, batch split and vocabulary
shard must agree on it bit for bit up to the rounding of the logarithm. This module is the definition, in plain integer
PyTorch; `csrc/common` and `backends/triton` implement the same words.

Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011).
"""

from __future__ import annotations

import threading

import torch

from grade_kernels.arguments import canonical_int, check_local

__all__ = [
    "DOMAIN_GUMBEL",
    "DOMAIN_REFINE",
    "DOMAIN_SUPPORT",
    "GumbelNoise",
    "PosteriorNoise",
    "exponential_from_words",
    "fresh_seed",
    "gumbel_from_words",
    "philox_4x32_10",
    "posterior_domain",
    "seed_on",
    "uniform_from_words",
]

DOMAIN_GUMBEL = 0  # the word that becomes the noise
DOMAIN_REFINE = 1  # 32 more bits for the decisive tail, read when the first word is below REFINE_BELOW
DOMAIN_SUPPORT = 2  # the stochastic support of operations that draw no noise
DOMAIN_POSTERIOR = 3  # the word of the first draw of posterior noise; see `posterior_domain`
REFINE_BELOW = 256

_MASK32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_4x32_10(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors with values in [0, 2^32), broadcastable against each other.
        key: two int64 tensors with values in [0, 2^32).

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps as a signed number, but its bits are those of the unsigned one.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def posterior_domain(draw: int) -> int:
    """The domain of the words of a draw of posterior noise; that of their refinement is the next one."""
    return DOMAIN_POSTERIOR + 2 * draw


def exponential_from_words(word: torch.Tensor, refinement: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Map 32-bit words to exponential numbers `E = -log1p(-u)`, `u = (word + 0.5) / 2^32`.

    Small E, which becomes large noise, comes from small u, where floating point resolves best. The other half uses the
    complement, so E is never 0 or infinite. Words below 256 take 32 more bits from `refinement`.

    Args:
        word: int64 tensor with values in [0, 2^32).
        refinement: int64 tensor of the same shape with values in [0, 2^32).
        dtype: `torch.float32` or `torch.float64`, the arithmetic and the result.

    Returns:
        Positive numbers of `word`'s shape.
    """
    u = (word.to(dtype) + 0.5) * 2.0**-32
    fine = ((word << 32) + refinement).to(dtype)
    u = torch.where(word < REFINE_BELOW, (fine + 0.5) * 2.0**-64, u)
    complement = ((_MASK32 - word).to(dtype) + 0.5) * 2.0**-32
    lower = word < 2**31
    # Each branch sees harmless values where it is not taken: both are positive numbers below one half.
    half = torch.full_like(u, 0.5)
    return torch.where(
        lower, -torch.log1p(-torch.where(lower, u, half)), -torch.log(torch.where(lower, half, complement))
    )


def gumbel_from_words(word: torch.Tensor, refinement: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Map 32-bit words to standard Gumbel noise `g = -log(E)`, with E and arguments of `exponential_from_words`.

    The refinement carries the tail to about 45. Noise is finite for every word.
    """
    return -torch.log(exponential_from_words(word, refinement, dtype))


def uniform_from_words(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The uniform number in (0, 1) that decides stochastic support: another view of the same 32 bits.

    Multiplying by an odd number near 2^32 over the golden ratio is a bijection that spreads any run of neighbouring
    words (hence of neighbouring noise) evenly over the unit interval, so that the decision is independent of the noise.
    """
    return (((word * 0x9E3779B1) & _MASK32).to(dtype) + 0.5) * 2.0**-32


def seed_on(seed: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A 0-d seed on a device.

    A number on the host is added there to zero, as an argument of that kernel: a copy might wait for a GPU, and a CUDA
    graph must not capture one, since each replay would read the host's memory again.
    """
    if seed.device.type != "cpu" or device.type == "cpu":
        return seed.to(device)
    return torch.zeros((), dtype=torch.int64, device=device) + seed


def fresh_seed() -> torch.Tensor:
    """A 64-bit seed from torch's default CPU generator."""
    # The argument `generator` is left out: AOTInductor cannot call the overload that takes one.
    return torch.randint(*_SEEDS, (), dtype=torch.int64, device="cpu")


def fresh_number() -> int:
    """What `fresh_seed` would have drawn, as a number, in less than half the time. No compiler or tracer follows it."""
    memory = getattr(_drawn, "seed", None)
    if memory is None:  # not made at import, which a tracer might follow
        with torch.inference_mode(False):  # so that it may be written outside inference mode, too
            memory = _drawn.seed = torch.empty((), dtype=torch.int64, device="cpu")
    return int(memory.random_(*_SEEDS))


_SEEDS = (-(2**63), 2**63 - 1)
_drawn = threading.local()  # memory of each thread for the number that it draws


class GumbelNoise:
    """Identity of the Gumbel noise an operation uses: a seed, and optionally who each row is.

    Noise of token `v` in row `r` depends on `(seed, row_ids[r], v)` alone. Two calls with the same noise draw the same
    numbers, whatever the backend, the batch a row is in, or its position there (when `row_ids` says who it is).

    Args:
        seed: an int in [-2^63, 2^64), or a 0-d int64 tensor, which is read on its own device without synchronisation
            and whose value may change without recompiling anything.
        row_ids: int64 `[rows]`, an identity per row. Default: the flat row index.
        vocab_start: global token id of the first column, for logits that are one shard of a vocabulary.

    Raises:
        TypeError: seed, row_ids or vocab_start of a wrong type.
        ValueError: seed out of range or not 0-d, row_ids not one-dimensional, vocab_start outside [0, 2^62).
    """

    __slots__ = ("row_ids", "seed", "vocab_start")

    seed: torch.Tensor
    row_ids: torch.Tensor | None
    vocab_start: int

    def __init__(self, seed: int | torch.Tensor, row_ids: torch.Tensor | None = None, *, vocab_start: int = 0) -> None:
        if isinstance(seed, torch.Tensor):
            if seed.dtype != torch.int64:
                raise TypeError(f"seed must be an int or a 0-d int64 tensor, got a tensor of dtype {seed.dtype}")
            if seed.dim() != 0:
                raise ValueError(f"seed must be 0-d, got a tensor of shape {tuple(seed.shape)}")
            self.seed = seed
        else:
            seed = canonical_int("seed", seed, "an int or a 0-d int64 tensor")
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"seed must lie in [-2^63, 2^64), got {seed}")
            self.seed = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")
        if row_ids is not None:
            if not isinstance(row_ids, torch.Tensor):
                raise TypeError(f"row_ids must be an int64 tensor, got {type(row_ids).__name__}")
            if row_ids.dtype != torch.int64:
                raise TypeError(f"row_ids must be an int64 tensor, got dtype {row_ids.dtype}")
            if row_ids.dim() != 1:
                raise ValueError(f"row_ids must have shape [rows], got {tuple(row_ids.shape)}")
        self.row_ids = row_ids
        vocab_start = canonical_int("vocab_start", vocab_start)
        if not 0 <= vocab_start < 2**62:  # so that no token's id leaves 64 bits
            raise ValueError(f"vocab_start must lie in [0, 2^62), got {vocab_start}")
        self.vocab_start = vocab_start

    def __repr__(self) -> str:
        rows = "None" if self.row_ids is None else f"<{self.row_ids.numel()} rows>"
        start = f", vocab_start={self.vocab_start}" if self.vocab_start else ""
        return f"GumbelNoise(seed={self.seed}, row_ids={rows}{start})"

    def given(self, ids: torch.Tensor, logprobs: torch.Tensor | None = None) -> PosteriorNoise:
        """Gumbel noise from its posterior: what the noise may have been, given that these tokens had the best scores.

        Tokens that another program sampled from `softmax(logits)` are replayed with it as if this package had drawn them.

        Args:
            ids: int64 `[...]`, the batch shape of the logits that the noise will be used with: the tokens, as columns of
                these logits.
            logprobs: floating `[...]`: log softmax(logits) of these tokens, as an engine reports it. With it an operation
                needs no pass of its own for the logits' log-sum-exp. Values up to 0.25 are taken for the rounding of 0.

        Raises:
            TypeError: ids that are no int64 tensor, logprobs that are no floating tensor.
            ValueError: shapes or devices that differ. Values are checked where the noise is used, on the CPU: ids must
                be tokens whose logits are not -inf, and logprobs must be finite and not positive.
        """
        return PosteriorNoise(self, ids, logprobs)

    @classmethod
    def from_generator(cls, generator: torch.Generator | None = None) -> GumbelNoise:
        """Noise with a fresh 64-bit seed drawn from a generator (default: torch's default CPU generator)."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if generator is None:
            return cls(fresh_seed())
        return cls(
            torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=generator.device, generator=generator)
        )

    def words(
        self, num_rows: int, vocab_size: int, *, vocab_start: int = 0, domain: int = DOMAIN_GUMBEL
    ) -> torch.Tensor:
        """The raw 32-bit words of one domain, int64 `[num_rows, vocab_size]`: what `dense` turns into noise."""
        check_local("noise.seed", self.seed)
        check_local("noise.row_ids", self.row_ids)
        device = self.seed.device if self.row_ids is None else self.row_ids.device
        rows = torch.arange(num_rows, device=device) if self.row_ids is None else self.row_ids
        if rows.numel() != num_rows:
            raise ValueError(f"row_ids has {rows.numel()} entries, but there are {num_rows} rows")
        first = self.vocab_start + vocab_start
        group = first >> 2
        count = ((first + vocab_size + 3) >> 2) - group
        seed = seed_on(self.seed, device)
        groups = torch.arange(group, group + count, device=device)
        counter = (
            (groups & _MASK32)[None, :],
            (rows & _MASK32)[:, None],
            ((rows >> 32) & _MASK32)[:, None],
            torch.full((1, 1), domain, dtype=torch.int64, device=device),
        )
        words = torch.stack(philox_4x32_10(counter, (seed & _MASK32, (seed >> 32) & _MASK32)), dim=-1)
        skip = first - 4 * group
        return words.flatten(1)[:, skip : skip + vocab_size]

    def words_at(self, tokens: torch.Tensor, *, domain: int = DOMAIN_GUMBEL) -> torch.Tensor:
        """The word `[rows]` of one token of each row: `words(...)[row, tokens[row]]`, without the others."""
        device = tokens.device
        rows = torch.arange(len(tokens), device=device) if self.row_ids is None else self.row_ids
        seed, token = seed_on(self.seed, device), tokens + self.vocab_start
        counter = (
            (token >> 2) & _MASK32,
            rows & _MASK32,
            (rows >> 32) & _MASK32,
            torch.full((1,), domain, dtype=torch.int64, device=device),
        )
        words = torch.stack(philox_4x32_10(counter, (seed & _MASK32, (seed >> 32) & _MASK32)), dim=-1)
        return words.gather(1, (token & 3).unsqueeze(1)).squeeze(1)

    def dense(
        self, num_rows: int, vocab_size: int, *, vocab_start: int = 0, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The noise itself, for inspection and for tests; the kernels never materialise it.

        Args:
            num_rows: number of rows; equals `len(row_ids)` where row ids were given.
            vocab_size: number of tokens.
            vocab_start: id of the first token, counted from this noise's own `vocab_start`.
            dtype: float64 computes in float64; float32, bfloat16 and float16 compute in float32.

        Returns:
            `[num_rows, vocab_size]` standard Gumbel noise on the device of `row_ids`, or else of the seed.

        Raises:
            TypeError: a dtype that is not one of the four, or sizes that are no ints.
            ValueError: negative sizes, a token's id beyond 2^62, or a number of rows that differs from `row_ids`.
        """
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
        num_rows, vocab_size = canonical_int("num_rows", num_rows), canonical_int("vocab_size", vocab_size)
        vocab_start = canonical_int("vocab_start", vocab_start)
        for name, value in (("num_rows", num_rows), ("vocab_size", vocab_size), ("vocab_start", vocab_start)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.vocab_start + vocab_start >= 2**62:
            raise ValueError(
                f"vocab_start must lie in [0, 2^62 - {self.vocab_start}), counted from this noise's own, got {vocab_start}"
            )
        word = self.words(num_rows, vocab_size, vocab_start=vocab_start)
        # One word in 2^24 needs refining, but "dense and obvious" reads better than a gather.
        refinement = self.words(num_rows, vocab_size, vocab_start=vocab_start, domain=DOMAIN_REFINE)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return gumbel_from_words(word, refinement, compute).to(dtype)


class PosteriorNoise:
    """Gumbel noise given which token of each row won; see `GumbelNoise.given`, which makes it.

    With l the logits, p = softmax(l), k the given token and E exponential numbers, the noise is

        g_v = -log([v != k] E_v + p_v E_k)

    so that the winner's score is `T = l_k + g_k = logsumexp(l) - log E_k`, and any other score `-log(E_v exp(-l_v) +
    exp(-T))` is smaller. Tokens from softmax(l) and this noise together are distributed as prior noise and its argmax.
    Noise is a constant: no gradient flows through p. Other draws for the same tokens use other words.

    Operations take it as `noise`, in the place of a GumbelNoise. Their token is the given one, however scores are rounded.

    Source: Maddison, Tarlow, Minka: A* sampling. NeurIPS 2014; Paulus, Maddison, Krause: Rao-Blackwellizing the
    straight-through Gumbel-softmax gradient estimator. ICLR 2021.
    """

    __slots__ = ("draw", "ids", "logprobs", "noise")

    noise: GumbelNoise  # seed, row ids and vocab_start
    ids: torch.Tensor
    logprobs: torch.Tensor | None
    draw: int  # which of the draws for the same tokens

    def __init__(
        self, noise: GumbelNoise, ids: torch.Tensor, logprobs: torch.Tensor | None = None, draw: int = 0
    ) -> None:
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"ids must be an int64 tensor, got {type(ids).__name__}")
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be an int64 tensor, got dtype {ids.dtype}")
        if logprobs is not None:
            if not isinstance(logprobs, torch.Tensor):
                raise TypeError(f"logprobs must be a floating tensor or None, got {type(logprobs).__name__}")
            if not logprobs.is_floating_point():
                raise TypeError(f"logprobs must be a floating tensor or None, got dtype {logprobs.dtype}")
            if logprobs.shape != ids.shape:
                raise ValueError(
                    f"logprobs must have the shape of ids, {tuple(ids.shape)}, got {tuple(logprobs.shape)}"
                )
            if logprobs.device != ids.device:
                raise ValueError(f"logprobs is on device {str(logprobs.device)!r}, but ids on {str(ids.device)!r}")
            logprobs = logprobs.detach()
        self.noise, self.ids, self.logprobs, self.draw = noise, ids, logprobs, draw

    def __repr__(self) -> str:
        known = "" if self.logprobs is None else ", logprobs=..."
        return f"{self.noise!r}.given(ids=<{tuple(self.ids.shape)}>{known})"

    def ignoring(self, rows: torch.Tensor, ids: torch.Tensor) -> PosteriorNoise:
        """The same with other ids, which differ in the marked rows (bool, of the shape of ids), where nothing is read."""
        logprobs = None if self.logprobs is None else torch.where(rows, 0.0, self.logprobs)
        return PosteriorNoise(self.noise, ids, logprobs, self.draw)

    def dense(self, logits: torch.Tensor) -> torch.Tensor:
        """The noise for logits `[..., V]`, for inspection and for tests; the kernels never materialise it.

        Returns:
            A constant of the logits' shape on their device, float64 for float64 and float32 for narrower logits. It is
            NaN in a row whose given token has logit -inf.

        Raises:
            ValueError: logits of another batch shape than ids, or another number of rows than row_ids.
        """
        if logits.shape[:-1] != self.ids.shape:
            raise ValueError(
                f"logits must have shape {(*self.ids.shape, 'V')} for given ids of shape {tuple(self.ids.shape)}, "
                f"got {tuple(logits.shape)}"
            )
        logits = logits.detach()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        rows, vocab = self.ids.numel(), logits.shape[-1]
        word, refinement = (
            self.noise.words(rows, vocab, domain=posterior_domain(self.draw) + i).view(logits.shape).to(logits.device)
            for i in range(2)
        )
        log_e = exponential_from_words(word, refinement, logits.dtype).log()
        k = self.ids.unsqueeze(-1)
        if self.logprobs is None:
            logp = logits.log_softmax(-1)
        else:
            logp = logits - (logits.gather(-1, k) - self.logprobs.to(logits.dtype).unsqueeze(-1))
        of_others = torch.where(torch.arange(vocab, device=logits.device) == k, -torch.inf, log_e)
        noise = -torch.logaddexp(of_others, logp + log_e.gather(-1, k))
        return torch.where(logp.gather(-1, k) == -torch.inf, torch.nan, noise)
