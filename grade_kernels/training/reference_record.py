"""What a checkpoint says of the KL's reference, so that a resumed run is held to what the first one was held to.

A resumed run may be given a policy that is trained already, perhaps from that very checkpoint. Taken as it is, it would
become its own reference. So a checkpoint names the kind of reference. Of a frozen copy it holds the values, since the files
of an adapter do not have them. Of another model it holds a digest, by which that model is known again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grade_kernels.training.reference import (
    FrozenCopy,
    OtherModel,
    Reference,
    WithoutAdapter,
    fingerprint,
    has_adapter,
)

__all__ = ["RECORD", "VALUES", "restore", "write"]

logger = logging.getLogger(__name__)

RECORD = "grade_reference.json"
VALUES = "grade_reference.safetensors"


def write(
    directory: Path, reference: Reference | None, digest: str | None, values: dict[str, torch.Tensor] | None
) -> None:
    """Write the record of a reference into a checkpoint's directory; nothing where there is none.

    Args:
        directory: of the checkpoint.
        reference: the reference.
        digest: `fingerprint` of another model.
        values: `FrozenCopy.state()` of a copy.
    """
    if reference is None:
        return
    record = {"kind": type(reference).__name__, "fingerprint": digest}
    (directory / RECORD).write_text(json.dumps(record), encoding="utf-8")
    if isinstance(reference, FrozenCopy) and values is not None:
        reference.save(directory / VALUES, values)


def restore(directory: Path, model: nn.Module, reference: Reference | None, given: bool) -> Reference | None:
    """The reference that a run goes on with from a checkpoint.

    Args:
        directory: of the checkpoint.
        model: the policy, with the checkpoint's weights in it.
        reference: the one that the trainer was made with.
        given: whether it was asked for, which then goes before what the checkpoint says.

    Raises:
        ValueError: the reference of the run can not be had again from the models that were given.
    """
    if reference is None:
        return None
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not given and (directory / VALUES).is_file():  # the record alone was removed
            return _copied(directory, model, reference)
        if not given:
            logger.warning("%s says nothing of the reference: it is the policy as it was given now", directory)
        return reference
    kind, digest = record.get("kind"), record.get("fingerprint")
    own = fingerprint(reference.model) if isinstance(reference, OtherModel) else None
    differs = kind != type(reference).__name__ or (None not in (own, digest) and own != digest)
    if given:
        if differs:
            logger.warning("%s was trained with another reference (%s) than the one given now", directory, kind)
        return reference
    if kind == "FrozenCopy":
        return _copied(directory, model, reference)
    if kind == "WithoutAdapter" and has_adapter(model):
        return WithoutAdapter()
    if differs:
        raise ValueError(
            f"{directory} was trained with another reference ({kind}) than the policy as it was given now: give model as at "
            "the beginning of that run, which the checkpoint's weights are loaded into, or the reference as ref_model"
        )
    return reference


def _copied(directory: Path, model: nn.Module, reference: Reference) -> FrozenCopy:
    """A frozen copy with the values of a checkpoint."""
    copied = reference if isinstance(reference, FrozenCopy) else FrozenCopy(model)
    copied.load(directory / VALUES)
    return copied
