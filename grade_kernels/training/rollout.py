"""Sampling completions: no graph, a key-value cache, and noise that belongs to a sequence and a position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import linear_gumbel_ste
from grade_kernels.ops.repeated_sampler import RepeatedSampler
from grade_kernels.training.completions import Completions
from grade_kernels.training.model import (
    LanguageModel,
    cache_arguments,
    cache_of,
    evaluating,
    is_sharded,
    last_hidden_state,
    position_arguments,
    position_ids,
)
from grade_kernels.training.records import Ending, Prompts

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
        given: whether the tokens came from elsewhere, so that the noise of their rows did not draw them.
        logprobs: `[B, T]`, log-probabilities of given tokens where they were drawn, 0 behind the end; None if not told.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    row_ids: torch.Tensor
    hidden: torch.Tensor | None
    given: bool = False
    logprobs: torch.Tensor | None = None

    @classmethod
    def of(cls, completions: Completions, ending: Ending, noise: GumbelNoise, model: nn.Module) -> Rollout:
        """Completions that came from elsewhere, on the device that they are on.

        Args:
            completions: of all prompts.
            ending: how they end.
            noise: seed, and the sequences' identities in `row_ids` (see `noise_rows`).
            model: the policy. Where processes hold parts of it, all of their completions become equally long.
        """
        if is_sharded(model):
            longest = torch.tensor(completions.ids.shape[1], device=completions.ids.device)
            torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
            completions = completions.widened(int(longest), ending.pad)
        batch, time = completions.ids.shape
        rows = noise_rows(noise, batch, time, completions.ids.device)
        return cls(completions.ids, completions.mask, rows, None, given=True, logprobs=completions.logprobs)


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
    prompts: Prompts,
    ending: Ending,
    noise: GumbelNoise,
    *,
    soft_tau: float | None = None,
    keep_hidden: bool = False,
) -> Rollout:
    """Complete prompts in eval mode, until every sequence has ended or is `ending.max_new_tokens` long.

    The noise of a token depends on its sequence and position alone, so a completion is the same in every batch (up to
    the rounding of a matrix product whose shape depends on the batch).

    Args:
        policy: the model; only tokens that it allows are sampled.
        prompts: padded on the left.
        ending: how completions end.
        noise: seed, and the sequences' identities in `row_ids` (see `noise_rows`).
        soft_tau: None feeds the sampled token back; a number feeds back the mixture `softmax((l + g) / tau) @ E`.
        keep_hidden: keep the hidden states that the tokens were drawn from.
    """
    together = is_sharded(policy.model)
    decode = _Decode(policy, ending, noise.seed, soft_tau, keep_hidden, together)
    rows = noise_rows(noise, len(prompts), ending.max_new_tokens, prompts.ids.device)
    if _reads(policy, prompts, together):
        return decode(prompts, rows)
    # Where processes must keep step, each takes its prompts one by one; otherwise all of one length together.
    groups = torch.arange(len(prompts), device=rows.device) if together else prompts.lengths
    order, parts = [], []
    for group in groups.unique().tolist():
        chosen = (groups == group).nonzero()[:, 0]
        parts.append(decode(prompts.rows(chosen), rows[chosen]))
        order.append(chosen)
    return _joined(parts, torch.cat(order), rows, ending.pad)


@dataclass(frozen=True)
class _Decode:
    """Completes prompts that the policy reads as they are, step by step behind a key-value cache."""

    policy: LanguageModel
    ending: Ending
    seed: int | torch.Tensor
    soft_tau: float | None
    keep_hidden: bool
    together: bool

    def __call__(self, prompts: Prompts, rows: torch.Tensor) -> Rollout:
        """Completions of prompts whose tokens are drawn with the noise of `rows`, `[B, max_new_tokens]`."""
        policy, ending = self.policy, self.ending
        device = prompts.ids.device
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        ends = torch.tensor(list(ending.eos), dtype=torch.int64, device=device)
        mask, positions = prompts.mask, position_ids(prompts.mask)
        inputs: dict[str, torch.Tensor] = {"input_ids": prompts.ids}
        cache, ids, masks, hiddens = None, [], [], []
        sampler: RepeatedSampler | None = None
        begins_apart = len(policy.allowed.spans(2)) > 1  # whether the first token has another mask than the second
        with evaluating(policy.model):
            for time in range(ending.max_new_tokens):
                output = policy.backbone(
                    **inputs,
                    attention_mask=mask,
                    **cache_arguments(policy.backbone, cache),
                    **position_arguments(policy.backbone, positions),
                )
                cache = cache_of(output)
                hidden = last_hidden_state(output)[:, -1]
                head, first = policy.unmasked_head(hidden), time == 0
                drawn = GumbelNoise(self.seed, rows[:, time].contiguous())
                if self.soft_tau is None:
                    if sampler is None or sampler.lm_head is not head.weight or (begins_apart and time == 1):
                        bias = policy.head(hidden, first).bias
                        sampler = RepeatedSampler(head.weight, bias=bias, logit_softcap=head.softcap)
                    token = sampler(head.hidden, drawn)
                else:
                    head = policy.head(hidden, first)
                    mixture, token, _ = linear_gumbel_ste(
                        head.hidden, head.weight, policy.table, self.soft_tau, estimator="soft", noise=drawn,
                        bias=head.bias, logit_softcap=head.softcap,
                    )  # fmt: skip
                token = torch.where(alive, token, ending.pad)
                ids.append(token)
                masks.append(alive)
                if self.keep_hidden:
                    hiddens.append(hidden)
                # Padding behind an end counts as a token. Nothing is read of it, but a sliding window with no token in it
                # is a row of -inf, which is NaN in eager float64 attention.
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                alive = alive & ~torch.isin(token, ends)
                if not _any(alive, self.together):
                    break
                positions = positions[:, -1:] + 1
                if self.soft_tau is None:
                    inputs = {"input_ids": token[:, None]}
                else:
                    assert isinstance(mixture, torch.Tensor)
                    inputs = {"inputs_embeds": mixture[:, None] * policy.embed_scale}
        return Rollout(
            torch.stack(ids, 1),
            torch.stack(masks, 1).long(),
            rows[:, : len(ids)],
            torch.stack(hiddens, 1) if self.keep_hidden else None,
        )


def _any(alive: torch.Tensor, together: bool) -> bool:
    """Whether any sequence goes on; of any process, where all must take part in every forward pass."""
    some = alive.any()
    if together:
        some = some.int()
        torch.distributed.all_reduce(some, op=torch.distributed.ReduceOp.MAX)
    return bool(some)


def _reads(policy: LanguageModel, prompts: Prompts, together: bool) -> bool:
    """Whether the policy reads these rows as they are: none is padded, or its padding does no harm.

    Eager attention takes its softmax in float32, where the least number of float64, which masks, becomes -inf. A query that
    sees only padding then is NaN, and spreads.
    """
    eager = getattr(policy.model.config, "_attn_implementation", None) == "eager"
    harmless = policy.reads_left_padding and not (eager and policy.table.dtype == torch.float64)
    if harmless:
        return True
    # The layers of a sharded model run on all processes together, so every process must make the same number of forward
    # passes. Whether its own rows are padded would tell each process something else. So all take their rows one by one.
    alone = not together or len(prompts) == 1
    return alone and bool(prompts.mask.all())


def _joined(parts: list[Rollout], order: torch.Tensor, rows: torch.Tensor, pad: int) -> Rollout:
    """Completions of several groups of prompts as one batch, filled up to the longest.

    Args:
        parts: the groups' completions.
        order: `[B]`, which prompt each row of all groups together belongs to.
        rows: `[B, max_new_tokens]`, the noise rows of all prompts.
        pad: what tokens are filled up with.
    """
    time = max(part.ids.shape[1] for part in parts)
    back = order.argsort()

    def filled(tensors: list[torch.Tensor], fill: int = 0) -> torch.Tensor:
        """All rows in their order."""
        whole = [tensor.new_full((tensor.shape[0], time, *tensor.shape[2:]), fill) for tensor in tensors]
        for target, tensor in zip(whole, tensors, strict=True):
            target[:, : tensor.shape[1]] = tensor
        return torch.cat(whole)[back]

    hidden = [part.hidden for part in parts if part.hidden is not None]
    return Rollout(
        ids=filled([part.ids for part in parts], pad),
        mask=filled([part.mask for part in parts]),
        row_ids=rows[:, :time],
        hidden=filled(hidden) if hidden else None,
    )
