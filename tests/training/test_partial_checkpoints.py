"""Resuming from checkpoints that another trainer wrote, or that lack files: refused with the reason, or as far as they go."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import peft
import transformers as tf
from datasets import Dataset

from grade_kernels.training import checkpoints, command
from tests.support.trainers import build, same, weights
from tests.support.training_models import classifier, policy, word_tokenizer

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
LOST = {
    "optimizer": ["optimizer.pt"],
    "schedule": ["scheduler.pt"],
    "both": ["optimizer.pt", "scheduler.pt"],
    "random states": ["rng_state.pth"],
    "all of it": ["optimizer.pt", "scheduler.pt", "rng_state.pth"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    trainer = build(path, **SAVING)
    trainer.train()
    return path, trainer


def copied(run, tmp_path):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("lost", list(LOST))
@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint_without_the_optimizers_files(run, tmp_path, lost, sealed, caplog):
    folder = copied(run, tmp_path)
    for name in LOST[lost]:
        (folder / name).unlink()
    if not sealed:
        (folder / checkpoints.SEAL).unlink()
    with pytest.raises(ValueError, match="allow_partial_checkpoint=True resumes from what is there") as error:
        build(tmp_path, **SAVING).train(resume_from_checkpoint=str(folder))
    listed = [name for name in LOST[lost] if name != "rng_state.pth"]  # which no step depends on
    assert any(name in str(error.value) for name in LOST[lost]) or not (listed or sealed)
    assert ("another trainer wrote it" in str(error.value)) == (not sealed)
    assert "never completed" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, allow_partial_checkpoint=True, **SAVING)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert logged(trainer, "reward")[:3] == logged(run[1], "reward")[:3], "the weights and the step are the saved ones"
    assert logged(trainer, "learning_rate") == logged(run[1], "learning_rate"), "the schedule goes on"
    said = [record.getMessage() for record in caplog.records if "begins anew" in record.getMessage()]
    assert bool(said) == bool(listed)
    assert all(name in said[0] for name in listed)
    assert same(weights(trainer), weights(run[1])) == (not listed)


def test_a_checkpoint_of_another_trainer(run, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            row = torch.arange(3, 9) + i
            return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}

    settings = tf.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=2, logging_steps=1,
    )  # fmt: skip
    other = tf.Trainer(policy("gpt2", dtype=torch.float32), settings, train_dataset=Rows())
    other.train()
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(
        ValueError, match=f"it has no {checkpoints.SEAL}, so another trainer wrote it, or that file was"
    ):
        build(tmp_path, **SAVING).train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match=r"No sound checkpoint .*\(found checkpoint-2\)"):
        build(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    steps = json.loads((folder / "trainer_state.json").read_text())
    steps |= {"logging_steps": 500, "save_steps": 500, "eval_steps": 500}
    (folder / "trainer_state.json").write_text(json.dumps(steps))
    trainer = build(
        tmp_path, allow_partial_checkpoint=True, max_steps=3, eval_strategy="steps", eval_steps=3, save_strategy="steps",
        save_steps=3, eval_dataset=[{"prompt": "w3"}],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 3
    assert len(logged(trainer, "kl")) == len(logged(trainer, "eval_kl")) == 1, "this run's steps, not that trainer's"
    assert (tmp_path / "checkpoint-3").is_dir()
    assert logged(trainer, "kl")[0] > 0, "the reference is the model as it was given"


def spoil(folder, how):
    if how == "weights gone":
        (folder / "model.safetensors").unlink()
    elif how == "state gone":
        (folder / "trainer_state.json").unlink()
    elif how == "weights cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "state cut":
        (folder / "trainer_state.json").write_text("{")
    elif how == "shard gone":
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("how", "message", "unsealed_message"),
    [
        ("weights gone", "model.safetensors is missing", "holds no weights"),
        ("state gone", "trainer_state.json is missing", "no trainer_state.json, which says at which step"),
        ("weights cut", "model.safetensors has .* bytes instead of", "model.safetensors can not be read"),
        ("state cut", "trainer_state.json has 1 bytes instead of", "trainer_state.json can not be read"),
        ("shard gone", "model.safetensors is missing", "model-00001-of-00002.safetensors is missing, which"),
    ],
)
def test_damage_is_refused_whatever_is_asked_for(run, tmp_path, how, sealed, message, unsealed_message):
    folder = copied(run, tmp_path)
    spoil(folder, how)
    if not sealed:
        (folder / checkpoints.SEAL).unlink()
    with pytest.raises(ValueError, match=message if sealed else unsealed_message):
        build(tmp_path, allow_partial_checkpoint=True, **SAVING).train(resume_from_checkpoint=str(folder))


def test_optimizer_files_that_are_there_must_be_whole(run, tmp_path):
    folder = copied(run, tmp_path)
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"optimizer.pt has \d+ bytes instead of"):
        build(tmp_path, allow_partial_checkpoint=True, **SAVING).train(resume_from_checkpoint=str(folder))


def test_the_checkpoint_before_is_taken_where_the_last_may_not_be_partial(run, tmp_path):
    copied(run, tmp_path)
    shutil.copytree(run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = build(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer), weights(run[1]))


def test_weights_alone_that_were_saved_so_are_a_partial_checkpoint(tmp_path, caplog):
    build(tmp_path, save_only_model=True, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    for choice in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(
            ValueError,
            match=r"without optimizer\.pt and scheduler\.pt \(save_only_model\).*allow_partial_checkpoint=True",
        ):
            build(tmp_path, **SAVING).train(resume_from_checkpoint=choice)
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, allow_partial_checkpoint=True, **SAVING)
        trainer.train(resume_from_checkpoint=True)
    assert any("has no optimizer.pt and no scheduler.pt" in record.getMessage() for record in caplog.records)
    assert logged(trainer, "learning_rate")[2:] == pytest.approx([0.005, 0.0025])


def test_where_no_checkpoint_is_sound_each_says_why(run, tmp_path, caplog):
    copied(run, tmp_path)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=r"checkpoint-2: optimizer\.pt is missing.*allow_partial_checkpoint=True"),
    ):
        build(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert "trying the one before" not in caplog.text, "there is none"
    shutil.copytree(run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-4: model\.safetensors is missing.*checkpoint-2: optimizer\.pt is"
    ):
        build(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert "checkpoint-4 can not be resumed from: model.safetensors is missing; trying the one before" in caplog.text
    assert caplog.text.count("trying the one before") == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "training_args.bin", "grade_reference.json", "config.json"])
def test_files_that_resuming_does_not_read_may_be_gone(run, tmp_path, name):
    (copied(run, tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.*allow_partial_checkpoint=True"):
        build(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    trainer = build(tmp_path, allow_partial_checkpoint=True, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer), weights(run[1]))


def adapted():
    """A policy whose adapter is trained already, so that its reference is a frozen copy of it."""
    made = peft.get_peft_model(
        policy("gpt2", dtype=torch.float32), peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * parameter.requires_grad
    return made


def test_an_adapters_checkpoint_needs_more(tmp_path):
    full = build(tmp_path, model=adapted(), **SAVING)
    full.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    folder = tmp_path / "checkpoint-2"
    for name in ("adapter_config.json", "grade_reference.safetensors", "adapter_model.safetensors"):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is missing") as error:
            build(tmp_path, model=adapted(), allow_partial_checkpoint=True, **SAVING).train(resume_from_checkpoint=True)
        assert "allow_partial_checkpoint" not in str(error.value)
        (tmp_path / name).rename(folder / name)
    (folder / "grade_reference.json").unlink()  # whose values are there
    trainer = build(tmp_path, model=adapted(), allow_partial_checkpoint=True, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert logged(trainer, "kl") == logged(full, "kl")


def test_a_schedule_that_goes_by_a_metric_stays():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.5)
    checkpoints.advance(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    checkpoints.advance(None, 5)


def test_the_command_line_resumes_from_what_is_there(run, tmp_path, capsys):
    for name, model in (
        ("policy", policy("gpt2", dtype=torch.float32)),
        ("judge", classifier("gpt2", dtype=torch.float32)),
    ):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    Dataset.from_dict({"prompt": ["w3 w4", "w5"]}).to_json(tmp_path / "prompts.jsonl")
    words = [
        "--model", str(tmp_path / "policy"), "--reward", str(tmp_path / "judge"), "--dataset",
        str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--save_steps", "2",
        "--max_completion_length", "4", "--use_cpu", "--disable_tqdm", "True", "--report_to", "none",
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    assert command.run(words) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    assert command.run([*words, "--resume"]) == 1
    assert "No sound checkpoint" in capsys.readouterr().err
    assert command.run([*words, "--resume", "--allow_partial_checkpoint"]) == 0
    assert command.run([*words, "--num_iterations", "2"]) == 1
    assert "there is no setting num_iterations: every step draws its own" in capsys.readouterr().err
    assert command.run([*words, "--ref_model", str(tmp_path / "policy")]) == 0
