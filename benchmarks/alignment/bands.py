"""What the tables are made of: bands over seeds, points on the frontier, the cost of a reward."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
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
    """A place between two evaluation points of a run; `reached` is False where the run never came there."""

    reached: bool
    reward: float
    kl: float
    perplexity: float
    tokens: float
    seconds: float
    cpu_seconds: float


def at_kl(points: Sequence[Point], kl: float) -> Crossing:
    """Where a run first comes to a KL; its point of greatest KL where it never does."""
    found = _first_crossing(points, lambda point: point.kl, kl)
    return found or _at(max(points, key=lambda point: point.kl), reached=False)


def to_reward(points: Sequence[Point], reward: float) -> Crossing | None:
    """Where a run first comes to a reward; None where it never does."""
    return _first_crossing(points, lambda point: point.reward, reward)


def _first_crossing(points: Sequence[Point], value: Callable[[Point], float], target: float) -> Crossing | None:
    before = points[0]
    if value(before) >= target:
        return _at(before, reached=True)
    for after in points[1:]:
        if value(after) >= target:
            weight = (target - value(before)) / (value(after) - value(before))
            return _between(before, after, weight)
        before = after
    return None


def _at(point: Point, *, reached: bool) -> Crossing:
    return Crossing(reached, point.reward, point.kl, point.perplexity, point.tokens, point.seconds, point.cpu_seconds)


def _between(before: Point, after: Point, weight: float) -> Crossing:
    def mix(name: str) -> float:
        return (1 - weight) * getattr(before, name) + weight * getattr(after, name)

    names = ("reward", "kl", "perplexity", "tokens", "seconds", "cpu_seconds")
    return Crossing(True, **{name: mix(name) for name in names})
