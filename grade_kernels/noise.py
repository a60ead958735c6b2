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
    "fresh_seed",
    "gumbel_from_words",
    "philox_4x32_10",
    "seed_on",
    "uniform_from_words",
]

DOMAIN_GUMBEL = 0  # the word that becomes the noise
DOMAIN_REFINE = 1  # 32 more bits for the decisive tail, read when the first word is below REFINE_BELOW
DOMAIN_SUPPORT = 2  # the stochastic support of operations that draw no noise
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


def gumbel_from_words(word: torch.Tensor, refinement: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Map 32-bit words to standard Gumbel noise `g = -log(E)`, `E = -log1p(-u)`, `u = (word + 0.5) / 2^32`.

    Large noise comes from small u, where floating point resolves best. The other half uses the complement, so neither
    end is ever infinite. Words below 256 take 32 more bits from `refinement`, which carries the tail to about 45.

    Args:
        word: int64 tensor with values in [0, 2^32).
        refinement: int64 tensor of the same shape with values in [0, 2^32).
        dtype: `torch.float32` or `torch.float64`, the arithmetic and the result.

    Returns:
        Noise of `word`'s shape, finite for every word.
    """
    u = (word.to(dtype) + 0.5) * 2.0**-32
    fine = ((word << 32) + refinement).to(dtype)
    u = torch.where(word < REFINE_BELOW, (fine + 0.5) * 2.0**-64, u)
    complement = ((_MASK32 - word).to(dtype) + 0.5) * 2.0**-32
    lower = word < 2**31
    # Each branch sees harmless values where it is not taken: both are positive numbers below one half.
    half = torch.full_like(u, 0.5)
    exponential = torch.where(
        lower, -torch.log1p(-torch.where(lower, u, half)), -torch.log(torch.where(lower, half, complement))
    )
    return -torch.log(exponential)


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
    return int(_drawn.seed.random_(*_SEEDS))


class _Drawn(threading.local):
    """Memory of each thread for the number that it draws."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # so that it may be written outside inference mode, too
            self.seed = torch.empty((), dtype=torch.int64, device="cpu")


_SEEDS = (-(2**63), 2**63 - 1)
_drawn = _Drawn()


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
