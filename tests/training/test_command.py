"""`grade-kernels train`: settings from file and command line, local data, and going on."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from grade_kernels.cli import main
from grade_kernels.training import GRADETrainer, command, foreign_names
from tests.support.training_models import classifier, policy, word_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name, model in (
        ("policy", policy("gpt2", dtype=torch.float32)),
        ("judge", classifier("bert", dtype=torch.float32)),
    ):
        model.save_pretrained(path / name)
        word_tokenizer().save_pretrained(path / name)
    prompts = [f"w{i} w{i + 1}" for i in range(3, 19)]
    (path / "prompts.jsonl").write_text("\n".join(json.dumps({"text": p, "kind": "a"}) for p in prompts))
    (path / "prompts.csv").write_text("prompt\n" + "\n".join(prompts))
    return path


def settings(models, tmp_path, **changes):
    values = {
        "model": str(models / "policy"), "dataset": str(models / "prompts.csv"), "reward": str(models / "judge"),
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "max_steps": 2, "save_steps": 1,
        "per_device_train_batch_size": 4, "max_completion_length": 5, "feedback_hops": "exact", "disable_tqdm": True,
    } | changes  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return ["train", "--config", str(path)]


def test_a_yaml_file_trains_evaluates_saves_and_resumes(models, tmp_path, capsys):
    arguments = settings(models, tmp_path, eval_dataset=str(models / "prompts.csv"))
    assert main([*arguments, "--per_device_eval_batch_size", "8"]) == 0
    assert "eval_reward" in capsys.readouterr().out
    for name in ("model.safetensors", "tokenizer.json", "README.md", "checkpoint-2"):
        assert (tmp_path / "out" / name).exists()
    assert main([*arguments, "--max_steps", "3", "--resume"]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == []
    assert state["global_step"] == 3


def test_an_adapter_and_a_column_by_another_name(models, tmp_path):
    arguments = settings(models, tmp_path, dataset=str(models / "prompts.jsonl"), max_steps=1)
    flags = ["--prompt_column", "text", "--lora_r", "2", "--lora_target_modules", "c_attn", "--reward_label", "LABEL_0"]
    assert main([*arguments, *flags]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_command_line_overrides_the_file(models, tmp_path):
    arguments, config = command.parse([*settings(models, tmp_path)[1:], "--tau", "0.7", "--feedback_hops", "3"])
    assert arguments.reward == [str(models / "judge")]
    assert (config.tau, config.feedback_hops, config.max_steps) == (0.7, 3, 2)
    assert command.parse(settings(models, tmp_path)[1:])[1].feedback_hops == "exact"


def test_bad_settings_are_named(models, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"settings that do not exist: \['temprature'\]"):
        command.parse(settings(models, tmp_path, temprature=1.0)[1:])
    broken = tmp_path / "broken.yaml"
    broken.write_text('{"tau": 1}\n{"tau": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.yaml is no YAML"):
        command.parse(["--config", str(broken)])
    broken.write_bytes(b"tau: \x80")
    with pytest.raises(ValueError, match=r"broken\.yaml is no YAML"):
        command.parse(["--config", str(broken)])
    with pytest.raises(SystemExit):
        main(["train", "--model", "gpt2"])
    assert "--dataset" in capsys.readouterr().err
    arguments, _ = command.parse(settings(models, tmp_path, prompt_column="question")[1:])
    with pytest.raises(ValueError, match="'question' is not among the columns"):
        command.read_dataset(arguments.dataset, arguments, "train")
    (tmp_path / "prompts.txt").write_text("w3")
    with pytest.raises(ValueError, match=r"got prompts\.txt"):
        command.read_dataset(str(tmp_path / "prompts.txt"), arguments, "train")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, foreign.reason)
            for name, foreign in foreign_names.ARGUMENTS.items()
            if name not in ("tokenizer", "ref_adapter_name")
        ),
        *((name, foreign.reason) for name, foreign in foreign_names.SETTINGS.items()),
        ("compute_metrics", "it is an argument of trainers in Python; the command line has nothing in its place"),
        ("callbacks", "it is an argument of trainers in Python; the command line has nothing in its place"),
        ("model_init", "it is an argument of trainers in Python; the command line has nothing in its place"),
        ("quantization_config", "in Python; the command line has it in model_init_kwargs"),
        ("reward_funcs", "in Python; the command line has reward"),
        ("train_dataset", "in Python; the command line has dataset and dataset_split"),
        ("peft_config", "in Python; the command line has lora_r"),
        ("tokenizer", "in Python; the tokenizer saved with the model is taken"),
    ],
)
def test_a_name_that_is_not_served_is_refused_with_its_reason(models, tmp_path, name, reason):
    with pytest.raises(ValueError, match=rf"do not exist: \['{name}'\] \({name}: .*{re.escape(reason)}"):
        command.parse(settings(models, tmp_path, **{name: "x"})[1:])
    with pytest.raises(ValueError, match=rf"there is no setting {name}: .*{re.escape(reason)}"):
        command.parse([*settings(models, tmp_path)[1:], f"--{name}", "x"])


def test_the_file_means_what_the_command_line_does(models, tmp_path):
    changes = {
        "disable_dropout": False, "save_strategy": False, "max_steps": 3, "lora_target_modules": "c_attn",
        "reward_weights": 2, "feedback_hops": 1, "reward_label": 0, "logging_nan_inf_filter": False,
    }  # fmt: skip
    arguments, config = command.parse(settings(models, tmp_path, **changes)[1:])
    assert (config.disable_dropout, config.logging_nan_inf_filter, config.save_strategy) == (False, False, "no")
    assert (config.max_steps, config.feedback_hops) == (3, 1)
    assert (arguments.lora_target_modules, arguments.reward_label) == (["c_attn"], "0")
    assert command.parse([*settings(models, tmp_path, **changes)[1:], "--disable_dropout"])[1].disable_dropout
    with pytest.raises(SystemExit):
        command.parse(settings(models, tmp_path, max_steps=1.5)[1:])


def test_parts_of_a_file_and_files_that_can_not_be_read(models, tmp_path):
    arguments, _ = command.parse(settings(models, tmp_path)[1:])
    assert len(command.read_dataset(arguments.dataset, arguments, "train[:25%]")) == 4
    (tmp_path / "broken.jsonl").write_text('{"prompt": "w3"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("")
    for source, split, reason in (
        (arguments.dataset, "test", 'Unknown split "test"'),
        (str(tmp_path / "broken.jsonl"), "train", "JSON parse error"),
        (str(tmp_path / "empty.jsonl"), "train", "it holds nothing"),
    ):
        with pytest.raises(ValueError, match=f"can not be loaded: .*{reason}"):
            command.read_dataset(source, arguments, split)


def test_a_checkpoint_by_name_is_resumed_from(models, tmp_path):
    arguments = settings(models, tmp_path)
    assert main(arguments) == 0
    first = str(tmp_path / "out" / "checkpoint-1")
    assert main([*arguments, "--resume_from_checkpoint", first, "--output_dir", str(tmp_path / "more")]) == 0
    assert not (tmp_path / "more" / "checkpoint-1").exists()
    weights = [(tmp_path / run / "checkpoint-2" / "model.safetensors").read_bytes() for run in ("out", "more")]
    assert weights[0] == weights[1]


def test_what_can_not_be_loaded_is_named_in_one_line(models, tmp_path, capsys):
    """Offline, as conftest.py has the libraries be, which decide it when they are imported."""
    for changes, words in (
        (
            {"model": "nobody/nothing"},
            "model 'nobody/nothing' was not found as a directory here or as a name on the hub",
        ),
        ({"reward": "nobody/nothing"}, "reward 'nobody/nothing' was not found"),
        ({"dataset": "nobody/nothing"}, "dataset 'nobody/nothing' (split 'train') can not be loaded"),
        ({"dataset": "nothing.csv"}, "dataset 'nothing.csv' does not exist"),
        ({"tau": -1.0}, "tau must be positive"),
    ):
        assert main(settings(models, tmp_path, **changes)) == 1
        assert f"grade-kernels train: {words}" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        GRADETrainer, "training_step", lambda self, *args: os.kill(os.getpid(), signal.SIGINT) or torch.zeros(())
    )
    assert main(settings(models, tmp_path)) == 130
    assert (
        "SIGINT stopped training after step 1, which is saved. The same command with --resume"
        in capsys.readouterr().err
    )


def test_what_stops_training_is_said_in_one_line(models, tmp_path, capsys):
    arguments = settings(models, tmp_path)
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    assert main([*arguments, "--resume"]) == 1
    assert "grade-kernels train: No sound checkpoint in " in capsys.readouterr().err


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "--feedback_hops" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "train" in capsys.readouterr().out
