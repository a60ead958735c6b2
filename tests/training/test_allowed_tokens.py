"""Tokens that are never sampled: padded vocabularies, and what a generation config suppresses, against float64."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers as tf
from datasets import Dataset

import grade_kernels as gk
from grade_kernels import GumbelNoise
from grade_kernels.training import GRADETrainer, SequenceClassificationReward, grade_loss
from grade_kernels.training.allowed_tokens import ids_without_token
from tests.support import trainers
from tests.support.training_models import (
    VOCAB,
    BagReward,
    SlowTokenizer,
    classifier,
    gradients,
    padded_policy,
    policy,
    prompts,
    sequential_loss,
    word_tokenizer,
    worst_difference,
)

SEED, EOS, TIME = 11, 21, 7
TOKENS = 40  # of the padded policies, whose heads have VOCAB rows
PADDING = range(TOKENS, VOCAB)
SUPPRESSED, BEGIN = (3, 17, *range(50, VOCAB)), (EOS, 22, 23, 24)


def loss_of(model, reward, *, ids=None, mask=None, reference=None, beta=0.0, hops="exact", eps=0.0, **options):
    if ids is None:
        ids, mask = prompts()
    arguments = {"max_new_tokens": TIME, "tau": 0.8, "eos_token_id": EOS, "pad_token_id": 0} | options
    return grade_loss(
        model, reward, ids, mask, noise=GumbelNoise(SEED), feedback_hops=hops, eps=eps, ref_model=reference, beta=beta,
        **arguments,
    )  # fmt: skip


def cut(model, rows=TOKENS):
    """The model without the rows of its vocabulary from `rows` on."""
    smaller = copy.deepcopy(model)
    smaller.resize_token_embeddings(rows)
    return smaller


def short_prompts():
    """Prompts of the first tokens alone."""
    ids, mask = prompts()
    return ids % TOKENS, mask


# --------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("estimator", ["ste", "soft", "st", "reinmax"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "llama"])
def test_a_padded_policy_is_the_policy_without_its_padding(family, estimator):
    """Tied and untied heads, with bias and softcap: the same tokens, loss, KL and gradients; exactly 0 for the padding."""
    model, reference, reward = policy(family), policy(family, seed=1), BagReward()
    cut_reward = BagReward()
    cut_reward.embedding = reward.embedding[:TOKENS]
    ids, mask = short_prompts()
    options = {"ids": ids, "mask": mask, "beta": 0.1, "estimator": estimator}
    smaller = cut(model)
    truth = loss_of(smaller, cut_reward, reference=cut(reference), **options)
    free = loss_of(model, reward, reference=reference, **options)
    assert (free.completion_ids >= TOKENS).any(), "without a mask nothing beyond the tokens came up: no test"
    out = loss_of(model, reward, reference=reference, suppress_tokens=PADDING, **options)
    assert torch.equal(out.completion_ids, truth.completion_ids)
    tolerance = 1e-10 if family in ("gpt2", "phi") else 1e-6  # RMSNorm computes in float32
    for name in ("loss", "rewards", "kl", "logprobs"):
        torch.testing.assert_close(getattr(out, name), getattr(truth, name), rtol=tolerance, atol=tolerance)
    assert out.kl.abs().max() > 1e-3
    found, expected = gradients(out.loss, model), gradients(truth.loss, smaller)
    for name, gradient in found.items():
        if len(gradient) == VOCAB:
            assert (gradient[TOKENS:] == 0).all(), name
            found[name] = gradient[:TOKENS]
    assert worst_difference(found, expected) < tolerance


@pytest.mark.parametrize("estimator", ["ste", "soft", "st", "reinmax"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
def test_masks_equal_the_step_by_step_graph(family, estimator):
    """Tokens that are suppressed throughout and others for the first place, in one replay of all places."""
    model, reference, reward = policy(family), policy(family, seed=1), BagReward()
    ids, mask = prompts()
    loss, truth = sequential_loss(
        model, reward, ids, mask, time=TIME, seed=SEED, tau=0.8, estimator=estimator, reference=reference, beta=0.1,
        eos=EOS, suppressed=SUPPRESSED, begin_suppressed=BEGIN,
    )  # fmt: skip
    out = loss_of(
        model, reward, reference=reference, beta=0.1, estimator=estimator, suppress_tokens=SUPPRESSED,
        begin_suppress_tokens=BEGIN,
    )  # fmt: skip
    assert torch.equal(out.completion_ids, truth["ids"])
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.kl, truth["kl"], rtol=1e-6, atol=1e-8)
    assert worst_difference(gradients(out.loss, model), gradients(loss, model)) < (
        1e-6 if family == "gemma2" else 1e-10
    )


def test_masks_may_be_ids_or_bool_and_cost_no_tokens_that_they_do_not_name():
    model, reward = policy("gpt2"), BagReward()
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[list(SUPPRESSED)] = True
    ways = [SUPPRESSED, list(SUPPRESSED), torch.tensor(SUPPRESSED), mask, set(SUPPRESSED), (i for i in SUPPRESSED)]
    ways += [
        mask.numpy(),
        np.array(SUPPRESSED),
        np.array(SUPPRESSED, dtype=np.int16),
        [np.int64(i) for i in SUPPRESSED],
    ]
    found = [loss_of(model, reward, suppress_tokens=way).completion_ids for way in ways]
    assert all(torch.equal(ids, found[0]) for ids in found)
    free = loss_of(model, reward)
    nothings = [[], None, torch.zeros(VOCAB, dtype=torch.bool), torch.tensor([], dtype=torch.int64)]
    for nothing in (*nothings, np.array([]), np.zeros(VOCAB, dtype=bool)):
        out = loss_of(model, reward, suppress_tokens=nothing, begin_suppress_tokens=nothing)
        assert torch.equal(out.completion_ids, free.completion_ids)
        assert torch.equal(out.loss, free.loss)
    # Noise belongs to the token: what was drawn before and is not masked is drawn again, up to where a mask bites.
    drawn = free.completion_ids[:, 0]
    keep = ~torch.isin(drawn, torch.tensor(SUPPRESSED))
    assert keep.any()
    assert torch.equal(found[0][keep, 0], drawn[keep])


@pytest.mark.parametrize("begin", [None, BEGIN], ids=["throughout", "and first"])
@pytest.mark.parametrize("estimator", ["ste", "soft"])
@pytest.mark.parametrize("eps", [0.0, 2**-5])
def test_every_backend_masks(backend: str, device: str, interpreted: bool, estimator: str, eps: float, begin) -> None:
    """In float32, with a sparse backward and without: nothing masked is drawn, and its rows get exactly no gradient."""
    model, reference = (policy("llama", seed=seed, dtype=torch.float32).to(device) for seed in (0, 1))
    reward = BagReward(dtype=torch.float32)
    reward.embedding, reward.direction = reward.embedding.to(device), reward.direction.to(device)
    ids, mask = (x.to(device) for x in prompts())
    out = loss_of(
        model, reward, ids=ids, mask=mask, reference=reference, beta=0.1, hops=1, eps=eps, estimator=estimator,
        suppress_tokens=SUPPRESSED, begin_suppress_tokens=begin, eos_token_id=None,
        max_new_tokens=2 if interpreted else TIME,
    )  # fmt: skip
    assert not torch.isin(out.completion_ids.cpu(), torch.tensor(SUPPRESSED)).any()
    if begin is not None:
        assert not torch.isin(out.completion_ids[:, 0].cpu(), torch.tensor(begin)).any()
    assert out.kl.isfinite().all()
    assert (out.kl > 0).all()
    found = gradients(out.loss, model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert (found["lm_head.weight"][list(SUPPRESSED)] == 0).all()
    assert found["lm_head.weight"].abs().sum() > 0


@pytest.mark.parametrize("eps", [0.0, 2**-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_where_both_are_masked(backend: str, device: str, dtype: torch.dtype, eps: float) -> None:
    """It is the KL of the renormalised distributions in float64, and its gradient is finite, and 0 at the masked rows."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    hidden, weight, ref_hidden, ref_weight = randn(3, 8), randn(90, 8), randn(3, 5), randn(90, 5)
    bias = torch.zeros(90, device=device)
    bias[[4, *range(60, 90)]] = -torch.inf
    for x in (hidden, weight):
        x.requires_grad_()
    value = gk.linear_kl(
        hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=bias, eps=eps, noise=GumbelNoise(3)
    )
    kept = bias == 0
    logp = (hidden.double() @ weight.double()[kept].T).log_softmax(-1)
    logq = (ref_hidden.double() @ ref_weight.double()[kept].T).log_softmax(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(value.double(), (logp.exp() * (logp - logq)).sum(-1), rtol=tolerance, atol=tolerance)
    d_hidden, d_weight = torch.autograd.grad(value.sum(), (hidden, weight))
    assert d_hidden.isfinite().all()
    assert d_weight.isfinite().all()
    assert (d_weight[~kept] == 0).all()
    assert d_weight[kept].abs().sum() > 0


def test_a_long_rollout_through_the_screen_masks(monkeypatch):
    """On the CPU later steps are drawn through an eight-bit copy of the head, which knows the mask, too."""
    model, reward = policy("gpt2", dtype=torch.float32), BagReward(dtype=torch.float32)
    ids, mask = prompts()
    options = {"eos_token_id": None, "max_new_tokens": 40, "suppress_tokens": SUPPRESSED}
    with torch.no_grad():
        out = loss_of(model, reward, ids=ids, mask=mask, begin_suppress_tokens=BEGIN, **options)
        with gk.use_backend("torch"):
            plain = loss_of(model, reward, ids=ids, mask=mask, begin_suppress_tokens=BEGIN, **options)
    assert torch.equal(out.completion_ids, plain.completion_ids)
    assert not torch.isin(out.completion_ids, torch.tensor(SUPPRESSED)).any()
    assert torch.isin(out.completion_ids[:, 1:], torch.tensor(BEGIN)).any(), "they are free behind the first place"


# ------------------------------------------------------------------------------------------- vocabularies of two sizes


@pytest.mark.parametrize("estimator", ["ste", "soft"])
@pytest.mark.parametrize("rows", [TOKENS, TOKENS + 5, VOCAB + 10])
def test_a_reward_may_be_padded_otherwise(rows, estimator):
    """What it has behind the tokens, or lacks there, changes nothing."""
    ids, mask = short_prompts()
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (VOCAB, rows):
        reward = BagReward()
        more = torch.randn(VOCAB + 10, 6, generator=generator, dtype=torch.float64)
        reward.embedding = torch.cat([reward.embedding[:TOKENS], more])[:size]
        model = policy("gpt2")
        out = loss_of(model, reward, ids=ids, mask=mask, suppress_tokens=PADDING, estimator=estimator)
        found.append((out, gradients(out.loss, model)))
    assert torch.equal(found[0][0].completion_ids, found[1][0].completion_ids)
    torch.testing.assert_close(found[0][0].rewards, found[1][0].rewards, rtol=0, atol=0)
    assert worst_difference(found[1][1], found[0][1]) < 1e-12


@pytest.mark.parametrize("estimator", ["ste", "soft"])
@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_a_reference_may_be_padded_otherwise(family, estimator):
    ids, mask = short_prompts()
    options = {"ids": ids, "mask": mask, "suppress_tokens": PADDING, "beta": 0.1, "estimator": estimator}
    model, reward, reference = policy(family), BagReward(), policy(family, seed=1)
    larger = copy.deepcopy(reference)
    larger.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
    expected = loss_of(model, reward, reference=reference, **options)
    for other in (cut(reference), larger):
        out = loss_of(model, reward, reference=other, **options)
        torch.testing.assert_close(out.kl, expected.kl, rtol=1e-10, atol=1e-12)
        assert worst_difference(gradients(out.loss, model), gradients(expected.loss, model)) < 1e-10
        expected = loss_of(model, reward, reference=reference, **options)
    with pytest.raises(
        ValueError, match=r"ref_model must share the policy.s vocabulary: its LM head scores 40 .* ids up to 60"
    ):
        loss_of(model, reward, reference=cut(reference), **(options | {"suppress_tokens": None, "max_new_tokens": 1}))
    with pytest.raises(
        ValueError, match=r"ref_model must have a row for every token it reads.* has 40, but .* token \d\d"
    ):
        loss_of(
            model, reward, reference=cut(reference), **(options | {"ids": ids + 20, "suppress_tokens": range(40, 61)})
        )


def test_tokens_that_a_reward_lacks_are_named():
    ids, mask = prompts()
    reward = BagReward()
    reward.embedding = reward.embedding[:TOKENS]
    with pytest.raises(ValueError, match=r"share the policy's vocabulary.* 40 tokens, the policy scores 61.* up to 60"):
        loss_of(policy("gpt2"), reward)
    with pytest.raises(ValueError, match=r"share the policy's vocabulary.* 40 tokens.* up to 40"):
        loss_of(policy("gpt2"), reward, suppress_tokens=range(TOKENS + 1, VOCAB))
    ids[0, -1] = TOKENS + 3
    with pytest.raises(ValueError, match="its embedding table has 40, but a prompt or its padding has token 43"):
        loss_of(policy("gpt2"), reward, ids=ids % 44, mask=mask, suppress_tokens=PADDING)
    with pytest.raises(ValueError, match="a row for pad_token_id = 50"):
        loss_of(policy("gpt2"), reward, suppress_tokens=PADDING, pad_token_id=50)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"suppress_tokens": [61]}, ValueError, r"suppress_tokens must lie in \[0, 61\), got 61"),
        ({"suppress_tokens": [-1]}, ValueError, r"suppress_tokens must lie in \[0, 61\), got -1"),
        ({"begin_suppress_tokens": [99]}, ValueError, r"begin_suppress_tokens must lie in \[0, 61\), got 99"),
        ({"suppress_tokens": [1.0]}, TypeError, "suppress_tokens must be token ids or a bool mask"),
        ({"suppress_tokens": [True]}, TypeError, "got True among them"),
        ({"suppress_tokens": True}, TypeError, "got True"),
        ({"suppress_tokens": np.ones(7, dtype=bool)}, ValueError, r"suppress_tokens as a mask must have shape \(61,\)"),
        ({"suppress_tokens": np.ones((2, 3))}, TypeError, "suppress_tokens must be token ids or a bool mask"),
        (
            {"begin_suppress_tokens": np.array([[3]])},
            TypeError,
            "begin_suppress_tokens must be token ids or a bool mask",
        ),
        ({"suppress_tokens": "12"}, TypeError, "got '12'"),
        ({"suppress_tokens": 1.5}, TypeError, "got 1.5"),
        ({"suppress_tokens": torch.ones(3)}, TypeError, "got torch.float32"),
        ({"suppress_tokens": torch.ones(2, 2, dtype=torch.int64)}, TypeError, r"of \(2, 2\)"),
        ({"suppress_tokens": torch.ones(60, dtype=torch.bool)}, ValueError, r"shape \(61,\), got \(60,\)"),
        ({"suppress_tokens": range(61)}, ValueError, "must leave a token to sample, but names all 61"),
        ({"suppress_tokens": range(30), "begin_suppress_tokens": range(30, 61)}, ValueError, "a token to begin with"),
        ({"suppress_tokens": [EOS]}, ValueError, r"eos_token_id = 21 must be sampled for a completion to end"),
        ({"suppress_tokens": [5, 6], "eos_token_id": [6, 5]}, ValueError, "eos_token_id = 5 to 6 must be sampled"),
    ],
)
def test_masks_that_can_not_work_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        loss_of(policy("gpt2"), BagReward(), **options)


def test_one_end_of_several_and_the_padding_may_be_masked():
    """Padding is only what stands behind an end; it is finite everywhere, also in the gradient."""
    model = policy("gpt2")
    for estimator in ("ste", "soft", "st", "reinmax"):
        options = {
            "eos_token_id": [EOS, 5],
            "suppress_tokens": [0, 5],
            "beta": 0.1,
            "reference": policy("gpt2", seed=1),
        }
        out = loss_of(model, BagReward(), estimator=estimator, max_new_tokens=20, **options)
        assert (out.completion_mask == 0).any(), "nothing ended"
        assert not torch.isin(out.completion_ids[out.completion_mask.bool()], torch.tensor([0, 5])).any()
        assert all(gradient.isfinite().all() for gradient in gradients(out.loss, model).values())
        assert out.logprobs.isfinite().all()


# ------------------------------------------------------------------------------------------------- tokenizers and holes


def test_holes_and_padding_are_found():
    """In fast and slow tokenizers, also where ids begin late, or where two ids have one text."""
    assert ids_without_token(word_tokenizer(), VOCAB) == []
    assert ids_without_token(word_tokenizer(), VOCAB + 3) == [61, 62, 63]
    assert ids_without_token(word_tokenizer(), 40) == []
    assert ids_without_token(SlowTokenizer(), 16) == [4, *range(10, 16)]

    assert ids_without_token(tf.ByT5Tokenizer(), 390) == [*range(384, 390)], "it has a text for every number"

    class Counted:
        def __len__(self):
            return 5

    assert ids_without_token(Counted(), 7) == [5, 6]
    assert ids_without_token(object(), 7) == []

    class Doubled(SlowTokenizer):
        def get_vocab(self):
            return {text: id for text, id in super().get_vocab().items() if id != 5}

    assert ids_without_token(Doubled(), 12) == [4, 10, 11], "5 has a text, though the vocabulary does not list it"


# ------------------------------------------------------------------------------------------------------------- trainer


class Inviting(BagReward):
    """A reward that is highest for what no token has."""

    def __init__(self, vocab=16):
        super().__init__(dtype=torch.float32, vocab=vocab)
        self.embedding[4] = self.embedding[10:] = 2 * self.direction.sign()


def build(path, model=None, reward=None, tokenizer=None, **changes):
    return trainers.build(
        path,
        padded_policy() if model is None else model,
        Inviting() if reward is None else reward,
        Dataset.from_dict({"prompt": ["w3 w5", "w7", "w9 w3 w6", "w8"]}),
        processing_class=SlowTokenizer() if tokenizer is None else tokenizer,
        **({"max_steps": 30, "beta": 0.01, "weight_decay": 0.0} | changes),
    )


@pytest.mark.parametrize("estimator", ["ste", "soft"])
def test_no_row_without_a_token_is_sampled_in_training(tmp_path, caplog, monkeypatch, estimator):
    """Over 30 steps that a reward invites to it; said once; text rewards and the table see text."""
    seen, texts = [], []
    note = GRADETrainer._note_training

    def noting(self, inputs, out):
        seen.append(out)
        note(self, inputs, out)

    def length(prompts, completions, **columns):
        texts.extend(completions)
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(GRADETrainer, "_note_training", noting)
    model = padded_policy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        trainer = build(
            tmp_path, model=model, reward=[Inviting(), length], estimator=estimator, log_completions=True,
            eval_dataset=Dataset.from_dict({"prompt": ["w3", "w5 w6"]}),
        )  # fmt: skip
        trainer.train()
        prediction = trainer.predict(trainer.eval_dataset).predictions
    said = [record.getMessage() for record in caplog.records if "never sampled" in record.getMessage()]
    (message,) = said
    assert message.endswith(
        "head scores 16 tokens, of which its tokenizer has 9: the rows 4, 10 to 15 are never sampled"
    )
    ids = torch.cat([out.completion_ids[out.completion_mask.bool()] for out in seen])
    assert len(seen) == 30
    missing = torch.tensor([4, *range(10, 16)])
    assert not torch.isin(ids, missing).any()
    assert not torch.isin(torch.as_tensor(prediction), missing).any()
    assert not any("\ufffd" in text for text in texts)
    assert torch.equal(trainer.model.lm_head.weight[missing], before["lm_head.weight"][missing])
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(out.kl.isfinite().all() for out in seen)


def test_evaluation_measures_the_renormalised_distributions(tmp_path):
    """KL and log-probability of held-out completions, from dense float64 logits without the masked rows."""
    model = padded_policy().double()
    model.generation_config.begin_suppress_tokens = [2, 5]
    reward = BagReward(vocab=16)
    trainer = build(tmp_path, model=model, reward=reward, eval_dataset=Dataset.from_dict({"prompt": ["w3 w6"] * 8}))
    with torch.no_grad():  # away from the reference
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    output = trainer.predict(trainer.eval_dataset)
    kls, entropies = [], []
    masked = torch.zeros(6, 16, dtype=torch.bool)
    masked[:, [4, *range(10, 16)]] = True
    masked[0, [2, 5]] = True
    prompt = trainer._collator.tokens({"prompt": "w3 w6"})
    for row in torch.as_tensor(output.predictions):
        length = int((row == 2).nonzero()[0]) + 1 if (row == 2).any() else len(row)
        ids = torch.cat([torch.tensor(prompt), row[:length]])[None]
        assert row[0] not in (2, 5)
        with torch.no_grad():
            logp, logq = (
                m(ids).logits[0, len(prompt) - 1 : -1].masked_fill(masked[:length], -torch.inf).log_softmax(-1)
                for m in (trainer.model, trainer.ref_model)
            )
        kept = ~masked[:length]
        kls.append((logp.exp() * (logp - logq))[kept].sum().item())
        entropies.append(-logp.gather(1, row[:length, None]).mean().item())
    assert output.metrics["test_kl"] == pytest.approx(sum(kls) / 8, rel=1e-5)
    assert output.metrics["test_entropy"] == pytest.approx(sum(entropies) / 8, rel=1e-5)


def test_a_classifier_without_the_policys_padding_trains(tmp_path):
    """By the trainer, and a policy's own end that no token has is none."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1}
    judge = tf.BertForSequenceClassification(
        tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, num_labels=2)
    )
    model = padded_policy(eos_token_id=15)
    trainer = build(tmp_path, model=model, reward=judge, max_steps=2)
    assert trainer._end_ids == (2,)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] > 0
    with pytest.raises(ValueError, match=r"share the policy's vocabulary.* 9 tokens.* samples ids up to 9"):
        build(tmp_path, reward=BagReward(dtype=torch.float32, vocab=9))


def test_masks_and_adapters(tmp_path):
    """A PEFT policy: masks hold in it and in the base model that is its reference."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], init_lora_weights=False)
    model = peft.get_peft_model(padded_policy(), adapter)
    reward = BagReward(dtype=torch.float32, vocab=16)
    ids, mask = torch.tensor([[3, 5], [7, 4]]), torch.ones(2, 2, dtype=torch.int64)  # a prompt may hold what is masked
    out = loss_of(
        model, reward, ids=ids, mask=mask, beta=0.1, suppress_tokens=[4, *range(10, 16)], eos_token_id=2, hops=1
    )
    assert not torch.isin(out.completion_ids, torch.tensor([4, *range(10, 16)])).any()
    assert (out.kl > 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(out.loss, model).values())


def test_ends_that_are_masked_are_refused(tmp_path):
    model = padded_policy()
    model.generation_config.suppress_tokens = [2]
    with pytest.raises(ValueError, match="eos_token_id = 2 must be sampled for a completion to end"):
        build(tmp_path, model=model)
    model = padded_policy()
    model.generation_config.suppress_tokens = list(range(16))
    with pytest.raises(ValueError, match="must leave a token to sample"):
        build(tmp_path, model=model)


def test_a_decoder_classifier_larger_than_the_policy():
    """Its own padding rows are not read."""
    reward = SequenceClassificationReward(classifier("llama"))
    model = cut(policy("gpt2"))
    ids, mask = short_prompts()
    out = loss_of(model, reward, ids=ids, mask=mask)
    assert out.rewards.isfinite().all()
