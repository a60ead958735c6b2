"""Writes docs/benchmarks.md from the runs that are kept in benchmarks/results: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import OURS, ROOT, duration

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
INTRODUCTION = """# Measured

Written by `python -m benchmarks.report` from the runs in `benchmarks/results`; `grade-kernels bench` makes such a run on
your machine. The column of ours is a time; every other column says how many times as long that contestant took, as the
median over rounds in which all of them ran in turn. Before a time is taken, the result is checked against the reference.
[NOTES.md](../benchmarks/NOTES.md) says what bounds each figure.

Runs called `users` have the shapes that programs give to `F.gumbel_softmax`. A cell there is eager / `torch.compile`, then
ours in brackets: "3.10 / 1.40 (2.00 ms)" says that ours took 2 ms, eager 3.1 times as long and compiled code 1.4 times as
long. To compile a case takes seconds, so only float32 with the program's own kind of sample has the second figure. A figure
below 1 is **bold**: there ours is slower. With `--compare` a run fails where ours is slower than eager beyond noise: where
even the upper quartile of the rounds' ratios is below 0.95.
"""

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows of one saved run."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def page(runs: dict[str, list[Row]]) -> str:
    """The whole page: a section for each run, by its file's name."""
    return "\n".join([INTRODUCTION, *(line for name, rows in runs.items() for line in _section(name, rows))])


def _section(name: str, rows: list[Row]) -> Iterator[str]:
    first = rows[0]
    yield f"## {name}\n\n{first['machine']}; torch {first['torch']}; {first['date']}; our backend: {first['backend']}.\n"
    yield from figures(rows)


def figures(rows: list[Row]) -> Iterator[str]:
    """Tables of times and of peak memory, by operation."""
    yield from _shapes([row for row in rows if row.get("shape")])
    by_operation: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("shape"):
            continue
        by_operation[f"{row['op']}, {row['pass']}"].append(row)
    for title, measured in by_operation.items():
        yield f"### {title}\n"
        if any(row["median_seconds"] for row in measured):
            yield from _table(measured, "median_seconds", "ours")
        if any(row["peak_bytes"] for row in measured):
            yield "Peak memory beyond the inputs, MiB:\n"
            yield from _table(measured, "peak_bytes", OURS)


def _shapes(rows: list[Row]) -> Iterator[str]:
    """A table for each dtype: a line for each shape and kind of sample, a column for each pass and number of threads."""
    cells: dict[str, dict[tuple[str, str], dict[tuple[str, str], dict[str, Row]]]] = {}
    for row in rows:
        line = row["shape"], row["op"].rpartition(" ")[2]
        case = cells.setdefault(row["dtype"], {}).setdefault(line, {}).setdefault((row["pass"], row["threads"]), {})
        case[row["competitor"]] = row
    for dtype, lines in cells.items():
        columns = list(dict.fromkeys(column for cases in lines.values() for column in cases))
        columns.sort(key=lambda column: column[1])
        yield f"### gumbel_softmax, {dtype}\n"
        titles = [f"{pass_}{f', threads: {threads}' if threads else ''}" for pass_, threads in columns]
        yield _line(["shape", "sample", *titles])
        yield "|" + "---|" * (2 + len(columns))
        for line, cases in lines.items():
            yield _line([*line, *(_race_cell(cases.get(column, {})) for column in columns)])
        yield ""


def _race_cell(case: dict[str, Row]) -> str:
    """Eager / compiled (ours), as the introduction says."""
    if OURS not in case:
        return ""
    ratios = [float(case[name]["ratio_to_ours"]) for name in ("eager", "compiled") if name in case]
    figures = " / ".join(f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**" for ratio in ratios)
    return f"{figures} ({duration(float(case[OURS]['median_seconds']))})".strip()


def _table(rows: list[Row], measure: str, label: str) -> Iterator[str]:
    rows = [row for row in rows if row[measure]]
    sizes = ["dtype", "N", "V", *(name for name in ("H", "D", "threads") if any(row.get(name) for row in rows))]
    names = list(dict.fromkeys(row["competitor"] for row in rows if row["competitor"] != OURS))
    cases: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[tuple(row[size] for size in sizes)][row["competitor"]] = row
    yield _line([*sizes, label, *names])
    yield "|" + "---|" * (len(sizes) + 1 + len(names))
    for case, by_name in cases.items():
        yield _line([*case, *(_cell(by_name.get(name), measure) for name in (OURS, *names))])
    yield ""


def _cell(row: Row | None, measure: str) -> str:
    if row is None:
        return ""
    if measure == "peak_bytes":
        return f"{float(row[measure]) / 2**20:.1f}"
    if row["competitor"] != OURS:
        return f"{float(row['ratio_to_ours']):.2f}"
    seconds = float(row[measure])
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else duration(seconds)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    runs = {path.stem: read(path) for path in sorted(RESULTS.glob("*.csv"))}
    PAGE.write_text(page(runs) if runs else INTRODUCTION)
    print(PAGE)


if __name__ == "__main__":
    main()
