"""The CUDA backend: its kernels' arithmetic and memory accesses on the host, its build, and what it leaves to others.

What its kernels compute is tested in tests/backends/test_row_kernels.py, together with Triton's.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grade_kernels as gk
from grade_kernels import backends, doctor
from grade_kernels.backends import Noise
from grade_kernels.backends.cuda.backend import _seed
from grade_kernels.noise import gumbel_from_words
from tests.support import ROOT, cuda_host
from tests.support.needs import needs
from tests.support.rows import ROWS, SEED, logits_of

CPU = torch.device("cpu")
cuda, torch_backend = backends.get("cuda"), backends.get("torch")
PIECE, TILE = 8192, 2048  # of csrc/cuda


@pytest.fixture
def host() -> None:
    """The kernels, for CPU tensors."""
    cuda_host.load()


@pytest.fixture
def on_host(host: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend serves the CPU."""
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    monkeypatch.setattr(cuda, "why_not_device", lambda device: None if device.type == "cpu" else "simulated")
    with gk.use_backend("cuda"):
        yield


# Choosing


def test_never_chosen_by_itself(on_host: None) -> None:
    gk.set_backend(None)
    assert backends.select(CPU, torch.float32) != "cuda"
    assert backends.select(torch.device("cuda"), torch.float32) in ("triton", "torch")


@needs("a machine without a GPU", not torch.cuda.is_available())
def test_says_why_it_is_not_available() -> None:
    reason = cuda.why_unavailable()
    assert reason is not None
    assert "no CUDA kernels" in reason or "no NVIDIA GPU" in reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        gk.set_backend("cuda")
    assert "NVIDIA" in str(cuda.why_not_device(CPU))


def test_older_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no code for them; a launch would fail."""
    for capability, reason in (((7, 5), "it needs a GPU of compute capability 8.0 or later"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert cuda.why_not_device(torch.device("cuda", 0)) == reason


def test_a_seed_on_another_gpu_is_fetched() -> None:
    """A kernel cannot read the memory of another device; a seed on the host is handed over by its value."""
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda", 1), to=lambda device: f"on {device}")
    assert _seed(elsewhere, torch.empty(1)) == "on cpu"
    here = torch.tensor(3)
    assert _seed(here, torch.empty(1, device="meta")) is here


def test_head_functions_are_another_backend_s(on_host: None) -> None:
    """Operations through a head run, on the backend that has them."""
    hidden, weight = torch.randn(2, 8), torch.randn(37, 8)
    noise = gk.GumbelNoise(3)
    expected = gk.reference.gumbel_sample(hidden @ weight.T, noise=noise)
    assert torch.equal(gk.linear_gumbel_sample(hidden, weight, noise=noise)[0], expected)


def test_self_check_on_the_host(on_host: None) -> None:
    """Every operation, forward and backward, against the reference."""
    assert doctor.check("cuda", CPU).startswith("ok")


# Arithmetic


def test_noise_of_every_kind_of_word(host: None) -> None:
    generator = torch.Generator().manual_seed(0)
    edges = [torch.arange(1024), torch.arange(2**31 - 512, 2**31 + 512), torch.arange(2**32 - 1024, 2**32)]
    word = torch.cat([*edges, torch.randint(0, 2**32, (2**15,), generator=generator)])
    refinement = torch.randint(0, 2**32, word.shape, generator=generator)
    refinement[:256:2], refinement[1:256:2] = 0, 2**32 - 1
    found = torch.empty(word.shape)
    torch.ops.grade_kernels_cuda_host.noise(word, refinement, found)
    truth = gumbel_from_words(word, refinement, torch.float64)
    assert found.isfinite().all()
    error = (found - truth).abs() / (1 + truth.abs())  # relative to what is added up: the scaled noise reaches 65
    assert error.max() < 4e-7, (error.max(), word[error.argmax()])


# Memory


class Watch:
    """Counts how often each element of the named tensors is read and written; every other access is an error."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.counts = [tuple(torch.zeros(t.shape, dtype=torch.int64) for _ in range(2)) for t in tensors]
        self.tensors = tensors

    def __enter__(self) -> list[tuple[torch.Tensor, ...]]:
        for tensor, counts in zip(self.tensors, self.counts, strict=True):
            torch.ops.grade_kernels_cuda_host.watch(tensor, *counts)
        return self.counts

    def __exit__(self, *_: object) -> None:
        torch.ops.grade_kernels_cuda_host.unwatch(torch.empty(0))


def _placed(rows: int, vocab: int, dtype: torch.dtype, offset: int, gap: int, seed: int = 0) -> torch.Tensor:
    """Logits whose first element is `offset` elements behind an aligned address, and rows `vocab + gap` apart."""
    memory = torch.full((offset + rows * (vocab + gap) + 16,), math.nan, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    x = memory[offset:].as_strided((rows, vocab), (vocab + gap, 1))
    return x.copy_(logits_of(rows, vocab, dtype, seed))


SHAPES = [
    (vocab, vocab_start, offset, gap)
    for vocab, gap in ((1, 0), (5, 3), (TILE, 0), (TILE + 7, 1), (PIECE - 1, 1), (PIECE + 1, 0), (2 * PIECE + 2056, 8))
    for vocab_start, offset in ((0, 0), (3, 0), (2**40 + 1, 5), (8, 8))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocab", "vocab_start", "offset", "gap"), SHAPES)
def test_every_element_is_visited_once(
    dtype: torch.dtype, vocab: int, vocab_start: int, offset: int, gap: int, host: None
) -> None:
    """A pass reads each input once and writes each output once, aligned, and touches nothing beside them."""
    rows, seed, tau = ROWS[:2], torch.tensor(SEED), torch.tensor([0.5, 2.0])
    logits, dy = _placed(2, vocab, dtype, offset, gap), _placed(2, vocab, dtype, gap, offset, seed=1)
    with Watch(logits) as ((reads, writes),):
        found = cuda.sample(logits, Noise(seed, rows, vocab_start), True)
    # The one pass, and a second look at the tile of the winner.
    assert not writes.any()
    tile = (torch.arange(vocab) + vocab_start % 4) // TILE
    assert torch.equal(reads, 1 + (tile == tile[found.ids][:, None]).long())

    pieces = torch.ops.grade_kernels_cuda.pieces(vocab, vocab_start)
    partial, total = torch.empty(3, 2, pieces), torch.empty(2)
    for out_dtype in {dtype, torch.float32}:
        for normalize, passes in ((False, 1), (True, 2)):
            out = _placed(2, vocab, out_dtype, gap, offset)
            with Watch(logits, out) as ((reads, _), (out_reads, out_writes)):
                torch.ops.grade_kernels_cuda.softmax(
                    logits, tau, seed, rows, vocab_start, found.score_max, normalize, partial, out, total
                )
            assert (reads == passes).all()
            assert (out_writes == 1).all()
            assert not out_reads.any()

    for estimator, rule in (("ste", 0), ("st", 1), ("reinmax", 2)):
        for out in (dy.clone(), _placed(2, vocab, dtype, 1, 3)):
            tensors = (logits, dy, out)
            with Watch(*tensors) as ((reads, _), (dy_reads, dy_writes), (out_reads, out_writes)):
                torch.ops.grade_kernels_cuda.softmax_backward(
                    dy, logits, tau, seed, rows, vocab_start, rule, *found, torch.ones(2), partial, torch.empty(2),
                    torch.empty(2, pieces), out, torch.empty(2),
                )  # fmt: skip
            assert (reads == 2).all(), estimator
            chosen = torch.zeros_like(dy_reads).scatter_(1, found.ids[:, None], int(estimator == "reinmax"))
            assert torch.equal(dy_reads, 2 + chosen), estimator
            assert not dy_writes.any()
            assert (out_writes == 1).all(), estimator
            assert not out_reads.any()

    hot = torch.empty(2, vocab, dtype=dtype)
    with Watch(hot) as ((reads, writes),):
        torch.ops.grade_kernels_cuda.one_hot(found.ids, found.score_max, hot)
    assert (writes == 1).all()
    assert not reads.any()


def test_watch_notices(host: None) -> None:
    """An access beside the tensors that were named is an error."""
    logits = torch.zeros(2, 100)
    with Watch(logits[:, :99]), pytest.raises(RuntimeError):
        cuda.sample(logits, Noise(torch.tensor(SEED), None, 0), False)


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_bad_row_over_several_pieces(what: float, host: None) -> None:
    """What is bad is known from a row's last piece alone, and so is a row that has one token."""
    vocab = 2 * PIECE + 100
    logits = logits_of(3, vocab)
    if what == -math.inf:
        logits[1] = what
    else:
        logits[1, -1] = what
    logits[2, :-1] = -math.inf
    found = cuda.sample(logits, Noise(torch.tensor(SEED), ROWS[:3], 1), True)
    truth = torch_backend.sample(logits[[0, 2]].double(), Noise(torch.tensor(SEED), ROWS[[0, 2]], 1), True)
    assert found.ids[[0, 2]].tolist() == truth.ids.tolist() == [truth.ids[0], vocab - 1]
    assert 0 <= found.ids[1] < vocab
    assert all(part[1].isnan() for part in found[1:])
    torch.testing.assert_close(found.logit_sum[[0, 2]].double(), truth.logit_sum, rtol=1e-5, atol=0)
    assert cuda.one_hot(found, vocab, torch.bfloat16)[1].isnan().all()


def test_seeds_and_row_identities_reach_the_counter(host: None) -> None:
    """Whatever their sign, and with row identities beyond 32 bits and in no order."""
    logits = logits_of(3, 3000)
    for seed in (0, 2**63 - 1, -(2**63), -1):
        noise = Noise(torch.tensor(seed), ROWS[1:], 5)
        found = cuda.sample(logits, noise, False)
        expected = torch_backend.sample(logits.double(), noise, False)
        assert torch.equal(found.ids, expected.ids)


# The build


def _torch_for(cuda: str | None, folder: Path) -> Path:
    """What the build needs of a torch for a CUDA version: its own version, headers, and libraries to link with."""
    torch_folder = folder / "torch"
    (torch_folder / "lib").mkdir(parents=True)
    (torch_folder / "__init__.py").touch()
    (torch_folder / "include").symlink_to(cuda_host.TORCH / "include")
    (torch_folder / "lib" / "libtorch_cpu.so").symlink_to(cuda_host.TORCH / "lib" / "libtorch_cpu.so")
    (torch_folder / "version.py").write_text(f"__version__ = '2.13.0+cuda'\ncuda: Optional[str] = {cuda!r}\n")
    stub = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    library = torch_folder / "lib" / "libtorch_cuda.so"
    subprocess.run(["c++", "-x", "c++", "-shared", "-fPIC", "-", "-o", library], input=stub, text=True, check=True)
    return folder


def _build(tree: Path, fake_torch: Path) -> subprocess.CompletedProcess[str]:
    """Run setup.py in a copy of the sources, without those of csrc/cpu: they are long to compile, and tested elsewhere."""
    unbuilt = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "grade_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=unbuilt)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):
        source.unlink()
    (tree / "csrc" / "cpu" / "nothing.cpp").write_text("int nothing;\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(fake_torch),
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
        "GRADE_KERNELS_REQUIRE_CSRC": "1",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


compiles = needs("a C++ compiler", shutil.which("c++"))


@compiles
@pytest.mark.takes_long(
    "a build; make's own, of a torch without CUDA, is one", lambda cuda_version: cuda_version is None
)
@pytest.mark.parametrize(
    ("cuda_version", "reason"), [(None, "is no CUDA build"), ("1.0", "built for CUDA 1.0|nvcc was")]
)
def test_left_out_without_a_word(cuda_version: str | None, reason: str, tmp_path: Path) -> None:
    """Where torch is no CUDA build, or one that nvcc does not fit, there are no CUDA kernels and nothing is wrong."""
    done = _build(tmp_path / "tree", _torch_for(cuda_version, tmp_path / "site"))
    assert "WARNING" not in done.stdout + done.stderr
    info = json.loads((tmp_path / "tree" / "grade_kernels" / "_build_info.json").read_text())
    assert info["reason"] is None
    assert re.search(reason, info["cuda_reason"])
    assert not (tmp_path / "tree" / "grade_kernels" / "_cuda.so").exists()


@compiles
@needs("nvcc on PATH", shutil.which("nvcc"))
@pytest.mark.takes_long("half a minute of nvcc; what does not compile as C++ fails on the host")
def test_builds_for_every_architecture_without_spills(tmp_path: Path) -> None:
    """The build itself, with ptxas asked for its report; the library loads as far as a machine without a GPU lets it."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", nvcc)
    assert release is not None
    tree, fake = tmp_path / "tree", _torch_for(release[1], tmp_path / "site")
    report = _build(tree, fake).stdout

    entries = re.findall(r"Compiling entry function '\S*?(\w+)' for '(sm_\d+)'", report)
    assert {arch for _, arch in entries} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == len(entries) == 4 * 25
    assert set(spills) == {("0", "0", "0")}, [e for e, r in zip(entries, spills, strict=True) if r != ("0", "0", "0")]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(entries)
    assert max(registers) <= 128, "four blocks of 128 threads must fit a multiprocessor"

    library = tree / "grade_kernels" / "_cuda.so"
    load = (
        f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.grade_kernels_cuda.pieces(8193, 3))"
    )
    places = [fake / "torch" / "lib", *_runtime_folders()]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, places))}
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2", done.stderr[-2000:]


def _runtime_folders() -> list[Path]:
    """Where the toolkit keeps the CUDA runtime, by what nvcc says of itself."""
    dry = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"TOP=(\S+)", dry)
    assert top is not None
    return [Path(top[1]).resolve() / folder for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]


TEAMS = [(shape, start) for shape in ((70, 2), (33, 6), (9, 64), (5, 321), (3, 1024), (2, 1100)) for start in (0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("shape", "vocab_start"), TEAMS)
def test_rows_of_any_layout_are_visited_once(
    dtype: torch.dtype, across: bool, shape: tuple[int, int], vocab_start: int, host: None
) -> None:
    """Each input is read once, or twice where a row is too long for its threads' registers, and each output written once."""
    rows, vocab = shape
    memory = logits_of(vocab, rows, dtype) if across else _placed(rows, vocab, dtype, 4, 4)
    given, dy, out = memory, logits_of(*memory.shape, dtype, seed=1), torch.empty(memory.shape, dtype=dtype)
    planes = [(x[None] if across else x[:, :, None]) for x in (given, dy, out)]
    tau, seed, score_max = torch.ones(rows), torch.tensor(SEED), torch.empty(rows)
    passes = 1 if (vocab + vocab_start % 4 + 3) // 4 <= 4 * (4 if across else 32) else 2
    for hard in (False, True):
        with Watch(given, out) as ((reads, writes), (out_reads, out_writes)):
            torch.ops.grade_kernels_cuda.relax(planes[0], tau, seed, None, vocab_start, hard, planes[2], score_max)
        assert (reads == (1 if hard else passes)).all()
        assert (out_writes == 1).all()
        assert not writes.any()
        assert not out_reads.any()
    dtau = torch.empty(rows)
    with Watch(given, dy, out) as ((reads, _), (dy_reads, dy_writes), (out_reads, out_writes)):
        torch.ops.grade_kernels_cuda.relax_backward(
            planes[1], planes[0], tau, seed, None, vocab_start, score_max, planes[2], dtau
        )
    assert (reads == passes).all()
    assert (dy_reads == passes).all()
    assert (out_writes == 1).all()
    assert not dy_writes.any()
    assert not out_reads.any()
