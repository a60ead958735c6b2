"""What becomes of a benchmark's CSV: the comparison with a saved run, and the page."""

import csv

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks import compare, report
from benchmarks.harness import COLUMNS


def row(competitor, low, high, **more):
    ours = {"op": "linear_gumbel_ste", "pass": "forward", "device": "cpu", "dtype": "float32", "N": "64", "V": "100"}
    ours |= {"competitor": competitor, "median_seconds": "0.002", "ratio_to_ours": str((low + high) / 2)}
    return ours | {"ratio_low": str(low), "ratio_high": str(high), "H": "8", "machine": "a machine"} | more


def save(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def lost(tmp_path, before, now):
    paths = [save(tmp_path / f"{i}.csv", rows) for i, rows in enumerate((before, now))]
    return compare.regressions(*map(compare.read, paths))


def test_lost_ground_is_found(tmp_path):
    before = [row("grade-kernels", 1, 1), row("gemm", 0.8, 0.9), row("eager", 6, 7)]
    assert lost(tmp_path, before, before) == []
    # Within noise; slower by the product although faster by eager.
    assert lost(tmp_path, before, [row("gemm", 0.7, 0.79)]) == []
    (regression,) = lost(tmp_path, before, [row("gemm", 0.6, 0.7), row("eager", 9, 9)])
    assert regression.yardstick == "gemm"
    assert "V=100" in str(regression)
    assert "0.80-0.90" in str(regression)
    # A case that only one run has.
    assert lost(tmp_path, before, [row("gemm", 0.8, 0.9), row("gemm", 0.1, 0.1, V="200")]) == []
    assert lost(tmp_path, [row("eager", 6, 7)], [row("eager", 3, 3.1)])[0].yardstick == "eager"


def test_runs_without_a_common_case_can_not_be_compared(tmp_path):
    for now in ([], [row("gemm", 0.1, 0.1, V="200")], [row("multinomial", 0.1, 0.1)]):
        with pytest.raises(ValueError, match="nothing to compare"):
            lost(tmp_path, [row("gemm", 0.8, 0.9)], now)


def test_files_that_are_no_run(tmp_path):
    path = tmp_path / "other.csv"
    with pytest.raises(ValueError, match=r"other\.csv is no saved run: .*No such file"):
        compare.read(path)
    for content in (b"a,b\n1,2\n", b"", b"\xff\xfe\x00\x81"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.csv is no saved run"):
            compare.read(path)
    with pytest.raises(ValueError, match="could not convert string to float: 'much'"):
        compare.read(save(path, [row("gemm", 0.8, 0.9, ratio_low="much")]))


def test_the_page(tmp_path):
    rows = [row("grade-kernels", 1, 1, date="2026-01-01"), row("eager", 6, 7), row("grade-kernels", 1, 1, V="200")]
    text = report.page({"here": report.read(save(tmp_path / "run.csv", rows))})
    assert "| float32 | 64 | 100 | 8 | 2.0 ms | 6.50 |" in text
    assert "| float32 | 64 | 200 | 8 | 2.0 ms |  |" in text
    assert "a machine" in text
