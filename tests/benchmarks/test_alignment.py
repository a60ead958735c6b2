"""The alignment experiment: its baselines are what they are called, its figures are unbiased, and all of it runs."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from rich.console import Console
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from benchmarks.alignment import jobs
from benchmarks.alignment.bands import Band, at_kl, to_reward
from benchmarks.alignment.claims import FAILS, HOLDS, OPEN, claims
from benchmarks.alignment.command import main
from benchmarks.alignment.evaluation import distinct, evaluate
from benchmarks.alignment.jobs import Workers
from benchmarks.alignment.methods import METHODS, Batch, World
from benchmarks.alignment.methods.base import complete
from benchmarks.alignment.methods.ppo import PPO, generalised_advantages, masked_mean, whiten
from benchmarks.alignment.methods.reinforce import Reinforce, leave_one_out
from benchmarks.alignment.report import markdown, write_report
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.study import Results, Study
from benchmarks.alignment.tasks import Task, demo, imdb, labelled_text
from benchmarks.alignment.train import Point, Run, train
from benchmarks.alignment.variance import spread
from grade_kernels import GumbelNoise
from grade_kernels.demo.config import CorpusConfig, PolicyConfig, RewardConfig
from grade_kernels.demo.corpus import build_corpus
from grade_kernels.training import Prompts
from tests.support.training_models import CHECKPOINTING

SETTINGS = Settings(
    steps=4, prompts=2, completions=2, learning_rates=(1e-3, 3e-3), seeds=(0, 1), warmup_steps=2, evaluations=2,
    point_prompts=4, evaluation_prompts=8, variance_draws=3, variance_sets=2, value_steps=1,
)  # fmt: skip
CONFIG = labelled_text.TextConfig(
    vocab_size=300,
    policy=PolicyConfig(width=16, layers=1, heads=2, steps=4, batch_size=8),
    reward=RewardConfig(width=16, layers=1, heads=2, steps=4, batch_size=8),
    prompt_words=8,
    max_new_tokens=5,
    evaluation_prompts=8,
)
CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def texts():
    corpus = build_corpus(CorpusConfig(policy_prompts=300, reward_prompts=2, validation_prompts=2, test_prompts=2))
    return [labelled_text.LabelledText(review.text, bool(review.sentiment)) for review in corpus.policy_reviews[::6]]


def build_small(texts, cache):
    return labelled_text.build(texts, cache, CONSOLE, config=CONFIG)


@pytest.fixture(scope="module")
def task(texts, tmp_path_factory):
    return build_small(texts, tmp_path_factory.mktemp("cache"))


# ------------------------------------------------------------------------------------------------------- the estimators


class FirstTokens(torch.nn.Module):
    """A reward that reads the token behind the prompt: the logistic of its one feature."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, 1).requires_grad_(False)

    def forward(self, inputs_embeds, attention_mask):
        return inputs_embeds[:, -1, 0].mul(2).sigmoid()


def enumerable(vocab=9):
    """A task of one token after one prompt, so that its gradient is a sum over the vocabulary."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab, n_embd=8, n_layer=1, n_head=2, n_positions=8, initializer_range=0.5,
                   bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ).eval()  # fmt: skip
    prompts = Prompts(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.int64))
    return Task(
        name="enumerable", identity="", start=lambda: copy.deepcopy(model),
        value_backbone=lambda: copy.deepcopy(model.transformer), reference=copy.deepcopy(model),
        reward=FirstTokens(vocab), tokenizer=type("Tokens", (), {"eos_token_id": 0, "pad_token_id": 0}),
        train=prompts, validation=prompts, test=prompts, max_new_tokens=1, notes={},
    )  # fmt: skip


@pytest.mark.parametrize("baseline", [False, True], ids=["plain", "leave-one-out"])
def test_reinforce_is_unbiased(baseline):
    task = enumerable()
    policy = task.start()
    parameter = policy.transformer.h[0].mlp.c_proj.weight
    probabilities = policy(task.train.ids).logits[0, -1].softmax(dim=-1)
    value = probabilities @ task.reward(task.reward.embedding.weight[:, None], None)
    (exact,) = torch.autograd.grad(-value, parameter)
    world = World(task, Settings(prompts=500, completions=4), policy, beta=0.0, seed=0)
    learner = Reinforce(world, baseline=baseline)
    draws = torch.stack([torch.autograd.grad(learner.policy_loss(world.batch(i)), parameter)[0] for i in range(12)])
    error = (draws.mean(dim=0) - exact).norm()
    floor = (draws.var(dim=0).sum() / len(draws)).sqrt()
    assert floor < 0.2 * exact.norm()
    assert error < 2 * floor


def test_leave_one_out():
    returns = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert leave_one_out(returns, 3).tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_generalised_advantages():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    differences = rewards + torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1) - values
    expected = torch.stack([sum(0.95**k * differences[:, t + k] for k in range(5 - t)) for t in range(5)], dim=1)
    torch.testing.assert_close(generalised_advantages(rewards, values), expected)


def test_ppo_is_trl(task):
    """Whitening and the mean over tokens are TRL's; and while the policy is the one that drew, PPO is a policy gradient."""
    trl = pytest.importorskip("trl.experimental.ppo.ppo_trainer", exc_type=ImportError)
    torch.manual_seed(0)
    values, mask = torch.randn(3, 6), (torch.arange(6) < torch.tensor([[6], [2], [4]])).long()
    torch.testing.assert_close(whiten(values, mask), trl.masked_whiten(values, mask) * mask)
    torch.testing.assert_close(masked_mean(values, mask), trl.masked_mean(values, mask))


def test_ppo_clips(task):
    world = World(task, SETTINGS, task.start(), beta=0.02, seed=0)
    learner = PPO(world)
    experience = learner.collect(world.batch(0, 2))
    advantages = experience.advantages
    assert len(advantages) == 2 * SETTINGS.batch_size
    torch.testing.assert_close(
        learner.clipped_loss(experience), -masked_mean(advantages, experience.mask), atol=1e-5, rtol=1e-4
    )
    # As if each token had become twice as likely: only what got worse still counts.
    older = type(experience)(**{**vars(experience), "logprobs": experience.logprobs - math.log(2)})
    expected = torch.where(advantages > 0, -1.2 * advantages, -2 * advantages)
    torch.testing.assert_close(
        learner.clipped_loss(older), masked_mean(expected, experience.mask), atol=1e-5, rtol=1e-4
    )


def test_leave_one_out_is_trl(tmp_path):
    """The gradient of TRL's RLOO trainer, on completions that it drew itself, is ours on the same completions."""
    trl = pytest.importorskip("trl", exc_type=ImportError)
    pytest.importorskip("requests")  # TRL 1.12 imports it and does not ask for it
    datasets = pytest.importorskip("datasets")
    from benchmarks.alignment.methods import reinforce
    from grade_kernels.training.rollout import Rollout

    task = enumerable()
    policy = task.start()
    policy.config.pad_token_id = 8
    tokenizer = small_tokenizer(9)
    arguments = trl.RLOOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.0, num_generations=4, max_steps=1,
        per_device_train_batch_size=8, max_completion_length=1, disable_tqdm=True, logging_steps=1000,
        **{CHECKPOINTING: False},
    )  # fmt: skip
    rewards = []

    def reward(completion_ids, **columns):
        table = task.reward.embedding.weight
        rewards.extend(task.reward(table[torch.tensor(completion_ids)], None).tolist())
        return rewards[-len(completion_ids) :]

    trainer = trl.RLOOTrainer(
        model=policy, reward_funcs=reward, args=arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w3 w4"] * 4}),
    )  # fmt: skip
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    parameter = policy.transformer.h[0].mlp.c_proj.weight
    (theirs,) = torch.autograd.grad(trainer.compute_loss(policy, inputs), parameter)
    prompts = Prompts(inputs["prompt_ids"], inputs["prompt_mask"])
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    drawn = Rollout(ids, mask, torch.zeros(8, 1, dtype=torch.int64), None)
    logprobs = reinforce.completion_logprobs(policy, prompts, drawn).sum(dim=1)
    own_rewards = task.reward(task.reward.embedding.weight[ids], None)
    loss = -(leave_one_out(own_rewards, 4) * logprobs).mean()
    (ours,) = torch.autograd.grad(loss, parameter)
    assert ours.norm() > 0
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def small_tokenizer(vocab):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0", pad_token=f"w{vocab - 1}")


def test_every_method_sees_the_same_prompts_and_tokens(task):
    """Before the first optimiser step, equal noise draws equal tokens; soft GRADE alone feeds mixtures back."""
    counts = {}
    for name in ("grade_ste", "st", "reinforce", "reinforce_plain", "ppo"):
        world = World(task, SETTINGS, task.start(), beta=0.02, seed=0)
        METHODS[name].make(world).policy_loss(world.batch(0))
        counts[name] = world.tokens
    assert len(set(counts.values())) == 1
    several, single = world.batch(0, 2), world.batch(1)
    assert torch.equal(several.noise.row_ids[SETTINGS.batch_size :], single.noise.row_ids)


def test_spread_is_unbiased():
    torch.manual_seed(0)
    mean = torch.tensor([3.0, 4.0, 0.0])
    found = [spread(list(mean + 5 * torch.randn(4, 3))) for _ in range(4000)]
    assert sum(s.norm2 for s in found) / 4000 == pytest.approx(25.0, abs=2.0)  # the plain square would be 44
    assert sum(s.trace for s in found) / 4000 == pytest.approx(75.0, abs=2.5)


# --------------------------------------------------------------------------------------------------------- the figures


def points(*pairs):
    return [
        Point(step=i, tokens=100 * i, seconds=i, cpu_seconds=i, reward=reward, kl=kl, perplexity=10.0, distinct_2=0.5)
        for i, (reward, kl) in enumerate(pairs)
    ]


def test_crossings():
    path = points((0.5, 0.0), (0.7, 1.0), (0.9, 3.0), (0.8, 2.5))
    assert at_kl(path, 2.0).reward == pytest.approx(0.8)
    assert to_reward(path, 0.8).tokens == pytest.approx(150)
    assert at_kl(path, 4.0).reward == 0.9
    assert to_reward(path, 0.95) is None


def test_distinct():
    assert distinct(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "b a"], 2) == pytest.approx(2 / 3)


def results(rewards, gap=0.01):
    """Final runs of methods with the given test rewards, one per seed."""
    found = Results("made up", {}, Settings())
    for name, values in rewards.items():
        found.chosen[name] = 1e-3
        for seed, value in enumerate(values):
            final = {"reward": value, "reward_std": 0.1, "kl": 1.0, "perplexity": 9.0, "distinct_1": 0.1,
                     "distinct_2": 0.2, "judged": None, "tokens": 9.0, "completions": []}  # fmt: skip
            run = Run(name, 1e-3, 0.02, seed, points((0.5, 0.0), (value, 3.0)), final, {**final, "reward": value + gap})
            found.runs.append(run)
    return found


@pytest.mark.parametrize(("ours", "verdict"), [((0.9, 0.95), HOLDS), ((0.6, 0.7), FAILS), ((0.7, 0.95), OPEN)], ids=str)
def test_verdicts(ours, verdict):
    found = claims(results({"grade_ste": ours, "ppo": (0.5, 0.51)}))
    (reward,) = (claim for claim in found if claim.name == "a")
    assert reward.verdict == verdict
    assert [claim.verdict for claim in found if claim.name == "d"] == [HOLDS] * 3  # at 2, 5 and 10 nats


def test_pooled_variance_survives_a_mean_that_is_lost():
    found = results({"grade_ste": (0.9,), "reinforce_plain": (0.5,)})
    entry = {"trace": 10.0, "norm2": 10.0, "dot": None}
    lost = [{"trace": 300.0, "norm2": norm2, "dot": None} for norm2 in (-1.0, 9.0, 10.0)]
    found.variances["start"] = {"grade_ste": [entry] * 3, "reinforce_plain": lost}
    (claim,) = (claim for claim in claims(found) if claim.name == "b")
    assert claim.verdict == HOLDS
    assert "lost" not in markdown(found)
    assert Band((math.inf, 2.0)).show_range() == "lost in noise"
    for entry in lost:
        entry["norm2"] = -1.0
    (claim,) = (claim for claim in claims(found) if claim.name == "b")
    assert (claim.measured, claim.verdict) == ("a mean gradient is lost in noise", OPEN)


# ------------------------------------------------------------------------------------------------------- all of it runs


def test_a_study_from_runs_to_report_and_again(task, tmp_path, monkeypatch):
    methods = ("grade_ste", "reinforce_plain", "ppo", "ste_log")
    study = Study(task, SETTINGS, tmp_path, Workers(task, SETTINGS, CONSOLE))
    found = study.run(methods)
    assert found.methods == list(methods)
    assert {len(found.final(name)) for name in methods} == {2}
    assert set(found.variances) == {"start", "GRADE-STE, half way"}
    names = {path.name for path in write_report(found, tmp_path)}
    assert names == {"results.json", "report.md", "samples.md", "reward.png", "frontier.png", "variance.png"}
    page = (tmp_path / "report.md").read_text()
    assert "PPO" in page
    assert "## Verdicts" in page
    assert json.loads((tmp_path / "results.json").read_text())["claims"]

    def fail(*arguments, **options):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(jobs, "train", fail)
    monkeypatch.setattr(jobs.variance, "measure", fail)
    again = Study(task, SETTINGS, tmp_path, Workers(task, SETTINGS, CONSOLE)).run(methods)
    assert markdown(again) == page


@pytest.mark.takes_long("two processes import everything; what they run, one process runs in other tests")
def test_several_processes_find_the_same(texts, tmp_path):
    methods = ("grade_ste", "reinforce")
    settings = dataclasses.replace(SETTINGS, seeds=(0,), frontier_betas=(), variance_sets=1)
    build = partial(build_small, texts, tmp_path / "cache")
    task = build()
    alone = Study(task, settings, tmp_path / "one", Workers(task, settings, CONSOLE)).run(methods)
    workers = Workers(task, settings, CONSOLE, build, 2)
    together = Study(task, settings, tmp_path / "two", workers).run(methods)
    workers.close()
    assert together.variances == alone.variances
    assert [run.test for run in together.runs] == [run.test for run in alone.runs]


def test_a_run_is_repeatable(task):
    one, other = (train(task, METHODS["grade_ste"], SETTINGS, learning_rate=1e-2, beta=0.02, seed=0) for _ in range(2))
    assert one.test == other.test
    assert one.points[-1].kl > 0
    assert one.points[-1].kl == other.points[-1].kl
    start = evaluate(task.start(), task, task.test.rows(slice(8)))
    assert abs(start.kl) < 1e-5
    assert one.test["reward"] != start.reward


def test_the_demo_is_a_task(tmp_path):
    made = demo.build(tmp_path, CONSOLE, quick=True)
    start = evaluate(made.start(), made, made.test)
    assert abs(start.kl) < 1e-5
    assert 0 <= start.judged <= 1
    assert made.tokenizer.decode(made.test.ids[0]).replace("<pad> ", "").startswith("<bos>")


def test_prompts_are_new_to_everybody(texts, task):
    prompts = [set(map(tuple, part.ids.tolist())) for part in (task.train, task.validation, task.test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert (task.train.mask[:, -1] == 1).all()


def test_nothing_ends_a_completion_unless_texts_end(texts, task, tmp_path):
    endless = labelled_text.build(texts, tmp_path, CONSOLE, config=dataclasses.replace(CONFIG, ends=False))
    end = endless.tokenizer.eos_token_id
    assert task.ending.eos == (end,)
    assert endless.ending.eos == ()
    drawn = complete(endless.start(), endless, Batch(endless.test, GumbelNoise(0)))
    assert drawn.mask.all()
    assert drawn.ids.shape[1] == endless.max_new_tokens
    run = train(endless, METHODS["grade_ste"], SETTINGS, learning_rate=1e-2, beta=0.02, seed=0)
    assert run.test["tokens"] == endless.max_new_tokens


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "sentiment"), *rows])
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--data"),
        (("--text-column", "words"), "--text-column"),
        (("--positive", "good"), "--positive"),
        (("--seeds", "0"), "at least 1"),
        (("--methods", "dpo"), "dpo"),
        (("--quick",), "--data must hold more texts"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, capsys, options, message):
    data = write_csv(tmp_path / "data.csv", [("it was fine", "positive"), ("it was not", "negative")])
    named = ("--data", str(data)) if options else ()
    try:
        status = main(["--task", "csv", "--output", str(tmp_path), *named, *options])
    except SystemExit as stopped:
        status = stopped.code
    assert status
    assert message in capsys.readouterr().err


def test_hub_models_with_lora(tmp_path):
    """The code of `--task imdb` with small models in the hub's place."""
    texts = [f"w{i % 7} w{i % 5} w{i % 3} w{i % 11} w2 w{i % 13} w4 w5 w{i % 6} w7" for i in range(60)]
    tokenizer = small_tokenizer(16)
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    padded = copy.deepcopy(size)
    padded.vocab_size = 24  # rows that no token has
    for name, model in (("policy", GPT2LMHeadModel(padded)), ("reward", GPT2ForSequenceClassification(size))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    names = {"policy_name": str(tmp_path / "policy"), "reward_name": str(tmp_path / "reward")}
    made = imdb.from_reviews(
        (texts, [i % 2 for i in range(60)]), texts, tmp_path / "cache", CONSOLE, evaluation_prompts=8, **names
    )
    assert made.start().get_output_embeddings().weight.shape[0] == 16
    for method in ("grade_ste", "ppo"):
        run = train(made, METHODS[method], SETTINGS, learning_rate=1e-2, beta=0.02, seed=0)
        assert abs(run.points[0].kl) < 1e-5
        assert run.points[-1].kl > 0
    tokenizer = small_tokenizer(17)
    tokenizer.save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="vocabulary"):
        imdb.from_reviews((texts, [0] * 60), texts, tmp_path / "cache", CONSOLE, **names)
