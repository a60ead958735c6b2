"""The fewest cases of a test, or nearly, in which every value and every pair of values of its parameters still occurs."""

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
    cost: float = 1.0  # of running it, relative to others of the same test


def covering(cases: Sequence[Case], strength: int) -> set[int]:
    """Positions of a selection in which each `strength` values that occur together in `cases` still do.

    Greedy: the next case is the one with the most combinations that no chosen case has, per unit of cost. Among equals a
    hash of the name decides: the first of them would always be that of the first values, and the last parameters
    would hardly vary. So the selection depends on names alone, and is the same in every process.
    """
    combined = [
        frozenset(combinations(sorted(case.values.items(), key=lambda item: item[0]), min(strength, len(case.values))))
        for case in cases
    ]
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
