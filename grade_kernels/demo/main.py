"""The demo from top to bottom: corpus, two models, alignment, report."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from transformers import logging as transformers_logging

from grade_kernels.demo import report, speed
from grade_kernels.demo.align import Record, align, build_trainer
from grade_kernels.demo.cache import replace_directory
from grade_kernels.demo.config import DemoConfig, settings_hash
from grade_kernels.demo.corpus import build_corpus
from grade_kernels.demo.models import train_or_load_policy, train_or_load_reward
from grade_kernels.demo.report import DemoResult
from grade_kernels.demo.tokenizer import build_tokenizer

__all__ = ["run_demo"]


def run_demo(
    config: DemoConfig,
    *,
    fresh: bool = False,
    console: Console | None = None,
    on_step: Callable[[Record], None] | None = None,
) -> DemoResult:
    """Align a small language model by backpropagation through its own samples, and report.

    Leaves in `config.output_dir`: `results.json`, `reward.png`, the aligned policy in `aligned-policy/` (for
    `from_pretrained`), the checkpoint of the alignment, and the trained models in `cache/`. A second call with the same
    config finds the results and prints them; after an interruption it continues.

    Args:
        config: all settings; `DemoConfig.tiny()` takes seconds.
        fresh: forget the alignment of this config and start it over. The trained models stay.
        console: where to print. Default: standard output.
        on_step: called with the record of each step of alignment.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came during the alignment, which is saved up to that step.
        ValueError: the output directory holds more steps of this alignment than the config asks for.
    """
    console = console or Console()
    transformers_logging.disable_progress_bar()  # one for every file that is written, across ours
    output = config.output_dir
    identity = _identity(config)
    checkpoints = output / f"alignment-{identity}"
    results = output / "results.json"
    if fresh:
        shutil.rmtree(checkpoints, ignore_errors=True)
        results.unlink(missing_ok=True)
    elif (finished := _finished(results, identity, config.align.steps)) is not None:
        console.print(f"This run is finished; its results are in {results}. Start over with --fresh.")
        report.print_report(finished, config.samples, console)
        return finished

    (output / "cache").mkdir(parents=True, exist_ok=True)  # whoever may not write there hears it before the training
    with _one_thread():
        corpus = build_corpus(config.corpus)
        tokenizer = build_tokenizer(corpus.words())
        console.print(
            f"Corpus: {len(corpus.policy_reviews):,} reviews for the policy, {len(corpus.reward_reviews):,} for the "
            f"reward model, {len(corpus.test_prompts)} test prompts, {len(tokenizer)} words"
        )
        policy, policy_note = train_or_load_policy(output / "cache", config.policy, corpus, tokenizer, console)
        console.print(f"Policy: perplexity {policy_note['perplexity']:.2f} on reviews of unseen prompts")
        reward_model, reward_note = train_or_load_reward(output / "cache", config.reward, corpus, tokenizer, console)
        console.print(f"Reward model: accuracy {reward_note['accuracy']:.1%} on reviews of unseen prompts")

        start = copy.deepcopy(policy)
        trainer = build_trainer(
            policy, reward_model, tokenizer, corpus.train_prompts, config.align, seed=config.seed, directory=checkpoints
        )
        before = report.evaluate(trainer, start, corpus.test_prompts)
        records = align(trainer, console=console, on_step=on_step)
        console.print("Measuring: test prompts, then the sampling layer against plain PyTorch")
        after = report.evaluate(trainer, start, corpus.test_prompts)

    result = DemoResult(
        identity=identity,
        steps=config.align.steps,
        policy_perplexity=policy_note["perplexity"],
        reward_accuracy=reward_note["accuracy"],
        prompts=list(corpus.test_prompts),
        before=before,
        after=after,
        records=records,
        speeds=[speed.measure(*shape, config.speed.repeats) for shape in config.speed.shapes],
    )

    def write_policy(path: Path) -> None:
        policy.save_pretrained(path)
        tokenizer.save_pretrained(path)

    replace_directory(output / "aligned-policy", write_policy, {"identity": identity, "steps": config.align.steps})
    report.draw(output / "reward.png", result)
    report.save_result(results, result)  # last, because its presence says that all the rest is there
    report.print_report(result, config.samples, console)
    console.print(f"Saved in {output}: results.json, reward.png, aligned-policy")
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small gain little from a second core, and lose tenfold when something else holds it.

    It also makes the result the same whatever the number of cores, because sums keep their order. The sampling layer is
    measured outside, with all threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _identity(config: DemoConfig) -> str:
    """A name for the alignment: everything it depends on except how far it goes, so that more steps continue it."""
    align_settings = dataclasses.asdict(config.align) | {"steps": None, "checkpoint_every": None}
    return settings_hash("alignment 2", config.seed, config.corpus, config.policy, config.reward, align_settings)


def _finished(path: Path, identity: str, steps: int) -> DemoResult | None:
    try:
        result = report.load_result(path)
    except (OSError, ValueError):
        return None
    return result if (result.identity, result.steps) == (identity, steps) else None
