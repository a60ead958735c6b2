"""Completions as text. What has no text is shown as such: decoding never ends a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from grade_kernels.training.prompt_tokens import takes

__all__ = ["REPLACEMENT", "completion_texts"]

logger = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"
"""What stands for tokens that can not be decoded, as for bytes that are no character."""

_warned: set[str] = set()  # classes of tokenizers that a warning was given of


def completion_texts(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """The text of each completion, without special tokens.

    A slow tokenizer raises at an id that it does not have. Then each run of tokens that it can not decode becomes one
    U+FFFD, what stands between them is decoded as it is, and a warning says so once.

    Args:
        tokenizer: of the policy, with `batch_decode`, or with `decode` alone.
        ids: int64 `[B, T]`.
        mask: `[B, T]`, not 0 at the completions' tokens.
    """
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    reason = "it returned something else than text"
    try:
        if hasattr(tokenizer, "batch_decode"):
            texts = list(tokenizer.batch_decode(rows, **_skipping(tokenizer.batch_decode)))
        else:
            texts = [tokenizer.decode(row, **_skipping(tokenizer.decode)) for row in rows]
        if all(isinstance(text, str) for text in texts):
            return texts
    except Exception as error:  # each tokenizer raises another one
        reason = f"{type(error).__name__}: {error}"
    _warn_once(type(tokenizer).__name__, reason)
    return [_text(tokenizer, row) for row in rows]


def _text(tokenizer: object, row: Sequence[int]) -> str:
    """The text of one completion, in as few pieces as can be decoded."""
    text = _decoded(tokenizer, row)
    if text is not None:
        return text
    # The text is cut at every token that can not be decoded by itself, and nowhere else: a character may be made of the
    # bytes of several tokens, which must be decoded together.
    pieces: list[str | None] = []
    run: list[int] = []
    for token in row:
        if _decoded(tokenizer, [token]) is None:
            pieces += [_decoded(tokenizer, run) if run else "", None]
            run = []
        else:
            run.append(token)
    pieces.append(_decoded(tokenizer, run) if run else "")
    shown: list[str] = []
    for piece in pieces:
        if piece is None and (not shown or shown[-1] != REPLACEMENT):
            shown.append(REPLACEMENT)
        elif piece:
            shown.append(piece)
    return "".join(shown)


def _decoded(tokenizer: Any, row: Sequence[int]) -> str | None:
    try:
        text = tokenizer.decode(row, **_skipping(tokenizer.decode))
    except Exception:
        return None
    return text if isinstance(text, str) else None


def _skipping(decode: Callable[..., object]) -> dict[str, bool]:
    """The keyword that leaves special tokens out, for a function that has it."""
    return {"skip_special_tokens": True} if takes(decode, "skip_special_tokens") else {}


def _warn_once(tokenizer: str, reason: str) -> None:
    if tokenizer in _warned:
        return
    _warned.add(tokenizer)
    logger.warning("%s can not decode some completions, shown with %s: %s", tokenizer, REPLACEMENT, reason)
