"""`python -m benchmarks.gpu_check`, or `make gpu-check`: the command."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_check.machine import NO_GPU
from benchmarks.gpu_check.page import page, summary
from benchmarks.gpu_check.runner import FAILED, Runner
from benchmarks.gpu_check.steps import Plan, Step, steps
from benchmarks.harness import ROOT

INTERRUPTED = 130
ALL = "all"


def main(argv: list[str] | None = None) -> int:
    """Run what has not run yet.

    Returns:
        0 if no step has failed (some may wait for another call), 1 if one has, 2 without a GPU or with results of other
        versions in the folder, 130 after an interrupt.
    """
    parser = argparse.ArgumentParser(prog="gpu-check", description="Is it right on this GPU, and how fast?")
    parser.add_argument("--minutes", type=float, default=15.0, help="that this call may take (default: %(default)g)")
    parser.add_argument(
        "--again", nargs="*", metavar="STEP", help="run these steps again, or all; of tests, failed ones"
    )
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--output", type=Path, help="folder (default: gpu-check-output/ and the device's name)")
    parser.add_argument("--device", default="cuda", help="cpu tries the steps out, at sizes of no interest")
    options = parser.parse_args(argv)
    plan = Plan.of(options.device)
    every = steps(plan)
    for asked in (options.again or [], options.only or []):
        unknown = [name for name in asked if name not in [step.name for step in every]]
        if unknown:
            parser.error(f"no step is called {unknown[0]!r}; there are: {', '.join(step.name for step in every)}")
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check.machine", options.device], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        print(f"gpu-check: {found.stderr.strip()}", file=sys.stderr)
        return NO_GPU
    machine = json.loads(found.stdout.splitlines()[-1])
    folder = options.output or ROOT / "gpu-check-output" / slug(machine["device"])
    runner = Runner(folder.resolve(), machine["commit"], 60 * options.minutes, lambda line: print(line, flush=True))
    again = every if options.again == [] else [step for step in every if step.name in (options.again or ())]
    if (different := _different(folder, machine)) and again != every:
        print(f"gpu-check: {folder} holds results of {different}. Give --again to run every step again, or another "
              "--output.", file=sys.stderr)  # fmt: skip
        return NO_GPU
    for step in again:
        runner.forget(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine, indent=1))

    def write() -> None:
        _write(folder, machine, runner, every)

    signal.signal(signal.SIGTERM, _interrupt)
    write()
    chosen = [step for step in every if options.only is None or step.name in options.only]
    try:
        runner.run(chosen, write)
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was found is in {folder}, and the next call goes on from there.")
        return INTERRUPTED
    results = [runner.result(step) for step in every]
    print("", *summary(results), f"{folder / 'gpu-check.md'} can be pasted into an issue.", sep="\n")
    return 1 if any(result.state == FAILED for result in results) else 0


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def _different(folder: Path, machine: dict[str, str]) -> str | None:
    """What the results in a folder were found with, if it is not the same."""
    path = folder / "machine.json"
    before = json.loads(path.read_text()) if path.exists() else machine
    differ = [name for name in machine if name not in ("processor", "commit") and before.get(name) != machine[name]]
    return ", ".join(f"{name} {before.get(name)} (here: {machine[name]})" for name in differ) or None


def _write(folder: Path, machine: dict[str, str], runner: Runner, every: list[Step]) -> None:
    """The page, all of it as JSON, and the file from which docs/gpu-status.md takes what ran on this GPU."""
    results = [runner.result(step) for step in every]
    (folder / "gpu-check.md").write_text(page(machine, results))
    everything: dict[str, Any] = {"machine": machine, "steps": [vars(result) for result in results]}
    (folder / "gpu-check.json").write_text(json.dumps(everything, indent=1))
    tests = next((r.notes for r in reversed(results) if "kernels" in r.notes), {"kernels": {}, "backends": {}})
    record = {name: machine[name] for name in ("device", "target", "torch", "commit")}
    record |= {"compiler": f"triton {machine['triton']}", "kernels": tests["kernels"], "backends": tests["backends"]}
    (folder / f"gpu-{slug(machine['device'])}.json").write_text(json.dumps(record, indent=1) + "\n")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
