"""A word-level tokenizer over the corpus, and the two ways the demo pads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer", "encode_prompts", "encode_reviews"]

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word. Policy and reward model share it, as GRADE requires."""
    vocabulary = {word: index for index, word in enumerate([PAD, BOS, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


def _encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], padding_side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(
        list(texts),
        padding=True,
        padding_side=padding_side,
        add_special_tokens=False,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"]


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)` of `<bos> prompt`, padded on the left, so that every row's next token is at the same place."""
    return _encode(tokenizer, [f"{BOS} {prompt}" for prompt in prompts], "left")


def encode_reviews(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)` of `<bos> text <eos>`, padded on the right."""
    return _encode(tokenizer, [f"{BOS} {text} {EOS}" for text in texts], "right")
