"""Training over two gloo processes against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset

from tests.support import ROOT
from tests.support.distributed_training import SETTINGS, adapted
from tests.support.trainers import PROMPTS, build, same, stream, weights
from tests.support.training_models import policy


def launch(mode: str, path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.support.distributed_training", mode, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr


takes_long = pytest.mark.takes_long("a process imports everything; the other test of its kind decides nearly all")


@pytest.mark.parametrize("mode", ["ddp", pytest.param("ddp-stream", marks=takes_long)])
def test_two_processes_give_the_result_of_one(tmp_path, mode):
    launch(mode, tmp_path)
    result = torch.load(tmp_path / "result.pt")
    alone = build(tmp_path / "alone", dataset=stream() if mode == "ddp-stream" else None, **SETTINGS)
    alone.train()
    for name, value in weights(alone).items():
        torch.testing.assert_close(result["weights"][name], value, atol=1e-6, rtol=1e-5)
    expected = alone.state.log_history[0]
    for name in ("reward", "kl", "reward_std", "completions/mean_length", "num_tokens"):
        assert result["log"][name] == pytest.approx(expected[name], abs=1e-4)


@takes_long
def test_a_sharded_model_has_the_same_gradient(tmp_path):
    launch("fsdp", tmp_path)
    assert (tmp_path / "passed").exists()


def test_the_trainer_shards_a_model(tmp_path):
    launch("fsdp-trainer", tmp_path)
    result = torch.load(tmp_path / "result.pt")
    held_out = Dataset.from_dict({"prompt": PROMPTS})
    alone = build(tmp_path / "alone", model=policy("llama", dtype=torch.float32), eval_dataset=held_out, **SETTINGS)
    before = weights(alone)
    alone.train()
    for name, value in weights(alone).items():
        torch.testing.assert_close(result["weights"][name], value, atol=1e-6, rtol=1e-5)
    assert not same(before, weights(alone))
    for name in ("reward", "kl", "grad_norm"):
        assert result["log"][name] == pytest.approx(alone.state.log_history[1][name], abs=1e-4)
    for name in ("eval_reward", "eval_kl"):
        assert result["metrics"][name] == pytest.approx(alone.evaluate()[name], abs=1e-4)


@takes_long
def test_a_sharded_policy_has_the_same_reference(tmp_path):
    pytest.importorskip("peft")
    launch("fsdp-reference", tmp_path)
    assert (tmp_path / "passed").exists()


@takes_long
def test_two_processes_keep_the_adapter_as_it_came(tmp_path):
    pytest.importorskip("peft")
    launch("adapter", tmp_path)
    result = torch.load(tmp_path / "result.pt")
    alone = build(tmp_path / "alone", model=adapted().float(), **SETTINGS)
    alone.train()
    for name, value in weights(alone).items():
        torch.testing.assert_close(result["weights"][name], value, atol=1e-5, rtol=1e-4)
    expected = [entry["kl"] for entry in alone.state.log_history if "kl" in entry]
    assert expected[0] == 0.0 < expected[1]
    assert result["kls"] == pytest.approx(expected, abs=1e-4)
