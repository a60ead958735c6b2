"""Which way goes through a head: what is measured, what is remembered, and what is on disk. A clock that is set decides."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from grade_kernels import doctor
from grade_kernels.backends import Head, get

pytest.importorskip("triton", reason="Triton is not installed")

from grade_kernels.backends.triton import head_choice
from grade_kernels.backends.triton.head_choice import ROUNDS, WAYS, Choices, Measured, ShapeClass, predicted
from grade_kernels.cache import keep

HERE = "some GPU, torch 2, triton 3"
SHAPE = ShapeClass("bfloat16", 4096, 151936, 4096, False, False, "")


class Device:
    """Passes take the seconds that they are told to, the first of a way longer; it counts them."""

    def __init__(self, tiles: float | Exception, chunks: float | Exception) -> None:
        self.takes = {"tiles": tiles, "chunks": chunks}
        self.now, self.pending, self.runs = 0.0, 0.0, []

    def clock(self) -> float:
        return self.now

    def run(self, way: str) -> None:
        self.runs.append(way)
        took = self.takes[way]
        if isinstance(took, Exception):
            raise took
        self.pending += took + (100.0 if self.runs.count(way) == 1 else 0.0)  # compiled when it is first run

    def synchronize(self) -> None:
        self.now, self.pending = self.now + self.pending, 0.0


def choose(
    choices: Choices, device: Device, shape: ShapeClass = SHAPE, where: str = HERE, fallback: str = "tiles"
) -> str:
    choices.clock = device.clock
    return choices.choose(where, shape, device.run, device.synchronize, fallback)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not yet" / "head.json"


@pytest.fixture(autouse=True)
def strict() -> object:
    """A warning that no test expects is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("tiles", "chunks", "faster"), [(2.0, 3.0, "tiles"), (3.0, 2.0, "chunks")])
def test_the_faster_way_is_taken_and_kept(tiles: float, chunks: float, faster: str, path: Path) -> None:
    device, fallback = Device(tiles, chunks), "chunks" if faster == "tiles" else "tiles"
    choices = Choices(path)
    for _ in range(3):
        assert choose(choices, device, fallback=fallback) == faster
    assert device.runs == [*WAYS] * (1 + ROUNDS), (
        "in turns, once for a class, and the round that compiles does not count"
    )
    assert Choices(path).known(HERE) == {str(SHAPE): Measured(faster, {"tiles": tiles, "chunks": chunks})}
    later = Device(chunks, tiles)
    assert choose(Choices(path), later) == faster, "another process finds what this one has measured"
    assert not later.runs


def test_classes_and_environments_are_apart(path: Path) -> None:
    choices = Choices(path)
    for i, shape in enumerate(
        (SHAPE, SHAPE._replace(rows=64), SHAPE._replace(bias=True), SHAPE._replace(reference="x"))
    ):
        assert choose(choices, Device(1.0, 2.0) if i % 2 else Device(2.0, 1.0), shape) == WAYS[1 - i % 2]
    assert choose(choices, Device(1.0, 2.0), where="another GPU") == "tiles"
    assert choose(Choices(path), Device(9.0, 9.5)) == "chunks"
    assert len(Choices(path).known(HERE)) == 4
    assert len(Choices(path).known("another GPU")) == 1


@pytest.mark.parametrize("fallback", WAYS)
def test_nothing_is_measured_during_capture(fallback: str, path: Path) -> None:
    """A prediction serves then, and stays in this process: backward goes the way of forward."""
    choices, device = Choices(path), Device(1.0, 2.0) if fallback == "chunks" else Device(2.0, 1.0)
    assert choices.choose(HERE, SHAPE, None, device.synchronize, fallback) == fallback
    assert choose(choices, device) == fallback
    assert not device.runs
    assert not path.exists(), "a prediction is no measurement"
    other = "chunks" if fallback == "tiles" else "tiles"
    assert choose(Choices(path), device) == other
    assert Choices(path).choose(HERE, SHAPE, None, device.synchronize, fallback) == other, (
        "what is known serves in capture"
    )


BROKEN = {
    "empty": "",
    "cut short": '{"format": 1, "environ',
    "nested without end": 100_000 * "[",
    "another kind": '["tiles"]',
    "another format": json.dumps({"format": 2, "environments": {}}),
    "no environments": json.dumps({"format": 1}),
    "environments of another kind": json.dumps({"format": 1, "environments": {HERE: 3}}),
    "an unknown way": json.dumps({"format": 1, "environments": {HERE: {str(SHAPE): {"way": "rows", "seconds": {}}}}}),
    "no seconds": json.dumps({"format": 1, "environments": {HERE: {str(SHAPE): {"way": "tiles"}}}}),
    "odd seconds": json.dumps(
        {"format": 1, "environments": {HERE: {str(SHAPE): {"way": "tiles", "seconds": {"tiles": "x"}}}}}
    ),
    "an odd entry": json.dumps({"format": 1, "environments": {HERE: {str(SHAPE): None}}}),
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_said_and_measured_anew(content: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(BROKEN[content])
    device = Device(3.0, 2.0)
    with pytest.warns(UserWarning, match=r"head\.json: .*measured anew"):
        assert choose(Choices(path), device) == "chunks"
    assert device.runs
    assert choose(Choices(path), Device(1.0, 2.0)) == "chunks", "the file has been mended"


def test_files_that_cannot_be_read_or_written(path: Path) -> None:
    path.mkdir(parents=True)  # a folder of that name
    with pytest.warns(UserWarning, match="measured anew"):
        assert choose(Choices(path), Device(3.0, 2.0)) == "chunks"
    assert list(path.parent.iterdir()) == [path], "nothing is left of the attempt"
    assert choose(Choices(None), Device(1.0, 2.0)) == "tiles"


def test_processes_of_one_number_do_not_share_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines and in containers that have one home."""
    written: list[Path] = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        written.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    for _ in range(2):
        keep(path, "{}")
    assert len(set(written)) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_way_that_fails_is_not_taken(path: Path) -> None:
    device = Device(RuntimeError("no such instruction"), 2.0)
    with pytest.warns(UserWarning, match="by tiles fails here, .*no such instruction"):
        assert choose(Choices(path), device) == "chunks"
    assert device.runs.count("tiles") == 1
    assert Choices(path).known(HERE)[str(SHAPE)].seconds == {"tiles": None, "chunks": 2.0}
    with pytest.raises(RuntimeError, match="too much"):
        choose(Choices(None), Device(RuntimeError("too much"), RuntimeError("too much")))


def test_a_lack_of_memory_is_not_kept(path: Path) -> None:
    with pytest.warns(UserWarning, match="by chunks fails here, .*not enough"):
        assert choose(Choices(path), Device(3.0, torch.OutOfMemoryError("not enough"))) == "tiles"
    assert not path.exists()
    assert choose(Choices(path), Device(3.0, 2.0)) == "chunks"


def test_shape_classes() -> None:
    def head(rows: int, dtype: torch.dtype = torch.bfloat16, **others: object) -> Head:
        x = torch.zeros(rows, 16, dtype=dtype)
        return Head(x, torch.zeros(9, 16, dtype=dtype), None, None)._replace(**others)

    assert [ShapeClass.of((head(n),)).rows for n in (1, 2, 3, 128, 129)] == [1, 2, 4, 128, 256]
    classes = [
        ShapeClass.of(heads) for heads in (
            (head(4),), (head(4, torch.float16),), (head(4, bias=torch.zeros(9)),), (head(4, softcap=3.0),),
            (head(4), head(4)), (head(4), head(4, torch.float32)), (head(4), head(4, softcap=1.0)),
        )
    ]  # fmt: skip
    assert len(set(classes)) == len(set(map(str, classes))) == len(classes)
    assert str(classes[2]) == "bfloat16, up to 4 rows, 9 tokens, width 16, bias"


def test_predictions() -> None:
    """What `inspect` predicts: chunks on B200, in float32, a reference on Hopper, where bias or softcap leave tiles small."""
    assert predicted(SHAPE, "cuda", 90) == "tiles"
    assert predicted(SHAPE, "cuda", 100) == "chunks"
    assert predicted(SHAPE, "cuda", 120) == "tiles"
    assert predicted(SHAPE._replace(dtype="float32"), "cuda", 80) == "chunks"
    assert predicted(SHAPE._replace(reference="bfloat16 4096"), "cuda", 90) == "chunks"
    assert predicted(SHAPE._replace(reference="bfloat16 4096"), "cuda", 80) == "tiles"
    assert predicted(SHAPE._replace(softcap=True), "cuda", 90) == "chunks"
    assert predicted(SHAPE._replace(softcap=True, rows=64), "cuda", 90) == "tiles"
    for backend in ("hip", "interpreter"):
        assert predicted(SHAPE._replace(dtype="float32"), backend, 0) == "tiles"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's choice")
def test_nothing_is_measured_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_choice, "choices", lambda: pytest.fail("the file was asked"))
    head = Head(torch.zeros(3, 16), torch.zeros(9, 16), None, None)
    assert head_choice.choose((head,), 2**28, lambda way: pytest.fail("measured")) == "tiles"
    assert not get("triton")._chunked(head)


def test_what_doctor_prints(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_choice, "choices", lambda: Choices(path))
    monkeypatch.setattr(head_choice, "environment", lambda *given: HERE)
    monkeypatch.setattr("grade_kernels.backends.triton.targets.INTERPRETED", False)
    monkeypatch.setenv("GRADE_KERNELS_HEAD", "tiles")
    assert doctor._head_ways(torch.device("cpu")) == [
        ("GRADE_KERNELS_HEAD", "tiles"), ("measured ways", str(path)),
        ("", "none yet: each class of shapes is measured at its first call"),
    ]  # fmt: skip
    choose(Choices(path), Device(0.25, 0.125))
    monkeypatch.delenv("GRADE_KERNELS_HEAD")
    assert doctor._head_ways(torch.device("cpu")) == [
        ("GRADE_KERNELS_HEAD", "not set: auto"), ("measured ways", str(path)),
        ("chunks", f"{SHAPE} (tiles 250 ms, chunks 125 ms)"),
    ]  # fmt: skip
