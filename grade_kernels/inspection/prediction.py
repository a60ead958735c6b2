"""From counted instructions and bytes to times. Nothing here was measured on a device: these are predictions.

A kernel's floor is the larger of the bytes that it has to move over the memory's bandwidth and the operations that it
has to do over their peak rate. Its predicted time adds what its code does: instructions over the rate of the pipe that
is busiest, and for a product its tiles' traffic from the cache. Latency, launches and imbalance are left out, so times are
optimistic; what bounds a kernel, and by how much, is what they are good for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grade_kernels.inspection.configurations import ROWS, VOCAB, Build, Problem
from grade_kernels.inspection.devices import DEVICES, Device, programs
from grade_kernels.inspection.machine_code import PIPES, Figures

__all__ = ["ROWS", "WIDTH", "Prediction", "predict"]

WIDTH = 4096  # H of the problem, beside ROWS and VOCAB
_ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Prediction:
    """A predicted time for a build's own problem, or for `VOCAB` tokens and, for a head, `WIDTH` hidden units.

    Attributes:
        rows: of logits or hidden states: the problem's, or `ROWS`, or as many as a head's tile of few rows takes.
        floor, seconds: what any kernel needs, and what this one does.
        bound: the resource that takes the longest.
        resources: seconds that each would need alone.
    """

    device: str
    rows: int
    floor: float
    seconds: float
    bound: str
    resources: dict[str, float]

    @property
    def ratio(self) -> float:
        """Predicted time over the floor."""
        return self.seconds / self.floor


def predict(build: Build, found: Figures) -> list[Prediction]:
    """Predictions for the devices that run a kernel's code; none for a kernel without a main loop, or in float64."""
    if found.per_logit is None or not found.bytes_per_logit or found.dtype not in _ELEMENT:
        return []
    devices = {name: device for name, device in DEVICES.items() if device.target == found.target}
    if build.problem is not None:
        return [_tiles(name, device, build.problem, found) for name, device in devices.items()]
    if build.tile is None:
        return [_scan(name, device, found) for name, device in devices.items()]
    if found.per_width is None:
        return []
    return [_product(name, device, build, found) for name, device in devices.items()]


def _pipes(device: Device, logits: int, counts: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each resource for a number of instructions per logit."""
    per_clock = device.multiprocessors * device.clock / logits
    return {
        name: sum(counts[pipe] / lanes for pipe, lanes in units.items()) / per_clock
        for name, units in device.pipes.items()
    }


def _scan(name: str, device: Device, found: Figures) -> Prediction:
    assert found.per_logit is not None
    assert found.bytes_per_logit is not None
    floor = ROWS * VOCAB * found.bytes_per_logit / device.bandwidth
    resources = {"memory": floor, **_pipes(device, ROWS * VOCAB, found.per_logit)}
    bound = max(resources, key=lambda key: resources[key])
    return Prediction(name, ROWS, floor, resources[bound], bound, resources)


def _tiles(name: str, device: Device, problem: Problem, found: Figures) -> Prediction:
    assert found.per_logit is not None
    floor = problem.least / device.bandwidth
    memory, pipes = problem.memory / device.bandwidth, _pipes(device, problem.rows * problem.vocab, found.per_logit)
    resources = {
        "memory": memory, "cache": (problem.memory + problem.cached) / device.cache_bandwidth, **pipes
    }  # fmt: skip
    if programs(found) < 2:
        # Nothing loads while a program computes.
        resources["memory, then instructions"] = memory + max(pipes.values())
    bound = max(resources, key=lambda key: resources[key])
    return Prediction(name, problem.rows, floor, resources[bound], bound, resources)


def _product(name: str, device: Device, build: Build, found: Figures) -> Prediction:
    assert found.per_logit is not None
    assert found.per_width is not None
    assert build.tile is not None
    rows = build.rows
    size = _ELEMENT[found.dtype] * build.products
    memory = (rows + VOCAB) * WIDTH * size / device.bandwidth
    operations = 2 * rows * VOCAB * WIDTH * build.products / (device.wide if found.dtype == "fp32" else device.tensor)
    # Per tile BM rows of hidden and a row of the head per column; between tiles they come from the cache.
    cache = rows * VOCAB * WIDTH * size * (1 / build.tile.BM + 1 / build.tile.columns) / device.cache_bandwidth
    width = {pipe: found.per_width[pipe] * WIDTH for pipe in PIPES}
    together = _pipes(device, rows * VOCAB, {pipe: found.per_logit[pipe] + width[pipe] for pipe in PIPES})
    resources = {"memory": memory, "cache": cache, "product": operations, **together}
    if programs(found) < 2:
        # Nothing runs beside a program's epilogue, so that adds to its product.
        after = max(_pipes(device, rows * VOCAB, found.per_logit).values())
        resources["product, then epilogue"] = max(operations, *_pipes(device, rows * VOCAB, width).values()) + after
    bound = max(resources, key=lambda key: resources[key])
    return Prediction(name, rows, max(memory, operations), resources[bound], bound, resources)
