"""Derivatives for which the kernels have no rule; `grade_kernels.reference`, plain differentiable PyTorch, serves them.

The kernels are operations with a backward of their own. A transform of `torch.func` (`grad`, `vjp`, `jacrev`, `vmap`,
...) cannot look into them, a forward-mode derivative has no rule there, and their backward cannot be differentiated
again. Calls under the first two run through the reference. Of the third, the backward of operations on given logits
does so: what it costs is of the logits' own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

FIRST_ORDER = "estimator 'reinmax' defines a first derivative only; use 'ste', 'soft' or 'st' for higher ones"

__all__ = [
    "FIRST_ORDER",
    "check_order",
    "differentiable_gradients",
    "has_tangent",
    "records_gradients",
    "reference_serves",
    "without_wrappers",
]


def reference_serves(backend: str, *arguments: object) -> bool:
    """Whether the reference computes a call: it is the backend, or torch.func or a forward-mode derivative sees the call.

    Args:
        backend: the chosen one.
        arguments: tensors of the call that may carry a derivative, or records of them.
    """
    if backend == "reference" or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and has_tangent(arguments)


def has_tangent(x: object) -> bool:
    """Whether a tensor, or any in a list, a tuple or a record, carries a forward-mode derivative."""
    if isinstance(x, (tuple, list)):
        return any(has_tangent(y) for y in x)
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def check_order(estimator: str) -> None:
    """`reinmax` is a rule for the first derivative, and no function's, so a transform that nests another is refused."""
    if estimator != "reinmax" or torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or []]
    differentiating = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    if sum(kind in differentiating for kind in kinds) > 1:
        raise NotImplementedError(FIRST_ORDER)


def without_wrappers(x: torch.Tensor) -> torch.Tensor:
    """The plain tensor `[N, ...]` behind the wrappers of torch.func, whose values may be read.

    What `vmap` maps over becomes more rows: N counts those of all mapped calls.
    """
    mapped = 0
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        inner = torch._C._functorch.get_unwrapped(x)
        if torch._C._functorch.is_batchedtensor(x):
            inner, mapped = inner.movedim(torch._C._functorch.maybe_get_bdim(x), 0), mapped + 1
        x = inner
    return x.detach().flatten(0, mapped)


def records_gradients() -> bool:
    """Asked in a backward pass: whether it is itself recorded, as under `create_graph=True`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    needs: Sequence[bool],
    upstream: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients of `function(*inputs)` given those of its outputs, which can be differentiated in their turn.

    Args:
        function: differentiable PyTorch.
        inputs: its arguments; each may depend on others, and gets its partial derivative all the same.
        needs: which of them want a gradient; the others get None.
        upstream: a gradient for each output, None for one that has none.
    """
    aliases = [x.view_as(x) for x in inputs]
    outputs = function(*aliases)
    used = [i for i, dy in enumerate(upstream) if dy is not None and outputs[i].requires_grad]
    wanted = [x for x, needed in zip(aliases, needs, strict=True) if needed]
    found: Sequence[torch.Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = torch.autograd.grad(
            [outputs[i] for i in used], wanted, [upstream[i] for i in used], create_graph=True, allow_unused=True
        )
    gradients = iter(found)
    return [next(gradients) if needed else None for needed in needs]
