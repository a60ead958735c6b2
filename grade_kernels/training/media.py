"""Columns of a data set that hold images, videos or sounds, by name and by type."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from grade_kernels.training.prompt_tokens import MEDIA_COLUMNS

__all__ = ["media_columns_of_dataset", "media_columns_of_example"]

_TYPES = ("Image", "Video", "Audio")


def media_columns_of_dataset(dataset: Any) -> list[str]:
    """The columns, of a data set that has `column_names`, that hold something else than text."""
    features = getattr(dataset, "features", None) or {}
    named = [
        column for column in dataset.column_names if column in MEDIA_COLUMNS or _has_media_type(features.get(column))
    ]
    return [column for column in named if not _is_empty(dataset, column, features.get(column))]


def media_columns_of_example(example: dict[Any, Any]) -> list[str]:
    """The columns of one example that hold something else than text, by their names."""
    return [name for name, value in example.items() if name in MEDIA_COLUMNS and not _is_nothing(value)]


def _has_media_type(feature: object) -> bool:
    """Whether a feature of `datasets` is an image, a video or a sound, or holds some."""
    if isinstance(feature, dict):
        return any(_has_media_type(part) for part in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(_has_media_type(part) for part in feature)
    kind = type(feature)
    if kind.__module__.startswith("datasets.") and kind.__name__ in _TYPES:
        return True
    return hasattr(feature, "feature") and _has_media_type(feature.feature)


def _is_empty(dataset: Any, column: str, feature: Any) -> bool:
    """Whether a column is known to hold nothing in any row."""
    if getattr(feature, "dtype", None) == "null":
        return True
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        return False
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    lengths = getattr(values.type, "value_type", None) is not None
    return all(_is_nothing(value.as_py()) for value in values) if lengths else values.null_count == len(values)


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, Sized) and not isinstance(value, (str, bytes)) and len(value) == 0)
