"""Peak memory of a stretch of work in this process."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

__all__ = ["Memory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """The highest resident set (on a GPU: the most that was allocated) above the one at the start.

    The high-water mark can be taken back (Linux), so that evaluation in between does not count.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what earlier runs freed is not at hand for nothing
        self._works = self._cuda or (_STATUS.exists() and os.access(_CLEAR, os.W_OK))
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
            _CLEAR.write_text("5")

    def _now(self, field: str) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        if not self._works:
            return 0
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
