"""Any labelled text: a tokenizer, a small language model and a classifier, each from a part of the data of its own."""

from __future__ import annotations

import copy
import csv
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from benchmarks.alignment.tasks.base import Task
from grade_kernels.demo.config import PolicyConfig, RewardConfig, settings_hash
from grade_kernels.demo.models import MAX_POSITIONS, Reviews, fit_policy, fit_reward
from grade_kernels.demo.tokenizer import BOS, EOS, PAD
from grade_kernels.training import Prompts

__all__ = ["LabelledText", "TextConfig", "build", "read_csv"]


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the models, how the data is divided, and whether the end of a text is a token of it."""

    vocab_size: int = 2048
    policy: PolicyConfig = dataclasses.field(
        default_factory=lambda: PolicyConfig(width=96, layers=3, heads=4, steps=800, learning_rate=4e-3)
    )
    reward: RewardConfig = dataclasses.field(default_factory=lambda: RewardConfig(width=64, layers=1, steps=500))
    prompt_words: int = 4
    max_new_tokens: int = 24
    policy_share: float = 0.55
    reward_share: float = 0.25  # the rest gives prompts
    evaluation_prompts: int = 256
    ends: bool = True
    seed: int = 0

    @classmethod
    def quick(cls, **changes: Any) -> TextConfig:
        """Small models, trained in seconds."""
        return cls(
            vocab_size=1024,
            policy=PolicyConfig(width=64, layers=2, heads=4, steps=250, learning_rate=4e-3),
            reward=RewardConfig(width=32, layers=1, steps=200),
            evaluation_prompts=64,
            **changes,
        )


@dataclass(frozen=True)
class LabelledText:
    """A text and whether its label is the wanted one; None for labels that are neither wanted nor unwanted."""

    text: str
    positive: bool | None


def read_csv(
    path: Path, *, text_column: str, label_column: str, positive: Sequence[str], negative: Sequence[str]
) -> list[LabelledText]:
    """Texts and labels of a CSV file with a header.

    Raises:
        OSError: there is no such file.
        ValueError: a column is missing, or a label occurs nowhere.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for option, column in (("--text-column", text_column), ("--label-column", label_column)):
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{option} must be a column of {path}, one of {reader.fieldnames}, got {column!r}")
        rows = [(" ".join(row[text_column].split()), row[label_column]) for row in reader]
    found = {label for _, label in rows}
    for option, labels in (("--positive", positive), ("--negative", negative)):
        if missing := set(labels) - found:
            raise ValueError(f"{option} must name labels of {path}, which are {sorted(found)}, got {sorted(missing)}")
    verdicts: dict[str, bool] = dict.fromkeys(negative, False) | dict.fromkeys(positive, True)
    return [LabelledText(text, verdicts.get(label)) for text, label in rows if text]


def build(
    texts: Sequence[LabelledText], cache: Path, console: Console, *, config: TextConfig, name: str = "csv"
) -> Task:
    """Divide the texts, train what has not been trained, and make prompts of the first words of the rest.

    The policy learns from texts of any label, in their natural proportion; the classifier from both labels equally
    often. No prompt begins a text that either of them learned from, and none is in two of the three sets.

    Raises:
        ValueError: too few texts for the sets of prompts.
    """
    order = random.Random(config.seed).sample(range(len(texts)), len(texts))
    first = int(config.policy_share * len(texts))
    second = first + int(config.reward_share * len(texts))
    policy_texts, reward_texts, rest = (
        [texts[i] for i in part] for part in (order[:first], order[first:second], order[second:])
    )
    seen = {_prompt(item.text, config) for item in (*policy_texts, *reward_texts)}
    long_enough = (item.text for item in rest if len(item.text.split()) > config.prompt_words)
    prompts = [text for text in dict.fromkeys(_prompt(text, config) for text in long_enough) if text not in seen]
    held_out = config.evaluation_prompts
    if len(prompts) < 3 * held_out:
        raise ValueError(
            f"--data must hold more texts: of {len(texts)}, {len(prompts)} prompts are left, and validation, test and "
            f"training take at least {held_out} each"
        )
    tokenizer = _build_tokenizer([item.text for item in policy_texts], config.vocab_size)
    identity = settings_hash("texts 1", config, settings_hash([[item.text, item.positive] for item in texts]))
    held_out_texts = [item for item in rest if item.positive is not None][: 2 * held_out]

    def reviews(train: list[LabelledText], held_out: list[LabelledText]) -> tuple[Reviews, Reviews]:
        return _encode(train, tokenizer, config), _encode(held_out, tokenizer, config)

    def policy_data() -> tuple[Reviews, Reviews]:
        return reviews(policy_texts, rest[: 2 * held_out])

    def reward_data() -> tuple[Reviews, Reviews]:
        return reviews(_balanced(reward_texts), _balanced(held_out_texts))

    policy, policy_note = fit_policy(cache / f"policy-{identity}", config.policy, policy_data, tokenizer, console)
    reward, reward_note = fit_reward(cache / f"reward-{identity}", config.reward, reward_data, len(tokenizer), console)
    sets = (prompts[2 * held_out :], prompts[:held_out], prompts[held_out : 2 * held_out])
    train, validation, test = (_encode_prompts(part, tokenizer) for part in sets)
    return Task(
        name=name,
        identity=identity,
        start=lambda: copy.deepcopy(policy),
        value_backbone=lambda: copy.deepcopy(policy.transformer),
        reference=copy.deepcopy(policy).requires_grad_(False),
        reward=reward,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        test=test,
        max_new_tokens=config.max_new_tokens,
        ends=config.ends,
        notes={
            "policy parameters": policy.num_parameters(),
            "vocabulary": len(tokenizer),
            "texts for policy, reward and prompts": f"{len(policy_texts)}, {len(reward_texts)}, {len(rest)}",
            "start policy's perplexity": policy_note["perplexity"],
            "reward model's accuracy, both labels equally often": reward_note["accuracy"],
        },
    )


def _prompt(text: str, config: TextConfig) -> str:
    return " ".join(text.split()[: config.prompt_words])


def _build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=True)
    inner.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def _encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Prompts:
    bos = int(tokenizer.bos_token_id)  # type: ignore[arg-type]
    rows = [[bos, *row] for row in _ids(prompts, tokenizer)]
    return Prompts.of(rows, int(tokenizer.pad_token_id))  # type: ignore[arg-type]


def _encode(items: Sequence[LabelledText], tokenizer: PreTrainedTokenizerFast, config: TextConfig) -> Reviews:
    """`<bos> text <eos>`, without the end where nothing ends, cut where a completion of its prompt would be: nothing
    longer is ever written or read."""
    bos = int(tokenizer.bos_token_id)  # type: ignore[arg-type]
    end = [int(tokenizer.eos_token_id)] if config.ends else []  # type: ignore[arg-type]
    rows, lengths = [], []
    prompts = _ids([_prompt(item.text, config) for item in items], tokenizer)
    for prompt, text in zip(prompts, _ids([item.text for item in items], tokenizer), strict=True):
        lengths.append(1 + len(prompt))
        rows.append([bos, *text, *end][: min(MAX_POSITIONS, lengths[-1] + config.max_new_tokens)])
    ids = pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=float(tokenizer.pad_token_id)
    )
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])  # type: ignore[arg-type]
    sentiments = torch.tensor([float(bool(item.positive)) for item in items])
    return Reviews(ids, mask.long(), torch.tensor(lengths), sentiments)


def _balanced(items: Sequence[LabelledText]) -> list[LabelledText]:
    """Both labels equally often: the rarer one is repeated."""
    sides = [[item for item in items if item.positive is wanted] for wanted in (False, True)]
    size = max(map(len, sides))
    return [side[i % len(side)] for i in range(size) for side in sides if side]
