"""Products of the cpu backend on AVX2, AVX-512 and AMX, and the same operations on lesser processors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends.cpu.products import packed
from grade_kernels.backends.native import unit_stride
from tests.support.needs import needs, needs_backend

cpu = backends.get("cpu")
pytestmark = needs_backend("cpu")


def needs_product(dtype: torch.dtype) -> pytest.MarkDecorator:
    """A product of the backend's own; on other processors torch's products serve."""
    built, x = "cpu" in backends.available_backends(), torch.empty(0, dtype=dtype)
    has = not built or torch.ops.grade_kernels_cpu.has_product(x)
    return needs("AVX2, AVX-512 or AMX" if dtype == torch.float32 else f"AVX2, AVX-512 or AMX for {dtype}", has)


needs_float32, needs_bfloat16 = needs_product(torch.float32), needs_product(torch.bfloat16)


def _product(hidden, weight, dtype=None):
    out = torch.full((len(weight), -(-len(hidden) // 16) * 16), torch.nan, dtype=dtype or hidden.dtype)
    torch.ops.grade_kernels_cpu.packed_product(packed(hidden), len(hidden), unit_stride(weight), False, out)
    return out[:, : len(hidden)]


def parametrize_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", [pytest.param(d, marks=needs_product(d), id=str(d)) for d in dtypes])


DTYPES = parametrize_dtype(torch.float32, torch.bfloat16, torch.float16)


@DTYPES
@pytest.mark.parametrize("rows", [1, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 95, 300])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 257, 1030])
def test_a_product_is_at_least_as_exact_as_torchs(rows, vocab, width, dtype):
    generator = torch.Generator().manual_seed(rows * vocab * width)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    exact = weight.double() @ hidden.double().T
    size = weight.double().abs() @ hidden.double().abs().T
    error, torchs = (((x - exact).abs() / size).max().item() for x in (_product(hidden, weight), weight @ hidden.T))
    # Of the sum of magnitudes: two roundings' worth of slack where sums are short, four where one chain adds them.
    assert error <= torchs + (2.0**-22 if dtype == torch.float32 else 2.0**-23)


@needs_bfloat16
@pytest.mark.parametrize("by_row", [False, True])
def test_bfloat16_sums_are_rounded_only_if_asked(by_row):
    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(rows, 257, generator=generator).bfloat16() for rows in (50, 99))
    exact = table.double() @ x.double().T
    plain, rounded = (
        torch.full((50, 99) if by_row else (99, 64), torch.nan, dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    for out in (plain, rounded):
        torch.ops.grade_kernels_cpu.packed_product(packed(x), 50, table, by_row, out)
    plain, rounded = ((out if by_row else out[:, :50].T) for out in (plain, rounded))
    assert ((plain - exact.T).abs() <= 2e-5 * exact.abs().max()).all()
    assert torch.equal(rounded, plain.bfloat16())


@needs_float32
@pytest.mark.parametrize("rows", [9, 16, 17, 33, 100])
@pytest.mark.parametrize("vocab", [1, 15, 32, 47, 300])
def test_by_row_it_is_the_same(rows, vocab):
    generator = torch.Generator().manual_seed(rows * vocab)
    x, table = torch.randn(rows, 70, generator=generator), torch.randn(vocab, 70, generator=generator)
    assert torch.equal(cpu.product(x, table), _product(x, table).T)
    wide = torch.full((rows, vocab + 5), 7.0)
    assert cpu.product(x, table, wide[:, 2:-3]).data_ptr() == wide[:, 2:].data_ptr()
    assert torch.equal(wide[:, 2:-3], _product(x, table).T)
    assert (wide[:, :2] == 7).all()
    assert (wide[:, -3:] == 7).all()
    assert torch.equal(cpu.product(x.T.contiguous().T, table.T.contiguous().T), _product(x, table).T)


@needs_float32
def test_its_error_is_about_half_of_torchs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 1024, generator=generator), torch.randn(2000, 1024, generator=generator)
    exact = weight.double() @ hidden.double().T
    error, torchs = ((x - exact).norm() / exact.norm() for x in (_product(hidden, weight), weight @ hidden.T))
    assert error <= 0.75 * torchs


@needs_float32
def test_numbers_of_all_sizes():
    """Each part keeps float32's range; what is lost is lost to subnormal products only."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 64, generator=generator), torch.randn(70, 64, generator=generator)
    for scale in (1e-15, 1e15):
        found = _product(hidden * scale, weight * scale)
        assert torch.allclose(found, _product(hidden, weight) * scale * scale, rtol=1e-5, atol=1e-5 * scale * scale)
    assert torch.equal(_product(torch.eye(40), torch.full((50, 40), 1e38)), torch.full((50, 40), 1e38))


@DTYPES
def test_rows_apart_and_columns_of_a_wider_table(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 96, generator=generator).to(dtype)[::2, :50]
    table = torch.full((120, 96), torch.nan, dtype=dtype)
    table[::2, :50] = torch.randn(60, 50, generator=generator).to(dtype)
    weight = table[::2, :50]  # what lies beside it is NaN, and must not be seen
    exact, close = weight.double() @ hidden.double().T, 2 * torch.finfo(dtype).eps
    for table in (weight, weight.T.contiguous().T):
        torch.testing.assert_close(
            _product(hidden, table).double(), exact, rtol=close, atol=(50 if dtype == torch.float32 else 10) * 2.0**-23
        )


@needs_bfloat16
def test_bfloat16_infinities_and_nan_are_torchs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 40, generator=generator).bfloat16() for rows in (33, 64))
    weight[3, 7], weight[9, 0], hidden[4, 2], hidden[5, 3] = torch.inf, torch.nan, -torch.inf, torch.nan
    assert torch.allclose(_product(hidden, weight), weight @ hidden.T, rtol=1e-2, atol=1e-2, equal_nan=True)


@needs_float32
def test_infinities_and_nan_of_the_table():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(33, 40, generator=generator), torch.randn(64, 40, generator=generator)
    hidden[:, 7] = hidden[:, 7].abs().bfloat16().float() + 1.0  # the lower parts of some are zero
    weight[3, 7], weight[5, 7], weight[9, 0] = torch.inf, -torch.inf, torch.nan
    weight[11, 1], weight[11, 2] = torch.inf, -torch.inf
    weight[13, 3] = 3.4e38  # rounds to an infinity in bfloat16
    found, expected = _product(hidden, weight), weight @ hidden.T
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (found[3] == torch.inf).all()
    assert (found[5] == -torch.inf).all()


@needs_float32
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_diverged_is_not_finite_and_takes_no_longer(value):
    """A table or hidden states full of such numbers: nothing is taken one by one (that would be minutes)."""
    x, table = torch.randn(256, 512).sign(), torch.randn(20000, 512).sign()
    for found in (_product(x * value, table), _product(x, table * value), _product(x * value, table * value)):
        assert value == 1e30 or not found.isfinite().any()
    assert not _product(x * value, table * value).isfinite().any()


@needs_float32
def test_a_row_of_hidden_that_is_not_finite_stays_alone():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 40, generator=generator), torch.randn(64, 40, generator=generator)
    clean = _product(hidden, weight).clone()
    hidden[4, 2], hidden[7, 3] = torch.nan, torch.inf
    found = _product(hidden, weight)
    good = torch.ones(20, dtype=torch.bool)
    good[[4, 7]] = False
    assert torch.equal(found[:, good], clean[:, good])
    assert not found[:, ~good].isfinite().any()


@DTYPES
def test_a_logit_does_not_depend_on_its_neighbours(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 300, generator=generator).to(dtype) for rows in (300, 90))
    whole = _product(hidden, weight).clone()
    assert torch.equal(_product(hidden[13:40], weight[5:77]), whole[5:77, 13:40])


def _sums_error(found, values, table):
    exact, size = values.double() @ table.double(), values.double().abs() @ table.double().abs()
    return ((found - exact).abs() / size).max().item()


@DTYPES
@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (31, 33), (32, 31), (257, 95), (700, 520), (5000, 40)])
def test_weighted_sums_round_the_values_of_neither_dtype(poison, rows, tokens, width, dtype):
    generator = torch.Generator().manual_seed(rows * tokens * width)
    values = torch.randn(rows, tokens, generator=generator)
    table = torch.randn(tokens, width, generator=generator).to(dtype)
    torchs = _sums_error(values @ table.float(), values, table)
    # In bfloat16 values have two parts of eight bits and a sign each; narrow ones have one, and lose nothing.
    slack = 2.0**-23 if dtype == torch.float32 else 2.0**-17
    assert _sums_error(cpu.weighted_sum(values, table), values, table) <= torchs + slack
    narrow = values.bfloat16()
    found = cpu.weighted_sum(narrow.float(), table)
    assert _sums_error(found, narrow, table) <= _sums_error(narrow.float() @ table.float(), narrow, table) + 2.0**-23
    assert torch.equal(cpu.weighted_sum(narrow if dtype == torch.bfloat16 else narrow.float(), table), found)


@DTYPES
def test_weighted_sums_of_any_layout_rows_and_threads(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.full((80, 700), torch.nan)
    values[::2, :600] = torch.randn(40, 600, generator=generator)
    table = torch.full((1200, 400), torch.nan, dtype=dtype)
    table[::2, :300] = torch.randn(600, 300, generator=generator).to(dtype)
    values, table = values[::2, :600], table[::2, :300]  # what lies beside them is NaN, and must not be seen
    whole = cpu.weighted_sum(values.clone(), table.clone())
    assert whole.isfinite().all()
    assert torch.equal(cpu.weighted_sum(values, table), whole)
    assert torch.equal(cpu.weighted_sum(values.T.contiguous().T, table.T.contiguous().T), whole)
    assert torch.equal(cpu.weighted_sum(values[3:30], table[:, 40:77]), whole[3:30, 40:77])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpu.weighted_sum(values, table), whole)
    finally:
        torch.set_num_threads(threads)


@parametrize_dtype(torch.float32, torch.bfloat16)
def test_weighted_sums_that_are_not_finite_are_torchs_and_stay_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    values, table = torch.rand(40, 90, generator=generator), torch.randn(90, 50, generator=generator).to(dtype)
    clean = cpu.weighted_sum(values, table)
    # The last rounds to an infinity in bfloat16. A kernel that widens the table need not round it.
    values[3, 5], values[4, 6], values[5, 7] = torch.nan, torch.inf, 3.4e38

    def is_right(found: torch.Tensor, row: int) -> bool:
        expected = [(values[row].to(dtype) @ table).float(), values[row] @ table.float()]
        return any(torch.allclose(found[row], x, rtol=1e-2, atol=1e-1, equal_nan=True) for x in expected)

    found, kept = cpu.weighted_sum(values, table), [i for i in range(40) if i not in (3, 4, 5)]
    assert torch.equal(found[kept], clean[kept])
    assert all(is_right(found, row) for row in (3, 4, 5))
    table[2, 9], table[3, 20] = torch.inf, torch.nan
    found = cpu.weighted_sum(values, table)
    assert all(is_right(found, row) for row in range(40))
    assert (found[kept][:, 9] == torch.inf).all()


SCRIPT = """
import torch, grade_kernels as gk
generator = torch.Generator().manual_seed(0)
hidden, lm_head = torch.randn(21, 40, generator=generator), torch.randn(333, 40, generator=generator) * 0.3
table, ref = torch.randn(333, 24, generator=generator), torch.randn(333, 40, generator=generator) * 0.3
def results(dtype):
    h, w, e, r = (x.to(dtype) for x in (hidden, lm_head, table, ref))
    h = h.clone().requires_grad_()
    out = gk.linear_gumbel_ste(h, w, e, 0.7, noise=gk.GumbelNoise(5), eps=0.0)
    kl = gk.linear_kl(h, w, h.detach(), r, eps=0.0)
    (out.embedding.sum() + out.logprobs.sum() + kl.sum()).backward()
    return out.ids, out.logprobs, kl, h.grad, gk.linear_gumbel_sample(h[:3].detach(), w, noise=gk.GumbelNoise(5))[0]
found = results(torch.float32)
assert gk.backends.select(hidden.device, hidden.dtype) == "cpu"
for x, y in zip(found, results(torch.float64)):
    torch.testing.assert_close(x.double(), y.double(), rtol=2e-4, atol=2e-5)
cpu, torch_backend = gk.backends.get("cpu"), gk.backends.get("torch")
halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(-1, 16)
halves = halves[halves.isfinite().all(dim=1)]  # all that there are, subnormal ones too
places = torch.arange(16).repeat(len(halves)), torch.arange(len(halves)).repeat_interleave(16)
assert torch.equal(cpu.gather_dot(torch.eye(16), halves, *places), halves.float().flatten())
from grade_kernels.backends.cpu.products import HeadProduct
from grade_kernels.backends.torch import products as plain
from tests.support.needs import needs, needs_backend
def check(dtype):  # 16 bits, whether or not PyTorch has kernels for them here
    x, w, p = hidden.to(dtype), lm_head.to(dtype), torch.rand(5, 333, generator=generator).to(dtype)
    exact, close = x.double() @ w.double().T, dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    torch.testing.assert_close(cpu.product(x, w).double(), exact, **close)
    torch.testing.assert_close(torch_backend.product(x, w).double(), exact, **close)
    torch.testing.assert_close(HeadProduct(x, w, 333, 2**18)(slice(0, 333))[:, :21].T.double(), exact, **close)
    for backend in (cpu, torch_backend):
        torch.testing.assert_close(backend.weighted_sum(p.float(), w).double(), p.double() @ w.double(), rtol=0.02, atol=0.05)
for dtype in (torch.float16, torch.bfloat16):
    check(dtype)
plain._onednn_has = lambda dtype: False
for dtype in (torch.float16, torch.bfloat16):
    check(dtype)
print(torch.ops.grade_kernels_cpu.has_product(torch.empty(0)))
"""


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx"])
def test_every_instruction_set_gives_the_same(isa):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "GRADE_KERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if isa == "generic":
        assert done.stdout.strip() == "False"
