"""The gradient through sampled tokens: one parallel forward pass, a few sweeps through time, one ordinary backward.

Let x be the embeddings the policy read for its own tokens, h = F(x) the hidden states they were drawn from, and y(h)
the relaxed samples. A step-by-step graph would feed x = y(h) E back. Its gradient with respect to x solves
`G = b + A^T G`. Here b comes straight from the loss, through the reward's embeddings y E_R and the KL of h. E is the
policy's table and E_R the reward's. A = d(y E)/dx is strictly triangular in time. So `G_{k+1} = b + A^T G_k` from G_0 = 0
is exact after T - 1 sweeps, where T is the length of the completion, and K sweeps sum all paths through at most K
fed-back relaxed samples. A sweep is one parallel backward pass to x alone. All sweeps run here. What follows is left to the
caller's `backward()`: the loss is a scalar whose gradient, with the G found, reaches every parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from grade_kernels.backends import Head
from grade_kernels.estimators import is_noisy
from grade_kernels.noise import GumbelNoise, PosteriorNoise
from grade_kernels.ops import linear_gumbel_ste, linear_kl, linear_logprobs
from grade_kernels.training.allowed_tokens import with_rows
from grade_kernels.training.importance import ImportanceSampling, Mismatch
from grade_kernels.training.model import (
    Capture,
    LanguageModel,
    evaluating,
    last_hidden_state,
    position_arguments,
    position_ids,
    sweeping,
    unwrap,
)
from grade_kernels.training.records import Prompts, Relaxation
from grade_kernels.training.reference import Reference
from grade_kernels.training.rewards import Columns, Objective, weighted_sum
from grade_kernels.training.rollout import Rollout

__all__ = [
    "Criterion",
    "Layout",
    "Replay",
    "completion_kl",
    "completion_logprobs",
    "refer",
    "replay",
    "score_completions",
    "with_hidden",
]


@dataclass(frozen=True)
class Criterion:
    """What completions are judged by: `sum_i weight_i objective_i - beta KL`.

    Attributes:
        objectives: rewards, each with its table and its weight.
        reference: what the KL refers to; None for no KL.
        beta: factor of the KL; at 0 it is computed without graph.
    """

    objectives: Sequence[Objective]
    reference: Reference | None = None
    beta: float = 0.0


@dataclass(frozen=True)
class Replay:
    """What a replay leaves: the loss with its graph, and values `[..., B]` without."""

    loss: torch.Tensor
    values: torch.Tensor  # [rewards, B], each reward as it is logged, without weight
    kl: torch.Tensor  # [B], nats per completion; 0 without a reference
    logprobs: torch.Tensor  # [B, T] of the tokens; 0 behind the end
    mismatch: Mismatch | None  # of given tokens whose log-probabilities are known


def replay(
    policy: LanguageModel,
    criterion: Criterion,
    prompts: Prompts,
    sample: Rollout,
    noise: GumbelNoise,
    relaxation: Relaxation,
    *,
    row_weights: torch.Tensor,
    columns: Columns,
    importance: ImportanceSampling | None = None,
) -> Replay:
    """Differentiate `sum_b row_weights[b] (beta KL_b - sum_i weight_i objective_i(b))` through the sampled tokens.

    Args:
        policy: the policy's parts; the forward pass goes through the whole model.
        criterion: rewards and KL.
        prompts: what was completed.
        sample: completions of `rollout` under the same noise, for `soft` with their hidden states; or given ones.
        noise: seed of the rollout's noise.
        relaxation: how the gradient runs back.
        row_weights: `[B]`, what each completion counts.
        columns: keywords for the rewards.
        importance: weighs given completions, whose log-probabilities must be known, by how likely they are here. None
            takes them as if the policy had drawn them.
    """
    # Without a graph the value alone is wanted, which takes no sweeps.
    hops = relaxation.sweeps(sample.ids.shape[1]) if torch.is_grad_enabled() else 0
    objectives, reference, beta = criterion.objectives, criterion.reference, criterion.beta
    reward_tables = tuple(objective.table for objective in objectives)
    mixtures = _Mixtures(policy, sample, noise, relaxation) if relaxation.soft else None

    layout = Layout.of(prompts, sample)
    embedded, hidden = _forward(policy, layout, mixtures)
    # The gradient of the table by its lookups is found by the forward pass above. Here it would be counted twice, so the
    # table is a constant.
    fed_back = (policy.table.detach(),) if hops else ()
    tables = tuple(with_rows(table, policy.vocab_size) for table in (*reward_tables, *fed_back))
    embeddings, logprobs = _relaxed(policy, hidden, tables, sample, noise, relaxation)
    logprobs = _of_completions(logprobs, sample)
    mismatch = _mismatch(logprobs, sample, importance)
    token_weights = None
    if importance is not None and mismatch is not None and mismatch.weights is not None:
        if importance.by_token:
            token_weights = mismatch.weights.to(row_weights.dtype)
        else:
            row_weights = row_weights * mismatch.weights[:, 0].to(row_weights.dtype)
    sampled = embeddings[: len(reward_tables)]
    values, d_sampled = _reward_gradients(policy, objectives, sampled, prompts, sample, row_weights, columns)
    kl = hidden.new_zeros(*sample.ids.shape, dtype=values.dtype)
    if reference is not None:
        with reference.parts(policy.whole) as entered:
            ref_head = refer(entered, layout, mixtures, below=policy.vocab_size)
        with torch.set_grad_enabled(beta != 0.0):
            kl = completion_kl(policy, ref_head, hidden, sample, relaxation.eps, noise)

    outputs, d_outputs = list(sampled), [_weighted(d_sample, token_weights) for d_sample in d_sampled]
    if kl.requires_grad:
        outputs.append(kl)
        d_kl = (beta * row_weights).to(kl.dtype)[:, None].expand_as(kl)
        d_outputs.append(d_kl if token_weights is None else d_kl * token_weights.to(kl.dtype))
    if hops:
        fed_back_embedding = embeddings[-1]
        # What the loss itself sends into h is the same in every sweep.
        with sweeping(unwrap(policy.whole)):
            (d_hidden,) = torch.autograd.grad(outputs, hidden, d_outputs, retain_graph=True)
            d_fed_back = _sweep(policy, layout, embedded, hidden, fed_back_embedding, d_hidden, hops, token_weights)
        outputs.append(fed_back_embedding)
        d_outputs.append(d_fed_back)
    kl = kl.sum(dim=1)
    surrogate = sum((output * d_output).sum() for output, d_output in zip(outputs, d_outputs, strict=True))
    value = ((beta * kl.detach() - weighted_sum(objectives, values)) * row_weights).sum()
    # The surrogate has the gradient of the loss and another value: its own value is taken off again.
    loss = value + (surrogate - surrogate.detach()).to(value.dtype)  # type: ignore[union-attr]
    return Replay(loss, values, kl.detach(), logprobs, mismatch)


def _mismatch(logprobs: torch.Tensor, sample: Rollout, importance: ImportanceSampling | None) -> Mismatch | None:
    """How far given tokens are from the policy's own; None where that is not known, or where they are its own."""
    if sample.logprobs is None:
        return None
    difference = _of_completions(logprobs.double() - sample.logprobs, sample)
    return Mismatch(difference, None if importance is None else importance.weights(difference))


def _weighted(gradient: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """Gradients `[B, T, D]` on relaxed samples, each times its token's weight `[B, T]`."""
    return gradient if token_weights is None else gradient * token_weights[..., None].to(gradient.dtype)


def _relaxed(
    policy: LanguageModel,
    hidden: torch.Tensor,
    tables: Sequence[torch.Tensor],
    sample: Rollout,
    noise: GumbelNoise,
    relaxation: Relaxation,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Relaxed samples in the place of the sampled tokens: their rows `[B, T, D]` of each table, and `[B, T]` logprobs."""
    embeddings, logprobs = [], []
    # The noise of the rows of given tokens may have another winner, so it is drawn given these. It needs a winner that may
    # be sampled behind an end, too, and the padding may not. There it is the end itself, and nothing comes of it.
    given = sample.given and is_noisy(relaxation.estimator)
    last = sample.ids.gather(1, sample.mask.sum(dim=1, keepdim=True) - 1)
    won = torch.where(sample.mask.bool(), sample.ids, last)
    for span, head in policy.heads(hidden):
        ids = sample.ids[:, span].contiguous()
        own = _noise_of(sample, noise, span)
        drawn: GumbelNoise | PosteriorNoise = own
        if given:
            ids = won[:, span].contiguous()
            drawn = own.given(ids)
        part = linear_gumbel_ste(
            head.hidden, head.weight, tuple(tables), relaxation.tau, estimator=relaxation.estimator, noise=drawn, ids=ids,
            eps=relaxation.eps, bias=head.bias, logit_softcap=head.softcap,
        )  # fmt: skip
        embeddings.append(part.embedding)
        logprobs.append(part.logprobs.detach())
    looked_up = [_joined([part[i] for part in embeddings]) for i in range(len(tables))]
    if given:  # rewards read the padding behind an end
        real = sample.mask[..., None].bool()
        looked_up = [
            torch.where(real, e, table[sample.ids].detach()) for e, table in zip(looked_up, tables, strict=True)
        ]
    return looked_up, _joined(logprobs)


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
    d_hidden: torch.Tensor,
    hops: int,
    token_weights: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient `[B, T, D]` on the fed-back samples after so many sweeps, each one backward pass to the inputs.

    Args:
        policy: the policy's parts.
        layout: where the tokens stand.
        embedded: the inputs of the forward pass, `[B, L, D]`.
        hidden: its hidden states, `[B, T, H]`.
        fed_back: the relaxed samples as embeddings, `[B, T, D]`.
        d_hidden: what the loss itself sends into the hidden states.
        hops: how many sweeps, at least one.
        token_weights: `[B, T]`, what each relaxed sample counts; None for 1.
    """
    d_fed_back = torch.zeros_like(fed_back)
    total = d_hidden
    for hop in range(hops):
        if hop:
            (through,) = torch.autograd.grad(fed_back, hidden, d_fed_back, retain_graph=True)
            total = d_hidden + through
        (d_embedded,) = torch.autograd.grad(hidden, embedded, total, retain_graph=True)
        d_fed_back = torch.zeros_like(fed_back)
        d_fed_back[:, :-1] = (layout.at(d_embedded, layout.fed) * policy.embed_scale).to(fed_back.dtype)
        d_fed_back = _weighted(d_fed_back, token_weights)
    return d_fed_back


@dataclass(frozen=True)
class Layout:
    """Prompt and completion of each row without a gap, padded on the right, where causal attention never looks.

    So the model runs without a padding mask: the fastest attention applies, and no query is masked throughout.

    Attributes:
        ids: int64 `[B, L]`, everything that is an input; the last token of a completion never is.
        fed: int64 `[B, T - 1]`, where the completion's tokens stand.
        drawn: int64 `[B, T]`, positions of the hidden states from which the completion's tokens were drawn.
    """

    ids: torch.Tensor
    fed: torch.Tensor
    drawn: torch.Tensor

    @classmethod
    def of(cls, prompts: Prompts, sample: Rollout) -> Layout:
        """The layout of prompts and their completions."""
        input_ids, lengths, time = prompts.ids, prompts.lengths[:, None], sample.ids.shape[1]
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


def _forward(policy: LanguageModel, layout: Layout, mixtures: _Mixtures | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings `[B, L, D]`, and the hidden states `[B, T, H]` the tokens were drawn from, of one pass."""

    def edit(embedded: torch.Tensor) -> torch.Tensor:
        if mixtures is None:
            return embedded
        return layout.with_mixtures(embedded, mixtures.of(policy.table) * policy.embed_scale)

    # A compiled model would run as one node of the graph, without the hooks that read its hidden states.
    run = getattr(policy.whole, "_orig_mod", policy.whole)
    with Capture(policy, edit) as seen:
        run(input_ids=layout.ids, use_cache=False, logits_to_keep=1, **layout.arguments(policy.model))
    return seen.embedded, layout.at(seen.hidden, layout.drawn)


@torch.no_grad()
def refer(
    reference: LanguageModel, layout: Layout, mixtures: _Mixtures | None = None, *, below: int | None = None
) -> Head:
    """The reference's head over its hidden states `[B, T, H]` at each place of the completions.

    Args:
        reference: the reference's parts.
        layout: of prompts and completions.
        mixtures: for `soft`, mixtures of the reference's own embeddings, which it reads instead of the tokens.
        below: all tokens are known to be below this. Where the reference has as many rows, none needs to be looked at,
            which would wait for the device.

    Raises:
        ValueError: the reference has no row for a token that it reads.
    """
    known = below is not None and below <= len(reference.table)
    if not known and int(layout.ids.max()) >= len(reference.table):
        raise ValueError(
            f"ref_model must have a row for every token it reads: its input embedding has {len(reference.table)}, but a "
            f"prompt or a completion has token {int(layout.ids.max())}"
        )
    inputs = {"input_ids": layout.ids}
    if mixtures is not None:
        mixed = mixtures.of(reference.table) * reference.embed_scale
        inputs = {"inputs_embeds": layout.with_mixtures(reference.embedding(layout.ids), mixed)}
    output = reference.backbone(**inputs, use_cache=False, **layout.arguments(reference.backbone))
    head = reference.head(layout.at(last_hidden_state(output), layout.drawn))
    return head._replace(weight=head.weight.detach())


class _Mixtures:
    """The soft samples `softmax((l + g) / tau)` that were fed back, again from the rollout's hidden states."""

    def __init__(self, policy: LanguageModel, sample: Rollout, noise: GumbelNoise, relaxation: Relaxation) -> None:
        assert sample.hidden is not None
        fed_back = sample.hidden[:, :-1].detach()
        self._shape, self._relaxation = fed_back.shape[:2], relaxation
        self._parts = [
            (
                head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach()),
                _noise_of(sample, noise, span),
            )
            for span, head in policy.heads(fed_back)
        ]

    def of(self, table: torch.Tensor) -> torch.Tensor:
        """Mixtures `[B, T - 1, D]` of a table's rows, with a graph to the table alone: the lookup of a soft sample."""
        if self._shape[1] == 0:
            return table.new_zeros(*self._shape, table.shape[1])
        mixtures = []
        for head, noise in self._parts:
            mixture = linear_gumbel_ste(
                head.hidden, head.weight, with_rows(table, len(head.weight)), self._relaxation.tau, estimator="soft",
                eps=self._relaxation.eps, noise=noise, bias=head.bias, logit_softcap=head.softcap,
            ).embedding  # fmt: skip
            assert isinstance(mixture, torch.Tensor)
            mixtures.append(mixture)
        return _joined(mixtures)


def _reward_gradients(
    policy: LanguageModel,
    objectives: Sequence[Objective],
    sampled: Sequence[torch.Tensor],
    prompts: Prompts,
    sample: Rollout,
    row_weights: torch.Tensor,
    columns: Columns,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Values `[rewards, B]`, and the loss's gradient on the embeddings each reward read of the completions."""
    values, gradients, wanted = [], [], torch.is_grad_enabled()
    read = torch.cat([prompts.mask, sample.mask], dim=1)
    for objective, embedding in zip(objectives, sampled, strict=True):
        leaf = embedding.detach().requires_grad_(wanted)
        embeds = torch.cat([objective.embeds(prompts.ids, below=policy.vocab_size), leaf], dim=1)
        objected, value = objective(embeds, read, columns)
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
        # A reward may read what stands behind an end. The completion does not have it, so it gets no gradient.
        gradients.append(gradient * sample.mask[..., None].to(gradient.dtype))
    return torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]), gradients


@torch.no_grad()
def with_hidden(policy: LanguageModel, prompts: Prompts, sample: Rollout) -> Rollout:
    """Completions with the hidden states that the policy would draw them from, of one parallel pass in eval mode."""
    layout = Layout.of(prompts, sample)
    with evaluating(policy.model):
        output = policy.backbone(input_ids=layout.ids, use_cache=False, **layout.arguments(policy.backbone))
    return replace(sample, hidden=layout.at(last_hidden_state(output), layout.drawn))


@torch.no_grad()
def score_completions(
    objectives: Sequence[Objective], prompts: Prompts, sample: Rollout, columns: Columns
) -> torch.Tensor:
    """Values `[rewards, B]` of sampled tokens, without any gradient; for evaluation."""
    mask = torch.cat([prompts.mask, sample.mask], dim=1)
    ids = torch.cat([prompts.ids, sample.ids], dim=1)
    values = [objective(objective.embeds(ids), mask, columns)[1] for objective in objectives]
    return torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values])


def completion_logprobs(policy: LanguageModel, sample: Rollout) -> torch.Tensor:
    """The policy's log-probability of each token of completions that have their hidden states, `[B, T]`; 0 behind the end."""
    assert sample.hidden is not None
    logprobs = [
        linear_logprobs(
            head.hidden, head.weight, sample.ids[:, span].contiguous(), bias=head.bias, logit_softcap=head.softcap
        )
        for span, head in policy.heads(sample.hidden)
    ]
    return _of_completions(_joined(logprobs), sample)


def _of_completions(values: torch.Tensor, sample: Rollout) -> torch.Tensor:
    """Values of tokens `[B, T]`, 0 behind the end."""
    return torch.where(sample.mask.bool(), values, 0.0)


def completion_kl(
    policy: LanguageModel,
    ref_head: Head,
    hidden: torch.Tensor,
    sample: Rollout,
    eps: float = 0.0,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """KL(policy || reference) at each token of the completions, `[B, T]`, exact in its distribution; 0 behind the end.

    Both distributions are over the tokens that the policy allows: what is masked in one is masked in the other.

    Args:
        policy: the policy's parts.
        ref_head: the reference's head over its hidden states, see `refer`.
        hidden: the policy's hidden states, `[B, T, H]`.
        sample: the completions.
        eps: stochastic support of the gradient.
        noise: seed of the rollout's noise, whose rows that support is drawn by; None where there is no gradient.

    Raises:
        ValueError: a reference with another softcap, or without a row for a token that the policy allows.
    """
    if ref_head.softcap != policy.softcap:
        raise ValueError(
            f"ref_model must cap its logits as the policy does: at {policy.softcap}, not {ref_head.softcap}"
        )
    vocab_size = policy.vocab_size
    if (last := policy.allowed.last(vocab_size)) >= len(ref_head.weight):
        raise ValueError(
            f"ref_model must score every token that the policy samples: its LM head has {len(ref_head.weight)} rows, but "
            f"the policy samples tokens up to {last}"
        )
    ref_weight, ref_bias = with_rows(ref_head.weight, vocab_size), ref_head.bias
    if ref_bias is not None:
        ref_bias = with_rows(ref_bias[:, None], vocab_size)[:, 0]
    per_token = []
    spans = policy.allowed.spans(hidden.shape[1])
    for (span, first), (_, head) in zip(spans, policy.heads(hidden), strict=True):
        part = linear_kl(
            head.hidden, head.weight, ref_head.hidden[:, span], ref_weight, eps=eps,
            ref_bias=policy.allowed.bias(ref_weight, ref_bias, first),
            noise=None if noise is None else _noise_of(sample, noise, span),
            bias=head.bias, logit_softcap=head.softcap,
        )  # fmt: skip
        per_token.append(part)
    return _of_completions(_joined(per_token), sample)
