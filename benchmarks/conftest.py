"""Options, fixtures and the report of the benchmarks. `harness.py` says what they are made of."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import grade_kernels as gk
from benchmarks import compare, memory, processor, rivals
from benchmarks.harness import OURS, Case, Contestants, Race, Results, cpu_name, is_ours, on_threads, run_race, why_not

VOCABULARIES = (32000, 50257, 128256, 151936, 262144)  # Llama 2, GPT-2, Llama 3, Qwen 3, Gemma 3
HEADLINE = 151936
DTYPES = ("float32", "bfloat16", "float16")
SAVED = pytest.StashKey[compare.Run]()
RESULTS = pytest.StashKey[Results]()


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(number) for number in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    for name in _words(text):
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(DTYPES)}")
    return _words(text)


def _heads(text: str) -> tuple[tuple[int, int, int], ...]:
    sizes = tuple(tuple(_number(number) for number in head.split("x")) for head in _words(text))
    for size in sizes:
        if len(size) != 3:
            raise argparse.ArgumentTypeError(
                f"{'x'.join(map(str, size))!r} is not NxHxV: rows, hidden size, vocabulary"
            )
    return sizes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grade-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="what has a target, at one size, in few rounds")
    group.addoption("--vocab", type=_numbers, metavar="V,V", help=f"vocabulary sizes (default: {VOCABULARIES})")
    group.addoption("--rows", type=_number, default=64, metavar="N", help="rows of logits (default: %(default)s)")
    group.addoption("--dtypes", type=_dtypes, metavar="NAME,NAME", help="default: float32,bfloat16; users: float16 too")
    group.addoption("--contestants", type=_words, metavar="NAME,NAME", help="whom to race against (default: all)")
    group.addoption("--without", type=_words, default=(), metavar="NAME,NAME", help="whom not to race against")
    group.addoption("--trial", type=Path, metavar="FILE", help="holds the name of a contestant while it is tried")
    group.addoption(
        "--heads", type=_heads, metavar="NxHxV,...", help="sizes of test_heads.py (default: on accelerators)"
    )
    group.addoption("--peaks", action="store_true", help="of what is raced, peak memory too, in the same process")
    group.addoption("--own", action="store_true", help="users: in float32, the sample that each program draws")
    group.addoption("--device", default="cpu", help="where the tensors live (default: %(default)s)")
    group.addoption("--threads", type=_number, metavar="N", help="torch's threads (default: torch's own choice)")
    group.addoption("--budget", type=float, metavar="SECONDS", help="for the rounds of one case (default: 2)")
    group.addoption("--compare", type=Path, metavar="CSV", help="fail where ours has lost ground since this saved run")
    group.addoption("--output", type=Path, default=Path("bench-output"), help="folder (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark reads its own options: a JSON of the run, and our tables instead of its own."""
    config.stash[RESULTS] = Results()
    option = config.option
    try:
        processor.hold_torch()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    option.vocab = option.vocab or ((HEADLINE,) if option.quick else VOCABULARIES)
    option.users_dtypes = option.dtypes or (("float32",) if option.quick else DTYPES)
    option.dtypes = option.dtypes or (("float32",) if option.quick else ("float32", "bfloat16"))
    option.budget = option.budget if option.budget is not None else (1.0 if option.quick else 2.0)
    if option.threads is not None:
        torch.set_num_threads(option.threads)
    if not (option.collectonly or option.help):
        _prepare(config)
        option.benchmark_json = option.benchmark_json or str(option.output / "benchmarks.json")
    option.benchmark_quiet = not option.benchmark_verbose


def _prepare(config: pytest.Config) -> None:
    """Find out now what would otherwise end a long run without its results."""
    option = config.option
    try:
        torch.empty(0, device=option.device)
        gk.backends.select(torch.device(option.device), torch.float32)
    except (RuntimeError, AssertionError, ValueError) as error:  # AssertionError: this torch was built without CUDA
        raise pytest.UsageError(f"--device {option.device}: {error}") from error
    try:
        option.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--output {option.output}: {error.strerror}") from error
    if not os.access(option.output, os.W_OK):
        raise pytest.UsageError(f"--output {option.output}: this folder can not be written to")
    if option.compare is not None:
        # Before this run overwrites it, where it is the run before this one.
        try:
            config.stash[SAVED] = compare.read(option.compare)
        except ValueError as error:
            raise pytest.UsageError(f"--compare: {error}") from error


def pytest_report_header(config: pytest.Config) -> str:
    backend = gk.backends.select(torch.device(config.option.device), torch.float32)
    ours = f"{backend}, held to {asked}" if (asked := os.environ.get(processor.ASKED)) else backend
    return f"torch {torch.__version__} on {cpu_name()}; our backend: {ours}; kind of processor: {processor.kind()}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    machine_info |= {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_config": torch.__config__.show(),
        "cpu_name": cpu_name(),
        "kind": processor.kind(),
        "transparent_hugepage": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test `test_x` that takes `case` runs once for each of its module's `cases_x(option)`."""
    if "case" in metafunc.fixturenames:
        cases = getattr(metafunc.module, f"cases_{metafunc.function.__name__.removeprefix('test_')}")
        metafunc.parametrize("case", cases(metafunc.config.option), ids=str)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any, results: Results) -> Iterator[Callable[..., Race]]:
    """Checks ours, then times it in turns with the others: `race(case, contestants, check, targets)`.

    `check()` raises where a result is wrong, and then there is no number. `others` are such checks of other contestants; one
    that fails leaves its contestant out, and fails the test if that is ours by another way. A contestant that raises is left
    out as well. `share` is how much of a case's budget the race has.
    """
    option = request.config.option

    def measure(
        case: Case,
        contestants: Contestants,
        check: Callable[[], None],
        targets: dict[str, float] | None = None,
        share: float = 1.0,
        others: Mapping[str, Callable[[], None]] | None = None,
    ) -> Race:
        results.contestants |= contestants.keys()
        names = [name for name in contestants if _takes_part(option, name)]
        failed = {}
        with on_threads(case.threads):
            check()
            for name in names[1:]:
                if option.trial is not None:
                    option.trial.write_text(name)
                if reason := why_not(name, contestants[name], (others or {}).get(name), case.device):
                    failed[name] = results.left_out[case, name] = reason
            if option.trial is not None:
                option.trial.unlink(missing_ok=True)
            contestants = {name: contestants[name] for name in names if name not in failed}
            if option.peaks:
                used = {name: memory.of_call(work, case.device) for name, work in contestants.items()}
                results.add_peaks(case, used, None)
            measured = run_race(benchmark, case, contestants, share * option.budget, (3, 15))
        benchmark.group = f"{case.op} {case.pass_}"
        benchmark.extra_info |= {
            "case": str(case),
            "seconds": measured.medians,
            "ratios": {name: measured.ratio(name) for name in measured.times},
            "ratios_by_round": {name: measured.ratios(name) for name in measured.times},
            "targets": targets or {},
            "left_out": failed,
        }
        results.add_race(case, measured, targets or {})
        assert not any(map(is_ours, failed)), f"{case}: {failed}"
        return measured

    yield measure
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # nothing compiled for one case outlives it; inductor's cache on disk does


def _takes_part(option: Any, name: str) -> bool:
    """Whether the options let a contestant; ours always does."""
    asked = option.contestants is None or name in option.contestants
    return is_ours(name) or (asked and name not in option.without)


@pytest.fixture
def absent(request: pytest.FixtureRequest, results: Results) -> Callable[[str], None]:
    """Notes for the report which other libraries have no part in the races of an operation."""

    def note(op: str) -> None:
        results.absent |= {
            f"{name} ({op})": why for name, why in rivals.of(op, request.config.option.device)[1].items()
        }

    return note


@pytest.fixture
def peaks(request: pytest.FixtureRequest, results: Results) -> Callable[..., dict[str, int]]:
    """Peak memory of some contestants, each in a fresh process: `peaks(case, build, names, limit)`.

    `limit(peaks)` is the most bytes that ours may take.
    """
    option = request.config.option

    def measure(
        case: Case,
        build: Callable[[Case], Contestants],
        names: tuple[str, ...],
        limit: Callable[[dict[str, int]], float] | None = None,
    ) -> dict[str, int]:
        results.contestants |= set(names)
        names = tuple(name for name in names if _takes_part(option, name))
        if case.device == "cpu":
            processes = {name: memory.start(build, case, name) for name in names}
            found = {name: memory.finish(process) for name, process in processes.items()}
        else:  # one after another: they share the device's memory
            found = {name: memory.finish(memory.start(build, case, name)) for name in names}
        measured = {name: peak for name, peak in found.items() if peak is not None}
        results.left_out |= {(case, name): "out of memory" for name in names if name not in measured}
        results.add_peaks(case, measured, limit and limit(measured))
        return measured

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results.rows:
        return
    path = config.option.output / "benchmarks.csv"
    terminalreporter.section("benchmarks")
    for line in results.tables():
        terminalreporter.write_line(line)
    if results.slower:
        terminalreporter.write_line("\nSlower than eager PyTorch beyond noise:")
        for line in results.slower:
            terminalreporter.write_line(f"  {line}")
    if config.option.compare is not None:
        terminalreporter.write_line(f"\nLost since {config.option.compare}:")
        for line in results.regressions or ["nothing beyond noise"]:
            terminalreporter.write_line(f"  {line}")
    if results.unknown:
        known = ", ".join(sorted(results.contestants - {OURS}))
        terminalreporter.write_line(
            f"\nNo case here has the contestants {', '.join(results.unknown)}; there are {known}"
        )
    terminalreporter.write_line(f"\n{path} holds the figures; `python -m benchmarks.plot {path}` draws them")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the CSV and the notes. A contestant that no case knows fails the run.

    With --compare, so does a case that has lost ground or is slower than eager PyTorch.
    """
    option, results = session.config.option, session.config.stash[RESULTS]
    if not results.rows:
        return
    path = option.output / "benchmarks.csv"
    results.write_csv(path)
    results.write_notes(option.output / "notes.json")
    now = compare.read(path)
    results.slower = [str(case) for case in compare.slower(now)]
    if SAVED in session.config.stash:
        try:
            lost = compare.regressions(session.config.stash[SAVED], now)
            results.regressions = [str(regression) for regression in lost]
        except ValueError as error:
            results.regressions = [str(error)]
    if session.exitstatus != pytest.ExitCode.INTERRUPTED:
        known = results.contestants | {rival.name for rival in rivals.RIVALS}  # one that is not installed is no mistake
        results.unknown = sorted(set(option.contestants or ()) - known)
    if results.regressions or results.unknown or (SAVED in session.config.stash and results.slower):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
