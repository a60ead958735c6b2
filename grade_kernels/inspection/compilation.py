"""Compiling one kernel ahead of time, with a cache on disk of what was found in its machine code.

Runs in processes of its own: a kernel that was decorated for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from grade_kernels.inspection import disassembly, machine_code
from grade_kernels.inspection.configurations import TARGETS, Build

__all__ = ["cache_folder", "inspect_build"]

_READER = hashlib.sha256(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (disassembly, machine_code))
).hexdigest()


def cache_folder() -> Path:
    """Where figures are kept: `$XDG_CACHE_HOME/grade-kernels/inspection`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grade-kernels" / "inspection"


def inspect_build(build: Build, target: str) -> machine_code.Figures:
    """Figures of one kernel, from the cache if nothing that they depend on has changed.

    They depend on the kernel's source with all that it calls, on its configuration and target, on Triton, and on the
    modules that read machine code.
    """
    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    source = _source(kernel, build)
    parts = (source.hash(), sorted(build.options.items()), str(TARGETS[target]), triton.__version__, _READER, build)
    path = cache_folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"
    try:
        return machine_code.Figures(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        pass  # not there, or cut short
    compiled = triton.compile(source, target=TARGETS[target], options=build.options)
    found = machine_code.figures(build, target, disassembly.disassemble(compiled), compiled.metadata.shared)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(found)))
    os.replace(temporary, path)
    return found


def _source(kernel: Any, build: Build) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = build.arguments[name]
        if name == "TARGET" or not isinstance(value, str):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = value.split()[0]
        if value.startswith("*") or value.endswith(" aligned"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
