"""Fixtures of the suite: where a test runs (backend and device), and poisoned uninitialised memory.

A test that takes `backend` runs once for every backend on every device that backend serves, with the backend switched
on; `device` is that device. Cases on a GPU are the same tests: marked `gpu`, and skipped with a reason without one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
# The compiler's cache knows neither schemas nor kernels of operations: it would answer for another version of them.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ.pop("GRADE_KERNELS_BACKEND", None)
os.environ.pop("GRADE_KERNELS_CHECK", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for every core

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Has to be there before anything imports triton, which torch does lazily.
    os.environ["TRITON_INTERPRET"] = "1"

import grade_kernels as gk  # noqa: E402
from tests.support.helpers import poisoned_memory  # noqa: E402
from tests.support.interpreter import quicken, settle  # noqa: E402

if not HAS_GPU and importlib.util.find_spec("triton") is not None:
    quicken()
    settle()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "thin(k): Triton's interpreter, which is slow, runs every k-th case of this test"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all but every k-th interpreted case of a thinned test.

    The mark nearest to a test counts. k has no divisor in common with the number of backends and estimators, so each
    value of a parameter comes up in some test, if not in every one.
    """
    seen: dict[str, int] = {}
    kept, dropped = [], []
    for item in items:
        mark = item.get_closest_marker("thin")
        call = getattr(item, "callspec", None)
        params = {} if call is None else call.params
        interpreted = params.get("place") == ("triton", "cpu") or params.get("rows_backend") == "triton"
        if mark is None or HAS_GPU or not interpreted:
            kept.append(item)
            continue
        name = item.nodeid.split("[")[0]
        seen[name] = seen.get(name, -1) + 1
        (dropped if seen[name] % mark.args[0] else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


class Place(NamedTuple):
    """One backend on one device."""

    backend: str
    device: str


def _places() -> list:
    """Every backend on every device it serves; what cannot run here stays visible as a skip with its reason."""
    reasons = gk.backends.status()
    places = []
    for device in ("cpu", "cuda"):
        for name in gk.backends.BACKENDS:
            if (name, device) in (("cpu", "cuda"), ("cuda", "cpu")) or (
                name == "triton" and device == "cpu" and HAS_GPU
            ):
                continue
            if device == "cuda" and not HAS_GPU and name != "triton":
                continue  # one skipped case says it for all
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if device == "cuda" and not HAS_GPU:
                marks.append(pytest.mark.skip(reason="no GPU on this machine"))
            elif reasons[name] is not None:
                marks.append(pytest.mark.skip(reason=f"backend {name}: {reasons[name]}"))
            places.append(pytest.param(Place(name, device), id=f"{name}-{device}", marks=marks))
    return places


@pytest.fixture(params=_places())
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture
def backend(place: Place) -> Iterator[str]:
    """The backend's name; it serves every call of the test."""
    with gk.use_backend(place.backend):
        yield place.backend


@pytest.fixture
def device(place: Place) -> str:
    return place.device


@pytest.fixture
def interpreted(place: Place) -> bool:
    """Whether kernels run in Triton's interpreter, which wants few rows."""
    return place.backend == "triton" and not HAS_GPU


@pytest.fixture
def rows(interpreted: bool) -> int:
    """A number of rows for tests whose subject is not the number of rows."""
    return 2 if interpreted else 5


@pytest.fixture
def defaults() -> Iterator[Callable[[torch.dtype | torch.device], None]]:
    """Sets the dtype or the device that tensors have by default, for the rest of the test."""

    def set_default(default: torch.dtype | torch.device) -> None:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)

    yield set_default
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating memory is NaN, so what a kernel forgets to write shows."""
    poisoned_memory(monkeypatch)
    x = torch.zeros(2, 3)
    for probe in (
        torch.empty(4),
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty_like(x),
        x.new_empty(5),
        torch.empty_strided((2, 3), (3, 1), dtype=torch.float64),
    ):
        assert probe.isnan().all(), "the poison does not work"
