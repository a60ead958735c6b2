"""What `inspect` found, as tables, JSON and a roofline plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from rich.table import Table

from grade_kernels.inspection.configurations import VOCAB, Build
from grade_kernels.inspection.devices import DEVICES, programs
from grade_kernels.inspection.limits import is_baseline, violations
from grade_kernels.inspection.machine_code import PIPES, Figures
from grade_kernels.inspection.prediction import ROWS, WAYS_ROWS, WIDTH, Prediction, predict, ways

__all__ = ["table", "ways_table", "write_json", "write_plot", "write_status"]


def table(results: Sequence[tuple[Build, Figures]], target: str) -> Table:
    """Everything about one target."""
    devices = [name for name, device in DEVICES.items() if device.target == target]
    shown = Table(title=f"{target}, Triton {triton.__version__}", title_justify="left", header_style="bold")
    for heading in ("kernel", "dtype", "configuration"):
        shown.add_column(heading, no_wrap=heading != "kernel")
    for heading in ("regs", "stack", "spills", "shared", "programs", "per logit", *PIPES, "bytes"):
        shown.add_column(heading, justify="right")
    for name in devices:
        shown.add_column(f"{name}: prediction", justify="right", no_wrap=True)
    for build, found in results:
        if found.target != target:
            continue
        numbers = [found.registers, found.stack, found.spills, found.shared, programs(found)]
        pipes = ["" if found.per_logit is None else f"{found.per_logit[pipe]:.1f}" for pipe in PIPES]
        predictions = {p.device: _prediction(p, build) for p in predict(build, found)}
        shown.add_row(
            found.kernel, found.dtype, found.configuration, *map(str, numbers),
            "" if found.total is None else f"{found.total:.1f}", *pipes, _bytes(build, found),
            *(predictions.get(name, "") for name in devices),
            style="red" if found.stack or found.spills else None,
        )  # fmt: skip
    widths = f"N = {ROWS}, V = {VOCAB}, H = {WIDTH}"
    shown.caption = (
        f"Predictions, nothing measured on a device: time at {widths} (at another N where a tile is for few rows, and for "
        f"the rows that a configuration names), over the floor, and what bounds it. Programs: on a multiprocessor at a time. "
        f"Bytes: per logit, for a head from the cache at H = {WIDTH}."
    )
    return shown


def ways_table(results: Sequence[tuple[Build, Figures]], target: str) -> Table | None:
    """The two ways through a head at several N, or None if no pass was inspected both ways."""
    found = ways(results, target)
    if not found:
        return None
    shown = Table(title=f"{target}: two ways through a head", title_justify="left", header_style="bold")
    shown.add_column("pass")
    shown.add_column("device")
    for rows in WAYS_ROWS:
        shown.add_column(f"N = {rows}: tiles, chunks", justify="right", no_wrap=True)
    for name, devices in found.items():
        for device, pairs in devices.items():
            shown.add_row(name, device, *(f"{tiles:.2f}x, {chunks:.2f}x" for tiles, chunks in pairs))
    shown.caption = (
        f"Predictions, nothing measured on a device: time over the floor of the bare product in bfloat16 at V = {VOCAB} and "
        f"H = {WIDTH}. The library is taken to multiply at that floor."
    )
    return shown


def _prediction(p: Prediction, build: Build) -> str:
    at = "" if p.rows == ROWS or build.problem is not None else f", N = {p.rows}"
    return f"{1e3 * p.seconds:.3g} ms, {p.ratio:.2f}x ({p.bound}{at})"


def _bytes(build: Build, found: Figures) -> str:
    if found.bytes_per_logit is None:
        return ""
    return f"{found.bytes_per_logit * (WIDTH if build.tile else 1):.4g}"


def write_json(path: Path, results: Sequence[tuple[Build, Figures]]) -> None:
    """Everything, by machine."""
    kernels = [
        {
            **dataclasses.asdict(found),
            "per_logit_total": found.total,
            "programs_per_multiprocessor": programs(found),
            "predictions": [{**dataclasses.asdict(p), "ratio": p.ratio} for p in predict(build, found)],
        }
        for build, found in results
    ]
    problem = {"rows": ROWS, "vocab": VOCAB, "width": WIDTH}
    both = {target: ways(results, target) for target in dict.fromkeys(found.target for _, found in results)}
    text = {
        "triton": triton.__version__, "predictions_are_for": problem, "kernels": kernels,
        "ways_through_a_head": {"rows": WAYS_ROWS, "tiles_and_chunks": both},
    }  # fmt: skip
    path.write_text(json.dumps(text, indent=2) + "\n")


def write_status(path: Path, results: Sequence[tuple[Build, Figures]]) -> None:
    """By kernel and target: how many builds there are, how many spill, and how many do worse than they may."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for build, found in results:
        if is_baseline(build):
            continue
        targets = kernels.setdefault(build.kernel.partition(":")[2], {})
        counts = targets.setdefault(found.target, {"builds": 0, "spilling": 0, "beyond_limits": 0})
        counts["builds"] += 1
        counts["spilling"] += bool(found.stack or found.spills)
        counts["beyond_limits"] += bool(violations(build, found))
    text = {"compiler": f"triton {triton.__version__}", "kernels": kernels}
    path.write_text(json.dumps(text, indent=2) + "\n")


def write_plot(path: Path, results: Sequence[tuple[Build, Figures]]) -> None:
    """Rooflines of the devices: instructions over bytes for row kernels, operations over bytes for heads.

    Raises:
        ValueError: there is no prediction to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [
        (build, found, p)
        for build, found in results
        for p in predict(build, found)
        if build.dtype == "bf16" and p.rows == ROWS
    ]
    names = [name for name in DEVICES if any(p.device == name for _, _, p in points)]
    if not names:
        raise ValueError("nothing to plot: none of the kernels has a prediction in bfloat16")
    figure, axes = plt.subplots(2, len(names), figsize=(5.2 * len(names), 8.4), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        device = DEVICES[name]
        scans = [
            (b, f, p) for b, f, p in points if p.device == name and b.tile is None and b.configuration == "aligned"
        ]
        heads = [(b, f, p) for b, f, p in points if p.device == name and b.tile is not None and "flags" not in b.name]
        lanes = device.pipes["issue"]["fma"] if "issue" in device.pipes else device.pipes["vector"]["fma"]
        issue = lanes * device.multiprocessors * device.clock
        _roof(
            axes[0][column], f"{name}, given logits", "instructions per byte of memory", "instructions/s",
            issue, {"memory": device.bandwidth},
            [(b.name, (f.total or 0) / (f.bytes_per_logit or 1), (f.total or 0) * p.rows * VOCAB / p.seconds)
             for b, f, p in scans],
        )  # fmt: skip
        _roof(
            axes[1][column], f"{name}, through a head", "operations per byte from the cache", "operations/s",
            device.tensor, {"cache": device.cache_bandwidth},
            [(f"{b.name} {b.configuration}", 2 * p.rows * VOCAB * WIDTH * b.products
              / (p.resources["cache"] * device.cache_bandwidth), 2 * p.rows * VOCAB * WIDTH * b.products / p.seconds)
             for b, f, p in heads],
        )  # fmt: skip
    figure.suptitle(
        f"Predictions for bfloat16 from machine code (Triton {triton.__version__}), N = {ROWS}, V = {VOCAB}, H = {WIDTH}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _roof(
    axis: Any,
    title: str,
    across: str,
    up: str,
    peak: float,
    slopes: dict[str, float],
    points: list[tuple[str, float, float]],
) -> None:
    """One panel: roofs, and kernels where they are predicted to end up."""
    xs = [x for _, x, _ in points] or [1.0]
    left, right = min(xs) / 4, max(*xs, *(peak / slope for slope in slopes.values())) * 2
    for name, slope in slopes.items():
        axis.plot([left, peak / slope, right], [left * slope, peak, peak], color="black", lw=1)
        axis.annotate(name, (left, left * slope), fontsize="x-small")
    for i, (name, x, y) in enumerate(points):
        axis.plot([x], [y], "os^Dv"[i // 10 % 5], ms=5, color=f"C{i % 10}", label=name)
    axis.set(title=title, xlabel=across, ylabel=up, xscale="log", yscale="log", xlim=(left, right))
    axis.grid(alpha=0.3, which="both")
    if points:
        axis.legend(fontsize="xx-small")
