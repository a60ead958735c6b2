"""Prompt-only data sets, standard or conversational: checks, batches, and prompts that are too long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils.data import IterableDataset, Sampler, Subset
from tqdm.auto import tqdm

from grade_kernels.training.config import GRADEConfig
from grade_kernels.training.media import media_columns_of_dataset, media_columns_of_example
from grade_kernels.training.positions import Room, frequency_limits, position_limit, position_table_limit
from grade_kernels.training.prompt_tokens import TEMPLATE_COLUMNS, Example, Prompt, PromptTokenizer, beginning_of
from grade_kernels.training.records import Prompts
from grade_kernels.training.rewards import Objective, SequenceClassificationReward
from grade_kernels.training.text_rewards import HELPERS

__all__ = [
    "RESERVED",
    "PromptBatch",
    "PromptCollator",
    "RepeatedPrompts",
    "check_prompt_dataset",
    "column_names",
    "room_for",
]

logger = logging.getLogger(__name__)

# Keywords that the trainer gives to rewards itself, and `self`, which a module's own call has.
RESERVED = (
    "self", "inputs_embeds", "attention_mask", "prompts", "completions", "completion_ids", *HELPERS,
)  # fmt: skip


def check_prompt_dataset(name: str, dataset: Any, drops_columns: bool = False) -> None:
    """A data set with a column `prompt` and something in it, or none; TypeError or ValueError otherwise.

    Args:
        name: what errors call it.
        dataset: columns are checked where it has `column_names`; the collator checks each example's.
        drops_columns: whether rewards get no columns, so that their names don't matter.
    """
    if dataset is None:
        return
    rows = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    if isinstance(dataset, (str, dict)) or not rows:
        raise TypeError(f"{name} must be a data set with a column 'prompt', got {type(dataset).__name__}")
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if "prompt" not in columns:
            raise ValueError(
                f"{name} must have a column 'prompt' (a string or a list of messages), got columns {columns}"
            )
        _check_columns(name, columns, media_columns_of_dataset(dataset), drops_columns)
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one prompt, got none")


def column_names(dataset: Any) -> list[str] | None:
    """The columns that rewards get of a data set; None where only its examples tell."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset, list) and dataset and isinstance(dataset[0], dict):
        columns = dict.fromkeys(name for example in dataset for name in example)
    return None if columns is None else [name for name in columns if name != "prompt"]


def _check_columns(name: str, columns: Sequence[Any], media: Sequence[str], drops_columns: bool) -> None:
    """Columns that can be handed to rewards by their names, and none of images and the like; ValueError otherwise."""
    if media:
        raise ValueError(
            f"{name} has columns {media}, but prompts must be text alone: images, videos and sounds are not carried through "
            "the replay (a column that only rewards read must have another name, and another type such as the file's name)"
        )
    if drops_columns:
        return
    taken = [column for column in columns if column in RESERVED or not isinstance(column, str)]
    if taken:
        raise ValueError(
            f"{name} has columns {taken}, which rewards can not get by these names: the trainer gives "
            f"{', '.join(RESERVED[1:])} itself (rename or remove the columns, or set remove_unused_columns)"
        )


class PromptBatch(TypedDict):
    """Prompts of one batch."""

    input_ids: torch.Tensor  # int64 [B, P], padded on the left
    attention_mask: torch.Tensor  # int64 [B, P]
    prompts: list[Prompt]
    columns: dict[str, list[object]]  # the data set's other columns


class PromptCollator:
    """Makes a batch of examples: left-padded tokens, the prompts themselves, and all other columns as lists.

    Args:
        tokens: of an example.
        pad_token_id: what pads on the left.
        room: what prompts must leave room for, and what happens to those that don't.
        vocab_size: tokens that the policy has; None checks nothing.
        tables: how many tokens rewards and a reference have, by what errors call them.
        drops_columns: whether rewards get no columns.
        progress: whether to show a bar where looking at a data set takes longer than some seconds.
    """

    def __init__(
        self,
        tokens: PromptTokenizer,
        pad_token_id: int,
        room: Room,
        *,
        vocab_size: int | None = None,
        tables: Mapping[str, int] | None = None,
        drops_columns: bool = False,
        progress: bool = False,
    ) -> None:
        self.tokens, self.pad_token_id, self.room = tokens, pad_token_id, room
        self.vocab_size, self.drops_columns, self.progress = vocab_size, drops_columns, progress
        self.tables = dict(tables or {})
        # Whether a token of the tokenizer's may be one that a model lacks; then every prompt is tokenized to see.
        least = min([*self.tables.values(), *([] if vocab_size is None else [vocab_size])], default=None)
        self._beyond = least is not None and tokens.may_reach(least)
        self._counted = True  # whether `fitting` counted the long prompts of a data set with a length
        self._long = 0

    def __call__(self, examples: Sequence[Example]) -> PromptBatch:
        """A batch of examples, each with a `prompt`.

        Raises:
            ValueError: an example without a prompt, a prompt without a token or with one that the policy does not have,
                one too long where that is an error, images, or a column by the name of something that rewards get anyway.
            TypeError: a prompt that is neither a string nor a list of messages.
        """
        rows = [self._fitted(example) for example in examples]
        lengths = [len(row) for row in rows]
        wrong = self.room.mixture(min(lengths), max(lengths))
        if wrong is not None:
            raise ValueError(f"{wrong}; let each batch have prompts of one side")
        padded = Prompts.of(rows, self.pad_token_id)
        names = () if self.drops_columns else dict.fromkeys(name for example in examples for name in example)
        # An example may lack a column that others have. It gets None there, as `datasets` does it.
        columns = {name: [example.get(name) for example in examples] for name in names if name != "prompt"}
        prompts = [example["prompt"] for example in examples]
        return {"input_ids": padded.ids, "attention_mask": padded.mask, "prompts": prompts, "columns": columns}

    def fitting(self, name: str, dataset: Any) -> Any:
        """A data set, or every one of a dict of such, with its prompts checked and without those to skip.

        All prompts of a data set with a length are looked at once. Those that are so short that they must fit, and whose
        text leaves no doubt of its tokens, are not tokenized, which makes it a matter of half a minute for a million short
        ones, and of some minutes for as many long ones, or where the tokenizer has tokens that the policy lacks. Examples of
        a data set without a length are checked as they come.

        Args:
            name: what errors and warnings call it.
            dataset: or None.

        Raises:
            ValueError: see `__call__`, or no prompt is left.
            TypeError: see `__call__`.
        """
        if dataset is None:
            return None
        if isinstance(dataset, dict) and "prompt" not in dataset:
            return {key: self.fitting(f"{name}[{key!r}]", part) for key, part in dataset.items()}
        check_prompt_dataset(name, dataset, self.drops_columns)
        if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
            self._counted = False
            return _Fitting.of(dataset, self._fits) if self.room.choice == "skip" else dataset
        size, long, first = len(dataset), [], ""
        examples = _examples(dataset)
        for index, example in enumerate(tqdm(examples, name, size, delay=3.0, disable=not self.progress, leave=False)):
            try:
                excess = self._excess(example)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}[{index}]: {error}") from error
            if excess is not None:
                long.append(index)
                first = first or f"{name}[{index}]: {_explained(excess, example)}"
                if self.room.choice == "error":
                    raise ValueError(first)
        if not long:
            return dataset
        what = f"{len(long)} of {size} prompts of {name} are too long and are"
        if self.room.choice == "truncate":
            logger.warning("%s cut on the left to at most %s tokens; the first is %s", what, self.room.longest, first)
            return dataset
        if len(long) == size:
            raise ValueError(f"{name} has no prompt left: all {size} are too long; the first is {first}")
        logger.warning("%s skipped; the first is %s", what, first)
        left = sorted(set(range(size)).difference(long))
        return dataset.select(left) if hasattr(dataset, "select") else Subset(dataset, left)

    def _check(self, example: Example) -> None:
        if "prompt" not in example:
            raise ValueError(f"every example must have a 'prompt', got {sorted(map(str, example))}")
        _check_columns("an example", list(example), media_columns_of_example(example), self.drops_columns)

    def _excess(self, example: Example) -> str | None:
        """Why an example's prompt does not fit, or None; an error where it could not be used at all."""
        self._check(example)
        self.tokens.check(example)
        enough = self.room.unquestioned
        fits = enough is None or self.tokens.bound(example) <= enough
        if fits and not self._beyond and not self.tokens.doubtful(example):
            return None
        ids = self.tokens(example)
        excess = self.room.excess(len(ids))
        if excess is None or self.room.choice == "truncate":
            self._check_range(example, ids if excess is None else ids[-self.room.cut(len(ids)) :])
        return excess

    def _fits(self, example: Example) -> bool:
        """Whether an example stays, said as they come."""
        excess = self._excess(example)
        if excess is not None:
            self._note("skipped", excess, example)
        return excess is None

    def _fitted(self, example: Example) -> list[int]:
        """An example's tokens, cut where that was chosen."""
        self._check(example)
        ids = self.tokens(example)
        excess = self.room.excess(len(ids))
        if excess is not None:
            if self.room.choice != "truncate":
                raise ValueError(_explained(excess, example))
            if not self._counted:
                self._note("cut on the left", excess, example)
            ids = ids[-self.room.cut(len(ids)) :]
        self._check_range(example, ids)
        return ids

    def _check_range(self, example: Example, ids: Sequence[int]) -> None:
        """Every token is one of the policy's, of every reward's and of the reference's, or ValueError."""
        if self.vocab_size is not None and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"input_ids must lie in [0, {self.vocab_size}), got values in [{min(ids)}, {max(ids)}]; the prompt begins "
                f"{beginning_of(example['prompt'])}"
            )
        for whose, size in self.tables.items():
            if max(ids) >= size:
                raise ValueError(
                    f"{whose} must have a row for every token it reads: its embedding table has {size}, but a prompt has "
                    f"token {max(ids)}; it begins {beginning_of(example['prompt'])}"
                )

    def _note(self, what: str, excess: str, example: Example) -> None:
        """Say how many prompts were too long so far, the more seldom the more there are."""
        self._long += 1
        if str(self._long).strip("0") == "1":
            logger.warning(
                "prompts %s so far because they are too long: %d; this one: %s",
                what,
                self._long,
                _explained(excess, example),
            )


def _explained(excess: str, example: Example) -> str:
    return (
        f"{excess}; the prompt begins {beginning_of(example['prompt'])} (lower max_completion_length, or set "
        'max_prompt_length and long_prompts = "truncate" or "skip")'
    )


def _examples(dataset: Any) -> Iterator[Example]:
    """All examples in order; of a table only the columns that make the prompt."""
    columns = getattr(dataset, "column_names", None)
    # A data set with a transform of the user's keeps all columns: the transform may read any of them.
    transformed = getattr(dataset, "format", {}).get("type") == "custom"
    if columns is not None and hasattr(dataset, "select_columns") and not transformed:
        dataset = dataset.select_columns([name for name in ("prompt", *TEMPLATE_COLUMNS) if name in columns])
    return (dataset[i] for i in range(len(dataset))) if not hasattr(dataset, "__iter__") else iter(dataset)


class _Fitting(IterableDataset[Example]):
    """The examples of a data set without a length that pass a test."""

    def __init__(self, dataset: Any, fits: Callable[[Example], bool]) -> None:
        self.dataset, self.fits = dataset, fits

    @classmethod
    def of(cls, dataset: Any, fits: Callable[[Example], bool]) -> Any:
        """By the data set's own filter where it has one, which keeps its shuffling and its state."""
        return dataset.filter(fits) if hasattr(dataset, "column_names") else cls(dataset, fits)

    def __iter__(self) -> Iterator[Example]:
        return filter(self.fits, iter(self.dataset))


def room_for(
    config: Any, objectives: Sequence[Objective], args: GRADEConfig, ref_model: nn.Module | None = None
) -> Room:
    """What prompts must leave room for: the completion, in the positions of policy, rewards and reference.

    Args:
        config: the policy's.
        objectives: rewards; those of transformers' classifiers are read for a table of positions.
        args: the settings of lengths.
        ref_model: the reference of the KL, where it is a model of its own.

    Raises:
        ValueError: a completion alone takes all positions.
    """
    limits = {"the model": position_limit(config)}
    if ref_model is not None:
        limits["ref_model"] = position_limit(ref_model.config)
    positions = {whose: limit for whose, limit in limits.items() if limit is not None}
    for objective in objectives:
        reward = objective.reward
        table = position_table_limit(reward.model) if isinstance(reward, SequenceClassificationReward) else None
        if table is not None:
            positions[objective.name] = table
    for whose, limit in positions.items():
        if limit <= args.max_completion_length:
            raise ValueError(
                f"max_completion_length = {args.max_completion_length} leaves no room for a prompt in {whose}'s {limit} "
                "positions"
            )
    return Room(
        args.max_completion_length,
        args.max_prompt_length,
        args.long_prompts,
        positions,
        tuple(frequency_limits(config)),
    )


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
