"""Ours in the place of `F.gumbel_softmax`: the shapes that programs have, and steps of models. One thread, and all."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import models, users
from benchmarks.harness import OURS, Case

QUICK = ("token pruning: [128, 196, 2]", "routers: [8192, 64]", "tabular GANs: [500, 10]")
SHARE = 0.1  # of the budget of a case, since there are hundreds
# A case of more logits takes many seconds. So only the program's own sample is measured then, and only in float32.
LARGE = 2**24


def _threads(option: Any) -> list[int | None]:
    return [*sorted({1, torch.get_num_threads()})] if option.device == "cpu" else [None]


def _is_own(shape: users.Shape, hard: bool, dtype: str) -> bool:
    """The sample that the program draws, in the usual dtype."""
    return hard == shape.hard and dtype == "float32"


def cases_users(option: Any) -> list[Case]:
    """Hard and soft, forward and with backward, in each dtype, on one thread and on all."""
    return [
        shape.case(hard, pass_, dtype, count, option.device)
        for shape in users.SHAPES
        if not option.quick or str(shape) in QUICK
        for hard in ((shape.hard,) if option.own else (shape.hard, not shape.hard))
        for dtype in (("float32",) if option.own else option.users_dtypes)
        if _is_own(shape, hard, dtype) or not (option.quick or shape.rows * shape.vocab > LARGE)
        for pass_ in ("forward", "forward+backward")
        for count in _threads(option)
    ]


def test_users(case, race, request):
    # It takes seconds to compile a case, more than all else.
    own = _is_own(users.shape_of(case), users.hard(case), case.dtype)
    contestants = users.build(case, with_compiled=own and not request.config.option.quick)
    others = users.checks(case, contestants)
    race(case, contestants, lambda: users.check(case, contestants[OURS]), share=SHARE, others=others)


STEP = "training step, "


def cases_steps(option: Any) -> list[Case]:
    """A step of training of each model, on the CPU."""
    return [
        Case(STEP + name, "forward+backward", "float32", program.rows, program.vocab, threads=count)
        for name, program in models.PROGRAMS.items()
        if not option.quick and option.device == "cpu" and "float32" in option.users_dtypes
        for count in _threads(option)
    ]


def test_steps(case, race):
    name = case.op.removeprefix(STEP)
    race(case, models.build(name), lambda: models.check(name))
