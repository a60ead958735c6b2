"""Models in wrappers, and models whose parameters lie in parts on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["gather_root", "is_sharded", "sweeping", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """A model out of the wrappers of distributed training and of `torch.compile`; PEFT's wrapper stays."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_sharded(model: nn.Module) -> bool:
    """Whether processes must run a model's layers together, since each holds a part of them (FSDP2, ZeRO-3)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def gather_root(model: nn.Module) -> None:
    """Under FSDP2, bring embedding, head and what no layer owns together, until the next backward pass ends."""
    if not isinstance(model, FSDPModule):
        return
    # FSDP2 takes the module whose forward runs first for the root of all. The rollout runs the backbone, which lies
    # below the root, so the true root is told beforehand.
    model._get_fsdp_state()._lazy_init()
    for module in _read_apart(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


@contextmanager
def sweeping(model: nn.Module) -> Iterator[None]:
    """Backward passes that are not the last one: under FSDP2 they leave the gathered parameters where they are."""
    gathered = _read_apart(model) if isinstance(model, FSDPModule) else []
    for module in gathered:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module in gathered:
            module.set_reshard_after_backward(True, recurse=False)


def _read_apart(model: Any) -> list[FSDPModule]:
    """The sharded units whose parameters are read outside their own forward pass: the root's, embedding and head."""
    units = (model, model.get_input_embeddings(), model.get_output_embeddings())
    return [unit for unit in units if isinstance(unit, FSDPModule)]
