"""What was found: `results.json`, a Markdown page with tables and verdicts, samples, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.alignment import plots
from benchmarks.alignment.bands import Band, Crossing, to_reward
from benchmarks.alignment.claims import KLS, TARGET, bias_bands, claims, frontier_band, variance_band
from benchmarks.alignment.methods import METHODS
from benchmarks.alignment.study import Results
from benchmarks.alignment.train import Run
from grade_kernels.demo.cache import replace_text

__all__ = ["markdown", "write_report"]

# arXiv 2601.11574: test reward, mean and standard deviation over prompts.
PAPER = {"grade_ste": "0.763 ± 0.344", "reinforce_plain": "0.617 ± 0.378", "ppo": "0.510 ± 0.313"}


def write_report(results: Results, output: Path) -> list[Path]:
    """Write everything to the output folder; returns the files."""
    files: dict[str, str] = {
        "results.json": json.dumps(_plain(results), indent=1) + "\n",
        "report.md": markdown(results),
        "samples.md": samples(results),
    }
    written = []
    for name, text in files.items():
        path = output / name
        replace_text(path, text)
        written.append(path)
    return [*written, *plots.draw(results, output)]


def _plain(results: Results) -> dict[str, Any]:
    found = asdict(results)
    found["claims"] = [asdict(claim) for claim in claims(results)]
    return found


def markdown(results: Results) -> str:
    """The page."""
    settings = results.settings
    seeds = max((len(results.final(name)) for name in results.methods), default=0)
    parts = [
        f"# Alignment, task `{results.task}`",
        "",
        ", ".join(f"{name}: {_number(value)}" for name, value in results.notes.items()) + ".",
        "",
        f"Every run: {settings.steps} optimiser steps, each with {settings.prompts} prompts of {settings.completions} "
        f"completions, beta {settings.beta:g}, Adam, gradients clipped at {settings.max_grad_norm:g}; "
        f"{settings.evaluation_prompts} test prompts. Learning rate by validation, among "
        f"{', '.join(f'{rate:g}' for rate in settings.learning_rates)} (the variants of GRADE-STE take its own). "
        f"± is the standard deviation over {seeds} seeds.",
        "",
        *_section("Test reward at equal budgets", _main_table(results)),
        *_section(
            "Relative gradient variance: trace of the covariance over the squared mean (range: all sets of prompts but one)",
            _variance(results),
        ),
        *_section(
            "Highest test reward within a KL, in nats per completion (perplexity under the start there)"
            + _other_betas(results),
            _frontier(results),
        ),
        *_section(f"The way to a test reward of {TARGET:g}", _costs(results)),
        *_section("Verdicts", _claims(results)),
        *_section("Choice of the learning rate: validation reward less beta times KL, first seed", _rates(results)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _number(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _section(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A heading and a table whose first row is its head; nothing without rows."""
    if len(rows) < 2:
        return []
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in body]
    return [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, ""]


def _band(runs: Sequence[Run], value: Callable[[Run], float]) -> Band:
    return Band(tuple(value(run) for run in runs))


def _main_table(results: Results) -> list[list[str]]:
    judged = any(run.test["judged"] is not None for run in results.runs)
    head = [
        "method", "paper's test reward", "test reward", "std over prompts", "validation less test", "KL", "perplexity",
        "distinct-1", "distinct-2", "tokens a completion", *(["really positive"] if judged else []), "learning rate",
        "CPU seconds", "peak memory, MiB",
    ]  # fmt: skip
    rows = [head]
    if results.runs:
        start = results.runs[0].points[0]
        blank = ["-"] * (len(head) - 7)
        rows.append(["start", "-", f"{start.reward:.3f}", "-", "-", "0", f"{start.perplexity:.1f}", *blank])
        rows[-1][head.index("distinct-2")] = f"{start.distinct_2:.3f}"
    for name in results.methods:
        runs = results.final(name)
        peaks = [run.peak_mib for run in runs if run.peak_mib is not None]
        rows.append([
            METHODS[name].title,
            PAPER.get(name, "-"),
            f"**{_band(runs, lambda run: run.test['reward']).show()}**",
            f"{_band(runs, lambda run: run.test['reward_std']).mean:.3f}",
            _band(runs, lambda run: run.validation["reward"] - run.test["reward"]).show(),
            _band(runs, lambda run: run.test["kl"]).show(2),
            _band(runs, lambda run: run.test["perplexity"]).show(1),
            f"{_band(runs, lambda run: run.test['distinct_1']).mean:.3f}",
            f"{_band(runs, lambda run: run.test['distinct_2']).mean:.3f}",
            _band(runs, lambda run: run.test["tokens"]).show(1),
            *([_band(runs, lambda run: run.test["judged"]).show()] if judged else []),
            f"{results.chosen[name]:g}",
            f"{_band(runs, lambda run: run.points[-1].cpu_seconds).mean:.0f}",
            f"{max(peaks):.0f}" if peaks else "-",
        ])  # fmt: skip
    return rows


def _variance(results: Results) -> list[list[str]]:
    head = ["method"]
    for checkpoint in results.variances:
        head += [
            f"{checkpoint}: variance",
            "plain REINFORCE's over it",
            "cosine to the unbiased gradient",
            "length along it",
        ]
    rows = [head]
    for name in next(iter(results.variances.values()), {}):
        row = [METHODS[name].title]
        for checkpoint in results.variances:
            band, plain = (
                variance_band(results, checkpoint, name),
                variance_band(results, checkpoint, "reinforce_plain"),
            )
            row += [
                band.show_range(2),
                f"{plain.mean / band.mean:.1f}" if plain.values and math.isfinite(plain.mean + band.mean) else "-",
                *(band.show_range(2) for band in bias_bands(results, checkpoint, name)),
            ]
        rows.append(row)
    return rows


def _other_betas(results: Results) -> str:
    """Which runs beside those of the table count for the frontier."""
    betas = sorted({run.beta for run in results.runs} - {results.settings.beta})
    names = [
        METHODS[name].title for name in results.methods if len({r.beta for r in results.runs if r.method == name}) > 1
    ]
    return f"; also runs with beta {' or '.join(f'{b:g}' for b in betas)} of {', '.join(names)}" if betas else ""


def _frontier(results: Results) -> list[list[str]]:
    rows = [["method", *(f"KL {kl:g}" for kl in KLS), "greatest KL"]]
    for name in results.methods:
        row = [METHODS[name].title]
        for kl in KLS:
            reward, perplexity = frontier_band(results, name, kl)
            row.append(f"{reward.show()} ({perplexity.mean:.1f})")
        greatest = [max(p.kl for run in runs for p in run.points) for runs in results.frontier(name)]
        rows.append([*row, Band(tuple(greatest)).show(1)])
    return rows


def _costs(results: Results) -> list[list[str]]:
    rows = [["method", "tokens", "seconds", "CPU seconds", "KL there", "seeds that came there"]]
    for name in results.methods:
        runs = results.final(name)
        places: list[Crossing] = [p for run in runs if (p := to_reward(run.points, TARGET)) is not None]
        figures = [
            Band(tuple(getattr(place, field) for place in places)).show(digits)
            for field, digits in (("tokens", 0), ("seconds", 1), ("cpu_seconds", 1), ("kl", 2))
        ]
        rows.append([METHODS[name].title, *figures, f"{len(places)} of {len(runs)}"])
    return rows


def _claims(results: Results) -> list[list[str]]:
    found = [[f"({claim.name}) {claim.text}", claim.measured, f"**{claim.verdict}**"] for claim in claims(results)]
    return [["claim", "measured: mean (least to greatest)", "verdict"], *found]


def _rates(results: Results) -> list[list[str]]:
    settings = results.settings
    rows = [["method", *(f"{rate:g}" for rate in settings.learning_rates)]]
    for name in results.methods:
        tried = {
            run.learning_rate: run
            for run in results.runs
            if run.method == name and run.beta == settings.beta and run.seed == settings.seeds[0]
        }
        if len(tried) > 1:
            cells = (tried.get(rate) for rate in settings.learning_rates)
            rows.append([METHODS[name].title, *(f"{results.objective(run):.3f}" if run else "-" for run in cells)])
    return rows


def samples(results: Results, count: int = 6) -> str:
    """Completions of the same test prompts under the same noise, the first seed's runs."""
    parts = [f"# Completions, task `{results.task}`", ""]
    for name in results.methods:
        for run in results.final(name)[:1]:
            title = f"## {METHODS[name].title}: reward {run.test['reward']:.3f}, KL {run.test['kl']:.1f}"
            lines = [f"* {prompt} **{text}**" for prompt, text in zip(
                results.prompts, run.test["completions"][:count], strict=False)]  # fmt: skip
            parts += [title, "", *lines, ""]
    return "\n".join(parts).rstrip() + "\n"
