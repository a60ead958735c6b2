"""Cycles per logit of each CPU kernel on one thread: `python -m benchmarks.kernels`. The figures behind NOTES.md.

Every kernel is compared with the `torch` backend on the first row before it is timed. A call is short and the best one
counts, so that a busy machine's scheduler does not show: a call on 16 rows may be longer than a time slice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import cpu_name, seconds
from grade_kernels import backends
from grade_kernels.backends import Backend, GradientRule, Noise, Rows, Sample

NOISE = Noise(torch.tensor(20260101), None, 0)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def kernels(logits: torch.Tensor, dy: torch.Tensor) -> dict[str, Callable[..., tuple[torch.Tensor, ...]]]:
    """Each takes a backend and how many rows to do."""
    tau = torch.ones(logits.shape[0])
    shapes = {"flat logits": torch.zeros_like(logits), "ascending logits": logits.sort(dim=1).values}
    drawn, buffer = backends.get("cpu").sample(logits, NOISE, True), torch.empty_like(dy)

    def sample(x: torch.Tensor, logsumexp: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda backend, n: backend.sample(x[:n], NOISE, logsumexp)

    def softmax(normalize: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda backend, n: backend.softmax(
            Rows.of(logits[:n], tau[:n], NOISE), drawn.score_max[:n], normalize=normalize, dtype=logits.dtype
        )

    def backward(estimator: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        def call(backend: Backend, n: int) -> tuple[torch.Tensor]:
            rows, found, out = Rows.of(logits[:n], tau[:n], NOISE), Sample(*(x[:n] for x in drawn)), buffer[:n]
            backend.softmax_backward(dy[:n].unsqueeze(2), rows, found, GradientRule(estimator), out.unsqueeze(2))
            return (out,)

        return call

    return {
        "sample": sample(logits, False),
        **{f"sample, {name}": sample(x, False) for name, x in shapes.items()},
        "sample + log-sum-exp": sample(logits, True),
        "one_hot": lambda backend, n: (
            backend.one_hot(Sample(*(x[:n] for x in drawn)), logits.shape[1], logits.dtype),
        ),
        "softmax weights": softmax(False),
        "softmax": softmax(True),
        "backward, ste": backward("ste"),
        "backward, st (no noise)": backward("st"),
        "backward, reinmax": backward("reinmax"),
    }


def check(name: str, kernel: Callable[..., tuple[torch.Tensor, ...]], tolerance: float) -> None:
    """Raise AssertionError where the C++ kernel and plain PyTorch differ on the first row."""
    actual = [x.double() for x in kernel(backends.get("cpu"), 1)]  # a copy: the backward kernels share one buffer
    for mine, truth in zip(actual, kernel(backends.get("torch"), 1), strict=True):
        error = (mine - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def nominal_ghz() -> float | None:
    """Rate of the time stamp counter, as Linux on x86 reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    rates = [float(line.split(":")[1]) for line in lines if line.startswith("bogomips")]
    return rates[0] / 2000 if rates else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    if reason := backends.status()["cpu"]:
        parser.exit(1, f"the cpu backend is not available: {reason}\n")
    torch.set_num_threads(1)
    cpu = backends.get("cpu")
    ghz = nominal_ghz()
    print(f"{cpu_name()}; [{options.rows}, {options.vocab}], best of {options.rounds} rounds")
    print(f"{'':<26}{'dtype':<10}{'ns/logit':>10}{f'cycles/logit at {ghz:.2f} GHz' if ghz else '':>28}")
    for dtype in TOLERANCE:
        generator = torch.Generator().manual_seed(1)
        logits, dy = torch.randn(2, options.rows, options.vocab, generator=generator).to(dtype).unbind()
        for name, kernel in kernels(logits, dy).items():
            check(name, kernel, TOLERANCE[dtype])
            times = [seconds(lambda: kernel(cpu, options.rows), "cpu") for _ in range(options.rounds)]  # noqa: B023
            ns = 1e9 * min(times) / logits.numel()
            print(f"{name:<26}{str(dtype)[6:]:<10}{ns:>10.3f}{f'{ns * ghz:.2f}' if ghz else '':>28}")


if __name__ == "__main__":
    main()
