"""The `cuda` backend: launches the kernels of csrc/cuda."""

from __future__ import annotations

import functools

import torch
from typing_extensions import override

from grade_kernels import _build
from grade_kernels.backends.interface import Backend
from grade_kernels.backends.layouts import flat, written_flat
from grade_kernels.backends.native import ESTIMATOR, contiguous, cuda_kernels, unit_stride
from grade_kernels.backends.records import GradientRule, Noise, Rows, Sample
from grade_kernels.backends.triton.backend import TritonBackend
from grade_kernels.estimators import is_noisy

__all__ = ["CudaBackend"]

# Up to so many tokens of a row are a warp's. What it reads twice comes from the multiprocessor's cache the second time.
_TEAM_TOKENS = 1024


@functools.cache
def _why_unavailable() -> str | None:
    path = _build.cuda_library_path()
    if path is None:
        return _build.missing_cuda_reason()
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    return None


def _seed(seed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A launch takes a seed on the host by its value; any other must be on its own device."""
    return seed if seed.device.type == "cpu" else seed.to(logits.device)


def _partial(logits: torch.Tensor, vocab_start: int, *planes: int) -> torch.Tensor:
    """Room for partial results, `[*planes, N, pieces]`."""
    pieces = cuda_kernels().pieces(logits.shape[1], vocab_start)
    return torch.empty(*planes, logits.shape[0], pieces, dtype=torch.float32, device=logits.device)


def _are_pieces(*tensors: torch.Tensor) -> bool:
    """Whether rows `[A, V, B]` are long, and lie as the kernels that cut them into pieces read them: as `[N, V]`."""
    return all(t.shape[1] > _TEAM_TOKENS and t.shape[2] == 1 and t.stride(1) == 1 for t in tensors)


def _given(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
    """Rows as the kernels for rows of any layout take them."""
    logits, tau, noise = rows
    return logits, tau.contiguous(), _seed(noise.seed, logits), contiguous(noise.row_ids), noise.vocab_start


class CudaBackend(TritonBackend):
    """Kernels of csrc/cuda for rows of given logits; those of the sample and of the rule `ste` take rows of any layout.

    What goes through a head is the triton backend's, or the torch backend's where Triton cannot run.
    """

    name = "cuda"

    @override
    def why_unavailable(self) -> str | None:
        """None if the kernels were compiled, there is a GPU, and they load (which this does, once), else the reason."""
        return _why_unavailable()

    @override
    def why_not_device(self, device: torch.device) -> str | None:
        """None for an NVIDIA GPU that there is code for, the oldest of setup.py's CUDA_ARCHITECTURES or later."""
        if device.type != "cuda":
            return "it runs on NVIDIA GPUs only"
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "it needs a GPU of compute capability 8.0 or later" if old else None

    @override
    def serves(self, *dtypes: torch.dtype, head: bool) -> bool:
        return super().serves(*dtypes, head=True) if head else torch.float64 not in dtypes

    @override
    def sample(self, logits: torch.Tensor, noise: Noise, logsumexp: bool) -> Sample:
        rows, device = logits.shape[0], logits.device
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        score_max = torch.empty(rows, dtype=torch.float32, device=device)
        logit_max, logit_sum = (
            torch.empty(rows if logsumexp else 0, dtype=torch.float32, device=device) for _ in range(2)
        )
        found = Sample(ids, score_max, logit_max, logit_sum)
        best = _partial(logits, noise.vocab_start)
        tile = torch.empty(best.shape, dtype=torch.int32, device=device)
        top, total = (torch.empty_like(best) if logsumexp else None for _ in range(2))
        cuda_kernels().sample(
            unit_stride(logits), _seed(noise.seed, logits), contiguous(noise.row_ids), noise.vocab_start, best, tile, top,
            total, *found,
        )  # fmt: skip
        return found

    @override
    def gumbel_softmax(self, rows: Rows, hard: bool, out: torch.Tensor) -> torch.Tensor:
        if rows.noise.posterior is not None or _are_pieces(rows.logits, out):
            return Backend.gumbel_softmax(self, rows, hard, out)
        score_max = torch.empty(rows.tau.shape, dtype=torch.float32, device=out.device)
        cuda_kernels().relax(*_given(rows), hard, out, score_max)
        return score_max

    @override
    def one_hot(self, sample: Sample, vocab: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            out = torch.empty(sample.ids.shape[0], vocab, dtype=dtype, device=sample.ids.device)
        cuda_kernels().one_hot(sample.ids.contiguous(), sample.score_max.contiguous(), out)
        return out

    @override
    def softmax(
        self,
        rows: Rows,
        score_max: torch.Tensor,
        *,
        normalize: bool,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows.noise.posterior is not None:
            return super().softmax(rows, score_max, normalize=normalize, dtype=dtype, out=out)
        # The kernels write float32 and the logits' dtype; what is rounded once more from float32 is rounded once.
        logits, noise = flat(rows.logits), rows.noise
        direct = dtype if dtype == logits.dtype else torch.float32
        written = out
        if written is None or written.dtype != direct:
            written = torch.empty(rows.logits.shape, dtype=direct, device=logits.device)
        total = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        with written_flat(written) as weights:
            cuda_kernels().softmax(
                unit_stride(logits), rows.tau.contiguous(), _seed(noise.seed, logits), contiguous(noise.row_ids),
                noise.vocab_start, score_max.contiguous(), normalize, _partial(logits, noise.vocab_start), weights, total,
            )  # fmt: skip
        if out is None:
            return written.to(dtype), total
        return (out if written is out else out.copy_(written)), total

    @override
    def softmax_backward(
        self, dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, out: torch.Tensor
    ) -> torch.Tensor:
        if rows.noise.posterior is not None and is_noisy(rule.estimator):
            return super().softmax_backward(dy, rows, sample, rule, out)
        if rule.dlogprobs is None and is_noisy(rule.estimator) and not _are_pieces(rows.logits, dy, out):
            dtau = (torch.empty if rule.needs_dtau else torch.zeros)(
                rows.tau.shape, dtype=torch.float32, device=out.device
            )
            score_max = sample.score_max.contiguous()
            cuda_kernels().relax_backward(dy, *_given(rows), score_max, out, dtau if rule.needs_dtau else None)
            return dtau
        logits, noise = flat(rows.logits), rows.noise
        needs_dtau = rule.needs_dtau and rule.estimator != "reinmax"  # which defines none
        dtau = (torch.empty if needs_dtau else torch.zeros)(logits.shape[0], dtype=torch.float32, device=logits.device)
        with written_flat(out) as gradient:
            cuda_kernels().softmax_backward(
                unit_stride(flat(dy)), unit_stride(logits), rows.tau.contiguous(), _seed(noise.seed, logits),
                contiguous(noise.row_ids), noise.vocab_start, ESTIMATOR[rule.estimator],
                *(part.contiguous() for part in sample), contiguous(rule.dlogprobs),
                _partial(logits, noise.vocab_start, 3), torch.empty_like(dtau),
                _partial(logits, noise.vocab_start) if needs_dtau else None, gradient, dtau,
            )  # fmt: skip
        return dtau
