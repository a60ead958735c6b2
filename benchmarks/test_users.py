"""Ours in the place of `F.gumbel_softmax`, on the shapes that programs have: time, on one thread and on all."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import users
from benchmarks.harness import OURS, Case

QUICK = ("token pruning: [128, 196, 2]", "routers: [8192, 64]", "tabular GANs: [500, 10]")
SHARE = 0.1  # of the budget of a case, since there are hundreds


def cases_users(option: Any) -> list[Case]:
    """Hard and soft, forward and with backward, in each dtype, on one thread and on all."""
    threads = sorted({1, torch.get_num_threads()}) if option.device == "cpu" else [None]
    return [
        shape.case(hard, pass_, dtype, count, option.device)
        for shape in users.SHAPES
        if not option.quick or str(shape) in QUICK
        for hard in (shape.hard, not shape.hard)
        if not option.quick or hard == shape.hard
        for dtype in option.users_dtypes
        for pass_ in ("forward", "forward+backward")
        for count in threads
    ]


def test_users(case, race, request):
    # It takes seconds to compile a case, more than all else.
    own = users.hard(case) == users.shape_of(case).hard and case.dtype == "float32"
    contestants = users.build(case, with_compiled=own and not request.config.option.quick)
    race(case, contestants, lambda: users.check(case, contestants[OURS]), {"eager": 1.0}, share=SHARE)
