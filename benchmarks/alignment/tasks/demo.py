"""The demo's corpus of reviews: a grammar writes them, and can read whether a completion really is positive."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.alignment.tasks.base import Task
from grade_kernels.demo.config import DemoConfig, settings_hash
from grade_kernels.demo.corpus import POSITIVE, build_corpus, verdict_of
from grade_kernels.demo.models import train_or_load_policy, train_or_load_reward
from grade_kernels.demo.tokenizer import build_tokenizer, with_start
from grade_kernels.training import Prompts

__all__ = ["build"]


def build(cache: Path, console: Console, *, quick: bool) -> Task:
    """The demo's models, trained once and kept in `cache`; with `quick`, those of `grade-kernels demo --tiny`."""
    config = DemoConfig.tiny() if quick else DemoConfig()
    corpus = build_corpus(config.corpus)
    tokenizer = build_tokenizer(corpus.words())
    policy, policy_note = train_or_load_policy(cache, config.policy, corpus, tokenizer, console)
    reward, reward_note = train_or_load_reward(cache, config.reward, corpus, tokenizer, console)

    def prompts(texts: Sequence[str]) -> Prompts:
        rows = tokenizer([with_start(text) for text in texts], add_special_tokens=False)["input_ids"]
        return Prompts.of(rows, int(tokenizer.pad_token_id))  # type: ignore[arg-type]

    return Task(
        name="demo",
        identity=settings_hash(config.policy, config.reward, corpus.fingerprint(), config.align.max_new_tokens),
        start=lambda: copy.deepcopy(policy),
        value_backbone=lambda: copy.deepcopy(policy.transformer),
        reference=copy.deepcopy(policy).requires_grad_(False),
        reward=reward,
        tokenizer=tokenizer,
        train=prompts(corpus.train_prompts),
        validation=prompts(corpus.validation_prompts),
        test=prompts(corpus.test_prompts),
        max_new_tokens=config.align.max_new_tokens,
        notes={
            "policy parameters": policy.num_parameters(),
            "vocabulary": len(tokenizer),
            "start policy's perplexity": policy_note["perplexity"],
            "reward model's accuracy": reward_note["accuracy"],
        },
        judge=lambda completion: verdict_of(completion) == POSITIVE,
    )
