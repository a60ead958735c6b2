"""Things on disk that are either whole or absent: atomic files, and directories of a model trained once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["read_sealed", "replace_directory", "replace_file", "replace_text"]

_SEAL = "seal.json"


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, because matplotlib reads the format from it.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with a text."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_file(path, write)


def _digest(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.iterdir() if file.name != _SEAL)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def replace_directory(path: Path, write: Callable[[Path], None], note: dict[str, Any]) -> None:
    """Let `write` fill a temporary directory, seal it with the hash of each file and `note`, and move it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        (temporary / _SEAL).write_text(json.dumps({"files": _digest(temporary), "note": note}, indent=2))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_sealed(path: Path) -> dict[str, Any]:
    """The note of a directory that `replace_directory` wrote.

    Raises:
        OSError: there is no such directory, or it has no seal.
        ValueError: a file in it was changed, cut short, added or removed.
    """
    try:
        seal = json.loads((path / _SEAL).read_text())
        files, note = seal["files"], seal["note"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / _SEAL} can not be read") from error
    if files != _digest(path):
        raise ValueError(f"the files in {path} are not those that were written there")
    return note
