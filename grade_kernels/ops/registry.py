"""The torch.library namespace of the package, and how an operation is declared in it.

A declaration names the records of the operation's arguments and results. Schema, fake kernel, what is saved for the
backward pass, and the list of gradients follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from grade_kernels.ops.records import Layout, Leaf

__all__ = ["answered_by", "differentiable", "operation"]

library = torch.library.Library("grade_kernels", "DEF")

C = TypeVar("C")  # arguments
R = TypeVar("R")  # results
K = TypeVar("K")  # what is kept for backward
U = TypeVar("U")  # gradients that arrive from above
W = TypeVar("W")  # which gradients are wanted
G = TypeVar("G")  # gradients


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
        The operation, to call. Forward-mode derivatives raise NotImplementedError.
    """
    inputs, outputs = Layout(arguments), Layout(results)

    def run(function: Callable[[C], R]) -> Callable[..., Any]:
        return lambda *leaves: _returned(outputs.flatten(function(inputs.build(leaves))))

    op = _register(f"{name}({inputs.schema()}) -> ({outputs.kinds()})", run(kernel), run(fake))
    return _calling(op, inputs, outputs, len(outputs.leaves))


def differentiable(
    name: str,
    arguments: type[C],
    results: type[R],
    kept: type[K],
    gradients: type[Any],
    *,
    kernel: Callable[[C], tuple[R, K]],
    fake: Callable[[C], tuple[R, K]],
    backward: Callable[[C, K, U, W], G],
    fake_gradients: Callable[[C], G] | None = None,
    unsaved: Sequence[str] = (),
) -> Callable[[C], R]:
    """Register an operation with a backward pass, which is an operation of its own, `{name}_backward`.

    Args:
        name, arguments: as of `operation`.
        results: a generic record. What it is generic in is differentiable; the rest is saved for backward.
        kept: a record of tensors that are no results, and are saved for backward as well as the arguments.
        gradients: a generic record: the arguments that have gradients, under the names that they have in `arguments`.
        kernel: the computation, on every device: results, and what is kept.
        fake: the same without data.
        backward: a function of the arguments, of what was kept, of the results, with gradients (or None) in the place of
            what is differentiable, and of `gradients` of truth values that say which are wanted. It returns `gradients`
            of contiguous tensors, whatever it likes where none is wanted. They are not differentiable again.
        fake_gradients: gradients without data; by default contiguous tensors of the arguments' shapes and dtypes.
        unsaved: arguments that backward has no use for; it gets None. Who changes them in place disturbs nobody.

    Returns:
        The operation, to call: its results. Forward-mode derivatives raise NotImplementedError.
    """
    inputs, saved, wanted = Layout(arguments), Layout(kept), Layout(gradients)
    outputs: Layout[Any] = Layout(results)
    places = [next(i for i, leaf in enumerate(inputs.leaves) if leaf.path == x.path) for x in wanted.leaves]
    forgotten = {i for i, leaf in enumerate(inputs.leaves) if leaf.path in unsaved}
    layout, count = inputs.leaves, len(outputs.leaves)

    def run(function: Callable[[C], tuple[R, K]]) -> Callable[..., Any]:
        def flat(*leaves: Any) -> tuple[Any, ...]:
            found, constants = function(inputs.build(leaves))
            return *outputs.flatten(found), *saved.flatten(constants)

        return flat

    def nested(flags: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """One of flags for each tensor that may have a gradient, in lists where these tensors are."""
        rest = iter(flags)
        return [[next(rest) for _ in given[i]] if layout[i].is_list else next(rest) for i in places]

    # The backward operation takes the results' leaves, the arguments', those of what was kept, and a truth value for
    # each tensor that may have a gradient. It returns the gradients that are wanted, one after the other.
    ends = count, count + len(inputs.leaves), count + len(inputs.leaves) + len(saved.leaves)

    def run_backward(*leaves: Any) -> list[torch.Tensor]:
        arrived, given, constants, flags = (
            leaves[: ends[0]],
            leaves[ends[0] : ends[1]],
            leaves[ends[1] : -1],
            leaves[-1],
        )
        needed = wanted.build(nested(flags, given))
        found = backward(inputs.build(given), saved.build(constants), outputs.build(arrived), needed)
        return _wanted_only(wanted.flatten(found), flags)

    def fake_backward(*leaves: Any) -> list[torch.Tensor]:
        given, flags = leaves[ends[0] : ends[1]], leaves[-1]
        if fake_gradients is not None:
            return _wanted_only(wanted.flatten(fake_gradients(inputs.build(given))), flags)
        like = _wanted_only(tuple(given[i] for i in places), flags)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]

    arriving = ", ".join(
        f"Tensor? d{leaf.name}" if leaf.varies else f"{leaf.kind} result_{leaf.name}" for leaf in outputs.leaves
    )
    op = _register(f"{name}({inputs.schema()}) -> ({outputs.kinds()}, {saved.kinds()})", run(kernel), run(fake))
    backward_op = _register(
        f"{name}_backward({arriving}, {inputs.schema()}, {saved.schema('kept_')}, bool[] wanted) -> Tensor[]",
        run_backward,
        fake_backward,
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        given = [None if i in forgotten else x for i, x in enumerate(inputs)]
        tensors = [x for leaf, value in zip(layout, given, strict=True) for x in _tensors(leaf, value)]
        constants = [x for leaf, x in zip(outputs.leaves, output, strict=False) if not leaf.varies] + [*output[count:]]
        ctx.save_for_backward(*tensors, *constants)
        # Of what is no tensor, the value; of lists of tensors, how many they are.
        ctx.values = [len(_tensors(leaf, x)) if leaf.is_list else x
                      for leaf, x in zip(layout, given, strict=True) if not leaf.is_tensor]  # fmt: skip
        ctx.present = [x is not None for x in inputs]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
        tensors, values = iter(ctx.saved_tensors), iter(ctx.values)
        given = [_restored(leaf, tensors, values) for leaf in layout]
        # torch asks for a gradient of each argument, in lists where these are.
        answer: list[Any] = [[None] * len(x) if leaf.is_list else None for leaf, x in zip(layout, given, strict=True)]
        arrived = [x if leaf.varies else next(tensors) for leaf, x in zip(outputs.leaves, upstream, strict=False)]
        if all(x is None for leaf, x in zip(outputs.leaves, arrived, strict=True) if leaf.varies):
            return tuple(answer)
        runs = _running(ctx, layout, given)
        flags = [flag for i in places for flag in (runs[i] if layout[i].is_list else (runs[i],))]
        found = iter(backward_op(*arrived, *given, *tensors, flags))
        for i, needed in zip(places, nested(flags, given), strict=True):
            if layout[i].is_list:
                answer[i] = [next(found) if flag else None for flag in needed]
            elif needed:
                answer[i] = next(found)
        return tuple(answer)

    def refuse(*_: Any) -> Any:
        # Without this, autograd would take a gradient for a constant, and its own gradient for zero.
        raise NotImplementedError(f"grade_kernels::{name}_backward has no second derivative")

    torch.library.register_autograd(f"grade_kernels::{name}", gradient, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"grade_kernels::{name}_backward", refuse, lib=library)
    return _calling(op, inputs, outputs, count + len(saved.leaves))


def answered_by(reference: Callable[[C], R]) -> Callable[[Callable[[C], R]], Callable[[C], R]]:
    """Decorator of a function of a record with a field `backend`: where that is `reference`, another one answers.

    The backend of this name registers no operation. It calls `grade_kernels.reference`, through which autograd goes as
    through any other PyTorch.
    """

    def decorate(function: Callable[[C], R]) -> Callable[[C], R]:
        def answer(given: C) -> R:
            return reference(given) if given.backend == "reference" else function(given)  # type: ignore[attr-defined]

        return answer

    return decorate


def _calling(op: Callable[..., Any], inputs: Layout[C], outputs: Layout[R], returns: int) -> Callable[[C], R]:
    """What calls an operation of flat arguments with a record."""

    def call(given: C) -> R:
        found = op(*inputs.flatten(given))
        return outputs.build((found,) if returns == 1 else found)

    return call


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a functional operation of flat arguments; returns what calls it."""
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return kernel(*args)
        return kernel(*args)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grade_kernels::{name}", fake, lib=library)
    op: Callable[..., Any] = getattr(torch.ops.grade_kernels, name).default

    def call(*args: Any) -> Any:
        # An operation without a rule for them would drop tangents, which then pass for zeros.
        if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in args):
            raise NotImplementedError(f"grade_kernels::{name} has no forward-mode derivative")
        return op(*args)

    return call


def _has_tangent(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return any(_has_tangent(y) for y in x)
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _returned(leaves: tuple[Any, ...]) -> Any:
    """What a kernel of so many results returns."""
    return leaves[0] if len(leaves) == 1 else leaves


def _tensors(leaf: Leaf, value: Any) -> Sequence[torch.Tensor | None]:
    """The tensors of an argument, none of a number."""
    return value if leaf.is_list else (value,) if leaf.is_tensor else ()


def _restored(leaf: Leaf, tensors: Any, values: Any) -> Any:
    """An argument from what was saved."""
    if leaf.is_list:
        return [next(tensors) for _ in range(next(values))]
    return next(tensors) if leaf.is_tensor else next(values)


def _wanted_only(gradients: tuple[Any, ...], flags: Sequence[bool]) -> list[torch.Tensor]:
    """Of the gradients, in lists or not, those that are wanted."""
    flat = [x for part in gradients for x in (part if isinstance(part, list) else (part,))]
    return [x for x, flag in zip(flat, flags, strict=True) if flag]


def _running(ctx: Any, leaves: list[Leaf], given: list[Any]) -> list[Any]:
    """Which arguments want a gradient from the backward pass that is running, in lists where these are.

    `ctx.needs_input_grad` says which of them require one at all. `torch.autograd.grad(..., inputs)` may want fewer, and
    the gradient of a head, of a table or of logits is as large as they are.
    """
    needs = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return list(needs)
    nodes = iter(ctx.next_functions)  # one for each tensor among the arguments; those that need none are (None, 0)

    def runs(present: bool, need: bool) -> bool:
        node = next(nodes)[0] if present else None
        return need and (node is None or _will_run(node))

    return [
        [runs(True, n) for _, n in zip(value, need, strict=True)] if leaf.is_list
        else leaf.is_tensor and runs(present, need)
        for leaf, value, present, need in zip(leaves, given, ctx.present, needs, strict=True)
    ]  # fmt: skip


def _will_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf among the inputs of torch.autograd.grad: torch does not tell, but it is wanted
        return True
