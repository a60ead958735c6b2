"""Sampling completions: no graph, a key-value cache, and noise that belongs to a sequence and a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import linear_gumbel_ste
from grade_kernels.ops.repeated_sampler import RepeatedSampler
from grade_kernels.training.policy import (
    LanguageModel,
    cache_arguments,
    cache_of,
    evaluating,
    is_sharded,
    last_hidden_state,
    position_arguments,
    position_ids,
)

__all__ = ["Rollout", "noise_rows", "rollout"]

_POSITIONS = 32  # bits of a noise row that count the position in a completion; the others name the sequence


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch of prompts; T is the length of the longest, at most `max_new_tokens`.

    Where processes hold parts of one model, T is the same on all: the replay's sweeps are counted by it.

    Attributes:
        ids: int64 `[B, T]`, the tokens; padding behind the end of a sequence.
        mask: int64 `[B, T]`, 1 up to and including the first end of sequence.
        row_ids: int64 `[B, T]`, the rows of noise the tokens were drawn with.
        hidden: `[B, T, H]`, the hidden states they were drawn from; None unless asked for.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    row_ids: torch.Tensor
    hidden: torch.Tensor | None


def noise_rows(noise: GumbelNoise, batch: int, time: int, device: torch.device) -> torch.Tensor:
    """Noise row of every token, int64 `[batch, time]`: the sequence's identity in the high half, the position below.

    Args:
        noise: its `row_ids` name the sequences, int64 `[batch]` in [0, 2^31). Default: their place in the batch.
        batch: number of sequences.
        time: number of tokens in each.
        device: of the result.

    Raises:
        ValueError: row_ids of another length or out of range.
    """
    sequences = noise.row_ids
    if sequences is None:
        sequences = torch.arange(batch)
    elif len(sequences) != batch:
        raise ValueError(f"noise.row_ids must name {batch} sequences, one per prompt, got {len(sequences)}")
    elif bool(((sequences < 0) | (sequences >= 2**31)).any()):
        raise ValueError(f"noise.row_ids must lie in [0, 2^31), got {sequences.tolist()}")
    return (sequences.to(device)[:, None] << _POSITIONS) + torch.arange(time, device=device)


@torch.no_grad()
def rollout(
    policy: LanguageModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    noise: GumbelNoise,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    soft_tau: float | None = None,
    keep_hidden: bool = False,
) -> Rollout:
    """Complete left-padded prompts in eval mode, until every sequence has ended or is `max_new_tokens` long.

    The noise of a token depends on its sequence and position alone, so a completion is the same in every batch (up to
    the rounding of a matrix product whose shape depends on the batch).

    Args:
        policy: the model; only tokens that it allows are sampled.
        input_ids: int64 `[B, P]`.
        attention_mask: `[B, P]`, 1 at real tokens.
        max_new_tokens: where completions are cut off.
        noise: seed, and the sequences' identities in `row_ids` (see `noise_rows`).
        eos_token_ids: tokens that end a sequence.
        pad_token_id: what stands behind the end.
        soft_tau: None feeds the sampled token back; a number feeds back the mixture `softmax((l + g) / tau) @ E`.
        keep_hidden: keep the hidden states that the tokens were drawn from.
    """
    together = is_sharded(policy.model)
    if not _reads(policy, attention_mask, together):
        return _by_length(
            policy, input_ids, attention_mask, together, max_new_tokens=max_new_tokens, noise=noise,
            eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, soft_tau=soft_tau, keep_hidden=keep_hidden,
        )  # fmt: skip
    device, batch = input_ids.device, input_ids.shape[0]
    rows = noise_rows(noise, batch, max_new_tokens, device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    ends = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
    mask, positions = attention_mask, position_ids(attention_mask)
    inputs: dict[str, torch.Tensor] = {"input_ids": input_ids}
    cache, ids, masks, hiddens = None, [], [], []
    sampler: RepeatedSampler | None = None
    begins_apart = len(policy.allowed.spans(2)) > 1  # the mask of the first token is not that of the second
    with evaluating(policy.model):
        for time in range(max_new_tokens):
            output = policy.backbone(
                **inputs,
                attention_mask=mask,
                **cache_arguments(policy.backbone, cache),
                **position_arguments(policy.backbone, positions),
            )
            cache = cache_of(output)
            hidden = last_hidden_state(output)[:, -1]
            head_input, weight = policy.head_input(hidden)
            drawn = GumbelNoise(noise.seed, rows[:, time].contiguous())
            if soft_tau is None:
                if sampler is None or sampler.lm_head is not weight or (begins_apart and time == 1):
                    sampler = RepeatedSampler(weight, **policy.head_options(first=time == 0))
                token = sampler(head_input, drawn)
            else:
                mixture, token, _ = linear_gumbel_ste(
                    head_input, weight, policy.table, soft_tau, estimator="soft", noise=drawn,
                    **policy.head_options(first=time == 0),
                )  # fmt: skip
            token = torch.where(alive, token, pad_token_id)
            ids.append(token)
            masks.append(alive)
            if keep_hidden:
                hiddens.append(hidden)
            mask = torch.cat([mask, alive[:, None].to(mask.dtype)], dim=1)
            alive = alive & ~torch.isin(token, ends)
            if not _any(alive, together):
                break
            positions = positions[:, -1:] + 1
            if soft_tau is None:
                inputs = {"input_ids": token[:, None]}
            else:
                assert isinstance(mixture, torch.Tensor)
                inputs = {"inputs_embeds": mixture[:, None] * policy.embed_scale}
    return Rollout(
        torch.stack(ids, 1),
        torch.stack(masks, 1).long(),
        rows[:, : len(ids)],
        torch.stack(hiddens, 1) if keep_hidden else None,
    )


def _any(alive: torch.Tensor, together: bool) -> bool:
    """Whether any sequence goes on; of any process, where all must take part in every forward pass."""
    some = alive.any()
    if together:
        some = some.int()
        torch.distributed.all_reduce(some, op=torch.distributed.ReduceOp.MAX)
    return bool(some)


def _reads(policy: LanguageModel, attention_mask: torch.Tensor, together: bool) -> bool:
    """Whether the policy reads these rows as they are: none is padded, or its padding does no harm.

    In eager attention the softmax is in float32, where float64's mask value is -inf: a padded row is NaN, and spreads.
    """
    eager = getattr(policy.model.config, "_attn_implementation", None) == "eager"
    harmless = policy.reads_left_padding and not (eager and policy.table.dtype == torch.float64)
    # Processes that must keep step can't go by the padding of their own rows: they take rows one by one.
    return harmless or (bool(attention_mask.all()) and not (together and len(attention_mask) > 1))


def _by_length(
    policy: LanguageModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    together: bool,
    *,
    noise: GumbelNoise,
    **options: Any,
) -> Rollout:
    """`rollout` of the prompts of each length by themselves, so that none is padded."""
    sequences = torch.arange(len(input_ids)) if noise.row_ids is None else noise.row_ids
    lengths = attention_mask.ne(0).sum(dim=1)
    # Where processes must keep step, each takes its prompts one by one.
    groups = torch.arange(len(lengths), device=lengths.device) if together else lengths
    parts, order = [], []
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero()[:, 0]
        length = int(lengths[rows[0]])
        own = GumbelNoise(noise.seed, sequences.to(rows.device)[rows])
        prompts = input_ids[rows, input_ids.shape[1] - length :]
        parts.append(rollout(policy, prompts, torch.ones_like(prompts), noise=own, **options))
        order.append(rows)
    time = max(part.ids.shape[1] for part in parts)
    back = torch.cat(order).argsort()

    def joined(tensors: list[torch.Tensor], fill: int = 0) -> torch.Tensor:
        """All rows in their order, filled up to the longest part."""
        filled = [tensor.new_full((tensor.shape[0], time, *tensor.shape[2:]), fill) for tensor in tensors]
        for target, tensor in zip(filled, tensors, strict=True):
            target[:, : tensor.shape[1]] = tensor
        return torch.cat(filled)[back]

    hidden = [part.hidden for part in parts if part.hidden is not None]
    return Rollout(
        ids=joined([part.ids for part in parts], options["pad_token_id"]),
        mask=joined([part.mask for part in parts]),
        row_ids=noise_rows(GumbelNoise(noise.seed, sequences), len(input_ids), time, input_ids.device),
        hidden=joined(hidden) if hidden else None,
    )
