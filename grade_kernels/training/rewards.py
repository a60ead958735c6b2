"""Rewards that are differentiated: classifiers of transformers behind an adapter, and any callable with a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from grade_kernels.training.records import Prompts
from grade_kernels.training.text_rewards import is_async

__all__ = [
    "TRANSFORMS",
    "Columns",
    "DifferentiableReward",
    "NonFiniteRewardError",
    "Objective",
    "SequenceClassificationReward",
    "check_gradient",
    "check_reward_device",
    "reward_table",
    "right_padded",
    "weighted_sum",
]

Columns = Mapping[str, object]
"""The data set's other columns by name, each a list: keywords of the rewards."""

OUTPUTS = ("probability", "log_odds", "raw")
TRANSFORMS = ("probability", "log_probability", "logit")


class DifferentiableReward(Protocol):
    """What a reward must be: a function of embeddings from its own table.

    `embedding` is the table `[V, D]` (or the `nn.Embedding` that holds it). The call gets `inputs_embeds` `[B, L, D]`,
    rows of that table for the prompt (padded on the left) and the completion (padded on the right), `attention_mask`
    `[B, L]`, and the data set's other columns as keywords, and returns one number per sequence, `[B]`.
    """

    @property
    def embedding(self) -> Any:
        """The table `[V, D]`."""

    def __call__(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **columns: object) -> torch.Tensor:
        """The reward of each sequence, `[B]`."""


class NonFiniteRewardError(ValueError):
    """A reward is NaN or infinite.

    Attributes:
        rows: which rows of the batch.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


def reward_table(reward: object, name: str = "reward") -> torch.Tensor:
    """The reward's table `[V, D]`.

    Raises:
        TypeError: no callable, one that returns a coroutine, or without a floating `embedding`.
        ValueError: a table that is not two-dimensional.
    """
    if is_async(reward):
        raise TypeError(
            f"{name} is asynchronous, but a differentiable reward is a part of the graph that backward runs through: it "
            "must return its tensor at once (only rewards of text may be `async def`)"
        )
    table = getattr(reward, "embedding", None)
    if isinstance(table, nn.Embedding):
        table = table.weight
    if not callable(reward) or not isinstance(table, torch.Tensor) or not table.is_floating_point():
        raise TypeError(
            f"{name} must be callable and have its table [V, D] as a floating point tensor `embedding`, got "
            f"{type(reward).__name__} with embedding {type(table).__name__}"
        )
    if table.dim() != 2:
        raise ValueError(f"{name}.embedding must have shape [V, D], got {tuple(table.shape)}")
    return table.detach()


def right_padded(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the real tokens of every row to its start, in order; differentiable.

    Args:
        inputs_embeds: `[B, L, D]`.
        attention_mask: `[B, L]`, 1 at real tokens, wherever they stand.

    Returns:
        `[B, L', D]` with zeros behind the end, and its mask `[B, L']`; L' is the longest row's length.
    """
    lengths = attention_mask.sum(dim=1)
    longest = max(int(lengths.max()), 1)
    order = attention_mask.ne(0).long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    packed = inputs_embeds.gather(1, order[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
    return torch.where(mask[..., None], packed, 0.0), mask.to(attention_mask.dtype)


class SequenceClassificationReward(nn.Module):
    """A sequence classifier of transformers as a differentiable reward.

    Rows are packed to the right-padded layout, which every family reads correctly. Decoder families (those with a
    `score` layer) are read through their backbone and pooled at the last real token, which their own forward does not
    do for embeddings; that token is the end of sequence where one was generated, also when it doubles as padding.
    Encoder families pool by themselves.

    Args:
        model: for sequence classification, plain or PEFT's. It is put in eval mode and frozen.
        label: index or name of the label that is rewarded. Default: the only one, or the second of two.
        output: `probability` of the label, its `log_odds`, or the `raw` score.
        name: what metrics and errors call it.

    Raises:
        TypeError: no such model.
        ValueError: an encoder-decoder, a label that does not exist or has to be chosen, an output that is unknown, or a
            model whose scores of embeddings this class does not reproduce.
    """

    def __init__(
        self, model: nn.Module, *, label: int | str | None = None, output: str = "probability", name: str | None = None
    ) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise TypeError(f"model must be a transformers sequence classifier, got {type(model).__name__}")
        kind = type(_inner(model)).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model must be an encoder or a decoder, but {kind} is an encoder-decoder")
        if not kind.endswith("ForSequenceClassification"):
            raise ValueError(f"model must be a sequence classifier, got {kind}")
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {OUTPUTS}, got {output!r}")
        self.label = _label_index(config, label)
        self.output = output
        self.__name__ = name or (getattr(config, "_name_or_path", "") or kind).rstrip("/").split("/")[-1]
        self.model: Any = model.eval().requires_grad_(False)
        self._decoder = isinstance(getattr(_inner(model), "score", None), nn.Module)
        self._verify()

    def train(self, mode: bool = True) -> SequenceClassificationReward:
        """A reward is a constant: it stays in eval mode."""
        return super().train(False)

    @property
    def embedding(self) -> torch.Tensor:
        """The model's table `[V, D]`."""
        return self._lookup.weight

    @property
    def _lookup(self) -> Any:
        return self.model.get_input_embeddings()

    def scores(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The model's scores of all labels, `[B, labels]`, at least float32."""
        embeds, mask = right_padded(inputs_embeds, attention_mask)
        scale = getattr(self._lookup, "embed_scale", 1.0)
        embeds = embeds * (scale.to(embeds.dtype) if isinstance(scale, torch.Tensor) else scale)
        if self._decoder:
            inner = _inner(self.model)
            backbone = getattr(inner, inner.base_model_prefix)
            hidden = backbone(inputs_embeds=embeds, attention_mask=mask, use_cache=False)[0]
            last = mask.sum(dim=1).long() - 1
            scores = inner.score(hidden[torch.arange(len(last), device=last.device), last])
        else:
            scores = self.model(inputs_embeds=embeds, attention_mask=mask).logits
        return scores if scores.dtype == torch.float64 else scores.float()

    def log_odds(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **columns: object) -> torch.Tensor:
        """Log-odds of the rewarded label, `[B]`; the score itself where labels do not exclude each other."""
        scores = self.scores(inputs_embeds, attention_mask)
        chosen = scores[:, self.label]
        others = torch.cat([scores[:, : self.label], scores[:, self.label + 1 :]], dim=1)
        if others.shape[1] == 0 or self.model.config.problem_type == "multi_label_classification":
            return chosen
        return chosen - others.logsumexp(dim=1)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **columns: object) -> torch.Tensor:
        """The reward of each row, `[B]`.

        Args:
            inputs_embeds: `[B, L, D]`, rows (or mixtures of rows) of `embedding`.
            attention_mask: `[B, L]`, 1 at real tokens, wherever they stand.
            columns: ignored.
        """
        if self.output == "raw":
            return self.scores(inputs_embeds, attention_mask)[:, self.label]
        odds = self.log_odds(inputs_embeds, attention_mask)
        return odds if self.output == "log_odds" else odds.sigmoid()

    @torch.no_grad()
    def _verify(self) -> None:
        """Reproduce the model's own scores of ids, alone and beside a longer row."""
        device, vocab = self.embedding.device, self.embedding.shape[0]
        if device.type == "meta":
            return
        kind = type(_inner(self.model)).__name__
        pad = getattr(self.model.config, "pad_token_id", None)
        ids = torch.tensor([token for token in range(vocab // 2, vocab) if token != pad][:5], device=device)
        mask = torch.ones(1, len(ids), dtype=torch.int64, device=device)
        truth = self.model(input_ids=ids[None], attention_mask=mask).logits
        if truth.dim() != 2:
            raise ValueError(f"model must return one row of scores per sequence, but {kind} returns {truth.dim()} axes")
        short = truth if len(ids) < 4 else self.model(input_ids=ids[None, :3], attention_mask=mask[:, :3]).logits
        padded = torch.zeros(2, len(ids), dtype=torch.int64, device=device)
        padded[0], padded[1, len(ids) - min(len(ids), 3) :] = 1, 1
        both = self.embedding[torch.stack([ids, ids.roll(len(ids) - min(len(ids), 3))])]
        try:
            ours = self.scores(both, padded)
        except Exception as error:
            raise ValueError(
                f"{kind} can not be read through its embeddings: {type(error).__name__}: {error}"
            ) from error
        bound = 0.02 * torch.cat([truth, short]).abs().max().clamp_min(1e-3)
        worst = torch.maximum((ours[0] - truth[0]).abs().max(), (ours[1] - short[0]).abs().max())
        if not worst <= bound:
            raise ValueError(
                f"{kind} can not be read through its embeddings: its scores of ids and of their embeddings differ by "
                f"{worst.item():.3g} (scaled embeddings, or pooling that depends on ids or padding)"
            )


def _inner(model: object) -> Any:
    """A classifier out of PEFT's wrapper; the adapter is in its layers and stays at work."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _label_index(config: Any, label: int | str | None) -> int:
    count = int(config.num_labels)
    if label is None:
        if count > 2:
            names = list((config.id2label or {}).values())
            raise ValueError(f"label must be chosen among the model's {count} labels {names}")
        return count - 1
    if isinstance(label, str):
        if label not in (config.label2id or {}):
            raise ValueError(f"label must be one of {list(config.label2id or {})}, got {label!r}")
        return int(config.label2id[label])
    if isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"label must be an int, a name or None, got {label!r}")
    if not 0 <= label < count:
        raise ValueError(f"label must lie in [0, {count}), got {label}")
    return label


@dataclass(frozen=True)
class Objective:
    """A reward with its weight, and what is differentiated in its place.

    Attributes:
        reward: the reward; its value is what is logged.
        weight: factor in the sum of all rewards.
        transform: `probability` differentiates the value itself; `log_probability` and `logit` need a value that is a
            probability.
        name: what errors and metrics call it.
    """

    reward: Callable[..., torch.Tensor]
    weight: float = 1.0
    transform: str = "probability"
    name: str = "reward"

    @property
    def table(self) -> torch.Tensor:
        """The reward's embedding table `[V, D]`."""
        return reward_table(self.reward, self.name)

    def embeds(self, ids: torch.Tensor, *, below: int | None = None) -> torch.Tensor:
        """The rows `[..., D]` of the table at some tokens, or ValueError where it has none.

        Args:
            ids: the tokens.
            below: all of them are known to be below this. Where the table has as many rows, none needs to be looked at,
                which would wait for the device.
        """
        table = self.table
        known = below is not None and below <= len(table)
        if not known and int(ids.max()) >= len(table):
            raise ValueError(
                f"{self.name} must have a row for every token it reads: its embedding table has {len(table)}, but a prompt "
                f"or its padding has token {int(ids.max())}"
            )
        return table[ids]

    def __call__(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, columns: Columns
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is differentiated, and the value without graph, both `[B]` and without the weight.

        Raises:
            NonFiniteRewardError: a value is NaN or infinite, or what is differentiated is.
            TypeError: the reward returned no floating tensor.
            ValueError: a wrong shape, or no probability where the transform needs one.
        """
        odds = getattr(self.reward, "log_odds", None)
        if self.transform != "probability" and odds is not None and getattr(self.reward, "output", "") == "probability":
            logit = odds(inputs_embeds, attention_mask, **columns)
            objective, value = (F.logsigmoid(logit) if self.transform == "log_probability" else logit), logit.sigmoid()
        else:
            value = self.reward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **columns)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(f"{self.name} must return a floating point tensor [B], got {what}")
            objective = value
        batch = inputs_embeds.shape[0]
        if value.shape != (batch,):
            raise ValueError(f"{self.name} must return one value per sequence ({batch},), got {tuple(value.shape)}")
        if self.transform != "probability" and objective is value:
            detached = value.detach()
            if bool(((detached < 0) | (detached > 1)).any()):
                raise ValueError(
                    f"{self.name} must return probabilities for reward_transform={self.transform!r}, got values in "
                    f"[{detached.min().item():.4g}, {detached.max().item():.4g}]"
                )
            objective = value.log() if self.transform == "log_probability" else value.logit()
        for named, result in ((self.name, value), (f"the {self.transform} of {self.name}", objective)):
            rows = (~result.detach().isfinite()).nonzero().flatten().tolist()
            if rows:
                raise NonFiniteRewardError(f"{named} is not finite in row(s) {rows} of the batch", rows)
        return objective, value.detach()


def check_gradient(objective: Objective, prompts: Prompts, new_tokens: int, columns: Columns) -> None:
    """A reward has a gradient on prompts with completions as long as they may become, or ValueError.

    A reward may have fewer positions than the policy, so the completions, of some token, are as long as that.

    Args:
        objective: the reward.
        prompts: some prompts.
        new_tokens: the greatest length of a completion.
        columns: keywords for the reward.
    """
    ids = torch.cat([prompts.ids, prompts.ids[:, -1:].expand(-1, new_tokens)], dim=1)
    mask = F.pad(prompts.mask, (0, new_tokens), value=1)
    check_reward_device(objective, ids.device)
    embeds = objective.embeds(ids).requires_grad_()
    try:
        value, _ = objective(embeds.clone(), mask, columns)
    except NonFiniteRewardError:
        return  # the step that meets it names its prompts
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{objective.name} fails on prompts with completions, {ids.shape[1]} tokens: {error}"
        ) from error
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), embeds, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{objective.name} has no gradient: it must be differentiable in inputs_embeds")


def check_reward_device(objective: Objective, device: torch.device) -> None:
    """The reward's table is where the prompts are, or ValueError naming both."""
    if objective.table.device != device:
        raise ValueError(
            f"{objective.name} has its embedding table on device {str(objective.table.device)!r}, but the prompts are on "
            f"{str(device)!r}"
        )


def weighted_sum(objectives: Sequence[Objective], values: torch.Tensor) -> torch.Tensor:
    """All rewards together, `[B]`, of their values `[rewards, B]`; no matrix product, which autocast would round."""
    weights = values.new_tensor([objective.weight for objective in objectives])
    return (weights[:, None] * values).sum(dim=0)
