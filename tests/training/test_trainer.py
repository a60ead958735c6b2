"""`GRADETrainer` end to end on tiny models: what it logs, saves, refuses, and where it goes on."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import transformers as tf
from datasets import Dataset, DatasetDict

from grade_kernels.training import (
    GRADEConfig,
    GRADETrainer,
    NonFiniteGradientError,
    NonFiniteRewardError,
    SequenceClassificationReward,
    TrainingInterrupted,
    checkpoints,
)
from grade_kernels.training.schedules import tau_at
from tests.support import ROOT
from tests.support.trainers import PROMPTS, build, config, same, weights
from tests.support.training_models import CHECKPOINTING, SIZES, VOCAB, BagReward, classifier, policy, word_tokenizer

STRATEGIES = hasattr(GRADEConfig, "train_sampling_strategy")  # the first releases of transformers 5 do not have it

# --------------------------------------------------------------------------------------------------- training and logs


def test_training_raises_the_reward_and_logs_by_trls_names(tmp_path):
    trainer = build(tmp_path, max_steps=25, beta=0.01)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 25
    assert sum(e["reward"] for e in logs[-3:]) > sum(e["reward"] for e in logs[:3]) + 0.3
    names = {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "rewards/BagReward/mean", "rewards/BagReward/std",
        "kl", "entropy", "tau", "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "step_time", "num_tokens", "epoch",
    }  # fmt: skip
    assert names <= logs[0].keys()
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert logs[-1]["kl"] > 0.1
    assert logs[0]["loss"] == pytest.approx(-logs[0]["reward"] + 0.01 * logs[0]["kl"], abs=1e-5)
    assert logs[-1]["num_tokens"] > logs[0]["num_tokens"] > 0


@pytest.mark.parametrize("estimator", ["ste", "soft"])
def test_cheapest_mode_holds_no_reference(tmp_path, estimator):
    trainer = build(
        tmp_path, beta=0.0, feedback_hops=0, estimator=estimator, eval_dataset=Dataset.from_dict({"prompt": PROMPTS})
    )
    assert trainer.ref_model is None
    before = weights(trainer)
    trainer.train()
    assert not same(before, weights(trainer))
    assert "kl" not in trainer.state.log_history[0]
    assert "eval_kl" not in trainer.evaluate()


def test_accumulated_steps_are_one_large_step(tmp_path):
    # Adam would blow the rounding of vanishing gradients up to whole steps.
    options = {"eps": 0.05, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}
    whole = build(tmp_path / "a", **options)
    parts = build(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    before = weights(whole)
    whole.train()
    parts.train()
    first, second = weights(whole), weights(parts)
    assert not same(before, first)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)
    for name in ("loss", "reward", "kl"):
        assert whole.state.log_history[0][name] == pytest.approx(parts.state.log_history[0][name], abs=1e-4)


@pytest.fixture
def drawn(monkeypatch):
    """Noises of training batches, as they are drawn."""
    found = []
    noise = GRADETrainer._training_noise
    monkeypatch.setattr(
        GRADETrainer, "_training_noise", lambda self, batch: found.append(noise(self, batch)) or found[-1]
    )
    return found


def test_every_step_and_every_run_has_a_seed_of_its_own(tmp_path, drawn):
    eight = Dataset.from_dict({"prompt": PROMPTS[:8]})
    for seed in (1, 2):
        build(tmp_path, dataset=eight, max_steps=2, gradient_accumulation_steps=2, seed=seed).train()
    seeds = [int(n.seed) for n in drawn]
    assert seeds[::2] == seeds[1::2], "the batches of a step differ by their rows"
    assert len(set(seeds)) == 4


def test_a_smaller_batch_of_a_step_has_noise_of_its_own(tmp_path, drawn):
    six = Dataset.from_dict({"prompt": PROMPTS[:6]})
    trainer = build(tmp_path, dataset=six, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    assert [n.row_ids.tolist() for n in drawn] == [[0, 1, 2, 3], [4, 5]]
    drawn.clear()
    trainer.train()
    assert [n.row_ids.tolist() for n in drawn] == [[0, 1, 2, 3], [4, 5]], "a second run begins anew"


@pytest.mark.skipif(
    not hasattr(tf.Trainer, "_track_num_input_tokens"),
    reason="this release of transformers counts prompts a second time",
)
def test_a_step_is_timed_and_its_tokens_are_counted_as_a_whole(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("grade_kernels.training.trainer.time.perf_counter", lambda: next(clock))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    counting = build(tmp_path, include_num_input_tokens_seen="all", **options)
    counting.train()
    logs = [entry for entry in counting.state.log_history if "reward" in entry]
    assert [entry["step_time"] for entry in logs] == [2.0, 2.0]
    plain = build(tmp_path, **options)
    plain.train()
    assert [entry["num_tokens"] for entry in logs] == [
        entry["num_tokens"] for entry in plain.state.log_history if "reward" in entry
    ]


@pytest.mark.parametrize("family", ["bart", "mixtral"])
def test_nothing_is_random_in_training_unless_asked_for(tmp_path, family):
    if family == "mixtral":
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=2, router_jitter_noise=0.5))
    else:
        model = policy(family, dtype=torch.float32, activation_dropout=0.5, decoder_layerdrop=0.5)
        model.generation_config.forced_eos_token_id = None  # Bart's own, which training refuses
    ids = torch.arange(3, 12)[None]
    expected = model.eval()(ids).logits
    assert not torch.allclose(model.train()(ids).logits, expected, atol=1e-3)
    build(tmp_path, model=model)
    assert torch.allclose(model.train()(ids).logits, expected, atol=1e-6)


def test_tau_moves_along_its_schedule(tmp_path):
    for schedule, middle in (("linear", 1.25), ("cosine", 1.25), ("exponential", 1.0)):
        assert tau_at(schedule, 2.0, 0.5, 0.0) == 2.0
        assert tau_at(schedule, 2.0, 0.5, 0.5) == pytest.approx(middle)
        assert tau_at(schedule, 2.0, 0.5, 1.0) == pytest.approx(0.5)
    assert tau_at("constant", 2.0, 0.5, 0.7) == 2.0
    trainer = build(tmp_path, tau=2.0, tau_final=1.0, tau_schedule="linear")
    trainer.train()
    assert [entry["tau"] for entry in trainer.state.log_history if "tau" in entry] == [2.0, 1.75, 1.5, 1.25]


def test_several_rewards_weights_text_functions_and_columns(tmp_path):
    seen = {}

    def length(prompts, completions, completion_ids, topic, **columns):
        seen.update(prompts=prompts, completions=completions, topic=topic)
        return [float(len(ids)) for ids in completion_ids]

    class Topical(BagReward):
        def forward(self, inputs_embeds, attention_mask, *, topic):
            assert len(topic) == len(inputs_embeds)
            return super().forward(inputs_embeds, attention_mask)

    class Other(BagReward):
        def __init__(self):
            super().__init__(seed=8, dtype=torch.float32, width=5)

    dataset = Dataset.from_dict({"prompt": PROMPTS, "topic": [f"t{i}" for i in range(12)]})
    rewards = [Topical(dtype=torch.float32), Other(), length]
    trainer = build(tmp_path, reward=rewards, dataset=dataset, reward_weights=[2.0, -0.5, 0.0])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(2 * log["rewards/Topical/mean"] - 0.5 * log["rewards/Other/mean"], abs=1e-5)
    assert log["rewards/length/mean"] == log["completions/mean_length"]
    assert len(seen["prompts"]) == len(seen["completions"]) == len(seen["topic"]) == 4


@pytest.mark.parametrize("transform", ["log_probability", "logit"])
def test_the_transform_is_differentiated_and_the_probability_logged(tmp_path, transform):
    plain = build(tmp_path / "a", max_steps=1, beta=0.0)
    plain.train()
    for i, reward in enumerate(
        (BagReward(dtype=torch.float32), SequenceClassificationReward(classifier("bert", dtype=torch.float32)))
    ):
        trainer = build(tmp_path / f"b{i}", reward=reward, reward_transform=transform, max_steps=1, beta=0.0)
        trainer.train()
        assert 0 < trainer.state.log_history[0]["reward"] < 1
        if i == 0:
            assert trainer.state.log_history[0]["reward"] == pytest.approx(plain.state.log_history[0]["reward"])
            assert trainer.state.log_history[0]["grad_norm"] > plain.state.log_history[0]["grad_norm"]


def test_generations_conversations_and_truncation(tmp_path):
    tokenizer = word_tokenizer()
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROMPTS]})
    with pytest.raises(ValueError, match="chat_template"):
        build(tmp_path, dataset=dataset)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
    )
    seen = []

    def text(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(prompts)

    trainer = GRADETrainer(
        policy("gpt2", dtype=torch.float32), [BagReward(dtype=torch.float32), text],
        config(tmp_path, num_generations=2, mask_truncated_completions=True, max_steps=2), dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["prompts"][0] == batch["prompts"][1] != batch["prompts"][2]
    assert (batch["input_ids"][:, -1] == 5).all()
    trainer.train()
    log = trainer.state.log_history[0]
    if log["completions/clipped_ratio"] == 1.0:
        assert log["grad_norm"] == 0.0
    assert all([list(message) for message in completion] == [["role", "content"]] for completion in seen)
    begun = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8 w9"}]
    assert trainer._collator.tokens({"prompt": begun}) == [7, 8, 9]


def test_completions_are_shown_as_a_table(tmp_path, capsys):
    build(tmp_path, log_completions=True, num_completions_to_print=2, max_steps=1).train()
    text = capsys.readouterr().out
    assert "Step 1" in text
    assert "Completion" in text
    quiet = build(tmp_path, max_steps=1)
    quiet.train()
    assert "Completion" not in capsys.readouterr().out


def test_evaluation_is_repeatable_and_predicts_completions(tmp_path):
    held_out = Dataset.from_dict({"prompt": PROMPTS[:6]})
    trainer = build(tmp_path, eval_dataset=DatasetDict(a=held_out, b=held_out), eval_strategy="steps", eval_steps=2)
    trainer.train()
    first, second = trainer.evaluate(held_out), trainer.evaluate(held_out)
    for name in (
        "eval_reward",
        "eval_reward_std",
        "eval_kl",
        "eval_entropy",
        "eval_completions/mean_length",
        "eval_loss",
    ):
        assert first[name] == second[name]
    assert any("eval_a_reward" in entry for entry in trainer.state.log_history)
    # Ends the first prompt's completion, and so batches of one at different lengths.
    trainer._end_ids = (2, int(trainer.predict(held_out).predictions[0, 2]))
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.predict(held_out).predictions.min() == 0, "padding, which a tokenizer decodes"
    trainer.args.per_device_eval_batch_size = 4
    trainer._end_ids = (2,)
    prediction = trainer.predict(held_out)
    assert prediction.predictions.shape == (6, 6)
    assert prediction.predictions.max() < VOCAB
    assert prediction.metrics["test_reward"] == first["eval_reward"]
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.evaluate(held_out)["eval_reward"] == pytest.approx(first["eval_reward"], abs=1e-5)


def test_a_classifier_by_name_and_a_policy_by_name(tmp_path):
    tokenizer = word_tokenizer()
    for name, model in (
        ("policy", policy("llama", dtype=torch.float32)),
        ("judge", classifier("bert", dtype=torch.float32)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    trainer = GRADETrainer(
        str(tmp_path / "policy"), str(tmp_path / "judge"),
        config(tmp_path / "out", model_init_kwargs={"attn_implementation": "eager"}, max_steps=2),
        Dataset.from_dict({"prompt": PROMPTS}),
    )  # fmt: skip
    trainer.train()
    assert "rewards/judge/mean" in trainer.state.log_history[0]
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.float32
    trainer.save_model()
    assert (tmp_path / "out" / "model.safetensors").exists()
    half = build(tmp_path / "half", model=str(tmp_path / "policy"), model_init_kwargs={"torch_dtype": "bfloat16"})
    assert half.model.dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    plain = build(tmp_path / "a", model=policy("llama", dtype=torch.float32), max_steps=2)
    plain.train()
    thrifty = build(
        tmp_path / "b", model=policy("llama", dtype=torch.float32), max_steps=2,
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )  # fmt: skip
    thrifty.train()
    first, second = weights(plain), weights(thrifty)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def train_adapter_alone(trainer):
    """Train, and see that the adapter has changed and nothing else has."""
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_lora_trains_the_adapter_alone_and_refers_to_the_model_without_it(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, task_type="CAUSAL_LM")
    trainer = build(tmp_path, peft_config=adapter, max_steps=6, feedback_hops="exact")
    assert trainer.ref_model is None
    train_adapter_alone(trainer)
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] == 0.0
    assert logs[-1]["kl"] > 1e-4
    with pytest.raises(ValueError, match="has an adapter already"):
        build(tmp_path, model=trainer.model, peft_config=adapter)
    bad = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="must leave the LM head"):
        build(tmp_path, peft_config=bad)
    bad = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", alora_invocation_tokens=[3])
    with pytest.raises(ValueError, match="an adapter that tokens invoke"):
        build(tmp_path, peft_config=bad)


def test_adapters_of_transformers_own(tmp_path):
    peft = pytest.importorskip("peft")
    model = policy("llama", dtype=torch.float32)
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    except ValueError as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"transformers: {error}")
        raise
    trainer = build(tmp_path, model=model, max_steps=2)
    train_adapter_alone(trainer)


def test_adapters_of_rewards(tmp_path):
    peft = pytest.importorskip("peft")
    for family, layer in (("bert", "query"), ("llama", "q_proj")):
        adapter = peft.LoraConfig(r=4, target_modules=[layer], task_type="SEQ_CLS", init_lora_weights=False)
        judge = peft.get_peft_model(classifier(family, dtype=torch.float32), adapter).eval()
        trainer = build(tmp_path, reward=judge)
        ids = torch.arange(3, 8)[None]
        reward = trainer.objectives[0].reward
        expected = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(-1)[:, 1]
        torch.testing.assert_close(reward(reward.embedding[ids], torch.ones_like(ids)), expected)


def test_a_compiled_model_trains_as_it_is(tmp_path, caplog):
    plain = build(tmp_path / "plain", max_steps=1)
    plain.train()
    compiled = build(tmp_path / "compiled", max_steps=1, torch_compile=True, torch_compile_backend="eager")
    assert "torch_compile has no effect" in caplog.text
    compiled.train()
    assert same(weights(plain), weights(compiled))


@pytest.mark.skipif(not STRATEGIES, reason="this release of transformers has no train_sampling_strategy")
def test_prompts_may_come_in_their_own_order(tmp_path):
    trainer = build(tmp_path, train_sampling_strategy="sequential", num_generations=2)
    batches = [batch["prompts"] for batch in trainer.get_train_dataloader()]
    assert [prompt for batch in batches for prompt in batch] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_evaluation_in_bfloat16_keeps_its_reference(tmp_path):
    trainer = build(tmp_path, bf16_full_eval=True, eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    assert abs(trainer.evaluate()["eval_kl"]) < 0.1


def test_bfloat16_autocast_rounds_no_sum_of_rewards(tmp_path):
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = build(tmp_path, bf16=True, max_steps=2, reward_weights=[1 / 3], eval_dataset=dataset)
    trainer.train()
    log, held_out = trainer.state.log_history[0], trainer.evaluate()
    assert log["grad_norm"] > 0
    assert log["reward"] == pytest.approx(log["rewards/BagReward/mean"] / 3, rel=1e-5)
    assert log["loss"] == pytest.approx(0.05 * log["kl"] - log["reward"], rel=1e-5)
    assert held_out["eval_reward"] == pytest.approx(held_out["eval_rewards/BagReward/mean"] / 3, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be positive"),
        ({"tau_final": 0.1}, ValueError, "needs a tau_schedule other than constant"),
        ({"tau_schedule": "linear"}, ValueError, "needs tau_final"),
        ({"tau_schedule": "steps"}, ValueError, "tau_schedule must be one of"),
        ({"estimator": "hard"}, ValueError, "estimator must be one of"),
        ({"reward_transform": "odds"}, ValueError, "reward_transform must be one of"),
        ({"eps": 1.0}, ValueError, "eps must lie in"),
        ({"beta": -1.0}, ValueError, "beta must not be negative"),
        ({"feedback_hops": "some"}, ValueError, "feedback_hops must be an int or"),
        ({"feedback_hops": -1}, ValueError, "feedback_hops must be at least 0"),
        ({"num_generations": 3}, ValueError, "must be a multiple of num_generations"),
        ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"max_completion_length": 2.5}, TypeError, "max_completion_length must be an int"),
        ({"num_completions_to_print": 0}, ValueError, "num_completions_to_print must be positive"),
        ({"num_completions_to_print": "all"}, TypeError, "num_completions_to_print must be an int"),
        (
            {"train_sampling_strategy": "group_by_length"} if STRATEGIES else {"group_by_length": True},
            ValueError,
            "must be 'random' or 'sequential', got 'group_by_length'",
        ),
        ({"model_init_kwargs": "dtype=x"}, ValueError, "model_init_kwargs must be JSON, got 'dtype=x'"),
        ({"model_init_kwargs": [1]}, TypeError, "model_init_kwargs must be a dict or None"),
        ({"reward_weights": 1.0}, TypeError, "reward_weights must be a list"),
        ({"reward_weights": [1.0, "2"]}, TypeError, r"reward_weights\[1\] must be a number"),
        ({"reward_weights": [float("nan")]}, ValueError, r"reward_weights\[0\] must be finite"),
        ({f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, ValueError, "must not be reentrant"),
        ({f"{CHECKPOINTING}_kwargs": {"preserve_rng_state": True}}, ValueError, "must not be reentrant"),
        ({"neftune_noise_alpha": 5.0}, ValueError, "neftune_noise_alpha must be None"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor must be 0"),
    ],
)
def test_settings_that_can_not_work_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        config(tmp_path, **changes)


def test_arguments_that_can_not_work_are_refused(tmp_path):
    def text(prompts, completions, **columns):
        return [0.0] * len(prompts)

    class Flat(BagReward):
        def forward(self, inputs_embeds, attention_mask, **columns):
            return super().forward(inputs_embeds.detach(), attention_mask)

    with pytest.raises(ValueError, match="only functions of text"):
        build(tmp_path, reward=text)
    with pytest.raises(ValueError, match="Flat has no gradient"):
        build(tmp_path, reward=Flat(dtype=torch.float32))
    with pytest.raises(ValueError, match="must share the policy's vocabulary"):
        build(tmp_path, reward=BagReward(dtype=torch.float32, vocab=60))
    with pytest.raises(ValueError, match=r"one number per reward \(1\), got 2"):
        build(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"reward_weights\[1\] must be 0"):
        build(tmp_path, reward=[BagReward(dtype=torch.float32), text], reward_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="max_completion_length = 64 leaves no room for a prompt in the model's 64"):
        build(tmp_path, max_completion_length=64)
    with pytest.raises(ValueError, match="column 'prompt'"):
        build(tmp_path, dataset=Dataset.from_dict({"text": PROMPTS}))
    with pytest.raises(ValueError, match="model_init_kwargs is for a model that is given by name"):
        build(tmp_path, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="needs a reward that is a probability"):
        build(
            tmp_path, reward=SequenceClassificationReward(classifier("bert", dtype=torch.float32), output="raw"),
            reward_transform="logit",
        )  # fmt: skip
    with pytest.raises(ValueError, match="model 'nobody/nothing' was not found as a directory here or"):
        build(tmp_path, model="nobody/nothing")
    with pytest.raises(TypeError, match="args must be a GRADEConfig"):
        GRADETrainer(policy("gpt2"), BagReward(), tf.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="encoder-decoder"):
        build(
            tmp_path,
            model=tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1)
            ),
        )
    with pytest.raises(ValueError, match="processing_class must be the policy's tokenizer"):
        GRADETrainer(policy("gpt2", dtype=torch.float32), BagReward(dtype=torch.float32), config(tmp_path))
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient, but all are frozen"):
        build(tmp_path, model=policy("gpt2", dtype=torch.float32).requires_grad_(False))
    model, judge = policy("gpt2", dtype=torch.float32), classifier("gpt2", dtype=torch.float32)
    judge.transformer.h[0] = model.transformer.h[0]
    with pytest.raises(
        ValueError, match=r"reward_funcs\[0\] shares 12 parameters with model, such as 'transformer\.h\.0"
    ):
        build(tmp_path, model=model, reward=judge)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TypeError, match="train_dataset must be a data set with a column 'prompt', got str"):
        build(tmp_path, dataset="prompts.csv")
    with pytest.raises(TypeError, match="peft_config must be a PeftConfig, got dict"):
        build(tmp_path, peft_config={"r": 4})
    with pytest.raises(TypeError, match="processing_class must be a tokenizer or a processor that has one, got str"):
        GRADETrainer(policy("gpt2"), BagReward(), config(tmp_path), processing_class="gpt2")
    with pytest.raises(ValueError, match=r"reward_funcs\[0\] as .*: model must be a sequence classifier, got GPT2"):
        build(tmp_path, reward=policy("gpt2", seed=1))
    with pytest.raises(ValueError, match=r"reward_funcs\[0\] as .*: label must be chosen among the model's 3 labels"):
        build(tmp_path, reward=classifier("bert", labels=3))
    with pytest.raises(ValueError, match="train_dataset must hold at least one prompt, got none"):
        build(tmp_path, dataset=Dataset.from_dict({"prompt": []}))
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"FalconForCausalLM\) computes something else in training than"):
        build(tmp_path, model=tf.FalconForCausalLM(tf.FalconConfig(**sizes, hidden_dropout=0.5)))
    other = copy.deepcopy(word_tokenizer())
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"1 of 61 tokens .* such as \['new'\]"):
        build(tmp_path, reward_processing_classes=other)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"pad_token": "[NEW]"}, r"pad_token_id must lie in \[0, 61\), got 61"),
        ({"eos_token": "[NEW]"}, r"eos_token_id must lie in \[0, 61\), got 61"),
        ({"additional_special_tokens": ["w9"]}, None),
        (
            {"additional_special_tokens": ["new"]},
            r"input_ids must lie in \[0, 61\), got values in \[1, 61\]; .* 'w9 new'",
        ),
    ],
)
def test_tokens_that_the_model_does_not_have_are_named(tmp_path, added, message):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens(added)
    arguments = (
        policy("gpt2", dtype=torch.float32), BagReward(dtype=torch.float32), config(tmp_path),
        Dataset.from_dict({"prompt": ["w9 new", "w4"]}),
    )  # fmt: skip
    if message is None:
        GRADETrainer(*arguments, processing_class=tokenizer)
        return
    with pytest.raises(ValueError, match=message):
        GRADETrainer(*arguments, processing_class=tokenizer)


@pytest.mark.parametrize(("scores", "got"), [([0.0], "1"), (0.0, "float")])
def test_text_functions_return_a_number_per_completion(tmp_path, scores, got):
    def short(prompts, completions, **columns):
        return scores

    with pytest.raises(ValueError, match=rf"short must return one number per completion \(4\), got {got}"):
        build(tmp_path, reward=[BagReward(dtype=torch.float32), short]).train()


def test_columns_that_some_examples_lack_are_none_there(tmp_path):
    trainer = build(tmp_path, dataset=[{"prompt": "w3", "a": 1}, {"prompt": "w4", "b": 2}])
    assert trainer._collator(trainer.train_dataset)["columns"] == {"a": [1, None], "b": [None, 2]}


def test_a_reward_is_a_constant_and_may_write_to_what_it_reads(tmp_path):
    class Noisy(BagReward):
        def forward(self, inputs_embeds, attention_mask, **columns):
            scaled = inputs_embeds.mul_(2.0)
            return super().forward(torch.nn.functional.dropout(scaled, training=self.training), attention_mask)

    held_out = Dataset.from_dict({"prompt": PROMPTS})
    trainer = build(tmp_path, reward=Noisy(dtype=torch.float32), eval_dataset=held_out, max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_reward"] == trainer.evaluate()["eval_reward"]


def test_a_reward_on_another_device_is_named(tmp_path):
    reward = BagReward(dtype=torch.float32)
    reward.embedding = reward.embedding.to("meta")
    with pytest.raises(ValueError, match=r"BagReward has its embedding table on device 'meta', .* on 'cpu'"):
        build(tmp_path, reward=reward)


def test_a_reward_with_too_few_positions_is_named(tmp_path):
    class Learned(BagReward):
        def forward(self, inputs_embeds, attention_mask, **columns):
            torch.nn.functional.embedding(torch.arange(inputs_embeds.shape[1]), torch.zeros(8, 2))
            return super().forward(inputs_embeds, attention_mask)

    with pytest.raises(ValueError, match="Learned fails on prompts with completions, 12 tokens"):
        build(tmp_path, reward=Learned(dtype=torch.float32), max_completion_length=8)


def test_a_reward_that_is_always_nan_names_its_prompts(tmp_path):
    class Broken(BagReward):
        def forward(self, inputs_embeds, attention_mask, **columns):
            return super().forward(inputs_embeds, attention_mask) * torch.nan

    trainer = build(tmp_path, reward=Broken(dtype=torch.float32), eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    with pytest.raises(NonFiniteRewardError, match=r"at step 1.*prompts: \['w\d+"):
        trainer.train()
    with pytest.raises(NonFiniteRewardError, match=r"in evaluation; prompts: \['w\d+"):
        trainer.evaluate()


def test_a_nan_reward_names_its_prompts_and_stops_before_the_optimizer(tmp_path):
    class Breaking(BagReward):
        calls = 0

        def forward(self, inputs_embeds, attention_mask, **columns):
            Breaking.calls += 1
            value = super().forward(inputs_embeds, attention_mask)
            return torch.where(torch.arange(len(value)) == 2, torch.nan, value) if Breaking.calls == 4 else value

    trainer = build(tmp_path, reward=Breaking(dtype=torch.float32))
    states = []

    class Watch(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(weights(trainer))

    trainer.add_callback(Watch())
    with pytest.raises(NonFiniteRewardError, match=r"row\(s\) \[2\].*step 3.*prompts: \['w\d+") as error:
        trainer.train()
    assert error.value.rows == [2]
    assert len(states) == 2
    assert same(states[-1], weights(trainer))


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path):
    class Steep(BagReward):
        calls = 0

        def forward(self, inputs_embeds, attention_mask, **columns):
            Steep.calls += 1
            value = super().forward(inputs_embeds, attention_mask)
            # The root of zero: its value is fine, its derivative is not.
            return value + (value - value.detach()).clamp_min(0).sqrt() if Steep.calls == 4 else value

    trainer = build(tmp_path, reward=Steep(dtype=torch.float32))
    states = []

    class Watch(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(weights(trainer))

    trainer.add_callback(Watch())
    with pytest.raises(NonFiniteGradientError, match="step 3"):
        trainer.train()
    assert len(states) == 2
    assert same(states[-1], weights(trainer))


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Eight steps over several epochs, saved at every second one."""
    path = tmp_path_factory.mktemp("run")
    trainer = build(path, max_steps=8, save_strategy="steps", save_steps=2)
    trainer.train()
    return (
        path,
        weights(trainer),
        [e["reward"] for e in trainer.state.log_history if "reward" in e],
        trainer.state.num_input_tokens_seen,
    )


class Stop(tf.TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def crash():
    raise RuntimeError("power cut")


def resumed(path, **changes):
    trainer = build(path, max_steps=8, save_strategy="steps", save_steps=2, **changes)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_crashed_run_goes_on_bitwise(uninterrupted, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        build(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, callbacks=[Stop(5, crash)]).train()
    trainer = resumed(tmp_path)
    assert same(weights(trainer), uninterrupted[1])
    assert [e["reward"] for e in trainer.state.log_history if "reward" in e] == uninterrupted[2]
    assert trainer.state.num_input_tokens_seen == uninterrupted[3]
    again = resumed(tmp_path)  # at the end, where nothing is left to do
    assert again.state.global_step == 8
    assert same(weights(again), uninterrupted[1])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_goes_on_bitwise(uninterrupted, tmp_path, signum):
    before = signal.getsignal(signum)
    stop = Stop(4, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(TrainingInterrupted) as error:
        build(tmp_path, max_steps=8, save_strategy="steps", save_steps=100, callbacks=[stop]).train()
    assert (error.value.step, error.value.signum, error.value.code) == (5, signum, 128 + signum)
    assert signal.getsignal(signum) == before
    assert [p.name for p in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert same(weights(resumed(tmp_path)), uninterrupted[1])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    stop = Stop(1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, callbacks=[stop]).train()
    assert signal.getsignal(signal.SIGINT) == before
    assert not checkpoints.complete_checkpoints(tmp_path)


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.pt", "trainer_state.json", checkpoints.SEAL])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(uninterrupted, tmp_path, victim, caplog):
    with pytest.raises(RuntimeError, match="power cut"):
        build(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, callbacks=[Stop(5, crash)]).train()
    path = tmp_path / "checkpoint-4" / victim
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"checkpoint-4 can not be resumed from: {victim}"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with caplog.at_level(logging.WARNING):
        trainer = resumed(tmp_path)
    assert any("checkpoint-4" in r.getMessage() and victim in r.getMessage() for r in caplog.records)
    assert same(weights(trainer), uninterrupted[1])


def test_a_disk_that_fills_up_loses_no_checkpoint(uninterrupted, tmp_path, monkeypatch):
    trainer = build(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=1)
    write = torch.save

    def full(state, target, *args, **kwargs):
        if trainer.state.global_step >= 4:
            Path(str(target)).write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        return write(state, target, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert [p.name for p in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert checkpoints.damage(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / ".incomplete").exists()
    assert same(weights(resumed(tmp_path)), uninterrupted[1])


def test_only_so_many_checkpoints_are_kept_and_never_without_the_best(tmp_path):
    trainer = build(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_reward", greater_is_better=False, load_best_model_at_end=True,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
    )  # fmt: skip
    (tmp_path / "checkpoint-9").mkdir()  # of an earlier run
    os.utime(tmp_path / "checkpoint-9", (0, 0))
    trainer.train()
    names = {path.name for path in checkpoints.complete_checkpoints(tmp_path)}
    assert len(names) <= 2
    assert "checkpoint-6" in names
    assert Path(trainer.state.best_model_checkpoint).name in names
    state = json.loads((Path(trainer.state.best_model_checkpoint) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint


_KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import torch
from tests.support.trainers import build
trainer = build({path!r}, max_steps=8, save_strategy="steps", save_steps=2)
write = torch.save
def die(state, target, *args, **kwargs):
    if trainer.state.global_step >= 4 and "optimizer" in str(target):
        open(target, "wb").write(b"half of")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(state, target, *args, **kwargs)
torch.save = die
trainer.train()
"""


def test_sigkill_during_a_checkpoint_write_goes_on_bitwise(uninterrupted, tmp_path):
    script = _KILLED.format(root=str(ROOT), path=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    # The same number of threads, for the same order of sums.
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [p.name for p in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / ".incomplete").exists()
    trainer = resumed(tmp_path)
    assert same(weights(trainer), uninterrupted[1])
    assert not (tmp_path / ".incomplete").exists()


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere can not be resumed from: there is no such directory"):
        build(tmp_path).train(resume_from_checkpoint="nowhere")
    with pytest.raises(ValueError, match=r"No sound checkpoint .* none at all"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_uploaded_only_when_it_stays(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append((folder, checkpoints.damage(Path(folder)), [path.name for path in tmp_path.glob(".*")]))

    monkeypatch.setattr(tf.Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(tf.Trainer, "init_hf_repo", lambda self, token=None: None)
    trainer = build(tmp_path, save_strategy="steps", save_steps=2, push_to_hub=True)
    trainer.push_in_progress = None
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None, []) for step in (2, 4)]


def test_a_model_card_says_what_was_done(uninterrupted):
    card = (uninterrupted[0] / "README.md").read_text()
    for words in ("grade-kernels", "| tau | 0.5 |", "| feedback_hops | 2 |", "`BagReward`", "arxiv.org/abs/2601.11574"):
        assert words in card
    assert "base_model" not in card


def test_a_model_card_leaves_out_a_directory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = build(tmp_path / "out")
    for name, named in (("models/mine", False), ("someone/theirs", True)):
        trainer.model.config._name_or_path = name
        (tmp_path / "models" / "mine").mkdir(parents=True, exist_ok=True)
        trainer.create_model_card()
        assert (f"base_model: {name}" in (tmp_path / "out" / "README.md").read_text()) == named
