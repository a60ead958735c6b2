"""Alignment of language models by backpropagation through their own samples: a trainer, and its functional core."""

try:
    from grade_kernels.training.aligner import Aligner
    from grade_kernels.training.callbacks import NonFiniteGradientError, TrainingInterrupted
    from grade_kernels.training.completions import Completions
    from grade_kernels.training.config import GRADEConfig
    from grade_kernels.training.importance import ImportanceSampling
    from grade_kernels.training.loss import GradeLoss, grade_loss
    from grade_kernels.training.records import Ending, Prompts, Relaxation
    from grade_kernels.training.reference import FrozenCopy, NamedAdapter, OtherModel, Reference, WithoutAdapter
    from grade_kernels.training.rewards import (
        DifferentiableReward,
        NonFiniteRewardError,
        SequenceClassificationReward,
        right_padded,
    )
    from grade_kernels.training.trainer import GRADETrainer
except ModuleNotFoundError as error:
    package = (error.name or "grade_kernels").partition(".")[0]
    if package == "grade_kernels":
        raise
    message = f"grade_kernels.training needs {package}: pip install 'grade-kernels[train]'"
    raise ModuleNotFoundError(message, name=package) from error

__all__ = [
    "Aligner",
    "Completions",
    "DifferentiableReward",
    "Ending",
    "FrozenCopy",
    "GRADEConfig",
    "GRADETrainer",
    "GradeLoss",
    "ImportanceSampling",
    "NamedAdapter",
    "NonFiniteGradientError",
    "NonFiniteRewardError",
    "OtherModel",
    "Prompts",
    "Reference",
    "Relaxation",
    "SequenceClassificationReward",
    "TrainingInterrupted",
    "WithoutAdapter",
    "grade_loss",
    "right_padded",
]
