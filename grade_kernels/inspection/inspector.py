"""`inspect`: every kernel, compiled and counted, in as many processes as there are cores."""

from __future__ import annotations

import contextlib
import fnmatch
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from grade_kernels.inspection import compilation
from grade_kernels.inspection.configurations import TARGETS, Build, builds
from grade_kernels.inspection.machine_code import Figures

__all__ = ["inspect", "select"]

_BATCH = 8


def select(targets: Sequence[str] | None = None, kernels: Sequence[str] | None = None) -> list[tuple[Build, str]]:
    """Every build with its target, or those whose kernel's name, or "name dtype configuration", matches a pattern.

    Args:
        targets: some of `configurations.TARGETS`; default: all.
        kernels: names or patterns as in file names, such as "sample" or "head * bf16 *"; default: all.

    Raises:
        ValueError: a target that is not known, or a pattern that matches nothing.
    """
    for target in targets or ():
        if target not in TARGETS:
            raise ValueError(f"target must be one of {list(TARGETS)}, got {target!r}")
    found = [(build, target) for target in targets or TARGETS for build in builds(target)]
    if not kernels:
        return found
    chosen: dict[int, tuple[Build, str]] = {}
    for pattern in kernels:
        matching = {
            i: task
            for i, task in enumerate(found)
            if fnmatch.fnmatchcase(task[0].name, pattern)
            or fnmatch.fnmatchcase(f"{task[0].name} {task[0].dtype} {task[0].configuration}", pattern)
        }
        if not matching:
            names = ", ".join(dict.fromkeys(build.name for build, _ in found))
            raise ValueError(f"kernel must match a name or 'name dtype configuration', got {pattern!r}; names: {names}")
        chosen |= matching
    return [chosen[i] for i in sorted(chosen)]


def inspect(
    tasks: Sequence[tuple[Build, str]] | None = None,
    *,
    processes: int | None = None,
    done: Callable[[Figures], None] | None = None,
) -> list[Figures]:
    """Compile kernels for their targets and count what comes out. Needs no GPU.

    Starts processes, so a script that calls it needs the usual `if __name__ == "__main__"`.

    Args:
        tasks: what `select` returns; default: everything.
        processes: that compile at a time; default: one for every core.
        done: called with each result as it comes.

    Returns:
        Figures in the order of the tasks.

    Raises:
        FileNotFoundError: the disassembler is not there.
    """
    tasks = select() if tasks is None else tasks
    if not tasks:
        return []
    processes = min(len(tasks), processes or len(os.sched_getaffinity(0)))
    results: dict[int, Figures] = {}
    context = multiprocessing.get_context("spawn")
    with _compiling(), ProcessPoolExecutor(processes, context, _quiet) as pool:
        futures = {
            pool.submit(compilation.inspect_builds, [tasks[i][0] for i in batch], tasks[batch[0]][1]): batch
            for batch in _batches(tasks, processes)
        }
        try:
            for future in as_completed(futures):
                for i, result in zip(futures[future], future.result(), strict=True):
                    results[i] = result
                    if done is not None:
                        done(result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[i] for i in range(len(tasks))]


def _batches(tasks: Sequence[tuple[Build, str]], processes: int) -> list[list[int]]:
    """Positions of tasks that one process takes at a time: of one target, since they are disassembled together.

    Heads, which take the longest, come first; every process gets several batches, so that none waits long at the end.
    """
    size = max(1, min(_BATCH, len(tasks) // (4 * processes)))
    groups: dict[tuple[bool, str], list[int]] = {}
    for i, (build, target) in enumerate(tasks):
        groups.setdefault((build.tile is None, target), []).append(i)
    ordered = [groups[key] for key in sorted(groups)]
    return [group[i : i + size] for group in ordered for i in range(0, len(group), size)]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Processes that start meanwhile compile kernels, even where this one interprets them."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _quiet() -> None:
    warnings.simplefilter("ignore")  # Triton's notes on its own defaults, once for every process
