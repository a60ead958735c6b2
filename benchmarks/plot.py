"""Pictures of a benchmark's CSV: `python -m benchmarks.plot bench-output/benchmarks.csv`.

One PNG per operation over `[N, V]`, beside the CSV or in `--output`: time and, where it was measured, peak memory against V
and against N, as far as they vary, one line per contestant.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness import OURS

MEASURES = {"median_seconds": ("time, ms", 1e3), "peak_bytes": ("peak memory above the inputs, MiB", 2.0**-20)}
COLORS = {OURS: "#d62728", "eager": "#1f77b4", "compiled": "#2ca02c"}
OTHERS = ("#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of the CSV by picture."""
    pictures = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("shape"):  # shapes of users differ in more than V and N
                pictures[f"{row['op']}-{row['pass']}-{row['device']}"].append(row)
    return pictures


def panels(rows: list[dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]], str | None]]:
    """Measure, rows and what they vary in (V, N or nothing): the rows of a panel agree in everything else."""
    for measure in MEASURES:
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            measured = [row for row in rows if row[measure] and row["dtype"] == dtype]
            sweeps = []
            for against, fixed in (("V", "N"), ("N", "V")):
                common = Counter(row[fixed] for row in measured if row["competitor"] == OURS).most_common(1)
                sweep = [row for row in measured if row[fixed] == common[0][0]] if common else []
                if len({row[against] for row in sweep}) > 1:
                    sweeps.append((measure, sweep, against))
            if sweeps:
                yield from sweeps
            elif measured:
                yield measure, measured, None


def draw(rows: list[dict[str, str]], title: str) -> Any:
    """A figure with one panel per measure, dtype and sweep."""
    found = list(panels(rows))
    columns = len(found) if len(found) < 4 else 2
    lines = -(-len(found) // columns)
    size = (4.8 * columns, 3.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, found, strict=False):
        _draw_panel(axis, *panel)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    figure.suptitle(title)
    return figure


def _draw_panel(axis: Any, measure: str, rows: list[dict[str, str]], against: str | None) -> None:
    label, scale = MEASURES[measure]
    lines = defaultdict(list)
    for row in rows:
        lines[row["competitor"]].append((int(row[against or "V"]), scale * float(row[measure])))
    others = [name for name in lines if name not in COLORS]
    colors = COLORS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    fixed = "N" if against == "V" else "V"
    axis.set_title(f"{rows[0]['dtype']}, {fixed} = {int(rows[0][fixed]):,}")
    axis.set_ylabel(label)
    if against is None:
        axis.bar(list(lines), [points[0][1] for points in lines.values()], color=[colors[name] for name in lines])
        axis.tick_params(axis="x", rotation=30)
        return
    for name, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, marker="o", ms=4, color=colors[name], label=name)
    axis.set(xlabel=against, yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a benchmark's CSV.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--output", type=Path, help="folder (default: beside the CSV)")
    options = parser.parse_args()
    folder = options.output or options.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in read(options.csv).items():
        figure = draw(rows, f"{rows[0]['op']}, {rows[0]['pass']}")
        path = folder / f"{name.replace('+', '-')}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
