"""The ways to align that are compared. All see the same prompts, draw the same number of tokens, score each completion
once and take the same number of optimiser steps."""

from benchmarks.alignment.methods.base import Batch, Learner, Method, World
from benchmarks.alignment.methods.registry import METHODS, OURS, PAPER, VARIANTS

__all__ = ["METHODS", "OURS", "PAPER", "VARIANTS", "Batch", "Learner", "Method", "World"]
