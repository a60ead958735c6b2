"""The paper's claims and two more, each decided by what was measured, with bands over seeds.

A claim holds where the whole band of measured values is on its side, does not hold where the whole band is on the
other, and is undecided in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.alignment.bands import Band, at_kl, to_reward
from benchmarks.alignment.methods import METHODS, OURS
from benchmarks.alignment.study import TRUTH, Results

__all__ = ["KLS", "TARGET", "Claim", "bias_bands", "claims", "frontier_band", "variance_band"]

_Entry = dict[str, Any]

KLS = (2.0, 5.0, 10.0)  # nats per completion
TARGET = 0.8  # reward
RIVALS = ("reinforce", "reinforce_plain", "ppo")
UNBIASED = ("reinforce", "reinforce_plain")

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim in words, what was measured, and the verdict."""

    name: str
    text: str
    measured: str
    verdict: str


def claims(results: Results) -> list[Claim]:
    """Every claim that the runs at hand can decide."""
    return [*_rewards(results), *_variances(results), *_gaps(results), *_frontiers(results), *_costs(results)]


def _title(name: str) -> str:
    return METHODS[name].title


def _at_least(band: Band, threshold: float) -> str:
    return HOLDS if band.low >= threshold else FAILS if band.high < threshold else OPEN


def _above(one: Band, other: Band) -> str:
    """Is one above the other, bands apart?"""
    return HOLDS if one.low > other.high else FAILS if one.high < other.low else OPEN


def _rewards(results: Results) -> list[Claim]:
    found = []
    ours = {run.seed: run.test["reward"] for run in results.final("grade_ste")}
    for rival, factor in (("ppo", 1.5), ("reinforce_plain", 1.24), ("reinforce", 1.24)):
        theirs = {run.seed: run.test["reward"] for run in results.final(rival)}
        ratios = Band(tuple(ours[seed] / theirs[seed] for seed in ours if seed in theirs))
        if ratios.values:
            text = f"test reward of GRADE-STE at least {factor} times that of {_title(rival)}"
            found.append(Claim("a", text, f"{ratios.show_range(2)} times", _at_least(ratios, factor)))
    return found


def _leave_out_each(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """All entries but one, for each one; a single entry stays."""
    return [[*entries[:i], *entries[i + 1 :]] for i in range(len(entries))] if len(entries) > 1 else [list(entries)]


def variance_band(results: Results, checkpoint: str, method: str) -> Band:
    """Relative gradient variance pooled over sets of prompts, one value for all of them but each one.

    The unbiased methods have one and the same mean, so the least noisy estimate of its norm serves them all. The value is
    infinite where the mean is lost in noise.
    """
    methods = results.variances.get(checkpoint, {})
    entries = methods.get(method, [])
    means = methods.get(TRUTH, entries) if method in UNBIASED else entries
    values = []
    for some, others in zip(_leave_out_each(entries), _leave_out_each(means), strict=True) if entries else ():
        norm2 = sum(entry["norm2"] for entry in others)
        values.append(sum(entry["trace"] for entry in some) / norm2 if norm2 > 0 else math.inf)
    return Band(tuple(values))


def bias_bands(results: Results, checkpoint: str, method: str) -> tuple[Band, Band]:
    """The mean gradient beside the unbiased one (`TRUTH`'s): their cosine, and the length along it, of which 1 is right.

    One value for all sets of prompts but each one; nothing where a mean is lost in noise.
    """
    methods = results.variances[checkpoint]
    cosines, lengths = [], []
    for ours, theirs in zip(_leave_out_each(methods[method]), _leave_out_each(methods.get(TRUTH, [])), strict=False):
        own, true = (sum(entry["norm2"] for entry in entries) for entries in (ours, theirs))
        if min(own, true) <= 0 or any(entry["dot"] is None for entry in ours):
            return Band(()), Band(())
        dot = sum(entry["dot"] for entry in ours)
        cosines.append(dot / math.sqrt(own * true))
        lengths.append(dot / true)
    return Band(tuple(cosines)), Band(tuple(lengths))


def _variances(results: Results) -> list[Claim]:
    found = []
    for checkpoint in results.variances:
        ours = variance_band(results, checkpoint, "grade_ste")
        for rival in ("reinforce_plain", "reinforce"):
            theirs = variance_band(results, checkpoint, rival)
            if not ours.values or not theirs.values:
                continue
            ratios = Band(tuple(b / a for a, b in zip(ours.values, theirs.values, strict=True)))
            text = f"relative gradient variance at least 14 times below that of {_title(rival)}, at: {checkpoint}"
            if math.isfinite(ratios.mean):
                found.append(Claim("b", text, f"{ratios.show_range(1)} times", _at_least(ratios, 14.0)))
            else:  # a large factor, but nobody knows how large
                found.append(Claim("b", text, "a mean gradient is lost in noise", OPEN))
    return found


def _gaps(results: Results) -> list[Claim]:
    bands = {}
    for name in ("grade_ste", "grade", *RIVALS):
        gaps = tuple(abs(run.validation["reward"] - run.test["reward"]) for run in results.final(name))
        if gaps:
            bands[name] = Band(gaps)
    ours = bands.pop("grade_ste", None)
    if ours is None or not bands:
        return []
    rival = min(bands, key=lambda name: bands[name].mean)
    measured = f"{ours.show_range()}; the smallest other is {_title(rival)}'s, {bands[rival].show_range()}"
    text = "the smallest gap between validation and test reward"
    return [Claim("c", text, measured, _above(bands[rival], ours))]


def frontier_band(results: Results, method: str, kl: float) -> tuple[Band, Band]:
    """The highest test reward within a KL, and the perplexity there, one value per seed; of a seed's runs the best."""
    places = [max((at_kl(run.points, kl) for run in runs), key=lambda p: p.reward) for runs in results.frontier(method)]
    return Band(tuple(p.reward for p in places)), Band(tuple(p.perplexity for p in places))


def _frontiers(results: Results) -> list[Claim]:
    found = []
    for kl in KLS:
        bands = {name: frontier_band(results, name, kl)[0] for name in results.methods}
        seeds = max((len(band.values) for band in bands.values()), default=0)
        bands = {name: band for name, band in bands.items() if len(band.values) == seeds}
        ours = [name for name in bands if name in OURS]
        rivals = [name for name in bands if name in RIVALS]
        if not ours or not rivals:
            continue
        one, other = (max(names, key=lambda name: bands[name].mean) for names in (ours, rivals))
        measured = f"{_title(one)} {bands[one].show_range()}, {_title(other)} {bands[other].show_range()}"
        text = f"the best of ours leads within a KL of {kl:g} nats, bands apart"
        found.append(Claim("d", text, measured, _above(bands[one], bands[other])))
    return found


def _costs(results: Results) -> list[Claim]:
    found = []
    for name, unit, digits in (("tokens", "tokens", 0), ("cpu_seconds", "seconds of CPU", 1)):
        bands = {}
        for method in ("grade_ste", *RIVALS):
            places = [to_reward(run.points, TARGET) for run in results.final(method)]
            if places and all(places):
                bands[method] = Band(tuple(getattr(place, name) for place in places))
        ours = bands.pop("grade_ste", None)
        text = f"GRADE-STE comes to a reward of {TARGET:g} with the fewest {unit}"
        if ours is None:
            if results.final("grade_ste"):
                verdict = FAILS if bands else OPEN
                found.append(Claim("e", text, "GRADE-STE did not come there in every seed", verdict))
            continue
        if not bands:
            found.append(Claim("e", text, f"{ours.show_range(digits)}; no other came there in every seed", HOLDS))
            continue
        rival = min(bands, key=lambda method: bands[method].mean)
        measured = f"{ours.show_range(digits)}; {_title(rival)} {bands[rival].show_range(digits)}"
        found.append(Claim("e", text, measured, _above(bands[rival], ours)))
    return found
