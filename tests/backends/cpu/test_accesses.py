"""What the kernels for rows read and write: rows that end, or begin, where memory does.

A page that may not be touched lies before and behind each tensor. An access outside ends the process, so each instruction set
has one of its own, in which all cases run.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import random
import subprocess
import sys
from itertools import permutations

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends.records import GradientRule, Noise, Rows, Sample
from grade_kernels.dtypes import compute_dtype
from tests.support import ROOT, simd_host
from tests.support.helpers import DTYPES
from tests.support.needs import needs_backend

pytestmark = needs_backend("cpu")

PAGE = mmap.PAGESIZE
ROOM = 16 * PAGE
VOCABS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129)
COUNTS = (1, 2, 3, 5, 8, 16, 17, 33)


class Arena:
    """Memory between two pages that may not be touched."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, ROOM + 2 * PAGE)  # kept: the pages are given back with it
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        library = ctypes.CDLL(None, use_errno=True)
        for page in (start, start + PAGE + ROOM):
            assert library.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
        self.start = start + PAGE

    def tensor(self, shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> torch.Tensor:
        """NaN everywhere, with dimensions in memory in this order; behind or before it, nothing."""
        size = math.prod(shape) * dtype.itemsize
        ctypes.memset(self.start, 0xFF, ROOM)
        place = self.start + ROOM - size if at_end else self.start
        flat = torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=dtype)
        inverse = [order.index(i) for i in range(len(order))]
        return flat.view([shape[i] for i in order]).permute(inverse)


def check(cases: int) -> None:
    choose, generator = random.Random(0), torch.Generator().manual_seed(0)
    backend, arenas = backends.get("cpu"), [Arena() for _ in range(4)]
    assert backend.why_unavailable() is None
    orders = list(permutations(range(3)))
    for case in range(cases):
        vocab, dtype = VOCABS[case % len(VOCABS)], choose.choice(DTYPES)
        a, b = choose.choice(COUNTS), choose.choice((1, 1, *COUNTS))
        while a * vocab * b * dtype.itemsize > ROOM:
            a, b = (a + 1) // 2, (b + 1) // 2
        shape, what = (a, vocab, b), f"{(a, vocab, b)} {dtype}"
        x, y, dy, dx = (arena.tensor(shape, choose.choice(orders), dtype, choose.random() < 0.6) for arena in arenas)
        x.copy_(torch.randn(shape, generator=generator))
        dy.copy_(torch.randn(shape, generator=generator))
        if choose.random() < 0.2:
            x[:, 1:] = -math.inf
        tau = (torch.rand(a * b, generator=generator) + 0.1).to(compute_dtype(dtype))
        rows = Rows(x, tau, Noise(torch.tensor(7), None, choose.choice((0, 1, 3, 2**32 - vocab))))
        hard = choose.random() < 0.5
        if hard:
            y.zero_()
        score_max = backend.gumbel_softmax(rows, hard, y)
        sums = (y.float().sum(1) - 1).abs().max()
        assert sums < (0.05 if dtype.itemsize == 2 else 1e-5), f"{what}: not every weight is written"
        nothing = score_max.new_empty(0)
        sample = Sample(nothing.long(), score_max, nothing, nothing)
        dtau = backend.softmax_backward(dy, rows, sample, GradientRule("ste", needs_dtau=True), dx)
        assert dx.isfinite().all(), what
        assert dtau.isfinite().all(), what


@pytest.mark.takes_long("a process; the others run the same templates", lambda isa: isa == "generic")
@pytest.mark.parametrize("isa", simd_host.ISAS)
def test_nothing_beside_the_rows_is_touched(isa: str) -> None:
    reason = simd_host.why_not(isa)
    if reason is not None:
        pytest.skip(reason)
    environment = os.environ | {"GRADE_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.backends.cpu.test_accesses"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    check(300)
