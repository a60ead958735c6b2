"""Completions of a trainer that a rollout function draws: what it is asked, what of its answer is refused, what is logged."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset

from grade_kernels import GumbelNoise
from grade_kernels.training import GRADETrainer
from grade_kernels.training.records import Prompts
from grade_kernels.training.rollout import rollout
from tests.support.trainers import PROMPTS, build, same, weights
from tests.support.training_models import VOCAB, BagReward, policy, word_tokenizer

HELD_OUT = Dataset.from_dict({"prompt": PROMPTS[:6]})


class Engine:
    """Draws from the policy itself, with noise of its own, and remembers what it was asked.

    Args:
        changes: what it answers in the place of its own; functions get the answer so far.
    """

    def __init__(self, **changes):
        self.changes, self.requests, self.prompts = changes, [], []

    def __call__(self, prompts, trainer):
        request = trainer.rollout_request
        self.requests.append(request)
        self.prompts.append(prompts)
        aligner = trainer._aligner_of(trainer.model)
        batch = Prompts.of(request.prompt_ids, request.pad_token_id)
        noise = GumbelNoise(5, torch.tensor(request.seeds))
        out = rollout(aligner.policy, batch, aligner.ending, noise)
        lengths = out.mask.sum(1).tolist()
        ids = [row[:length] for row, length in zip(out.ids.tolist(), lengths, strict=True)]
        answer = {"prompt_ids": request.prompt_ids, "completion_ids": ids, "logprobs": self.logprobs(request, ids)}
        for key, value in self.changes.items():
            answer[key] = value(answer) if callable(value) else value
        return {key: value for key, value in answer.items() if value != "nothing"}

    def logprobs(self, request, ids):
        told = []
        for prompt, row in zip(request.prompt_ids, ids, strict=True):
            with torch.no_grad():
                logits = request.model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].double()
            told.append((logits / request.temperature).log_softmax(-1)[range(len(row)), row].tolist())
        return told


def train(path, engine, **changes):
    trainer = build(path, rollout_func=engine, **({"max_steps": 2} | changes))
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------------ what is asked


def test_an_engine_draws_in_training_and_in_evaluation(tmp_path):
    """By TRL's signature; an engine that is the policy itself has a mismatch of rounding, and weights of 1."""
    engine = Engine()
    trainer = train(
        tmp_path, engine, num_generations=2, max_steps=3, eval_dataset=HELD_OUT, eval_strategy="steps", eval_steps=3
    )
    training = [request for request in engine.requests if request.training]
    assert [request.step for request in training] == [0, 1, 2]
    assert len(engine.requests) == 3 + 2, "two batches of evaluation"
    for request, prompts in zip(engine.requests, engine.prompts, strict=True):
        tokenizer = word_tokenizer()
        assert request.prompt_ids == [tokenizer(prompt).input_ids for prompt in prompts]
        assert all(0 <= seed < 2**31 for seed in request.seeds)
        assert (request.max_completion_length, request.eos_token_id, request.temperature) == (6, (2,), 1.0)
    assert all(request.prompt_ids[::2] == request.prompt_ids[1::2] for request in training), "num_generations"
    assert len({seed for request in training for seed in request.seeds}) == 12
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    for entry in log:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1.0, abs=1e-4)
        assert 0 <= entry["sampling/kl"] < 1e-8
    assert any("eval_reward" in entry for entry in trainer.state.log_history)
    with pytest.raises(RuntimeError, match="rollout_request is there only while"):
        _ = trainer.rollout_request


@pytest.mark.parametrize("estimator", ["ste", "st", "reinmax"])
def test_the_reward_rises(tmp_path, estimator):
    trainer = train(tmp_path, Engine(), estimator=estimator, max_steps=15, beta=0.0, learning_rate=5e-2)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.25


def test_the_trainers_own_tokens_given_back_train_alike(tmp_path):
    """With `st`, bit for bit; the engine draws with the very noise of the trainer's own rollout."""

    def echo(prompts, trainer):
        request = trainer.rollout_request
        noise = trainer._training_plan.of(-2, 0, 0)  # ends the trainer's count of this step's batches
        aligner = trainer._aligner_of(trainer.model)
        noise = type(trainer._training_plan)(trainer.args.seed, 4, 1).of(request.step, 0, 4)
        out = rollout(aligner.policy, Prompts.of(request.prompt_ids, 0), aligner.ending, noise)
        return {"prompt_ids": request.prompt_ids, "completion_ids": out.ids, "logprobs": None}

    options = {"estimator": "st", "max_steps": 3}
    own = build(tmp_path / "own", **options)
    own.train()
    given = train(tmp_path / "given", echo, vllm_importance_sampling_correction=False, **options)
    assert same(weights(own), weights(given))
    assert not any("sampling/kl" in entry for entry in own.state.log_history + given.state.log_history)


def test_a_resumed_run_asks_for_the_same(tmp_path):
    whole, first, second = Engine(), Engine(), Engine()
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "gradient_accumulation_steps": 2}
    truth = train(tmp_path / "whole", whole, **options)
    train(tmp_path / "parts", first, **(options | {"max_steps": 2}))
    resumed = build(tmp_path / "parts", rollout_func=second, **options)
    resumed.train(resume_from_checkpoint=True)
    asked = [(r.step, r.prompt_ids, r.seeds) for r in whole.requests]
    assert [(r.step, r.prompt_ids, r.seeds) for r in first.requests + second.requests] == asked
    assert len(asked) == 6, "an epoch has a batch and a half"
    assert same(weights(truth), weights(resumed))


def test_fields_of_an_engine_reach_the_rewards(tmp_path):
    seen = []

    def length(prompts, completions, source, version, place, **columns):
        seen.append((source, version, place))
        return [float(len(text)) for text in completions]

    engine = Engine(
        source=lambda answer: [f"of {row[0]}" for row in answer["completion_ids"]], version=7, place=torch.arange(4)
    )
    train(tmp_path, engine, reward=[BagReward(dtype=torch.float32), length], max_steps=1)
    ((source, version, place),) = seen
    assert place == [0, 1, 2, 3], "a tensor has a value for each completion, too"
    assert len(source) == 4
    assert source[0].startswith("of ")
    assert version == [7] * 4


def test_a_temperature_of_the_engine_is_corrected(tmp_path):
    """It is told by the setting; the ratios are of the policy at temperature 1 to the engine at its own."""
    engine = Engine(temperature=2.0)
    options = {"temperature": 2.0, "vllm_importance_sampling_mode": "token_truncate", "max_steps": 1}
    trainer = train(tmp_path, engine, **options)
    entry = trainer.state.log_history[0]
    assert entry["sampling/kl"] > 0.01
    assert entry["sampling/importance_sampling_ratio/max"] <= 3.0
    with pytest.raises(ValueError, match=r"drew at temperature 2.0, but GRADEConfig\(temperature=1.0\) was asked for"):
        train(tmp_path, Engine(temperature=2.0))
    with pytest.raises(ValueError, match=r"temperature = 2.0 needs vllm_importance_sampling_correction"):
        train(tmp_path, engine, temperature=2.0, vllm_importance_sampling_correction=False)
    with pytest.raises(ValueError, match=r"temperature must be 1 without rollout_func, got 2.0"):
        build(tmp_path, temperature=2.0)


def test_several_log_probabilities_of_a_place(tmp_path):
    """As TRL's client returns them, with the tokens that they are of."""
    nested = Engine(logprobs=lambda answer: [[[value] for value in row] for row in answer["logprobs"]])
    several = Engine(
        logprob_token_ids=lambda answer: [
            [[(token + 1) % VOCAB, token] for token in row] for row in answer["completion_ids"]
        ],
        logprobs=lambda answer: [[[-99.0, value] for value in row] for row in answer["logprobs"]],
    )
    plain, first, second = (train(tmp_path, engine, max_steps=1) for engine in (Engine(), nested, several))
    assert same(weights(plain), weights(first))
    assert same(weights(plain), weights(second))


# ---------------------------------------------------------------------------------------------------- what is refused


def longer(answer):
    return [*answer["completion_ids"][:3], [3] * 7]


def other_prompt(answer):
    return [*answer["prompt_ids"][:2], [1, 3, 4, 5], answer["prompt_ids"][3]]


def with_value(value, place=1, key="logprobs"):
    def changed(answer):
        rows = [list(row) for row in answer[key]]
        rows[place][0] = value
        return rows

    return changed


def with_token(token, place=2):
    return with_value(token, place, "completion_ids")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A trainer that takes no step, which therefore can be asked again and again."""
    return build(tmp_path_factory.mktemp("refusing"), rollout_func=Engine(), beta=0.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs": "nothing"}, ValueError, "must return prompt_ids, completion_ids, logprobs, but logprobs is missing"),
        ({"logprobs": None}, ValueError, r"must return logprobs, got None \(vllm_importance_sampling_correction = False"),
        ({"prompt_ids": lambda a: a["prompt_ids"][:3]}, ValueError, "one completion for each of 4 prompts, got 3"),
        ({"completion_ids": lambda a: a["completion_ids"][:3], "logprobs": lambda a: a["logprobs"][:3]}, ValueError,
         r"completion_ids of rollout_func must be one per prompt \(4\), got 3"),
        ({"prompt_ids": other_prompt}, ValueError, r"prompt_ids\[2\] of rollout_func must be the prompt that was asked for"),
        ({"completion_ids": longer}, ValueError, r"completion_ids of rollout_func\[3\] must have at most 6 tokens, got 7"),
        ({"completion_ids": with_token(VOCAB)}, ValueError, r"must lie in \[0, 61\), got 61 at \[2\]\[0\]"),
        ({"completion_ids": with_token(-1)}, ValueError, r"must lie in \[0, 61\), got -1 at \[2\]\[0\]"),
        ({"completion_ids": lambda a: [row[:2] if row[-1] != 2 else row for row in a["completion_ids"]]}, ValueError,
         r"must have 6 tokens or an end of sequence \(2\) as the last, got 2|number for each"),
        ({"logprobs": with_value(math.nan)}, ValueError, r"must be finite and not positive, got nan at \[1\]\[0\]"),
        ({"logprobs": with_value(0.5)}, ValueError, r"must be finite and not positive, got 0.5 at \[1\]\[0\]"),
        ({"logprobs": with_value(None)}, TypeError, r"must be numbers, got None at \[1\]\[0\]"),
        ({"logprobs": lambda a: [row[:-1] for row in a["logprobs"]]}, ValueError, "must have a number for each of"),
        ({"logprobs": lambda a: [[[-1.0, -2.0] for _ in row] for row in a["logprobs"]]}, ValueError,
         r"logprobs\[0\]\[0\] of rollout_func has 2 numbers: logprob_token_ids must say of which"),
        ({"logprobs": [-1.0] * 4}, TypeError, r"logprobs\[0\] of rollout_func must be a list of numbers, got float"),
        ({"prompt_ids": [1, 2, 3, 4]}, TypeError, r"prompt_ids\[0\] of rollout_func must be a list of token ids, got int"),
        ({"env_mask": [1] * 4}, TypeError, r"env_mask\[0\] of rollout_func must be a list of 0 and 1, got int"),
        ({"logprobs": lambda a: [[[-1.0, -2.0] for _ in row] for row in a["logprobs"]], "logprob_token_ids": [[1]] * 4},
         ValueError, r"logprob_token_ids of rollout_func must have tokens at \[0\]\[0\]"),
        ({"temperature": torch.tensor([1.0, 1.0, 2.0, 1.0])}, ValueError, "drew at temperature .*2.0"),
        ({"top_p": 0.9}, ValueError, "drew with top_p = 0.9, which must be 1.0: what it cuts off or favours"),
        ({"top_k": [0, 0, 20, 0]}, ValueError, "drew with top_k = 20, which must be -1"),
        ({"min_p": 0.1}, ValueError, "drew with min_p = 0.1"),
        ({"repetition_penalty": 1.1}, ValueError, "drew with repetition_penalty = 1.1"),
        ({"env_mask": lambda a: [[0] + [1] * 5] * 4}, ValueError, "env_mask of rollout_func must be all 1"),
        ({"source": [1, 2]}, ValueError, "'source' of rollout_func must have a value for each of 4 completions, got 2"),
        ({"completions": "x"}, ValueError, "must not return 'completions': rewards get something else by this name"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_never_a_step(refusing, changes, error, message):
    refusing.rollout_func = Engine(**changes)
    before = weights(refusing)
    with pytest.raises(error, match=message):
        refusing.train()
    assert refusing.state.global_step == 0
    assert same(weights(refusing), before)


def test_suppressed_tokens_of_an_engine_are_refused(tmp_path):
    model = policy("gpt2", dtype=torch.float32)
    model.generation_config.suppress_tokens = [9]
    with pytest.raises(ValueError, match=r"may sample there, got 9 at \[2\]\[0\], which is suppressed"):
        train(tmp_path, Engine(completion_ids=with_token(9)), model=model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rollout_func": 3}, TypeError, "rollout_func must be a function of prompts and trainer, got int"),
        ({"rollout_func": lambda prompts: {}}, TypeError, "rollout_func must be a function of prompts and trainer, but"),
        ({"rollout_func": lambda prompts, trainer: [], "max_steps": 1}, TypeError, "must return a dict, got list"),
        ({"rollout_func": Engine(), "estimator": "soft"}, ValueError, "with rollout_func, got 'soft'"),
        ({"vllm_importance_sampling_mode": "token_mask"}, ValueError, "is for completions of a rollout_func"),
        ({"vllm_importance_sampling_mode": "tokens"}, ValueError, "vllm_importance_sampling_mode must be one of"),
        ({"vllm_importance_sampling_correction": 1}, TypeError, "vllm_importance_sampling_correction must be a bool, got 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"vllm_importance_sampling_cap": 2.0}, ValueError, "it is called vllm_importance_sampling_clip_max"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path, **options).train()


def test_settings_that_ask_for_nothing_without_an_engine(tmp_path):
    trainer = build(tmp_path, vllm_importance_sampling_correction=False, temperature=1)
    assert isinstance(trainer, GRADETrainer)
    assert trainer.rollout_func is None
