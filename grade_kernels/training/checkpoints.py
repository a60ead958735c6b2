"""Checkpoints that are either complete or absent: sealed by a list of their files, and renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

__all__ = ["SEAL", "complete_checkpoints", "damage", "seal", "settle"]

SEAL = "grade_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(directory: Path) -> None:
    """List every file of a directory with its size and digest in it, and flush all of them to the disk."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SEAL):
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _flush(path)
    path = directory / SEAL
    path.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _flush(path)
    _flush(directory)


def settle(staged: Path, target: Path) -> None:
    """Give a sealed directory its name; one that bore it before goes only when the new one is there."""
    replaced = staged.with_name("replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(staged, target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is as it was sealed."""
    try:
        files = json.loads((directory / SEAL).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        if not directory.is_dir():
            return "there is no such directory"
        return f"{SEAL} is missing, so it was never completed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL} can not be read ({error})"
    return None


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Directories `checkpoint-<step>` of a run, the latest first; damaged ones included."""
    found = []
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
