"""Writes the tables of docs/gpu-status.md from the files in docs/gpu-status: `python -m benchmarks.gpu_check.status`.

Checks write the files, each what it saw of which kernel:

* `compiled-*.json`: `compiler`, such as "triton 3.9.0", and `kernels`: by name, then by target, {"builds": 4, "spilling": 0,
  "beyond_limits": 0};
* `simulated-*.json`: `simulator`, `compiler`, `target`, and `kernels`: by name, {"cases": 9, "passed": 9};
* `gpu-*.json`, of `make gpu-check`: `device`, `target`, `compiler`, `kernels` in the same way, and so `backends`.

A Triton kernel's name is that of its function, or one that `grade-kernels inspect` gives it. CUDA C++ kernels are called as
the file calls them. The text between the tables is written by hand.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

PAGE, FOLDER = ROOT / "docs" / "gpu-status.md", ROOT / "docs" / "gpu-status"
TRITON, CUDA = "triton", "nvcc"  # how the name of a compiler begins
NOTHING = {"compiled": "not recorded", "simulated": "never", "gpu": "never"}  # where no file speaks of a kernel
_FIELDS = {
    "compiled": ("compiler", "kernels"),
    "simulated": ("simulator", "compiler", "target", "kernels"),
    "gpu": ("device", "target", "compiler", "kernels", "backends"),
}


@dataclass(frozen=True)
class Seen:
    """One file: what one check saw."""

    kind: str  # compiled, simulated or gpu
    content: dict[str, Any]

    @staticmethod
    def read(path: Path) -> Seen:
        """Raises ValueError, with the file's name, where it is none of the three kinds or lacks a field."""
        kind = path.stem.partition("-")[0]
        if kind not in _FIELDS:
            raise ValueError(f"{path} is none of {', '.join(f'{kind}-*.json' for kind in _FIELDS)}")
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if missing := [name for name in _FIELDS[kind] if name not in content]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        for name, counts in content["kernels"].items():
            wanted = {"builds", "spilling", "beyond_limits"} if kind == "compiled" else {"cases", "passed"}
            for count in counts.values() if kind == "compiled" else [counts]:
                if not wanted <= count.keys():
                    raise ValueError(
                        f"{path}: of kernel {name!r} it says {count}, and must say {', '.join(sorted(wanted))}"
                    )
        return Seen(kind, content)

    def by(self, compiler: str) -> bool:
        return self.content["compiler"].startswith(compiler)


def kernels() -> list[str]:
    """Names of all Triton kernels of the package, in the order of its files."""
    found = []
    for path in sorted((ROOT / "grade_kernels" / "backends" / "triton").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found.append(node.name)
    return found


def page(text: str, seen: Sequence[Seen]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a kernel that is not there, or a table that the page has no place for.
    """
    for name, lines in (("kernels", _triton(seen)), ("cuda", _cuda(seen)), ("devices", _devices(seen))):
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        table = "".join(f"{line}\n" for line in lines)
        text, count = place.subn(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"the page must have one place for the table {name!r}, it has {count}")
    return text


def _triton(seen: Sequence[Seen]) -> Iterator[str]:
    names = kernels()
    yield from _table(names, [one for one in seen if one.by(TRITON)], _functions(seen, names))


def _cuda(seen: Sequence[Seen]) -> Iterator[str]:
    mine = [one for one in seen if one.by(CUDA)]
    names = sorted({name for one in mine for name in one.content["kernels"]})
    if not names:
        yield "No file speaks of them."
        return
    yield from _table(names, mine, {name: name for name in names})


def _functions(seen: Sequence[Seen], names: Sequence[str]) -> dict[str, str | None]:
    """The function behind each name that files give to Triton kernels; None for those that the package does not launch."""
    given = {name for one in seen if one.by(TRITON) for name in one.content["kernels"]}
    functions: dict[str, str | None] = {name: name for name in names}
    if not given <= functions.keys():
        from grade_kernels.inspection.configurations import TARGETS, builds

        for target in TARGETS:
            for build in builds(target):
                function = build.kernel.partition(":")[2]
                functions[build.name] = function if function in names else None
    if unknown := sorted(given - functions.keys()):
        raise ValueError(f"no Triton kernel is called {unknown[0]!r}; there are {', '.join(functions)}")
    return functions


def _table(names: Sequence[str], seen: Sequence[Seen], functions: dict[str, Any]) -> Iterator[str]:
    yield "| kernel | compiled without a GPU | run in a simulator: cases that passed | run on a GPU: tests that passed |"
    yield "|---|---|---|---|"
    for name in names:
        cells = []
        for kind in _FIELDS:
            mine = [one for one in seen if one.kind == kind]
            cells.append("; ".join(filter(None, (_cell(one, name, functions) for one in mine))) or NOTHING[kind])
        yield f"| `{name}` | {' | '.join(cells)} |"


def _cell(one: Seen, name: str, functions: dict[str, Any]) -> str:
    """What a file says of a kernel, or nothing."""
    counts = [count for given, count in one.content["kernels"].items() if functions[given] == name]
    if not counts:
        return ""
    if one.kind == "compiled":
        targets = dict.fromkeys(target for count in counts for target in count)
        return f"{one.content['compiler']}: {', '.join(_target(target, counts) for target in targets)}"
    cases, passed = (sum(count[what] for count in counts) for what in ("cases", "passed"))
    compiler = one.content["compiler"]
    where = (
        f"{one.content['target']} by {compiler}" if one.kind == "simulated" else f"{one.content['device']}, {compiler}"
    )
    return f"{where}: {passed} of {cases}"


def _target(target: str, counts: Sequence[dict[str, dict[str, int]]]) -> str:
    """A target, with what is wrong there."""
    mine = [count[target] for count in counts if target in count]
    builds, spilling, beyond = (sum(count[what] for count in mine) for what in ("builds", "spilling", "beyond_limits"))
    wrong = [
        f"{number} of {builds} {what}" for number, what in ((spilling, "spill"), (beyond, "beyond limits")) if number
    ]
    return f"{target} ({', '.join(wrong)})" if wrong else target


def _devices(seen: Sequence[Seen]) -> Iterator[str]:
    mine = [one.content for one in seen if one.kind == "gpu"]
    if not mine:
        yield "No GPU has run the tests yet."
        return
    yield "| device | compiled for | by | backend | tests that passed |"
    yield "|---|---|---|---|---|"
    for one in mine:
        for name, count in one["backends"].items():
            passed = f"{count['passed']} of {count['cases']}"
            yield f"| {one['device']} | {one['target']} | {one['compiler']} | `{name}` | {passed} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text(), [Seen.read(path) for path in sorted(FOLDER.glob("*.json"))]))
    print(PAGE)


if __name__ == "__main__":
    main()
