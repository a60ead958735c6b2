"""`Aligner`: a model with the rewards and the reference that it is aligned by, checked once and then called per batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise
from grade_kernels.training.completions import Completions
from grade_kernels.training.importance import ImportanceSampling, Mismatch
from grade_kernels.training.model import LanguageModel, check_checkpointing, gather_root, unwrap
from grade_kernels.training.numbers import plain
from grade_kernels.training.positions import check_positions
from grade_kernels.training.records import Ending, Prompts, Relaxation
from grade_kernels.training.reference import Reference
from grade_kernels.training.replay import (
    Criterion,
    Layout,
    completion_kl,
    completion_logprobs,
    refer,
    replay,
    score_completions,
    with_hidden,
)
from grade_kernels.training.rewards import Columns, Objective, check_reward_device, weighted_sum
from grade_kernels.training.rollout import Rollout, rollout

__all__ = ["Aligner", "GradeLoss", "check_vocabulary", "checked_beta"]


@dataclass(frozen=True)
class GradeLoss:
    """Result of `grade_loss`; B prompts, T the length of the longest completion.

    Attributes:
        loss: 0-d, `-mean(rewards) + beta * mean(kl)`; its backward leaves gradients on the model's parameters. With
            `skip_truncated` of `Aligner`, completions that never ended are 0 in both means, which still divide by B.
        rewards: `[B]`, without graph.
        completion_ids: int64 `[B, T]`.
        completion_mask: int64 `[B, T]`, 1 up to and including the first end of sequence.
        kl: `[B]`, nats per completion, without graph; 0 where there is no reference.
        row_ids: int64 `[B, T]`, the noise rows that were used.
        logprobs: `[B, T]`, the policy's log-probability of each token; 0 behind the end.
        values: `[rewards, B]`, every reward by itself.
        mismatch: how far the distribution that given completions were drawn from is from the policy's; None for the
            policy's own, and where their log-probabilities are not known.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    kl: torch.Tensor
    row_ids: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    mismatch: Mismatch | None = None


class Aligner:
    """A policy, the rewards that it is aligned by, and the reference that it is held to.

    All of them are read and checked here, once. `loss` is then called with what a step brings. It checks again only what
    training may change: which parameters require a gradient, where a reference shares them.

    Args:
        policy: the policy's parts, with the tokens that may be sampled.
        objectives: the rewards with their weights.
        ending: how completions end.
        reference: what the KL refers to; None for no KL.
        beta: factor of the KL.
        skip_truncated: completions that never ended weigh 0 in `loss`, whose divisor stays the number of prompts.
            `evaluate` counts them all.

    Raises:
        TypeError: beta is no number.
        ValueError: tokens outside the vocabulary, a vocabulary that a reward or the reference does not share, beta out of
            range, or no end of sequence that can be sampled.
    """

    def __init__(
        self,
        policy: LanguageModel,
        objectives: Sequence[Objective],
        ending: Ending,
        reference: Reference | None = None,
        beta: float = 0.0,
        *,
        skip_truncated: bool = False,
    ) -> None:
        self.policy, self.ending, self.skip_truncated = policy, ending, skip_truncated
        ending.check(policy.vocab_size)
        policy.allowed.check_ends(ending.eos)
        for objective in objectives:
            check_vocabulary(objective, policy, ending.pad)
        self.criterion = Criterion(tuple(objectives), reference, checked_beta(beta))
        self._check_reference()
        self._can_sweep = False  # whether the model's gradient checkpointing was found to serve sweeps

    @property
    def reference(self) -> Reference | None:
        """What the KL refers to."""
        return self.criterion.reference

    def check_prompts(self, prompts: Prompts) -> None:
        """Prompts of the vocabulary that leave room for their completions, or ValueError. Waits for the device."""
        prompts.check_values(self.policy.vocab_size)
        lengths, new_tokens = prompts.lengths, self.ending.max_new_tokens
        shortest, longest = int(lengths.min()), int(lengths.max())
        check_positions(self.policy.model.config, "max_new_tokens", new_tokens, shortest, longest)
        self._check_reference(longest + new_tokens)

    def loss(
        self,
        prompts: Prompts,
        noise: GumbelNoise,
        relaxation: Relaxation,
        columns: Columns | None = None,
        completions: Completions | None = None,
        importance: ImportanceSampling | None = None,
    ) -> GradeLoss:
        """Sample completions, and the loss whose `backward()` is the gradient of their reward through the samples.

        Args:
            prompts: with values that were checked, by `check_prompts` or on the host where they were made.
            noise: its seed, and in `row_ids` which sequence each prompt is (default: its place in the batch).
            relaxation: how the gradient runs back.
            columns: keywords for the rewards.
            completions: of the prompts, from elsewhere, in the place of samples. `noise` then is that of the relaxation
                alone, given these tokens.
            importance: how completions that were not drawn from the policy are weighed. None: each counts 1.

        Raises:
            NonFiniteRewardError: a reward is NaN or infinite somewhere.
            TypeError: noise of another type.
            ValueError: a reward without gradient or on another device, a model or a reference that training changed,
                completions that do not fit to prompts, vocabulary or estimator, or whose log-probabilities are missing.
        """
        policy, ending = self._ready(prompts, noise), self.ending
        if completions is not None:
            if relaxation.soft:
                raise ValueError(
                    "estimator must be ste, st or reinmax for given completions, got 'soft': the model reads mixtures of "
                    "embeddings there, which no token stands for"
                )
            if importance is not None and not isinstance(importance, ImportanceSampling):
                raise TypeError(f"importance must be an ImportanceSampling or None, got {type(importance).__name__}")
            if importance is not None and completions.logprobs is None:
                raise ValueError("importance needs the completions' logprobs, got None")
        if relaxation.feedback_hops != 0 and not self._can_sweep:
            check_checkpointing(policy.model)
            self._can_sweep = True
        if completions is not None:
            sample = self._given(completions, prompts, noise)
        else:
            sample = rollout(
                policy, prompts, ending, noise, soft_tau=relaxation.tau if relaxation.soft else None,
                keep_hidden=relaxation.soft,
            )  # fmt: skip
        dtype, device = compute_dtype(policy.table.dtype), prompts.ids.device
        row_weights = torch.full((len(prompts),), 1.0 / len(prompts), dtype=dtype, device=device)
        if self.skip_truncated:
            row_weights = row_weights * ending.ended(sample.ids, sample.mask)
        result = replay(
            policy, self.criterion, prompts, sample, noise, relaxation, row_weights=row_weights, columns=columns or {},
            importance=importance,
        )  # fmt: skip
        return self._result(sample, result.loss, result.values, result.kl, result.logprobs, result.mismatch)

    @torch.no_grad()
    def evaluate(
        self,
        prompts: Prompts,
        noise: GumbelNoise,
        columns: Columns | None = None,
        completions: Completions | None = None,
    ) -> GradeLoss:
        """Sample completions and judge them; the same record as of `loss`, without any graph.

        Arguments and errors are those of `loss`.
        """
        policy = self._ready(prompts, noise)
        if completions is None:
            sample = rollout(policy, prompts, self.ending, noise, keep_hidden=True)
        else:
            sample = with_hidden(policy, prompts, self._given(completions, prompts, noise))
        values = score_completions(self.criterion.objectives, prompts, sample, columns or {})
        kl = values.new_zeros(len(prompts))
        if self.reference is not None:
            with self.reference.parts(policy.whole) as reference:
                ref_head = refer(reference, Layout.of(prompts, sample), below=policy.vocab_size)
            assert sample.hidden is not None
            kl = completion_kl(policy, ref_head, sample.hidden, sample).sum(dim=1)
        logprobs = completion_logprobs(policy, sample)
        rewards = weighted_sum(self.criterion.objectives, values)
        loss = (self.criterion.beta * kl.float() - rewards.detach().float()).mean()
        return self._result(sample, loss, values, kl, logprobs, None)

    def _given(self, completions: Completions, prompts: Prompts, noise: GumbelNoise) -> Rollout:
        """Completions from elsewhere, checked against prompts and vocabulary."""
        completions.check(len(prompts), self.policy.vocab_size, self.policy.allowed)
        return Rollout.of(completions.to(prompts.ids.device), self.ending, noise, self.policy.model)

    def _ready(self, prompts: Prompts, noise: GumbelNoise) -> LanguageModel:
        """The policy, with its parameters where the rollout reads them; makes the checks that do not wait for the device."""
        gather_root(unwrap(self.policy.whole))
        if not isinstance(noise, GumbelNoise):
            raise TypeError(f"noise must be a GumbelNoise, got {type(noise).__name__}")
        for objective in self.criterion.objectives:
            check_reward_device(objective, prompts.ids.device)
        self._check_reference()
        return self.policy

    def _check_reference(self, length: int = 0) -> None:
        if self.reference is not None:
            self.reference.check(self.policy.whole, self.policy, length)

    def _result(
        self,
        sample: Rollout,
        loss: torch.Tensor,
        values: torch.Tensor,
        kl: torch.Tensor,
        logprobs: torch.Tensor,
        mismatch: Mismatch | None,
    ) -> GradeLoss:
        return GradeLoss(
            loss=loss,
            rewards=weighted_sum(self.criterion.objectives, values),
            completion_ids=sample.ids,
            completion_mask=sample.mask,
            kl=kl,
            row_ids=sample.row_ids,
            logprobs=logprobs,
            values=values,
            mismatch=mismatch,
        )


def checked_beta(beta: float) -> float:
    """The factor of a KL, or TypeError or ValueError."""
    beta = plain(beta)
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}")
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta must not be negative, and finite, got {beta}")
    return float(beta)


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
