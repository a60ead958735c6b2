"""Alignment of language models by backpropagation through their own samples: a trainer, and its functional core."""

from grade_kernels.training.callbacks import NonFiniteGradientError, TrainingInterrupted
from grade_kernels.training.config import GRADEConfig
from grade_kernels.training.loss import GradeLoss, grade_loss
from grade_kernels.training.rewards import (
    DifferentiableReward,
    NonFiniteRewardError,
    SequenceClassificationReward,
    right_padded,
)
from grade_kernels.training.trainer import GRADETrainer

__all__ = [
    "DifferentiableReward",
    "GRADEConfig",
    "GRADETrainer",
    "GradeLoss",
    "NonFiniteGradientError",
    "NonFiniteRewardError",
    "SequenceClassificationReward",
    "TrainingInterrupted",
    "grade_loss",
    "right_padded",
]
