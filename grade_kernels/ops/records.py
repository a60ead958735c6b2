"""How records become arguments: a NamedTuple of tensors, numbers and further records, flat, and back.

Each operation is declared by such records. What torch.library needs, a flat list of arguments with a schema, follows from
their fields and is written nowhere by hand.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

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


class Leaf(NamedTuple):
    """One argument."""

    path: str  # where it stands in the record: "head.hidden"
    kind: str  # its type in a schema: "Tensor?"
    varies: bool = False  # whether the record is generic in it

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


class Layout(Generic[Record]):
    """The leaves of a record type, in order.

    A field is a tensor, a list of tensors, a number, a string, a truth value, a record, or one of these or None (lists
    and truth values apart). A type variable stands for a tensor: one generic record serves differentiable tensors, their
    gradients, and truth values that say which gradients are wanted.

    Flattening and building happen at every call of an operation, also while torch.compile traces it. Their code is put
    together once here, as that of a NamedTuple is: to walk a record's fields each time takes longer than some kernels.

    Args:
        record: the type.

    Attributes:
        leaves: all of them.
        flatten: the leaves of a record, as a tuple.
        build: the record of a sequence of leaves.
    """

    def __init__(self, record: type[Record]) -> None:
        self.leaves: list[Leaf] = []
        self._records: dict[str, type[Any]] = {}
        self._parts: list[str] = []
        source = self._build(record, "", optional=False, absent="")
        parts = "".join(f"{part}, " for part in self._parts)
        self.flatten: Callable[[Record], tuple[Any, ...]] = self._compile(f"lambda record: ({parts})")
        self.build: Callable[[Sequence[Any]], Record] = self._compile(f"lambda leaves: {source}")

    def _compile(self, source: str) -> Callable[..., Any]:
        function: Callable[..., Any] = eval(compile(source, __file__, "eval"), dict(self._records))
        return function

    def _build(self, record: type[Any], prefix: str, *, optional: bool, absent: str) -> str:
        """Collect the leaves of a record; returns the source that builds it. `absent` is true where there is none."""
        record = get_origin(record) or record
        name, first = f"{record.__name__}_{len(self._records)}", len(self.leaves)
        self._records[name] = record
        fields = []
        for field, hint in get_type_hints(record).items():
            path = f"{prefix}{field}"
            inner, may_be_none, varies = _read(hint)
            if _is_record(inner):
                missing = f"record.{path} is None" if may_be_none else absent
                fields.append(self._build(inner, f"{path}.", optional=optional or may_be_none, absent=missing))
                continue
            kind = _SCHEMA_TYPES[inner]
            fields.append(f"leaves[{len(self.leaves)}]")
            self.leaves.append(Leaf(path, kind + "?" if optional or may_be_none else kind, varies))
            self._parts.append(f"None if {absent} else record.{path}" if absent else f"record.{path}")
        source = f"{name}({', '.join(fields)})"
        return f"(None if leaves[{first}] is None else {source})" if optional else source

    def schema(self, prefix: str = "") -> str:
        """The leaves as arguments of a schema."""
        return ", ".join(f"{leaf.kind} {prefix}{leaf.name}" for leaf in self.leaves)

    def kinds(self) -> str:
        """The leaves' types, as returns of a schema."""
        return ", ".join(leaf.kind for leaf in self.leaves)


def _is_record(hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, tuple)


def _read(hint: Any) -> tuple[Any, bool, bool]:
    """A type without its None, whether it had one, and whether it was a type variable or a list of these."""
    may_be_none = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if may_be_none:
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if isinstance(hint, TypeVar):
        return torch.Tensor, may_be_none, True
    if get_origin(hint) is list and isinstance(get_args(hint)[0], TypeVar):
        return list[torch.Tensor], may_be_none, True
    return hint, may_be_none, False
