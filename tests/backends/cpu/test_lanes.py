"""Rows of given logits in the lanes of vectors (csrc/cpu/lanes.inl), beside the kernels for one row at a time.

Which instruction set serves is decided when a process starts. So each runs all checks of this file in a process of its own:
functions of which the names begin with `check`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from grade_kernels.backends.records import GradientRule, Noise, Rows, Sample
from grade_kernels.dtypes import compute_dtype
from tests.support import ROOT, simd_host
from tests.support.helpers import DTYPES, assert_accurate
from tests.support.needs import needs_backend
from tests.support.rows import REFINED, SEED

pytestmark = needs_backend("cpu")

Layout = Callable[[torch.Tensor], torch.Tensor]


def _wide(x: torch.Tensor, before: int, after: int, dim: int) -> torch.Tensor:
    """The same numbers as a part of memory that holds sevens elsewhere."""
    shape = list(x.shape)
    shape[dim] += before + after
    return x.new_full(shape, 7.0).narrow(dim, before, x.shape[dim]).copy_(x)


# `[A, V, B]` of the same numbers, laid out in other ways.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.contiguous(),
    "tokens last": lambda x: x.movedim(1, 2).contiguous().movedim(2, 1),
    "tokens first": lambda x: x.movedim(1, 0).contiguous().movedim(0, 1),
    "every other": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "part of rows": lambda x: _wide(x, 1, 2, 1),
    "part of columns": lambda x: _wide(x, 3, 1, 2),
}


class Call:
    """`gumbel_softmax` and its gradient for one set of rows, by the cpu backend, and the float64 truth."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, vocab_start: int = 0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = shape[0] * shape[2]
        compute = compute_dtype(dtype)
        self.logits, self.dy = ((2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
        spread = torch.logspace(math.log10(0.05), 1, max(count, 1), dtype=compute)[:count]
        self.tau = torch.where(torch.arange(count) % 3 == 1, 1.0, spread)
        self.row_ids = torch.randint(-(2**62), 2**62, (count,), generator=generator) if vocab_start else None
        self.vocab_start = vocab_start

    @property
    def noise(self) -> Noise:
        return Noise(torch.tensor(SEED), self.row_ids, self.vocab_start)

    def run(self, layout: Layout = LAYOUTS["contiguous"]) -> list[torch.Tensor]:
        """One-hot, soft sample, gradient, gradient of tau, greatest score."""
        backend = gk.backends.get("cpu")
        rows = Rows(layout(self.logits), self.tau, self.noise)
        hard = layout(torch.zeros_like(self.logits))
        soft, dlogits = (layout(torch.full_like(self.logits, math.nan)) for _ in range(2))
        score_max = backend.gumbel_softmax(rows, True, hard)
        # The kernel for one row and tau = 1 has the weights alone, and rounds their greatest once more.
        margin = 2e-6 if self.logits.shape[1] > 64 else 0.0
        torch.testing.assert_close(
            backend.gumbel_softmax(rows, False, soft), score_max, rtol=margin, atol=margin, equal_nan=True
        )
        nothing = score_max.new_empty(0)
        sample = Sample(nothing.long(), score_max, nothing, nothing)
        dtau = backend.softmax_backward(layout(self.dy), rows, sample, GradientRule("ste", needs_dtau=True), dlogits)
        found = []
        for out in (hard, soft, dlogits):
            if layout in (LAYOUTS["part of rows"], LAYOUTS["part of columns"]):
                base = out._base
                assert base is not None
                assert (base == 7).sum() == base.numel() - out.numel(), "written beside the rows"
            found.append(self.flat(out))
        return [*found, dtau, score_max]

    @staticmethod
    def flat(x: torch.Tensor) -> torch.Tensor:
        a, vocab, b = x.shape
        return x.movedim(1, 2).reshape(a * b, vocab)

    def relaxed(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, soft sample, gradient and gradient of tau, by plain PyTorch in a dtype."""
        rows, vocab = (logits := self.flat(self.logits)).shape
        g = self.noise.on(rows, logits.device).dense(rows, vocab, vocab_start=0, dtype=torch.float64)
        tau = self.tau.to(dtype)[:, None]
        scores = logits.to(dtype) + g.to(dtype)
        y = (scores / tau).softmax(1)
        dy = self.flat(self.dy).to(dtype)
        part = torch.where(y > 0, y * dy, 0.0)
        dlogits = torch.where(y > 0, y * (dy - part.sum(1, keepdim=True)) / tau, 0.0)
        height = torch.where(y > 0, scores - scores.amax(1, keepdim=True), 0.0)
        return scores, y, dlogits, -(dlogits * height).sum(1) / tau[:, 0]

    def check_against_truth(self, layout: Layout, what: str) -> None:
        hard, soft, dlogits, dtau, score_max = self.run(layout)
        scores, y, true_dlogits, true_dtau = self.relaxed(torch.float64)
        _, torch_y, torch_dlogits, torch_dtau = self.relaxed(self.logits.dtype)
        assert torch.equal(hard, F.one_hot(scores.argmax(1), scores.shape[1]).to(hard.dtype)), what
        compute = compute_dtype(self.logits.dtype)
        top = scores.amax(1)
        assert_accurate(
            score_max[:, None],
            top[:, None].to(compute),
            top[:, None],
            f"{what} score_max",
            terms=top[:, None].abs() + 8,
        )
        assert_accurate(soft, torch_y, y, f"{what} soft", terms=y * 4 * (1 + 1 / self.tau[:, None].double()))
        terms = y * self.flat(self.dy).double().abs().amax(1, keepdim=True) / self.tau[:, None].double()
        terms = terms * 4 * (1 + 1 / self.tau[:, None].double())
        assert_accurate(dlogits, torch_dlogits, true_dlogits, f"{what} dlogits", terms=terms)
        height = torch.where(y > 0, (scores - top[:, None]).abs() + 1, 0.0)
        tau_terms = (terms * height).sum(1, keepdim=True) / self.tau[:, None].double()
        assert_accurate(
            dtau[:, None], torch_dtau[:, None].to(compute), true_dtau[:, None], f"{what} dtau", terms=tau_terms
        )


def _shapes() -> Iterator[tuple[tuple[int, int, int], str]]:
    """Vocabularies around the sizes of quads, vectors and tiles; rows around those of groups and their halves."""
    rows = [(1, 1), (5, 1), (16, 1), (70, 1), (1, 40), (3, 16), (5, 7), (64, 1), (2, 33), (0, 1), (33, 1)]
    names = list(LAYOUTS)
    for i, vocab in enumerate([*range(1, 14), 15, 16, 17, 31, 33, 63, 64, 65, 67, 100, 128, 129, 130]):
        for j in range(4):
            a, b = rows[(3 * i + j) % len(rows)]
            yield (a, vocab, b), names[(i + 2 * j) % len(names)]


def check_values() -> None:
    for dtype in DTYPES:
        for i, (shape, name) in enumerate(_shapes()):
            call = Call(shape, dtype, vocab_start=(0, 3, 2**34 + 1, 0)[i % 4], seed=i)
            call.check_against_truth(LAYOUTS[name], f"{dtype} {shape} {name}")


def check_wide_rows() -> None:
    """Rows of several chunks, each with weights that count from a maximum of its own."""
    for vocab, dtype in [*((v, d) for v in (4096, 4159, 9000) for d in DTYPES), (270_000, torch.float32)]:
        for vocab_start in (0, 61):
            call = Call((5, vocab, 1), dtype, vocab_start=vocab_start, seed=vocab)
            call.logits[1, :4096] = -math.inf  # a chunk, or a row but for its last token
            call.logits[1, -1] = 0.0
            call.logits[2, :4100] -= 300.0
            call.logits[3, 4000:] -= 20.0
            call.check_against_truth(LAYOUTS["contiguous"], f"{dtype} {vocab} {vocab_start} wide")
            call.logits[4] = torch.finfo(dtype).min
            call.logits[4, 17] = -math.inf
            call.logits[0, -1] = math.nan
            call.logits[1, -1] = -math.inf if vocab == 4096 else math.inf
            assert call.run()[-1].isnan().nonzero().flatten().tolist() == [0, 1]


def check_masked_tokens() -> None:
    """Masks of every kind, down to a single open token, and gradients that a masked token must not pass on."""
    for dtype in DTYPES:
        for vocab in (2, 3, 4, 5, 6, 7, 8, 21, 70):
            call = Call((37, vocab, 1), dtype, seed=vocab)
            open_token = torch.arange(37) % vocab
            mask = torch.rand(37, vocab, generator=torch.Generator().manual_seed(1)) < 0.5
            mask[::2] = True
            mask.scatter_(1, open_token[:, None], False)
            call.logits[:, :, 0][mask] = -math.inf
            hard, soft, dlogits, dtau, _ = call.run()
            for y in (hard, soft):
                assert (y[mask] == 0).all()
                if y is hard or vocab <= 64:
                    assert torch.equal(y[::2], F.one_hot(open_token[::2], vocab).to(dtype))
            assert (dlogits[mask] == 0).all()
            call.check_against_truth(LAYOUTS["contiguous"], f"{dtype} {vocab} masked")
            call.dy[:, :, 0][mask] = math.nan
            assert all(torch.equal(x, y) for x, y in zip(call.run(), (hard, soft, dlogits, dtau), strict=False))


def check_layouts_agree_to_the_bit() -> None:
    """Tokens and scores in every layout, and beside the kernel for one row; up to a tile the other results, too."""
    for dtype in DTYPES:
        for vocab in (1, 2, 3, 6, 8, 10, 37, 64, 65, 200):
            call = Call((3, vocab, 23), dtype, vocab_start=vocab % 4, seed=vocab)
            first = call.run()
            found = gk.backends.get("cpu").sample(call.flat(call.logits), call.noise, False)
            assert torch.equal(first[0], F.one_hot(found.ids, vocab).to(dtype))
            assert torch.equal(first[-1], found.score_max)
            for name, layout in LAYOUTS.items():
                for i, (x, y) in enumerate(zip(first, call.run(layout), strict=True)):
                    same = torch.equal(x, y) or (vocab > 64 and i in (1, 2, 3))
                    assert same, f"{dtype} {vocab} {name}: result {i} differs"
            # One row, many times, which all lie in one place.
            rows = Rows(call.logits[:1, :, :1].expand(5, vocab, 9), torch.ones(45, dtype=call.tau.dtype), call.noise)
            if call.row_ids is not None:
                rows = rows._replace(noise=call.noise._replace(row_ids=call.row_ids[:45]))
            out, plain = torch.zeros(2, 5, vocab, 9, dtype=dtype)
            score_max = gk.backends.get("cpu").gumbel_softmax(rows, True, out)
            again = gk.backends.get("cpu").gumbel_softmax(rows._replace(logits=rows.logits.contiguous()), True, plain)
            assert torch.equal(score_max, again)
            assert torch.equal(out, plain)


def check_rows_do_not_depend_on_their_neighbours() -> None:
    """A row alone, and among rows of other temperatures: the same bits."""
    for vocab in (2, 6, 64, 65):
        call = Call((37, vocab, 1), torch.float32, vocab_start=1, seed=3)
        whole = call.run()
        for row in (0, 1, 15, 36):
            alone = Call((37, vocab, 1), torch.float32, vocab_start=1, seed=3)
            assert alone.row_ids is not None
            part = slice(row, row + 1)
            alone.logits, alone.dy, alone.tau = alone.logits[part], alone.dy[part], alone.tau[part]
            alone.row_ids = alone.row_ids[part]
            assert all(torch.equal(x[part], y) for x, y in zip(whole, alone.run(), strict=True))


def check_bad_rows_are_marked_and_alone() -> None:
    for vocab in (1, 2, 5, 64, 70):
        for name in ("contiguous", "tokens first"):
            call = Call((40, vocab, 1), torch.float32, seed=4)
            good = call.run(LAYOUTS[name])
            bad = {3: math.nan, 17: math.inf, 39: -math.inf}
            for row, value in bad.items():
                call.logits[row, slice(None) if value == -math.inf else vocab // 2] = value
            # Large numbers whose sum overflows are no reason to mark a row.
            call.logits[20] = 3e38
            call.logits[21], call.logits[22, 0] = -3e38, -3e38
            _, soft, _, _, score_max = call.run(LAYOUTS[name])
            assert score_max.isnan().nonzero().flatten().tolist() == list(bad)
            assert soft.isnan().all(1).nonzero().flatten().tolist() == list(bad)
            others = [row for row in range(40) if row not in bad and row not in (20, 21, 22)]
            for x, y in zip(good, call.run(LAYOUTS[name]), strict=True):
                assert torch.equal(x[others], y[others])


def check_ties_go_to_the_smaller_token() -> None:
    for vocab in (2, 3, 8, 64, 130):
        for layout in LAYOUTS.values():
            for value in (1e30, torch.finfo(torch.float32).min):
                logits = torch.full((35, vocab, 1), value)  # noise is lost in numbers this large
                logits[1::2, : vocab // 2] = -math.inf
                rows = Rows(layout(logits), torch.ones(35), Noise(torch.tensor(SEED), None, 0))
                out = torch.zeros_like(logits)
                gk.backends.get("cpu").gumbel_softmax(rows, True, out)
                assert out[:, :, 0].argmax(1).tolist() == [0 if row % 2 == 0 else vocab // 2 for row in range(35)]
                assert (out.sum(1) == 1).all()


def check_refined_words() -> None:
    """The rare path: a token whose noise needs the second word."""
    for row, token in REFINED:
        for vocab, place in ((2, 1), (7, 5), (64, 40), (130, 99)):
            call = Call((21, vocab, 1), torch.float32, vocab_start=token - place)
            assert call.row_ids is not None
            call.logits[:] = 0.0
            call.row_ids[18] = row
            hard, _, _, _, score_max = call.run(LAYOUTS["tokens first"])
            assert hard[18, place] == 1
            assert score_max[18] > 16.6
            call.check_against_truth(LAYOUTS["contiguous"], f"refined {row} {vocab}")


def check_a_large_one_hot() -> None:
    """Memory that holds zeros already is not filled again, and gets its ones."""
    logits = torch.randn(64, 9000, generator=torch.Generator().manual_seed(5))
    for x, dim in ((logits, 1), (logits.T.contiguous(), 0)):
        y = gk.gumbel_softmax(x, hard=True, dim=dim, noise=gk.GumbelNoise(SEED))
        ids = gk.gumbel_sample(x, dim=dim, noise=gk.GumbelNoise(SEED))
        assert torch.equal(y, F.one_hot(ids, 9000).movedim(-1, dim).float())
        assert y.is_contiguous()


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.takes_long("seconds in a process; the others run the same templates", lambda isa: isa == "generic")
@pytest.mark.parametrize("isa", simd_host.ISAS)
def test_every_instruction_set(isa: str) -> None:
    reason = simd_host.why_not(isa)
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.cpu.test_lanes"],
        cwd=ROOT,
        env={**os.environ, "GRADE_KERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [check.__name__ for check in CHECKS]


if __name__ == "__main__":
    for check in CHECKS:
        with gk.use_backend("cpu"):
            check()
        sys.stdout.write(check.__name__ + "\n")
