"""The torch.library namespace of the package, and how an operation is declared in it.

A declaration names the records of the operation's arguments and results. Its schema follows from them; with a backward
pass (`ops.differentiable`), so does what is saved, and the list of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from grade_kernels.ops.eager import undisturbed
from grade_kernels.ops.records import Layout
from grade_kernels.ops.transforms import has_tangent, reference_serves

__all__ = ["WAY_ROUND", "answered_by", "calling", "library", "operation", "public", "register"]

library = torch.library.Library("grade_kernels", "DEF")

Function = TypeVar("Function", bound=Callable[..., Any])
C = TypeVar("C")  # arguments
R = TypeVar("R")  # results

WAY_ROUND = (
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


def operation(
    name: str,
    arguments: type[C],
    results: type[R],
    *,
    kernel: Callable[[C], R],
    fake: Callable[[C], R],
) -> Callable[[C], R]:
    """Register a functional operation without gradients.

    Kernels run outside autocast: inputs were cast, if at all, before they got here, and arithmetic inside an operation
    is its own.

    Args:
        name: in the namespace `torch.ops.grade_kernels`.
        arguments: a record, see `Layout`.
        results: a record of tensors.
        kernel: the computation, on every device.
        fake: results without data.

    Returns:
        The operation, to call. Forward-mode derivatives raise NotImplementedError, which names the way round: public
        functions go it by themselves (`answered_by`).
    """
    inputs, outputs = Layout(arguments), Layout(results)

    def run(function: Callable[[C], R]) -> Callable[..., Any]:
        return lambda *leaves: _returned(outputs.flatten(function(inputs.build(leaves))))

    op, _ = register(name, f"({inputs.schema()}) -> ({outputs.kinds()})", run(kernel), run(fake))
    dispatched = calling(op, inputs, outputs, len(outputs.leaves))

    def call(given: C) -> R:
        if undisturbed():
            leaves = inputs.flatten(given)
            if inputs.are_plain(leaves):
                with torch.no_grad():
                    return kernel(given)
        return dispatched(given)

    return call


def answered_by(reference: Callable[[C], R]) -> Callable[[Callable[[C], R]], Callable[[C], R]]:
    """Decorator of a function of a record with a field `backend`: another one answers where the reference serves the call.

    That is where the backend is `reference`, and under derivatives for which operations have no rule (`ops.transforms`).
    Nothing is registered for it: it calls `grade_kernels.reference`, through which autograd and torch.func go as through
    any other PyTorch.
    """

    def decorate(function: Callable[[C], R]) -> Callable[[C], R]:
        def answer(given: C) -> R:
            backend: str = given.backend  # type: ignore[attr-defined]
            return reference(given) if reference_serves(backend, given) else function(given)

        return answer

    return decorate


def calling(op: Callable[..., Any], inputs: Layout[C], outputs: Layout[R], returns: int) -> Callable[[C], R]:
    """What calls an operation of flat arguments with a record."""

    def call(given: C) -> R:
        found = op(*inputs.flatten(given))
        return outputs.build((found,) if returns == 1 else found)

    return call


def register(
    name: str, schema: str, kernel: Callable[..., object], fake: Callable[..., object]
) -> tuple[Callable[..., Any], torch._ops.OpOverload]:
    """Register a functional operation of flat arguments, `name` or `name.overload`; returns what calls it, and itself."""
    plain = name.split(".", 1)[0]

    def run(*args: object) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return kernel(*args)
        return kernel(*args)

    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grade_kernels::{name}", fake, lib=library)
    op = torch._library.utils.lookup_op(f"grade_kernels::{name}")

    def call(*args: object) -> Any:
        # An operation without a rule for them would drop tangents, which then pass for zeros.
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise NotImplementedError(f"grade_kernels::{plain} has no forward-mode derivative; {WAY_ROUND}")
        return op(*args)

    return call, op


def _returned(leaves: tuple[Any, ...]) -> Any:
    """What a kernel of so many results returns."""
    return leaves[0] if len(leaves) == 1 else leaves
