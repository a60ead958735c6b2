"""What the public functions through an LM head share: checks of its tensors and of eps."""

from __future__ import annotations

from numbers import Real

import torch

from grade_kernels import reference
from grade_kernels.backends import Head, Noise, Support
from grade_kernels.dtypes import compute_dtype
from grade_kernels.ops import checks
from grade_kernels.ops.transforms import without_wrappers

LEAST_EPS = 2.0**-64


def autocasted(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast the operands of the head's product are cast as those of `F.linear` are."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_head(
    hidden: object, lm_head: object, bias: object, logit_softcap: object, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A head's tensors, checked against each other, and cast as autocast asks; errors name `{prefix}hidden` etc."""
    for name, value in ((f"{prefix}hidden", hidden), (f"{prefix}lm_head", lm_head)):
        checks.check_floating(name, value)
    assert isinstance(hidden, torch.Tensor)
    assert isinstance(lm_head, torch.Tensor)
    if hidden.dim() == 0:
        raise ValueError(f"{prefix}hidden must have shape [..., H], got a 0-d tensor")
    if lm_head.dim() != 2:
        raise ValueError(f"{prefix}lm_head must be two-dimensional [V, H], got shape {tuple(lm_head.shape)}")
    if 0 in lm_head.shape:
        raise ValueError(f"{prefix}lm_head must have at least one token and one feature, got {tuple(lm_head.shape)}")
    if hidden.shape[-1] != lm_head.shape[1]:
        raise ValueError(f"{prefix}hidden has H = {hidden.shape[-1]}, but {prefix}lm_head has H = {lm_head.shape[1]}")
    checks.check_same_device(f"{prefix}lm_head", lm_head, f"{prefix}hidden", hidden)
    if bias is not None:
        checks.check_floating(f"{prefix}bias", bias)
        assert isinstance(bias, torch.Tensor)
        if tuple(bias.shape) != (lm_head.shape[0],):
            raise ValueError(f"{prefix}bias must have shape ({lm_head.shape[0]},), got {tuple(bias.shape)}")
        checks.check_same_device(f"{prefix}bias", bias, f"{prefix}hidden", hidden)
    if logit_softcap is not None:
        compute = compute_dtype(hidden.dtype)
        checks.positive_number("logit_softcap", logit_softcap, compute, "a number or None")
    hidden, lm_head = autocasted(hidden, lm_head)
    assert hidden is not None
    assert lm_head is not None
    if hidden.dtype != lm_head.dtype:
        raise TypeError(
            f"{prefix}hidden and {prefix}lm_head must have one dtype, got {hidden.dtype} and {lm_head.dtype}"
        )
    return hidden, lm_head, bias


def check_reference_rows(
    head: Head, prefix: str = "", noise: Noise | None = None, ids: torch.Tensor | None = None
) -> None:
    """The errors of rows without a distribution, and of given tokens that are masked, for the `reference` backend.

    It would compute with them.
    """
    if not checks.may_read(head.hidden):
        return
    with torch.no_grad():
        logits = without_wrappers(reference.head_logits(*head))
        checks.check_head_rows(checks.bad_rows(logits), prefix)
        if noise is not None:
            checks.check_for_reference(logits, None, ids, logits.shape[1], noise)


def canonical_eps(eps: object) -> float:
    """A probability in [0, 1). What is above 0 and below 2^-64 is raised to that: 1 / eps stays finite in float32."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= float(eps) < 1.0:
        raise ValueError(f"eps must lie in [0, 1), got {eps}")
    return 0.0 if eps == 0 else max(float(eps), LEAST_EPS)


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass can follow, so that its support is worth collecting. Meta tensors have none to collect."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad and t.device.type != "meta" for t in tensors
    )


def fake_support(rows: int, like: torch.Tensor, collected: bool) -> Support:
    """A support without data: of a size that depends on values where it was collected, else empty."""
    entries = torch.library.get_ctx().new_dynamic_size() if collected else 0
    return Support(
        like.new_empty(rows + 1, dtype=torch.int64),
        like.new_empty(entries, dtype=torch.int64),
        like.new_empty(entries),
        like.new_empty(rows, dtype=torch.bool),
    )
