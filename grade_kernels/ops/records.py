"""How records become arguments: a NamedTuple of tensors, numbers and further records, flat, and back.

Each operation is declared by such records. What torch.library needs, a flat list of arguments with a schema, follows from
their fields and is written nowhere by hand.

With `from __future__ import annotations` each field's type would be a string, which Python compiles twice when the package is
imported. So the modules that declare records do without.
"""

import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from grade_kernels.ops.eager import ORDINARY

__all__ = ["Layout", "Leaf"]

Record = TypeVar("Record")
_SCHEMA_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    list[torch.Tensor]: "Tensor[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": ORDINARY,
    "Tensor[]": (list, tuple),
    "SymInt": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
}


class Leaf(NamedTuple):
    """One argument."""

    path: str  # where it stands in the record: "head.hidden"
    kind: str  # its type in a schema: "Tensor?"
    varies: bool  # whether the record is generic in it
    root: str | None  # path of the outermost record that it is part of and that may be None

    @property
    def name(self) -> str:
        """What it is called in a schema."""
        return self.path.replace(".", "_")

    @property
    def is_list(self) -> bool:
        """Whether it is a list of tensors."""
        return self.kind == "Tensor[]"

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, or None in the place of one."""
        return self.kind in ("Tensor", "Tensor?")

    @property
    def plain_types(self) -> frozenset[type]:
        """The types of what kernels take as it is. The dispatcher converts others, such as an int where a float belongs."""
        return frozenset((type(None), *_PLAIN_TYPES[self.kind.removesuffix("?")]))


class Layout(Generic[Record]):
    """The leaves of a record type, in order.

    A field is a tensor, a list of tensors, a number, a string, a truth value, a record, or one of these or None (lists
    and truth values apart). A type variable stands for a tensor: one generic record serves differentiable tensors, their
    gradients, and truth values that say which gradients are wanted.

    Flattening and building happen at every call of an operation, also while torch.compile traces it. What they do is
    settled once here: to read a record's fields each time takes longer than some kernels.

    Args:
        record: the type.

    Attributes:
        leaves: all of them.
        tensors: which of them are tensors, by their places.
        lists: which are lists of tensors.
        build: the record of a sequence of leaves.
    """

    def __init__(self, record: type[Record]) -> None:
        self.leaves: list[Leaf] = []
        self.build: Callable[[Sequence[Any]], Record] = self._read(record, "", root=None)
        self._paths = [leaf.path.split(".") for leaf in self.leaves]
        self._plain_types = [leaf.plain_types for leaf in self.leaves]
        self.tensors = [i for i, leaf in enumerate(self.leaves) if leaf.is_tensor]
        self.lists = [i for i, leaf in enumerate(self.leaves) if leaf.is_list]
        # What is read at once: leaves, and in the place of those of a record that may be None this record.
        roots = dict.fromkeys(leaf.root or leaf.path for leaf in self.leaves)
        self._get = None if len(roots) < 2 else operator.attrgetter(*roots)
        # Each such record's place there, and how many leaves it has with how they are read; the last comes first, so that
        # to write its leaves in its place leaves the others' places as they are.
        self._optional: list[tuple[int, tuple[None, ...], operator.attrgetter[tuple[Any, ...]]]] = []
        for place, root in reversed(list(enumerate(roots))):
            inner = [leaf.path.removeprefix(f"{root}.") for leaf in self.leaves if leaf.root == root]
            if inner:
                self._optional.append((place, (None,) * len(inner), operator.attrgetter(*inner)))

    def flatten(self, record: Record) -> tuple[Any, ...]:
        """The leaves of a record."""
        if self._get is None or torch.compiler.is_compiling():  # which does not look into an attrgetter
            return tuple([_at(record, path) for path in self._paths])
        found: tuple[Any, ...] = self._get(record)
        if not self._optional:
            return found
        leaves = [*found]
        for place, nothing, get in self._optional:
            part = found[place]
            leaves[place : place + 1] = nothing if part is None else get(part)
        return tuple(leaves)

    def are_plain(self, leaves: Sequence[Any]) -> bool:
        """Whether kernels may take the leaves as they are: no tensor of a subclass, no number of another type.

        Three more kinds of tensors do not count as plain. The dispatcher writes out a view that negates its memory, and
        zeros without memory, before a kernel sees them. A tensor on the device `meta` has no values.
        """
        for leaf, plain in zip(leaves, self._plain_types, strict=True):
            if type(leaf) not in plain:
                return False
        for i in self.tensors:
            if leaves[i] is not None and not _is_written_out(leaves[i]):
                return False
        return all(type(x) in _PLAIN_TYPES["Tensor"] and _is_written_out(x) for i in self.lists for x in leaves[i])

    def _read(self, record: type[Any], prefix: str, *, root: str | None) -> Callable[[Sequence[Any]], Any]:
        """Collect the leaves of a record; returns what builds it of all leaves."""
        kind, first = get_origin(record) or record, len(self.leaves)
        parts: list[int | Callable[[Sequence[Any]], Any]] = []
        for field, hint in _hints(kind).items():  # type: ignore[arg-type]
            path = f"{prefix}{field}"
            inner, may_be_none, varies = _read(hint)
            if _is_record(inner):
                parts.append(self._read(inner, f"{path}.", root=root or (path if may_be_none else None)))
                continue
            parts.append(len(self.leaves))
            schema_type = _SCHEMA_TYPES[inner] + ("?" if root or may_be_none else "")
            self.leaves.append(Leaf(path, schema_type, varies, root))

        def build(leaves: Sequence[object]) -> Any:
            if root and leaves[first] is None:
                return None
            return kind(*[leaves[part] if isinstance(part, int) else part(leaves) for part in parts])

        return build

    def schema(self, prefix: str = "") -> str:
        """The leaves as arguments of a schema."""
        return ", ".join(f"{leaf.kind} {prefix}{leaf.name}" for leaf in self.leaves)

    def kinds(self) -> str:
        """The leaves' types, as returns of a schema."""
        return ", ".join(leaf.kind for leaf in self.leaves)


@functools.cache
def _hints(record: object) -> dict[str, Any]:
    """The types of a record's fields. Several operations share a record, and reading its annotations takes its time."""
    return get_type_hints(record)


def _is_written_out(x: torch.Tensor) -> bool:
    """Whether its values are those in its memory."""
    return not (x.is_neg() or x.is_meta or x._is_zerotensor())


def _at(record: object, path: Sequence[str]) -> Any:
    """The value at a path, None behind a record that is None."""
    for name in path:
        record = None if record is None else getattr(record, name)
    return record


def _is_record(hint: object) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, tuple)


def _read(hint: object) -> tuple[Any, bool, bool]:
    """A type without its None, whether it had one, and whether it was a type variable or a list of these."""
    may_be_none = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if may_be_none:
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if isinstance(hint, TypeVar):
        return torch.Tensor, may_be_none, True
    if get_origin(hint) is list and isinstance(get_args(hint)[0], TypeVar):
        return list[torch.Tensor], may_be_none, True
    return hint, may_be_none, False
