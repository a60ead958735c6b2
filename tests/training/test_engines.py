"""Engines as rollout functions: `generate`, continuous batching, and a server over HTTP that fails in many ways."""

from __future__ import annotations

import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset

from grade_kernels.training.engines.generate import continuous_batching_rollout, generate_rollout
from grade_kernels.training.engines.server import CompletionsServer, EngineError, SentWeights
from grade_kernels.training.engines.vllm import VLLMColocated, VLLMWeights
from tests.support.completions_server import CompletionServer
from tests.support.trainers import PROMPTS, build, same, weights
from tests.support.training_models import VOCAB, policy


def model_of(begin=None):
    model = policy("gpt2", dtype=torch.float32)
    model.generation_config.suppress_tokens, model.generation_config.begin_suppress_tokens = [5, 9], begin
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 0.3, 3  # not followed
    return model


def train(path, engine, model=None, **changes):
    trainer = build(
        path, model=model_of() if model is None else model, rollout_func=engine, **({"max_steps": 2} | changes)
    )
    trainer.train()
    return trainer


def keeping(engine, kept):
    def function(prompts, trainer):
        answer = engine(prompts, trainer)
        kept.append((trainer.rollout_request, answer))
        return answer

    return function


# ------------------------------------------------------------------------------------------------ on the policy itself


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_generate_draws_from_the_policy(tmp_path, temperature):
    """Its log-probabilities are the policy's, masks and temperature included; a second run draws the same."""
    first, second = [], []
    options = {
        "temperature": temperature,
        "max_completion_length": 8,
        "vllm_importance_sampling_mode": "token_truncate",
    }
    runs = [
        train(tmp_path / str(i), keeping(generate_rollout, kept), model_of([2, 7]), **options)
        for i, kept in enumerate((first, second))
    ]
    assert [answer for _, answer in first] == [answer for _, answer in second]
    assert same(weights(runs[0]), weights(runs[1]))
    tokens = {token for _, answer in first for row in answer["completion_ids"] for token in row}
    assert len(tokens) > 15, "not cut off by the model's own top_k"
    entry = runs[0].state.log_history[0]
    if temperature == 1.0:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    else:
        assert entry["sampling/kl"] > 1e-3
    assert runs[0].model.generation_config.top_k == 3, "the model's own config was not put back"


def test_generate_may_draw_the_token_of_padding(tmp_path):
    """As the last token of a completion that has no end of sequence, where it looks like padding."""
    kept, model = [], model_of()
    model.generation_config.suppress_tokens = [token for token in range(VOCAB) if token not in (0, 2)]
    train(tmp_path, keeping(generate_rollout, kept), model, max_completion_length=1, max_steps=3)
    drawn = [row for _, answer in kept for row in answer["completion_ids"]]
    assert {tuple(row) for row in drawn} == {(0,), (2,)}
    assert all(len(row) == 1 for _, answer in kept for row in answer["logprobs"])


def test_generate_leaves_the_random_numbers_alone(tmp_path):
    states = []

    def engine(prompts, trainer):
        before = torch.get_rng_state()
        answer = generate_rollout(prompts, trainer)
        states.append(torch.equal(before, torch.get_rng_state()))
        return answer

    train(tmp_path, engine, max_steps=1)
    assert states == [True]


def test_continuous_batching_draws_from_the_policy(tmp_path):
    """Without suppressed tokens, which its processors do not know."""
    kept = []
    model = policy("llama", dtype=torch.float32)
    trainer = train(tmp_path, keeping(continuous_batching_rollout, kept), model, max_steps=1)
    assert [answer["prompt_ids"] for _, answer in kept] == [request.prompt_ids for request, _ in kept]
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-3


# --------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def server():
    with CompletionServer(model_of()).running() as running:
        yield running


def asking(server, **options):
    return CompletionsServer(server.url, **({"pause": 0.01, "timeout": 60.0} | options))


@pytest.mark.parametrize("llama", [False, True])
def test_a_server_draws(tmp_path, server, llama):
    """Both forms of its answer; each request tells all settings of sampling, and has a seed of its own."""
    server.llama = llama
    trainer = train(tmp_path, asking(server, model="tiny", more={"priority": 1}), max_steps=1, num_generations=2)
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert len(server.requests) == 4
    assert len({body["seed"] for body in server.requests}) == 4
    for body in server.requests:
        told = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n")}
        assert told == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
        assert (body["model"], body["priority"], body["stop_token_ids"]) == ("tiny", 1, [2])
        assert body["logit_bias"] == {"5": -100, "9": -100}


def test_weights_are_sent_before_each_step(tmp_path, server):
    sent = []

    def sync(trainer):
        sent.append(trainer.state.global_step)
        server.model.load_state_dict(trainer.rollout_request.model.state_dict())

    # Two batches a step: the weights are sent for the first.
    trainer = train(tmp_path, asking(server, sync=sync), max_steps=2, gradient_accumulation_steps=2, learning_rate=3e-2)
    assert sent == [0, 1]
    assert trainer.state.log_history[1]["sampling/sampling_logp_difference/max"] < 1e-4


def test_weights_that_others_replaced_are_sent_again(tmp_path, server):
    """Those of the best checkpoint, which is loaded at the last step; and those of a second run, which begins at step 0."""
    sent = []

    def sync(trainer):
        sent.append((trainer.state.global_step, weights(trainer)["lm_head.weight"]))

    trainer = build(
        tmp_path, model=model_of(), rollout_func=asking(server, sync=sync), max_steps=2, eval_steps=1, save_steps=1,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}), eval_strategy="steps", save_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="reward", greater_is_better=False, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1, "the last step is the best one, so that nothing was replaced"
    trainer.evaluate()
    assert [step for step, _ in sent] == [0, 1, 2, 2]
    assert torch.equal(sent[3][1], weights(trainer)["lm_head.weight"])
    again = build(tmp_path, model=model_of(), rollout_func=asking(server, sync=sync), max_steps=1, beta=0.0)
    sent.clear()
    for _ in range(2):
        again.train()
    assert [step for step, _ in sent] == [0, 0]


@pytest.mark.parametrize("main", [True, False])
def test_one_process_sends_the_weights_and_all_wait(main):
    """Two senders would meet at one port. Whoever asks before the weights are there gets completions of older ones."""
    happened = []
    model = policy("gpt2")
    accelerator = SimpleNamespace(is_main_process=main, wait_for_everyone=lambda: happened.append("waited"))
    trainer = SimpleNamespace(
        accelerator=accelerator, state=object(), rollout_request=SimpleNamespace(step=0, model=model)
    )
    send = VLLMWeights("http://127.0.0.1:1")
    send._joined = lambda: happened.append("sent")
    sent = SentWeights()
    if main:
        with pytest.raises(ImportError, match="vllm"):
            sent.renew(trainer, lambda: send(trainer))
        assert happened == []
    else:
        sent.renew(trainer, lambda: send(trainer))
        sent.renew(trainer, lambda: send(trainer))
        assert happened == ["waited"]


@pytest.mark.parametrize("failure", [503, "hang up", "late"])
def test_a_request_is_made_again(tmp_path, server, failure):
    """A server that is busy, breaks off or is late once answers the same in the end."""
    sound = train(tmp_path / "sound", asking(server), max_steps=1)
    server.requests.clear()
    server.fail = lambda number: failure if number == 1 else None
    again = train(tmp_path / "again", asking(server, timeout=0.5 if failure == "late" else 60.0, tries=5), max_steps=1)
    assert len(server.requests) > 4
    assert same(weights(sound), weights(again))


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A trainer that takes no step, which therefore can be asked again and again."""
    return build(tmp_path_factory.mktemp("failing"), model=model_of(), rollout_func=generate_rollout, beta=0.0)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (503, r"/v1/completions gave no answer in 2 tries of at most 60.0 seconds; the last: HTTP 503"),
        ("hang up", r"gave no answer in 2 tries .* the last: RemoteDisconnected"),
        (400, "/v1/completions refuses a request: HTTP 400"),
    ],
)
def test_a_server_that_fails_ends_the_run(failing, server, failure, message):
    server.fail = lambda number: failure
    failing.rollout_func = asking(server, tries=2, concurrency=1)
    before = weights(failing)
    with pytest.raises(EngineError, match=message):
        failing.train()
    assert same(weights(failing), before)
    # The pool has begun with the next prompts by then; each is asked for as often.
    asked = [body["seed"] for body in server.requests]
    assert max(asked.count(seed) for seed in asked) == (1 if failure == 400 else 2)


def test_a_server_that_is_not_there():
    with CompletionServer(None).running() as gone:
        client = asking(gone, tries=2)
    with pytest.raises(EngineError, match=r"gave no answer in 2 tries .* Connection refused"):
        client.post("/v1/completions", {})


def changed(**values):
    def wrong(body, answer):
        answer["choices"][0].update(values)
        return answer

    return wrong


def other_logprobs(value):
    def wrong(body, answer):
        answer["choices"][0]["logprobs"]["token_logprobs"][0] = value
        return answer

    return wrong


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda body, answer: b"<html>", EngineError, "must answer with JSON, got b'<html>'"),
        (lambda body, answer: {"choices": []}, EngineError, "must answer with one choice"),
        (lambda body, answer: answer | {"usage": {"prompt_tokens": 9}}, EngineError, "read 9 tokens of a prompt of"),
        (changed(prompt_token_ids=[1, 2]), EngineError, "the server completed another prompt"),
        (changed(logprobs=None), EngineError, "the server must return logprobs, got None"),
        (changed(token_ids=[3]), EngineError, "the server returned 1 tokens and . log-probabilities"),
        (other_logprobs("-1.0"), EngineError, "has no log-probability of a token"),
        (other_logprobs(None), EngineError, "has no log-probability of a token"),
        (other_logprobs(math.inf), ValueError, "must be finite and not positive, got inf"),
        (other_logprobs(0.7), ValueError, "must be finite and not positive, got 0.7"),
        (changed(token_ids=[VOCAB] * 6, logprobs={"tokens": [], "token_logprobs": [-1.0] * 6}), ValueError,
         r"must lie in \[0, 61\), got 61"),
        (changed(token_ids=[5] * 6, logprobs={"tokens": [], "token_logprobs": [-1.0] * 6}), ValueError, "is suppressed"),
        (changed(token_ids=[3] * 7, logprobs={"tokens": [], "token_logprobs": [-1.0] * 7}), ValueError, "at most 6 tokens"),
        (changed(token_ids=[3] * 5, logprobs={"tokens": [], "token_logprobs": [-1.0] * 5}), ValueError,
         r"must have 6 tokens or an end of sequence \(2\)"),
        (changed(token_ids=None, logprobs={"tokens": [" film"], "token_logprobs": [-1.0]}), EngineError,
         "must return token ids, got the token ' film'"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_ends_the_run(failing, server, wrong, error, message):
    server.wrong = wrong
    failing.rollout_func = asking(server)
    before = weights(failing)
    with pytest.raises(error, match=message):
        failing.train()
    assert failing.state.global_step == 0
    assert same(weights(failing), before)


def test_a_resumed_run_asks_the_server_for_the_same(tmp_path, server):
    options = {"save_steps": 2, "save_strategy": "steps", "feedback_hops": 0}
    truth = train(tmp_path / "whole", asking(server), max_steps=3, **options)
    asked = [(body["prompt"], body["seed"]) for body in server.requests]
    server.requests.clear()
    train(tmp_path / "parts", asking(server), max_steps=2, **options)
    resumed = build(tmp_path / "parts", model=model_of(), rollout_func=asking(server), max_steps=3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert sorted((body["prompt"], body["seed"]) for body in server.requests) == sorted(asked)
    assert same(weights(truth), weights(resumed))


def test_what_a_server_can_not_be_asked_for_is_refused(tmp_path, server):
    with pytest.raises(ValueError, match="begin_suppress_tokens of the generation config can not be told to a server"):
        train(tmp_path, asking(server), model_of([2, 7]))
    with pytest.raises(ValueError, match="more must not have temperature, top_p: a request says that itself"):
        train(tmp_path, asking(server, more={"top_p": 0.9, "temperature": 0.5, "priority": 1}))
    with pytest.raises(ValueError, match="more must not have logit_bias"):
        train(tmp_path, asking(server, more={"logit_bias": {}}), policy("gpt2", dtype=torch.float32))
    assert server.requests == []


@pytest.mark.parametrize("name", ["timeout", "tries", "concurrency"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        CompletionsServer("http://127.0.0.1:1", **{name: 0})


# ------------------------------------------------------------------------------------- vLLM, by stand-ins for its API


def test_a_colocated_vllm_is_called_as_documented(tmp_path, monkeypatch):
    """Nothing of vLLM runs here: what is checked are the names and values that it is called with."""
    calls = SimpleNamespace(made={}, loaded=[], resets=0, asked=[])

    class LLM:
        def __init__(self, **options):
            assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "its model would be in another process"
            calls.made = options
            runner = SimpleNamespace(model=SimpleNamespace(load_weights=lambda named: calls.loaded.append(dict(named))))
            worker = SimpleNamespace(model_runner=runner)
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

        def reset_prefix_cache(self):
            calls.resets += 1

        def generate(self, prompts, sampling_params, use_tqdm):
            calls.asked += list(zip(prompts, sampling_params, strict=True))
            one = SimpleNamespace(token_ids=[3] * 6, logprobs=[{3: SimpleNamespace(logprob=-4.0)}] * 6)
            return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[one]) for p in prompts]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    trainer = train(tmp_path, VLLMColocated("tiny", gpu_memory_utilization=0.3), max_steps=2)
    assert calls.made == {"model": "tiny", "logprobs_mode": "processed_logprobs", "gpu_memory_utilization": 0.3}
    assert calls.resets == len(calls.loaded) == 2
    assert calls.loaded[0].keys() == dict(trainer.model.named_parameters()).keys()
    assert len({settings["seed"] for _, settings in calls.asked}) == len(calls.asked)
    _, settings = calls.asked[0]
    assert {name: settings[name] for name in ("temperature", "top_p", "top_k", "min_p", "logprobs", "max_tokens")} == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "logprobs": 0, "max_tokens": 6,
    }  # fmt: skip
    assert trainer.state.log_history[0]["sampling/kl"] > 0
    with pytest.raises(ValueError, match="begin_suppress_tokens of the generation config can not be told"):
        train(tmp_path, VLLMColocated("tiny"), model_of([2, 7]))
