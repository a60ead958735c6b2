"""`grade_loss`: the functional core of the trainer, for training loops of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from grade_kernels.noise import GumbelNoise
from grade_kernels.training.aligner import Aligner, GradeLoss, checked_beta
from grade_kernels.training.allowed_tokens import AllowedTokens, TokenIds
from grade_kernels.training.completions import Completions, LogprobRows, TokenRows
from grade_kernels.training.importance import ImportanceSampling
from grade_kernels.training.model import gather_root, read_language_model, unwrap
from grade_kernels.training.records import Ending, Prompts, Relaxation
from grade_kernels.training.reference import Reference, reference_for_loss
from grade_kernels.training.rewards import Columns, DifferentiableReward, Objective

__all__ = ["GradeLoss", "grade_loss"]


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
    columns: Columns | None = None,
    suppress_tokens: TokenIds | None = None,
    begin_suppress_tokens: TokenIds | None = None,
    completions: TokenRows | None = None,
    logprobs: LogprobRows | None = None,
    importance: ImportanceSampling | None = None,
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
        completions: of the prompts, from elsewhere, in the place of samples, for `ste`, `st` and `reinmax`: int64 `[B, T]`,
            padded behind their ends, or a list of token ids for each. Each has `max_new_tokens` tokens, or ends with an
            end of sequence. `noise` then is that of the relaxation alone, given these tokens.
        logprobs: log-probability of each of their tokens where it was drawn, in the same form. The result's `mismatch`
            then says how far that is from the policy.
        importance: weighs completions by how much more likely the policy is to draw them than what they were drawn from;
            needs `logprobs`. None takes them as the policy's own.

    Raises:
        NonFiniteRewardError: the reward is NaN or infinite somewhere.
        TypeError: an argument of a wrong type.
        ValueError: prompts that are not left-padded, shapes or vocabularies that do not match, numbers out of range, a
            reward without gradient, `beta` without a reference, a model that can not be replayed exactly, or completions
            that the policy can not have drawn (see `Completions.of`).
    """
    gather_root(unwrap(model))
    policy = read_language_model(model)
    policy = policy.allowing(
        AllowedTokens.without(policy.vocab_size, suppress_tokens, begin_suppress_tokens, policy.table.device)
    )
    relaxation = Relaxation(tau, estimator, feedback_hops, eps)
    ending = Ending.of(max_new_tokens, eos_token_id, pad_token_id)
    prompts = Prompts(input_ids, attention_mask)
    reference = reference_for_loss(model, ref_model, ref_adapter_name, beta := checked_beta(beta))
    aligner = Aligner(policy, [Objective(reward)], ending, reference, beta)
    aligner.check_prompts(prompts)
    if completions is None:
        if logprobs is not None or importance is not None:
            raise ValueError("logprobs and importance are for completions from elsewhere, but completions is None")
        return aligner.loss(prompts, noise, relaxation, columns)
    given = Completions.of(completions, ending, logprobs)
    return aligner.loss(prompts, noise, relaxation, columns, given, importance)
