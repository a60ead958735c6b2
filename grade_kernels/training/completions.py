"""Completions that come from elsewhere: read as they are given, and checked before anything is computed from them.

An engine may drop an end of sequence, answer for another prompt or stop for a reason of its own. Training on that would
give a gradient of something else, without any sign of it. So whatever can be checked on the host is checked, and an error
says which completion is wrong and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from grade_kernels.training.allowed_tokens import AllowedTokens
from grade_kernels.training.numbers import plain
from grade_kernels.training.records import Ending

__all__ = ["Completions", "LogprobRows", "TokenRows", "in_lists", "row_of"]

TokenRows: TypeAlias = "torch.Tensor | Sequence[Sequence[int]] | Sequence[torch.Tensor]"
"""Tokens of completions: int64 `[B, T]`, padded behind their ends, or a list of as many tokens as each has."""
LogprobRows: TypeAlias = "torch.Tensor | Sequence[Sequence[float]] | Sequence[torch.Tensor]"
"""A log-probability for each of the tokens, in the same form: floating `[B, T]`, or a list for each completion."""

_ROUNDING = 1e-3  # of a log-probability near 0, which a product in 16 bits may leave above it


@dataclass(frozen=True)
class Completions:
    """Completions of B prompts, padded on the right; T is the length of the longest.

    Attributes:
        ids: int64 `[B, T]`, the tokens; padding behind the end of a sequence.
        mask: int64 `[B, T]`, 1 up to and including the end of sequence.
        logprobs: `[B, T]`, log-probability of each token in the distribution that it was drawn from, 0 behind the end; None
            where nobody told them.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor | None = None

    @classmethod
    def of(
        cls, tokens: TokenRows, ending: Ending, logprobs: LogprobRows | None = None, *, name: str = "completions"
    ) -> Completions:
        """Completions as somebody gives them, on the host, where they are checked.

        A completion has `ending.max_new_tokens` tokens, or fewer of which the last is an end of sequence. Nothing but
        padding stands behind an end.

        Args:
            tokens: a padded tensor, or a list for each completion.
            ending: how completions end.
            logprobs: of the tokens, in the same form.
            name: what errors call the tokens; their log-probabilities are its `logprobs`.

        Raises:
            TypeError: something else than tokens or log-probabilities.
            ValueError: shapes or lengths that do not match, a completion that is empty, too long, or too short without an
                end, tokens behind an end, log-probabilities that are not finite or positive.
        """
        rows = _token_rows(name, tokens, ending)
        if not rows:
            raise ValueError(f"{name} must hold at least one completion, got none")
        for place, row in enumerate(rows):
            _check_length(f"{name}[{place}]", row, ending)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [ending.pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        told = None if logprobs is None else _logprobs(f"logprobs of {name}", logprobs, rows, longest)
        return cls(ids, mask, told)

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, prompts: int, vocab_size: int, allowed: AllowedTokens, name: str = "completions") -> None:
        """As many as prompts, of tokens that the policy may sample, or ValueError."""
        if len(self) != prompts:
            raise ValueError(f"{name} must be one per prompt ({prompts}), got {len(self)}")
        ids, real = self.ids.cpu(), self.mask.cpu().bool()
        outside = real & ((ids < 0) | (ids >= vocab_size))
        if bool(outside.any()):
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {_first(outside, ids)}")
        for span, first in allowed.spans(ids.shape[1]):
            masked = allowed.begin_suppressed if first else allowed.suppressed
            if masked is None:
                continue
            wrong = torch.zeros_like(real)
            wrong[:, span] = real[:, span] & masked.cpu()[ids[:, span].clamp(0, vocab_size - 1)]
            if bool(wrong.any()):
                raise ValueError(
                    f"{name} must be of tokens that the policy may sample there, got {_first(wrong, ids)}, which is "
                    "suppressed (by suppress_tokens or begin_suppress_tokens, by the generation config, or because no token "
                    "of the tokenizer has it); the engine must suppress it, too"
                )

    def to(self, device: torch.device) -> Completions:
        """The same on a device."""
        logprobs = None if self.logprobs is None else self.logprobs.to(device)
        return Completions(self.ids.to(device), self.mask.to(device), logprobs)

    def widened(self, time: int, pad: int) -> Completions:
        """The same, padded up to `time` tokens."""
        more = time - self.ids.shape[1]
        if more == 0:
            return self

        def filled(values: torch.Tensor, fill: float) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, more), value=fill)

        logprobs = None if self.logprobs is None else filled(self.logprobs, 0.0)
        return replace(self, ids=filled(self.ids, pad), mask=filled(self.mask, 0), logprobs=logprobs)


def _token_rows(name: str, tokens: TokenRows, ending: Ending) -> list[list[int]]:
    """The tokens of each completion, without padding."""
    if isinstance(tokens, np.ndarray) and tokens.dtype == np.int64:
        tokens = torch.from_numpy(tokens)
    if isinstance(tokens, torch.Tensor):
        if tokens.dtype != torch.int64 or tokens.dim() != 2:
            raise TypeError(
                f"{name} must be int64 [B, T] or a list of token ids for each completion, got {tokens.dtype} of "
                f"{tuple(tokens.shape)}"
            )
        return [_without_padding(f"{name}[{i}]", row, ending) for i, row in enumerate(tokens.tolist())]
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(
            f"{name} must be int64 [B, T] or a list of token ids for each completion, got {type(tokens).__name__}"
        )
    rows = [row_of(f"{name}[{place}]", row, "token ids") for place, row in enumerate(tokens)]
    for place, row in enumerate(rows):
        for token in row:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"{name}[{place}] must be a list of token ids, got {token!r} among them")
    return rows


def in_lists(value: object) -> Any:
    """Tensors and arrays as lists of Python's numbers, or as one; all else as `plain` has it."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else plain(value)


def row_of(name: str, row: object, values: str) -> list[Any]:
    """What a list, a tuple, a tensor or an array holds, or TypeError with a name for it and for its values."""
    listed = in_lists(row)
    if not isinstance(listed, (list, tuple)):
        raise TypeError(f"{name} must be a list of {values}, got {type(row).__name__}")
    return list(listed)


def _without_padding(name: str, row: list[int], ending: Ending) -> list[int]:
    """A row of a padded tensor up to its end; ValueError where something else than padding stands behind it."""
    end = next((place for place, token in enumerate(row) if token in ending.eos), None)
    if end is None:
        if ending.eos and row and row[-1] == ending.pad:
            raise ValueError(
                f"{name} has padding at its end, but no end of sequence ({_several(ending.eos)}): give a list of its own "
                "tokens for each completion"
            )
        return row
    behind = next((token for token in row[end + 1 :] if token != ending.pad), None)
    if behind is not None:
        raise ValueError(
            f"{name} must have nothing but padding ({ending.pad}) behind its end of sequence, got {behind}"
        )
    return row[: end + 1]


def _check_length(name: str, row: list[int], ending: Ending) -> None:
    if not row:
        raise ValueError(f"{name} must have at least one token, got none")
    if len(row) > ending.max_new_tokens:
        raise ValueError(f"{name} must have at most {ending.max_new_tokens} tokens, got {len(row)}")
    end = next((place for place, token in enumerate(row) if token in ending.eos), None)
    if end is not None and end + 1 < len(row):
        raise ValueError(
            f"{name} must end with its end of sequence {row[end]}, but has {len(row) - end - 1} tokens behind"
        )
    if end is None and len(row) < ending.max_new_tokens:
        ends = f" or an end of sequence ({_several(ending.eos)}) as the last" if ending.eos else ""
        raise ValueError(
            f"{name} must have {ending.max_new_tokens} tokens{ends}, got {len(row)} tokens: an engine that leaves the end "
            "out, or stops for a reason of its own, does not sample what the policy is trained to"
        )


def _logprobs(name: str, given: LogprobRows, rows: list[list[int]], longest: int) -> torch.Tensor:
    """Log-probabilities `[B, longest]` of the tokens, float64 on the host."""
    given = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if isinstance(given, torch.Tensor):
        if not given.is_floating_point() or given.dim() != 2:
            raise TypeError(
                f"{name} must be floating [B, T] or a list for each, got {given.dtype} of {tuple(given.shape)}"
            )
        lists = [row[: len(own)] for row, own in zip(given.detach().double().tolist(), rows, strict=False)]
        width = given.shape[1]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        lists = [row_of(f"[{place}] of {name}", row, "numbers") for place, row in enumerate(given)]
        width = longest
    else:
        raise TypeError(f"{name} must be floating [B, T] or a list for each completion, got {type(given).__name__}")
    if len(given) != len(rows):
        raise ValueError(f"{name} must be one row per completion ({len(rows)}), got {len(given)}")
    if width < longest:
        raise ValueError(f"{name} must have a number for each of {longest} tokens, got {width}")
    for place, (row, own) in enumerate(zip(lists, rows, strict=True)):
        if len(row) != len(own):
            raise ValueError(
                f"{name} must have a number for each of the {len(own)} tokens of [{place}], got {len(row)}"
            )
        for time, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be numbers, got {value!r} at [{place}][{time}]")
            if not -float("inf") < value <= _ROUNDING:  # NaN is neither
                raise ValueError(f"{name} must be finite and not positive, got {value} at [{place}][{time}]")
    padded = [[min(float(value), 0.0) for value in row] + [0.0] * (longest - len(row)) for row in lists]
    return torch.tensor(padded, dtype=torch.float64)


def _first(where: torch.Tensor, ids: torch.Tensor) -> str:
    """The first token of those that are marked, and its place."""
    row, time = where.nonzero()[0].tolist()
    return f"{int(ids[row, time])} at [{row}][{time}]"


def _several(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens))
