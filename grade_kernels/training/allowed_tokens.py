"""Which tokens a completion may be made of. All others have probability 0, wherever the policy's distribution is used.

A head often scores more rows than its tokenizer has tokens (vocabularies are padded), and a generation config may name
tokens that are never to be generated. If such a row were sampled, it would decode to nothing or to something unwanted. The
reward has a row for it that nobody trained, which may well reward it. So its logit is -inf: the head gets a bias that is
-inf there, in the rollout, in the replay and in the KL, for policy and reference alike. Noise belongs to a token's id, so
the mask changes no other token's noise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["AllowedTokens", "TokenIds", "ids_without_token", "listed", "with_rows"]

TokenIds = torch.Tensor | Iterable[int] | int
"""Tokens by id, or a mask, bool `[V]` of torch or NumPy, that is True at each of them."""


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that may be sampled, as masks of those that may not.

    Attributes:
        suppressed: bool `[V]`, True at tokens that are never sampled; None where all may be.
        begin_suppressed: bool `[V]`, True at tokens that are not sampled as the first of a completion, those of
            `suppressed` among them; None where the first token is as free as the others.
    """

    suppressed: torch.Tensor | None = None
    begin_suppressed: torch.Tensor | None = None

    @classmethod
    def without(
        cls,
        vocab_size: int,
        suppress_tokens: TokenIds | None = None,
        begin_suppress_tokens: TokenIds | None = None,
        device: torch.device | None = None,
    ) -> AllowedTokens:
        """All tokens of a vocabulary but these, and but those at the first place of a completion.

        Raises:
            TypeError: something else than ids or a bool mask.
            ValueError: ids out of range, a mask of another length, or no token that is left.
        """
        always = _mask("suppress_tokens", suppress_tokens, vocab_size, device)
        begin = _mask("begin_suppress_tokens", begin_suppress_tokens, vocab_size, device)
        if always is not None and bool(always.all()):
            raise ValueError(f"suppress_tokens must leave a token to sample, but names all {vocab_size}")
        if begin is not None and always is not None:
            begin = begin | always
        if begin is not None and bool(begin.all()):
            raise ValueError("begin_suppress_tokens must leave a token to begin with, but none is left")
        return cls(always, begin)

    def to(self, device: torch.device) -> AllowedTokens:
        """The same on a device."""
        masks = (self.suppressed, self.begin_suppressed)
        return AllowedTokens(*(None if mask is None else mask.to(device) for mask in masks))

    def bias(self, weight: torch.Tensor, own: torch.Tensor | None, first: bool = False) -> torch.Tensor | None:
        """A head's bias with -inf at what is masked.

        Args:
            weight: the head's, `[V, H]`.
            own: the head's own bias `[V]`, if it has one; it gets gradient exactly 0 where it is masked.
            first: for the first token of completions.
        """
        masked = self.begin_suppressed if first and self.begin_suppressed is not None else self.suppressed
        if masked is None:
            return own
        masked = masked.to(weight.device)
        return torch.where(masked, -torch.inf, weight.new_zeros(len(masked)) if own is None else own)

    def spans(self, time: int) -> list[tuple[slice, bool]]:
        """Positions of completions of `time` tokens that have one mask each, and whether it is that of the first."""
        if self.begin_suppressed is None:
            return [(slice(0, time), False)]
        return [(slice(0, 1), True), *([(slice(1, time), False)] if time > 1 else [])]

    def last(self, vocab_size: int) -> int:
        """The greatest id that may be sampled, of so many tokens."""
        return vocab_size - 1 if self.suppressed is None else self._last

    @functools.cached_property
    def _last(self) -> int:
        """The greatest id that is not suppressed. It is looked up once, since that waits for the device."""
        assert self.suppressed is not None
        return int((~self.suppressed).nonzero()[-1])

    def check_ends(self, ends: Sequence[int]) -> None:
        """Some end of sequence can be sampled, if there is any, or ValueError: no completion would ever end."""
        if self.suppressed is None or not ends:
            return
        if bool(self.suppressed[torch.tensor(list(ends), device=self.suppressed.device)].all()):
            raise ValueError(
                f"eos_token_id = {listed(ends)} must be sampled for a completion to end, but suppress_tokens masks it "
                "(for completions of one length leave eos_token_id out)"
            )


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A table `[R, D]` cut off, or filled up with zeros for masked tokens, to `[rows, D]`."""
    if len(table) == rows:
        return table
    if len(table) > rows:
        return table[:rows]
    return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])


def ids_without_token(tokenizer: Any, vocab_size: int) -> list[int]:
    """The ids below `vocab_size` that no token of a tokenizer has: behind its last token, and holes before it.

    Of a tokenizer that does not tell its tokens, they are the ids from its length on; without a length, none.
    """
    try:
        length = len(tokenizer)
    except (TypeError, NotImplementedError):
        length = 0
    try:
        known = set(tokenizer.get_vocab().values())
    except (AttributeError, NotImplementedError):  # the base class of slow tokenizers declares it and raises
        known = set()
    if not known:
        return list(range(length, vocab_size)) if length else []
    size = max(length, max(known) + 1)
    # Two ids may have the same text, and the vocabulary of a slow tokenizer, a dict by text, then holds only one of them.
    # So every id below its size is asked for its text. Larger ones are not asked: tokenizers of characters have a text
    # for every number.
    return [id for id in range(vocab_size) if id not in known and (id >= size or not _has_text(tokenizer, id))]


def _has_text(tokenizer: Any, id: int) -> bool:
    try:
        text = tokenizer.convert_ids_to_tokens(id)
    except Exception:  # slow tokenizers raise whatever their vocabulary's container does
        return False
    return isinstance(text, str) and text != getattr(tokenizer, "unk_token", None)


def _mask(name: str, ids: TokenIds | None, vocab_size: int, device: torch.device | None) -> torch.Tensor | None:
    """A mask `[V]` of ids that are given as ids or as a mask; None where it would mask nothing."""
    if ids is None:
        return None
    if isinstance(ids, np.ndarray) and ids.size and ids.dtype.kind in "biuf":
        ids = torch.from_numpy(ids.copy())
    if isinstance(ids, torch.Tensor) and ids.dtype == torch.bool:
        if tuple(ids.shape) != (vocab_size,):
            raise ValueError(f"{name} as a mask must have shape ({vocab_size},), got {tuple(ids.shape)}")
        return ids.to(device)
    if isinstance(ids, torch.Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dim() > 1:
            raise TypeError(f"{name} must be token ids or a bool mask [V], got {ids.dtype} of {tuple(ids.shape)}")
        ids = ids.reshape(-1).tolist()
    if isinstance(ids, (bool, str)) or not isinstance(ids, int | Iterable):
        raise TypeError(f"{name} must be token ids or a bool mask [V], got {ids!r}")
    listed = [ids] if isinstance(ids, int) else list(ids)
    for id in listed:
        if isinstance(id, bool) or not hasattr(id, "__index__"):
            raise TypeError(f"{name} must be token ids or a bool mask [V], got {id!r} among them")
        if not 0 <= id < vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {id}")
    if not listed:
        return None
    mask = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    mask[torch.tensor([int(id) for id in listed], device=device)] = True
    return mask


def listed(ids: Sequence[int]) -> str:
    """Ids as a human reads them: `3, 10 to 15`."""
    runs: list[list[int]] = []
    for id in sorted(set(ids)):
        if runs and id == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], id]
        else:
            runs.append([id])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:8]]
    return ", ".join(shown) + (f" and {len(runs) - 8} more runs" if len(runs) > 8 else "")
