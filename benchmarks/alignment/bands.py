"""What the tables are made of: bands over seeds, points on the frontier, the cost of a reward."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.alignment.train import Point

__all__ = ["Band", "Crossing", "at_kl", "to_reward"]


@dataclass(frozen=True)
class Band:
    """Several values of one figure, one per seed or per set of prompts."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def show(self, digits: int = 3) -> str:
        """Mean, and standard deviation where there are several values."""
        if not self.values:
            return "-"
        spread = f" ± {self.std:.{digits}f}" if len(self.values) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"

    def show_range(self, digits: int = 3) -> str:
        """Mean, least and greatest."""
        if not self.values:
            return "-"
        if not math.isfinite(self.mean):
            return "lost in noise"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Crossing:
    """A place on the way of a run, at an evaluation point or between two."""

    reward: float
    kl: float
    perplexity: float
    tokens: float
    seconds: float
    cpu_seconds: float


def at_kl(points: Sequence[Point], kl: float) -> Crossing:
    """The highest reward of a run within a KL: at its evaluation points, and where it crosses that KL between them."""
    places = [_at(point) for point in points if point.kl <= kl]
    for before, after in itertools.pairwise(points):
        if (before.kl - kl) * (after.kl - kl) < 0:
            places.append(_between(before, after, (kl - before.kl) / (after.kl - before.kl)))
    return max(places, key=lambda place: place.reward)


def to_reward(points: Sequence[Point], reward: float) -> Crossing | None:
    """Where a run first comes to a reward; None where it never does."""
    before = points[0]
    if before.reward >= reward:
        return _at(before)
    for after in points[1:]:
        if after.reward >= reward:
            return _between(before, after, (reward - before.reward) / (after.reward - before.reward))
        before = after
    return None


def _at(point: Point) -> Crossing:
    return Crossing(point.reward, point.kl, point.perplexity, point.tokens, point.seconds, point.cpu_seconds)


def _between(before: Point, after: Point, weight: float) -> Crossing:
    def mix(name: str) -> float:
        return (1 - weight) * getattr(before, name) + weight * getattr(after, name)

    names = ("reward", "kl", "perplexity", "tokens", "seconds", "cpu_seconds")
    return Crossing(**{name: mix(name) for name in names})
