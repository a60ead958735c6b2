"""The benchmarks run: one tiny case of each kind, from the check to the tables, the CSV and the pictures."""

import csv
import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT


def python(*arguments, cwd=ROOT):
    # pytest-benchmark measures nothing where it believes to be one of pytest-xdist's workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def bench(*arguments):
    """`grade-kernels bench`, of one case that takes no time."""
    sizes = ("--rows", 2, "--vocab", 1000, "--dtypes", "float32", "--budget", 0, "--contestants", "eager")
    case = ("-k", "test_time and gumbel_sample-", "-p", "no:cacheprovider")
    return [str(argument) for argument in ("bench", *sizes, *case, *arguments)]


USER = "architecture search: [20, 8]"  # a shape of benchmarks.users

# A process for every command, forked from one that has imported torch, which is most of what a command takes.
_FORKS = """
import json, os, sys
import pytest, torch
from grade_kernels import cli
for arguments, folder in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY, 0o666), stream)
        status = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def several(*commands):
    """Status, output and errors of commands, each in a folder of its own."""
    pytest.importorskip("pytest_benchmark")
    done = python("-c", _FORKS, json.dumps([(arguments, str(folder)) for arguments, folder in commands]))
    assert done.returncode == 0, done.stderr
    found = zip(map(int, done.stdout.split()), commands, strict=True)
    return [(status, (path / "stdout").read_text(), (path / "stderr").read_text()) for status, (_, path) in found]


@pytest.fixture(scope="module")
def operations(request):
    """Operations whose memory is measured: each contestant's in a process of its own, so without --all those of one kind."""
    return {"linear_gumbel_ste", "gumbel_ste"} if request.config.getoption("every_combination") else {"gumbel_ste"}


@pytest.fixture(scope="module")
def output(operations, tmp_path_factory):
    pytest.importorskip("pytest_benchmark")
    folder = tmp_path_factory.mktemp("bench-output")
    sizes = ("--rows", 3, "--vocab", 1001, "--dtypes", "float32", "--budget", 0)
    options = ("--contestants", "eager,multinomial", "--output", folder, "-p", "no:cacheprovider")
    user = "(test_users and hard-forward-float32 and architecture and threads1)"
    measured = " or ".join(f"test_memory and [{name}-forward+backward" for name in sorted(operations))
    done = python("-m", "pytest", "benchmarks", *sizes, *options, "-k", f"test_time or {user} or {measured}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Time: ours, and how many times as long the others took" in done.stdout
    assert "Peak memory above the inputs" in done.stdout
    return folder


def test_csv(output, operations):
    with (output / "benchmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert USER in {row["shape"] for row in rows}
    assert {row["competitor"] for row in rows} == {"grade-kernels", "eager", "multinomial"}
    ops = {row["op"].split()[0] for row in rows}
    assert ops == {
        *("gumbel_sample", "gumbel_ste", "gumbel_softmax", "gumbel_ste_embedding"),
        *("linear_gumbel_sample", "linear_gumbel_ste", "linear_kl", "linear_logprobs"),
    }
    for row in rows:
        assert float(row["median_seconds"]) > 0
        assert row["N"] in ("1", "3", "12") or (row["shape"], row["threads"]) == (USER, "1")
        assert row["competitor"] != "grade-kernels" or float(row["ratio_to_ours"]) == 1
    with_memory = [row for row in rows if row["peak_bytes"]]
    assert {(row["op"], row["pass"]) for row in with_memory} == {(name, "forward+backward") for name in operations}


def test_json(output):
    for record in json.loads((output / "benchmarks.json").read_text())["benchmarks"]:
        assert record["extra_info"]["ratios_by_round"].keys() >= {"grade-kernels", "eager"}
        assert record["stats"]["rounds"] % len(record["extra_info"]["ratios_by_round"]["eager"]) == 0


def test_plots(output):
    pytest.importorskip("matplotlib")
    done = python("-m", "benchmarks.plot", output / "benchmarks.csv")
    assert done.returncode == 0, done.stderr
    assert len(list(output.glob("*.png"))) >= 5
    assert not list(output.glob("gumbel_softmax-hard*"))


def test_the_run_before_may_be_overwritten(tmp_path):
    """Files are named from where the user is, and a saved run is read before a new one takes its place."""
    before = {"op": "gumbel_sample", "pass": "forward", "device": "cpu", "dtype": "float32", "N": 2, "V": 1000, "H": "",
              "D": "", "shape": "", "threads": "", "competitor": "eager", "ratio_low": 1000, "ratio_high": 1000}  # fmt: skip
    path = tmp_path / "bench-output" / "benchmarks.csv"
    path.parent.mkdir()
    path.write_text("\n".join([",".join(before), ",".join(map(str, before.values()))]))
    done = python("-m", "grade_kernels.cli", *bench("--compare", "bench-output/benchmarks.csv"), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "eager took 1000.00" in done.stdout
    with path.open(newline="") as file:
        assert all(float(row["ratio_low"]) < 1000 for row in csv.DictReader(file))


SLOW = """
import time
import grade_kernels as gk
right = gk.gumbel_softmax
def gumbel_softmax(*arguments, **options):
    time.sleep(0.01)
    return right(*arguments, **options)
gk.gumbel_softmax = gumbel_softmax
"""
SAVED = f"""
op,pass,device,dtype,N,V,H,D,shape,threads,competitor,ratio_low,ratio_high
gumbel_softmax hard,forward,cpu,float32,20,8,,,"{USER}",1,eager,0,0
""".lstrip()
ONE_USER = ("-k", "test_users and hard-forward-float32 and architecture and threads1")

FAILURES = [
    (("--compare", "saved", "-p", "slow", *ONE_USER), "Slower than eager PyTorch beyond noise:"),
    (("--compare", ROOT / "benchmarks" / "results" / "amx-rows.csv"), "nothing to compare"),
    (("--contestants", "eager,multinominal"), "contestants multinominal; there are"),
]
BAD_OPTIONS = [
    (("--compare", "missing.csv"), "missing.csv is no saved run"),
    (("--output", "file"), "--output file: File exists"),
    (("--device", "abacus"), "--device abacus: "),
    (("--dtypes", "float32,float9"), "'float9' is none of float32"),
    (("--vocab", "1000,many"), "'many' is no positive whole number"),
    (("--rows", "0"), "'0' is no positive whole number"),
    (("--threads", "0"), "'0' is no positive whole number"),
]


def test_what_can_not_be_done_fails(tmp_path):
    """Bad options before anything is measured; a run without its like, and a contestant that no case has, after it."""
    commands = []
    for i, (options, _) in enumerate(FAILURES + BAD_OPTIONS):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "file").touch()
        (folder / "slow.py").write_text(SLOW)
        (folder / "saved").write_text(SAVED)
        commands.append((bench(*options), folder))
    found = several(*commands)
    assert "nothing beyond noise" in found[0][1]  # no ground is lost: it fails because eager is faster
    for (status, output, errors), (_, message) in zip(found, FAILURES, strict=False):
        assert status == 1, output + errors
        assert message in output
    bad = slice(len(FAILURES), None)
    for (status, output, errors), (options, message), (_, folder) in zip(
        found[bad], BAD_OPTIONS, commands[bad], strict=True
    ):
        assert status == pytest.ExitCode.USAGE_ERROR, f"{options}: {output}{errors}"
        assert message in errors
        assert "INTERNALERROR" not in output + errors
        assert not list(folder.rglob("*.csv"))


def test_a_wrong_result_gets_no_number():
    """The check that goes before every timing tells another sample and a wrong gradient from right ones."""
    pytest.importorskip("pytest_benchmark")
    program = """
import pytest, torch
from benchmarks import rows
from benchmarks.harness import OURS, Case
case = Case("gumbel_ste", "forward+backward", "float32", 3, 1001)
ours = rows.build(case)[OURS]
rows.check(case, ours)
for spoil in (lambda y, g: (y.roll(1, -1), g), lambda y, g: (y, 1.01 * g)):
    with pytest.raises(AssertionError):
        rows.check(case, lambda: spoil(*ours()))
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
