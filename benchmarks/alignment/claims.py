"""The paper's claims and two more, each decided by what was measured, with bands over seeds.

A claim holds where the whole band of measured values is on its side, does not hold where the whole band is on the
other, and is undecided in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.alignment.bands import Band, at_kl, to_reward
from benchmarks.alignment.methods import METHODS, OURS
from benchmarks.alignment.study import Results

__all__ = ["KLS", "TARGET", "Claim", "claims", "frontier_band", "variance_band"]

KLS = (2.0, 5.0, 10.0)  # nats per completion
TARGET = 0.8  # reward
RIVALS = ("reinforce", "reinforce_plain", "ppo")

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


def variance_band(results: Results, checkpoint: str, method: str) -> Band:
    """Relative gradient variance, one value per set of prompts; sets where the mean is lost in noise are left out."""
    values = (entry["relative"] for entry in results.variances.get(checkpoint, {}).get(method, ()))
    return Band(tuple(value for value in values if value is not None))


def _variances(results: Results) -> list[Claim]:
    found = []
    for checkpoint, methods in results.variances.items():
        for rival in ("reinforce_plain", "reinforce"):
            pairs = zip(methods.get(rival, ()), methods.get("grade_ste", ()), strict=False)
            ratios = [
                theirs["relative"] / ours["relative"]
                for theirs, ours in pairs
                if theirs["relative"] is not None and ours["relative"] is not None
            ]
            lost = sum(entry["relative"] is None for entry in methods.get(rival, ()))
            text = f"relative gradient variance at least 14 times below that of {_title(rival)}, at: {checkpoint}"
            note = f"; lost in noise on {lost} set(s) of prompts" if lost else ""
            if ratios:
                band = Band(tuple(ratios))
                found.append(Claim("b", text, f"{band.show_range(1)} times{note}", _at_least(band, 14.0)))
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


def frontier_band(results: Results, method: str, kl: float) -> tuple[Band, Band, int]:
    """Test reward and perplexity at a KL, one value per seed, and in how many seeds a run came that far.

    Of a seed's runs (one per beta) the one with the higher reward there counts, those that came that far first.
    """
    rewards, perplexities, reached = [], [], 0
    for runs in results.frontier(method):
        best = max((at_kl(run.points, kl) for run in runs), key=lambda place: (place.reached, place.reward))
        rewards.append(best.reward)
        perplexities.append(best.perplexity)
        reached += best.reached
    return Band(tuple(rewards)), Band(tuple(perplexities)), reached


def _frontiers(results: Results) -> list[Claim]:
    found = []
    for kl in KLS:
        bands = {}
        for name in results.methods:
            band, _, reached = frontier_band(results, name, kl)
            if band.values and reached == len(band.values):
                bands[name] = band
        ours = [name for name in bands if name in OURS]
        rivals = [name for name in bands if name in RIVALS]
        if not ours or not rivals:
            continue
        one, other = (max(names, key=lambda name: bands[name].mean) for names in (ours, rivals))
        measured = (
            f"{_title(one)} {bands[one].show_range()}, {_title(other)} {bands[other].show_range()} "
            f"(of {len(bands)} methods that came to this KL in every seed)"
        )
        text = f"the best of ours leads the frontier at a KL of {kl:g} nats, bands apart"
        found.append(Claim("d", text, measured, _above(bands[one], bands[other])))
    return found


def _costs(results: Results) -> list[Claim]:
    found = []
    for name, unit in (("tokens", "tokens"), ("cpu_seconds", "seconds of CPU")):
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
            found.append(Claim("e", text, f"{ours.show_range(0)}; no other came there in every seed", HOLDS))
            continue
        rival = min(bands, key=lambda method: bands[method].mean)
        measured = f"{ours.show_range(0)}; {_title(rival)} {bands[rival].show_range(0)}"
        found.append(Claim("e", text, measured, _above(bands[rival], ours)))
    return found
