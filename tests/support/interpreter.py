"""Triton's interpreter without most of what it repeats, and with products that are the same on every machine.

Each function here replaces a part of it. A Triton in which that part is written in another way is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

INTERPRETED = pytest.mark.costs(8.0)  # a case in the interpreter, compiled code being 1: a rough ratio is enough


class _Nothing:
    """What there is to restore after a function that found everything patched."""

    def restore(self) -> None:
        pass


def quicken() -> None:
    """Have the interpreter patch triton.language once a kernel, look NumPy's dtypes up once, and check nothing in vain.

    It patches the language again for every device function that a kernel calls, though all of it is patched already:
    of that it only looks through the modules' members. A Triton whose interpreter is written in another way is left
    alone.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype")):
        return
    patch_all: Callable[[Any], Any] = interpreter._patch_lang
    numpy_dtype: Callable[[Any], Any] = interpreter._get_np_dtype
    languages = (interpreter.tl, interpreter.tl.core)
    visible: dict[Any, set[int]] = {}
    patched: set[int] = set()
    dtypes: dict[str, Any] = {}

    def patch(function: Any) -> Any:
        if function not in visible:
            values = {id(value) for value in function.__globals__.values()}
            visible[function] = {i for i, language in enumerate(languages) if id(language) in values}
        missing, kernel = visible[function] - patched, not patched
        if not missing:
            return _Nothing()
        scope = patch_all(function)
        patched.update(missing)
        if kernel:  # the interpreter restores what a kernel's own scope has changed, and no other
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    def cached_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(of)
        return dtypes[name]

    options = interpreter.interpreter_builder.options
    if not options.debug:  # sums that overflow are looked for all the same, and then nothing comes of it
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter._patch_lang = patch
    interpreter._get_np_dtype = cached_dtype


def reduce_by_blocks() -> None:
    """Have a reduction combine halves of a block, as a GPU does, and not one element after the other.

    Neighbours are combined, so the order of the elements is kept for a function that does not commute.
    """
    from triton.runtime import interpreter

    reductions = interpreter.ReduceOps
    if not all(hasattr(reductions, name) for name in ("generic_reduce", "to_tensor")):
        return

    def generic_reduce(self: Any, blocks: tuple[Any, ...]) -> list[Any]:
        arrays = [block.handle.data for block in blocks]
        rank = arrays[0].ndim
        axis = 0 if self.axis is None else self.axis
        if self.axis is None:
            arrays = [array.reshape(-1) for array in arrays]
        while arrays[0].shape[axis] > 1:  # a power of two, as every extent of a block
            halves = [
                self.to_tensor(np.take(array, range(first, array.shape[axis], 2), axis), block.dtype)
                for first in (0, 1)
                for array, block in zip(arrays, blocks, strict=True)
            ]
            combined = self.combine_fn.fn(*halves)
            arrays = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
        if self.axis is None:
            arrays = [array.reshape((1,) * rank) if self.keep_dims else array.item() for array in arrays]
        elif not self.keep_dims:
            arrays = [array.squeeze(axis) for array in arrays]
        return [self.to_tensor(array, block.dtype) for array, block in zip(arrays, blocks, strict=True)]

    reductions.generic_reduce = generic_reduce


def take_numbers() -> None:
    """Have an interpreter of before NumPy 2.4 (Triton 3.6's) take an integer out of an array of one element."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang_tensor"):
        return
    patch_all: Callable[[Any, Any], None] = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_all(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def ignore_nan() -> None:
    """Have `tl.maximum` of NaN and a number be the number, as on GPUs; up to Triton 3.7 the interpreter says NaN."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if all(hasattr(builder, name) for name in ("create_maxnumf", "create_minnumf", "binary_op")):
        builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
        builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


def fuse() -> None:
    """Have a multiply-add of float32 round once, as on GPUs; up to Triton 3.8 the interpreter rounds the product, too."""
    from triton.language import core
    from triton.runtime import interpreter

    one = np.array([1.0], np.float32)
    x, z = (interpreter.TensorHandle(value, core.float32) for value in (one + 2**-13, -one - 2**-12))
    if interpreter.interpreter_builder.create_fma(x, x, z).data[0] == 2**-26:
        return
    multiply_add: Callable[[Any, Any, Any, Any], Any] = interpreter.InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return multiply_add(self, x, y, z)
        exact = np.multiply(x.data, y.data, dtype=np.float64)
        return interpreter.TensorHandle((exact + z.data).astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def skip_promotion() -> None:
    """Have operands of one type and one shape pass without the search for a type and a shape that hold both."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    meet: Callable[..., Any] = semantic.TritonSemantic.binary_op_type_checking_impl
    spread: Callable[..., Any] = semantic.TritonSemantic.broadcast_impl_value
    unwrap: Callable[[Any], Any] = core._unwrap_if_constexpr
    compare: Callable[[Any, Any], bool] = core.dtype.__eq__
    kinds = (core.float32, core.float64, core.int32, core.int64, core.uint32, core.uint64)
    settled = {kind.name for kind in kinds}
    plain = {bool, int, float, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}

    def binary(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if type(lhs) is core.tensor and lhs.dtype.name in settled:
            if type(rhs) is core.tensor and rhs.dtype is lhs.dtype:
                return broadcast(self, lhs, rhs)
            if type(rhs) is int or (type(rhs) is float and lhs.dtype.is_floating()):  # follows the tensor's type
                return broadcast(self, lhs, self.scalar_constant(rhs, lhs.dtype))
        return meet(self, lhs, rhs, *args, **kwargs)

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        shape = getattr(lhs.type, "like", None)  # of share_shapes: one object for each shape
        other = getattr(rhs.type, "like", None)
        if shape is other:
            return lhs, rhs
        if other is None:
            return lhs, splat(self, rhs, lhs.type)
        if shape is None:
            return splat(self, lhs, rhs.type), rhs
        return spread(self, lhs, rhs)

    def splat(self: Any, scalar: Any, like: Any) -> Any:
        data = scalar.handle.data
        block = interpreter.TensorHandle(np.full(like.like.extents, data, data.dtype), scalar.dtype)
        return core.tensor(block, like.with_element_ty(scalar.dtype))

    def unwrap_value(x: Any) -> Any:
        return x if type(x) in plain else unwrap(x)

    semantic.TritonSemantic.binary_op_type_checking_impl = binary
    semantic.TritonSemantic.broadcast_impl_value = broadcast
    core._unwrap_if_constexpr = unwrap_value
    core.dtype.__eq__ = lambda self, other: self is other or compare(self, other)


def share_shapes() -> None:
    """Have blocks of one shape share what Triton's language derives from it, anew for each result of each operation.

    No kernel changes a type or a shape. A Triton whose blocks hold something else is left alone.
    """
    from triton.language import core

    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    scalar = core.tensor(None, core.float32)
    if vars(core.block_type(core.float32, [4, 2])).keys() != {"element_ty", "shape", "numel", "name"}:
        return
    if vars(scalar).keys() != {"handle", "shape", "numel", "type", "dtype"}:
        return
    examples: dict[tuple[int, ...], tuple[Any, Any]] = {}  # a type and a tensor of each shape

    def example(extents: tuple[int, ...]) -> tuple[Any, Any]:
        if extents not in examples:
            block = object.__new__(core.block_type)
            make_type(block, core.float32, list(extents))
            tensor = object.__new__(core.tensor)
            make_tensor(tensor, None, block)
            block.names, tensor.extents = {}, extents
            examples[extents] = block, tensor
        return examples[extents]

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        like, self.like = example(tuple([s.value if isinstance(s, core.constexpr) else s for s in shape]))
        self.element_ty, self.shape, self.numel = element_ty, like.shape, like.numel
        if element_ty.name not in like.names:
            like.names[element_ty.name] = f"<{self.shape}, {element_ty}>"
        self.name = like.names[element_ty.name]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        like = type.like if type.is_block() else scalar
        self.handle, self.type, self.dtype, self.shape, self.numel = handle, type, type.scalar, like.shape, like.numel

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor


def compute_words() -> None:
    """Have NumPy compute the random words that kernels draw, which is a third of what they do.

    The function as it is written stays in the attribute `written`, for its own test.
    """
    from triton.language import core
    from triton.runtime import interpreter

    from grade_kernels.backends.triton import philox as device

    def philox(*words_and_key: Any, **how: bool) -> tuple[Any, ...]:
        c0, c1, c2, c3, k0, k1 = (x.handle.data.astype(np.uint64) for x in words_and_key[:6])
        low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        words = np.broadcast_arrays(*(c.astype(np.uint32) for c in (c0, c1, c2, c3)))
        kind = core.block_type(core.uint32, list(words[0].shape))
        return tuple(core.tensor(interpreter.TensorHandle(word.copy(), core.uint32), kind) for word in words)

    vars(philox)["written"] = device.philox
    device.philox = philox


def settle() -> None:
    """Have the interpreter's products depend on what is multiplied alone.

    A BLAS may add up a row in another order at another place in a tile, which a GPU does not. Sums of float64, rounded
    once, hide the order.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
