"""A word-level tokenizer over the corpus."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer", "encode_reviews", "with_start"]

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word. Policy and reward model share it, as GRADE requires."""
    vocabulary = {word: index for index, word in enumerate([PAD, BOS, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


def with_start(prompt: str) -> str:
    """`<bos> prompt`, the beginning of every review."""
    return f"{BOS} {prompt}"


def encode_reviews(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)` of `<bos> text <eos>`, padded on the right."""
    batch = tokenizer(
        [f"{with_start(text)} {EOS}" for text in texts],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"]
