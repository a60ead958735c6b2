"""Compiling kernels ahead of time, with a cache on disk of what was found in their machine code.

Runs in processes of its own: a kernel that was decorated for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import triton
from triton.compiler import ASTSource, make_backend

from grade_kernels import cache
from grade_kernels.inspection import disassembly, machine_code
from grade_kernels.inspection.configurations import TARGETS, Build

__all__ = ["cache_folder", "inspect_builds"]

_READER = hashlib.sha256(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (disassembly, machine_code))
).hexdigest()


def cache_folder() -> Path:
    """Where figures are kept."""
    return cache.cache_folder() / "inspection"


def inspect_builds(builds: Sequence[Build], target: str) -> list[machine_code.Figures]:
    """Figures of kernels for one target, from the cache if nothing that they depend on has changed.

    They depend on a kernel's source with all that it calls, on its configuration and target, on Triton, and on the
    modules that read machine code.
    """
    sources = [_source(build, target) for build in builds]
    paths = [_path(build, target, source) for build, source in zip(builds, sources, strict=True)]
    found = {i: kept for i, path in enumerate(paths) if (kept := _kept(path)) is not None}
    missing = [i for i in range(len(builds)) if i not in found]
    compiled = [triton.compile(sources[i], target=TARGETS[target], options=builds[i].options) for i in missing]
    programs = disassembly.disassemble(compiled) if compiled else []
    for i, kernel, program in zip(missing, compiled, programs, strict=True):
        found[i] = machine_code.figures(builds[i], target, program, kernel.metadata.shared)
        cache.keep(paths[i], json.dumps(dataclasses.asdict(found[i])))
    return [found[i] for i in range(len(builds))]


def _path(build: Build, target: str, source: ASTSource) -> Path:
    parts = (source.hash(), sorted(build.options.items()), str(TARGETS[target]), triton.__version__, _READER, build)
    return cache_folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"


def _kept(path: Path) -> machine_code.Figures | None:
    try:
        return machine_code.Figures(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return None  # not there, or cut short


def _source(build: Build, target: str) -> ASTSource:
    """A kernel as it is launched with tensors of at most 2 GiB. For others AMD's code has no buffer instructions."""
    module, _, function = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    signature, constants, attributes = {}, {}, {}
    attributes_of = make_backend(TARGETS[target]).parse_attr  # D: divisible by 16, S: of at most 2 GiB
    for i, name in enumerate(kernel.arg_names):
        value = build.arguments[name]
        if name == "TARGET" or not isinstance(value, str):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = value.split()[0]
        if value.startswith("*"):
            attributes[(i,)] = attributes_of("DS")
        elif value.endswith(" aligned"):
            attributes[(i,)] = attributes_of("D")
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
