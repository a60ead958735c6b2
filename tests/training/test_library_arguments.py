"""Arguments of transformers' and TRL's trainers: those that work as theirs do, and those that are refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers as tf
from datasets import Dataset

from grade_kernels.training import GRADEConfig, GRADETrainer, foreign_names
from tests.support.trainers import PROMPTS, build, config, same, weights
from tests.support.training_models import VOCAB, BagReward, policy, word_tokenizer

HELD_OUT = Dataset.from_dict({"prompt": PROMPTS[:6]})


def tiny(seed=0):
    return policy("gpt2", seed=seed, dtype=torch.float32)


def from_init(path, model_init, **changes):
    own = {name: changes.pop(name) for name in ("optimizers", "peft_config", "eval_dataset") if name in changes}
    return GRADETrainer(
        reward_funcs=BagReward(dtype=torch.float32), args=config(path, **changes), model_init=model_init,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=word_tokenizer(), **own,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- compute_metrics


def test_metrics_are_computed_of_completions_and_their_prompts(tmp_path):
    seen = []

    def metrics(prediction):
        predictions, labels = prediction
        seen.append((predictions, labels))
        return {"distinct": len(np.unique(predictions))}

    trainer = build(
        tmp_path, eval_dataset=HELD_OUT, compute_metrics=metrics, eval_strategy="steps", eval_steps=4, save_steps=4,
        metric_for_best_model="distinct", load_best_model_at_end=True, save_strategy="steps",
    )  # fmt: skip
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "eval_distinct" in entry)
    predictions, labels = seen[-1]
    assert log["eval_distinct"] == len(np.unique(predictions)) == trainer.state.best_metric
    assert "eval_reward" in log
    assert predictions.shape == (6, 6)
    tokenizer = word_tokenizer()
    assert (labels == -100).any()
    assert labels[labels != -100].min() > 0, "no padding"
    decoded = [tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in labels]
    assert decoded == PROMPTS[:6]
    answer = trainer.predict(HELD_OUT)
    assert np.array_equal(answer.predictions, predictions)
    assert np.array_equal(answer.label_ids, labels)
    assert answer.metrics["test_distinct"] == log["eval_distinct"]


def test_metrics_by_batch_and_with_what_else_is_asked_for(tmp_path):
    sizes = []

    def by_batch(prediction, compute_result):
        sizes.append((len(prediction.predictions), len(prediction.inputs["input_ids"]), len(prediction.losses)))
        return {"rows": sum(size for size, *_ in sizes)} if compute_result else {}

    trainer = build(
        tmp_path, eval_dataset=HELD_OUT, compute_metrics=by_batch, batch_eval_metrics=True,
        include_for_metrics=["inputs", "loss"],
    )  # fmt: skip
    assert trainer.evaluate()["eval_rows"] == 6
    assert [size[0] for size in sizes] == [4, 2]

    def with_inputs(prediction):
        assert np.array_equal(np.where(prediction.label_ids == -100, 0, prediction.label_ids), prediction.inputs)
        return {"mean_loss": prediction.losses.mean()}

    options = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 6}
    trainer = build(tmp_path, eval_dataset=HELD_OUT, compute_metrics=with_inputs, **options)
    found = trainer.evaluate()
    assert found["eval_mean_loss"] == pytest.approx(found["eval_loss"])


def test_metrics_do_not_take_the_trainers_names(tmp_path):
    trainer = build(tmp_path, eval_dataset=HELD_OUT, compute_metrics=lambda prediction: {"reward": 1.0})
    with pytest.raises(ValueError, match=r"must not return metrics that the trainer has itself, got \['eval_reward'\]"):
        trainer.evaluate()


async def later(prediction):
    return {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_metrics": 3}, "compute_metrics must be a function of an EvalPrediction, got 3"),
        ({"compute_metrics": lambda: {}}, "compute_metrics must be a function of one EvalPrediction, but"),
        ({"compute_metrics": later}, "compute_metrics must be a plain function"),
        ({"optimizer_cls_and_kwargs": torch.optim.SGD}, "optimizer_cls_and_kwargs must be a pair"),
        (
            {"optimizer_cls_and_kwargs": ("sgd", {})},
            "optimizer_cls_and_kwargs must be a pair .* got 'sgd' as the class",
        ),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, [("lr", 0.1)])},
            "optimizer_cls_and_kwargs must be .* keywords",
        ),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"rate": 1})}, "optimizer_cls_and_kwargs: SGD .* 'rate'"),
        ({"optimizers": torch.optim.SGD}, "optimizers must be a pair"),
        ({"optimizers": (torch.optim.SGD, None)}, "optimizers must hold the optimizer itself"),
        ({"callbacks": tf.TrainerCallback()}, "callbacks must be a list"),
        ({"callbacks": [print]}, r"callbacks\[0\] must be a TrainerCallback"),
    ],
)
def test_what_the_library_would_find_late_is_named_at_construction(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        build(tmp_path, eval_dataset=HELD_OUT, **options)


@pytest.mark.parametrize("returned", [None, 3.0, [("a", 1)]])
def test_what_is_no_metrics_is_named_when_it_comes(tmp_path, returned):
    trainer = build(tmp_path, eval_dataset=HELD_OUT, compute_metrics=lambda prediction: returned)
    with pytest.raises(TypeError, match="compute_metrics must return a dict of metrics by name, got"):
        trainer.evaluate()


# ------------------------------------------------------------------------------------------------------ model_init


def test_a_model_is_built_anew_for_every_training(tmp_path):
    built = []

    def model_init():
        built.append(torch.initial_seed())
        return tiny()

    trainer = from_init(tmp_path / "a", model_init)
    assert len(built) == 1
    first_model = trainer.model
    trainer.train()
    first = weights(trainer)
    assert len(built) == 2
    assert trainer.model is not first_model
    trainer.train()
    assert same(first, weights(trainer))
    assert built == [trainer.args.seed] * 3, "the seed is set before"
    plain = build(tmp_path / "b", model=tiny())
    plain.train()
    assert same(first, weights(plain))
    assert plain.state.log_history[0]["kl"] == 0.0 == trainer.state.log_history[0]["kl"], "its own reference each time"


def test_each_model_that_is_built_is_its_own_reference(tmp_path):
    seeds = iter(range(9))
    trainer = from_init(tmp_path, lambda: tiny(next(seeds)), max_steps=1)
    for _ in range(2):
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0.0


def test_a_model_that_is_built_gets_dropout_off_and_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")

    def model_init():
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64))

    trainer = from_init(tmp_path, model_init, peft_config=peft.LoraConfig(r=2, target_modules=["c_attn"]))
    for _ in range(2):
        assert all(m.p == 0 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
        assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0.0


def test_a_search_starts_every_trial_from_a_new_model(tmp_path, monkeypatch):
    from transformers import hyperparameter_search as search

    values = [{"learning_rate": 1e-3, "beta": 0.5}, {"learning_rate": 1e-2, "beta": 0.0}, {"tau": -1.0}]
    trials = [SimpleNamespace(number=i, params=params) for i, params in enumerate(values)]
    made, kept = [], []

    class Backend(search.HyperParamSearchBackendBase):
        """Runs given trials, as a package for searching does."""

        name = "optuna"

        @staticmethod
        def is_available():
            return True

        def run(self, trainer, n_trials, direction, **keywords):
            results = []
            for trial in trials[:n_trials]:
                trainer.train(trial=trial)
                kept.append([entry["kl"] for entry in trainer.state.log_history if "kl" in entry])
                results.append((trainer.compute_objective(trainer.evaluate()), trial))
            return max(results, key=lambda result: result[0])

    backend = tf.trainer_utils.HPSearchBackend.OPTUNA
    monkeypatch.setitem(search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, backend, Backend)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def model_init(trial):
        made.append(trial)
        return tiny()

    trainer = from_init(
        tmp_path, model_init, beta=0.0, eval_dataset=HELD_OUT, max_steps=2, save_strategy="steps", save_steps=2
    )
    assert trainer.reference is None
    options = {"backend": "optuna", "hp_space": lambda trial: trial.params, "direction": "maximize"}
    best = trainer.hyperparameter_search(n_trials=2, compute_objective=lambda m: m["eval_reward"], **options)
    assert best[1] in trials
    assert made == [None, *trials[:2]]
    assert kept[0][0] == 0.0 < kept[0][1], "the trial's beta needs a reference"
    assert kept[1] == []
    assert (tmp_path / "run-0" / "checkpoint-2" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"tau must be positive and finite, got -1"):
        trainer.hyperparameter_search(n_trials=3, compute_objective=lambda m: 0.0, **options)


def test_a_model_comes_from_one_place(tmp_path):
    with pytest.raises(ValueError, match="give model or model_init, not both"):
        build(tmp_path, model_init=tiny)
    with pytest.raises(ValueError, match="model must be given, or model_init"):
        from_init(tmp_path, None)
    with pytest.raises(RuntimeError, match="optimizers must be"):
        from_init(tmp_path, tiny, optimizers=(torch.optim.SGD(tiny().parameters(), 0.1), None))
    with pytest.raises(RuntimeError, match="0 or 1 argument"):
        from_init(tmp_path, lambda trial, more: tiny())
    with pytest.raises(TypeError, match="model must be a name or a causal language model, got dict"):
        from_init(tmp_path, lambda: {})
    with pytest.raises(ValueError, match="reward_funcs must be given"):
        GRADETrainer(tiny(), args=config(tmp_path))


# ---------------------------------------------------------------------------------------- the optimizer, quantisation


def test_an_optimizer_by_class_and_keywords(tmp_path):
    trainer = build(tmp_path / "a", optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.0}))
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.SGD)
    same_run = build(tmp_path / "b", optim="sgd", learning_rate=0.5)
    same_run.train()
    assert same(weights(trainer), weights(same_run))
    model = tiny()
    with pytest.raises(RuntimeError, match="optimizer"):
        build(
            tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None),
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
        )  # fmt: skip


def test_quantisation_and_code_from_repositories_are_for_names(tmp_path, monkeypatch):
    given = {}

    def from_pretrained(name, **keywords):
        given.update(keywords)
        return tiny()

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    quantization = object()
    arguments = {"model": "some/model", "quantization_config": quantization}
    build_with(tmp_path, trust_remote_code=True, **arguments)
    assert given["quantization_config"] is quantization
    assert given["trust_remote_code"] is True
    assert given["dtype"] == torch.float32
    with pytest.raises(ValueError, match="quantization_config must be given once"):
        build_with(tmp_path, model_init_kwargs={"quantization_config": 1}, **arguments)
    with pytest.raises(ValueError, match="quantization_config is for a model that is given by name, got a GPT2"):
        build_with(tmp_path, model=tiny(), quantization_config=quantization)


def build_with(path, model, quantization_config, **changes):
    return GRADETrainer(
        model, BagReward(dtype=torch.float32), config(path, **changes), Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=word_tokenizer(), quantization_config=quantization_config,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", list(foreign_names.ARGUMENTS))
def test_arguments_of_other_trainers_are_refused_with_the_reason(tmp_path, name):
    reason = foreign_names.ARGUMENTS[name].reason
    with pytest.raises(ValueError, match=re.escape(f"GRADETrainer has no {name}: {reason}")):
        GRADETrainer(tiny(), BagReward(dtype=torch.float32), config(tmp_path), **{name: lambda *values: None})
    with pytest.raises(ValueError, match="processing_class must be the policy's tokenizer"):  # None asks for nothing
        GRADETrainer(tiny(), BagReward(dtype=torch.float32), config(tmp_path), **{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, "x") for name in foreign_names.SETTINGS), ("vllm_mode", "colocate"), ("sapo_temperature_pos", 1.0)],
)
def test_settings_of_other_trainers_are_refused_with_the_reason(tmp_path, name, value):
    reason = foreign_names.reason_for_setting(name)
    with pytest.raises(ValueError, match=re.escape(f"GRADEConfig has no {name}: {reason}")):
        config(tmp_path, **{name: value})
    assert name not in {field.name for field in dataclasses.fields(GRADEConfig)}


def test_settings_that_ask_for_nothing_are_taken(tmp_path):
    neutral = {name: foreign.harmless[-1] for name, foreign in foreign_names.SETTINGS.items()}
    settings = config(tmp_path, log_multimodal=False, **neutral)
    assert not any(hasattr(settings, name) for name in neutral)
    for call in (lambda: config(tmp_path, colour="red"), lambda: GRADETrainer(tiny(), BagReward(), colour="red")):
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            call()


def test_the_table_for_those_who_come_from_trl_names_everything():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = text[text.index("## Coming from `GRPOTrainer`") :]
    table = table[: table.index("\n## ", 3)]
    for name in [*foreign_names.ARGUMENTS, *foreign_names.SETTINGS, *foreign_names.PREFIXES]:
        assert f"`{name}`" in table or f"`{name}*`" in table, name
