"""The fewest cases of a test, or nearly, in which values of its parameters that occur together still do."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple
from zlib import crc32


class Case(NamedTuple):
    """One combination of a test's parameters."""

    name: str
    values: Mapping[str, Hashable]  # by parameter
    strength: int = 2  # how many values of this case together are a combination that has to occur
    apart: Hashable = None  # combinations have to occur in each such set of cases
    cost: float = 1.0  # of running it, relative to others of the same test

    def combinations(self) -> frozenset[Hashable]:
        names = sorted(self.values)
        chosen = combinations(names, min(self.strength, len(names)))
        return frozenset((self.apart, tuple((name, self.values[name]) for name in found)) for found in chosen)


def covering(cases: Sequence[Case]) -> set[int]:
    """Positions of a selection that has every combination which some case has.

    Greedy: the next case is the one with the most combinations that no chosen case has, per unit of cost. Among equals a
    hash of the name decides: the first of them would always be that of the first values, and the last parameters
    would hardly vary. So the selection depends on names alone, and is the same in every process.
    """
    combined = [case.combinations() for case in cases]
    missing = set().union(*combined)
    # A case is worth less the more others are chosen, never more: only the front of the queue needs a fresh look.
    queue = [
        (-len(found) / case.cost, crc32(case.name.encode()), i)
        for i, (case, found) in enumerate(zip(cases, combined, strict=True))
    ]
    heapq.heapify(queue)
    chosen: set[int] = set()
    while missing:
        worth, order, i = heapq.heappop(queue)
        left = -len(combined[i] & missing) / cases[i].cost
        if left == worth:
            chosen.add(i)
            missing -= combined[i]
        elif left < 0:
            heapq.heappush(queue, (left, order, i))
    return chosen
