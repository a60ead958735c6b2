"""Trainers of tiny models on twelve prompts, and what is compared of two of them."""

from __future__ import annotations

import torch
from datasets import Dataset

from grade_kernels.training import GRADEConfig, GRADETrainer
from tests.support.training_models import BagReward, policy, word_tokenizer

PROMPTS = [f"w{3 + i} w{7 + 3 * i}" + " w9" * (i % 3) for i in range(12)]


def config(path, **changes):
    defaults = {
        "output_dir": str(path), "use_cpu": True, "report_to": "none", "max_steps": 4, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "max_completion_length": 6, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "beta": 0.05, "feedback_hops": 2, "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    return GRADEConfig(**(defaults | changes))


def build(path, model=None, reward=None, dataset=None, **changes):
    others = (
        "eval_dataset", "peft_config", "callbacks", "reward_processing_classes", "processing_class", "ref_model",
        "compute_metrics", "model_init", "optimizers", "optimizer_cls_and_kwargs",
        "rollout_func",
    )  # fmt: skip
    arguments = {name: changes.pop(name) for name in others if name in changes}
    arguments.setdefault("processing_class", word_tokenizer())
    return GRADETrainer(
        model=policy("gpt2", dtype=torch.float32) if model is None else model,
        reward_funcs=BagReward(dtype=torch.float32) if reward is None else reward,
        args=config(path, **changes),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset,
        **arguments,
    )


def stream():
    """The prompts without a length, with a column of strings."""
    return Dataset.from_dict({"prompt": PROMPTS, "topic": PROMPTS}).to_iterable_dataset()


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
