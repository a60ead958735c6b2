"""The Triton backend below its kernels: device functions, and whether it can run.

Without a GPU, kernels run through Triton's interpreter (TRITON_INTERPRET=1), which is slow: shapes are small.
"""

import os
import subprocess
import sys

import pytest
import torch

from grade_kernels import backends
from grade_kernels.noise import DOMAIN_REFINE, GumbelNoise, gumbel_from_words

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from tests.support import ROOT  # noqa: E402
from tests.support.needs import needs, needs_backend  # noqa: E402
from tests.support.rows import DEVICE, ROWS, SEED, on, seed_tensor  # noqa: E402

triton_backend = backends.get("triton")
REASON = triton_backend.why_unavailable()
runs = needs_backend("triton")

if REASON is None:
    from grade_kernels.backends.triton import philox, scores

    @triton.jit
    def _words_kernel(p_seed, p_rows, out, group_start, ROWS: tl.constexpr, GROUPS: tl.constexpr, FAST: tl.constexpr):
        # Two-dimensional, as the epilogue of a matmul will use it.
        k0, k1 = philox.load_key(p_seed)
        o_n = tl.arange(0, ROWS)
        low, high = philox.split_row(tl.load(p_rows + o_n))
        groups = group_start.to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
        w, least = philox.words(groups[None, :], low[:, None], high[:, None], k0, k1, 0, FAST)
        fine, _ = philox.words(groups[None, :], low[:, None], high[:, None], k0, k1, 1, FAST)
        o_v = tl.arange(0, 4 * GROUPS)
        o = o_n[:, None] * (4 * GROUPS) + o_v[None, :]
        tl.store(out + o, w.to(tl.int64))
        tl.store(out + ROWS * 4 * GROUPS + o, fine.to(tl.int64))
        o = o_n[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        tl.store(out + 2 * ROWS * 4 * GROUPS + o, least.to(tl.int64))

    @triton.jit
    def _noise_kernel(word, refinement, out, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
        o = tl.arange(0, BLOCK)
        w, fine = tl.load(word + o).to(tl.uint32), tl.load(refinement + o).to(tl.uint32)
        n = philox.scaled_noise(w, fine, DTYPE, FAST, REFINE=True)
        tl.store(out + o, scores.score(n, tl.full(n.shape, philox.SHIFT, DTYPE)))


def _fast() -> bool:
    return DEVICE == "cuda" and torch.version.hip is None


# Importing and choosing


def test_importing_the_package_does_not_import_triton():
    code = "import sys, grade_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@needs("a machine without a GPU", not torch.cuda.is_available())
def test_unavailable_without_driver_and_interpreter():
    code = "from grade_kernels.backends import status; print(status()['triton'])"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=env)
    assert "no active driver" in done.stdout


@runs
def test_says_which_device_it_serves():
    assert triton_backend.why_not_device(torch.device(DEVICE)) is None
    assert "meta" not in str(triton_backend.why_not_device(torch.device(DEVICE)))
    assert repr(DEVICE) in triton_backend.why_not_device(torch.device("meta"))
    assert "triton" in backends.available_backends()


# The noise contract


@runs
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("group_start", [0, 2**31 - 3, 2**32 - 5])
def test_words_are_those_of_the_contract(seed, group_start, monkeypatch):
    # In the interpreter NumPy stands in for the function (`tests.support.interpreter`) everywhere but here.
    monkeypatch.setattr(philox, "philox", getattr(philox.philox, "written", philox.philox))
    groups = 16
    rows, out = ROWS.to(DEVICE), torch.empty(9 * 4 * groups, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](seed_tensor(seed), rows, out, group_start, 4, groups, _fast())
    out = out.cpu()
    words, fine = out[: 2 * 4 * 4 * groups].view(2, 4, 4 * groups)
    noise = GumbelNoise(seed, ROWS)
    assert torch.equal(words, noise.words(4, 4 * groups, vocab_start=4 * group_start))
    assert torch.equal(fine, noise.words(4, 4 * groups, vocab_start=4 * group_start, domain=DOMAIN_REFINE))
    assert torch.equal(out[2 * 4 * 4 * groups :].view(4, groups), words.view(4, groups, 4).amin(2))


@runs
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_noise_of_every_kind_of_word(dtype, tolerance):
    size = 2**15
    generator = torch.Generator().manual_seed(0)
    edges = [torch.arange(1024), torch.arange(2**31 - 512, 2**31 + 512), torch.arange(2**32 - 1024, 2**32)]
    magnitudes = (2 ** (32 * torch.rand(2**13, generator=generator, dtype=torch.float64))).long().clamp(max=2**32 - 1)
    count = size - 3 * 1024 - magnitudes.numel()
    word = torch.cat([*edges, magnitudes, torch.randint(0, 2**32, (count,), generator=generator)])
    fine = torch.randint(0, 2**32, (size,), generator=generator)
    fine[:256:2] = 0
    fine[1:256:2] = 2**32 - 1
    out = torch.empty(size, dtype=dtype, device=DEVICE)
    tl_dtype = tl.float32 if dtype == torch.float32 else tl.float64
    import numpy as np

    with np.errstate(all="ignore"):
        _noise_kernel[(1,)](*on(word, fine), out, size, tl_dtype, _fast())
    out = out.double().cpu()
    truth = gumbel_from_words(word, fine, torch.float64)
    assert out.isfinite().all()
    # Relative to the size of what is added up: the scaled noise reaches 65.
    error = (out - truth).abs() / (1 + truth.abs())
    assert error.max() < tolerance, (error.max(), word[error.argmax()])
