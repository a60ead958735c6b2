"""The gradient through sampled tokens: one parallel forward pass, a few sweeps through time, one ordinary backward.

Let x be the embeddings the policy read for its own tokens, h = F(x) the hidden states they were drawn from, and y(h)
the relaxed samples. A step-by-step graph would feed x = y(h) E back. Its gradient with respect to x solves
`G = b + J^T G`, where b comes straight from the loss (through the reward's embeddings y E_R, and the KL of h) and
J = d(y E)/dx is strictly triangular in time, so that `G_{k+1} = b + J^T G_k` from G_0 = 0 is exact after T - 1 sweeps,
and K sweeps sum all paths through at most K fed-back relaxed samples. A sweep is one parallel backward pass to x alone.
The last one is left to the caller's `backward()`: the loss is a scalar whose gradient is the last sweep's, to every
parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import linear_gumbel_ste, linear_kl, linear_logprobs
from grade_kernels.training.allowed_tokens import with_rows
from grade_kernels.training.policy import (
    Capture,
    LanguageModel,
    last_hidden_state,
    position_arguments,
    position_ids,
    sweeping,
    unwrap,
)
from grade_kernels.training.rewards import Objective, weighted_sum
from grade_kernels.training.rollout import Rollout

__all__ = [
    "Layout",
    "Referred",
    "Replay",
    "completion_kl",
    "completion_logprobs",
    "refer",
    "replay",
    "score_completions",
]


@dataclass(frozen=True)
class Replay:
    """What a replay leaves: the loss with its graph, and values `[..., B]` without."""

    loss: torch.Tensor
    values: torch.Tensor  # [rewards, B], each reward as it is logged, without weight
    kl: torch.Tensor  # [B], nats per completion; 0 without a reference
    logprobs: torch.Tensor  # [B, T] of the tokens; 0 behind the end


def replay(
    model: nn.Module,
    policy: LanguageModel,
    objectives: Sequence[Objective],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sample: Rollout,
    *,
    noise: GumbelNoise,
    tau: float,
    estimator: str,
    feedback_hops: int | None,
    eps: float,
    reference: AbstractContextManager[LanguageModel] | None,
    beta: float,
    row_weights: torch.Tensor,
    columns: dict[str, Any],
) -> Replay:
    """Differentiate `sum_b row_weights[b] (beta KL_b - sum_i weight_i objective_i(b))` through the sampled tokens.

    Args:
        model: the policy as the training loop holds it; the forward pass goes through it, wrappers and all.
        policy: its parts.
        objectives: rewards, each with its table.
        input_ids: left-padded prompts, int64 `[B, P]`.
        attention_mask: `[B, P]`.
        sample: completions of `rollout` under the same noise; for `soft` with their hidden states.
        noise: seed of the rollout's noise.
        tau: temperature of the relaxation.
        estimator: `ste`, `st`, `reinmax` or `soft`.
        feedback_hops: sweeps K, or None for as many as make it exact.
        eps: stochastic support of the operations through the head; 0 is exact.
        reference: gives the frozen reference's parts while it is entered; None for no KL.
        beta: factor of the KL; at 0 it is computed without graph.
        row_weights: `[B]`, what each completion counts.
        columns: keywords for the rewards.
    """
    time = sample.ids.shape[1]
    hops = time - 1 if feedback_hops is None else min(feedback_hops, time - 1)
    if not torch.is_grad_enabled():
        hops = 0  # the value alone is wanted
    reward_tables = tuple(objective.table for objective in objectives)
    mixtures = _Mixtures(policy, sample, noise, tau, eps) if estimator == "soft" else None

    layout = Layout.of(input_ids, attention_mask, sample)
    embedded, hidden = _forward(model, policy, layout, mixtures)
    head_input, weight = policy.head_input(hidden)
    # The lookup of a fed-back token belongs to the forward pass above; here its table is a constant.
    fed_back = (policy.table.detach(),) if hops else ()
    tables = tuple(with_rows(table, len(weight)) for table in (*reward_tables, *fed_back))
    parts = []
    for span, first in policy.allowed.spans(time):
        part: Any = linear_gumbel_ste(
            head_input[:, span], weight, tables, tau, estimator=estimator,
            noise=_noise_of(sample, noise, span), ids=sample.ids[:, span].contiguous(), eps=eps,
            **policy.head_options(first),
        )  # fmt: skip
        parts.append(part)
    embeddings = [_joined([part.embedding[i] for part in parts]) for i in range(len(tables))]
    logprobs = _joined([part.logprobs.detach() for part in parts])
    sampled = embeddings[: len(reward_tables)]
    values, d_sampled = _reward_gradients(
        objectives, sampled, input_ids, attention_mask, sample.mask, row_weights, columns
    )
    kl = hidden.new_zeros(len(input_ids), dtype=values.dtype)
    if reference is not None:
        with reference as entered:
            referred = refer(entered, layout, mixtures)
        with torch.set_grad_enabled(beta != 0.0):
            kl = completion_kl(policy, referred, hidden, sample, eps, noise)

    outputs, d_outputs = list(sampled), list(d_sampled)
    if kl.requires_grad:
        outputs.append(kl)
        d_outputs.append((beta * row_weights).to(kl.dtype))
    if hops:
        fed_back_embedding = embeddings[-1]
        with sweeping(unwrap(model)):
            d_fed_back = _sweep(policy, layout, embedded, hidden, fed_back_embedding, outputs, d_outputs, hops)
        outputs.append(fed_back_embedding)
        d_outputs.append(d_fed_back)
    surrogate = sum((output * d_output).sum() for output, d_output in zip(outputs, d_outputs, strict=True))
    value = ((beta * kl.detach() - weighted_sum(objectives, values)) * row_weights).sum()
    # The number is the loss, the gradient is the surrogate's.
    loss = value + (surrogate - surrogate.detach()).to(value.dtype)  # type: ignore[union-attr]
    return Replay(loss, values, kl.detach(), _of_completions(logprobs, sample))


def _noise_of(sample: Rollout, noise: GumbelNoise, span: slice) -> GumbelNoise:
    """The noise that the tokens of some positions were drawn with."""
    return GumbelNoise(noise.seed, sample.row_ids[:, span].reshape(-1).contiguous())


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Tensors `[B, time, ...]` of one span of positions after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _sweep(
    policy: LanguageModel,
    layout: Layout,
    embedded: torch.Tensor,
    hidden: torch.Tensor,
    fed_back: torch.Tensor,
    outputs: list[torch.Tensor],
    d_outputs: list[torch.Tensor],
    hops: int,
) -> torch.Tensor:
    """The gradient `[B, T, D]` on the fed-back samples after so many sweeps, each one backward pass to the inputs."""
    # What the loss itself sends into h is the same in every sweep.
    (d_hidden,) = torch.autograd.grad(outputs, hidden, d_outputs, retain_graph=True)
    d_fed_back = torch.zeros_like(fed_back)
    total = d_hidden
    for hop in range(hops):
        if hop:
            (through,) = torch.autograd.grad(fed_back, hidden, d_fed_back, retain_graph=True)
            total = d_hidden + through
        (d_embedded,) = torch.autograd.grad(hidden, embedded, total, retain_graph=True)
        d_fed_back = torch.zeros_like(fed_back)
        d_fed_back[:, :-1] = (layout.at(d_embedded, layout.fed) * policy.embed_scale).to(fed_back.dtype)
    return d_fed_back


@dataclass(frozen=True)
class Layout:
    """Prompt and completion of each row without a gap, padded on the right, where causal attention never looks.

    So the model runs without a padding mask: the fastest attention applies, and no query is masked throughout.

    Attributes:
        ids: int64 `[B, L]`, everything that is an input; the last token of a completion never is.
        fed: int64 `[B, T - 1]`, where the completion's tokens stand.
        drawn: int64 `[B, T]`, where the hidden states stand that they were drawn from.
    """

    ids: torch.Tensor
    fed: torch.Tensor
    drawn: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, sample: Rollout) -> Layout:
        """The layout of left-padded prompts and their completions."""
        lengths, time = attention_mask.ne(0).sum(dim=1, keepdim=True), sample.ids.shape[1]
        longest = int(lengths.max())
        drawn = lengths - 1 + torch.arange(time, device=lengths.device)
        fed = drawn[:, 1:]
        start = input_ids.shape[1] - lengths
        place = torch.arange(longest, device=lengths.device)
        prompt = input_ids.gather(1, (start + place).clamp_max(input_ids.shape[1] - 1))
        ids = torch.cat([prompt, prompt.new_zeros(len(prompt), time - 1)], dim=1).scatter(1, fed, sample.ids[:, :-1])
        return cls(ids, fed, drawn)

    def arguments(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Mask and positions as keyword arguments of a model or a backbone."""
        everything = torch.ones_like(self.ids)
        return {"attention_mask": everything, **position_arguments(module, position_ids(everything))}

    @staticmethod
    def at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`states[b, places[b, t]]`, `[B, T, D]`."""
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def with_mixtures(self, embedded: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The embeddings `[B, L, D]` with mixtures `[B, T - 1, D]` in the place of the completion's tokens."""
        return embedded.scatter(1, self.fed[..., None].expand_as(mixed), mixed.to(embedded.dtype))


def _forward(
    model: nn.Module, policy: LanguageModel, layout: Layout, mixtures: _Mixtures | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings `[B, L, D]`, and the hidden states `[B, T, H]` the tokens were drawn from, of one pass."""

    def edit(embedded: torch.Tensor) -> torch.Tensor:
        if mixtures is None:
            return embedded
        return layout.with_mixtures(embedded, mixtures.of(policy.table) * policy.embed_scale)

    # A compiled model is one node of the graph, inside which nothing can be read.
    run = getattr(model, "_orig_mod", model)
    with Capture(policy, edit) as seen:
        run(input_ids=layout.ids, use_cache=False, logits_to_keep=1, **layout.arguments(policy.model))
    return seen.embedded, layout.at(seen.hidden, layout.drawn)


class Referred(NamedTuple):
    """The reference's logits at each place of the completions, as a head and what it reads."""

    hidden: torch.Tensor  # [B, T, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None
    softcap: float | None


@torch.no_grad()
def refer(
    reference: LanguageModel,
    layout: Layout,
    mixtures: _Mixtures | None = None,
) -> Referred:
    """Run the reference over the completions; for `soft`, over the same mixtures of its own embeddings.

    Raises:
        ValueError: the reference has no row for a token that it reads.
    """
    if int(layout.ids.max()) >= len(reference.table):
        raise ValueError(
            f"ref_model must have a row for every token it reads: its input embedding has {len(reference.table)}, but a "
            f"prompt or a completion has token {int(layout.ids.max())}"
        )
    inputs = {"input_ids": layout.ids}
    if mixtures is not None:
        mixed = mixtures.of(reference.table) * reference.embed_scale
        inputs = {"inputs_embeds": layout.with_mixtures(reference.embedding(layout.ids), mixed)}
    output = reference.backbone(**inputs, use_cache=False, **layout.arguments(reference.backbone))
    hidden, weight = reference.head_input(layout.at(last_hidden_state(output), layout.drawn))
    options = reference.head_options()
    return Referred(hidden, weight.detach(), options["bias"], options["logit_softcap"])


class _Mixtures:
    """The soft samples `softmax((l + g) / tau)` that were fed back, again from the rollout's hidden states."""

    def __init__(self, policy: LanguageModel, sample: Rollout, noise: GumbelNoise, tau: float, eps: float) -> None:
        assert sample.hidden is not None
        hidden, weight = policy.head_input(sample.hidden[:, :-1])
        self._hidden, self._weight, self._tau, self._eps = hidden.detach(), weight.detach(), tau, eps
        self._spans = []
        for span, first in policy.allowed.spans(hidden.shape[1]):
            options = policy.head_options(first)
            options["bias"] = None if options["bias"] is None else options["bias"].detach()
            self._spans.append((span, {**options, "noise": _noise_of(sample, noise, span)}))

    def of(self, table: torch.Tensor) -> torch.Tensor:
        """Mixtures `[B, T - 1, D]` of a table's rows, with a graph to the table alone: the lookup of a soft sample."""
        if self._hidden.shape[1] == 0:
            return table.new_zeros(*self._hidden.shape[:2], table.shape[1])
        mixtures = []
        for span, options in self._spans:
            mixture = linear_gumbel_ste(
                self._hidden[:, span], self._weight, with_rows(table, len(self._weight)), self._tau, estimator="soft",
                eps=self._eps, **options,
            ).embedding  # fmt: skip
            assert isinstance(mixture, torch.Tensor)
            mixtures.append(mixture)
        return _joined(mixtures)


def _reward_gradients(
    objectives: Sequence[Objective],
    sampled: Sequence[torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mask: torch.Tensor,
    row_weights: torch.Tensor,
    columns: dict[str, Any],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Values `[rewards, B]`, and the loss's gradient on the embeddings each reward read of the completions."""
    values, gradients, wanted = [], [], torch.is_grad_enabled()
    full_mask = torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1)
    for objective, embedding in zip(objectives, sampled, strict=True):
        leaf = embedding.detach().requires_grad_(wanted)
        objected, value = objective(torch.cat([objective.embeds(input_ids), leaf], dim=1), full_mask, columns)
        gradient = None if wanted else torch.zeros_like(leaf)
        if wanted and objected.requires_grad:
            upstream = (-objective.weight * row_weights).to(objected.dtype)
            (gradient,) = torch.autograd.grad(objected, leaf, upstream, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"{objective.name} has no gradient: it must be a differentiable function of inputs_embeds "
                "(rewards of text can only be logged)"
            )
        values.append(value)
        # A reward that reads behind the end of a sequence still may not move it.
        gradients.append(gradient * mask[..., None].to(gradient.dtype))
    return torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]), gradients


@torch.no_grad()
def score_completions(
    objectives: Sequence[Objective],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sample: Rollout,
    columns: dict[str, Any],
) -> torch.Tensor:
    """Values `[rewards, B]` of sampled tokens, without any gradient; for evaluation."""
    mask = torch.cat([attention_mask, sample.mask.to(attention_mask.dtype)], dim=1)
    ids = torch.cat([input_ids, sample.ids], dim=1)
    values = [objective(objective.embeds(ids), mask, columns)[1] for objective in objectives]
    return torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values])


def completion_logprobs(policy: LanguageModel, sample: Rollout) -> torch.Tensor:
    """The policy's log-probability of each token of completions that kept their hidden states, `[B, T]`; 0 behind the end."""
    assert sample.hidden is not None
    head_input, weight = policy.head_input(sample.hidden)
    logprobs = [
        linear_logprobs(head_input[:, span], weight, sample.ids[:, span].contiguous(), **policy.head_options(first))
        for span, first in policy.allowed.spans(sample.ids.shape[1])
    ]
    return _of_completions(_joined(logprobs), sample)


def _of_completions(values: torch.Tensor, sample: Rollout) -> torch.Tensor:
    return torch.where(sample.mask.bool(), values, 0.0)


def completion_kl(
    policy: LanguageModel,
    referred: Referred,
    hidden: torch.Tensor,
    sample: Rollout,
    eps: float = 0.0,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """KL(policy || reference) summed over each completion's tokens, `[B]`, exact in each token's distribution.

    Both distributions are over the tokens that the policy allows: what is masked in one is masked in the other.

    Args:
        policy: the policy's parts.
        referred: the reference's side.
        hidden: the policy's hidden states, `[B, T, H]`.
        sample: the completions.
        eps: stochastic support of the gradient.
        noise: seed of the rollout's noise, whose rows that support is drawn by; None where there is no gradient.

    Raises:
        ValueError: a reference with another softcap, or without a row for a token that the policy allows.
    """
    if referred.softcap != policy.softcap:
        raise ValueError(
            f"ref_model must cap its logits as the policy does: at {policy.softcap}, not {referred.softcap}"
        )
    head_input, weight = policy.head_input(hidden)
    if (last := policy.allowed.last(len(weight))) >= len(referred.weight):
        raise ValueError(
            f"ref_model must score every token that the policy samples: its LM head has {len(referred.weight)} rows, but "
            f"the policy samples tokens up to {last}"
        )
    ref_weight, ref_bias = with_rows(referred.weight, len(weight)), referred.bias
    if ref_bias is not None:
        ref_bias = with_rows(ref_bias[:, None], len(weight))[:, 0]
    per_token = []
    for span, first in policy.allowed.spans(hidden.shape[1]):
        part = linear_kl(
            head_input[:, span], weight, referred.hidden[:, span], ref_weight, eps=eps,
            ref_bias=policy.allowed.bias(ref_weight, ref_bias, first),
            noise=None if noise is None else _noise_of(sample, noise, span), **policy.head_options(first),
        )  # fmt: skip
        per_token.append(part)
    return torch.where(sample.mask.bool(), _joined(per_token), 0.0).sum(dim=1)
