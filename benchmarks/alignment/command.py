"""The command line: `python -m benchmarks.alignment --help`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.alignment.jobs import Workers
from benchmarks.alignment.methods import METHODS
from benchmarks.alignment.report import markdown, write_report
from benchmarks.alignment.settings import Settings
from benchmarks.alignment.study import Study
from benchmarks.alignment.tasks import Task
from grade_kernels.demo import positive

TASKS = ("demo", "csv", "imdb")


def parser() -> argparse.ArgumentParser:
    """All options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment",
        description="GRADE and GRADE-STE against REINFORCE and PPO on equal budgets. A run that finished is a file in "
        "the output folder and is not repeated: the same command goes on where it was stopped.",
    )
    found.add_argument("--task", choices=TASKS, default="demo", help="default: %(default)s")
    found.add_argument("--quick", action="store_true", help="everything small: minutes, and no conclusions")
    found.add_argument("--seeds", type=positive, help="how many seeds (default: 3, with --quick 2)")
    found.add_argument("--steps", type=positive, help="optimiser steps of a run")
    found.add_argument("--prompts", type=positive, help="prompts a step, of 4 completions each (default: 8)")
    found.add_argument("--learning-rates", type=float, nargs="+", help="the short list that every method chooses from")
    found.add_argument(
        "--methods", type=_methods, default=tuple(METHODS), metavar="A,B", help=f"among {', '.join(METHODS)}"
    )
    found.add_argument(
        "--workers",
        type=positive,
        default=_default_workers(),
        help="runs at a time, on one thread each (default: one per core, at most 8; with a GPU one)",
    )
    found.add_argument(
        "--output",
        type=Path,
        help="default: bench-output/alignment-TASK, with -no-end and -quick behind it where asked for",
    )
    text = found.add_argument_group("--task csv")
    text.add_argument("--data", type=Path, help="a CSV file with a header")
    text.add_argument("--text-column", default="text", help="default: %(default)s")
    text.add_argument("--label-column", default="sentiment", help="default: %(default)s")
    text.add_argument("--positive", nargs="+", default=["positive"], help="labels that are wanted")
    text.add_argument("--negative", nargs="+", default=["negative"], help="labels that are not wanted")
    text.add_argument("--no-end", action="store_true", help="all completions are equally long: nothing ends them")
    hub = found.add_argument_group("--task imdb (needs the hub, preferably a GPU)")
    hub.add_argument("--policy", default="gpt2", help="a causal language model (default: %(default)s)")
    hub.add_argument("--reward", default="distilgpt2", help="what the reward is made of; it must have the policy's "
                     "vocabulary (default: %(default)s)")  # fmt: skip
    return found


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else min(cores, 8)


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(METHODS)}, got {', '.join(unknown)}")
    return names


def build_task(options: argparse.Namespace, output: Path, *, quiet: bool) -> Task:
    """The task that was asked for, with models trained or taken from the output folder's cache."""
    cache, console = output / "cache", Console(quiet=quiet)
    if options.task == "demo":
        from benchmarks.alignment.tasks import demo

        return demo.build(cache, console, quick=options.quick)
    if options.task == "csv":
        from benchmarks.alignment.tasks import labelled_text

        if options.data is None:
            raise ValueError("--data must name a CSV file for --task csv")
        texts = labelled_text.read_csv(
            options.data, text_column=options.text_column, label_column=options.label_column,
            positive=options.positive, negative=options.negative,
        )  # fmt: skip
        make = labelled_text.TextConfig.quick if options.quick else labelled_text.TextConfig
        return labelled_text.build(texts, cache, console, config=make(ends=not options.no_end))
    from benchmarks.alignment.tasks import imdb

    return imdb.build(cache, console, policy_name=options.policy, reward_name=options.reward, quick=options.quick)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write its report; returns the exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    output = options.output or Path("bench-output") / "-".join(
        ["alignment", options.task, *["no-end"] * options.no_end, *["quick"] * options.quick]
    )
    settings = Settings.quick() if options.quick else Settings()
    asked = {
        "seeds": None if options.seeds is None else tuple(range(options.seeds)),
        "steps": options.steps,
        "prompts": options.prompts,
        "learning_rates": None if options.learning_rates is None else tuple(options.learning_rates),
    }
    settings = dataclasses.replace(settings, **{name: value for name, value in asked.items() if value is not None})
    # One thread: sums keep their order whatever the machine, and models this small gain nothing from a second.
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        task = build_task(options, output, quiet=False)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"benchmarks.alignment: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workers = Workers(task, settings, console, partial(build_task, options, output, quiet=True), options.workers)
    study = Study(task, settings, output, workers)
    try:
        study.run(options.methods)
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command goes on with the runs it was in; this report is of the others.\n")
        status = 130
    finally:
        workers.close()
    results = study.results
    files = write_report(results, output)
    console.print(Markdown(markdown(results)))
    console.print("Written: " + ", ".join(map(str, files)))
    return status
