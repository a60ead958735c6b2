"""What training needs of a causal language model, one question a file.

| file | question |
|---|---|
| `parts.py` | which parts has a model, and what are its logits? `LanguageModel` |
| `reading.py` | where are the parts of this model? `read_language_model` |
| `probe.py` | are the parts what they seem? Small forward passes tell |
| `forward.py` | how is a model run: modes, positions, caches, outputs |
| `capture.py` | what went through a model during one forward pass? `Capture` |
| `gradient_checkpointing.py` | is its gradient checkpointing one that can be differentiated here? |
| `sharding.py` | which parameters lie on other processes, and when are they gathered? |
"""

from grade_kernels.training.model.capture import Capture
from grade_kernels.training.model.forward import (
    cache_arguments,
    cache_of,
    evaluating,
    last_hidden_state,
    position_arguments,
    position_ids,
)
from grade_kernels.training.model.gradient_checkpointing import check_checkpointing, is_reentrant
from grade_kernels.training.model.parts import LanguageModel, active_layer
from grade_kernels.training.model.probe import check_training_mode
from grade_kernels.training.model.reading import read_language_model
from grade_kernels.training.model.sharding import gather_root, is_sharded, sweeping, unwrap

__all__ = [
    "Capture",
    "LanguageModel",
    "active_layer",
    "cache_arguments",
    "cache_of",
    "check_checkpointing",
    "check_training_mode",
    "evaluating",
    "gather_root",
    "is_reentrant",
    "is_sharded",
    "last_hidden_state",
    "position_arguments",
    "position_ids",
    "read_language_model",
    "sweeping",
    "unwrap",
]
