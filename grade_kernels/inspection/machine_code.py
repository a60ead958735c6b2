"""What a kernel's machine code costs: registers and memory it takes, and instructions per logit by pipe."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx

from grade_kernels.inspection.configurations import TARGETS, Build
from grade_kernels.inspection.disassembly import Instruction, Program

__all__ = ["PIPES", "Figures", "figures"]

PIPES = ("fma", "multiply", "integer", "special", "memory", "tensor", "other")
_ELEMENT = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}

# By the first pattern that matches. "multiply" is the integer multiplier, which on NVIDIA is half of the FMA pipe and
# does some moves and shifts, too; "integer" is everything else that works on registers, comparisons and selections of
# floating-point numbers included; "other" is control, and what a whole warp shares.
_NVIDIA = (
    ("tensor", r"[HQOIDB]?MMA|[HQI]GMMA|UTC\w*MMA"),
    ("other", r"BRA|BSSY|BSYNC|BREAK|EXIT|NOP|BAR|\w*DEPBAR|WARPSYNC|WARPGROUP|S2U?R|CS2R|R2UR|ERRBAR|MEMBAR|FENCE|YIELD|VOTE"
              r"|CALL|RET|SYNCS|ELECT|ACQ|UTCBAR"),
    ("memory", r"LD|ST|ATOM|RED|CCTL|SHFL|UBLK|UTMA|UTCCP|MATCH"),
    ("other", r"U"),
    ("special", r"MUFU|I2F\b|F2I\b|F2F\b|I2I\b|POPC|FLO|BREV"),
    ("multiply", r"IMAD|IDP|IMUL"),
    ("fma", r"[FHD](FMA|ADD|MUL)"),
    ("integer", r""),
)  # fmt: skip
_AMD = (
    ("tensor", r"v_s?mfma"),
    ("memory", r"global_|buffer_|flat_|scratch_|ds_|s_load|s_buffer"),
    ("other", r"s_"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("multiply", r"v_(mul_(lo|hi)_[iu]32|mad_[iu]64)"),
    ("fma", r"v_(pk_)?(fmac?|fmaak|fmamk|mac|mad|mul|add|sub|subrev)_(legacy_)?f(16|32|64)"),
    ("integer", r""),
)
_WIDE_MULTIPLY = re.compile(r"FFMA|v_(pk_)?fmac?_f32|v_mfma")


@dataclass(frozen=True)
class Figures:
    """What one kernel compiles to for one target.

    Attributes:
        registers, stack, spills: per thread; spilled accesses (NVIDIA) or registers (AMD).
        shared: bytes per program.
        warps: of a program.
        instructions: in all.
        per_logit: instructions per logit by pipe of one round of the main loop, for a head without the loop over the
            width, for a chunk with what is around the loop, and of everything where rows are one tile; None where there is
            neither.
        per_width: the same of the loop over the width, per logit and unit of the width.
        bytes_per_logit: of the main loop; for a head of the loop over the width, per logit and unit of the width.
        exchanges: accesses of shared memory in the main loop of a row kernel.
        opcodes: the commonest of the main loop.
        unequal: sums across lanes of which the lanes may get unequal results; counted for NVIDIA.
    """

    kernel: str
    dtype: str
    configuration: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    instructions: int
    per_logit: dict[str, float] | None
    per_width: dict[str, float] | None
    bytes_per_logit: float | None
    exchanges: int | None
    opcodes: dict[str, int] | None
    unequal: int

    @property
    def total(self) -> float | None:
        """Instructions per logit of the main loop."""
        return None if self.per_logit is None else sum(self.per_logit.values())


def figures(build: Build, target: str, program: Program, shared: int) -> Figures:
    """Count one kernel's machine code."""
    body: list[Instruction] | None = None
    per_width, moved, exchanges = None, None, None
    outside = dict.fromkeys(PIPES, 0.0)
    if build.tile is not None:
        found = _tile_loop(program.code, build)
        if found is not None:
            body, product = found
            width = _width(product, build, TARGETS[target].warp_size * build.tile.num_warps)
            per_width = _by_pipe(product, target, build.logits * width)
            moved = sum(_bytes(i.opcode) for i in product) / (build.logits * width)
    elif build.whole:
        body = _Graph(program.code).straight()
        moved = sum(_bytes(i.opcode) for i in body) / build.logits
    elif build.chunks:
        body, around = _chunk_loop(program.code)
        if body is not None:
            moved = sum(_bytes(i.opcode) for i in body) / build.logits
            outside = _by_pipe(around, target, build.logits * build.arguments["TILES"])
    elif build.logits:
        # A kernel that draws no noise in its loop has little else there.
        body = _scan_loop(program.code, build.logits, 1 if build.kernel.endswith("row_write_kernel") else 5)
        if body is not None:
            moved = sum(_bytes(i.opcode) for i in body) / build.logits
            exchanges = sum(re.match(r"STS|LDS|ds_", i.opcode) is not None for i in body)
    return Figures(
        kernel=build.name,
        dtype=build.dtype,
        configuration=build.configuration,
        target=target,
        registers=program.registers,
        stack=program.stack,
        spills=program.spills,
        shared=shared,
        warps=build.options["num_warps"],
        instructions=len(program.code),
        per_logit=None if body is None else _sum(_by_pipe(body, target, build.logits), outside),
        per_width=per_width,
        bytes_per_logit=moved,
        exchanges=exchanges,
        opcodes=None if body is None else dict(Counter(i.opcode for i in body).most_common(40)),
        unequal=program.unequal,
    )


def _width(product: list[Instruction], build: Build, threads: int) -> int:
    """The hidden units that one round of the loop over the width multiplies, a multiple of BK: compilers unroll it."""
    assert build.tile is not None
    # Known by what it loads; rounded, since it may load a little besides.
    step = (build.tile.BM + build.tile.columns) * build.tile.BK * _ELEMENT[build.dtype] * build.products
    return build.tile.BK * max(1, round(threads * sum(_bytes(i.opcode) for i in product) / step))


def pipe(opcode: str, target: str) -> str:
    """Which of PIPES runs an instruction."""
    table = _AMD if TARGETS[target].backend == "hip" else _NVIDIA
    return next(name for name, pattern in table if re.match(pattern, opcode))


def _by_pipe(code: Iterable[Instruction], target: str, divisor: float) -> dict[str, float]:
    counts = Counter(pipe(instruction.opcode, target) for instruction in code)
    return {name: counts[name] / divisor for name in PIPES}


def _sum(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a[name] + b[name] for name in PIPES}


def _bytes(opcode: str) -> int:
    """Bytes of global memory that a thread moves."""
    if re.match(r"LDG(STS)?\b|STG|LD\.|ST\.", opcode):
        width = re.search(r"\.(256|128|64|[US]16|[US]8)\b", opcode)
        return {"256": 32, "128": 16, "64": 8, None: 4}.get(width and width[1], 2 if width and "16" in width[1] else 1)
    if found := re.match(r"(?:global|buffer)_(?:load|store)_(?:lds_)?(dword|[a-z]+)(?:x(\d))?", opcode):
        name, count = found.groups()
        return 4 * int(count or 1) if name == "dword" else 1 if "byte" in name else 2
    return 0


class _Graph:
    """Control flow of a kernel: blocks by the position of their first instruction, and its loops."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        starts = {0} | {i.target for i in code if i.target is not None}
        starts |= {n + 1 for n, i in enumerate(code) if (i.target is not None or i.ends) and n + 1 < len(code)}
        self.starts = sorted(starts)
        self.ends = dict(zip(self.starts, [*self.starts[1:], len(code)], strict=True))
        self.flow = nx.DiGraph()
        self.flow.add_node(0)
        for start, end in self.ends.items():
            last = code[end - 1]
            if last.target is not None:
                self.flow.add_edge(start, last.target, idle=last.opcode == "s_cbranch_execz")
            if not last.ends and end < len(code):
                self.flow.add_edge(start, end)
        parents = nx.immediate_dominators(self.flow, 0)
        reached = set(nx.descendants(self.flow, 0)) | {0}
        self.loops: dict[int, set[int]] = {}  # first block -> blocks
        for block, header in self.flow.edges:
            if block in reached and header in self._dominators(block, parents):
                backwards = self.flow.reverse(copy=False).subgraph(reached - {header})
                body = {header, block} | (nx.descendants(backwards, block) if block != header else set())
                self.loops[header] = self.loops.get(header, set()) | body

    @staticmethod
    def _dominators(block: int, parents: dict[int, int]) -> set[int]:
        found = {block}
        while parents.get(block, block) not in (block, None):
            block = parents[block]
            found.add(block)
        return found

    def block(self, start: int) -> list[Instruction]:
        return self.code[start : self.ends[start]]

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [instruction for start in sorted(blocks) for instruction in self.block(start)]

    def innermost(self) -> dict[int, set[int]]:
        return {
            header: body
            for header, body in self.loops.items()
            if not any(other != header and other in body for other in self.loops)
        }

    def round(self, header: int, through: list[int]) -> list[Instruction]:
        """One round of a loop by the shortest way that passes the inner loops `through` (by first block), without them.

        That is the common way: those of tiles that refine noise or lie at the vocabulary's edge do more. What the
        compiler moves ahead of an inner loop counts as well, and so does the start of the next round's loads. AMD's
        masked code can be jumped over where no thread has anything to do: in an innermost loop, which loads, that is
        not the common way.
        """
        inner = {block: first for first in through for block in self.loops[first]}
        path: Any = nx.DiGraph()
        for a, b, idle in self.flow.subgraph(self.loops[header]).edges(data="idle"):
            if idle and not through:
                continue
            a, b = inner.get(a, a), inner.get(b, b)
            if b == header:
                path.add_edge(a, "end", weight=0)
            elif a != b:
                path.add_edge(a, b, weight=0 if b in through else len(self.block(b)))
        stops = [header, *through, "end"]
        blocks = [header]
        for a, b in itertools.pairwise(stops):
            blocks += nx.dijkstra_path(path, a, b)[1:]
        return [i for start in blocks if start != "end" and start not in through for i in self.block(start)]

    def straight(self) -> list[Instruction]:
        """The shortest way from the first instruction to an end, which is the common one where there is no loop."""
        path: Any = nx.DiGraph()
        path.add_edge("start", 0, weight=len(self.block(0)))
        for a, b, idle in self.flow.edges(data="idle"):
            if not idle:
                path.add_edge(a, b, weight=len(self.block(b)))
        for start, end in self.ends.items():
            if self.code[end - 1].ends and self.code[end - 1].target is None:
                path.add_edge(start, "end", weight=0)
        blocks = nx.dijkstra_path(path, "start", "end")[1:-1]
        return [i for start in blocks for i in self.block(start)]


def _scan_loop(code: list[Instruction], logits: float, least: int) -> list[Instruction] | None:
    """One round of a row kernel's main loop, the loop over tiles that need no masks; of `least` instructions per logit."""
    graph = _Graph(code)
    rounds = [graph.round(header, []) for header in graph.innermost()]
    # Masked loops take a part of a tile, or do more. AMD masks by the set of active threads.
    rounds = [r for r in rounds if len(r) > least * logits]
    full = [r for r in rounds if not any("saveexec" in i.opcode for i in r)]
    return min(full or rounds, key=lambda r: (-sum(_bytes(i.opcode) for i in r), len(r)), default=None)


def _chunk_loop(code: list[Instruction]) -> tuple[list[Instruction] | None, list[Instruction]]:
    """One round of the loop over the tiles of a chunk, which is the longest; and what is outside of it.

    Refinement may be a loop in it. A split is ten tiles, so what a program does before and after them counts.
    """
    graph = _Graph(code)
    if not graph.loops:
        return None, []
    header = max(graph.loops, key=lambda first: len(graph.instructions(graph.loops[first])))
    return graph.round(header, []), graph.instructions(set(graph.starts) - graph.loops[header])


def _tile_loop(code: list[Instruction], build: Build) -> tuple[list[Instruction], list[Instruction]] | None:
    """One round of a head kernel's loop over tiles, without the loops over the width; and those."""
    graph = _Graph(code)
    multiplies = _WIDE_MULTIPLY if build.dtype == "fp32" else re.compile(r"v_s?mfma|\w*MMA")

    def density(body: set[int]) -> int:
        return sum(multiplies.match(i.opcode) is not None for i in graph.instructions(body))

    # Loops that multiply and hold no other such loop; one may hold a loop that waits. With true float32 other loops
    # multiply as well, but none so much.
    multiplying = {header: body for header, body in graph.loops.items() if density(body)}
    inner = [h for h, body in multiplying.items() if not any(other != h and other in body for other in multiplying)]
    products = sorted(sorted(inner, key=lambda header: -density(graph.loops[header]))[: build.products])
    around = [header for header, body in graph.loops.items() if all(p in body and p != header for p in products)]
    if len(products) < build.products or not around:
        return None
    header = max(around, key=lambda h: len(graph.loops[h]))
    return graph.round(header, products), [i for p in products for i in graph.round(p, [])]
