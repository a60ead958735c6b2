"""The torch.library namespace of the package, and how an operation's kernel is registered in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("grade_kernels", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one functional operation: its schema, its kernel on every device, its fake kernel.

    Kernels run outside autocast: inputs were cast, if at all, before they got here, and arithmetic inside an operation
    is its own.

    Returns:
        The operation's overload, to call.
    """
    name = schema.split("(", 1)[0]

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return kernel(*args)
        return kernel(*args)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grade_kernels::{name}", fake, lib=library)
    return getattr(torch.ops.grade_kernels, name).default


def once_differentiable(name: str) -> None:
    """Make a backward operation refuse to be differentiated itself, instead of passing for a constant."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"grade_kernels::{name} has no second derivative")

    torch.library.register_autograd(f"grade_kernels::{name}", refuse, lib=library)
