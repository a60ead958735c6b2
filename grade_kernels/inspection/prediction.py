"""From counted instructions and bytes to times. Nothing here was measured on a device: these are predictions.

A kernel's floor is the larger of the bytes that it has to move over the memory's bandwidth and the operations that it
has to do over their peak rate. Its predicted time adds what its code does: instructions over the rate of the pipe that
is busiest, and for a product its tiles' traffic from the cache. Where kernels read a product in chunks, the library is taken
to multiply at its peak, as the floor is, and to write the chunk meanwhile; then the kernels read it. Latency, launches and
imbalance are left out, so times are optimistic; what bounds a kernel, and by how much, is what they are good for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grade_kernels.inspection.configurations import ROWS, VOCAB, Build, Problem
from grade_kernels.inspection.devices import DEVICES, Device, programs
from grade_kernels.inspection.machine_code import PIPES, Figures

__all__ = ["ROWS", "WAYS_ROWS", "WIDTH", "Prediction", "predict", "ways"]

WIDTH = 4096  # H of the problem, beside ROWS and VOCAB
WAYS_ROWS = (128, 1024, 4096, 16384)  # N at which the two ways through a head are compared
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


def predict(build: Build, found: Figures, rows: int | None = None) -> list[Prediction]:
    """Predictions for the devices that run a kernel's code; none for a kernel without a main loop, or in float64.

    With rows, a head's are for so many.
    """
    if found.per_logit is None or not found.bytes_per_logit or found.dtype not in _ELEMENT:
        return []
    devices = {name: device for name, device in DEVICES.items() if device.target == found.target}
    if build.problem is not None:
        return [_tiles(name, device, build.problem, found) for name, device in devices.items()]
    if build.chunks:
        return [_chunked(name, device, build, found, rows or build.rows) for name, device in devices.items()]
    if build.tile is None:
        return [_scan(name, device, found) for name, device in devices.items()]
    if found.per_width is None:
        return []
    return [_product(name, device, build, found, rows or build.rows) for name, device in devices.items()]


def ways(results: Sequence[tuple[Build, Figures]], target: str) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """For each pass through a head in 16 bits and each device, by `WAYS_ROWS`: time over the floor by tiles, and by chunks.

    Passes that were not inspected both ways are left out.
    """
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for build, chunked in results:
        if not build.chunks or chunked.target != target or "flags" in build.name:
            continue
        name = build.name.removeprefix("chunk ")
        tiles = [
            (b, f) for b, f in results if (b.name, b.dtype, f.target) == (f"head {name}", "bf16", target) and b.tile
        ]
        if not tiles:
            continue
        for rows in WAYS_ROWS:
            # Tiles of few rows, the others having more, are launched where one tile takes all rows.
            few = [(b, f) for b, f in tiles if rows <= b.rows < ROWS]
            many = [(b, f) for b, f in tiles if b.rows == ROWS]
            both = zip(predict(*(few or many)[0], rows), predict(build, chunked, rows), strict=True)
            for by_tiles, by_chunks in both:
                pairs = found.setdefault(name, {}).setdefault(by_tiles.device, [])
                pairs.append((by_tiles.ratio, by_chunks.ratio))
    return found


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


def _chunked(name: str, device: Device, build: Build, found: Figures, rows: int) -> Prediction:
    """For hidden states and a head in 16 bits; the library's product, in float32, is written and read."""
    assert found.per_logit is not None
    logits = rows * VOCAB
    buffer = 4 * logits * build.chunks
    factors = 2 * (rows + VOCAB) * WIDTH * build.chunks
    operations = 2 * logits * WIDTH * build.chunks / device.tensor
    product = max(operations, (factors + buffer) / device.bandwidth)
    pipes = _pipes(device, logits, found.per_logit)
    epilogue = max(buffer / device.bandwidth, *pipes.values())
    resources = {
        "memory": (factors + 2 * buffer) / device.bandwidth, "product": operations, **pipes,
        "product, then epilogue": product + epilogue,
    }  # fmt: skip
    bound = max(resources, key=lambda key: resources[key])
    floor = max(factors / device.bandwidth, operations)
    return Prediction(name, rows, floor, resources[bound], bound, resources)


def _product(name: str, device: Device, build: Build, found: Figures, rows: int) -> Prediction:
    assert found.per_logit is not None
    assert found.per_width is not None
    assert build.tile is not None
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
