"""Which backend serves a call: explicit choices, the environment variable, what is available."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import grade_kernels as gk
from grade_kernels import backends
from tests.support.needs import needs_backend

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def served() -> str:
    return backends.select(CPU, torch.float32)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Any:
    for variable in ("GRADE_KERNELS_BACKEND", "GRADE_KERNELS_HEAD"):
        monkeypatch.delenv(variable, raising=False)
    yield
    gk.set_backend(None)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> str:
    """The `cpu` backend as on a machine without a compiler."""
    monkeypatch.setattr(backends.get("cpu"), "why_unavailable", lambda: "no compiler was found")
    return "cpu"


def test_status_lists_all() -> None:
    status = backends.status()
    assert list(status) == ["reference", "torch", "cpu", "triton", "cuda"]
    assert status["reference"] is status["torch"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in status.values())
    assert gk.available_backends() == [name for name, reason in status.items() if reason is None]


def test_default_on_cpu(missing: str) -> None:
    assert served() == "torch", "without the C++ kernels the CPU is served by the torch backend"
    assert missing not in gk.available_backends()
    assert backends.status()[missing] == "no compiler was found"


def test_default_prefers_native_kernels() -> None:
    expected = "cpu" if backends.status()["cpu"] is None else "torch"
    assert served() == expected


def test_context_restores() -> None:
    before = served()
    with gk.use_backend("torch"):
        assert served() == "torch"
        with gk.use_backend("reference"):
            assert served() == "reference"
            with gk.use_backend(None):
                assert served() == before
            assert served() == "reference"
        assert served() == "torch"
    assert served() == before


def test_context_restores_after_an_exception() -> None:
    before = served()
    with pytest.raises(KeyError), gk.use_backend("reference"):
        raise KeyError
    assert served() == before
    with gk.use_backend("torch"):
        with pytest.raises(ValueError, match="unknown"), gk.use_backend("nonsense"):
            pytest.fail("entered")
        assert served() == "torch"


def test_set_backend() -> None:
    before = served()
    gk.set_backend("reference")
    assert served() == "reference"
    with gk.use_backend("torch"):
        assert served() == "torch"
    assert served() == "reference"
    with pytest.raises(ValueError, match="unknown"):
        gk.set_backend("nonsense")
    assert served() == "reference"
    gk.set_backend(None)
    assert served() == before


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    before = served()
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "reference")
    assert served() == "reference"
    with gk.use_backend("torch"):
        assert served() == "torch", "a choice in the program wins over the environment"
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "")
    assert served() == before


def assert_lists_known(message: str, name: str) -> None:
    assert repr(name) in message
    for known in ("reference", "torch", "cpu", "triton", "cuda"):
        assert known in message


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as error, gk.use_backend("cudnn"):
        pass
    assert_lists_known(str(error.value), "cudnn")
    with pytest.raises(ValueError) as error:
        gk.set_backend("CPU")
    assert_lists_known(str(error.value), "CPU")
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "cudnn")
    with pytest.raises(ValueError) as error:
        gk.gumbel_sample(torch.zeros(1, 3))
    assert_lists_known(str(error.value), "cudnn")


def test_unavailable_backend(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'cpu'.*no compiler was found"):
        gk.set_backend(missing)
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", missing)
    with pytest.raises(ValueError, match=r"'cpu'.*no compiler was found"):
        gk.gumbel_sample(torch.zeros(1, 3))


@needs_backend("cpu")
def test_backend_that_cannot_serve_the_device() -> None:
    logits = torch.zeros(1, 3, device="meta")
    with gk.use_backend("cpu"):
        calls = (
            lambda: gk.gumbel_sample(logits),
            lambda: gk.gumbel_softmax(logits),
            lambda: gk.gumbel_ste_embedding(logits, torch.zeros(3, 2, device="meta")),
        )
        for call in calls:
            with pytest.raises(ValueError, match=r"'cpu'.*'meta'"):
                call()


def test_the_chosen_backend_serves(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation reaches the backend that was asked for, and no other."""
    seen: list[str] = []
    for name in gk.available_backends():
        if name == "reference":
            for function in ("gumbel_sample", "gumbel_softmax", "gumbel_ste_embedding"):
                monkeypatch.setattr(gk.reference, function, _spy(getattr(gk.reference, function), seen, name))
        else:
            chosen = backends.get(name)
            for method in ("sample", "gumbel_softmax", "relax_at"):  # the second may call the first
                monkeypatch.setattr(chosen, method, _spy(getattr(chosen, method), seen, name))
    logits = torch.zeros(2, 5, device=device)
    for call in (
        lambda: gk.gumbel_sample(logits),
        lambda: gk.gumbel_softmax(logits),
        lambda: gk.gumbel_ste(logits),
        lambda: gk.gumbel_ste_embedding(logits, torch.zeros(5, 2, device=device)),
    ):
        seen.clear()
        call()
        assert set(seen) == {backend}


def _spy(function: Any, seen: list[str], name: str) -> Any:
    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    return spy


def test_backward_uses_the_forward_s_backend() -> None:
    """Leaving the context between forward and backward changes nothing."""
    logits = torch.randn(2, 5, requires_grad=True)
    with gk.use_backend("torch"):
        y = gk.gumbel_softmax(logits, noise=gk.GumbelNoise(1))
    gk.set_backend("reference")
    (inside,) = torch.autograd.grad((y * torch.arange(5.0)).sum(), logits)
    (outside,) = torch.autograd.grad(
        (gk.gumbel_softmax(logits, noise=gk.GumbelNoise(1)) * torch.arange(5.0)).sum(), logits
    )
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("unknown", [3, torch.device("cpu"), "", ":tiles"])
def test_what_is_no_name_of_a_backend(unknown: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown backend .*; the known ones are reference, torch"):
        gk.set_backend(unknown)


@needs_backend("triton")
def test_ways_through_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument or an environment variable chooses one; the name that a call saves says which, for heads alone."""

    def through_a_head() -> str:
        return backends.select(DEVICE, torch.float32, head=True)

    with gk.use_backend("triton"):
        assert through_a_head() == "triton"
        for way in ("tiles", "chunks"):
            monkeypatch.setenv("GRADE_KERNELS_HEAD", way)
            assert through_a_head() == f"triton:{way}"
            with gk.use_backend("triton:auto"):
                assert through_a_head() == "triton", "an argument wins"
            with gk.use_backend("torch"):
                assert through_a_head() == "torch"
        assert backends.select(DEVICE, torch.float32) == "triton"
        assert backends.select(DEVICE, torch.float64, head=True) == "torch"
        monkeypatch.setenv("GRADE_KERNELS_HEAD", "")
        assert through_a_head() == "triton"
        monkeypatch.setenv("GRADE_KERNELS_HEAD", "rows")
        with pytest.raises(ValueError, match="GRADE_KERNELS_HEAD must be one of auto, tiles, chunks, got 'rows'"):
            through_a_head()
        monkeypatch.delenv("GRADE_KERNELS_HEAD")
    with gk.use_backend("triton:chunks"):
        assert through_a_head() == "triton:chunks"
        assert backends.select(DEVICE, torch.float32) == "triton"
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "triton:chunks")
    assert through_a_head() == "triton:chunks"
    for unknown in ("triton:", "triton:rows", "torch:chunks", "cpu:tiles"):
        with pytest.raises(
            ValueError, match=rf"unknown backend '{unknown}'; triton and cuda may be followed by .*:chunks"
        ):
            gk.set_backend(unknown)


def test_threads_share_a_backend(backend: str, device: str, rows: int) -> None:
    """Operations called from several threads at once, each with its own noise, give what they give alone."""
    logits = torch.randn(rows, 67, device=device, generator=torch.Generator(device).manual_seed(0))
    dy = torch.arange(67.0, device=device)

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits.clone().requires_grad_()
        y = gk.gumbel_softmax(x, 0.5, noise=gk.GumbelNoise(seed))
        return y.detach(), torch.autograd.grad((y * dy).sum(), x)[0]

    alone = [run(seed) for seed in range(4)]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if backend == "triton" and device == "cpu":
        return  # the interpreter patches triton.language globally, so it is no place for threads
    threads = [threading.Thread(target=lambda s=seed: found.update({s: run(s)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(found[seed][0], alone[seed][0])
        assert torch.equal(found[seed][1], alone[seed][1])
