"""Operations with a backward pass: how they are declared, and what connects their two halves."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from grade_kernels.ops.eager import undisturbed
from grade_kernels.ops.records import Layout
from grade_kernels.ops.registry import WAY_ROUND, calling, library, register
from grade_kernels.ops.transforms import differentiable_gradients, records_gradients

__all__ = ["Differentiable", "differentiable", "plain_apply"]

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
) -> Differentiable[C, R, K]:
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
    return Differentiable(
        name, arguments, results, kept, gradients, kernel, fake, backward, reference, frozenset(unsaved)
    )


class _Context(Protocol):
    """What torch hands to the forward and the backward of a node, and what is kept in it."""

    saved_tensors: tuple[torch.Tensor | None, ...]
    next_functions: tuple[tuple[Any, int], ...]  # one for each tensor that the node was given
    flags: list[bool]  # which tensors require gradients, of those that may
    values: list[Any]  # the arguments; None for a tensor, and for a list of tensors how many there are

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _Node(torch.autograd.Function):
    """What the graph holds of a call. Every operation has a subclass, which the node is named after."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        operation: Differentiable[Any, Any, Any],
        run: Callable[[], tuple[Any, Any]],
        leaves: Sequence[Any],
        flags: list[bool],
        *_: torch.Tensor,
    ) -> Any:
        """Leaves of the results, which `run` gives beside those that are kept. The tensors are those that flags mark."""
        ctx.operation, ctx.flags = operation, flags
        found, kept = run()
        operation.save(ctx, leaves, found, kept)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:  # type: ignore[override]
        return None, None, None, None, *ctx.operation.gradient(ctx, *upstream)


def plain_apply(node: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A node's `apply` without what `torch.autograd.Function` does for transforms, where there is none."""
    return super(torch.autograd.Function, node).apply  # type: ignore[misc,no-any-return]


class _Refusing(torch.autograd.Function):
    """A node that has no derivative. Without it, autograd would silently treat the result as a constant."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[..., Any], *tensors: Any) -> Any:  # type: ignore[override]
        ctx.name = name
        return tuple(run())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"grade_kernels::{ctx.name} has no second derivative; {WAY_ROUND}")


class Differentiable(Generic[C, R, K]):
    """The two halves of an operation, see `differentiable`.

    The backward operation takes the results' leaves, the arguments', those of what was kept, and a truth value for each
    tensor that may have a gradient. It returns the gradients that are wanted, one after the other.
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
        self._kernel, self._backward, self._reference = kernel, backward, reference
        given, found, saved = self._arguments, self._results, self._kept
        paths = [leaf.path for leaf in given.leaves]
        # Which arguments may have gradients, in the order of `gradients`.
        self._places = [paths.index(leaf.path) for leaf in self._gradients.leaves]
        self._unsaved = {i for i, path in enumerate(paths) if path in unsaved}
        self._constants = [i for i, leaf in enumerate(found.leaves) if not leaf.varies]
        upstream = ", ".join(
            f"Tensor? d{leaf.name}" if leaf.varies else f"{leaf.kind} result_{leaf.name}" for leaf in found.leaves
        )
        schema = f"({given.schema()}) -> ({found.kinds()}, {saved.kinds()})"
        backward_schema = f"({upstream}, {given.schema()}, {saved.schema('kept_')}, bool[] wanted) -> Tensor[]"
        # torch.compile keeps the backward graph on disk under a key of the forward graph. With another backward schema,
        # as after an upgrade, that graph would call what is no more. So the forward graph names an overload that follows
        # both schemas.
        overload = f"{name}.v{hashlib.sha256(f'{schema} {backward_schema}'.encode()).hexdigest()[:8]}"
        op, self._registered = register(overload, schema, self._flat(kernel), self._flat(fake))
        self._backward_op, self._registered_backward = register(
            f"{name}_backward", backward_schema, self._run_backward, self._fake_backward
        )
        self._name = name
        self._node: type[_Node] = type(name, (_Node,), {})
        self._apply_plainly = plain_apply(self._node)
        library.impl(overload, self._with_graph, "Autograd", with_keyset=True)
        library.impl(f"{name}_backward", self._without_graph, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"grade_kernels::{name}_backward", self._mapped_backward, lib=library)
        library.impl(f"{name}_backward", functools.partial(_batched_gradients, self._backward_op), "Batched")
        self._dispatched: Callable[[C], R] = calling(op, given, found, len(found.leaves) + len(saved.leaves))

    def __call__(self, given: C) -> R:
        """The operation of a record."""
        if not undisturbed():
            return self._dispatched(given)
        leaves = self._arguments.flatten(given)
        if not self._arguments.are_plain(leaves):
            return self._dispatched(given)
        inputs, flags = self._requiring(leaves)
        if not inputs:
            return self._kernel(given)[0]

        def run() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            results, kept = self._kernel(given)
            return self._results.flatten(results), self._kept.flatten(kept)

        found: R = self._results.build(self._apply_plainly(self, run, leaves, flags, *inputs))
        return found

    def _with_graph(self, keyset: torch._C.DispatchKeySet, *leaves: object) -> Any:
        """What the dispatcher calls where tensors may require gradients."""

        def run() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            with torch._C._AutoDispatchBelowAutograd():
                found = self._registered.redispatch(keyset & torch._C._after_autograd_keyset, *leaves)
            return found, found[len(self._results.leaves) :]

        inputs, flags = self._requiring(leaves)
        return self._node.apply(self, run, leaves, flags, *inputs) if inputs else run()[0]

    def _requiring(self, leaves: Sequence[object]) -> tuple[list[torch.Tensor], list[bool]]:
        """The tensors that require gradients, and which they are of those that may.

        Inference mode makes no graph, even where gradients are enabled inside it.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return [], []
        candidates = self._candidates(leaves)
        if not torch._C._any_requires_grad(*candidates):
            return [], []
        flags = [x is not None and x.requires_grad for x in candidates]
        return [x for x, flag in zip(candidates, flags, strict=True) if flag], flags

    def _without_graph(self, keyset: torch._C.DispatchKeySet, *leaves: object) -> Any:
        """The same of the backward operation, which has no derivative."""

        def run() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self._registered_backward.redispatch(keyset & torch._C._after_autograd_keyset, *leaves)

        several = [x if isinstance(x, (list, tuple)) else (x,) for x in leaves]
        tensors = [x for part in several for x in part if isinstance(x, torch.Tensor)]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            return list(_Refusing.apply(f"{self._name}_backward", run, *tensors))
        return run()

    def _flat(self, function: Callable[[C], tuple[R, K]]) -> Callable[..., tuple[Any, ...]]:
        """A function of records as one of leaves."""

        def flat(*leaves: object) -> tuple[Any, ...]:
            results, kept = function(self._arguments.build(leaves))
            return *self._results.flatten(results), *self._kept.flatten(kept)

        return flat

    def _candidates(self, given: Sequence[Any]) -> list[Any]:
        """The tensors that may have a gradient, in the order of `gradients`; None where there is none."""
        if not self._arguments.lists:
            return [given[i] for i in self._places]
        return [x for i in self._places for x in (given[i] if i in self._arguments.lists else (given[i],))]

    def _nested(self, flat: Sequence[Any], given: Sequence[Any]) -> Sequence[Any]:
        """One of `flat` for each of them, in lists where these tensors are."""
        if not self._arguments.lists:
            return flat
        rest = iter(flat)
        return [[next(rest) for _ in given[i]] if i in self._arguments.lists else next(rest) for i in self._places]

    def _run_backward(self, *leaves: Any) -> list[torch.Tensor]:
        first = len(self._results.leaves)
        second = first + len(self._arguments.leaves)
        return self._gradients_of(leaves[:first], leaves[first:second], leaves[second:-1], leaves[-1])

    def _gradients_of(
        self, arrived: Sequence[object], given: Sequence[object], kept: Sequence[object], flags: Sequence[bool]
    ) -> list[torch.Tensor]:
        """The gradients that are wanted."""
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

    def save(
        self, ctx: _Context, leaves: Sequence[Any], found: tuple[torch.Tensor, ...], kept: tuple[torch.Tensor, ...]
    ) -> None:
        """Keep in a node what backward needs of the arguments, of the results, and of what was kept beside them."""
        values, tensors = list(leaves), []
        for i in self._arguments.tensors:
            tensors.append(None if i in self._unsaved else leaves[i])
            values[i] = None
        for i in self._arguments.lists:
            tensors += leaves[i]
            values[i] = len(leaves[i])
        constants = [found[i] for i in self._constants]
        ctx.values = values
        ctx.save_for_backward(*tensors, *constants, *kept)
        ctx.set_materialize_grads(False)
        if len(found) > 1:
            ctx.mark_non_differentiable(*constants, *found[len(self._results.leaves) :])

    def gradient(self, ctx: _Context, *upstream: torch.Tensor | None) -> list[torch.Tensor | None]:
        """A gradient or None for each tensor that the node was given."""
        results, given, tensors = self._results.leaves, list(ctx.values), iter(ctx.saved_tensors)
        for i in self._arguments.tensors:
            given[i] = next(tensors)
        for i in self._arguments.lists:
            given[i] = [next(tensors) for _ in range(given[i])]
        arrived = [x if leaf.varies else next(tensors) for leaf, x in zip(results, upstream, strict=False)]
        running = _running(ctx)
        if all(x is None for leaf, x in zip(results, arrived, strict=True) if leaf.varies):
            return [None] * len(running)
        each = iter(running)
        flags = [flag and next(each) for flag in ctx.flags]
        found = iter(self._wanted_gradients(arrived, given, tuple(tensors), flags))
        return [next(found) if runs else None for runs in running]

    def gradients(self, given: C, kept: K, arrived: Any, flags: Sequence[bool]) -> Sequence[torch.Tensor | None]:
        """What the operation's own node would return, for a node that did not find it: the gradients that flags mark.

        `arrived` are results, with gradients in the place of what is differentiable.
        """
        return self._wanted_gradients(
            self._results.flatten(arrived), self._arguments.flatten(given), self._kept.flatten(kept), flags
        )

    def _wanted_gradients(
        self, arrived: Sequence[Any], given: Sequence[Any], kept: Sequence[Any], flags: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        """What a backward pass returns, given leaves: the gradients that flags mark, by the way that serves the pass."""
        if self._reference is not None and records_gradients():
            return self._again(self._reference, given, arrived, flags)
        if (
            not torch.is_grad_enabled()
            and undisturbed()
            and self._results.are_plain(arrived)
            and self._arguments.are_plain(given)
        ):
            return self._gradients_of(arrived, given, kept, flags)
        return self._backward_op(*arrived, *given, *kept, flags)

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
    op: Callable[..., Sequence[torch.Tensor]], count: int, dims: tuple[Any, ...], *args: object
) -> tuple[list[torch.Tensor], list[int]]:
    """An operation that returns a list, for several calls whose arguments are stacked: each call by itself."""
    calls = [op(*(_part(x, dim, i) for x, dim in zip(args, dims, strict=True))) for i in range(count)]
    stacked = [torch.stack(parts) for parts in zip(*calls, strict=True)]
    return stacked, [0] * len(stacked)


def _batched_gradients(op: Callable[..., Sequence[torch.Tensor]], *args: object) -> list[torch.Tensor]:
    """The same for `torch.autograd.grad(..., is_grads_batched=True)`, `gradcheck(check_batched_grad=True)`, ...

    They run the backward pass under a vmap older than that of torch.func. Its tensors carry the number of the level at
    which they are stacked, and are stacked at several where such calls nest: the innermost is taken apart here.
    """
    sizes: list[int] = []

    def unwrapped(x: object) -> tuple[Any, Any]:
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


def _wanted_only(gradients: tuple[Any, ...], flags: Sequence[bool]) -> list[torch.Tensor]:
    """Of the gradients, in lists or not, those that are wanted."""
    flat = [x for part in gradients for x in (part if isinstance(part, list) else (part,))]
    return [x for x, flag in zip(flat, flags, strict=True) if flag]


def _running(ctx: _Context) -> list[bool]:
    """Which of a node's tensors want a gradient from the backward pass that is running.

    All of them require one. `torch.autograd.grad(..., inputs)` may want fewer, and the gradient of a head, of a table or of
    logits is as large as they are.
    """
    nodes = ctx.next_functions
    # The backward pass runs because some gradient is wanted. Where a single tensor requires one, it is that.
    if len(nodes) == 1 or torch.compiler.is_compiling():
        return [True] * len(nodes)
    return [_will_run(node) for node, _ in nodes]


def _will_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf among the inputs of torch.autograd.grad: torch does not tell, but it is wanted
        return True
