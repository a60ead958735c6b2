"""`grade_loss` against a step-by-step graph through the same noise, in float64, for every parameter."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers as tf

from grade_kernels import GumbelNoise, use_backend
from grade_kernels.ops.repeated_sampler import RepeatedSampler
from grade_kernels.training import NonFiniteRewardError, SequenceClassificationReward, grade_loss, right_padded
from grade_kernels.training.rewards import Objective
from tests.support.training_models import (
    CHECKPOINTING,
    SIZES,
    VOCAB,
    BagReward,
    classifier,
    gradients,
    policy,
    prompts,
    sequential_loss,
    truncated_loss,
    worst_difference,
)

SEED = 11
EOS = 21  # ends the last prompt's completion at its third token, whichever the family
# RMSNorm computes in float32 inside float64 models.
FAMILIES = {"gpt2": 1e-10, "llama": 1e-6, "qwen2": 1e-6, "gemma2": 1e-6}


def reward_of(kind: str):
    return BagReward() if kind == "bag" else SequenceClassificationReward(classifier(kind))


def ours(model, reward, *, time=7, tau=0.8, estimator="ste", reference=None, beta=0.0, hops="exact", eps=0.0, **more):
    ids, mask = prompts()
    return grade_loss(
        model, reward, ids, mask, max_new_tokens=time, noise=GumbelNoise(SEED), tau=tau, estimator=estimator,
        feedback_hops=hops, eps=eps, ref_model=reference, beta=beta, eos_token_id=EOS, pad_token_id=0, **more,
    )  # fmt: skip


def check_exact(model, reward, tolerance, *, time=7, tau=0.8, estimator="ste", reference=None, beta=0.0):
    out = ours(model, reward, time=time, tau=tau, estimator=estimator, reference=reference, beta=beta)
    ids, mask = prompts()
    loss, truth = sequential_loss(
        model, reward, ids, mask, time=time, seed=SEED, tau=tau, estimator=estimator, reference=reference, beta=beta,
        eos=EOS,
    )  # fmt: skip
    assert torch.equal(out.completion_ids, truth["ids"])
    assert torch.equal(out.completion_mask, truth["mask"])
    torch.testing.assert_close(out.rewards, truth["rewards"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.kl, truth["kl"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-6, atol=1e-8)
    assert worst_difference(gradients(out.loss, model), gradients(loss, model)) < tolerance


def read_ids_alone(model):
    """Let a model's forward pass fail without ids, as those do that look them up more than once."""

    def check(module, arguments, keywords):
        assert "input_ids" in keywords

    model.register_forward_pre_hook(check, with_kwargs=True)


def spoil_the_cache(module, arguments, keywords, output):
    """Let a step that is right in itself leave a cache that is not."""
    if keywords.get("use_cache") and output.last_hidden_state.shape[1] == 1:
        output[1].layers[0].values.zero_()


# --------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["gpt2", "bert", "bag"])
def test_exact_hops_equal_the_step_by_step_graph(family, kind):
    reference, beta = (None, 0.0) if kind == "bag" else (policy(family, seed=1), 0.1)
    model, reward = policy(family), reward_of(kind)
    out = ours(model, reward, time=2)
    assert out.completion_mask.shape == (3, 2)
    check_exact(model, reward, FAMILIES[family], reference=reference, beta=beta)
    lengths = ours(model, reward).completion_mask.sum(1)
    assert lengths[2] < 7 == lengths.max(), "no end of sequence came up inside, so the test shows nothing about it"


@pytest.mark.parametrize("estimator", ["soft", "st", "reinmax"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_estimator_is_exact(family, estimator):
    check_exact(
        policy(family), reward_of("bert"), FAMILIES[family], estimator=estimator, reference=policy(family, seed=1),
        beta=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gptj", "phi", "cohere", "granite"])
def test_heads_with_bias_or_scale_are_exact(family):
    tolerance = 1e-10 if family == "phi" else 1e-6  # GPT-J attends in float32
    check_exact(policy(family), reward_of("bag"), tolerance, reference=policy(family, seed=1), beta=0.1)


@pytest.mark.parametrize("family", ["opt", "bart", "llama4"])
def test_decoders_by_another_name_are_exact(family):
    """The first two run the decoder below the backbone of their name, the third has no backbone of that name."""
    # The bias of keys has no gradient but rounding.
    check_exact(
        policy(family),
        reward_of("bag"),
        1e-6 if family == "llama4" else 1e-7,
        reference=policy(family, seed=1),
        beta=0.1,
    )


def test_a_state_that_counts_padding_is_exact():
    check_exact(policy("minimax"), reward_of("bag"), 1e-6, reference=policy("minimax", seed=1), beta=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_tables_are_exact(tied):
    check_exact(policy("gpt2", tie_word_embeddings=tied), reward_of("bag"), 1e-10)


@pytest.mark.parametrize(("family", "hops"), [("gpt2", 0), ("gpt2", 1), ("gpt2", 2), ("gpt2", 4), ("gemma2", 2)])
@pytest.mark.parametrize("estimator", ["ste", "reinmax"])
def test_fewer_hops_equal_the_truncated_sum(family, hops, estimator):
    model, reference, reward = policy(family), policy(family, seed=1), reward_of("bag")
    out = ours(model, reward, hops=hops, estimator=estimator, reference=reference, beta=0.1)
    ids, mask = prompts((4, 4, 4)) if family == "gemma2" else prompts()
    if family == "gemma2":  # eager attention can not read padded rows in float64, and the truth is one batch
        out = grade_loss(
            model, reward, ids, mask, max_new_tokens=5, noise=GumbelNoise(SEED), tau=0.8, estimator=estimator,
            feedback_hops=hops, eps=0, ref_model=reference, beta=0.1,
        )  # fmt: skip
    truth = truncated_loss(
        model, reward, ids, mask, out.completion_ids, out.completion_mask, hops=hops, seed=SEED, tau=0.8,
        estimator=estimator, reference=reference, beta=0.1,
    )  # fmt: skip
    torch.testing.assert_close(out.loss.detach(), truth.detach(), rtol=1e-6, atol=1e-8)
    assert worst_difference(gradients(out.loss, model), gradients(truth, model)) < FAMILIES[family]


def test_more_hops_come_closer_and_no_hop_misses_something():
    model, reward = policy("gpt2"), reward_of("bag")
    exact = gradients(ours(model, reward).loss, model)
    errors = [worst_difference(gradients(ours(model, reward, hops=k).loss, model), exact) for k in (0, 2, 4, 6)]
    assert errors[0] > 1e-3
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


def test_the_sparse_backward_is_unbiased():
    model, reward = policy("gpt2"), reward_of("bag")
    ids, mask = prompts((4,) * 2)

    def gradient(seed, eps):
        torch.manual_seed(seed)
        out = grade_loss(
            model, reward, ids, mask, max_new_tokens=1, noise=GumbelNoise(seed), feedback_hops=0, eps=eps, tau=1.0,
            ref_model=reference, beta=0.1,
        )  # fmt: skip
        return torch.cat([g.flatten() for g in gradients(out.loss, model).values()])

    reference = policy("gpt2", seed=1)
    differences = torch.stack([gradient(seed, 0.2) - gradient(seed, 0.0) for seed in range(50)])
    error = differences.mean(0).norm()
    floor = (differences.var(0).sum() / len(differences)).sqrt()
    assert 0 < error < 1.5 * floor


def test_gradient_checkpointing_changes_nothing_and_stays_out_of_the_rollout():
    model, reward = policy("llama"), reward_of("bag")
    plain = ours(model, reward, hops=2)
    expected = gradients(plain.loss, model)
    enable = getattr(model, f"{CHECKPOINTING}_enable")
    enable({"use_reentrant": False})
    model.train()
    out = ours(model, reward, hops=2)
    assert model.training
    assert torch.equal(out.completion_ids, plain.completion_ids)
    assert worst_difference(gradients(out.loss, model), expected) < 1e-10
    for reentrant in ({"use_reentrant": True}, {"preserve_rng_state": True}):  # torch takes no word for "reentrant"
        enable(reentrant)
        with pytest.raises(ValueError, match="must not have reentrant gradient checkpointing"):
            ours(model, reward, hops=2)


def test_backends_agree():
    model, reward = policy("gpt2"), reward_of("bag")
    with use_backend("reference"):
        expected = gradients(ours(model, reward, hops=2).loss, model)
    with use_backend("torch"):
        assert worst_difference(gradients(ours(model, reward, hops=2).loss, model), expected) < 1e-10


# ------------------------------------------------------------------------------------------------------------ rollout


def test_a_completion_does_not_depend_on_its_batch():
    model, reward = policy("llama", dtype=torch.float32), BagReward(dtype=torch.float32)
    ids, mask = prompts()
    noise = GumbelNoise(SEED, torch.tensor([40, 7, 1000]))
    options = {"max_new_tokens": 9, "eos_token_id": EOS, "feedback_hops": 0}
    together = grade_loss(model, reward, ids, mask, noise=noise, **options)
    for row in range(3):
        alone = grade_loss(
            model, reward, ids[row : row + 1, -int(mask[row].sum()) :], mask[row : row + 1, -int(mask[row].sum()) :],
            noise=GumbelNoise(SEED, noise.row_ids[row : row + 1]), **options,
        )  # fmt: skip
        length = alone.completion_ids.shape[1]
        assert torch.equal(alone.completion_ids[0], together.completion_ids[row, :length])
        assert torch.equal(alone.row_ids[0], together.row_ids[row, :length])
        assert together.completion_mask[row].sum() == length
        torch.testing.assert_close(alone.rewards[0], together.rewards[row])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_model_has_for_it(name):
    """Releases of transformers differ in it, and so may a model whose code comes with it."""
    reward, expected = reward_of("bag"), ours(policy("llama"), reward_of("bag"))
    model = policy("llama")
    forward = model.model.forward
    signature = inspect.signature(forward)
    (own,) = {"cache", "past_key_values"} & signature.parameters.keys()
    steps = []

    def renamed(*arguments, use_cache=False, **keywords):
        if not use_cache:  # from the model's own forward, which knows the name it came with
            return forward(*arguments, use_cache=False, **keywords)
        cache = keywords.pop(name, None)
        steps.append(cache)
        output = forward(*arguments, use_cache=True, **{own: cache}, **keywords)
        return SimpleNamespace(last_hidden_state=output.last_hidden_state, **{name: output[own]})

    renamed.__signature__ = signature.replace(
        parameters=[
            parameter.replace(name=name) if parameter.name == own else parameter
            for parameter in signature.parameters.values()
        ]
    )
    model.model.forward = renamed
    out = ours(model, reward)
    assert torch.equal(out.completion_ids, expected.completion_ids)
    assert torch.equal(out.loss, expected.loss)
    assert None in steps
    assert not all(cache is None for cache in steps)


def test_a_long_completion_is_drawn_as_a_short_one(monkeypatch):
    """Once a screen of the head pays, tokens are those that were drawn without it."""
    model, reward = policy("llama", dtype=torch.float32), BagReward(dtype=torch.float32)
    ids, mask = prompts()
    drawn = []
    for plain_steps in (4, 1000):
        sampler = partial(RepeatedSampler, plain_steps=plain_steps)
        monkeypatch.setattr("grade_kernels.training.rollout.RepeatedSampler", sampler)
        drawn.append(grade_loss(model, reward, ids, mask, noise=GumbelNoise(SEED), max_new_tokens=20, feedback_hops=0))
    assert drawn[0].completion_ids.shape[1] == 20
    assert torch.equal(drawn[0].completion_ids, drawn[1].completion_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_that_ended_long_before_the_others_does_no_harm(dtype):
    """Its last tokens are out of a sliding window of 4, whose attention then has nothing but padding to look at."""
    model, reward = policy("gemma2", dtype=dtype), BagReward(dtype=dtype)
    ids, mask = prompts((4, 4, 4, 4))
    options = {"max_new_tokens": 14, "tau": 0.8, "eps": 0.0, "eos_token_id": list(range(3, 9)), "pad_token_id": 0}
    together = grade_loss(model, reward, ids, mask, noise=GumbelNoise(SEED), **options)
    lengths = together.completion_mask.sum(1)
    assert lengths.max() - lengths.min() > 5
    assert together.loss.isfinite()
    for row, length in enumerate(lengths.tolist()):
        noise = GumbelNoise(SEED, torch.tensor([row]))
        alone = grade_loss(model, reward, ids[row : row + 1], mask[row : row + 1], noise=noise, **options)
        assert alone.completion_ids[0].tolist() == together.completion_ids[row, :length].tolist()


def test_a_batch_stops_when_every_sequence_has_ended():
    model, reward = policy("gpt2"), reward_of("bag")
    ids, mask = prompts()
    first = ours(model, reward).completion_ids
    ends = first[:, 1].tolist()
    out = grade_loss(
        model, reward, ids, mask, max_new_tokens=7, noise=GumbelNoise(SEED), eos_token_id=ends, pad_token_id=0
    )
    assert out.completion_ids.shape[1] <= 2
    last = out.completion_mask.sum(1) - 1
    assert all(int(out.completion_ids[row, last[row]]) in ends for row in range(3))
    assert (out.logprobs[out.completion_mask == 0] == 0).all()
    assert (out.logprobs[out.completion_mask == 1] < 0).all()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_a_value(without):
    model, reward, reference = policy("gpt2"), reward_of("bag"), policy("gpt2", seed=1)
    expected = ours(model, reward, reference=reference, beta=0.1)
    with without():
        out = ours(model, reward, reference=reference, beta=0.1)
    assert not out.loss.requires_grad
    assert out.loss == expected.loss


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype):
    model, reward = policy("gpt2"), reward_of("bert")
    ids, mask = prompts()
    options = {"max_new_tokens": 4, "noise": GumbelNoise(0)}
    expected = grade_loss(model, reward, ids, mask, **options).loss
    assert grade_loss(model, reward, ids, mask.to(dtype), **options).loss == expected


def test_a_model_that_scales_its_embeddings_in_place_is_exact():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24, "n_positions": 64}
    model = tf.CTRLLMHeadModel(tf.CTRLConfig(**sizes, initializer_range=0.3)).double().eval()
    # The bias of keys has no gradient but rounding.
    check_exact(model, reward_of("bag"), 1e-7)


def test_a_compiled_model_is_replayed_as_it_is():
    model, reward = policy("gpt2"), reward_of("bag")
    truth = gradients(ours(model, reward).loss, model)
    found = gradients(ours(torch.compile(model, backend="eager"), reward).loss, model)
    assert worst_difference(found, truth) == 0.0


def test_nothing_behind_the_end_moves_the_gradient():
    class Careless(BagReward):
        def forward(self, inputs_embeds, attention_mask, **columns):
            return super().forward(inputs_embeds, attention_mask) + 0.1 * inputs_embeds.sum((1, 2))

    class Careful(BagReward):
        def forward(self, inputs_embeds, attention_mask, **columns):
            return super().forward(inputs_embeds, attention_mask) + 0.1 * (
                inputs_embeds * attention_mask[..., None]
            ).sum((1, 2))

    model = policy("gpt2")
    careless = gradients(ours(model, Careless()).loss, model)
    assert worst_difference(careless, gradients(ours(model, Careful()).loss, model)) < 1e-12


# ------------------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "bert", "distilbert", "roberta", "deberta", "modernbert"])
def test_a_classifier_scores_embeddings_as_it_scores_ids(family):
    model = classifier(family)
    reward = SequenceClassificationReward(model, label=1)
    ids, mask = prompts((5, 9, 2))
    ids = torch.where(mask.bool(), ids, 3)
    embeds = reward.embedding[ids].requires_grad_()
    values = reward(embeds, mask)
    for row in range(3):
        own = ids[row : row + 1, -int(mask[row].sum()) :]
        logits = model(input_ids=own, attention_mask=torch.ones_like(own)).logits
        torch.testing.assert_close(values[row], logits.softmax(-1)[0, 1].to(values.dtype), rtol=1e-5, atol=1e-6)
    values.sum().backward()
    assert (embeds.grad[mask == 0] == 0).all()
    assert (embeds.grad[mask == 1].abs().sum(-1) > 0).all()


def test_a_classifier_offers_probability_log_odds_and_raw_score():
    model = classifier("bert", labels=3)
    ids, mask = prompts((4, 4))
    with pytest.raises(ValueError, match="label must be chosen among the model's 3 labels"):
        SequenceClassificationReward(model)
    by = {o: SequenceClassificationReward(model, label="LABEL_2", output=o) for o in ("probability", "log_odds", "raw")}
    embeds = by["raw"].embedding[ids]
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(by["raw"](embeds, mask), logits[:, 2])
    torch.testing.assert_close(by["probability"](embeds, mask), logits.softmax(-1)[:, 2])
    torch.testing.assert_close(by["log_odds"](embeds, mask).sigmoid(), logits.softmax(-1)[:, 2])
    with pytest.raises(ValueError, match="LABEL_9"):
        SequenceClassificationReward(model, label="LABEL_9")
    with pytest.raises(TypeError, match=r"label must be an int, a name or None, got 1\.0"):
        SequenceClassificationReward(model, label=1.0)
    with pytest.raises(ValueError, match="output must be one of"):
        SequenceClassificationReward(model, label=0, output="odds")
    with pytest.raises(TypeError, match="sequence classifier, got str"):
        SequenceClassificationReward("bert")


def test_labels_that_do_not_exclude_each_other_have_odds_of_their_own():
    model = classifier("bert", labels=3)
    model.config.problem_type = "multi_label_classification"
    ids, mask = prompts((4, 4))
    reward = SequenceClassificationReward(model, label=1)
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(reward(reward.embedding[ids], mask), logits[:, 1].sigmoid())


def test_an_infinite_logit_is_not_said_to_be_the_reward(monkeypatch):
    objective = Objective(BagReward(), transform="logit")
    monkeypatch.setattr(
        BagReward, "forward", lambda self, inputs_embeds, attention_mask: inputs_embeds[:, 0, 0] * 0 + 1
    )
    with pytest.raises(NonFiniteRewardError, match="the logit of reward is not finite"):
        objective(torch.zeros(2, 3, 6), torch.ones(2, 3), {})


def test_a_classifier_that_reads_more_than_embeddings_is_refused():
    model = classifier("bert")
    model.bert.embeddings.word_embeddings.register_forward_hook(lambda module, arguments, output: 3.0 * output)
    with pytest.raises(ValueError, match="can not be read through its embeddings"):
        SequenceClassificationReward(model)
    by_ids = classifier("bert")
    read_ids_alone(by_ids)
    with pytest.raises(ValueError, match="can not be read through its embeddings: AssertionError"):
        SequenceClassificationReward(by_ids)


def test_right_padded_moves_rows_and_keeps_gradients():
    embeds = torch.arange(12.0).view(2, 6, 1).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]])
    packed, packed_mask = right_padded(embeds, mask)
    assert packed[..., 0].tolist() == [[1, 2, 4], [6, 7, 0]]
    assert packed_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    packed.sum().backward()
    assert torch.equal(embeds.grad[..., 0].long(), mask)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": 0.1}, ValueError, "ref_model must be given"),
        ({"beta": -0.1}, ValueError, "beta must not be negative"),
        ({"beta": float("nan")}, ValueError, "beta must not be negative"),
        ({"beta": "some"}, TypeError, "beta must be a number"),
        ({"hops": -1}, ValueError, "feedback_hops must not be negative"),
        ({"hops": "all"}, TypeError, "feedback_hops must be an int or"),
        ({"time": 0}, ValueError, "max_new_tokens must be positive"),
        ({"time": 60}, ValueError, "more than the model's 64 positions"),
        ({"estimator": "hard"}, ValueError, "estimator"),
        ({"eps": 2.0}, ValueError, "eps must lie in"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        ours(policy("gpt2"), reward_of("bag"), **changes)


def test_bad_prompts_are_named():
    model, reward = policy("gpt2"), reward_of("bag")
    ids, mask = prompts()
    options = {"max_new_tokens": 2, "noise": GumbelNoise(0)}
    with pytest.raises(ValueError, match="left-padded"):
        grade_loss(model, reward, ids, mask.flip(1), **options)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        grade_loss(model, reward, ids + 50, mask, **options)
    with pytest.raises(TypeError, match="input_ids must be an int64"):
        grade_loss(model, reward, ids.float(), mask, **options)
    with pytest.raises(TypeError, match=r"eos_token_id must be an int, several or None, got 2\.0"):
        grade_loss(model, reward, ids, mask, eos_token_id=2.0, **options)
    with pytest.raises(ValueError, match="must name 3 sequences"):
        grade_loss(model, reward, ids, mask, max_new_tokens=2, noise=GumbelNoise(0, torch.arange(2)))


def test_frequencies_that_change_within_a_completion_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    model = policy("llama", rope_parameters=rope | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4})
    ids, mask = prompts((3, 5, 2))
    options = {"noise": GumbelNoise(SEED), "eps": 0, "feedback_hops": 0}
    grade_loss(model, reward_of("bag"), ids, mask, max_new_tokens=4, **options)
    with pytest.raises(ValueError, match="after prompts of 2 to 5 tokens passes position 8"):
        grade_loss(model, reward_of("bag"), ids, mask, max_new_tokens=5, **options)
    ids, mask = prompts((9, 10))
    grade_loss(model, reward_of("bag"), ids, mask, max_new_tokens=5, **options)


def test_bad_rewards_are_named():
    model = policy("gpt2")

    class Broken(BagReward):
        def __init__(self, result, vocab=VOCAB):
            super().__init__(vocab=vocab)
            self.result = result

        def forward(self, inputs_embeds, attention_mask, **columns):
            return self.result(super().forward(inputs_embeds, attention_mask))

    with pytest.raises(ValueError, match=r"share the policy's vocabulary.* 60 tokens, the policy scores 61"):
        ours(model, Broken(lambda x: x, vocab=60))
    with pytest.raises(ValueError, match="no gradient"):
        ours(model, Broken(torch.detach))
    with pytest.raises(ValueError, match=r"one value per sequence \(3,\), got \(\)"):
        ours(model, Broken(torch.sum))
    with pytest.raises(NonFiniteRewardError, match=r"row\(s\) \[1\]") as error:
        ours(model, Broken(lambda x: torch.where(torch.arange(3) == 1, torch.nan, x)))
    assert error.value.rows == [1]
    with pytest.raises(TypeError, match="embedding"):
        ours(model, lambda inputs_embeds, attention_mask: inputs_embeds.sum((1, 2)))


def test_columns_reach_the_reward():
    class Named(BagReward):
        def forward(self, inputs_embeds, attention_mask, *, sign):
            return sign * super().forward(inputs_embeds, attention_mask)

    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    out = ours(policy("gpt2"), Named(), columns={"sign": sign})
    assert torch.equal(out.rewards.sign(), sign)


def test_models_that_can_not_be_replayed_are_refused():
    reward = reward_of("bag")
    with pytest.raises(ValueError, match="encoder-decoder"):
        ours(
            tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
            reward,
        )
    with pytest.raises(ValueError, match="language modelling head"):
        ours(tf.LlamaModel(tf.LlamaConfig(**SIZES)), reward)
    with pytest.raises(TypeError, match="got str"):
        ours("gpt2", reward)
    with pytest.raises(ValueError, match="must be a transformers model"):
        ours(nn.Linear(2, 2), reward)
    scaled = policy("gpt2")
    scaled.lm_head.register_forward_hook(lambda module, arguments, output: 2.0 * output)
    with pytest.raises(ValueError, match="its logits are not"):
        ours(scaled, reward)
    embedded = policy("gpt2")
    embedded.transformer.wte.register_forward_hook(lambda module, arguments, output: 2.0 * output)
    with pytest.raises(ValueError, match="not a multiple of the table's row"):
        ours(embedded, reward)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    narrow = tf.ElectraForCausalLM(tf.ElectraConfig(**sizes, embedding_size=8, is_decoder=True))
    with pytest.raises(ValueError, match="its LM head reads 8 features, but its ElectraModel returns 16"):
        ours(narrow, reward)
    stateful = tf.RecurrentGemmaConfig(**(SIZES | {"num_hidden_layers": 3}), lru_width=16, attention_window_size=8)
    with pytest.raises(ValueError, match="decodes without a key-value cache"):
        ours(tf.RecurrentGemmaForCausalLM(stateful), reward)
    forgetful = policy("llama")
    forgetful.model.register_forward_hook(spoil_the_cache, with_kwargs=True)
    with pytest.raises(ValueError, match="other hidden states step by step than of all tokens at once"):
        ours(forgetful, reward)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
    # Its cache has a name of its own before transformers 5.24.
    with pytest.raises(ValueError, match=r"decodes without a key-value cache|other hidden states step by step"):
        ours(tf.MambaForCausalLM(tf.MambaConfig(**sizes, state_size=4)), reward)
    by_ids = policy("gpt2")
    read_ids_alone(by_ids)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel\) can not be run from inputs_embeds: AssertionError"):
        ours(by_ids, reward)
    bypassed = policy("gpt2")
    bypassed.forward = lambda **arguments: (
        bypassed.transformer.h and tf.modeling_outputs.CausalLMOutput(logits=torch.zeros(1, 4, VOCAB))
    )
    with pytest.raises(ValueError, match="does not run its input embedding"):
        ours(bypassed, reward)
