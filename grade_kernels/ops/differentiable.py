"""Operations with a backward pass: how they are declared, and what connects their two halves."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from grade_kernels.ops.records import Layout, Leaf
from grade_kernels.ops.registry import WAY_ROUND, calling, library, register
from grade_kernels.ops.transforms import differentiable_gradients, records_gradients

__all__ = ["differentiable"]

C = TypeVar("C")  # arguments
R = TypeVar("R")  # results
K = TypeVar("K")  # what is kept for backward
U = TypeVar("U")  # gradients that arrive from above
W = TypeVar("W")  # which gradients are wanted
G = TypeVar("G")  # gradients


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
    return _Differentiable(
        name, arguments, results, kept, gradients, kernel, fake, backward, reference, frozenset(unsaved)
    ).call


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


class _Differentiable(Generic[C, R, K]):
    """The two halves of an operation, see `differentiable`.

    The backward operation takes the results' leaves, the arguments', those of what was kept, and a truth value for each
    tensor that may have a gradient. It returns the gradients that are wanted, one after the other.

    Attributes:
        call: calls the operation with a record.
    """

    def __init__(
        self,
        name: str,
        arguments: type[C],
        results: type[R],
        kept: type[K],
        gradients: type[Any],
        kernel: Callable[[C], tuple[R, K]],
        fake: Callable[[C], tuple[R, K]],
        backward: Callable[[C, K, Any, Any], Any],
        reference: Callable[[C, Any], Any] | None,
        unsaved: frozenset[str],
    ) -> None:
        self._arguments, self._kept = Layout(arguments), Layout(kept)
        self._results: Layout[Any] = Layout(results)  # of tensors, or of gradients
        self._gradients: Layout[Any] = Layout(gradients)  # of tensors, or of truth values
        self._backward, self._reference, self._unsaved = backward, reference, unsaved
        given, found, saved = self._arguments, self._results, self._kept
        paths = [leaf.path for leaf in given.leaves]
        # Which arguments may have gradients, in the order of `gradients`.
        self._places = [paths.index(leaf.path) for leaf in self._gradients.leaves]
        upstream = ", ".join(
            f"Tensor? d{leaf.name}" if leaf.varies else f"{leaf.kind} result_{leaf.name}" for leaf in found.leaves
        )
        schema = f"({given.schema()}) -> ({found.kinds()}, {saved.kinds()})"
        backward_schema = f"({upstream}, {given.schema()}, {saved.schema('kept_')}, bool[] wanted) -> Tensor[]"
        # torch.compile keeps the backward graph on disk under a key of the forward graph. With another backward schema,
        # as after an upgrade, that graph would call what is no more. So the forward graph names an overload that follows
        # both schemas.
        overload = f"{name}.v{hashlib.sha256(f'{schema} {backward_schema}'.encode()).hexdigest()[:8]}"
        op = register(overload, schema, self._flat(kernel), self._flat(fake))
        self._backward_op = register(f"{name}_backward", backward_schema, self._run_backward, self._fake_backward)

        def refuse(*_: Any) -> Any:
            # Without this, autograd would silently treat the gradient as a constant.
            raise NotImplementedError(f"grade_kernels::{name}_backward has no second derivative; {WAY_ROUND}")

        torch.library.register_autograd(
            f"grade_kernels::{overload}", self._gradient, setup_context=self._save, lib=library
        )
        torch.library.register_autograd(f"grade_kernels::{name}_backward", refuse, lib=library)
        torch.library.register_vmap(f"grade_kernels::{name}_backward", self._mapped_backward, lib=library)
        library.impl(f"{name}_backward", functools.partial(_batched_gradients, self._backward_op), "Batched")
        self.call: Callable[[C], R] = calling(op, given, found, len(found.leaves) + len(saved.leaves))

    def _flat(self, function: Callable[[C], tuple[R, K]]) -> Callable[..., tuple[Any, ...]]:
        """A function of records as one of leaves."""

        def flat(*leaves: Any) -> tuple[Any, ...]:
            results, kept = function(self._arguments.build(leaves))
            return *self._results.flatten(results), *self._kept.flatten(kept)

        return flat

    def _nested(self, flat: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """One of `flat` for each tensor that may have a gradient, in lists where these tensors are."""
        rest = iter(flat)
        is_list = [self._arguments.leaves[i].is_list for i in self._places]
        return [
            [next(rest) for _ in given[i]] if several else next(rest)
            for i, several in zip(self._places, is_list, strict=True)
        ]

    def _candidates(self, given: Sequence[Any]) -> list[Any]:
        """What stands in `given`, in lists or not, for the tensors that may have a gradient."""
        return [x for i in self._places for x in (given[i] if self._arguments.leaves[i].is_list else (given[i],))]

    def _run_backward(self, *leaves: Any) -> list[torch.Tensor]:
        first = len(self._results.leaves)
        second = first + len(self._arguments.leaves)
        arrived, given, kept, flags = leaves[:first], leaves[first:second], leaves[second:-1], leaves[-1]
        found = self._backward(
            self._arguments.build(given),
            self._kept.build(kept),
            self._results.build(arrived),
            self._gradients.build(self._nested(flags, given)),
        )
        return _wanted_only(self._gradients.flatten(found), flags)

    def _mapped_backward(self, info: Any, dims: tuple[Any, ...], *leaves: Any) -> tuple[list[torch.Tensor], list[int]]:
        return _one_by_one(self._backward_op, info.batch_size, dims, *leaves)

    def _fake_backward(self, *leaves: Any) -> list[torch.Tensor]:
        first = len(self._results.leaves)
        given, flags = leaves[first : first + len(self._arguments.leaves)], leaves[-1]
        like = _wanted_only(tuple(given[i] for i in self._places), flags)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]

    def _save(self, ctx: _Context, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        layout, results = self._arguments.leaves, self._results.leaves
        given = [None if leaf.path in self._unsaved else x for leaf, x in zip(layout, inputs, strict=True)]
        tensors = [x for leaf, value in zip(layout, given, strict=True) for x in _tensors(leaf, value)]
        constants = [x for leaf, x in zip(results, output, strict=False) if not leaf.varies]
        constants += output[len(results) :]
        ctx.save_for_backward(*tensors, *constants)
        ctx.values = [len(_tensors(leaf, x)) if leaf.is_list else x
                      for leaf, x in zip(layout, given, strict=True) if not leaf.is_tensor]  # fmt: skip
        ctx.present = [x is not None for x in inputs]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)

    def _gradient(self, ctx: _Context, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
        """A gradient or None for each argument, in lists where these are."""
        layout, results = self._arguments.leaves, self._results.leaves
        tensors, values = iter(ctx.saved_tensors), iter(ctx.values)
        given = [_restored(leaf, tensors, values) for leaf in layout]
        answer: list[Any] = [[None] * len(x) if leaf.is_list else None for leaf, x in zip(layout, given, strict=True)]
        arrived = [x if leaf.varies else next(tensors) for leaf, x in zip(results, upstream, strict=False)]
        if all(x is None for leaf, x in zip(results, arrived, strict=True) if leaf.varies):
            return tuple(answer)
        flags = self._candidates(_running(ctx, layout, given))
        if self._reference is not None and records_gradients():
            found = iter(self._again(self._reference, given, arrived, flags))
        else:
            found = iter(self._backward_op(*arrived, *given, *tensors, flags))
        for i, needed in zip(self._places, self._nested(flags, given), strict=True):
            if layout[i].is_list:
                answer[i] = [next(found) if flag else None for flag in needed]
            elif needed:
                answer[i] = next(found)
        return tuple(answer)

    def _again(
        self, reference: Callable[[C, Any], Any], given: Sequence[Any], arrived: Sequence[Any], flags: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """The gradients that are wanted, through differentiable PyTorch."""
        results = self._results.leaves
        constants = self._results.build([None if x.varies else y for x, y in zip(results, arrived, strict=True)])

        def forward(*tensors: torch.Tensor) -> list[torch.Tensor]:
            changed = list(given)
            for i, part in zip(self._places, self._nested(tensors, given), strict=True):
                changed[i] = part
            found = self._results.flatten(reference(self._arguments.build(changed), constants))
            return [x for leaf, x in zip(results, found, strict=True) if leaf.varies]

        upstream = [x for leaf, x in zip(results, arrived, strict=True) if leaf.varies]
        found = differentiable_gradients(forward, self._candidates(given), flags, upstream)
        return [x for x, flag in zip(found, flags, strict=True) if flag]


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
    requiring = sum(sum(need) if isinstance(need, (list, tuple)) else need for need in needs)
    # The backward pass runs because some gradient is wanted. Where a single tensor requires one, it is that.
    if requiring == 1 or torch.compiler.is_compiling():
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
