"""What a loss is asked for, as values that check themselves: prompts, the relaxation, and how completions end.

What needs the host alone is checked where a value is made. `Prompts.check_values` looks at the numbers of tensors, which
waits for their device: it is for prompts that a user made, and not for those that a collator has checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grade_kernels.ops import checks
from grade_kernels.ops.head import canonical_eps
from grade_kernels.training.numbers import plain

__all__ = ["Ending", "Prompts", "Relaxation"]


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left.

    Attributes:
        ids: int64 `[B, P]`, the tokens, and anything where a row is padded.
        mask: `[B, P]`, not 0 at real tokens. It may be given in any dtype, and is kept as int64 of 0 and 1.

    Raises:
        TypeError: no tensors, or ids of another dtype.
        ValueError: shapes that differ, or no token at all.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        ids, mask = self.ids, self.mask
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"input_ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"input_ids must have shape [B, P] with at least one token, got {tuple(ids.shape)}")
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask must have input_ids' shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
        object.__setattr__(self, "mask", mask.ne(0).long())

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad: int) -> Prompts:
        """Tokens of several lengths, padded."""
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
        return cls(ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]))

    def rows(self, rows: slice | torch.Tensor) -> Prompts:
        """Some of the prompts, without padding that none of them needs."""
        ids, mask = self.ids[rows], self.mask[rows]
        start = ids.shape[1] - int(mask.sum(dim=1).max())
        return Prompts(ids[:, start:], mask[:, start:])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each prompt, `[B]`."""
        return self.mask.sum(dim=1)

    def check_values(self, vocab_size: int) -> None:
        """Rows padded on the left, of tokens below `vocab_size`, or ValueError. Waits for the device."""
        real = self.mask.bool()
        if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise ValueError(
                "attention_mask must be left-padded: zeros, then at least one 1 up to the end of every row"
            )
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must lie in [0, {vocab_size}), got values in [{low}, {high}]")


@dataclass(frozen=True)
class Relaxation:
    """How the gradient runs back through samples. The tokens themselves do not depend on it, but for `soft`.

    Attributes:
        tau: temperature of the relaxation.
        estimator: `ste`, `st`, `reinmax`, or `soft`, which feeds mixtures of embeddings instead of tokens.
        feedback_hops: how many relaxed samples in a row a path of the gradient may be fed back through, or "exact".
        eps: stochastic support of the sparse, unbiased backward; 0 is dense and exact.

    Raises:
        TypeError: eps or feedback_hops is no number.
        ValueError: an unknown estimator, or a number out of range.
    """

    tau: float = 1.0
    estimator: str = "ste"
    feedback_hops: int | str = 4
    eps: float = 2**-11

    def __post_init__(self) -> None:
        for name in ("tau", "feedback_hops", "eps"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        hops = self.feedback_hops
        if hops != "exact":
            if isinstance(hops, bool) or not isinstance(hops, int):
                raise TypeError(f'feedback_hops must be an int or "exact", got {hops!r}')
            if hops < 0:
                raise ValueError(f"feedback_hops must not be negative, got {hops}")
        checks.check_estimator(self.estimator)
        object.__setattr__(self, "eps", canonical_eps(self.eps))

    @property
    def soft(self) -> bool:
        """Whether the model reads mixtures of embeddings instead of the tokens."""
        return self.estimator == "soft"

    def sweeps(self, time: int) -> int:
        """How many sweeps the gradient of completions of `time` tokens takes; `time - 1` of them are exact."""
        hops = self.feedback_hops
        return time - 1 if isinstance(hops, str) else min(hops, time - 1)


@dataclass(frozen=True)
class Ending:
    """How completions end.

    Attributes:
        eos: tokens that end a completion, of which such a token is the last. Without any, nothing does.
        pad: what stands behind an end.
        max_new_tokens: completions are cut off there.

    Raises:
        TypeError: something that is no int.
        ValueError: `max_new_tokens` is not positive.
    """

    eos: tuple[int, ...]
    pad: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", plain(self.max_new_tokens))
        for name, tokens in (("eos_token_id", self.eos), ("pad_token_id", (self.pad,))):
            for token in tokens:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise TypeError(f"{name} must be an int, several or None, got {token!r}")
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise TypeError(f"max_new_tokens must be an int, got {type(self.max_new_tokens).__name__}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")

    @classmethod
    def of(
        cls, max_new_tokens: int, eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None
    ) -> Ending:
        """The ending by its usual names. The default padding is the first end of sequence, or 0."""
        ends, pads = _tokens(eos_token_id), _tokens(pad_token_id)
        return cls(ends, (pads or ends or (0,))[0], max_new_tokens)

    def check(self, vocab_size: int) -> None:
        """Every token is below `vocab_size`, or ValueError."""
        for name, tokens in (("eos_token_id", self.eos), ("pad_token_id", (self.pad,))):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} must lie in [0, {vocab_size}), got {token}")

    def ended(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Whether each completion came to an end of sequence, bool `[B]`.

        Args:
            ids: int64 `[B, T]`.
            mask: `[B, T]`, 1 at the completions' tokens.
        """
        last = (mask.sum(dim=1) - 1).clamp_min(0)
        ends = torch.tensor(list(self.eos), dtype=torch.int64, device=ids.device)
        return torch.isin(ids.gather(1, last[:, None])[:, 0], ends)


def _tokens(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """A token, several or none as a tuple."""
    value = plain(value)
    if value is None or isinstance(value, int):
        return () if value is None else (value,)
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)  # type: ignore[return-value]
