"""The torch.library namespace of the package, and how an operation's kernel is registered in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from grade_kernels.ops.transforms import has_tangent

library = torch.library.Library("grade_kernels", "DEF")
Function = TypeVar("Function", bound=Callable[..., Any])

_WAY_ROUND = (
    "call the operation inside `with grade_kernels.use_backend('reference'):`, which is plain differentiable PyTorch, "
    "with the logits held in memory"
)


def public(function: Function) -> Function:
    """Mark a public operation: torch.jit.script, which would try to compile its Python, is told why it cannot."""
    name = function.__name__
    reason = (
        f"grade_kernels.{name} cannot be scripted; use torch.compile or torch.export, or call it outside the script"
    )
    setattr(function, "__script_unsupported", reason)
    return function


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one functional operation: its schema, its kernel on every device, its fake kernel.

    Kernels run outside autocast: inputs were cast, if at all, before they got here, and arithmetic inside an operation
    is its own.

    Returns:
        The operation, to call. Forward-mode derivatives raise NotImplementedError, which names the way round: the
        public functions go it by themselves (`ops.transforms`).
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
    op = getattr(torch.ops.grade_kernels, name).default

    def call(*args: Any) -> Any:
        # An operation without a rule for them would drop tangents, which then pass for zeros.
        if forward_ad._current_level >= 0 and any(has_tangent(x) for x in args):
            raise NotImplementedError(f"grade_kernels::{name} has no forward-mode derivative; {_WAY_ROUND}")
        return op(*args)

    return call


def once_differentiable(name: str) -> None:
    """Make a backward operation refuse to be differentiated itself, instead of passing for a constant.

    Several upstream gradients at once, which `torch.func.vmap` over `torch.autograd.grad` hands over, are served one after
    the other.
    """

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"grade_kernels::{name} has no second derivative; {_WAY_ROUND}")

    torch.library.register_autograd(f"grade_kernels::{name}", refuse, lib=library)
    op = getattr(torch.ops.grade_kernels, name).default

    def one_by_one(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            tree_flatten(op(*(_part(x, dim, i) for x, dim in zip(args, dims, strict=True))))
            for i in range(info.batch_size)
        ]
        leaves = [torch.stack(parts) for parts in zip(*(flat for flat, _ in results), strict=True)]
        return tree_unflatten(leaves, results[0][1]), tree_unflatten([0] * len(leaves), results[0][1])

    torch.library.register_vmap(f"grade_kernels::{name}", one_by_one, lib=library)


def _part(x: Any, dim: Any, i: int) -> Any:
    """Argument x of the i-th of several calls, which are stacked along dim where that is no None."""
    if isinstance(x, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
        return [_part(y, d, i) for y, d in zip(x, dims, strict=True)]
    return x if dim is None else x.select(dim, i)


def wanted_gradients(ctx: Any, inputs: list[torch.Tensor | None], needs: list[bool]) -> list[bool]:
    """Which of an operation's first inputs want a gradient from the backward pass that is running.

    `needs`, of `ctx.needs_input_grad`, says which of them require one at all. `torch.autograd.grad(..., inputs)` may want
    fewer, and the gradient of a head, of a table or of logits is as large as they are.
    """
    if torch.compiler.is_compiling():
        return needs
    nodes = iter(ctx.next_functions)  # one for each tensor among the inputs; those that need none are (None, 0)
    given = [next(nodes)[0] if x is not None else None for x in inputs]
    return [need and (node is None or _will_run(node)) for node, need in zip(given, needs, strict=True)]


def _will_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf among the inputs of torch.autograd.grad: torch does not tell, but it is wanted
        return True
