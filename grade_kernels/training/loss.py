"""`grade_loss`: the functional core of the trainer, for training loops of one's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.head import canonical_eps
from grade_kernels.training.allowed_tokens import AllowedTokens, TokenIds
from grade_kernels.training.numbers import plain
from grade_kernels.training.policy import (
    LanguageModel,
    check_checkpointing,
    gather_root,
    read_language_model,
    unwrap,
)
from grade_kernels.training.positions import check_positions
from grade_kernels.training.reference import Reference, reference_for_loss
from grade_kernels.training.replay import replay
from grade_kernels.training.rewards import DifferentiableReward, Objective, weighted_sum
from grade_kernels.training.rollout import Rollout, rollout

__all__ = ["GradeLoss", "check_reward_device", "check_vocabulary", "grade_loss", "objectives_loss", "token_ids"]


@dataclass(frozen=True)
class GradeLoss:
    """Result of `grade_loss`; B prompts, T the length of the longest completion.

    Attributes:
        loss: 0-d, `-mean(rewards) + beta * mean(kl)`; its backward leaves gradients on the model's parameters.
        rewards: `[B]`, without graph.
        completion_ids: int64 `[B, T]`.
        completion_mask: int64 `[B, T]`, 1 up to and including the first end of sequence.
        kl: `[B]`, nats per completion, without graph; 0 where there is no reference.
        row_ids: int64 `[B, T]`, the noise rows that were used.
        logprobs: `[B, T]`, the policy's log-probability of each token; 0 behind the end.
        values: `[rewards, B]`, every reward by itself.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    kl: torch.Tensor
    row_ids: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor


def grade_loss(
    model: nn.Module,
    reward: DifferentiableReward,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    noise: GumbelNoise,
    tau: float = 1.0,
    estimator: str = "ste",
    feedback_hops: int | str = 4,
    eps: float = 2**-11,
    ref_model: nn.Module | Reference | None = None,
    ref_adapter_name: str | None = None,
    beta: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    columns: dict[str, Any] | None = None,
    suppress_tokens: TokenIds | None = None,
    begin_suppress_tokens: TokenIds | None = None,
) -> GradeLoss:
    """Sample completions, and return a loss whose `backward()` is the gradient of their reward through the samples.

    Token t of a completion is `argmax(l_t + g_t)`. The gradient runs through every relaxed sample that the reward
    reads, and through up to `feedback_hops` of those that the policy read of itself. The reward's and the reference's
    own parameters get no gradient. The model is left in the mode it came in; only the rollout switches to eval.

    Args:
        model: a decoder-only causal language model of transformers, or PEFT's wrapper of one, or either wrapped for
            distributed training.
        reward: `reward(inputs_embeds, attention_mask, **columns) -> [B]`, with its table `[V, D]` as
            `reward.embedding`; see `DifferentiableReward`.
        input_ids: prompts, int64 `[B, P]`, padded on the left.
        attention_mask: `[B, P]`, not 0 at real tokens, of any dtype.
        max_new_tokens: completions are cut off there.
        noise: seed of the Gumbel noise. Its `row_ids`, if any, say which sequence each prompt is, `[B]` in [0, 2^31);
            default: its place in the batch.
        tau: temperature of the relaxation; the tokens are always drawn from the model's own distribution.
        estimator: `ste`, `st`, `reinmax`, or `soft`, which feeds mixtures of embeddings instead of tokens.
        feedback_hops: how many relaxed samples in a row a path of the gradient may be fed back through, or "exact".
        eps: stochastic support of the sparse, unbiased backward; 0 is dense and exact.
        ref_model: the frozen reference of the KL: a model, or a `Reference`. `FrozenCopy(model)`, made before the first
            step, is the model as it was then, in the memory of its trained parameters; `WithoutAdapter()` is a PEFT
            model's bare base. Default with `beta`: the latter, with a warning where the adapter came trained.
        ref_adapter_name: the reference is the PEFT model with this other one of its adapters, which nothing trains.
        beta: factor of the KL; 0 needs no reference.
        eos_token_id: token or tokens that end a completion. None: nothing does.
        pad_token_id: what stands behind an end. Default: the first end of sequence, or 0.
        columns: keywords for the reward.
        suppress_tokens: tokens that are never sampled, as ids or as a mask, bool `[V]`, True at each of them. Their
            logits are -inf for policy and reference alike, and get no gradient; prompts may have them. Here belong the
            rows of the head that no token has: `range(len(tokenizer), model.config.vocab_size)`. The model's
            `generation_config` is not read.
        begin_suppress_tokens: tokens that are not sampled as the first of a completion, given in the same way.

    Raises:
        NonFiniteRewardError: the reward is NaN or infinite somewhere.
        TypeError: an argument of a wrong type.
        ValueError: prompts that are not left-padded, shapes or vocabularies that do not match, numbers out of range, a
            reward without gradient, `beta` without a reference, or a model that can not be replayed exactly.
    """
    return objectives_loss(
        model, [Objective(reward)], input_ids, attention_mask, max_new_tokens=max_new_tokens, noise=noise, tau=tau,
        estimator=estimator, feedback_hops=feedback_hops, eps=eps, ref_model=ref_model,
        ref_adapter_name=ref_adapter_name, beta=beta, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
        columns=columns, suppress_tokens=suppress_tokens, begin_suppress_tokens=begin_suppress_tokens,
    )  # fmt: skip


def objectives_loss(
    model: nn.Module,
    objectives: Sequence[Objective],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    noise: GumbelNoise,
    tau: float,
    estimator: str,
    feedback_hops: int | str,
    eps: float,
    ref_model: nn.Module | Reference | None,
    beta: float,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    columns: dict[str, Any] | None,
    ref_adapter_name: str | None = None,
    suppress_tokens: TokenIds | None = None,
    begin_suppress_tokens: TokenIds | None = None,
    skip_truncated: bool = False,
) -> GradeLoss:
    """`grade_loss` for several weighted rewards; with `skip_truncated`, completions that never ended count nothing."""
    max_new_tokens, tau, feedback_hops, eps, beta = map(plain, (max_new_tokens, tau, feedback_hops, eps, beta))
    eos_token_id, pad_token_id = plain(eos_token_id), plain(pad_token_id)
    gather_root(unwrap(model))
    policy = read_language_model(model)
    policy = policy.allowing(
        AllowedTokens.without(policy.vocab_size, suppress_tokens, begin_suppress_tokens, policy.table.device)
    )
    hops = _checked_hops(feedback_hops)
    checks.check_estimator(estimator)
    eps = canonical_eps(eps)
    ends = token_ids("eos_token_id", eos_token_id, policy.vocab_size)
    pads = token_ids("pad_token_id", pad_token_id, policy.vocab_size)
    policy.allowed.check_ends(ends)
    pad = (pads or ends or (0,))[0]
    check_prompts(policy, input_ids, attention_mask, max_new_tokens)
    attention_mask = attention_mask.ne(0).long()
    for objective in objectives:
        check_vocabulary(objective, policy, pad)
        check_reward_device(objective, input_ids.device)
    if not isinstance(noise, GumbelNoise):
        raise TypeError(f"noise must be a GumbelNoise, got {type(noise).__name__}")
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}")
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta must not be negative, and finite, got {beta}")
    reference = reference_for_loss(model, ref_model, ref_adapter_name, float(beta))
    if reference is not None:
        reference.check(model, policy, int(attention_mask.sum(dim=1).max()) + max_new_tokens)
    if hops != 0:
        check_checkpointing(policy.model)
    soft = estimator == "soft"
    sample = rollout(
        policy, input_ids, attention_mask, max_new_tokens=max_new_tokens, noise=noise, eos_token_ids=ends,
        pad_token_id=pad, soft_tau=tau if soft else None, keep_hidden=soft,
    )  # fmt: skip
    dtype = compute_dtype(policy.table.dtype)
    row_weights = torch.full((len(input_ids),), 1.0 / len(input_ids), dtype=dtype, device=input_ids.device)
    if skip_truncated:
        row_weights = row_weights * completed(sample, ends)
    result = replay(
        model, policy, objectives, input_ids, attention_mask, sample, noise=noise, tau=tau, estimator=estimator,
        feedback_hops=hops, eps=eps, beta=beta, row_weights=row_weights, columns=columns or {},
        reference=None if reference is None else reference.parts(model),
    )  # fmt: skip
    return GradeLoss(
        loss=result.loss,
        rewards=weighted_sum(objectives, result.values),
        completion_ids=sample.ids,
        completion_mask=sample.mask,
        kl=result.kl,
        row_ids=sample.row_ids,
        logprobs=result.logprobs,
        values=result.values,
    )


def completed(sample: Rollout, ends: Sequence[int]) -> torch.Tensor:
    """Whether each completion came to its end of sequence, bool `[B]`."""
    last = (sample.mask.sum(dim=1) - 1).clamp_min(0)
    return torch.isin(sample.ids.gather(1, last[:, None])[:, 0], torch.tensor(list(ends), device=last.device))


def token_ids(name: str, value: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    """A token, several or none as a tuple, each inside the vocabulary."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} must be an int, several or None, got {value!r}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {token}")
    return ids


def check_vocabulary(objective: Objective, policy: LanguageModel, pad_token_id: int) -> None:
    """The reward's table has a row for every token that the policy may sample and for the padding, or ValueError.

    Policy and reward with one tokenizer may be padded to different sizes: rows that are never sampled are not compared.
    """
    rows, last = objective.table.shape[0], policy.allowed.last(policy.vocab_size)
    if rows <= last:
        raise ValueError(
            f"{objective.name} must share the policy's vocabulary: its embedding table has {rows} tokens, the policy "
            f"scores {policy.vocab_size} and samples ids up to {last}"
        )
    if rows <= pad_token_id:
        raise ValueError(f"{objective.name} must have a row for pad_token_id = {pad_token_id}, but has {rows}")


def check_reward_device(objective: Objective, device: torch.device) -> None:
    """The reward's table is where the prompts are, or ValueError naming both."""
    if objective.table.device != device:
        raise ValueError(
            f"{objective.name} has its embedding table on device {str(objective.table.device)!r}, but the prompts are on "
            f"{str(device)!r}"
        )


def check_prompts(
    policy: LanguageModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int
) -> None:
    """Left-padded prompts that leave room for their completions, or TypeError or ValueError."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be an int, got {type(max_new_tokens).__name__}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.int64:
        raise TypeError(
            f"input_ids must be an int64 tensor, got {getattr(input_ids, 'dtype', type(input_ids).__name__)}"
        )
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape [B, P] with at least one token, got {tuple(input_ids.shape)}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    real = attention_mask.ne(0)
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention_mask must be left-padded: zeros, then at least one 1 up to the end of every row")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= policy.vocab_size:
        raise ValueError(f"input_ids must lie in [0, {policy.vocab_size}), got values in [{low}, {high}]")
    lengths = real.sum(dim=1)
    check_positions(policy.model.config, "max_new_tokens", max_new_tokens, int(lengths.min()), int(lengths.max()))


def _checked_hops(feedback_hops: object) -> int | None:
    """A number of sweeps, or None for all."""
    if feedback_hops == "exact":
        return None
    if isinstance(feedback_hops, bool) or not isinstance(feedback_hops, int):
        raise TypeError(f'feedback_hops must be an int or "exact", got {feedback_hops!r}')
    if feedback_hops < 0:
        raise ValueError(f"feedback_hops must not be negative, got {feedback_hops}")
    return feedback_hops
