"""NumPy's numbers as Python's, which JSON, `isinstance` and the operations' schemas take."""

from __future__ import annotations

from typing import Any

import numpy

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """A value with NumPy's scalars, and arrays of at most one axis, as Python's numbers and lists.

    Those in lists, tuples and dicts too. A `numpy.bool` becomes a bool, which is no number; all else stays as it is.
    """
    if isinstance(value, numpy.generic) or (isinstance(value, numpy.ndarray) and value.ndim < 2):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return {key: plain(item) for key, item in value.items()} if type(value) is dict else value
