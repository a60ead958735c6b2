"""Which noise each batch of a run draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from grade_kernels.noise import GumbelNoise

__all__ = ["NoisePlan", "mixed_seed"]

_MASK64 = 2**64 - 1


@dataclass
class NoisePlan:
    """The noise of a run: a seed for each step, and for each completion its place among all of the step's.

    So noise is the same however a step's batch is spread over processes and accumulation, and after a resume.

    Attributes:
        seed: of the run.
        batch: completions of a full batch on one process.
        world: how many processes there are.
    """

    seed: int
    batch: int
    world: int
    _step: int = field(default=-1, init=False, compare=False)  # the step of the last call
    _calls: int = field(default=0, init=False, compare=False)  # how many batches of that step came before

    def of(self, step: int, process: int, rows: int) -> GumbelNoise:
        """Noise for the next batch of a step.

        Args:
            step: the batches of one step come one after the other, and every call with the same step is the next one.
            process: which one asks.
            rows: completions of this batch.
        """
        self._calls = self._calls + 1 if self._step == step else 0
        self._step = step
        # Places are counted in full batches. The last batch of an epoch may be smaller, and a full one of the same step
        # may follow, whose places would otherwise begin too early.
        place = (self._calls * self.world + process) * self.batch
        # On the host, where the range of the identities is checked without waiting for a device.
        return GumbelNoise(mixed_seed(self.seed, step), torch.arange(place, place + rows))


def mixed_seed(seed: int, step: int) -> int:
    """A 64-bit seed for a step of a run, or for a completion of a step (splitmix64 of both)."""
    z = (seed * 0xD1342543DE82EF95 + (step + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
