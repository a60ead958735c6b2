"""Fixtures of the suite: where a test runs (backend and device), and poisoned uninitialised memory.

A test that takes `backend` runs once for every backend on every device that backend serves, with the backend switched
on; `device` is that device. Cases on a GPU are the same tests: marked `gpu`, and not collected without one.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
# The compiler's cache knows schemas of operations but no fake kernels: it would answer for another version of these.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
# With threads, each process of tests that compiles something starts others, which import torch first.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# It would compile a program for each instruction set of the processor, to see that the compiler knows it: ten seconds.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
os.environ.pop("GRADE_KERNELS_BACKEND", None)
os.environ.pop("GRADE_KERNELS_HEAD", None)
os.environ.pop("GRADE_KERNELS_CHUNK_MIB", None)
os.environ.pop("GRADE_KERNELS_CHECK", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for every core

import pytest
import torch

from tests.support.ptx.setting import SIMULATED

HAS_GPU = torch.cuda.is_available()
if SIMULATED:
    from tests.support.ptx import triton_driver

    triton_driver.install()
elif not HAS_GPU:
    # Has to be there before anything imports triton, which torch does lazily.
    os.environ["TRITON_INTERPRET"] = "1"

import grade_kernels as gk  # noqa: E402
from tests.support.covering import Case, covering  # noqa: E402
from tests.support.helpers import poisoned_memory  # noqa: E402
from tests.support.interpreter import (  # noqa: E402
    INTERPRETED,
    compute_words,
    fuse,
    ignore_nan,
    quicken,
    reduce_by_blocks,
    settle,
    share_shapes,
    skip_promotion,
    take_numbers,
)
from tests.support.needs import needs_backend  # noqa: E402

if not HAS_GPU and not SIMULATED and importlib.util.find_spec("triton") is not None:
    quicken()
    take_numbers()
    ignore_nan()
    fuse()
    share_shapes()
    skip_promotion()
    reduce_by_blocks()
    compute_words()
    settle()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", dest="every_combination", help="run every combination of parameters")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "needs(what, met): not collected unless met; the summary says how many cases need `what`",
        "uncollect_if(condition, reason): there is no case where condition, a function of parameters, is true",
        "cover(strength, on_each_backend): how many values together a selection of cases covers; without this mark pairs, "
        "and those on each backend; of single values only if on_each_backend says so",
        "takes_long(reason, condition): a case that is run with --all only, and what else notices most of its faults; with a "
        "condition, a function of parameters, the cases where it is true",
        "costs(cost): of running a case, relative to others of the same test; the selection has fewer of dear ones",
    ):
        config.addinivalue_line("markers", line)
    config.stash[LEFT_OUT] = {}
    if SIMULATED and (path := os.environ.get("GRADE_KERNELS_SIMULATED_RECORD")):
        from tests.support.ptx.record import Record

        config.pluginmanager.register(Record(Path(path), os.environ["GRADE_KERNELS_SIMULATED_COMPILER"]))


LEFT_OUT = pytest.StashKey[dict[str, int]]()  # what the summary says to numbers of cases


@pytest.hookimpl(trylast=True)  # behind -k and -m: what they leave is covered
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is no case, what this machine cannot run, and, without --all, what others cover."""
    left_out = config.stash[LEFT_OUT]
    kept: list[pytest.Item] = []
    for item in items:
        unmet = [mark.args[0] for mark in item.iter_markers("needs") if not mark.kwargs["met"]]
        if item.get_closest_marker("gpu") and not HAS_GPU:
            unmet = ["a GPU"]
        if is_no_case(item):
            continue
        if unmet:
            line = f"cases that need {unmet[0]}, not collected"
            left_out[line] = left_out.get(line, 0) + 1
        else:
            kept.append(item)
    if not config.getoption("every_combination"):
        tests: dict[tuple[str, str], list[pytest.Item]] = {}
        for item in kept:
            tests.setdefault((item.parent.nodeid, getattr(item, "originalname", item.name)), []).append(item)
        chosen = {item for cases in tests.values() for item in selection(cases)}
        if len(chosen) < len(kept):
            left_out["cases that others cover, not run without --all"] = len(kept) - len(chosen)
        kept = [item for item in kept if item in chosen]
        short = [item for item in kept if not takes_long(item)]
        if 0 < len(short) < len(kept):  # who asks for such cases alone has them
            left_out["cases that take long, not run without --all"] = len(kept) - len(short)
            kept = short
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = left_out
    if len(kept) < len(items):
        still = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in still])
        items[:] = kept


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what is there before the first test.

    These are millions of objects: libraries, and every case that was looked at. Accelerate collects garbage at the end of
    each training, which would take longer than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries would report leaks when the process ends


def is_no_case(item: pytest.Item) -> bool:
    """Whether a condition says so."""
    return any(holds(mark.args[0], item) for mark in item.iter_markers("uncollect_if"))


def takes_long(item: pytest.Item) -> bool:
    return any(len(mark.args) == 1 or holds(mark.args[1], item) for mark in item.iter_markers("takes_long"))


def holds(condition: Callable[..., bool], item: pytest.Item) -> bool:
    """Whether it does for the case's parameters; one that asks where a test runs, not for tests that run in one place."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    place = params.get("place")
    if isinstance(place, Place):
        params |= {"backend": place.backend, "device": place.device, "interpreted": place.interpreted}
    asked = inspect.signature(condition).parameters
    if not isinstance(place, Place) and not {"backend", "device", "interpreted"}.isdisjoint(asked):
        return False
    return condition(**{name: params[name] for name in asked})


def selection(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of the cases of one test those that cover the others."""
    return items if len(items) == 1 else [items[i] for i in covering([case_of(item) for item in items])]


def case_of(item: pytest.Item) -> Case:
    """Each backend is code of its own: pairs have to occur on each, or single values where that takes long."""
    cover, costs = item.get_closest_marker("cover"), item.get_closest_marker("costs")
    strength, cost = cover.args[0] if cover else 2, costs.args[0] if costs else 1.0
    on_each_backend = strength > 1 or (cover is not None and cover.kwargs.get("on_each_backend", False))
    # Not all values can be hashed or compared; those of one list are the same objects in every case.
    values = {name: id(value) for name, value in item.callspec.params.items()}
    backend = None
    if on_each_backend:
        backend = next((values.pop(name) for name in ("place", "rows_backend", "gpu_backend") if name in values), None)
        strength -= cost > 1 and strength > 1
    return Case(item.name, values, strength, backend, cost)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has finished: what it left out is what all of them did."""
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[LEFT_OUT]:
        terminalreporter.section("left out", sep="-")
    for line, count in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"{line}: {count:,}")


class Place(NamedTuple):
    """One backend on one device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, which is slow and wants few rows."""
        return (self.backend, self.device) == ("triton", "cpu")


def _places() -> list:
    """Every backend on every device it serves, whether or not it can run here."""
    places = []
    for device in ("cpu", "cuda"):
        for name in gk.backends.BACKENDS:
            if (name, device) in (("cpu", "cuda"), ("cuda", "cpu")) or (
                name == "triton" and device == "cpu" and HAS_GPU
            ):
                continue
            place = Place(name, device)
            marks = [needs_backend(name)]
            if device == "cuda":
                marks.append(pytest.mark.gpu)
            if place.interpreted:
                marks.append(INTERPRETED)
            places.append(pytest.param(place, id=f"{name}-{device}", marks=marks))
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
    return place.interpreted


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
