"""Prompt-only data sets, standard or conversational: checks, tokens, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["PromptCollator", "RepeatedPrompts", "check_prompt_dataset", "is_conversation", "prompt_text"]

# What rewards get by these names is the trainer's, whatever columns a data set may have that was tokenized before.
_RESERVED = ("prompt", "prompts", "completions", "completion_ids", "inputs_embeds", "attention_mask")


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages rather than a string."""
    return (
        isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
    )


def prompt_text(prompt: Any) -> str:
    """A prompt as a human reads it."""
    return "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt) if is_conversation(prompt) else str(prompt)


def check_prompt_dataset(name: str, dataset: Any) -> None:
    """A data set with a column `prompt` and something in it, or none; TypeError or ValueError otherwise."""
    if dataset is None:
        return
    rows = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    if isinstance(dataset, (str, dict)) or not rows:
        raise TypeError(f"{name} must be a data set with a column 'prompt', got {type(dataset).__name__}")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{name} must have a column 'prompt' (a string or a list of messages), got columns {columns}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one prompt, got none")


class PromptCollator:
    """Examples to a batch: left-padded tokens, the prompts themselves, and all other columns as lists.

    Columns that bear the name of an argument that rewards get anyway are left out.

    Args:
        tokenizer: of the policy.
        pad_token_id: what pads on the left.
    """

    def __init__(self, tokenizer: Any, pad_token_id: int) -> None:
        self.tokenizer, self.pad_token_id = tokenizer, pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of examples, each with a `prompt`.

        Returns:
            `input_ids` and `attention_mask` `[B, P]`, `prompts`, a list, and `columns`, a dict of lists.

        Raises:
            ValueError: an example without a prompt, or a prompt without a token.
            TypeError: a prompt that is neither a string nor a list of messages.
        """
        prompts = []
        for example in examples:
            if "prompt" not in example:
                raise ValueError(f"every example must have a 'prompt', got {sorted(example)}")
            prompts.append(example["prompt"])
        rows = [self.tokens(prompt) for prompt in prompts]
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        # As `datasets` has it, a column that an example lacks is None there.
        names = dict.fromkeys(name for example in examples for name in example if name not in _RESERVED)
        columns = {name: [example.get(name) for example in examples] for name in names}
        return {"input_ids": ids, "attention_mask": mask, "prompts": prompts, "columns": columns}

    def tokens(self, prompt: Any) -> list[int]:
        """A prompt's tokens; a conversation's through the chat template, up to where the assistant speaks or goes on."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif is_conversation(prompt):
            begun = prompt[-1]["role"] == "assistant"
            ids = self.tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=not begun, continue_final_message=begun, tokenize=True,
                return_dict=True,
            )["input_ids"]  # fmt: skip
        else:
            raise TypeError(f"a prompt must be a string or a list of messages, got {prompt!r}")
        if len(ids) == 0:
            raise ValueError(f"prompt {prompt!r} has no token; give it at least a beginning-of-sequence token")
        return list(ids)


class RepeatedPrompts(Sampler[int]):
    """All indices of a data set in an order that depends on seed and epoch alone, each `times` times in a row.

    Args:
        size: of the data set.
        times: how often each index comes.
        seed: of the order.
        shuffle: or the data set's own order.
    """

    def __init__(self, size: int, times: int, seed: int, shuffle: bool = True) -> None:
        self.size, self.times, self.seed, self.shuffle, self.epoch = size, times, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration belongs to."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size * self.times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.size, generator=generator).tolist() if self.shuffle else range(self.size)
        for index in order:
            yield from [index] * self.times
