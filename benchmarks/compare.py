"""Has ours lost ground since a saved run? `python -m benchmarks.compare OLD.csv NEW.csv`, or `--compare OLD.csv` of a run.

A case that is slower than eager PyTorch is lost as well, whatever it was before.

Machines differ and drift, so times are never compared: a case is judged by how long the bare matrix product of the same run
(where there is none, eager PyTorch) takes in units of ours, and by the quartiles of that ratio over the rounds. It is lost if
even the upper quartile lies below what was asked for, less SLACK.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

YARDSTICKS = ("gemm", "eager")  # the first that both runs have
_NAMED = ("N", "V", "H", "D", "threads")
SLACK = 0.05  # quartiles over a few rounds understate what a machine's mood does to a whole run

Key = tuple[str, ...]
Run = dict[Key, dict[str, tuple[float, float]]]  # quartiles of the ratio to ours, by case and contestant


@dataclass(frozen=True)
class Regression:
    """A case in which the yardstick's ratio to ours has fallen beyond noise."""

    case: Key
    yardstick: str
    before: tuple[float, float]  # quartiles
    now: tuple[float, float]

    def __str__(self) -> str:
        before, now = ("{:.2f}-{:.2f}".format(*quartiles) for quartiles in (self.before, self.now))
        return f"{' '.join(self.case)}: {self.yardstick} took {before} times as long as ours, now {now}"


@dataclass(frozen=True)
class Slower:
    """A case in which eager PyTorch is faster than ours beyond noise."""

    case: Key
    now: tuple[float, float]  # quartiles of eager's ratio to ours

    def __str__(self) -> str:
        return "{}: eager took {:.2f}-{:.2f} times as long as ours".format(" ".join(self.case), *self.now)


def read(path: Path) -> Run:
    """Rows of a CSV with a time.

    Raises:
        ValueError: the file can not be read, is not text, lacks a column, or holds a ratio that is no number.
    """
    fields = ("op", "pass", "device", "dtype", "N", "V", "H", "D")
    further = ("shape", "threads")  # which older runs lack
    run: Run = {}
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            needed = {*fields, "competitor", "ratio_low", "ratio_high"}
            if missing := needed - set(table.fieldnames or ()):
                raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
            for row in table:
                if row["ratio_low"]:
                    named = {name: row.get(name) for name in (*fields, *further)}
                    key = tuple(f"{n}={value}" if n in _NAMED else value for n, value in named.items() if value)
                    quartiles = float(row["ratio_low"]), float(row["ratio_high"] or "nothing")
                    run.setdefault(key, {})[row["competitor"]] = quartiles
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no saved run: {error}") from error
    return run


def regressions(before: Run, now: Run) -> list[Regression]:
    """Cases of both runs in which even the upper quartile is now below what the lower one was, less SLACK.

    Raises:
        ValueError: the runs share no case, so that nothing could be lost.
    """
    cases = {}
    for case in before.keys() & now.keys():
        if yardsticks := [name for name in YARDSTICKS if name in before[case] and name in now[case]]:
            cases[case] = yardsticks[0]
    if not cases:
        raise ValueError(f"nothing to compare: the runs share no case with a time of {' or '.join(YARDSTICKS)}")
    found = []
    for case, yardstick in cases.items():
        old, new = before[case][yardstick], now[case][yardstick]
        if new[1] < (1 - SLACK) * old[0]:
            found.append(Regression(case, yardstick, old, new))
    return sorted(found, key=lambda regression: regression.case)


def slower(now: Run) -> list[Slower]:
    """Cases in which even the upper quartile of eager's ratio to ours is below 1, less SLACK."""
    quartiles = {case: contestants["eager"] for case, contestants in now.items() if "eager" in contestants}
    return [Slower(case, spread) for case, spread in sorted(quartiles.items()) if spread[1] < 1 - SLACK]


def main() -> int:
    parser = argparse.ArgumentParser(description="Has ours lost ground since a saved run?")
    parser.add_argument("before", type=Path)
    parser.add_argument("now", type=Path)
    options = parser.parse_args()
    try:
        now = read(options.now)
        lost = [*regressions(read(options.before), now), *slower(now)]
    except ValueError as error:
        parser.error(str(error))
    for case in lost:
        print(case)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
