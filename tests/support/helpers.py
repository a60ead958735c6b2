"""What several files of the suite share: the tolerance rule, noise injected into PyTorch, poisoned memory."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import grade_kernels as gk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ODD_VOCABS = (1, 2, 3, 17, 127, 1000, 1031, 4099)
ESTIMATORS = ("ste", "soft", "st", "reinmax")

# The slim margin of the tolerance rule, in units of a dtype's epsilon and relative to the row's largest entry: what a
# result may be further from the truth than PyTorch in the same dtype, for which the elementary functions' last bits
# (and, in float32, a different order of summation) are to blame. One rounding to a narrow dtype is 1/2.
MARGIN = {torch.float64: 64.0, torch.float32: 16.0, torch.bfloat16: 0.75, torch.float16: 0.75}

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every third column": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "padded rows": lambda x: torch.cat([x, torch.full_like(x, math.nan)], 1)[:, : x.shape[1]],
    "offset": lambda x: torch.cat([torch.full_like(x[:1], math.nan).flatten(), x.flatten()])[x.shape[1] :].view(
        x.shape
    ),
    "offset by one": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
    "leading dimensions": lambda x: x.view(1, x.shape[0], 1, x.shape[1]),
}


def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty and its kin return NaN for floating dtypes."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            # The memory itself: an expanded or strided view of it is filled as well.
            return x.detach().fill_(math.nan) if x.is_floating_point() and not x.requires_grad else x

        return poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def resize(monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> None:
    """Have every backend that has such sizes (`grade_kernels.backends.Sizes`) use these, for the rest of the test."""
    unknown = set(sizes)
    for name in (*gk.backends.BACKENDS[1:], "triton:tiles", "triton:chunks"):
        backend = gk.backends.get(name)
        known = sizes.keys() & {field.name for field in dataclasses.fields(backend.sizes)}
        monkeypatch.setattr(backend, "sizes", dataclasses.replace(backend.sizes, **{key: sizes[key] for key in known}))
        unknown -= known
    assert not unknown, f"no backend has the sizes {sorted(unknown)}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same on every device, exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(device)


def masked(logits: torch.Tensor, seed: int = 99, share: float = 0.3) -> torch.Tensor:
    """The logits with a share of -inf, never a whole row of it."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(logits.shape, generator=generator) < share).to(logits.device)
    mask[..., logits.shape[-1] // 2] = False
    return logits.masked_fill(mask, -math.inf)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def grads(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients; zeros where the loss does not depend on an input."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))


def top_two_gap(scores: torch.Tensor) -> torch.Tensor:
    """Distance of the two best scores per row; infinite where there is one token."""
    if scores.shape[-1] == 1:
        return torch.full(scores.shape[:-1], math.inf, dtype=scores.dtype)
    best = scores.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def assert_same_ids(ids: torch.Tensor, scores: torch.Tensor, dtype: torch.dtype) -> None:
    """`ids` are the argmax of the float64 `scores` `[N, V]`, unless the two best are closer than rounding.

    Rounding: 8 epsilon of the compute dtype, relative to the largest finite magnitude that was added (at least 32,
    which bounds noise). In 1000 rows of 4099 tokens that excuses about one row in 10^5, so it cannot hide an error.
    """
    ids, scores = ids.reshape(-1).cpu(), scores.cpu()
    assert ids.dtype == torch.int64
    magnitude = torch.where(scores.isfinite(), scores, 0.0).abs().amax(-1).clamp(min=32.0)
    rounding = 8 * torch.finfo(compute_dtype(dtype)).eps * magnitude
    differs = ids != scores.argmax(-1)
    chosen = scores.gather(-1, ids[:, None]).squeeze(-1)
    wrong = differs & ~(scores.amax(-1) - chosen <= rounding)
    assert not wrong.any(), f"rows {wrong.nonzero().flatten().tolist()} differ by more than rounding"


def assert_accurate(
    ours: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    truth: torch.Tensor,
    what: str = "",
    terms: torch.Tensor | None = None,
    compute: torch.dtype | None = None,
) -> None:
    """The tolerance rule: |truth - ours| <= |truth - PyTorch in the same dtype| + slim margin.

    Both sides are the largest error of a row. Slim margin: MARGIN epsilons of the output's dtype, relative to the row's
    largest true entry, or where a result is a difference, to the larger `terms` (of truth's shape) that cancel in it:
    their rounding has been lost before. `truth` is float64, computed from the very same (rounded) inputs. `compute`
    is the dtype of the arithmetic where it is not the output's compute dtype.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    assert ours.dtype == torch_same_dtype.dtype, f"{what}: dtype {ours.dtype} instead of {torch_same_dtype.dtype}"
    if ours.numel() == 0:
        return
    dtype, info = ours.dtype, torch.finfo(ours.dtype)
    ours, theirs, truth = (x.detach().double().cpu() for x in (ours, torch_same_dtype, truth))
    terms = truth if terms is None else terms.detach().double().cpu()
    if ours.dim() == 0:
        ours, theirs, truth, terms = ours[None], theirs[None], truth[None], terms[None]
    for value in (-math.inf, math.inf):  # the same infinities, which then cancel
        assert torch.equal(ours == value, truth == value), f"{what}: infinities differ"
    finite = truth.isfinite()
    ours, theirs, truth = (torch.where(finite, x, 0.0) for x in (ours, theirs, truth))
    assert ours.isfinite().all(), f"{what}: not finite"
    scale = torch.maximum(truth.abs(), torch.where(finite, terms.abs(), 0.0)).amax(-1)
    # Cancelled terms were computed in the compute dtype; the result is rounded once. Below the smallest normal number
    # the distance between neighbours no longer shrinks.
    wide = compute or compute_dtype(dtype)
    slim = MARGIN[dtype] * (info.eps * truth.abs().amax(-1) + info.tiny * info.eps)
    slim = slim + MARGIN[wide] * torch.finfo(wide).eps * scale
    allowed = (truth - theirs).abs().amax(-1) + slim
    error = (truth - ours).abs().amax(-1)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: error {error.flatten()[worst]:.3e}, PyTorch in {dtype} with margin {allowed.flatten()[worst]:.3e}"
    )


@contextmanager
def injected_noise(g: torch.Tensor) -> Iterator[None]:
    """Give torch.nn.functional.gumbel_softmax this very noise: it takes -log of exponential numbers."""

    def exponential_(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert self.shape == g.shape
        return self.copy_((-g.double()).exp())

    with mock.patch.object(torch.Tensor, "exponential_", exponential_):
        yield


def noise_of(seed: int = 1, rows: int | None = None, device: str = "cpu", **kwargs: Any) -> gk.GumbelNoise:
    """A noise; with `rows` one whose row identities are in no order and beyond 32 bits."""
    if rows is None:
        return gk.GumbelNoise(seed, **kwargs)
    ids = torch.tensor(
        [(-1) ** i * (7919 * i + 5) * (2**33 + 1) for i in range(rows)], dtype=torch.int64, device=device
    )
    return gk.GumbelNoise(seed, ids, **kwargs)


def on_cpu(noise: gk.GumbelNoise) -> gk.GumbelNoise:
    """The same noise with its tensors on the CPU."""
    row_ids = None if noise.row_ids is None else noise.row_ids.cpu()
    return gk.GumbelNoise(noise.seed.cpu(), row_ids, vocab_start=noise.vocab_start)


def flat_on_cpu(noise: gk.GumbelNoise | gk.PosteriorNoise) -> gk.GumbelNoise | gk.PosteriorNoise:
    """The same for a batch of one dimension, also of given tokens."""
    if isinstance(noise, gk.GumbelNoise):
        return on_cpu(noise)
    logprobs = None if noise.logprobs is None else noise.logprobs.cpu().reshape(-1)
    return gk.PosteriorNoise(on_cpu(noise.noise), noise.ids.cpu().reshape(-1), logprobs, noise.draw)


def noise_given(noise: gk.GumbelNoise, logits: torch.Tensor, *, known: bool, seed: int = 77) -> gk.PosteriorNoise:
    """Noise given some token of each row, any that is not masked; with its log-probability if that is known."""
    token = torch.where(logits == -math.inf, -math.inf, randn(*logits.shape, device=logits.device.type, seed=seed))
    ids = token.argmax(-1)
    logprobs = logits.double().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return noise.given(ids, logprobs if known else None)


def truth_noise(
    noise: gk.GumbelNoise | gk.PosteriorNoise, rows: int, vocab: int, logits: torch.Tensor | None = None
) -> torch.Tensor:
    """The noise in float64 on the CPU; that of given tokens needs the logits `[rows, vocab]`."""
    noise = flat_on_cpu(noise)
    if isinstance(noise, gk.GumbelNoise):
        return noise.dense(rows, vocab, dtype=torch.float64)
    assert logits is not None
    return noise.dense(logits.cpu().double())


def row_taus(rows: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """One temperature per row, exactly representable in every dtype."""
    return torch.tensor([0.5, 1.0, 2.0, 0.75, 0.25], device=device)[:rows].to(compute_dtype(dtype))


def raises(error: type[Exception], *words: object) -> Any:
    """The error, with all of these words in its message."""
    return pytest.raises(error, match="".join(f"(?=.*{re.escape(str(word))})" for word in words))
