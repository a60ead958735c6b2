"""Other libraries' ways to do what ours does through an LM head, each as a function of the same inputs.

An installed one takes part in the races of its operation, once its result has been found right. One that is not installed,
or does not run on the device, is a line of the report.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
import torch.nn.functional as F

ACCELERATORS = "an accelerator"


class HeadInputs(Protocol):
    """What a rival reads; `benchmarks.linear` makes it."""

    hidden: torch.Tensor  # [N, H]
    head: torch.Tensor  # [V, H]
    ids: torch.Tensor  # [N]
    ref_hidden: torch.Tensor  # [N, H], for the KL alone
    ref_head: torch.Tensor  # [V, H]


Work = Callable[[HeadInputs], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """One way of another library.

    Its work returns what ours does, `[N]`, or the sum of that where the library is at its best without a value per row: the
    gradient of a sum is the same work.
    """

    name: str  # of its column in the tables
    package: str  # as pip calls it
    op: str  # of ours
    load: Callable[[str], Work]  # of the kind of device; what an absent or unfit library raises says why it is left out
    needs: str | None = None  # ACCELERATORS: it has no code for CPUs

    def found(self, device: str) -> Work | str:
        """Its work, or in words why it can not take part on a device such as "cpu" or "cuda"."""
        try:
            installed = version(self.package)
        except PackageNotFoundError:
            return "not installed"
        if self.needs is not None and device == "cpu":
            return f"{installed} needs {self.needs}"
        try:
            return self.load(device)
        except Exception as error:  # whatever a library raises when it is imported where it was not meant to be
            return f"{installed} can not be used: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def of(op: str, device: str) -> tuple[dict[str, Work], dict[str, str]]:
    """The rivals of an operation that take part on a device, by name, and in words why others do not."""
    present: dict[str, Work] = {}
    absent: dict[str, str] = {}
    for rival in RIVALS:
        if rival.op != op:
            continue
        found = rival.found(torch.device(device).type)
        if isinstance(found, str):
            absent[rival.name] = f"{rival.package} {found}"
        else:
            present[rival.name] = found
    return present, absent


def _part(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _torch_loss(**options: Any) -> Callable[[str], Work]:
    """PyTorch's own; without options all logits at once. In chunks of rows a sum has its gradient ready before backward."""

    def load(_: str) -> Work:
        loss = F.linear_cross_entropy
        how = torch.nn.LinearCrossEntropyOptions(**options) if options else None
        return lambda x: -loss(x.hidden, x.head, x.ids, reduction="sum" if how else "none", options=how)

    return load


def _trl_of_logits(_: str) -> Work:
    log_softmax = _part("trl.trainer.utils", "selective_log_softmax")
    return lambda x: log_softmax(x.hidden @ x.head.T, x.ids)


def _trl_of_logits_fused(_: str) -> Work:
    log_softmax = _part("trl.kernels", "selective_log_softmax_and_entropy")
    return lambda x: log_softmax(x.hidden @ x.head.T, x.ids)[0]


def _trl_chunked(_: str) -> Work:
    """With the width of a chunk that its trainers use."""
    function, width = _part("trl.kernels", "ChunkedLogProbFunction"), 32768
    return lambda x: function.apply(x.hidden, x.head, None, x.ids, 1.0, min(width, len(x.head)), None, 1.0, ())[0]


def _trl_divergence(_: str) -> Work:
    """At beta = 1 the KL of the policy to the reference, as ours."""
    function = _part("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    return lambda x: function.apply(x.hidden, x.head, None, x.ref_hidden, x.ref_head, None, 1.0)[0]


def _cut_cross_entropy(device: str) -> Work:
    loss, way = _part("cut_cross_entropy", "linear_cross_entropy"), "torch_compile" if device == "cpu" else "cce"
    return lambda x: -loss(x.hidden, x.head, x.ids, reduction="none", impl=way)


def _liger(_: str) -> Work:
    loss = _part("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda x: -loss(x.hidden, x.head, x.ids, reduction="sum")


def _liger_scaled(_: str) -> Work:
    """CuTe kernels on Hopper GPUs, where they ask for `liger-kernel[cutedsl]`; PyTorch by chunks of rows elsewhere."""
    function = _part("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    return lambda x: -function.apply(x.hidden, x.head, x.ids)


def _quack(_: str) -> Work:
    loss = _part("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x: -loss(x.hidden, x.head, x.ids, reduction="sum")


RIVALS = (
    Rival("linear_cross_entropy", "torch", "linear_logprobs", _torch_loss()),
    Rival("linear_cross_entropy chunked", "torch", "linear_logprobs", _torch_loss(chunking_method="auto")),
    Rival("linear_cross_entropy accurate", "torch", "linear_logprobs", _torch_loss(acc_policy="accurate")),
    Rival("trl", "trl", "linear_logprobs", _trl_of_logits),
    Rival("trl fused", "trl", "linear_logprobs", _trl_of_logits_fused, ACCELERATORS),
    Rival("trl chunked", "trl", "linear_logprobs", _trl_chunked),
    Rival("trl chunked", "trl", "linear_kl", _trl_divergence),
    Rival("cut-cross-entropy", "cut-cross-entropy", "linear_logprobs", _cut_cross_entropy),
    Rival("liger", "liger-kernel", "linear_logprobs", _liger, ACCELERATORS),
    Rival("liger scaled", "liger-kernel", "linear_logprobs", _liger_scaled),
    Rival("quack", "quack-kernels", "linear_logprobs", _quack, "a GPU of NVIDIA, Hopper or later"),
)


def library(name: str) -> str | None:
    """The package and its version behind a contestant, such as "trl 1.16.0"; None for who is no rival."""
    package = next((rival.package for rival in RIVALS if rival.name == name), None)
    return None if package is None else f"{package} {version(package)}"
