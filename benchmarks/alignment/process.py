"""Peak memory of a stretch of work in this process."""

from __future__ import annotations

import os

import torch

from benchmarks import memory

__all__ = ["Memory"]


class Memory:
    """The highest resident set (on a GPU: the most that was allocated) above the one at the start.

    The high-water mark can be taken back (Linux), so that evaluation in between does not count.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        memory.trim()  # what earlier runs freed is not at hand for nothing
        self._works = self._cuda or (memory.STATUS.exists() and os.access(memory.CLEAR, os.W_OK))
        self._before, self._peak = self._now("VmRSS"), 0
        self.restart()

    @property
    def peak_mib(self) -> float | None:
        """MiB above the start, or None where it can not be measured."""
        return (self._peak - self._before) / 2**20 if self._works else None

    def note(self) -> None:
        """Everything since the last restart counts."""
        self._peak = max(self._peak, self._now("VmHWM"))

    def restart(self) -> None:
        """Forget what happened since the last note."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._works:
            memory.CLEAR.write_text("5")

    def _now(self, field: str) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        if not self._works:
            return 0
        return memory.from_status(field)
