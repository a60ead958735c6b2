"""`grade-kernels inspect`: what the Triton kernels compile to, for every target and without a GPU."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from grade_kernels.inspection import report
from grade_kernels.inspection.configurations import TARGETS
from grade_kernels.inspection.inspector import inspect, select
from grade_kernels.inspection.limits import violations

__all__ = ["add_arguments", "run"]

_PICTURES = (".png", ".svg", ".pdf")
_WIDTH = 220  # of the tables where nobody looks at a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--target", nargs="+", choices=TARGETS, metavar="TARGET", help=f"some of {' '.join(TARGETS)}")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="names or patterns of 'name dtype configuration'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--status", type=Path, metavar="FILE", help="write there how many builds of each kernel are as they should be"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw rooflines there (png, svg, pdf)")


def run(arguments: argparse.Namespace) -> int:
    """Inspect and report; returns 1 if a kernel does worse than it may, else 0."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    try:
        tasks = select(arguments.target, arguments.kernel)
        _check_files(arguments)
    except ValueError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 2
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("compiling", total=len(tasks))
        found = inspect(tasks, done=lambda _: progress.advance(bar))
    results = [(build, figures) for (build, _), figures in zip(tasks, found, strict=True)]
    for target in dict.fromkeys(figures.target for figures in found):
        console.print(report.table(results, target))
        if (both := report.ways_table(results, target)) is not None:
            console.print(both)
    if arguments.json is not None:
        report.write_json(arguments.json, results)
    if arguments.status is not None:
        report.write_status(arguments.status, results)
    if arguments.plot is not None:
        try:
            report.write_plot(arguments.plot, results)
        except ValueError as error:
            console.print(f"[red]{error}[/red]", highlight=False)
            return 2
    worse = [words for build, figures in results for words in violations(build, figures)]
    for words in worse:
        console.print(f"[red]{words}[/red]", highlight=False)
    console.print(f"{len(found)} kernels, {len(worse)} beyond their limits")
    return 1 if worse else 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Files that can be written, or ValueError now rather than after everything was compiled."""
    for option, path in (("--json", arguments.json), ("--status", arguments.status), ("--plot", arguments.plot)):
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ValueError(f"{option} {path}: no file can be written there")
    if arguments.plot is not None and arguments.plot.suffix not in _PICTURES:
        raise ValueError(f"--plot {arguments.plot}: the name must end with one of {' '.join(_PICTURES)}")
