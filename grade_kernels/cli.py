"""The `grade-kernels` command. Each subcommand is imported when it is called, so none pays for another's packages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["main"]

# What `pip install 'grade-kernels[demo]'` and so on bring beyond the plain package.
_PACKAGES = {
    "bench": {"pytest", "pytest_benchmark"},
    "demo": {"accelerate", "matplotlib", "numpy", "psutil", "rich", "tokenizers", "transformers"},
    "inspect": {"matplotlib", "networkx", "rich", "triton"},
    "train": {"accelerate", "datasets", "peft", "rich", "tokenizers", "transformers", "yaml"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="grade-kernels", description="Training through discrete tokens.")
    parser.add_argument("--version", action="version", version=f"grade-kernels {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("doctor", help="versions, devices, backends, and a self-check of each against the reference")
    demo = commands.add_parser("demo", help="align a small language model on this machine")
    inspect = commands.add_parser("inspect", help="what the Triton kernels compile to, for every GPU and without any")
    commands.add_parser("train", help="align a language model with GRADETrainer", add_help=False)
    commands.add_parser("bench", help="throughput and memory of every operation here (from a clone)", add_help=False)
    try:
        if argv[:1] == ["train"]:
            from grade_kernels.training import command

            return command.run(argv[1:])
        if argv[:1] == ["bench"]:
            return _bench(argv[1:])
        if argv[:1] == ["demo"]:
            from grade_kernels.demo import add_arguments, run

            add_arguments(demo)
        if argv[:1] == ["inspect"]:
            from grade_kernels.inspection import command as inspection

            inspection.add_arguments(inspect)
        arguments = parser.parse_args(argv)
        if arguments.command == "demo":
            return run(arguments) or 0
        if arguments.command == "inspect":
            return inspection.run(arguments)
    except ModuleNotFoundError as error:
        name = argv[0]
        if error.name is None or error.name.partition(".")[0] not in _PACKAGES.get(name, ()):
            raise
        print(f"`grade-kernels {name}` needs {error.name}: pip install 'grade-kernels[{name}]'", file=sys.stderr)
        return 1
    from grade_kernels import doctor

    return doctor.run()


def _bench(arguments: list[str]) -> int:
    """Run the clone's benchmarks with pytest, whose arguments these are, and draw what they measured."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "conftest.py").is_file():
        print("`grade-kernels bench` needs the benchmarks, which are in the repository: clone it, and `make venv` or "
              "`pip install --no-build-isolation -e '.[bench]'` there", file=sys.stderr)  # fmt: skip
        return 1
    import pytest
    import pytest_benchmark  # noqa: F401  # without it, the benchmarks' own options mean nothing

    return int(pytest.main(["-c", str(root / "pyproject.toml"), str(root / "benchmarks"), *arguments]))


def _version() -> str:
    try:
        return version("grade-kernels")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
