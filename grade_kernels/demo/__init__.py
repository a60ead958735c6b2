"""A language model aligned by backpropagation through its own samples, on a laptop, in minutes.

`grade-kernels demo` on the command line, `run_demo(DemoConfig())` from Python. Importing this package imports neither
torch nor anything of the `demo` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from grade_kernels.demo.config import DemoConfig

if TYPE_CHECKING:
    from rich.console import Console

    from grade_kernels.demo.align import Record
    from grade_kernels.demo.report import DemoResult

__all__ = ["DemoConfig", "add_arguments", "run", "run_demo"]

_NEEDED = ("transformers", "accelerate", "tokenizers", "safetensors", "rich", "matplotlib", "psutil", "numpy")


def run_demo(
    config: DemoConfig,
    *,
    fresh: bool = False,
    console: Console | None = None,
    on_step: Callable[[Record], None] | None = None,
) -> DemoResult:
    """Run the demo; see `grade_kernels.demo.main.run_demo`.

    Raises:
        ModuleNotFoundError: a package of the `demo` extra is missing; the message says how to install it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'The demo needs {", ".join(missing)}: pip install "grade-kernels[demo]"', name=missing[0]
        )
    from grade_kernels.demo import main

    return main.run_demo(config, fresh=fresh, console=console, on_step=on_step)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument("--output-dir", type=Path, default=DemoConfig.output_dir, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, help="steps of alignment; more than before continues a run")
    parser.add_argument("--seed", type=int, default=0, help="of the alignment: prompts and noise (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="everything small: a check that takes seconds")
    parser.add_argument("--fresh", action="store_true", help="start the alignment over; trained models stay cached")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the demo as `add_arguments` describes it; returns the exit status."""
    changes = {"output_dir": arguments.output_dir, "seed": arguments.seed}
    try:
        config = DemoConfig.tiny(**changes) if arguments.tiny else DemoConfig(**changes)
        if arguments.steps is not None:
            config = dataclasses.replace(config, align=dataclasses.replace(config.align, steps=arguments.steps))
        run_demo(config, fresh=arguments.fresh)
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command continues from the last checkpoint.\n")
        return 128 + signal.SIGINT
    except SystemExit as stop:  # TrainingInterrupted, which can not be named here without importing torch
        sys.stderr.write(f"\n{stop}. The same command continues.\n")
        return int(stop.code or 0)
    except (ModuleNotFoundError, OSError, ValueError) as error:  # OSError: a folder that can't be written, a full disk
        if isinstance(error, ModuleNotFoundError) and error.name not in _NEEDED:
            raise
        sys.stderr.write(f"grade-kernels demo: {error}\n")
        return 1
    return 0
