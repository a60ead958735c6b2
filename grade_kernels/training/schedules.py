"""How the temperature of the relaxation moves during training."""

from __future__ import annotations

import math

__all__ = ["TAU_SCHEDULES", "tau_at"]

TAU_SCHEDULES = ("constant", "linear", "cosine", "exponential")


def tau_at(schedule: str, start: float, final: float, progress: float) -> float:
    """The temperature after a fraction of training.

    Args:
        schedule: one of `TAU_SCHEDULES`; `constant` stays at `start`.
        start: the temperature at 0.
        final: the temperature at 1.
        progress: fraction of training that is done; clamped to [0, 1].

    Raises:
        ValueError: an unknown schedule.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (final - start) * progress
    if schedule == "cosine":
        return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "exponential":
        return start * (final / start) ** progress
    raise ValueError(f"tau_schedule must be one of {TAU_SCHEDULES}, got {schedule!r}")
