"""How many tokens a model can read: limits of prompts with their completions, by configuration and by table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["LONG_PROMPTS", "Room", "check_positions", "frequency_limits", "position_limit", "position_table_limit"]

LONG_PROMPTS = ("error", "truncate", "skip")

# What configurations call the number of positions, where `attribute_map` does not give it the first of these names.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
# What models call a table of learned positions.
_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def text_config(config: object) -> Any:
    """The language model's configuration, also where it is a part of a multimodal one."""
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several parts read text
        return config


def position_limit(config: object) -> int | None:
    """How many positions a causal language model has by its configuration; None where nothing limits them.

    A sliding window limits what a token sees and not how many there are. ALiBi needs no positions, unless a model makes
    its biases in advance (`max_seq_len`). YaRN and linear scaling stretch `original_max_position_embeddings` by
    `factor`, whatever `max_position_embeddings` still says.

    Args:
        config: of the model; the text's part of a multimodal one is read.
    """
    config = text_config(config)
    if getattr(config, "alibi", False):
        return None
    given = (getattr(config, name, None) for name in _LIMITS)
    limits = [value for value in given if isinstance(value, int) and not isinstance(value, bool) and value > 0]
    if not limits:
        return None
    stretched = [
        int(one["original_max_position_embeddings"] * one["factor"])
        for one in _rope_sets(config)
        if one.get("rope_type") in ("yarn", "linear") and one.get("original_max_position_embeddings")
        if one.get("factor")
    ]
    return max(limits[0], *stretched) if stretched else limits[0]


def position_table_limit(model: nn.Module) -> int | None:
    """How many positions a model has by its table of learned ones; None where it has no such table.

    The limit that a reward model must keep: rotary and relative positions go on behind what a configuration says.
    """
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in _TABLES:
            # RoBERTa and its like give the first token the row behind that of the padding, OPT and BART a fixed row.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first - int(getattr(module, "offset", 0)))
    return min(limits, default=None)


def frequency_limits(config: object) -> list[int]:
    """Lengths beyond which a model reads every position by other rotary frequencies (longrope)."""
    sets = _rope_sets(text_config(config))
    return [int(one["original_max_position_embeddings"]) for one in sets if one.get("rope_type") == "longrope"]


def _rope_sets(config: object) -> list[dict[str, Any]]:
    """Rotary parameters: either one set, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def check_positions(
    config: object, name: str, new_tokens: int, shortest: int, longest: int, whose: str = "model"
) -> None:
    """Prompts of a batch leave room for their completions, or ValueError.

    Args:
        config: of the model that reads them.
        name: of the setting that says how long completions may become.
        new_tokens: its value.
        shortest: tokens of the shortest prompt.
        longest: tokens of the longest prompt.
        whose: what errors call the model.
    """
    limit = position_limit(config)
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(_too_long(name, new_tokens, longest, f"the {whose}", limit))
    wrong = _frequencies_change(name, new_tokens, shortest, longest, frequency_limits(config))
    if wrong is not None:
        raise ValueError(wrong)


def _too_long(name: str, new_tokens: int, length: int, whose: str, limit: int) -> str:
    return f"{name} = {new_tokens} after a prompt of {length} tokens is more than {whose}'s {limit} positions"


def _frequencies_change(name: str, new_tokens: int, shortest: int, longest: int, limits: Sequence[int]) -> str | None:
    """What is wrong where prompts of one batch end, or go on, on both sides of such a limit; None where nothing is."""
    for original in limits:
        # The rollout's cache has the first tokens by the frequencies of short texts. A replay reads the whole text at
        # once, and all tokens by those of long texts, so it would differentiate another model.
        if shortest <= original < longest + new_tokens - 1:
            return (
                f"{name} = {new_tokens} after prompts of {shortest} to {longest} tokens passes position {original}, where "
                "the model's rotary frequencies (longrope) change for all positions"
            )
    return None


@dataclass(frozen=True)
class Room:
    """What prompts must leave room for, and what happens to those that don't.

    Attributes:
        completion: `max_completion_length`.
        longest_prompt: `max_prompt_length`.
        choice: `long_prompts`: "error", "truncate" (on the left) or "skip".
        positions: how many positions every model has that reads prompt and completion, by what errors call it.
        frequencies: see `frequency_limits`, of the policy.
    """

    completion: int
    longest_prompt: int | None = None
    choice: str = "error"
    positions: dict[str, int] = field(default_factory=dict)
    frequencies: tuple[int, ...] = ()

    @property
    def longest(self) -> int | None:
        """No prompt may have more tokens; None where nothing limits them."""
        limits = [limit - self.completion for limit in self.positions.values()]
        return min([*limits, *([] if self.longest_prompt is None else [self.longest_prompt])], default=None)

    @property
    def unquestioned(self) -> int | None:
        """A prompt of at most so many tokens needs no further look; None where every prompt fits."""
        below = [original - self.completion + 1 for original in self.frequencies]
        return min([*below, *([] if self.longest is None else [self.longest])], default=None)

    def excess(self, length: int) -> str | None:
        """Why a prompt of so many tokens does not fit, or None."""
        if self.longest_prompt is not None and length > self.longest_prompt:
            return f"a prompt of {length} tokens is longer than max_prompt_length = {self.longest_prompt}"
        for whose, limit in self.positions.items():
            if length + self.completion > limit:
                return _too_long("max_completion_length", self.completion, length, whose, limit)
        return self.mixture(length, length)

    def mixture(self, shortest: int, longest: int) -> str | None:
        """Why prompts of these lengths can not be completed in one batch, or None."""
        return _frequencies_change("max_completion_length", self.completion, shortest, longest, self.frequencies)

    def cut(self, length: int) -> int:
        """How many tokens stay of a prompt that does not fit."""
        kept = length if self.longest is None else min(length, self.longest)
        return kept if self.excess(kept) is None or self.unquestioned is None else self.unquestioned
