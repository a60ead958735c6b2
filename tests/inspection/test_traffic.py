"""Memory traffic of the Triton kernels, counted in the interpreter, against the least that is possible."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

pytest.importorskip("triton", reason="Triton is not installed")

from grade_kernels.backends import GradientRule, Head, Noise, Rows, Sample, get
from grade_kernels.backends.triton.head_support import SplitPass
from grade_kernels.backends.triton.sizes import HeadTile
from grade_kernels.backends.triton.targets import INTERPRETED
from grade_kernels.inspection import traffic
from tests.support.helpers import resize
from tests.support.needs import needs

pytestmark = needs("Triton's interpreter", bool(INTERPRETED))

fused = get("triton")
NOISE = Noise(torch.tensor(-2401053089206453570), None, 0)
ROWS, VOCAB = 2, 9001


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 512 tokens in splits of two, as a warp of 32 threads has them."""
    resize(monkeypatch, lanes=512, most_strips=1, row_split=1024)


def logits_and_sample(dtype):
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    return logits, fused.sample(logits, NOISE, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logsumexp", [False, True])
def test_sample(dtype, logsumexp, small_tiles):
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    with traffic.counted() as moved:
        fused.sample(logits, NOISE, logsumexp)
    least = logits.nbytes + ROWS * (8 + 4)
    assert least <= moved.of("sample_scan_kernel") + moved.of("sample_pick_kernel") <= 1.1 * least
    assert moved.loaded["sample_scan_kernel", "logits"] == logits.nbytes


def test_one_hot():
    _, sample = logits_and_sample(torch.bfloat16)
    with traffic.counted() as moved:
        fused.one_hot(sample, VOCAB, torch.bfloat16)
    assert moved.stored["one_hot_kernel", "out"] == 2 * ROWS * VOCAB
    assert moved.of("one_hot_kernel") <= 1.1 * (2 * ROWS * VOCAB)


@pytest.mark.parametrize("normalize", [False, True])
def test_softmax(normalize, small_tiles):
    """A normalised softmax reads the logits in both of its passes, and writes once."""
    logits, sample = logits_and_sample(torch.float32)
    with traffic.counted() as moved:
        rows = Rows.of(logits, torch.ones(ROWS), NOISE)
        fused.softmax(rows, sample.score_max, normalize=normalize, dtype=torch.float32)
    passes = 2 if normalize else 1
    assert moved.loaded["softmax_kernel", "logits"] == passes * logits.nbytes
    assert moved.stored["softmax_kernel", "weights"] == logits.nbytes
    assert moved.of("softmax_kernel") <= 1.1 * (passes + 1) * logits.nbytes


@pytest.mark.parametrize("estimator", ["ste", "st", "reinmax"])
def test_softmax_backward(estimator, small_tiles):
    """Each of the two passes reads logits and gradient once; the second writes the result."""
    logits, sample = logits_and_sample(torch.float32)
    dy, out = torch.randn(ROWS, VOCAB, 1), torch.empty(ROWS, VOCAB, 1)
    rule = GradientRule(estimator, torch.ones(ROWS), True)
    with traffic.counted() as moved:
        fused.softmax_backward(dy, Rows.of(logits, torch.ones(ROWS), NOISE), sample, rule, out)
    for kernel, tensors in (("softmax_backward_sums_kernel", 2), ("softmax_backward_apply_kernel", 3)):
        assert tensors * logits.nbytes <= moved.of(kernel) <= 1.1 * tensors * logits.nbytes
        assert moved.least(kernel) <= moved.of(kernel) <= 1.1 * moved.least(kernel)


@pytest.mark.parametrize("shape", [(40, 6, 1), (3, 6, 14), (1, 64, 40)])
@pytest.mark.parametrize("hard", [False, True])
def test_a_row_that_is_one_tile_is_read_once(shape, hard):
    logits, dy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    out, tau = torch.empty(shape), torch.ones(shape[0] * shape[2])
    rows = Rows(logits, tau, NOISE)
    with traffic.counted() as moved:
        score_max = fused.gumbel_softmax(rows, hard, out)
        fused.softmax_backward(dy, rows, Sample(tau[:0], score_max, tau, tau), GradientRule("ste"), out)
    forward, backward = "row_tile_kernel", "row_tile_backward_kernel"
    assert moved.loaded[forward, "logits"] == moved.stored[forward, "out"] == logits.nbytes
    assert moved.loaded[backward, "logits"] == moved.loaded[backward, "dy"] == logits.nbytes
    assert moved.stored[backward, "out"] == logits.nbytes
    seed_reads = 8 * 64  # by each program
    assert moved.of(forward) <= 2 * logits.nbytes + (tau.nbytes if hard else 2 * tau.nbytes) + seed_reads
    assert moved.of(backward) <= 3 * logits.nbytes + 2 * tau.nbytes + seed_reads


@pytest.mark.parametrize("hard", [False, True])
def test_a_row_of_several_tiles_is_read_twice_at_most(hard, monkeypatch):
    """And a hard sample is written without another look at the logits."""
    resize(monkeypatch, tile_groups=256, tile_tokens=64, row_split=1024)
    logits, dy, out = torch.randn(3, 2, 600, 20, generator=torch.Generator().manual_seed(0))
    tau = torch.ones(40)
    rows = Rows(logits, tau, NOISE)
    with traffic.counted() as moved:
        score_max = fused.gumbel_softmax(rows, hard, out)
        fused.softmax_backward(dy, rows, Sample(tau[:0], score_max, tau, tau), GradientRule("ste"), out)
    size = logits.nbytes
    assert moved.loaded["row_scan_kernel", "logits"] == moved.stored["row_write_kernel", "out"] == size
    assert moved.loaded["row_write_kernel", "logits"] == (0 if hard else size)
    least = {"row_scan_kernel": 1, "row_write_kernel": 1 if hard else 2, "row_sums_kernel": 2, "row_apply_kernel": 3}
    for kernel, tensors in least.items():
        assert tensors * size <= moved.of(kernel) <= 1.1 * tensors * size


@pytest.mark.parametrize("name", ["sample", "scores", "softmax"])
@pytest.mark.parametrize("more", [0, 16])
def test_head_moves_what_its_tiles_need(name, more, monkeypatch):
    """A program's rows of hidden are read again for every tile of columns, the head for every BM rows."""
    tile = HeadTile(16, 32, 16, 4, 2, more)
    split = 2 * tile.columns
    resize(monkeypatch, tiles={1: tile}, tiles_few_rows={}, head_split=split)
    rows, vocab, width = 19, 200, 40
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    lm_head = Head(hidden, torch.randn(vocab, width, generator=generator).bfloat16(), torch.zeros(vocab), None)
    tau = torch.ones(rows)
    candidates = []
    support = SplitPass.support

    def counting(self, *args, **kwargs):
        candidates.append(torch.minimum(self._slots["counts"], self._slots["room"]).sum().item())
        return support(self, *args, **kwargs)

    monkeypatch.setattr(SplitPass, "support", counting)
    with traffic.counted() as moved:
        if name == "sample":
            fused.head_sample(lm_head, NOISE)
        elif name == "scores":
            fused.head_scores(lm_head, tau, NOISE, 0.05)
        else:
            fused.head_softmax(lm_head, tau, NOISE, 0.05)
    kernel = "head_softmax_kernel" if name == "softmax" else "head_scores_kernel"
    blocks, tile_count = math.ceil(rows / tile.BM), math.ceil(vocab / tile.columns)
    per_step = {"hidden": tile.BM, "weight": tile.columns}
    for tensor, edge in per_step.items():
        assert moved.loaded[kernel, tensor] <= 2 * width * edge * blocks * tile_count
    # Rows that pad the last tile write none.
    assert moved.stored[kernel, "slots"] == 8 * sum(candidates)
    assert (sum(candidates) > 0) == (name != "sample")
    # All else together is small beside the product: bias, statistics of a split, candidates.
    product = sum(moved.loaded[kernel, tensor] for tensor in per_step)
    others = moved.of(kernel) - product - moved.loaded[kernel, "bias"] - moved.stored[kernel, "slots"]
    splits = math.ceil(vocab / split)
    assert moved.loaded[kernel, "bias"] <= 4 * tile.columns * tile_count * blocks
    assert others <= 4 * (8 * tile.BM * blocks * splits + 16 * splits * blocks)


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_a_chunk_is_read_once(eps, monkeypatch):
    """Four bytes for each logit, and for the padding of its last tile, in as many chunks and launches as there are."""
    resize(monkeypatch, head_split=64, chunk_tile=HeadTile(16, 32, 0, 4, 2), chunk_bytes=4 * 16 * 64)
    generator = torch.Generator().manual_seed(0)
    head = Head(*(torch.randn(n, 8, generator=generator).bfloat16() for n in (16, 150)), None, None)
    with traffic.counted() as moved:
        get("triton:chunks").head_scores(head, torch.ones(16), NOISE, eps)
    assert moved.loaded["head_scores_kernel", "hidden"] == 4 * 16 * 160
    assert ("head_scores_kernel", "weight") not in moved.loaded


def test_traffic_of_a_kernel_that_reads_twice_shows(small_tiles):
    logits, _ = logits_and_sample(torch.float32)
    with traffic.counted() as moved:
        for _ in range(2):
            fused.sample(logits, NOISE, False)
    assert moved.of("sample_scan_kernel") > 1.9 * moved.least("sample_scan_kernel")


def test_outside_nothing_is_counted():
    with traffic.counted() as moved:
        pass
    logits_and_sample(torch.float32)
    assert not moved.loaded
    assert not moved.stored


def test_compiled_kernels_cannot_be_counted(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), traffic.counted():
        pass
