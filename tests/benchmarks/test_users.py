"""The shapes of `F.gumbel_softmax`'s users: what is timed is right, turns are fair, what eager does faster is found."""

import csv
import os

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import compare, harness, processor, report, users
from benchmarks.harness import OURS, Case, Race, Results

SMALL = [shape for shape in users.SHAPES if shape.rows * shape.vocab < 30_000]


def test_small_shapes_have_every_layout():
    assert {shape.dim for shape in SMALL} == {-1, 1}
    assert any(shape.width for shape in SMALL)
    assert len({str(shape) for shape in users.SHAPES}) == len(users.SHAPES)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wrong_result_gets_no_number(shape, hard, dtype):
    case = shape.case(hard, "forward+backward", dtype, 1)
    ours = users.build(case, with_compiled=False)[OURS]
    users.check(case, ours)
    factor = 1.05 if dtype == "bfloat16" else 1.01
    for spoil in (lambda y, g: (y.roll(1, shape.dim), g), lambda y, g: (y, factor * g), lambda y, g: (y, -g)):
        with pytest.raises(AssertionError):
            users.check(case, lambda spoil=spoil: spoil(*ours()))


def test_rows_are_masked_and_sliced_as_the_name_says():
    (masked,) = (shape for shape in users.SHAPES if shape.masked)
    logits, _ = users.inputs(masked.case(True, "forward", "float32", 1))
    assert torch.equal(logits.flatten(0, -2)[:4, 0].isinf(), torch.tensor([True, False, False, True]))
    (sliced,) = (shape for shape in SMALL if shape.width)
    logits, upstream = users.inputs(sliced.case(True, "forward+backward", "float32", 1))
    assert logits.shape == upstream.shape == sliced.sizes
    assert logits.stride() == (sliced.width, 1)


class Benchmark:
    """What a race asks of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, args, setup, rounds):
        for _ in range(rounds):
            setup()
            function(*args)


def test_contestants_take_turns_of_a_length(monkeypatch):
    """A contestant here returns the seconds that it takes, and no time passes."""
    called = []

    def contestant(name, seconds):
        return lambda: called.append(name) or seconds

    monkeypatch.setattr(harness, "seconds", lambda work, device: work())
    case = users.SHAPES[0].case(True, "forward", "float32", 1)
    costs = {OURS: 1e-4, "eager": 2e-4, "compiled": 0.5}
    benchmark = Benchmark()
    race = harness.run_race(benchmark, case, {n: contestant(n, s) for n, s in costs.items()}, 2.0, (3, 15))
    assert benchmark.extra_info["calls"] == {OURS: 10, "eager": 5, "compiled": 1}
    one_round = ["eager"] * 5 + ["compiled"] + [OURS] * 10
    assert called[-3 * len(one_round) :] == 3 * one_round
    assert race.ratio("eager") == pytest.approx(2)


def test_an_interruption_of_a_short_call_does_not_count(monkeypatch):
    monkeypatch.setattr(harness, "seconds", lambda work, device: work())
    case, calls = users.SHAPES[0].case(True, "forward", "float32", 1), iter(range(1000))
    contestants = {OURS: lambda: 1e-4, "eager": lambda: 0.1 if next(calls) % 5 == 4 else 2e-4}
    assert harness.run_race(Benchmark(), case, contestants, 2.0, (3, 15)).ratio("eager") == pytest.approx(2)


def test_a_case_has_its_threads():
    before = torch.get_num_threads()
    for count, expected in ((before + 1, before + 1), (None, before)):
        with harness.on_threads(count):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == before


def run(tmp_path, ratios, name="run.csv"):
    """A saved run of one case, in which eager took so many times as long as ours, round by round."""
    results = Results()
    case = users.SHAPES[0].case(True, "forward", "float32", 1)
    results.add_race(case, Race({OURS: [0.001] * len(ratios), "eager": [0.001 * ratio for ratio in ratios]}), {})
    results.write_csv(tmp_path / name)
    return tmp_path / name


def test_slower_than_eager_is_found(tmp_path, monkeypatch, capsys):
    found = [
        compare.slower(compare.read(run(tmp_path, ratios))) for ratios in ([0.9] * 5, [0.9, 0.9, 1, 1, 1], [2] * 5)
    ]
    assert [len(cases) for cases in found] == [1, 0, 0]
    assert "token pruning: [64, 2, 14, 14], dim 1 threads=1: eager took 0.90-0.90" in str(found[0][0])
    before, now = run(tmp_path, [0.5] * 5, "before.csv"), run(tmp_path, [0.6] * 5, "now.csv")
    monkeypatch.setattr("sys.argv", ["compare", str(before), str(now)])
    assert compare.main() == 1  # no ground is lost, and yet
    assert "eager took 0.60-0.60 times as long as ours" in capsys.readouterr().out


def test_the_page_has_a_line_for_a_shape(tmp_path):
    with run(tmp_path, [0.5] * 5).open(newline="") as file:
        text = report.page({"here": list(csv.DictReader(file))})
    assert "| shape | sample | forward, threads: 1 |" in text
    assert "| token pruning: [64, 2, 14, 14], dim 1 | hard | **0.50** (1.00 ms) |" in text


def test_torch_is_held_to_what_holds_ours(monkeypatch):
    names = ["ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "TORCHINDUCTOR_CPP_MARCH"]
    monkeypatch.setattr(os, "environ", {})
    processor.hold_torch()
    assert os.environ == {}
    os.environ["GRADE_KERNELS_CPU_ISA"] = "avx2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    processor.hold_torch()
    assert all("2" in os.environ[name] or os.environ[name] == "x86-64-v3" for name in names)
    assert processor.kind() in ("avx2", "generic")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(RuntimeError, match="torch uses AVX512"):
        processor.hold_torch()


def test_names_of_cases_are_those_of_pytest():
    assert str(Case("op", "forward", "float32", 4, 2)) == "op-forward-float32-2-N4"
    names = {str(shape.case(True, "forward", "float32", 1)) for shape in users.SHAPES}
    assert len(names) == len(users.SHAPES)
    assert not any(set(name) & set(" []:,") for name in {name.partition("-")[2] for name in names})
