"""Rewards of text: asynchronous ones, what they get besides the columns, and how they fail."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset

from grade_kernels import GumbelNoise
from grade_kernels.training import grade_loss
from grade_kernels.training.text_rewards import TextRewards, is_async
from tests.support.trainers import PROMPTS, build
from tests.support.training_models import BagReward, policy, prompts


async def lengths(prompts, completions, completion_ids, **columns):
    await asyncio.sleep(0)
    return [float(len(ids)) for ids in completion_ids]


class Judge:
    __name__ = "judge"

    async def __call__(self, completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(completions)


class Client:
    """Belongs to the event loop that it was first used on, as clients of network services do."""

    def __init__(self):
        self.loop = None

    async def score(self, completions, scale=1.0, **columns):
        running = asyncio.get_running_loop()
        self.loop = self.loop or running
        assert self.loop is running, "another event loop"
        return [scale] * len(completions)


def waits_for(barrier, name):
    async def function(completions, **columns):
        await barrier()
        return [0.0] * len(completions)

    function.__name__ = name
    return function


def meeting(count):
    """All of `count` tasks must have come before any goes on."""
    state = {"here": 0, "all": None}

    async def barrier():
        state["all"] = state["all"] or asyncio.Event()
        state["here"] += 1
        if state["here"] == count:
            state["all"].set()
        await asyncio.wait_for(state["all"].wait(), timeout=20)

    return barrier


def call(functions, texts=("a", "b")):
    rewards = TextRewards(functions)
    return rewards(["p"] * len(texts), list(texts), [[1, 2], [3]][: len(texts)], {}, {})


KINDS = {
    "function": lengths,
    "object": Judge(),
    "method": Client().score,
    "partial": functools.partial(lengths, topic="x"),
    "partial of an object": functools.partial(Judge(), topic="x"),
    "plain function that returns a coroutine": lambda **given: lengths(**given),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_asynchronous_reward_is_awaited(tmp_path, kind):
    assert is_async(KINDS[kind]) == (not kind.startswith("plain"))
    reward = [BagReward(dtype=torch.float32), KINDS[kind]]
    trainer = build(tmp_path, reward=reward, eval_dataset=Dataset.from_dict({"prompt": PROMPTS}), max_steps=2)
    trainer.train()
    name = trainer.reward_names[1]
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    means = [entry[f"rewards/{name}/mean"] for entry in logs]
    lengths_are = [entry["completions/mean_length"] for entry in logs]
    counts = kind in ("function", "partial", "plain function that returns a coroutine")
    assert means == (lengths_are if counts else [1.0, 1.0])
    assert trainer.evaluate()[f"eval_rewards/{name}/mean"] > 0


def test_all_of_a_batch_wait_at_the_same_time():
    barrier = meeting(3)
    got = call({name: waits_for(barrier, name) for name in ("a", "b", "c")})
    assert got == {name: [0.0, 0.0] for name in ("a", "b", "c")}


def test_a_client_keeps_its_event_loop_over_batches():
    rewards = TextRewards({"client": functools.partial(Client().score, scale=2.0)})
    for _ in range(3):
        assert rewards(["p"], ["c"], [[1]], {}, {}) == {"client": [2.0]}


def test_inside_of_a_running_event_loop(tmp_path):
    async def cell():
        trainer = build(tmp_path, reward=[BagReward(dtype=torch.float32), lengths], max_steps=1)
        trainer.train()
        return trainer.state.log_history[0]["rewards/lengths/mean"]

    assert asyncio.run(cell()) > 0


def test_errors_come_through_with_the_name_of_the_reward():
    cancelled = threading.Event()

    async def broken(completions, **columns):
        raise ConnectionError("refused")

    async def slow(completions, **columns):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def plain(completions, **columns):
        raise KeyError("topic")

    with pytest.raises(ConnectionError, match="refused\nin the reward judge"):
        call({"slow": slow, "judge": broken})
    assert cancelled.is_set(), "the others do not go on"
    with pytest.raises(KeyError) as error:
        call({"plain": plain})
    assert error.value.__notes__ == ["in the reward plain"]


@pytest.mark.parametrize(("scores", "got"), [([1.0], "1"), (3.0, "float")])
def test_an_asynchronous_reward_returns_a_number_per_completion(scores, got):
    async def short(completions, **columns):
        return scores

    with pytest.raises(ValueError, match=rf"short must return one number per completion \(2\), got {got}"):
        call({"short": short})


def test_none_is_no_number():
    async def some(completions, **columns):
        return [None, 2.0]

    first, second = call({"some": some})["some"]
    assert first != first
    assert second == 2.0


class Awaited(BagReward):
    async def forward(self, inputs_embeds, attention_mask, **columns):
        return super().forward(inputs_embeds, attention_mask)


class AwaitedObject:
    embedding = BagReward().embedding

    async def __call__(self, inputs_embeds, attention_mask, **columns):
        return inputs_embeds.sum((1, 2))


@pytest.mark.parametrize("reward", [Awaited(), AwaitedObject()])
def test_a_differentiable_reward_can_not_be_asynchronous(tmp_path, reward):
    with pytest.raises(TypeError, match="is asynchronous, but a differentiable reward is a part of the graph"):
        build(tmp_path, reward=reward)
    ids, mask = prompts()
    with pytest.raises(TypeError, match="reward is asynchronous"):
        grade_loss(policy("gpt2"), reward, ids, mask, max_new_tokens=2, noise=GumbelNoise(0))


def test_rewards_of_trl_get_the_state_and_log_by_themselves(tmp_path, capsys):
    steps = []

    def reward(completions, trainer_state, log_metric, log_extra, **columns):
        steps.append(trainer_state.global_step)
        log_metric("share", 0.25)
        log_extra("kind", [f"kind{i}" for i in range(len(completions))])
        assert not columns.keys() & {"trainer_state", "log_metric", "log_extra"}
        return [0.0] * len(completions)

    def plain(prompts, completions, completion_ids):
        return [0.0] * len(completions)

    trainer = build(
        tmp_path, reward=[BagReward(dtype=torch.float32), reward, plain], max_steps=2, log_completions=True,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
    )  # fmt: skip
    trainer.train()
    assert steps == [0, 1]
    assert [entry["share"] for entry in trainer.state.log_history if "reward" in entry] == [0.25, 0.25]
    assert "kind3" in capsys.readouterr().out
    assert trainer.evaluate()["eval_share"] == 0.25


def test_unique_prompts_are_shown_once(tmp_path, capsys):
    options = {"num_generations": 4, "max_steps": 1, "log_completions": True, "shuffle_dataset": False}
    build(tmp_path / "a", **options).train()
    assert capsys.readouterr().out.count("w3 w7") == 4
    build(tmp_path / "b", log_unique_prompts=True, **options).train()
    assert capsys.readouterr().out.count("w3 w7") == 1


async def asynchronous_generator(prompts, **columns):
    yield 1.0


def generator(prompts, **columns):
    yield 1.0


class Yielding:
    def __call__(self, prompts, **columns):
        yield 1.0


def without_ids(prompts, completions):
    return [0.0] * len(prompts)


def by_place(prompts, /, **columns):
    return [0.0] * len(prompts)


def with_topic(completions, topic, **columns):
    return [float(len(one)) for one in topic]


def of_all(prompts, completions, completion_ids, trainer_state, log_metric=None):
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (asynchronous_generator, "asynchronous_generator must return one number per completion, but it is a generator"),
        (generator, "generator must return one number per completion, but it is a generator"),
        (functools.partial(generator, topic=1), "partial must return .* but it is a generator"),
        (Yielding(), "Yielding must return one number per completion, but it is a generator"),
        (without_ids, r"without_ids must take .* signature has no completion_ids and no \*\*kwargs"),
        (by_place, "by_place needs prompts"),
        (with_topic, "with_topic needs topic, .* has no such column"),
    ],
)
def test_functions_that_can_not_be_called_are_named_at_construction(tmp_path, function, message):
    with pytest.raises(TypeError, match=message):
        build(tmp_path, reward=[BagReward(dtype=torch.float32), function])


def test_columns_are_looked_at_in_every_data_set(tmp_path):
    topics = Dataset.from_dict({"prompt": PROMPTS, "topic": PROMPTS})
    rewards = [BagReward(dtype=torch.float32), with_topic]
    build(tmp_path, reward=rewards, dataset=topics, eval_dataset=topics)
    build(tmp_path, reward=rewards, dataset=topics.to_iterable_dataset())
    build(tmp_path, reward=[rewards[0], of_all], max_steps=1).train()
    with pytest.raises(TypeError, match="with_topic needs topic"):
        build(tmp_path, reward=rewards, dataset=topics, eval_dataset=[{"prompt": "w3"}])
    with pytest.raises(TypeError, match=r"of_all must take .* signature has no topic"):
        build(tmp_path, reward=[rewards[0], of_all], dataset=topics)
