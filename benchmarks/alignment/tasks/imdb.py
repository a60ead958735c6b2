"""IMDB reviews with models of the hub: a policy with LoRA, and a classifier that is fine-tuned once.

GRADE reads the policy's samples through the classifier's embeddings, so both must have one vocabulary: the classifier
is made of a small model of the policy's family (distilgpt2 for gpt2), not of DistilBERT, whose tokens are others. It
learns from the training reviews; prompts come from the test reviews, which neither model saw.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.alignment.tasks.base import Task
from grade_kernels.demo.cache import read_sealed, replace_directory
from grade_kernels.demo.config import settings_hash
from grade_kernels.training import Prompts, SequenceClassificationReward

__all__ = ["build", "from_reviews"]

PROMPT_TOKENS, MAX_NEW_TOKENS = 8, 48
REWARD_TOKENS = PROMPT_TOKENS + MAX_NEW_TOKENS  # what the classifier will be given
BATCH, LEARNING_RATE = 32, 5e-5
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def build(cache: Path, console: Console, *, policy_name: str, reward_name: str, quick: bool) -> Task:
    """The task from stanfordnlp/imdb. Downloads the data set and both models on the first call.

    Raises:
        OSError: something is neither on this machine nor to be had from the hub.
        ValueError: the reward's vocabulary is not the policy's.
    """
    from datasets import load_dataset

    reviews = load_dataset("stanfordnlp/imdb")
    train, test = (reviews[part].shuffle(seed=0) for part in ("train", "test"))
    size = 2_000 if quick else len(train)
    return from_reviews(
        (train["text"][:size], train["label"][:size]),
        test["text"][: size // 2],
        cache,
        console,
        policy_name=policy_name,
        reward_name=reward_name,
    )


def from_reviews(
    labelled: tuple[list[str], list[int]],
    prompts: list[str],
    cache: Path,
    console: Console,
    *,
    policy_name: str,
    reward_name: str,
    evaluation_prompts: int = 256,
) -> Task:
    """The task from labelled reviews (1 is positive) and reviews whose first tokens are prompts."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(policy_name)
    if AutoTokenizer.from_pretrained(reward_name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--reward must have the vocabulary of --policy {policy_name}, but {reward_name} has another")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    start: Any = AutoModelForCausalLM.from_pretrained(policy_name, dtype=torch.float32)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if start.config.vocab_size > tokens:  # rows that no token has, which no method shall sample
        start.resize_token_embeddings(tokens)
    start.to(device).eval()
    identity = settings_hash("imdb 1", policy_name, reward_name, list(labelled), prompts, evaluation_prompts, LORA)
    classifier, accuracy = _classifier(cache / f"reward-{identity}", reward_name, labelled, tokenizer, console, device)

    def policy() -> nn.Module:
        base = copy.deepcopy(start).requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
        return adapted.eval()

    encoded = tokenizer([text for text in prompts if text.strip()], truncation=True, max_length=PROMPT_TOKENS)
    # All prompts are of one length: shorter reviews are none.
    ids = torch.tensor([row for row in encoded["input_ids"] if len(row) == PROMPT_TOKENS], device=device)
    if len(ids) < 3 * evaluation_prompts:
        raise ValueError(f"prompts must be at least {3 * evaluation_prompts} reviews, got {len(ids)} long enough")
    everything = Prompts(ids, torch.ones_like(ids))
    return Task(
        name="imdb",
        identity=identity,
        start=policy,
        value_backbone=lambda: copy.deepcopy(getattr(start, start.base_model_prefix)).requires_grad_(True),
        reference=start.requires_grad_(False),
        reward=SequenceClassificationReward(classifier, label=1),
        tokenizer=tokenizer,
        train=everything.rows(slice(2 * evaluation_prompts, None)),
        validation=everything.rows(slice(evaluation_prompts)),
        test=everything.rows(slice(evaluation_prompts, 2 * evaluation_prompts)),
        max_new_tokens=MAX_NEW_TOKENS,
        notes={"policy": policy_name, "reward": reward_name, "reward model's accuracy": accuracy},
    )


def _classifier(
    directory: Path, name: str, labelled: tuple[list[str], list[int]], tokenizer: Any, console: Console, device: Any
) -> tuple[nn.Module, float]:
    """The classifier, fine-tuned on nine tenths of the reviews and measured on the rest; from `directory` if it is there.

    Inputs are blended with their neighbours in the batch, as the demo's reward model explains.
    """
    try:
        note = read_sealed(directory)
        return AutoModelForSequenceClassification.from_pretrained(directory).to(device).eval(), note["accuracy"]
    except (OSError, ValueError):
        console.print(f"Fine-tuning {name} as a classifier")
    texts, labels = labelled
    batch = tokenizer(
        texts, truncation=True, max_length=REWARD_TOKENS, padding=True, padding_side="right", return_tensors="pt"
    ).to(device)
    target = torch.tensor(labels, device=device)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, dtype=torch.float32).to(device)
    model.config.pad_token_id = tokenizer.pad_token_id
    reward = SequenceClassificationReward(model, label=1)
    model.requires_grad_(True)
    held_out = len(texts) // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(len(texts) - held_out).split(BATCH)
    for rows in track(order, "Training the classifier", console=console):
        embeds = reward.embedding[batch["input_ids"][rows]]
        weight = torch.rand(len(rows), device=device)
        embeds = torch.lerp(embeds.roll(1, dims=0), embeds, weight[:, None, None])
        blended = torch.lerp(target[rows].roll(1).float(), target[rows].float(), weight)
        loss = F.binary_cross_entropy_with_logits(reward.log_odds(embeds, batch["attention_mask"][rows]), blended)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        right = [
            (reward(reward.embedding[batch["input_ids"][rows]], batch["attention_mask"][rows]) > 0.5)
            == target[rows].bool()
            for rows in torch.arange(len(texts) - held_out, len(texts)).split(BATCH)
        ]
    accuracy = torch.cat(right).float().mean().item()
    replace_directory(directory, lambda path: model.save_pretrained(path), {"accuracy": accuracy})
    return model.eval(), accuracy
