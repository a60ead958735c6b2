"""The selection of cases that `make test` runs: `tests.support.covering`."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.covering import Case, covering

SIZES = {"backend": 4, "dtype": 4, "vocab": 8, "mask": 2}


def cases(**dear: int) -> list[Case]:
    """Every combination, without those of the first backend and the last dtype; `dear` values cost ten times as much."""
    values = [dict(zip(SIZES, found, strict=True)) for found in product(*map(range, SIZES.values()))]
    return [
        Case(str(x), x, 10.0 if any(x[name] == value for name, value in dear.items()) else 1.0)
        for x in values
        if (x["backend"], x["dtype"]) != (0, 3)
    ]


def together(chosen: list[Case], strength: int) -> set[tuple[tuple[str, int], ...]]:
    return {found for case in chosen for found in combinations(case.values.items(), strength)}


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_what_occurs_together_still_does(strength: int) -> None:
    every = cases()
    chosen = [every[i] for i in covering(every, strength)]
    assert together(chosen, strength) == together(every, strength)


def test_few_cases_are_chosen() -> None:
    assert len(covering(cases(), 1)) <= 10  # 8 values of one parameter; what does not fit takes a case or two
    assert len(covering(cases(), 2)) <= 48  # 32 pairs of two parameters
    assert len(covering(cases(), 4)) == len(cases())


def test_dear_cases_are_few() -> None:
    every = cases(backend=2)
    dear = sum(every[i].values["backend"] == 2 for i in covering(every, 2))
    assert dear == 8  # each value of `vocab` needs one


def test_the_selection_depends_on_names_alone() -> None:
    every = cases()
    backwards = every[::-1]
    assert {every[i].name for i in covering(every, 2)} == {backwards[i].name for i in covering(backwards, 2)}
