"""What is aligned with what: a policy, its frozen start, a reward that shares its vocabulary, and three sets of prompts."""

from benchmarks.alignment.tasks.base import Task

__all__ = ["Task"]
