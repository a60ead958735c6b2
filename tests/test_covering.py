"""The selection of cases that `make test` runs: `tests.support.covering`."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from tests.support.covering import Case, covering

SIZES = {"backend": 4, "dtype": 4, "vocab": 8, "mask": 2}


def cases(strength: int = 2, **changes: Any) -> list[Case]:
    """Every combination, without those of the first backend and the last dtype."""
    values = [dict(zip(SIZES, found, strict=True)) for found in product(*map(range, SIZES.values()))]
    return [Case(str(x), x, strength, **changes) for x in values if (x["backend"], x["dtype"]) != (0, 3)]


def apart(slow: int) -> list[Case]:
    """The same with backends apart, one of which is slow."""
    found = []
    for case in cases():
        values = dict(case.values)
        backend = values.pop("backend")
        found.append(Case(case.name, values, 1 if backend == slow else 2, backend, 8.0 if backend == slow else 1.0))
    return found


def chosen(every: list[Case]) -> list[Case]:
    return [every[i] for i in covering(every)]


def together(some: list[Case], strength: int) -> set[tuple[tuple[str, int], ...]]:
    return {found for case in some for found in combinations(sorted(case.values.items()), strength)}


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_what_occurs_together_still_does(strength: int) -> None:
    every = cases(strength)
    assert together(chosen(every), strength) == together(every, strength)


def test_few_cases_are_chosen() -> None:
    assert len(covering(cases(1))) <= 10  # 8 values of one parameter; what does not fit takes a case or two
    assert len(covering(cases(2))) <= 48  # 32 pairs of two parameters
    assert len(covering(cases(4))) == len(cases())


def test_pairs_occur_on_each_backend_and_values_on_a_slow_one() -> None:
    every = apart(slow=2)
    for backend in range(4):
        own = [case for case in every if case.apart == backend]
        some = [case for case in chosen(every) if case.apart == backend]
        strength = 1 if backend == 2 else 2
        assert together(some, strength) == together(own, strength)
        assert len(some) <= (8 if backend == 2 else 40)


def test_dear_cases_are_few() -> None:
    every = [case._replace(cost=8.0 if case.values["backend"] == 2 else 1.0) for case in cases(2)]
    assert sum(case.values["backend"] == 2 for case in chosen(every)) == 8  # each value of `vocab` needs one


def test_the_selection_depends_on_names_alone() -> None:
    every = cases()
    assert {case.name for case in chosen(every)} == {case.name for case in chosen(every[::-1])}
