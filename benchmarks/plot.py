"""Pictures of a benchmark's CSV: `python -m benchmarks.plot bench-output/benchmarks.csv`.

One PNG per operation, beside the CSV or in `--output`: time and, where it was measured, peak memory against what varies
(V, or else N), one line per contestant.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness import OURS

MEASURES = {"median_seconds": ("time, ms", 1e3), "peak_bytes": ("peak memory above the inputs, MiB", 2.0**-20)}
COLORS = {OURS: "#d62728", "eager": "#1f77b4", "compiled": "#2ca02c"}
STYLES = ("-", "--", ":", "-.")
OTHERS = ("#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of the CSV by picture."""
    pictures = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            pictures[f"{row['op']}-{row['pass']}-{row['device']}"].append(row)
    return pictures


def draw(rows: list[dict[str, str]], title: str) -> Any:
    """A figure with one panel per measure and dtype."""
    panels = [
        (measure, dtype)
        for measure in MEASURES
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
        if any(row[measure] and row["dtype"] == dtype for row in rows)
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (measure, dtype) in zip(axes[0], panels, strict=True):
        panel = [row for row in rows if row[measure] and row["dtype"] == dtype]
        _draw_panel(axis, panel, measure)
        axis.set_title(dtype)
    figure.suptitle(title)
    return figure


def _draw_panel(axis: Any, rows: list[dict[str, str]], measure: str) -> None:
    label, scale = MEASURES[measure]
    values = {name: {row[name] for row in rows} for name in ("V", "N", "H", "D")}
    against = max(("V", "N"), key=lambda name: len(values[name]))
    varying = [name for name in values if name != against and len(values[name]) > 1]
    lines = defaultdict(list)
    for row in rows:
        sizes = ", ".join(f"{name} = {row[name]}" for name in varying)
        lines[row["competitor"], sizes].append((int(row[against]), scale * float(row[measure])))
    others = [name for name in dict.fromkeys(name for name, _ in lines) if name not in COLORS]
    colors = COLORS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    styles = {sizes: STYLES[i % len(STYLES)] for i, sizes in enumerate(dict.fromkeys(sizes for _, sizes in lines))}
    axis.set_ylabel(label)
    if len(values[against]) == 1:
        axis.bar([" ".join(key) for key in lines], [points[0][1] for points in lines.values()],
                 color=[colors[name] for name, _ in lines])  # fmt: skip
        axis.tick_params(axis="x", rotation=30)
        return
    for (name, sizes), points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, styles[sizes], marker="o", ms=4, color=colors[name], label=f"{name} {sizes}".strip())
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
        figure = draw(rows, f"{rows[0]['op']}, {rows[0]['pass']}, N = {rows[0]['N']}")
        path = folder / f"{name.replace('+', '-')}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
