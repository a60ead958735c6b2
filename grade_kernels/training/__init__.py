"""Alignment of language models by backpropagation through their own samples: a trainer, and its functional core."""

from grade_kernels.training.loss import GradeLoss, grade_loss
from grade_kernels.training.rewards import (
    DifferentiableReward,
    NonFiniteRewardError,
    SequenceClassificationReward,
    right_padded,
)

__all__ = [
    "DifferentiableReward",
    "GradeLoss",
    "NonFiniteRewardError",
    "SequenceClassificationReward",
    "grade_loss",
    "right_padded",
]
