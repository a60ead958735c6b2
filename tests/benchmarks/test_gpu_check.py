"""`make gpu-check` without a GPU: what it keeps when a step crashes, ends late or is interrupted, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import ledger
from benchmarks.gpu_check.page import page
from benchmarks.gpu_check.runner import FAILED, PASSED, WAITING, Result, Runner
from benchmarks.gpu_check.steps import Plan, Step, steps
from tests.support.needs import needs

MACHINE = {"device": "A GPU of 80 GiB", "target": "sm_90", "torch": "2.13.0", "triton": "3.9.0", "commit": "abc"}
FIGURES = "op,pass,device,dtype,N,V,H,D,shape,competitor,median_seconds,ratio_to_ours,peak_bytes\n"


def python(name: str, program: str, limit: float = 3600.0) -> Step:
    return Step(name, "race", ("-c", textwrap.dedent(program)), limit)


def runner(folder: Path, seconds: float = 3600.0) -> Runner:
    return Runner(folder, "abc", seconds, lambda line: None)


def run(folder: Path, *given: Step, seconds: float = 3600.0) -> list[Result]:
    works = runner(folder, seconds)
    works.run(given, lambda: None)
    return [works.result(step) for step in given]


COUNTS = """
    with open({!r}, "a") as file: file.write("x")
"""


def test_a_crash_does_not_lose_the_others(tmp_path: Path) -> None:
    fault = python("fault", "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    memory = python("memory", "raise MemoryError('CUDA out of memory')")
    fine = python("fine", f"open('{tmp_path}/fine/benchmarks.csv', 'w').write('competitor,N\\neager,3\\n')")
    found = run(tmp_path, fault, memory, fine)
    assert [result.state for result in found] == [FAILED, FAILED, PASSED]
    assert (found[0].why, found[0].tail) == ("ended by SIGSEGV", ["before"])
    assert found[1].tail[-1] == "MemoryError: CUDA out of memory"
    assert found[2].rows == [{"competitor": "eager", "N": "3"}]


def test_what_has_ended_does_not_run_again_unless_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = (
        python("good", COUNTS.format(str(log))),
        python("bad", COUNTS.format(str(log)) + "    raise SystemExit(3)\n"),
    )
    for _ in range(2):
        found = run(tmp_path, *given)
        assert [(result.state, result.why) for result in found] == [(PASSED, ""), (FAILED, "ended with status 3")]
        assert log.read_text() == "xx"
    runner(tmp_path).forget(given[1])
    run(tmp_path, *given)
    assert log.read_text() == "xxx"


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    """It has failed, and is not tried again."""
    program = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    (late,) = run(tmp_path, python("late", program, limit=2.0))
    assert (late.state, late.why) == (FAILED, "took more than 2 s")
    child = int(late.tail[0])
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child of a step that was ended lives on")


def test_a_step_for_which_the_time_of_all_steps_ends_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_check.runner.LEAST", 0.0)
    (found,) = run(tmp_path, python("long", "import time; time.sleep(600)"), seconds=1.0)
    assert (found.state, found.why) == (WAITING, "out of time")


def test_without_time_nothing_begins(tmp_path: Path) -> None:
    step = python("later", "pass")
    assert run(tmp_path, step, seconds=1.0)[0].state == WAITING
    assert run(tmp_path, step)[0].state == PASSED


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to an interrupt: a shell that starts tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    """The step's process ends, and the next call runs the step from its beginning."""
    mark = tmp_path / "mark"
    slow = python("slow", f"import os, time; open({str(mark)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(600)")
    works = runner(tmp_path)
    written: list[str] = []

    def interrupt() -> None:
        while not mark.exists() or not mark.read_text().endswith(" "):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        works.run([python("first", "pass"), slow], lambda: written.append("page"))
    assert len(written) == 2
    assert works.result(slow).state == WAITING
    assert works.result(slow).why == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert run(tmp_path, python("slow", "pass"))[0].state == PASSED


def test_a_contestant_that_ends_the_process_is_left_out(tmp_path: Path) -> None:
    """The race is run again without it, and its name and end are in the result."""
    program = f"""
        import os, pathlib, sys
        room = pathlib.Path({str(tmp_path / "race")!r})
        if "--without" not in sys.argv:
            (room / "trial").write_text("liger")
            os.abort()
        assert sys.argv[-1] == "liger"
        (room / "benchmarks.csv").write_text("competitor\\ngrade-kernels\\n")
    """
    (found,) = run(tmp_path, python("race", program))
    assert (found.state, found.notes["crashed"]) == (PASSED, {"liger": "ended by SIGABRT"})
    assert found.rows == [{"competitor": "grade-kernels"}]


TESTS = """
    import os, pytest

    @pytest.mark.parametrize("i", range(3))
    def test_many(i):
        pass

    def test_wrong():
        assert 1 == 2

    def test_crash():
        os.abort()

    def test_broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def test_after():
        pytest.skip("not here")
"""


def pytest_step(folder: Path, name: str = "tests", limit: float = 3600.0, more: tuple[str, ...] = ()) -> Step:
    path = folder / "test_some.py"
    if not path.exists():
        path.write_text(textwrap.dedent(TESTS))
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "benchmarks.gpu_check.ledger", "--ledger", "{tests}")
    command = ("-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), *options, *more, str(path))
    return Step(name, "tests", command, limit)


def test_tests_go_on_after_a_crash_and_a_broken_device(tmp_path: Path) -> None:
    works, step = runner(tmp_path), pytest_step(tmp_path)
    works.run([step], lambda: None)
    found = works.result(step)
    assert (found.state, found.why) == (FAILED, "3 tests failed")
    assert {name: found.tests[name] for name in ("passed", "failed", "skipped", "left")} == {
        "passed": 3, "failed": 3, "skipped": 1, "left": 0,
    }  # fmt: skip
    messages = {name.partition("::")[2]: why for name, why in found.tests["messages"].items()}
    assert messages["test_crash"] == "ended by SIGABRT"
    assert "illegal memory access" in messages["test_broken"]
    # A process for what came before the crash, one up to the broken device, one for the rest.
    records = ledger.read(works.ledger)
    starts = [record["start"].partition("::")[2] for record in records if "start" in record]
    assert len(starts) == len(set(starts)) == 7
    assert starts[1] == "test_wrong", "one case of every test comes before a second of any"
    # The same tests in another step have run already; asked for again, the failed ones run.
    rest = pytest_step(tmp_path, "rest")
    works.run([rest], lambda: None)
    assert works.result(rest).tests["left"] == works.result(rest).tests["passed"] == 0
    works.forget(step)
    (tmp_path / "test_some.py").write_text(textwrap.dedent(TESTS).replace("os.abort()", "pass"))
    works.run([step], lambda: None)
    assert works.result(step).tests["passed"] == 4
    assert works.result(step).tests["failed"] == 2


def test_tests_for_which_there_was_no_time_are_counted(tmp_path: Path) -> None:
    """Those of a step with a limit of its own are left to the last step."""
    slow = "import time\nimport pytest\n@pytest.mark.parametrize('i', range(4))\ndef test_slow(i): time.sleep(0.1)\n"
    (tmp_path / "test_some.py").write_text(slow)
    step = pytest_step(tmp_path, limit=0.0)
    (found,) = run(tmp_path, step)
    assert (found.state, found.tests["left"], found.tests["passed"]) == (PASSED, 4, 0)
    (rest,) = run(tmp_path, pytest_step(tmp_path, "rest"))
    assert (rest.state, rest.tests["left"], rest.tests["passed"]) == (PASSED, 0, 4)


def test_tests_that_can_not_be_collected_fail(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import nothing_of_this_name\n")
    (found,) = run(tmp_path, pytest_step(tmp_path))
    assert found.state == FAILED
    assert any("nothing_of_this_name" in line for line in found.tail)


def test_kernels_of_the_package_that_tests_launch_are_noted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = """
        import pytest, torch, triton, triton.language as tl

        @triton.jit
        def copy_kernel(x, y):
            tl.store(y, tl.load(x))

        @triton.jit
        def other_kernel(x, y):
            tl.store(y, tl.load(x))

        copy_kernel.fn.__module__ = "grade_kernels.backends.triton"

        def launch():
            x, y = torch.ones(1), torch.zeros(1)
            other_kernel[(1,)](x, y)
            copy_kernel[(1,)](x, y)
            return y.item()

        @pytest.mark.parametrize("gpu_backend", ["triton"])
        def test_launches(gpu_backend):
            assert launch() == 1.0

        def test_fails():
            assert launch() == 2.0

        def test_has_none():
            pass
    """
    (tmp_path / "test_some.py").write_text(textwrap.dedent(program))
    (tmp_path / "conftest.py").write_text("import os\nos.environ['TRITON_INTERPRET'] = '1'\n")
    (found,) = run(tmp_path, pytest_step(tmp_path))
    assert found.notes["backends"] == {"triton": {"cases": 1, "passed": 1}}
    assert found.notes["kernels"] == {"copy_kernel": {"cases": 2, "passed": 1}}


def test_the_page(tmp_path: Path) -> None:
    row = {"op": "linear_logprobs", "pass": "forward", "dtype": "bfloat16", "N": "8", "V": "100", "H": "16", "D": ""}
    times = [row | {"competitor": name, "median_seconds": seconds, "ratio_to_ours": ratio, "peak_bytes": ""}
             for name, seconds, ratio in (("grade-kernels", "0.002", "1"), ("eager", "0.004", "2"))]  # fmt: skip
    notes = {
        "absent": {"quack (linear_logprobs)": "quack-kernels not installed"},
        "left_out": [{"case": "a-case", "name": "compiled", "why": "out of memory"}],
        "crashed": {"liger": "ended by SIGSEGV"},
    }
    ways = {"4": {"seconds": 0.5, "peak_gib": 2.0, "before_gib": 1.5}, "sequential": None}
    training = {"case": "llama", "vocab": 100, "batch": 4, "length": 8, "ways": ways}
    count = {
        "passed": 5,
        "failed": 1,
        "skipped": 0,
        "left": 2,
        "messages": {"tests/test_x.py::test_y": "assert 1\n== 2"},
    }
    text = page(MACHINE, [
        Result("doctor", "doctor", "abc", PASSED, 3.0, tail=["Versions", "  torch 2.13"]),
        Result("tests that decide", "tests", "abc", FAILED, 9.0, "1 tests failed", tests=count, tail=["the end"]),
        Result("heads", "race", "abc", PASSED, 9.0, rows=times, notes=notes),
        Result("training step", "training", "abc", PASSED, 9.0, notes=training),
        Result("rest of the tests", "tests", "abc", WAITING),
    ])  # fmt: skip
    for line in (
        "# gpu-check: A GPU of 80 GiB",
        "* 3 of 5 steps passed.",
        "* Failed: tests that decide (1 tests failed).",
        "* Left out so far: rest of the tests. `make gpu-check` again goes on with these.",
        "| tests that decide | 5 | 1 | 0 | 2 |",
        "* `tests/test_x.py::test_y`: assert 1 == 2",
        "| bfloat16 | 8 | 100 | 16 | 2.0 ms | 2.00 |",
        "* not raced against: quack (linear_logprobs): quack-kernels not installed",
        "* left out of a-case: compiled: out of memory",
        "* left out of heads: liger: its process ended by SIGSEGV",
        "| 4 | 0.500 | 2.00 | 0.50 |",
        "| sequential | failed | | |",
    ):
        assert line in text.splitlines(), line


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    line = [sys.executable, "-m", "benchmarks.gpu_check", *map(str, arguments)]
    return subprocess.run(line, cwd=command.ROOT, env=environment, capture_output=True, text=True, check=False)


def names(device: str) -> list[str]:
    return [step.name for step in steps(Plan.of(device))]


@pytest.mark.takes_long("every step at tiny sizes; the shorter run notices most", lambda everything: everything)
@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
def test_on_the_cpu(everything: bool, tmp_path: Path) -> None:
    """The same code at sizes that take seconds, from the command to the files; a second call has nothing to do."""
    pytest.importorskip("pytest_benchmark")
    chosen = names("cpu") if everything else ["doctor", "tests that decide", names("cpu")[2]]
    given = ("--device", "cpu", "--output", tmp_path, "--only", *chosen)
    done = gpu_check(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [step["name"] for step in found["steps"] if step["state"] == PASSED] == chosen
    race = next(step for step in found["steps"] if step["name"] == chosen[2])
    assert {row["competitor"] for row in race["rows"]} >= {"grade-kernels", "eager"}
    text = (tmp_path / "gpu-check.md").read_text()
    assert "triton on cpu" in text
    assert "### linear_logprobs, forward+backward" in text
    record = json.loads((tmp_path / f"gpu-{command.slug(found['machine']['device'])}.json").read_text())
    assert record.keys() == {"device", "target", "torch", "commit", "compiler", "kernels", "backends"}
    again = gpu_check(*given)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "..." not in again.stdout


def test_results_of_other_versions_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(json.dumps({"device": "another", "torch": "2.10.0"}))
    done = gpu_check("--device", "cpu", "--output", tmp_path)
    assert done.returncode == 2
    assert "holds results of device another (here: " in done.stderr
    assert "torch 2.10.0 (here: " in done.stderr


def test_a_step_that_is_not_there_is_an_error() -> None:
    done = gpu_check("--device", "cpu", "--only", "doktor")
    assert done.returncode == 2
    assert "no step is called 'doktor'; there are: doctor, tests that decide, " in done.stderr


@needs("no GPU", not torch.cuda.is_available())
def test_without_a_gpu_it_says_what_it_looked_for() -> None:
    done = gpu_check()
    assert done.returncode == 2
    assert "no GPU was found that torch can use. Looked for:" in done.stderr
    assert f"torch {torch.__version__}: built for " in done.stderr
    assert "nvidia-smi: " in done.stderr


def test_the_steps_of_a_gpu_are_those_of_the_sizes_that_matter() -> None:
    """In the order of what is known first, every way through a head at every size."""
    found = names("cuda")
    assert found[:2] == ["doctor", "tests that decide"]
    assert found[-1] == "rest of the tests"
    assert len(found) == len(set(found))
    sizes = ("8192x4096x151936", "4096x4096x128256", "256x4096x151936", "64x1024x151936")
    assert [name for name in found if name.startswith("linear_logprobs")] == [
        f"linear_logprobs {size}" for size in sizes
    ]
