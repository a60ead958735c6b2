"""The shapes that programs give to `F.gumbel_softmax`, and ours in its place.

Most have small vocabularies and many rows, a vocabulary that is not the last dimension, or logits that are a slice of
something wider.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F

import grade_kernels as gk
from benchmarks.harness import OURS, Case, Contestants, compiled
from benchmarks.rows import SEED, TAU, agree, step

CHECKED = 64  # rows, at most


@dataclass(frozen=True)
class Shape:
    """Logits as a kind of program has them, and whether that program draws hard samples or soft ones."""

    program: str
    sizes: tuple[int, ...]
    hard: bool
    dim: int = -1
    width: int | None = None  # the logits are some of so many columns
    masked: bool = False  # of a third of the rows, the first token is masked

    def __str__(self) -> str:
        dim = "" if self.dim == -1 else f", dim {self.dim}"
        width = "" if self.width is None else f", of {self.width} columns"
        return f"{self.program}: {list(self.sizes)}{dim}{width}{', masked' if self.masked else ''}"

    @property
    def vocab(self) -> int:
        return self.sizes[self.dim]

    @property
    def rows(self) -> int:
        return prod(self.sizes) // self.vocab

    def case(self, hard: bool, pass_: str, dtype: str, threads: int | None, device: str = "cpu") -> Case:
        op = f"gumbel_softmax {'hard' if hard else 'soft'}"
        return Case(op, pass_, dtype, self.rows, self.vocab, device=device, shape=str(self), threads=threads)


SHAPES = (
    Shape("token pruning", (64, 2, 14, 14), hard=False, dim=1),
    Shape("token pruning", (128, 196, 2), hard=True),
    Shape("token pruning", (128, 196, 2), hard=True, masked=True),
    Shape("learned 2:4 masks", (1_000_000, 6), hard=False),
    Shape("learned masks", (300_000, 4), hard=True),
    Shape("gates", (4096, 2), hard=True),
    Shape("routers", (8192, 8), hard=False),
    Shape("routers", (8192, 64), hard=True),
    Shape("tabular GANs", (500, 10), hard=False),
    Shape("tabular GANs", (500, 10), hard=False, width=156),
    Shape("architecture search", (20, 8), hard=True),
    Shape("one choice of two", (1, 2), hard=False),
    Shape("world models", (25_600, 32), hard=True),
    Shape("grouping of patches", (16, 6, 64, 196), hard=True, dim=-2),
    Shape("speech quantisers", (6000, 320), hard=True),
    Shape("speech quantisers", (6400, 320), hard=True),
    Shape("codebooks", (4096, 1024), hard=True),
    Shape("codebooks", (4096, 1024), hard=True, width=4096),
    Shape("image tokenisers", (4, 8192, 16, 16), hard=True, dim=1),
    Shape("image tokenisers", (4, 8192, 32, 32), hard=True, dim=1),
    Shape("image tokenisers", (8, 512, 32, 32), hard=False, dim=1),
    Shape("text GANs", (64, 5256), hard=False),
    Shape("prompt search", (160, 50_257), hard=False),
    Shape("language models", (64, 151_936), hard=True),
)
_BY_NAME = {str(shape): shape for shape in SHAPES}


def shape_of(case: Case) -> Shape:
    """The shape that a case measures."""
    return _BY_NAME[case.shape or ""]


def hard(case: Case) -> bool:
    return case.op == "gumbel_softmax hard"


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Standard normal logits, and the gradient that comes from above, or None where a case has none."""
    shape, generator = shape_of(case), torch.Generator().manual_seed(1)
    last = shape.width or shape.sizes[-1]
    start = (last - shape.sizes[-1]) // 2
    wide = torch.randn((*shape.sizes[:-1], last), generator=generator).to(case.device, case.torch_dtype)
    logits = wide[..., start : start + shape.sizes[-1]]
    if shape.masked:
        logits.movedim(shape.dim, -1).flatten(0, -2)[::3, 0] = -torch.inf
    if case.pass_ == "forward":
        return logits, None
    upstream = torch.randn(shape.sizes, generator=generator).to(case.device, case.torch_dtype)
    return logits.requires_grad_(), upstream


def backends(device: str) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Ours as a call takes it by itself and, on an accelerator, by the CUDA C++ kernels where they are there; as contexts."""
    found: dict[str, Callable[[], AbstractContextManager[object]]] = {OURS: nullcontext}
    if device != "cpu" and gk.backends.status()["cuda"] is None:
        found[f"{OURS} cuda"] = partial(gk.use_backend, "cuda")
    return found


def build(case: Case, with_compiled: bool) -> Contestants:
    """Ours, eager and, where it is asked for, compiled PyTorch."""
    logits, upstream = inputs(case)
    relax = {"tau": TAU, "hard": hard(case), "dim": shape_of(case).dim}

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        return F.gumbel_softmax(logits, **relax)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return gk.gumbel_softmax(logits, **relax)

    def by(backend: Callable[[], AbstractContextManager[object]]) -> tuple[torch.Tensor, ...]:
        with backend():
            return step(ours, logits, upstream)

    contestants: Contestants = {OURS: partial(step, ours, logits, upstream)}
    contestants |= {name: partial(by, backend) for name, backend in backends(case.device).items() if name != OURS}
    contestants["eager"] = partial(step, theirs, logits, upstream)
    if with_compiled:
        contestants["compiled"] = partial(step, compiled(theirs), logits, upstream)
    return contestants


def checks(case: Case, contestants: Contestants) -> dict[str, Callable[[], None]]:
    """What must hold of ours by another backend before it is timed."""
    return {name: partial(check, case, contestants[name]) for name in backends(case.device) if name != OURS}


def check(case: Case, ours: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Compare what is going to be timed with the reference in float64, on rows from the first to the last.

    Raises:
        AssertionError: a sample, value or gradient differs.
    """
    torch.manual_seed(SEED)
    actual = ours()
    torch.manual_seed(SEED)
    ids = torch.linspace(0, case.N - 1, min(case.N, CHECKED), dtype=torch.float64).long()
    noise = gk.GumbelNoise(gk.GumbelNoise.from_generator().seed, ids)

    def rows(x: torch.Tensor) -> torch.Tensor:
        last = x.detach().movedim(shape_of(case).dim, -1)
        return last.reshape(-1, case.V)[ids.to(x.device)].cpu().double()

    logits, upstream = inputs(case)
    reference = partial(gk.reference.gumbel_softmax, tau=TAU, hard=hard(case), noise=noise)
    wide = rows(logits).requires_grad_(logits.requires_grad)
    expected = step(reference, wide, None if upstream is None else rows(upstream))
    agree(case, [rows(x) for x in actual], expected, exact=hard(case))
