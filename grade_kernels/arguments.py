"""Checks of arguments that noise, reference and operations share. They import nothing of the package."""

from __future__ import annotations

import operator

import torch

__all__ = ["canonical_int", "check_local"]


def canonical_int(name: str, value: object, expected: str = "an int") -> int:
    """An int of Python for whatever serves as an index: NumPy's whole numbers, a 0-d tensor; a truth value is none.

    The symbol that torch.compile passes for an int that changes stays a symbol.
    """
    what = type(value).__name__
    serves = not isinstance(value, bool)
    if isinstance(value, torch.Tensor):
        what = f"a {what} of shape {tuple(value.shape)} and dtype {value.dtype}"
        serves = value.dim() == 0 and value.dtype != torch.bool
    if serves and isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        if serves:
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name} must be {expected}, got {what}")


def check_local(name: str, value: object) -> None:
    """No tensor, or one that is not a part of a distributed tensor, also behind the wrappers of torch.func.

    A DTensor is recognised by its attributes: importing its class would import torch.distributed.
    """
    if not isinstance(value, torch.Tensor):
        return
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
    placements = getattr(value, "placements", None)
    if placements is not None and hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} must be an ordinary tensor, got a DTensor with placements {tuple(placements)}; "
            f"pass {name}.full_tensor(), or {name}.to_local() where this rank's part is what is meant"
        )
