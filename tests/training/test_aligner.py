"""Values that check themselves, the aligner that checks once, the noise plan, and the example of the trainer."""

from __future__ import annotations

import dataclasses
import re
import textwrap

import numpy
import pytest
import torch

import grade_kernels as gk
from grade_kernels.training import Aligner, Ending, GRADETrainer, Prompts, Relaxation, grade_loss
from grade_kernels.training.model import read_language_model
from grade_kernels.training.noise_plan import NoisePlan
from grade_kernels.training.reference import FrozenCopy, OtherModel
from grade_kernels.training.rewards import Objective
from tests.support.trainers import build
from tests.support.training_models import VOCAB, BagReward, policy

IDS = torch.tensor([[0, 3, 4], [5, 6, 7]])
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        ([[3]], MASK, TypeError, "input_ids must be an int64 tensor, got list"),
        (IDS.int(), MASK, TypeError, "input_ids must be an int64 tensor, got torch.int32"),
        (IDS, [[1]], TypeError, "attention_mask must be a tensor, got list"),
        (IDS[:, :0], MASK[:, :0], ValueError, r"must have shape \[B, P\] with at least one token"),
        (IDS, MASK[:, 1:], ValueError, r"input_ids' shape \(2, 3\), got \(2, 2\)"),
    ],
)
def test_prompts_check_themselves(ids, mask, error, message):
    with pytest.raises(error, match=message):
        Prompts(ids, mask)


def test_prompts_of_lists_lose_padding_that_none_needs():
    prompts = Prompts.of([[3], [4, 5], [6, 7, 8]], pad=9)
    assert prompts.ids.tolist() == [[9, 9, 3], [9, 4, 5], [6, 7, 8]]
    assert prompts.lengths.tolist() == [1, 2, 3]
    assert prompts.rows(slice(0, 2)).ids.tolist() == [[9, 3], [4, 5]]
    assert Prompts(IDS, MASK.double() * 0.5).mask.tolist() == MASK.tolist()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"estimator": "sts"}, ValueError, "estimator must be one of"),
        ({"feedback_hops": "all"}, TypeError, 'an int or "exact", got .all.'),
        ({"feedback_hops": True}, TypeError, "an int or"),
        ({"feedback_hops": -1}, ValueError, "feedback_hops must not be negative"),
        ({"eps": 1.0}, ValueError, r"eps must lie in \[0, 1\)"),
    ],
)
def test_a_relaxation_checks_itself(changes, error, message):
    with pytest.raises(error, match=message):
        Relaxation(**changes)
    with pytest.raises(error, match=message):
        dataclasses.replace(Relaxation(), **changes)


def test_a_relaxation_counts_its_sweeps():
    assert [Relaxation(feedback_hops=2).sweeps(time) for time in (1, 2, 3, 9)] == [0, 1, 2, 2]
    assert Relaxation(feedback_hops="exact").sweeps(9) == 8
    assert type(Relaxation(eps=numpy.float32(0.5), tau=numpy.float64(2)).tau) is float


def test_an_ending_checks_itself():
    assert Ending.of(4) == Ending((), 0, 4)
    assert Ending.of(4, [2, 5]) == Ending((2, 5), 2, 4)
    assert Ending.of(numpy.int64(4), numpy.int64(2), 0) == Ending((2,), 0, 4)
    with pytest.raises(TypeError, match=r"eos_token_id must be an int, several or None, got 2\.0"):
        Ending.of(4, 2.0)
    with pytest.raises(TypeError, match="max_new_tokens must be an int, got bool"):
        Ending.of(True)
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        Ending.of(0)
    with pytest.raises(ValueError, match=r"pad_token_id must lie in \[0, 7\), got 7"):
        Ending.of(4, 2, 7).check(7)


def test_completions_end_with_an_end_of_sequence():
    ids = torch.tensor([[3, 2, 0], [3, 2, 4], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    assert Ending((2, 7), 0, 3).ended(ids, mask).tolist() == [True, False, True]
    assert Ending((), 0, 3).ended(ids, mask).tolist() == [False, False, False]


def test_noise_belongs_to_a_completion_of_a_step():
    """One process of four times the batch draws what two processes draw in two batches each."""
    whole, parts = NoisePlan(3, 8, 1), [NoisePlan(3, 2, 2) for _ in range(2)]
    for step in (0, 1, 5):
        everything = whole.of(step, 0, 8)
        found = [parts[process].of(step, process, 2) for _ in range(2) for process in range(2)]
        assert torch.cat([noise.row_ids for noise in found]).tolist() == everything.row_ids.tolist() == [*range(8)]
        assert {int(noise.seed) for noise in found} == {int(everything.seed)}
    assert len({int(whole.of(step, 0, 8).seed) for step in range(50)}) == 50


def aligner(model, ending=Ending.of(5, [2], 0), **changes):  # noqa: B008, a frozen value
    return Aligner(read_language_model(model), [Objective(BagReward(dtype=torch.float32))], ending, **changes)


def test_an_aligner_gives_what_grade_loss_gives():
    model, other = policy("gpt2", dtype=torch.float32), policy("gpt2", dtype=torch.float32, seed=1)
    noise, ours = gk.GumbelNoise(7, torch.tensor([4, 1])), []
    aligned = aligner(model, reference=OtherModel(other), beta=0.2)
    for loss in (
        lambda: aligned.loss(Prompts(IDS, MASK), noise, Relaxation(0.6, "ste", 2)),
        lambda: aligned.loss(Prompts(IDS, MASK), noise, Relaxation(0.6, "ste", 2)),
        lambda: grade_loss(
            model, BagReward(dtype=torch.float32), IDS, MASK, max_new_tokens=5, noise=noise, tau=0.6, feedback_hops=2,
            ref_model=other, beta=0.2, eos_token_id=2, pad_token_id=0,
        ),
    ):  # fmt: skip
        model.zero_grad()
        out = loss()
        out.loss.backward()
        ours.append([out.loss, out.kl, out.logprobs, *(p.grad for p in model.parameters())])
    for found in ours[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ours[0], found, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, "beta must not be negative"),
        ({"beta": "0.1"}, TypeError, "beta must be a number, got str"),
        ({"ending": Ending.of(5, VOCAB)}, ValueError, "eos_token_id must lie in"),
    ],
)
def test_an_aligner_refuses_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        aligner(policy("gpt2", dtype=torch.float32), **changes)


def test_an_aligner_notices_what_training_changes():
    """A reference that shares parameters with the policy would be changed by training one that was not copied."""
    model = policy("gpt2", dtype=torch.float32)
    model.lm_head.requires_grad_(False)
    aligned = aligner(model, reference=FrozenCopy(model), beta=0.1)
    call = Prompts(IDS, MASK), gk.GumbelNoise(1), Relaxation()
    aligned.loss(*call)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="training would change the reference too"):
        aligned.loss(*call)


def test_values_of_prompts_are_checked_for_users_and_not_at_every_step(tmp_path, monkeypatch):
    """The collator checked them on the host; looking again would wait for the device."""
    checks = []
    monkeypatch.setattr(Prompts, "check_values", lambda self, vocab_size: checks.append(vocab_size))
    reads = []
    monkeypatch.setattr(
        "grade_kernels.training.trainer.read_language_model",
        lambda model, **name: reads.append(model) or read_language_model(model, **name),
    )
    trainer = build(tmp_path)
    at_start, first = len(checks), len(reads)
    trainer.train()
    assert len(checks) == at_start == 1, "the two prompts that the constructor tries"
    assert len(reads) == first, "the model was read for these two prompts and is what it was"
    grade_loss(
        trainer.model, BagReward(dtype=torch.float32), IDS, MASK, max_new_tokens=5, noise=gk.GumbelNoise(7)
    )  # fmt: skip
    assert checks[1:] == [VOCAB]


def test_the_trainer_follows_what_is_changed_between_runs(tmp_path):
    """Its aligner is made anew where a setting or a reward is another one, and stays where nothing is."""
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    used = trainer._aligner
    assert trainer._aligner_of(used.policy.whole) is used
    changes = [
        lambda: setattr(trainer.args, "max_completion_length", 4),
        lambda: setattr(trainer.args, "beta", 0.3),
        lambda: setattr(trainer.args, "mask_truncated_completions", True),
        lambda: setattr(trainer, "objectives", [dataclasses.replace(trainer.objectives[0], weight=2.0)]),
        lambda: setattr(trainer, "reference", FrozenCopy(trainer.model)),
    ]
    for change in changes:
        change()
        made = trainer._aligner_of(used.policy.whole)
        assert made is not used
        used = made
    assert (used.ending.max_new_tokens, used.criterion.beta, used.skip_truncated) == (4, 0.3, True)
    assert used.criterion.objectives[0].weight == 2.0
    assert isinstance(used.reference, FrozenCopy)


def test_the_example_of_the_trainer_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (block,) = re.findall(r"```python\n(.*?)```", GRADETrainer.__doc__, re.DOTALL)
    names: dict[str, object] = {}
    exec(textwrap.dedent(block), names)
    assert len(names["rewards"]) == 20
