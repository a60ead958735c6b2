"""The PTX of the head's kernels, run lane by lane: it must do what the Triton code in its place does elsewhere."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from grade_kernels.backends.triton.head_ptx import COLLECT, REFINE
from grade_kernels.noise import DOMAIN_REFINE, REFINE_BELOW, gumbel_from_words, philox_4x32_10
from tests.ptx_machine import LANES, Warp

STRIDE = 24  # slots from row to row


def long(x):
    return torch.from_numpy(x.astype(np.int64))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("groups", sorted(REFINE.value))
def test_refinement(groups, share):
    """Scaled noise is log2 of E, in float64 the contract's."""
    random = np.random.default_rng(groups)
    words = random.integers(0, 2**31, (4 * groups, LANES), dtype=np.uint32)
    low = random.random(words.shape) < share
    words[low] = random.integers(0, REFINE_BELOW, int(low.sum()), dtype=np.uint32)
    words[0, 3], words[0, 4] = REFINE_BELOW, 0 if share else REFINE_BELOW
    rough = np.log2((words + 0.5) / 2**32).astype(np.float32)
    counters = random.integers(0, 2**32, (groups, LANES), dtype=np.uint32)
    row_lo, row_hi, k0, k1 = random.integers(0, 2**32, (4, LANES), dtype=np.uint32)
    found = np.full_like(rough, np.nan)
    Warp([*found, *rough, *words, *counters, row_lo, row_hi, k0, k1]).run(REFINE.value[groups])

    domain = torch.full((LANES,), DOMAIN_REFINE)
    fine = [
        philox_4x32_10((long(counter), long(row_lo), long(row_hi), domain), (long(k0), long(k1)))
        for counter in counters
    ]
    refinement = torch.stack([word for call in fine for word in call])
    truth = -gumbel_from_words(long(words), refinement, torch.float64).numpy() / np.log(2)
    small = words < REFINE_BELOW
    assert np.abs(found - truth)[small].max(initial=0) < 1e-5
    assert (found[~small] == rough[~small]).all()
    assert small.any() == bool(share)


def warp_of_candidates(groups, threads, share, seed, lanes=None):
    """Operands of COLLECT for a warp with `32 // threads` rows; `lanes` says where each place is held."""
    random = np.random.default_rng(seed)
    lanes = np.arange(LANES) if lanes is None else lanes
    row, thread = lanes // threads, lanes % threads
    weights = random.random((4 * groups, LANES), dtype=np.float32)
    hurdles = np.full_like(weights, 1 - share)
    weights[random.random(weights.shape) < 0.05] = np.nan  # rows that are bad anyway are nobody's candidates
    scores = random.standard_normal(weights.shape).astype(np.float32)
    first = 1000
    tokens = np.stack([(first + 4 * (threads * g + thread)).astype(np.int32) for g in range(groups)])
    rows = (7 + row).astype(np.int32)
    before = (row * 3 % 19).astype(np.int32)
    memory = np.full((7 + LANES) * STRIDE * 8, 0xEE, np.uint8)
    found = np.full(LANES, -1, np.int32)
    operands = [
        found, *weights, *hurdles, *scores, *tokens, before, rows, np.zeros(LANES, np.uint64),
        np.full(LANES, STRIDE * 8, np.int32), np.full(LANES, STRIDE - 4, np.int32),
    ]  # fmt: skip
    return operands, memory


def expected(operands, memory, groups, threads):
    """What is to be written, row after row and token after token."""
    weights, hurdles, scores = (np.stack(operands[1 + 4 * groups * k : 1 + 4 * groups * (k + 1)]) for k in range(3))
    tokens = operands[1 + 12 * groups : 1 + 13 * groups]
    before, rows = operands[1 + 13 * groups : 3 + 13 * groups]
    memory, counts, places = memory.copy(), before.copy(), []
    for row in np.unique(rows):
        lanes = np.flatnonzero(rows == row)
        count = before[lanes[0]]
        for group in range(groups):
            for lane in lanes:
                for i in range(4 * group, 4 * group + 4):
                    if not weights[i, lane] > hurdles[i, lane]:
                        continue
                    if count < STRIDE - 4:
                        at = (row * STRIDE + count) * 8
                        pair = np.array([tokens[group][lane] + i % 4, scores[i, lane].view(np.int32)], np.int32)
                        memory[at : at + 8] = pair.view(np.uint8)
                        places.append(at)
                    count += 1
        counts[lanes] = count
    return memory, counts, places


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(("groups", "threads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_candidates(groups, threads, share):
    """In token order behind those before them, each once, and none beyond a row's slots."""
    for seed in range(5):
        operands, memory = warp_of_candidates(groups, threads, share, seed)
        want, counts, places = expected(operands, memory, groups, threads)
        warp = Warp(operands, memory)
        warp.run(COLLECT.value[8 * threads + groups])
        assert (operands[0] == counts).all()
        assert sorted(warp.written) == sorted(places)
        assert (memory == want).all()


@pytest.mark.parametrize("lanes", ["rows next to each other", "threads the other way round"])
def test_a_layout_that_nobody_expected_is_an_overflow(lanes):
    """Then every row of the warp is sent the dense way, instead of being filled with another's candidates."""
    place = np.arange(LANES)
    order = place % 8 * 4 + place // 8 if lanes == "rows next to each other" else place // 4 * 4 + 3 - place % 4
    operands, memory = warp_of_candidates(1, 4, 0.3, 0, order)
    Warp(operands, memory).run(COLLECT.value[8 * 4 + 1])
    assert (operands[0] >= STRIDE).all()
