"""Files that this package keeps between runs, for itself. Without them, or without a place for them, all works as well."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["cache_folder", "keep"]


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/grade-kernels`, by default under `~/.cache`. It need not exist.

    Raises:
        RuntimeError: the variable is not set, and the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grade-kernels"


def keep(path: Path, text: str) -> None:
    """Write a file, of which readers see the old text or the new one; where it cannot be written, nothing happens."""
    # Machines and containers that share a home have processes of the same number.
    temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
