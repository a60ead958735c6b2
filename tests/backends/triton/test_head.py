"""The Triton kernels of the operations through a head: values by the interpreter.

Without a GPU, kernels run through Triton's interpreter (TRITON_INTERPRET=1), which is slow: tiles and shapes are small.
"""

import math
import os

import pytest
import torch

from tests.support.ptx.setting import SIMULATED

if not torch.cuda.is_available() and not SIMULATED:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from grade_kernels.backends import Head, Noise, get
from grade_kernels.backends.triton.sizes import HeadTile, TritonSizes
from tests.support.helpers import resize
from tests.support.interpreter import INTERPRETED
from tests.support.needs import needs, needs_backend
from tests.support.problems import tiny_capacity

pytest.importorskip("triton", reason="Triton is not installed")

plain = get("torch")
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
runs = needs_backend("triton")
pytestmark = [INTERPRETED] if DEVICE == "cpu" else []
SEED = -2401053089206453570
ROWS = torch.tensor([5, -7, 2**40 + 3, 2**33, 0, 11])
# (row id, token) under SEED whose word is below 256.
REFINED = [(-34359738340, 166090), (-34359738048, 196101)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles that the interpreter gets through, and several splits, launches and chunks in a small vocabulary.

    The simulator has those that are shipped.
    """
    if DEVICE == "cpu" and not SIMULATED:
        tile = HeadTile(16, 32, 32, 4, 2)
        resize(monkeypatch, tile_float32=tile, tiles={1: tile, 2: tile}, tiles_few_rows={}, head_split=64,
               chunk_tile=HeadTile(16, 32, 0, 4, 2), chunk_bytes=4 * 64 * 10)  # fmt: skip


@pytest.fixture(params=["tiles", "chunks"])
def fused(request):
    """The backend, for either way through a head."""
    return get(f"triton:{request.param}")


@pytest.fixture
def tiles():
    """The backend whose kernels multiply."""
    return get("triton:tiles")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised memory is NaN, so reading it cannot go unnoticed."""
    if SIMULATED:
        return  # the simulator knows what nobody wrote
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-(10**9))

    monkeypatch.setattr(torch, "empty", poisoned)


def make(rows, vocab, width, dtype=torch.float32, bias=False, softcap=None, seed=0, scale=2.0, exact=False):
    """A head; with `exact` of small multiples of 1/16, whose products are the same in whatever order they are summed."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * scale * width**-0.5
    if exact:
        hidden, weight = (x.mul(16).round().div(16) for x in (hidden, weight))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return Head(hidden, weight, torch.randn(vocab, generator=generator) if bias else None, softcap)


def double(head):
    bias = None if head.bias is None else head.bias.double()
    return head._replace(hidden=head.hidden.double(), weight=head.weight.double(), bias=bias)


def on(thing):
    """Tensors, alone or in a record, on the device under test."""
    if isinstance(thing, (Head, Noise)):
        return type(thing)(*(on(part) for part in thing))
    return thing.to(DEVICE) if isinstance(thing, torch.Tensor) else thing


def noise(row_ids=None, vocab_start=0):
    return Noise(torch.tensor(SEED), row_ids, vocab_start)


def close(found, truth, tolerance=2e-5):
    torch.testing.assert_close(found.cpu().double(), truth.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def same_support(found, truth):
    for name in ("overflow", "offsets", "tokens"):
        assert torch.equal(getattr(found, name).cpu(), getattr(truth, name)), name
    close(found.p, truth.p)


CASES = {
    "plain": {"shape": (5, 257, 40), "eps": 0.02},
    "eps 0": {"shape": (5, 131, 40), "eps": 0.0},
    "every flag": {"shape": (19, 211, 33), "eps": 0.05, "bias": True, "softcap": 3.0, "start": 2**34 + 3, "rows": True},
    "one token": {"shape": (2, 1, 16), "eps": 0.3},
    "below a tile": {"shape": (1, 19, 5), "eps": 0.1, "start": 5, "bias": True},
    "many launches": {"shape": (3, 1543, 16), "eps": 0.05, "start": 2},
}


def arguments(case, dtype):
    rows, vocab, width = case["shape"]
    head = make(rows, vocab, width, dtype, case.get("bias", False), case.get("softcap"))
    generator = torch.Generator().manual_seed(1)
    tau = 0.5 + torch.rand(rows, generator=generator)
    row_ids = torch.randint(-(2**62), 2**62, (rows,), generator=generator) if case.get("rows") else None
    return head, tau, row_ids, case.get("start", 0)


@pytest.mark.uncollect_if(
    lambda name, dtype: name == "many launches" and dtype != torch.bfloat16, "one dtype is enough"
)
@runs
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_and_sample(fused, name, dtype):
    case = CASES[name]
    head, tau, row_ids, start = arguments(case, dtype)
    truth, truth_total, truth_support = plain.head_scores(
        double(head), tau.double(), noise(row_ids, start), case["eps"]
    )
    found, total, support = fused.head_scores(on(head), on(tau), on(noise(row_ids, start)), case["eps"])
    assert torch.equal(found.ids.cpu(), truth.ids)
    for a, b in zip(found[1:], truth[1:], strict=True):
        close(a, b)
    close(total, truth_total)
    same_support(support, truth_support)
    if case["eps"] > 0 and name != "one token":
        assert len(truth_support.tokens) > 0
    sampled = fused.head_sample(on(head), on(noise(row_ids, start)))
    assert torch.equal(sampled.ids, found.ids)
    assert torch.equal(sampled.score_max, found.score_max)
    for a, b in zip(sampled[2:], found[2:], strict=True):
        close(a, b.cpu(), 1e-6)


@pytest.mark.uncollect_if(
    lambda name, dtype: name == "many launches" and dtype != torch.bfloat16, "one dtype is enough"
)
@runs
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax(fused, name, ref, dtype):
    case = CASES[name]
    head, tau, row_ids, start = arguments(case, dtype)
    other = make(head.hidden.shape[0], head.weight.shape[0], 24, dtype, True, None, seed=2) if ref else None
    truth, truth_support = plain.head_softmax(
        double(head), tau.double(), noise(row_ids, start), case["eps"], None if other is None else double(other)
    )
    found, support = fused.head_softmax(
        on(head), on(tau), on(noise(row_ids, start)), case["eps"], None if other is None else on(other)
    )
    for a, b in zip(found, truth, strict=True):
        close(a, b)
    same_support(support, truth_support)


@needs("the simulator of PTX, or a GPU", SIMULATED or DEVICE == "cuda")
@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_shipped_tiles(tiles, dtype):
    """More rows than a tile has, three splits, ragged ends on both sides, and a bad row in the second tile."""
    head, tau, bad = make(133, 1301, 40, dtype), torch.linspace(0.6, 1.4, 133), 129
    ref = make(133, 1301, 24, dtype, seed=2)
    truth, truth_total, truth_support = plain.head_scores(double(head), tau.double(), noise(None, 6), 0.02)
    sums, sums_support = plain.head_softmax(double(head), tau.double(), noise(None, 6), 0.02, double(ref))
    head.hidden[bad, 7] = math.nan
    others = torch.arange(133) != bad
    found, total, support = tiles.head_scores(on(head), on(tau), on(noise(None, 6)), 0.02)
    both, both_support = tiles.head_softmax(on(head), on(tau), on(noise(None, 6)), 0.02, on(ref))
    assert torch.equal(found.ids.cpu()[others], truth.ids[others])
    assert found.score_max[bad].isnan()
    assert both.logit_max[bad].isnan()
    for a, b in zip((*found[1:], total, *both), (*truth[1:], truth_total, *sums), strict=True):
        close(a[others], b[others])
    for new, old in ((support, truth_support), (both_support, sums_support)):
        counts = old.offsets.diff()
        kept = others.repeat_interleave(counts)
        assert torch.equal(new.offsets.cpu().diff(), counts * others)
        assert torch.equal(new.tokens.cpu(), old.tokens[kept])
        close(new.p, old.p[kept])


LARGE_CASES = {
    "plain": {"shape": (19, 450, 40), "eps": 0.05},
    "eps 0": {"shape": (17, 211, 33), "eps": 0.0},
    "shard": {"shape": (23, 401, 33), "eps": 0.02, "start": 2**34 + 3, "rows": True},
}


@pytest.mark.takes_long("the interpreter takes seconds a case; small tiles are the same kernels")
@runs
@pytest.mark.parametrize("columns", [(32, 16), (16, 16), (64, 0)], ids=str)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_tiles_give_what_small_ones_give(tiles, name, columns, monkeypatch):
    """To the bit, for a thread of a row meets the same tokens in the same order."""
    from grade_kernels.backends.triton.targets import current_target

    case = LARGE_CASES[name]
    if DEVICE == "cuda":
        case = {**case, "shape": (300, *case["shape"][1:])}
        if columns != (32, 16) or current_target().capability // 10 != 9:
            pytest.skip("GPUs have the sizes that are launched, and Hopper has all of them")
    else:
        tile = HeadTile(16, columns[0], 32, 4, 2, columns[1], SERIALISE=True)
        resize(monkeypatch, tiles_many_rows={(0, 1): tile, (0, 2): tile}, head_split=192)
    head, tau, row_ids, start = arguments(case, torch.bfloat16)
    ref = make(head.hidden.shape[0], head.weight.shape[0], 24, torch.bfloat16, seed=2)
    inputs = (on(tau), on(noise(row_ids, start)), case["eps"])
    chosen = []
    choose = TritonSizes.head_tile
    monkeypatch.setattr(TritonSizes, "head_tile", lambda *asked: chosen.append(choose(*asked)) or chosen[-1])

    def run():
        chosen.clear()
        sample, total, support = tiles.head_scores(on(head), *inputs)
        drawn = tiles.head_sample(on(head), on(noise(row_ids, start)))
        sums, sums_support = tiles.head_softmax(on(head), *inputs, None)
        both, both_support = tiles.head_softmax(on(head), *inputs, on(ref))
        return (*sample, total, *support, *drawn, *sums, *sums_support, *both, *both_support), sample, support

    results, sample, support = run()
    assert chosen
    assert all(tile.SERIALISE for tile in chosen)
    resize(monkeypatch, tiles_many_rows={})
    small, _, _ = run()
    assert chosen
    assert not any(tile.SERIALISE for tile in chosen)
    assert all(torch.equal(a, b) for a, b in zip(results, small, strict=True))
    truth, _, truth_support = plain.head_scores(double(head), tau.double(), noise(row_ids, start), case["eps"])
    assert torch.equal(sample.ids.cpu(), truth.ids)
    same_support(support, truth_support)


@runs
def test_what_takes_registers_keeps_small_tiles():
    from grade_kernels.backends.triton.head_tiles import many_rows

    sizes = TritonSizes()
    few, many = (make(sizes.tiles[1].BM + more, 8, 8) for more in (0, 1))
    assert not many_rows((few,), sizes)
    assert many_rows((many,), sizes)
    assert many_rows((many, many), sizes)
    for addition in ({"bias": True}, {"softcap": 3.0}):
        added = make(sizes.tiles[1].BM + 1, 8, 8, **addition)
        assert not many_rows((added,), sizes)
        assert not many_rows((many, added), sizes)
    for dtype, products, capability in (
        (torch.float32, 1, 90), (torch.bfloat16, 1, 80), (torch.bfloat16, 1, 0), (torch.bfloat16, 2, 100),
        (torch.bfloat16, 1, 75),
    ):  # fmt: skip
        few, many = (sizes.head_tile(dtype, products, capability, many, (3, 9)) for many in (False, True))
        assert few == many
    assert sizes.head_tile(torch.float16, 1, 90, True, (3, 9)) == sizes.tiles_many_rows[9, 1]


def test_a_triton_that_would_spill_keeps_small_tiles():
    """Hopper's 320 columns for many rows from 3.9 on, 128 beside a reference from 3.8 on; fewer stages on 12.x with 3.8."""
    sizes = TritonSizes()

    def takes_large(products, capability, triton):
        few, many = (sizes.head_tile(torch.bfloat16, products, capability, many, triton) for many in (False, True))
        return many != few

    versions = [(3, 6), (3, 7), (3, 8), (3, 9), (3, 10), (4, 0)]
    assert [takes_large(1, 90, triton) for triton in versions] == [False] * 3 + [True] * 3
    assert [takes_large(2, 90, triton) for triton in versions] == [False] * 2 + [True] * 4
    assert all(takes_large(2, 80, triton) for triton in versions)
    stages = [sizes.head_tile(torch.bfloat16, 1, 120, False, triton).num_stages for triton in versions]
    assert stages == [4, 4, 3, 4, 4, 4]


@runs
def test_masked_tokens_are_never_touched(fused):
    head = make(3, 200, 16, bias=True)
    head.bias[::3] = -math.inf
    tau = torch.ones(3)
    truth, truth_total, truth_support = plain.head_scores(double(head), tau.double(), noise(), 0.02)
    found, total, support = fused.head_scores(on(head), on(tau), on(noise()), 0.02)
    assert torch.equal(found.ids.cpu(), truth.ids)
    close(total, truth_total)
    same_support(support, truth_support)
    assert (support.tokens % 3 != 0).all()
    truth, truth_support = plain.head_softmax(double(head), tau.double(), noise(), 0.02, None)
    sums, support = fused.head_softmax(on(head), on(tau), on(noise()), 0.02, None)
    for a, b in zip(sums, truth, strict=True):
        close(a, b)
    same_support(support, truth_support)


@runs
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_alone(fused, value):
    head = make(4, 150, 16)
    tau = torch.ones(4)
    good, good_total, good_support = fused.head_scores(on(head), on(tau), on(noise(None, 3)), 0.05)
    good_sums, good_sums_support = fused.head_softmax(on(head), on(tau), on(noise(None, 3)), 0.05, None)
    if value == -math.inf:
        weight = torch.cat([head.weight, torch.ones(150, 1)], dim=1)
        hidden = torch.cat([head.hidden, torch.tensor([[0.0], [value], [0.0], [0.0]])], dim=1)
        head = head._replace(hidden=hidden, weight=weight)
    else:
        head.hidden[1, 5] = value
        head.weight[:, 5] = head.weight[:, 5].abs()
        good, good_total, good_support = fused.head_scores(
            on(head._replace(hidden=head.hidden.nan_to_num(0, 0, 0))), on(tau), on(noise(None, 3)), 0.05
        )
        good_sums, good_sums_support = fused.head_softmax(
            on(head._replace(hidden=head.hidden.nan_to_num(0, 0, 0))), on(tau), on(noise(None, 3)), 0.05, None
        )
    found, total, support = fused.head_scores(on(head), on(tau), on(noise(None, 3)), 0.05)
    sampled = fused.head_sample(on(head), on(noise(None, 3)))
    sums, sums_support = fused.head_softmax(on(head), on(tau), on(noise(None, 3)), 0.05, None)
    others = torch.tensor([0, 2, 3])
    for result in (found, sampled):
        assert 0 <= result.ids[1] < 150
        assert result.score_max[1].isnan()
        for a, b in zip(result, good, strict=True):
            close(a[others], b[others].cpu(), 1e-6)
    close(total[others], good_total[others].cpu(), 1e-6)
    assert sums.logit_max[1].isnan()
    for a, b in zip(sums[:3], good_sums[:3], strict=True):
        close(a[others], b[others].cpu(), 1e-6)
    for new, old in ((support, good_support), (sums_support, good_sums_support)):
        counts, old_counts = new.offsets.diff(), old.offsets.diff()
        assert counts[1] == 0
        assert torch.equal(counts[others], old_counts[others])
        kept = torch.ones(4, dtype=torch.bool, device=old_counts.device)
        kept[1] = False
        assert torch.equal(new.tokens, old.tokens[kept.repeat_interleave(old_counts)])


@runs
def test_equal_scores_go_to_the_smaller_id(fused):
    head = make(2, 300, 16)
    head = head._replace(bias=torch.full((300,), 2.0**100))  # noise is nothing beside it
    head.bias[:70] = -math.inf
    found = fused.head_sample(on(head), on(noise(None, 1)))
    assert found.ids.tolist() == [70, 70]
    assert found.logit_sum.tolist() == [230, 230]


@runs
@pytest.mark.parametrize(("row", "token"), REFINED)
def test_refined_words(fused, row, token):
    """The rare path: a token whose noise needs the second word, among tokens of the same logit."""
    start = token - 41
    head = Head(torch.zeros(1, 16), torch.zeros(100, 16), None, None)
    row_ids, tau = torch.tensor([row]), torch.ones(1)
    truth, truth_total, _ = plain.head_scores(double(head), tau.double(), noise(row_ids, start), 0.0)
    found, total, _ = fused.head_scores(on(head), on(tau), on(noise(row_ids, start)), 0.0)
    assert found.ids == truth.ids == 41
    assert abs(found.score_max.cpu() - truth.score_max) < 4e-6
    close(total, truth_total)


@runs
def test_overflow_of_the_support(fused, monkeypatch):
    """A flat row overflows, by the count that the torch backend takes; a peaked one in the same batch does not."""
    tiny_capacity(monkeypatch, 100)
    head = make(2, 1003, 16, scale=0.0)
    head = head._replace(hidden=head.hidden.clone(), weight=head.weight.clone())
    head.weight[17, 0], head.hidden[:, 0] = 1.0, torch.tensor([0.0, 30.0])
    tau = torch.tensor([4.0, 1.0])
    _, truth = plain.head_softmax(double(head), tau.double(), noise(), 1e-3, None)
    found, support = fused.head_softmax(on(head), on(tau), on(noise()), 1e-3, None)
    assert support.overflow.tolist() == [True, False]
    same_support(support, truth)
    assert support.tokens.tolist() == [17]
    assert found.total.isfinite().all()


@runs
def test_overflow_of_a_split(fused, monkeypatch):
    """A split whose slots do not suffice marks its rows, and leaves the others as they were."""
    head, tau = make(3, 500, 16), torch.ones(3)
    head.hidden[0] = 0
    _, _, whole = fused.head_scores(on(head), on(tau), on(noise()), 0.01)
    resize(monkeypatch, split_slots=7)
    _, _, cut = fused.head_scores(on(head), on(tau), on(noise()), 0.01)
    assert cut.overflow.any()
    for i in range(3):
        part = cut.tokens[cut.offsets[i] : cut.offsets[i + 1]]
        if cut.overflow[i]:
            assert len(part) == 0
        else:
            assert torch.equal(part, whole.tokens[whole.offsets[i] : whole.offsets[i + 1]])


@runs
def test_results_depend_on_neither_batch_nor_run(fused, monkeypatch):
    head, tau, rows = make(6, 300, 24, torch.bfloat16, exact=True), torch.linspace(0.5, 2, 6), ROWS

    def everything(part):
        cut = on(head._replace(hidden=head.hidden[part]))
        sample, total, support = fused.head_scores(cut, on(tau[part]), on(noise(rows[part])), 0.05)
        sums, other = fused.head_softmax(cut, on(tau[part]), on(noise(rows[part])), 0.05, cut)
        return [*sample, total, *sums], [support, other]

    batch, supports = everything(slice(None))
    again, same = everything(slice(None))
    resize(monkeypatch, batch_rows=2, slot_bytes=1)
    cut, parts = everything(slice(None))
    for a, b, c in zip(batch, again, cut, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b, c in zip(supports, same, parts, strict=True):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))
    alone, _ = everything(slice(3, 4))
    for a, b in zip(batch, alone, strict=True):
        assert torch.equal(a[3:4], b)


@runs
def test_default_row_identity_in_batches(fused, monkeypatch):
    head, tau = make(5, 100, 16, exact=True), torch.ones(5)
    whole = fused.head_scores(on(head), on(tau), on(noise()), 0.05)
    resize(monkeypatch, batch_rows=2, slot_bytes=1)
    parts = fused.head_scores(on(head), on(tau), on(noise()), 0.05)
    for a, b in zip([*whole[0], whole[1], *whole[2]], [*parts[0], parts[1], *parts[2]], strict=True):
        assert torch.equal(a, b)


@runs
def test_strided_heads(fused):
    head, tau = make(3, 100, 16, exact=True), torch.ones(1)
    truth = fused.head_scores(on(head), on(tau.repeat(3)), on(noise()), 0.05)
    strided = Head(head.hidden.T.contiguous().T, head.weight.repeat(1, 2)[:, :16], None, None)
    found = fused.head_scores(on(strided), on(tau).expand(3), on(noise()), 0.05)
    for a, b in zip([*truth[0], truth[1], *truth[2]], [*found[0], found[1], *found[2]], strict=True):
        assert torch.equal(a, b)


@runs
def test_no_rows(fused):
    head, tau = make(0, 9, 16), torch.empty(0)
    sample, total, support = fused.head_scores(on(head), on(tau), on(noise()), 0.1)
    assert [t.shape for t in sample] == [(0,)] * 4
    assert total.shape == (0,)
    assert support.offsets.tolist() == [0]
    assert fused.head_sample(on(head), on(noise())).ids.shape == (0,)
    sums, support = fused.head_softmax(on(head), on(tau), on(noise()), 0.1, on(head))
    assert [t.shape for t in sums] == [(0,)] * 5
    assert support.offsets.tolist() == [0]


@runs
@needs("Triton's interpreter", DEVICE == "cpu")
def test_arguments_are_aligned_for_any_number_of_rows(fused, monkeypatch):
    """Triton compiles a kernel anew where they are not, and `inspect` looks at the code for those that are."""
    from triton.runtime.interpreter import GridExecutor

    launch, odd = GridExecutor.__call__, set()

    def watched(self, *args, **kwargs):
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        odd.update(
            f"{self.fn.__name__} {name}"
            for name, x in given.items()
            if isinstance(x, torch.Tensor) and x.data_ptr() % 16
        )
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", watched)
    for rows in (2, 3):
        head, tau = make(rows, 150, 8, torch.float32), torch.ones(rows)
        fused.head_scores(head, tau, noise(), 0.1)
        fused.head_softmax(head, tau, noise(), 0.1, head)
    assert not odd


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 40, 700])
def test_gathered_products(tiles, dtype, width):
    generator = torch.Generator().manual_seed(0)
    x, table = (
        torch.randn(5, width, generator=generator).to(dtype),
        torch.randn(23, width, generator=generator).to(dtype),
    )
    counts = torch.tensor([3, 0, 9, 1, 0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(5).repeat_interleave(counts)
    tokens = torch.randint(0, 23, (13,), generator=generator)
    values = torch.randn(13, generator=generator)
    args = [on(t) for t in (x, table, rows, tokens, values, offsets)]
    close(tiles.gather_dot(*args[:4]), plain.gather_dot(x.double(), table.double(), rows, tokens))
    close(tiles.gather_sum(args[4], args[1], args[5], args[3]),
          plain.gather_sum(values.double(), table.double(), offsets, tokens))  # fmt: skip
    found = tiles.scatter_sum(args[4], args[0], args[2], args[3], args[1])
    assert found.dtype == dtype
    truth = plain.scatter_sum(values.double(), x.double(), rows, tokens, table.double())
    close(found, truth, 2e-5 if dtype == torch.float32 else 8e-3)
    bias = torch.zeros(23, 1)
    close(tiles.scatter_sum(args[4], on(torch.ones(5, 1)), args[2], args[3], on(bias)),
          plain.scatter_sum(values.double(), torch.ones(5, 1).double(), rows, tokens, bias.double()))  # fmt: skip
    # Every other column of a wider table.
    strided = torch.stack([args[1], args[1]], dim=2).flatten(1)[:, ::2]
    assert torch.equal(tiles.gather_dot(args[0], strided, args[2], args[3]), tiles.gather_dot(*args[:4]))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert tiles.gather_dot(args[0], args[1], none, none).shape == (0,)
    zero = tiles.gather_sum(args[4][:0], args[1], torch.zeros(3, dtype=torch.int64, device=DEVICE), none)
    assert torch.equal(zero.cpu(), torch.zeros(2, width))


@runs
def test_gathered_columns_far_apart(tiles, tmp_path):
    """A transposed table may have more than 2^31 elements between the columns of a row."""
    size, far = 2**31 + 8, 2**30
    if DEVICE == "cpu":  # a file with a hole, which takes no memory
        memory = torch.from_file(str(tmp_path / "table"), shared=True, size=size, dtype=torch.float16)
    else:
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    table = memory.as_strided((5, 3), (1, far))
    table.copy_(torch.arange(15).view(5, 3))
    near, values = table.clone(memory_format=torch.contiguous_format), on(torch.tensor([1.0, 2.0]))
    rows, tokens, offsets = (on(torch.tensor(x)) for x in ([0, 1], [4, 2], [0, 1, 2]))
    x = on(torch.ones(2, 3, dtype=torch.float16))
    assert torch.equal(tiles.gather_dot(x, table, rows, tokens), tiles.gather_dot(x, near, rows, tokens))
    assert torch.equal(tiles.gather_dot(table, x, tokens, rows), tiles.gather_dot(near, x, tokens, rows))
    assert torch.equal(
        tiles.gather_sum(values, table, offsets, tokens), tiles.gather_sum(values, near, offsets, tokens)
    )


@runs
def test_single_logits_are_those_of_the_pass(tiles):
    head = make(4, 50, 40, torch.bfloat16, bias=True, softcap=2.0)
    rows, tokens = torch.tensor([0, 3, 3, 1]), torch.tensor([49, 0, 7, 7])
    found = tiles.head_logits_at(on(head), on(rows), on(tokens))
    truth = plain.head_logits_at(double(head), rows, tokens)
    close(found, truth, 1e-6)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_16_bits_is_as_exact_where_it_is_given_its_place(tiles, monkeypatch, dtype):
    """Chunk by chunk, and not rounded on its way: the dense backward's dY."""
    resize(monkeypatch, product=2**10)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, table = (torch.randn(n, 40, generator=generator, device=DEVICE).to(dtype) for n in (5, 700))
    place = torch.full((5, 700), torch.nan, device=DEVICE)
    assert tiles.product(x, table, place) is place
    torch.testing.assert_close(place, x.float() @ table.float().T, rtol=1e-5, atol=1e-5)
