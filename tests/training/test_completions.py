"""Completions from elsewhere: the same gradient as of the policy's own, weights of importance, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from grade_kernels import GumbelNoise
from grade_kernels.training import Aligner, Ending, Prompts, Relaxation, grade_loss
from grade_kernels.training.completions import Completions
from grade_kernels.training.importance import MODES, ImportanceSampling, Mismatch
from grade_kernels.training.model import read_language_model
from grade_kernels.training.reference import OtherModel
from grade_kernels.training.rewards import Objective
from tests.support.training_models import (
    VOCAB,
    BagReward,
    gradients,
    policy,
    prompts,
    worst_difference,
)

SEED = 11
EOS = 21  # ends the last prompt's completion at its third token
ENDING = Ending((EOS,), 0, 7)
ROWS = ((torch.arange(3)[:, None] << 32) + torch.arange(5)).flatten()  # who draws which noise, of three prompts


def loss_of(
    model, reward=None, *, estimator="st", hops="exact", eps=0.0, beta=0.1, time=7, ids=None, mask=None, **more
):
    if ids is None:
        ids, mask = prompts()
    more = {"eos_token_id": EOS, "pad_token_id": 0} | more
    return grade_loss(
        model, reward or BagReward(), ids, mask, max_new_tokens=time, noise=GumbelNoise(SEED), tau=0.8,
        estimator=estimator, feedback_hops=hops, eps=eps, ref_model=policy("gpt2", seed=1), beta=beta, **more,
    )  # fmt: skip


def ragged(out):
    return [row[kept.bool()].tolist() for row, kept in zip(out.completion_ids, out.completion_mask, strict=True)]


# ------------------------------------------------------------------------------------- tokens of the policy, given


@pytest.mark.parametrize("estimator", ["st", "reinmax"])
@pytest.mark.parametrize("eps", [0.0, 2**-5])
def test_the_policys_own_tokens_give_the_gradient_of_its_rollout(estimator, eps):
    """Tokens that were drawn by this very noise; loss, KL and every gradient agree to the last bit."""
    model = policy("gpt2")
    options = {
        "estimator": estimator, "eps": eps, "suppress_tokens": [5, 9], "begin_suppress_tokens": [EOS], "hops": "exact",
    }  # fmt: skip
    own = loss_of(model, **options)
    truth = gradients(own.loss, model)
    lengths = own.completion_mask.sum(1)
    assert lengths.min() < lengths.max(), "no completion ended before the others"
    padded = own.completion_ids
    for given in (padded, padded.numpy(), ragged(own), [torch.tensor(row) for row in ragged(own)]):
        again = loss_of(model, completions=given, **options)
        assert torch.equal(again.completion_ids, own.completion_ids)
        assert torch.equal(again.completion_mask, own.completion_mask)
        assert torch.equal(again.logprobs, own.logprobs)
        assert torch.equal(again.loss, own.loss)
        assert again.mismatch is None
        found = gradients(again.loss, model)
        assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_other_tokens_give_another_gradient():
    """So the tokens that are given are the ones that are used."""
    model = policy("gpt2")
    own = loss_of(model)
    changed = own.completion_ids.clone()
    changed[0, 2] = 3 if changed[0, 2] != 3 else 4
    other = loss_of(model, completions=changed)
    assert torch.equal(other.completion_ids, changed)
    assert worst_difference(gradients(other.loss, model), gradients(own.loss, model)) > 1e-3


@pytest.mark.parametrize("hops", [0, 2, "exact"])
@pytest.mark.parametrize("estimator", ["st", "ste"])
def test_given_tokens_equal_the_step_by_step_graph(hops, estimator):
    """With a weight for each token, in float64; at `hops` below the length, the truncated sum.

    The noise of `ste` is that of `GumbelNoise.given`, of which other tests show that it is the right one.
    """
    model, reference, reward = policy("gpt2"), policy("gpt2", seed=1), BagReward()
    ids, mask = prompts((4, 4, 4))
    tokens = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(8))
    tokens[tokens == EOS] = 3
    told = -4.0 + torch.rand(3, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    importance = ImportanceSampling("token_truncate", clip_max=2.0, clip_min=0.3)
    out = grade_loss(
        model, reward, ids, mask, max_new_tokens=5, noise=GumbelNoise(SEED), tau=0.8, estimator=estimator,
        feedback_hops=hops, eps=0, ref_model=reference, beta=0.1, completions=tokens, logprobs=told,
        importance=importance,
    )  # fmt: skip
    weights = (out.logprobs - told).exp().clamp(0.3, 2.0)
    assert torch.equal(out.mismatch.weights, weights)
    assert len(weights.unique()) > 5, "the bounds cut nearly everything off"

    table, fed_back = model.get_input_embeddings().weight.detach(), 0.0
    everything = torch.cat([ids, tokens[:, :-1]], 1)
    options = {"attention_mask": torch.ones_like(everything), "use_cache": False}
    for level in range((4 if hops == "exact" else hops) + 1):
        embeds = model.get_input_embeddings()(everything)
        if level:
            embeds = embeds + torch.cat([torch.zeros_like(embeds[:, :4]), fed_back[:, :-1]], 1)
        logits = model(inputs_embeds=embeds, **options).logits[:, 3:]
        noise = GumbelNoise(SEED, ROWS).given(tokens).dense(logits) if estimator == "ste" else 0.0
        soft = ((logits + noise) / 0.8).softmax(-1)
        zero = weights[..., None] * (soft - soft.detach())
        fed_back = zero @ table
    embeds = (nn.functional.one_hot(tokens, VOCAB) + zero) @ reward.embedding
    value = reward(torch.cat([reward.embedding[ids], embeds], 1), torch.ones(3, 9))
    with torch.no_grad():
        logq = reference(input_ids=everything, **options).logits[:, 3:].log_softmax(-1)
    logp = logits.log_softmax(-1)
    kl = ((logp.exp() * (logp - logq)).sum(-1) * weights).sum(1)
    loss = (-value + 0.1 * kl).mean()
    torch.testing.assert_close(out.rewards, value.detach())
    assert worst_difference(gradients(out.loss, model), gradients(loss, model)) < 1e-10


def test_the_mean_over_posterior_noise_is_that_over_the_policys_own():
    """The gradient of `ste` at a single token, once replayed with the noise that drew it and once with `given`.

    Eight means of 488 samples each, compared along one direction by Welch's t-test with a bound of 8: it would fail by
    chance in fewer than one of 10,000 runs with other seeds.
    """
    model, copies = policy("gpt2"), 8
    prompt = torch.tensor([[7, 8, 9]]).expand(copies * VOCAB, 3).contiguous()
    aligner = Aligner(read_language_model(model), [Objective(BagReward())], Ending((), 0, 1))
    batch, relaxation = Prompts(prompt, torch.ones_like(prompt)), Relaxation(0.8, "ste", 0, 0.0)
    direction = gradients(aligner.loss(batch, GumbelNoise(99), relaxation).loss, model)

    def along(seed, given):
        # The tokens are those of other noise: what is left of them is how often each comes up.
        own = aligner.loss(batch, GumbelNoise(seed), relaxation)
        if given:
            completions = Completions(own.completion_ids, own.completion_mask)
            own = aligner.loss(batch, GumbelNoise(seed + 1000), relaxation, completions=completions)
        found = gradients(own.loss, model)
        return float(sum((found[name] * direction[name]).sum() for name in found))

    theirs, ours = (torch.tensor([along(seed + 100 * given, given) for seed in range(16)]) for given in (False, True))
    error = ((theirs.var() + ours.var()) / 8).sqrt()
    assert abs(theirs.mean() - ours.mean()) < 8 * error
    assert error < 0.05 * theirs.mean().abs(), "too noisy to show anything"


def test_what_stands_behind_an_end_has_no_noise():
    """Padding may be a suppressed token, and which one it is makes no difference."""
    model = policy("gpt2")
    given = [[3, EOS], [4, 5, EOS], [6, 7, 8, 9, 10, 11, 12]]
    options = {"estimator": "ste", "eps": 2**-5, "completions": given, "suppress_tokens": [0, 1]}
    first, second = (gradients(loss_of(model, pad_token_id=pad, **options).loss, model) for pad in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())


def test_evaluation_judges_given_tokens():
    """As it judges its own, and the loss of training has the same value."""
    model, objective = policy("llama"), Objective(BagReward())
    aligner = Aligner(read_language_model(model), [objective], ENDING, OtherModel(policy("llama", seed=1)), 0.1)
    batch = Prompts(*prompts())
    own = aligner.evaluate(batch, GumbelNoise(SEED))
    given = Completions.of(own.completion_ids, ENDING)
    again = aligner.evaluate(batch, GumbelNoise(SEED), completions=given)
    trained = aligner.loss(batch, GumbelNoise(SEED), Relaxation(estimator="st"), completions=given)
    for other in (again, trained):
        for name in ("loss", "rewards", "kl", "logprobs"):
            torch.testing.assert_close(
                getattr(other, name), getattr(own, name), rtol=1e-6, atol=1e-7, check_dtype=False
            )
    model.train()
    aligner.evaluate(batch, GumbelNoise(SEED), completions=given)
    assert model.training, "its mode was changed"


# --------------------------------------------------------------------------------------------------- what they count


def every_token():
    """A prompt completed by each token once, as a uniform engine would draw them."""
    ids = torch.tensor([[7, 8, 9]]).expand(VOCAB, 3).contiguous()
    return (
        ids,
        torch.ones_like(ids),
        torch.arange(VOCAB)[:, None],
        torch.full((VOCAB, 1), -math.log(VOCAB), dtype=torch.float64),
    )


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate", "token_mask", "sequence_mask"])
def test_weights_turn_an_engines_mean_into_the_policys(mode):
    """The sum over all tokens is the expectation itself, so there is no chance in it."""
    model, reward = policy("gpt2"), BagReward()
    ids, mask, tokens, told = every_token()
    options = {"time": 1, "ids": ids, "mask": mask, "eos_token_id": None, "completions": tokens, "logprobs": told}
    out = loss_of(model, reward, importance=ImportanceSampling(mode, clip_max=1e9), **options)
    logits = model(ids[:1]).logits[0, -1]
    p, soft = logits.softmax(-1), (logits / 0.8).softmax(-1)
    with torch.no_grad():
        logq = policy("gpt2", seed=1)(ids[:1]).logits[0, -1].log_softmax(-1)
    y = torch.eye(VOCAB, dtype=torch.float64) + soft - soft.detach()
    embeds = torch.cat([reward.embedding[ids], (y @ reward.embedding)[:, None]], 1)
    values = reward(embeds, torch.ones(VOCAB, 4))
    loss = -(p.detach() * values).sum() + 0.1 * (p * (p.log() - logq)).sum()
    torch.testing.assert_close(out.mismatch.weights[:, 0], p.detach() * VOCAB)
    truth = gradients(loss, model)
    assert worst_difference(gradients(out.loss, model), truth) < 1e-10
    plain = loss_of(model, reward, **options)
    assert plain.mismatch.weights is None
    assert worst_difference(gradients(plain.loss, model), truth) > 0.1, "the weights changed nothing"


@pytest.mark.parametrize("mode", MODES)
def test_weights_by_their_definition(mode):
    """Those of TRL, written out."""
    difference = torch.tensor([[0.5, 0.9, -2.0], [0.1, -0.2, 0.0], [3.0, -0.5, 0.0]])
    found = ImportanceSampling(mode, clip_max=2.0, clip_min=0.3).weights(difference)
    for row, weights in zip(difference.tolist(), found.tolist(), strict=True):
        exponents = row if mode.startswith("token") else [sum(row)]
        wanted = [
            min(max(math.exp(x), 0.3), 2.0) if mode.endswith("truncate")
            else math.exp(x) * (0.3 <= math.exp(x) <= 2.0)
            for x in exponents
        ]  # fmt: skip
        assert weights == pytest.approx(wanted, rel=1e-6)
    assert ImportanceSampling() == ImportanceSampling("sequence_mask", 3.0, None), "TRL's defaults"


def test_a_completion_that_is_masked_counts_nothing():
    """One of three is far likelier here than where it was drawn."""
    model = policy("gpt2")
    own = loss_of(model)
    told = own.logprobs.clone()
    told[1] -= 5.0 * own.completion_mask[1]
    options = {"completions": own.completion_ids, "logprobs": told, "importance": ImportanceSampling()}
    out = loss_of(model, **options)
    assert out.mismatch.weights[:, 0].tolist() == [1.0, 0.0, 1.0]
    ids, mask = prompts()
    kept = torch.tensor([0, 2])
    alone = loss_of(
        model, ids=ids[kept], mask=mask[kept], completions=[row for i, row in enumerate(ragged(own)) if i != 1]
    )
    scaled = {name: value * (2 / 3) for name, value in gradients(alone.loss, model).items()}
    assert worst_difference(gradients(out.loss, model), scaled) < 1e-9


def test_metrics_of_the_mismatch():
    difference = torch.tensor([[0.3, -0.4, 0.0], [0.2, 0.1, -0.6]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = Mismatch(difference, difference.exp()).metrics(mask)
    assert {name: value.tolist() for name, value in found.items()} == {
        "sampling/sampling_logp_difference/mean": pytest.approx([0.35, 0.3]),
        "sampling/sampling_logp_difference/max": pytest.approx([0.4, 0.6]),
        "sampling/kl": pytest.approx(
            [(math.expm1(0.3) - 0.3 + math.expm1(-0.4) + 0.4) / 2,
             (math.expm1(0.2) - 0.2 + math.expm1(0.1) - 0.1 + math.expm1(-0.6) + 0.6) / 3]
        ),
        "sampling/importance_sampling_ratio/min": pytest.approx([math.exp(-0.4), math.exp(-0.6)]),
        "sampling/importance_sampling_ratio/mean": pytest.approx(
            [(math.exp(0.3) + math.exp(-0.4)) / 2, (math.exp(0.2) + math.exp(0.1) + math.exp(-0.6)) / 3]
        ),
        "sampling/importance_sampling_ratio/max": pytest.approx([math.exp(0.3), math.exp(0.2)]),
    }  # fmt: skip
    by_sequence = Mismatch(difference, torch.tensor([[2.0], [0.5]])).metrics(mask)
    assert by_sequence["sampling/importance_sampling_ratio/mean"].tolist() == [2.0, 0.5]
    assert len(Mismatch(difference).metrics(mask)) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "token"}, ValueError, "vllm_importance_sampling_mode must be one of .* got 'token'"),
        ({"clip_max": "3"}, TypeError, "vllm_importance_sampling_clip_max must be a number or None, got '3'"),
        ({"clip_max": float("nan")}, ValueError, "clip_max must not be negative, and finite, got nan"),
        ({"clip_min": -1.0}, ValueError, "clip_min must not be negative, and finite"),
        ({"clip_min": 3.0}, ValueError, r"clip_min \(3.0\) must be less than .*clip_max \(3.0\)"),
        ({"mode": "token_truncate", "clip_max": None}, ValueError, "'token_truncate' needs .*clip_max or _clip_min"),
    ],
)
def test_bounds_check_themselves(arguments, error, message):
    with pytest.raises(error, match=message):
        ImportanceSampling(**arguments)


# ----------------------------------------------------------------------------------------------------- what is refused

FULL = [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "completions must hold at least one completion"),
        ("words", TypeError, "completions must be int64 .* got str"),
        (torch.zeros(3, 7), TypeError, r"completions must be int64 .* got torch.float32 of \(3, 7\)"),
        (torch.zeros(7, dtype=torch.int64), TypeError, r"got torch.int64 of \(7,\)"),
        ([FULL, FULL, 5], TypeError, r"completions\[2\] must be a list of token ids, got int"),
        ([FULL, FULL, [*FULL[:6], 1.0]], TypeError, r"completions\[2\] must be a list of token ids, got 1.0 among"),
        ([FULL, FULL, [*FULL[:6], True]], TypeError, "got True among them"),
        ([FULL, FULL], ValueError, r"completions must be one per prompt \(3\), got 2"),
        ([FULL, [], FULL], ValueError, r"completions\[1\] must have at least one token, got none"),
        ([FULL, FULL, [*FULL, 3]], ValueError, r"completions\[2\] must have at most 7 tokens, got 8"),
        ([FULL, FULL[:4], FULL], ValueError, r"\[1\] must have 7 tokens or an end of sequence \(21\) as the last, got 4"),
        ([FULL, [3, EOS, 4], FULL], ValueError, r"\[1\] must end with its end of sequence 21, but has 1 tokens behind"),
        ([FULL, [*FULL[:6], VOCAB], FULL], ValueError, r"must lie in \[0, 61\), got 61 at \[1\]\[6\]"),
        ([FULL, FULL, [-1, *FULL[:6]]], ValueError, r"must lie in \[0, 61\), got -1 at \[2\]\[0\]"),
        (torch.tensor([FULL, FULL, [3, 4, 0, 0, 0, 0, 0]]), ValueError, r"\[2\] has padding at its end, but no end"),
        (torch.tensor([FULL, FULL, [3, EOS, 0, 5, 0, 0, 0]]), ValueError, r"\[2\] must have nothing but padding \(0\) .* 5"),
        ([FULL, FULL, [*FULL[:6], 50]], ValueError, r"may sample there, got 50 at \[2\]\[6\], which is suppressed"),
        ([FULL, FULL, [51, *FULL[:6]]], ValueError, r"may sample there, got 51 at \[2\]\[0\], which is suppressed"),
    ],
)  # fmt: skip
def test_completions_that_the_policy_can_not_have_drawn_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        loss_of(policy("gpt2"), completions=given, suppress_tokens=[50], begin_suppress_tokens=[51])


def test_what_may_stand_in_a_completion():
    """A token that is not to begin one may come later; padding of an engine's own width; an end by more than one name."""
    out = loss_of(policy("gpt2"), completions=[FULL, [3, 51, EOS], FULL], begin_suppress_tokens=[51])
    assert out.completion_mask.sum(1).tolist() == [7, 3, 7]
    wide = torch.tensor([[3, EOS, 0, 0, 0], [4, 5, EOS, 0, 0], [22, 0, 0, 0, 0]])
    read = Completions.of(wide, Ending((EOS, 22), 0, 7))
    assert read.ids.tolist() == [[3, EOS, 0], [4, 5, EOS], [22, 0, 0]]
    assert read.mask.sum(1).tolist() == [2, 3, 1]
    same = Completions.of(torch.tensor([[3, EOS, EOS], [4, 5, EOS]]), Ending((EOS,), EOS, 7))
    assert same.mask.tolist() == [[1, 1, 0], [1, 1, 1]], "where the padding is the end"
    endless = Completions.of([[0, 0], [3, 0]], Ending((), 0, 2))
    assert endless.mask.all(), "without an end every token is one"
    with pytest.raises(ValueError, match=r"completions\[0\] must have 3 tokens, got 2 tokens"):
        Completions.of([[0, 0]], Ending((), 0, 3))


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ([[-1.0] * 7] * 2, ValueError, r"logprobs of completions must be one row per completion \(3\), got 2"),
        ([[-1.0] * 7, [-1.0] * 6, [-1.0] * 7], ValueError, r"a number for each of the 7 tokens of \[1\], got 6"),
        (torch.zeros(3, 6), ValueError, "a number for each of 7 tokens, got 6"),
        (
            torch.zeros(3, 7, dtype=torch.int64),
            TypeError,
            r"logprobs of completions must be floating .* got torch.int64",
        ),
        ([[-1.0] * 7, [-1.0] * 7, [*[-1.0] * 6, None]], TypeError, r"must be numbers, got None at \[2\]\[6\]"),
        ([[-1.0] * 7, [-1.0, math.nan, *[-1.0] * 5], [-1.0] * 7], ValueError, r"got nan at \[1\]\[1\]"),
        ([[-math.inf, *[-1.0] * 6], [-1.0] * 7, [-1.0] * 7], ValueError, r"finite .*got -inf at \[0\]\[0\]"),
        ([[0.2, *[-1.0] * 6], [-1.0] * 7, [-1.0] * 7], ValueError, r"not positive, got 0.2 at \[0\]\[0\]"),
        (3.0, TypeError, "got float"),
        ([-1.0] * 3, TypeError, r"\[0\] of logprobs of completions must be a list of numbers, got float"),
    ],
)
def test_log_probabilities_that_are_none_are_refused(told, error, message):
    with pytest.raises(error, match=message):
        loss_of(policy("gpt2"), completions=[FULL] * 3, logprobs=told)


def test_log_probabilities_in_every_form():
    rows, told = [[3, EOS], FULL], [[-1.5, 1e-5], [-2.0] * 7]
    wanted = torch.tensor([[-1.5, 0, 0, 0, 0, 0, 0], [-2.0] * 7]).double()
    padded = wanted.clone()
    padded[0, 1:] = math.nan
    padded[0, 1] = 1e-5  # rounding
    for given in (told, [torch.tensor(row) for row in told], padded, padded.numpy(), [np.array(row) for row in told]):
        torch.testing.assert_close(Completions.of(rows, ENDING, given).logprobs, wanted)


def test_arguments_that_need_each_other():
    model = policy("gpt2")
    with pytest.raises(ValueError, match="estimator must be ste, st or reinmax for given completions, got 'soft'"):
        loss_of(model, estimator="soft", completions=[FULL] * 3)
    with pytest.raises(ValueError, match="importance needs the completions' logprobs, got None"):
        loss_of(model, completions=[FULL] * 3, importance=ImportanceSampling())
    with pytest.raises(TypeError, match="importance must be an ImportanceSampling or None, got str"):
        loss_of(model, completions=[FULL] * 3, logprobs=[[-1.0] * 7] * 3, importance="token_mask")
    with pytest.raises(ValueError, match="logprobs and importance are for completions from elsewhere"):
        loss_of(model, importance=ImportanceSampling())
