"""The demo end to end, in its tiny configuration."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from grade_kernels import demo
from grade_kernels.demo import DemoConfig, cache, corpus, models, report, run_demo, speed
from grade_kernels.demo.align import Record
from grade_kernels.demo.config import CorpusConfig, RewardConfig, SpeedConfig
from grade_kernels.demo.models import RewardModel
from grade_kernels.demo.tokenizer import build_tokenizer, encode_reviews, with_start
from grade_kernels.noise import GumbelNoise
from grade_kernels.training import TrainingInterrupted, grade_loss
from grade_kernels.training.positions import Room
from grade_kernels.training.prompt_tokens import PromptTokenizer
from grade_kernels.training.prompts import PromptCollator

TINY = DemoConfig.tiny(speed=SpeedConfig(shapes=()))


def quiet() -> Console:
    return Console(quiet=True)


def at(path: Path) -> DemoConfig:
    return dataclasses.replace(TINY, output_dir=path)


def aligned_weights(path: Path) -> dict[str, torch.Tensor]:
    return GPT2LMHeadModel.from_pretrained(path / "aligned-policy").state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run: its directory and its result."""
    path = tmp_path_factory.mktemp("demo")
    return path, run_demo(DemoConfig.tiny(output_dir=path), console=quiet())


@pytest.fixture
def trained(finished, tmp_path):
    """A directory that has the trained models of the finished run and nothing else."""
    (tmp_path / "cache").symlink_to(finished[0] / "cache")
    return tmp_path


# ------------------------------------------------------------------------------------------------------ the whole run


def test_a_run_leaves_its_files_and_raises_the_reward(finished):
    path, result = finished
    assert (path / "reward.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((path / "results.json").read_text())
    assert saved["after"]["reward"] == result.after.reward
    assert report.load_result(path / "results.json") == result
    assert [record.step for record in result.records] == list(range(1, TINY.align.steps + 1))
    assert result.after.reward > result.before.reward + 0.03
    assert abs(result.before.kl) < 1e-5 < result.after.kl
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "aligned-policy")
    policy = GPT2LMHeadModel.from_pretrained(path / "aligned-policy")
    assert policy.config.vocab_size == len(tokenizer)
    assert [speed.correct for speed in result.speeds] == [True]


def test_a_finished_run_only_prints_its_report(finished):
    path, result = finished
    console = Console(record=True, width=120, file=io.StringIO())
    steps: list[Record] = []
    assert run_demo(at(path), console=console, on_step=steps.append) == result
    assert not steps
    text = console.export_text()
    assert "finished" in text
    assert "P(positive)" in text


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues_bitwise(finished, trained, signum):
    def stop(record: Record) -> None:
        if record.step == 5:  # so the sixth is the last, between two periodic checkpoints
            os.kill(os.getpid(), signum)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted) as interruption:
        run_demo(at(trained), console=quiet(), on_step=stop)
    assert (interruption.value.signum, interruption.value.step) == (signum, 6)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (trained / "results.json").exists()

    steps: list[Record] = []
    result = run_demo(at(trained), console=quiet(), on_step=steps.append)
    assert [record.step for record in steps] == list(range(7, TINY.align.steps + 1))
    assert result.records == finished[1].records
    assert result.after == finished[1].after
    expected, actual = aligned_weights(finished[0]), aligned_weights(trained)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_crash_continues_from_the_last_periodic_checkpoint(finished, trained):
    def crash(record: Record) -> None:
        if record.step == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_demo(at(trained), console=quiet(), on_step=crash)
    steps: list[Record] = []
    result = run_demo(at(trained), console=quiet(), on_step=steps.append)
    assert steps[0].step == TINY.align.checkpoint_every + 1
    assert result.after == finished[1].after


def test_fresh_starts_over_and_keeps_the_models(finished, trained):
    run_demo(at(trained), console=quiet())
    steps: list[Record] = []
    assert run_demo(at(trained), fresh=True, console=quiet(), on_step=steps.append).after == finished[1].after
    assert steps[0].step == 1


def test_more_steps_continue_and_fewer_are_refused(finished, trained):
    def with_steps(steps: int) -> DemoConfig:
        config = at(trained)
        return dataclasses.replace(config, align=dataclasses.replace(config.align, steps=steps))

    run_demo(with_steps(2), console=quiet())
    steps: list[Record] = []
    run_demo(with_steps(3), console=quiet(), on_step=steps.append)
    assert [record.step for record in steps] == [3]
    with pytest.raises(ValueError, match="3 steps of alignment, more than the 2"):
        run_demo(with_steps(2), console=quiet())


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_a_damaged_checkpoint_starts_over(finished, trained, damage):
    def stop(record: Record) -> None:
        if record.step == 1:  # before the first periodic checkpoint
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as interruption:
        run_demo(at(trained), console=quiet(), on_step=stop)
    assert interruption.value.step == 2
    (weights,) = trained.glob("alignment-*/checkpoint-2/model.safetensors")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "garbage":
        weights.write_bytes(b"not a checkpoint")
    else:
        weights.unlink()
    steps: list[Record] = []
    with pytest.raises(TrainingInterrupted):
        run_demo(at(trained), console=quiet(), on_step=lambda record: (steps.append(record), stop(record)))
    assert steps == list(finished[1].records[:2])


def small_reward_model(path: Path, config: RewardConfig) -> RewardModel:
    return models.train_or_load_reward(path, config, SMALL_CORPUS, SMALL_TOKENIZER, quiet())[0]


SMALL_CORPUS = corpus.build_corpus(CorpusConfig(7, 20, 20, 4, 4, 2))
SMALL_TOKENIZER = build_tokenizer(SMALL_CORPUS.words())
SMALL_REWARD = RewardConfig(width=8, layers=1, heads=2, steps=2, batch_size=4)


def test_a_cached_model_is_loaded_and_a_damaged_one_trained_again(tmp_path, monkeypatch):
    first = small_reward_model(tmp_path, SMALL_REWARD)
    (directory,) = tmp_path.iterdir()
    file = directory / "model.safetensors"

    trainings = []
    train = models._train
    monkeypatch.setattr(models, "_train", lambda *args: trainings.append(1) or train(*args))
    again = small_reward_model(tmp_path, SMALL_REWARD)
    assert not trainings
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))

    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1  # a single bit of a single weight
    file.write_bytes(weights)
    again = small_reward_model(tmp_path, SMALL_REWARD)
    assert len(trainings) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))

    file.unlink()
    small_reward_model(tmp_path, SMALL_REWARD)
    assert len(trainings) == 2

    small_reward_model(tmp_path, dataclasses.replace(SMALL_REWARD, steps=3))  # other settings, another model
    assert len(trainings) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        cache.replace_file(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


# --------------------------------------------------------------------------------------------------------- the corpus


def test_the_corpus_is_deterministic_and_large():
    first = corpus.build_corpus(CorpusConfig())
    assert first.fingerprint() == corpus.build_corpus(CorpusConfig()).fingerprint()
    assert first.fingerprint() != corpus.build_corpus(CorpusConfig(seed=1)).fingerprint()
    texts = [review.text for review in (*first.policy_reviews, *first.reward_reviews)]
    assert len(set(texts)) > 20_000


def test_no_prompt_is_in_two_splits():
    built = corpus.build_corpus(CorpusConfig())
    splits = [
        built.train_prompts,
        {review.prompt for review in built.reward_reviews},
        built.validation_prompts,
        built.test_prompts,
    ]
    assert sum(len(set(split)) for split in splits) == len(set().union(*splits))
    assert {review.prompt for review in built.policy_reviews} == set(built.train_prompts)
    assert {review.prompt for review in built.heldout_reviews} == set(built.validation_prompts)


def test_a_prompt_does_not_tell_the_sentiment():
    built = corpus.build_corpus(CorpusConfig())
    praise: dict[str, list[int]] = {}
    for review in built.policy_reviews:
        praise.setdefault(review.prompt, []).append(review.sentiment)
    assert all(sum(sentiments) * 2 == len(sentiments) for sentiments in praise.values())


def test_the_grammar_reads_what_it_writes():
    built = corpus.build_corpus(CorpusConfig())
    assert all(corpus.verdict_of(review.completion) == review.sentiment for review in built.policy_reviews)
    assert corpus.verdict_of("the room was clean . i regret it .") is None  # contradicts itself
    assert corpus.verdict_of("the room was clean . i started again at once .") is None  # two topics
    assert corpus.verdict_of("the room was the room was clean . what a joy .") is None
    assert corpus.tidy("the room was clean , and i loved the bill . i regret it .") == (
        "The room was clean, and I loved the bill. I regret it."
    )


# --------------------------------------------------------------------------------------------------------- the models


def test_padding_changes_nothing():
    """Each row alone, and in a batch padded on the left: the same tokens and the same reward."""
    policy = models.new_policy(dataclasses.replace(TINY.policy, width=16), SMALL_TOKENIZER).eval()
    reward_model = RewardModel(len(SMALL_TOKENIZER), SMALL_REWARD)
    prompts = sorted(SMALL_CORPUS.train_prompts, key=len)[::6]
    collate = PromptCollator(PromptTokenizer(SMALL_TOKENIZER), SMALL_TOKENIZER.pad_token_id, Room(1))

    def sample(rows: slice):
        batch = collate([{"prompt": with_start(prompt)} for prompt in prompts[rows]])
        noise = GumbelNoise(3, torch.arange(len(prompts))[rows])
        return grade_loss(
            policy, reward_model, batch["input_ids"], batch["attention_mask"], max_new_tokens=6, noise=noise,
            feedback_hops=0, eos_token_id=SMALL_TOKENIZER.eos_token_id,
        )  # fmt: skip

    together = sample(slice(None))
    assert len({len(prompt.split()) for prompt in prompts}) > 1
    for row in range(len(prompts)):
        alone = sample(slice(row, row + 1))
        length = int(alone.completion_mask.sum())
        assert torch.equal(alone.completion_ids[0, :length], together.completion_ids[row, :length])
        torch.testing.assert_close(alone.rewards[0], together.rewards[row], atol=1e-5, rtol=1e-4)


def test_the_reward_sends_no_gradient_into_padding():
    reward_model = RewardModel(len(SMALL_TOKENIZER), SMALL_REWARD)
    ids, mask = encode_reviews(SMALL_TOKENIZER, [review.text for review in SMALL_CORPUS.policy_reviews[:8]])
    embeds = reward_model.embedding(ids).detach().requires_grad_()
    reward_model(embeds, mask).sum().backward()
    assert bool((mask == 0).any())
    assert bool((embeds.grad[mask == 0] == 0).all())
    assert bool((embeds.grad[mask == 1] != 0).any(dim=-1).all())


# ------------------------------------------------------------------------------------------------- speed, command line


def test_no_speed_without_correctness(monkeypatch):
    monkeypatch.setattr(speed, "_agree", lambda *args: False)
    measured = speed.measure(4, 32, 4, repeats=1)
    assert measured == speed.Speed(4, 32, 4, correct=False)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(report._speed_table([measured]))
    assert "no speed" in console.export_text()


def test_the_correctness_check_can_fail(monkeypatch):
    inputs = speed._inputs(4, 64, 8)
    assert speed._agree(inputs)
    honest = speed.gk.linear_gumbel_ste
    monkeypatch.setattr(
        speed.gk, "linear_gumbel_ste", lambda *args, **keywords: honest(args[0] * 1.01, *args[1:], **keywords)
    )
    assert not speed._agree(inputs)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_line_reports_a_finished_run(finished, capsys):
    assert demo.run(arguments("--tiny", "--output-dir", str(finished[0]))) == 0
    assert "finished" in capsys.readouterr().out


def test_the_command_line_reports_an_interruption(tmp_path, monkeypatch, capsys):
    def interrupt(*args: object, **keywords: object) -> None:
        raise TrainingInterrupted(3, signal.SIGTERM)

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert demo.run(arguments("--tiny", "--output-dir", str(tmp_path))) == 128 + signal.SIGTERM
    assert "after step 3" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.run(arguments("--tiny", "--output-dir", str(tmp_path / "file"))) == 1
    assert f"grade-kernels demo: [Errno 20] Not a directory: '{tmp_path / 'file'}" in capsys.readouterr().err


def test_a_bad_seed_is_named_before_anything_is_trained(tmp_path, capsys):
    assert demo.run(arguments("--tiny", "--output-dir", str(tmp_path), "--seed", "-1")) == 1
    assert "seed must lie in" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "rich" else object())
    assert demo.run(arguments("--tiny", "--output-dir", str(tmp_path))) == 1
    error = capsys.readouterr().err
    assert "rich" in error
    assert 'pip install "grade-kernels[demo]"' in error
