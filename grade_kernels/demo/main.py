"""The demo from top to bottom: corpus, two models, alignment, report."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from grade_kernels.demo import report, speed
from grade_kernels.demo.align import Record, align
from grade_kernels.demo.cache import replace_directory
from grade_kernels.demo.config import DemoConfig, settings_hash
from grade_kernels.demo.corpus import build_corpus
from grade_kernels.demo.models import train_or_load_policy, train_or_load_reward
from grade_kernels.demo.report import DemoResult
from grade_kernels.demo.tokenizer import build_tokenizer, encode_prompts

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
        DemoInterrupted: SIGINT or SIGTERM came during the alignment, which is saved up to that step.
        ValueError: the output directory holds more steps of this alignment than the config asks for.
    """
    console = console or Console()
    output = config.output_dir
    identity = _identity(config)
    checkpoint = output / f"alignment-{identity}.pt"
    results = output / "results.json"
    if fresh:
        checkpoint.unlink(missing_ok=True)
        results.unlink(missing_ok=True)
    elif (finished := _finished(results, identity, config.align.steps)) is not None:
        console.print(f"This run is finished; its results are in {results}. Start over with --fresh.")
        report.print_report(finished, config.samples, console)
        return finished

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

        reference = copy.deepcopy(policy).requires_grad_(False)
        records = align(
            policy,
            reference,
            reward_model,
            encode_prompts(tokenizer, corpus.train_prompts),
            config.align,
            seed=config.seed,
            checkpoint=checkpoint,
            identity=identity,
            console=console,
            on_step=on_step,
        )

        console.print("Measuring: test prompts, then the sampling layer against plain PyTorch")
        before, after = (
            report.evaluate(
                model,
                reference,
                reward_model,
                tokenizer,
                corpus.test_prompts,
                max_new_tokens=config.align.max_new_tokens,
                seed=config.seed + 2**32,  # not the noise of training
            )
            for model in (reference, policy)
        )

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
    return settings_hash("alignment 1", config.seed, config.corpus, config.policy, config.reward, align_settings)


def _finished(path: Path, identity: str, steps: int) -> DemoResult | None:
    try:
        result = report.load_result(path)
    except (OSError, ValueError):
        return None
    return result if (result.identity, result.steps) == (identity, steps) else None
