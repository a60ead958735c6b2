"""Pictures of the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.alignment.claims import variance_band
from benchmarks.alignment.methods import METHODS, PAPER
from benchmarks.alignment.study import Results
from benchmarks.alignment.train import Run
from grade_kernels.demo.cache import replace_file

__all__ = ["draw"]


def draw(results: Results, output: Path) -> list[Path]:
    """Every picture that the results allow; returns the files."""
    written = []
    for name, picture in (("reward", _rewards), ("frontier", _frontier), ("variance", _variances)):
        figure = picture(results)
        if figure is not None:
            path = output / f"{name}.png"
            replace_file(path, partial(figure.savefig, dpi=130))
            plt.close(figure)
            written.append(path)
    return written


def _color(name: str) -> Any:
    return plt.get_cmap("tab10")(list(METHODS).index(name) % 10)


def _groups(results: Results) -> list[tuple[str, list[str]]]:
    """The paper's methods, and the variants beside GRADE-STE."""
    main = [name for name in results.methods if name in PAPER]
    variants = [name for name in results.methods if name not in PAPER]
    groups = [("methods", main), ("variants of GRADE-STE", [n for n in main if n == "grade_ste"] + variants)]
    return [groups[i] for i, names in enumerate((main, variants)) if names]


def _panels(results: Results) -> tuple[Any, list[tuple[Any, list[str]]]]:
    groups = _groups(results)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(6.2 * len(groups), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, _) in zip(axes[0], groups, strict=True):
        axis.set_title(f"{results.task}: {title}")
        axis.grid(alpha=0.3)
    return figure, [(axis, names) for axis, (_, names) in zip(axes[0], groups, strict=True)]


def _rewards(results: Results) -> Any:
    """Test reward over generated tokens: mean over seeds, and a band from the least to the greatest."""
    figure, panels = _panels(results)
    for axis, names in panels:
        for name in names:
            runs = results.final(name)
            tokens = np.linspace(0, min(run.points[-1].tokens for run in runs), 50)
            curves = np.array([np.interp(tokens, _column(run, "tokens"), _column(run, "reward")) for run in runs])
            axis.plot(tokens, curves.mean(axis=0), color=_color(name), label=METHODS[name].title)
            axis.fill_between(tokens, curves.min(axis=0), curves.max(axis=0), color=_color(name), alpha=0.15)
        axis.set(xlabel="tokens generated for learning", ylabel="test reward")
        axis.legend(fontsize="small")
    return figure


def _frontier(results: Results) -> Any:
    """Test reward against KL along every run at the chosen learning rate, dashed with another beta."""
    figure, panels = _panels(results)
    for axis, names in panels:
        for name in names:
            label: str | None = METHODS[name].title
            for runs in results.frontier(name):
                for run in runs:
                    style = "-" if run.beta == results.settings.beta else "--"
                    axis.plot(
                        _column(run, "kl"),
                        _column(run, "reward"),
                        style,
                        color=_color(name),
                        lw=1,
                        ms=2,
                        marker="o",
                        label=label,
                    )
                    label = None
        axis.set(xlabel="KL to the start, nats per completion", ylabel="test reward", xscale="symlog")
        axis.set_xlim(left=0)
        axis.legend(fontsize="small")
    return figure


def _column(run: Run, name: str) -> list[float]:
    return [getattr(point, name) for point in run.points]


def _variances(results: Results) -> Any:
    """Relative gradient variance on a log scale, with the range over sets of prompts."""
    if not results.variances:
        return None
    figure, axes = plt.subplots(
        1, len(results.variances), figsize=(6.2 * len(results.variances), 4.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, checkpoint in zip(axes[0], results.variances, strict=True):
        bands = {name: variance_band(results, checkpoint, name) for name in results.variances[checkpoint]}
        names = [name for name, band in bands.items() if band.values and math.isfinite(band.mean)]
        means = [bands[name].mean for name in names]
        errors = [[bands[n].mean - bands[n].low for n in names], [bands[n].high - bands[n].mean for n in names]]
        titles: Sequence[str] = [METHODS[name].title for name in names]
        axis.barh(titles, means, xerr=errors, color=[_color(name) for name in names], alpha=0.8)
        axis.set(xscale="log", xlabel="trace of the covariance over the squared mean", title=checkpoint)
        axis.grid(alpha=0.3, axis="x", which="both")
        axis.invert_yaxis()
    figure.suptitle(f"{results.task}: gradient variance")
    return figure
