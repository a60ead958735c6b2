"""The torch.library namespace of the package, and how an operation is declared in it.

A declaration names the records of the operation's arguments and results. Schema, fake kernel, what is saved for the
backward pass, and the list of gradients follow from them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd import forward_ad

from grade_kernels.ops.records import Layout, Leaf
from grade_kernels.ops.transforms import differentiable_gradients, has_tangent, records_gradients, reference_serves

__all__ = ["answered_by", "differentiable", "operation", "public"]

library = torch.library.Library("grade_kernels", "DEF")

Function = TypeVar("Function", bound=Callable[..., Any])
C = TypeVar("C")  # arguments
R = TypeVar("R")  # results
K = TypeVar("K")  # what is kept for backward
U = TypeVar("U")  # gradients that arrive from above
W = TypeVar("W")  # which gradients are wanted
G = TypeVar("G")  # gradients

_WAY_ROUND = (
    "call the operation inside `with grade_kernels.use_backend('reference'):`, which is plain differentiable PyTorch, "
    "with the logits held in memory"
)


class _Context(Protocol):
    """What torch hands to the forward and the backward of an operation, and what is kept in it."""

    needs_input_grad: tuple[Any, ...]  # a truth value for each argument, in lists where these are
    saved_tensors: tuple[torch.Tensor | None, ...]
    next_functions: tuple[tuple[Any, int], ...]
    values: list[Any]  # arguments that are no tensors; of lists of tensors, how many they are
    present: list[bool]  # which arguments are not None

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


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

    op = _register(name, f"({inputs.schema()}) -> ({outputs.kinds()})", run(kernel), run(fake))
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
    reference: Callable[[C, Any], Any] | None = None,
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
            of contiguous tensors, whatever it likes where none is wanted. They are not differentiable again. Several
            gradients that arrive at once, as from `torch.func.vmap` over `torch.autograd.grad`, are served one by one.
        reference: a function of the arguments and of the results, with None in the place of what is differentiable. It
            returns the results once more, computed by differentiable PyTorch. Under `create_graph=True` the gradient is
            taken through it, so that it can be differentiated again. None: a second derivative raises
            NotImplementedError.
        unsaved: arguments that backward has no use for; it gets None. Who changes them in place disturbs nobody.

    Returns:
        The operation, to call: its results. Forward-mode derivatives raise NotImplementedError, as of `operation`. In
        `torch.ops.grade_kernels` it is the only overload of its name, which is not `default`.
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
        like = _wanted_only(tuple(given[i] for i in places), flags)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]

    arriving = ", ".join(
        f"Tensor? d{leaf.name}" if leaf.varies else f"{leaf.kind} result_{leaf.name}" for leaf in outputs.leaves
    )
    schema = f"({inputs.schema()}) -> ({outputs.kinds()}, {saved.kinds()})"
    backward_schema = f"({arriving}, {inputs.schema()}, {saved.schema('kept_')}, bool[] wanted) -> Tensor[]"
    # torch.compile keeps the backward graph on disk under a key of the forward graph. With another backward schema, as
    # after an upgrade, that graph would call what is no more: so the overload that the forward graph names follows both.
    overload = "v" + hashlib.sha256(f"{schema} {backward_schema}".encode()).hexdigest()[:8]
    name, plain = f"{name}.{overload}", name
    op = _register(name, schema, run(kernel), run(fake))
    backward_op = _register(f"{plain}_backward", backward_schema, run_backward, fake_backward)

    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        given = [None if i in forgotten else x for i, x in enumerate(inputs)]
        tensors = [x for leaf, value in zip(layout, given, strict=True) for x in _tensors(leaf, value)]
        constants = [x for leaf, x in zip(outputs.leaves, output, strict=False) if not leaf.varies] + [*output[count:]]
        ctx.save_for_backward(*tensors, *constants)
        ctx.values = [len(_tensors(leaf, x)) if leaf.is_list else x
                      for leaf, x in zip(layout, given, strict=True) if not leaf.is_tensor]  # fmt: skip
        ctx.present = [x is not None for x in inputs]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)

    def again(
        function: Callable[[C, Any], Any], given: Sequence[Any], arrived: Sequence[Any], flags: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """The gradients that are wanted, through differentiable PyTorch."""
        constants = outputs.build([None if leaf.varies else x for leaf, x in zip(outputs.leaves, arrived, strict=True)])

        def forward(*tensors: torch.Tensor) -> list[torch.Tensor]:
            changed, parts = list(given), nested(tensors, given)
            for i, part in zip(places, parts, strict=True):
                changed[i] = part
            found = outputs.flatten(function(inputs.build(changed), constants))
            return [x for leaf, x in zip(outputs.leaves, found, strict=True) if leaf.varies]

        tensors = [x for i in places for x in (given[i] if layout[i].is_list else (given[i],))]
        upstream = [x for leaf, x in zip(outputs.leaves, arrived, strict=True) if leaf.varies]
        found = differentiable_gradients(forward, tensors, flags, upstream)
        return [x for x, flag in zip(found, flags, strict=True) if flag]

    def gradient(ctx: _Context, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
        tensors, values = iter(ctx.saved_tensors), iter(ctx.values)
        given = [_restored(leaf, tensors, values) for leaf in layout]
        # torch asks for a gradient of each argument, in lists where these are.
        answer: list[Any] = [[None] * len(x) if leaf.is_list else None for leaf, x in zip(layout, given, strict=True)]
        arrived = [x if leaf.varies else next(tensors) for leaf, x in zip(outputs.leaves, upstream, strict=False)]
        if all(x is None for leaf, x in zip(outputs.leaves, arrived, strict=True) if leaf.varies):
            return tuple(answer)
        runs = _running(ctx, layout, given)
        flags = [flag for i in places for flag in (runs[i] if layout[i].is_list else (runs[i],))]
        if reference is not None and records_gradients():
            found = iter(again(reference, given, arrived, flags))
        else:
            found = iter(backward_op(*arrived, *given, *tensors, flags))
        for i, needed in zip(places, nested(flags, given), strict=True):
            if layout[i].is_list:
                answer[i] = [next(found) if flag else None for flag in needed]
            elif needed:
                answer[i] = next(found)
        return tuple(answer)

    def refuse(*_: Any) -> Any:
        # Without this, autograd would silently treat the gradient as a constant.
        raise NotImplementedError(f"grade_kernels::{plain}_backward has no second derivative; {_WAY_ROUND}")

    def mapped(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[list[torch.Tensor], list[int]]:
        return _one_by_one(backward_op, info.batch_size, dims, *args)

    torch.library.register_autograd(f"grade_kernels::{name}", gradient, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"grade_kernels::{plain}_backward", refuse, lib=library)
    torch.library.register_vmap(f"grade_kernels::{plain}_backward", mapped, lib=library)
    library.impl(f"{plain}_backward", functools.partial(_batched_gradients, backward_op), "Batched")
    return _calling(op, inputs, outputs, count + len(saved.leaves))


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


def _calling(op: Callable[..., Any], inputs: Layout[C], outputs: Layout[R], returns: int) -> Callable[[C], R]:
    """What calls an operation of flat arguments with a record."""

    def call(given: C) -> R:
        found = op(*inputs.flatten(given))
        return outputs.build((found,) if returns == 1 else found)

    return call


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a functional operation of flat arguments, `name` or `name.overload`; returns what calls it."""
    plain = name.split(".", 1)[0]

    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return kernel(*args)
        return kernel(*args)

    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grade_kernels::{name}", fake, lib=library)
    op: Callable[..., Any] = torch._library.utils.lookup_op(f"grade_kernels::{name}")

    def call(*args: Any) -> Any:
        # An operation without a rule for them would drop tangents, which then pass for zeros.
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise NotImplementedError(f"grade_kernels::{plain} has no forward-mode derivative; {_WAY_ROUND}")
        return op(*args)

    return call


def _one_by_one(
    op: Callable[..., Sequence[torch.Tensor]], count: int, dims: tuple[Any, ...], *args: Any
) -> tuple[list[torch.Tensor], list[int]]:
    """An operation that returns a list, for several calls whose arguments are stacked: each call by itself."""
    calls = [op(*(_part(x, dim, i) for x, dim in zip(args, dims, strict=True))) for i in range(count)]
    stacked = [torch.stack(parts) for parts in zip(*calls, strict=True)]
    return stacked, [0] * len(stacked)


def _batched_gradients(op: Callable[..., Sequence[torch.Tensor]], *args: Any) -> list[torch.Tensor]:
    """The same for `torch.autograd.grad(..., is_grads_batched=True)`, `gradcheck(check_batched_grad=True)`, ...

    They run the backward pass under a vmap older than that of torch.func. Its tensors carry the number of the level at
    which they are stacked, and are stacked at several where such calls nest: the innermost is taken apart here.
    """
    sizes: list[int] = []

    def unwrapped(x: Any) -> tuple[Any, Any]:
        """An argument, and the dimension along which it is stacked at this level, or None."""
        if isinstance(x, (list, tuple)):
            return [unwrapped(y)[0] for y in x], [unwrapped(y)[1] for y in x]
        if isinstance(x, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(x):
            stacked = torch._remove_batch_dim(x, level, 0, 0)  # [0, ...] where it is not stacked at this level
            if len(stacked):
                sizes.append(len(stacked))
                return stacked, 0
        return x, None

    for level in range(63, 0, -1):  # all that there can be
        values, dims = zip(*map(unwrapped, args), strict=True)
        if sizes:
            found, _ = _one_by_one(op, sizes[0], dims, *values)
            return [torch._add_batch_dim(x, 0, level) for x in found]
    raise ValueError("is_grads_batched=True needs gradients, got a batch of size 0")


def _part(x: Any, dim: Any, i: int) -> Any:
    """Argument x of the i-th of several calls, which are stacked along dim where that is no None."""
    if isinstance(x, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
        return [_part(y, d, i) for y, d in zip(x, dims, strict=True)]
    return x if dim is None else x.select(dim, i)


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


def _running(ctx: _Context, leaves: list[Leaf], given: list[Any]) -> list[Any]:
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
