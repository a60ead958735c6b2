"""The benchmarks run: one tiny case of each kind, from the check to the tables, the CSV and the pictures."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments):
    # pytest-benchmark measures nothing where it believes to be one of pytest-xdist's workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    pytest.importorskip("pytest_benchmark")
    folder = tmp_path_factory.mktemp("bench-output")
    sizes = ("--rows", 3, "--vocab", 1001, "--dtypes", "float32", "--budget", 0)
    options = ("--contestants", "eager,multinomial", "--output", folder, "-p", "no:cacheprovider")
    done = python("-m", "pytest", "benchmarks", *sizes, *options, "-k", "test_time or gumbel_ste-forward+backward")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Time: ours, and how many times as long the others took" in done.stdout
    assert "Peak memory above the inputs" in done.stdout
    return folder


def test_csv(output):
    with (output / "benchmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["competitor"] for row in rows} == {"grade-kernels", "eager", "multinomial"}
    ops = {row["op"].split()[0] for row in rows}
    assert ops == {
        *("gumbel_sample", "gumbel_ste", "gumbel_softmax", "gumbel_ste_embedding"),
        *("linear_gumbel_sample", "linear_gumbel_ste", "linear_kl", "linear_logprobs"),
    }
    for row in rows:
        assert float(row["median_seconds"]) > 0
        assert row["N"] in ("1", "3", "12")
        assert row["competitor"] != "grade-kernels" or float(row["ratio_to_ours"]) == 1
    with_memory = [row for row in rows if row["peak_bytes"]]
    assert {(row["op"], row["pass"]) for row in with_memory} == {
        ("gumbel_ste", "forward+backward"),
        ("linear_gumbel_ste", "forward+backward"),
    }


def test_json(output):
    for record in json.loads((output / "benchmarks.json").read_text())["benchmarks"]:
        assert record["extra_info"]["ratios_by_round"].keys() >= {"grade-kernels", "eager"}
        assert record["stats"]["rounds"] % len(record["extra_info"]["ratios_by_round"]["eager"]) == 0


def test_plots(output):
    pytest.importorskip("matplotlib")
    done = python("-m", "benchmarks.plot", output / "benchmarks.csv")
    assert done.returncode == 0, done.stderr
    assert len(list(output.glob("*.png"))) >= 5


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
