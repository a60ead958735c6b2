"""The `grade-kernels` command. Each subcommand is imported when it is called, so none pays for another's packages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

__all__ = ["main"]

# What `pip install 'grade-kernels[demo]'` and `'grade-kernels[train]'` bring beyond the plain package.
_PACKAGES = {
    "demo": {"accelerate", "matplotlib", "numpy", "psutil", "rich", "tokenizers", "transformers"},
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
    commands.add_parser("train", help="align a language model with GRADETrainer", add_help=False)
    try:
        if argv[:1] == ["train"]:
            from grade_kernels.training import command

            return command.run(argv[1:])
        if argv[:1] == ["demo"]:
            from grade_kernels.demo import add_arguments, run

            add_arguments(demo)
        arguments = parser.parse_args(argv)
        if arguments.command == "demo":
            return run(arguments) or 0
    except ModuleNotFoundError as error:
        name = argv[0]
        if error.name is None or error.name.partition(".")[0] not in _PACKAGES.get(name, ()):
            raise
        print(f"`grade-kernels {name}` needs {error.name}: pip install 'grade-kernels[{name}]'", file=sys.stderr)
        return 1
    from grade_kernels import doctor

    return doctor.run()


def _version() -> str:
    try:
        return version("grade-kernels")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
