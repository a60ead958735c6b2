"""`linear_logprobs`, `linear_kl`, `linear_entropy` without rounding: closed forms, float64, what must be zero."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support.helpers import leaf, randn
from tests.support.problems import Problem, Tensor, capped, close, problem, small_chunks

pytestmark = pytest.mark.usefixtures("poison")
KINDS = ("logprobs", "kl", "entropy")
every_kind = pytest.mark.parametrize("kind", KINDS)
SLIM = {torch.float64: 500.0, torch.float32: 48.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def reference_head(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Another model's head over the same vocabulary, of another width."""
    rows = p.hidden.shape[:-1]
    arguments: dict[str, Any] = {"dtype": p.hidden.dtype, "device": p.hidden.device.type}
    vocab = p.lm_head.shape[0]
    return (
        randn(math.prod(rows), 3, seed=50, **arguments).reshape(*rows, 3), randn(vocab, 3, seed=51, **arguments),
        randn(vocab, seed=52, **arguments),
    )  # fmt: skip


def ids_of(p: Problem) -> Tensor:
    shape = p.hidden.shape[:-1]
    ids = torch.arange(math.prod(shape), device=p.hidden.device).reshape(shape) * 3 % p.lm_head.shape[0]
    return ids if p.bias is None else torch.where(p.bias[ids] == -math.inf, 0, ids)


def call(kind: str, p: Problem, head: tuple[Tensor, Tensor, Tensor | None], temperature: float, eps: float,
         ref: tuple[Tensor, Tensor, Tensor | None] | None = None) -> Tensor:  # fmt: skip
    hidden, lm_head, bias = head
    common: dict[str, Any] = {"bias": bias, "logit_softcap": p.softcap, "temperature": temperature, "eps": eps}
    if kind == "logprobs":
        return gk.linear_logprobs(hidden, lm_head, ids_of(p), **common)
    if kind == "entropy":
        return gk.linear_entropy(hidden, lm_head, **common)
    ref_hidden, ref_lm_head, ref_bias = reference_head(p) if ref is None else ref
    return gk.linear_kl(hidden, lm_head, ref_hidden, ref_lm_head, ref_bias=ref_bias, **common)


def eager(kind: str, p: Problem, head: tuple[Tensor, Tensor, Tensor | None], temperature: float,
          ref: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:  # fmt: skip
    """Materialised logits in the head's dtype, and torch.nn.functional."""
    wide = torch.float64 if head[0].dtype == torch.float64 else torch.float32
    logp = (capped(F.linear(*head).to(wide), p.softcap) / temperature).log_softmax(-1)
    if kind == "logprobs":
        return logp.gather(-1, ids_of(p)[..., None]).squeeze(-1)
    possible = logp > -math.inf
    finite = torch.where(possible, logp, 0.0)
    if kind == "entropy":
        return -(torch.where(possible, logp.exp(), 0.0) * finite).sum(-1)
    logr = (capped(F.linear(*ref).to(wide), p.softcap) / temperature).log_softmax(-1)
    return (torch.where(possible, logp.exp(), 0.0) * (finite - torch.where(possible, logr, 0.0))).sum(-1)


def with_gradients(value: Tensor, p: Problem, inputs: list[Tensor]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad((value * p.dlogprobs.to(value.dtype)).sum(), inputs)]


def check(kind: str, p: Problem, temperature: float = 0.7, slim: float = 1.0, what: str = "") -> None:
    def heads(convert: Any) -> tuple[list[Tensor], tuple, tuple]:
        inputs = [leaf(convert(x)) for x in (p.hidden, p.lm_head, p.bias) if x is not None]
        ref = tuple(convert(x) for x in reference_head(p))
        return inputs, (inputs[0], inputs[1], inputs[2] if p.bias is not None else None), ref

    found = []
    for convert in (lambda x: x, lambda x: x, lambda x: x.double()):
        inputs, head, ref = heads(convert)
        value = call(kind, p, head, temperature, 0.0) if not found else eager(kind, p, head, temperature, ref)
        found.append(with_gradients(value, p, inputs))
    assert found[0][0].dtype == (torch.float64 if p.hidden.dtype == torch.float64 else torch.float32)
    unit = torch.finfo(p.hidden.dtype).eps
    for name, *parts in zip(("value", "d hidden", "d lm_head", "d bias"), *found, strict=False):
        close(*parts, f"{kind} {what} {name}", slim * SLIM[p.hidden.dtype], unit)


@pytest.mark.uncollect_if(
    lambda backend, dtype: backend in ("cpu", "triton") and dtype == torch.float64,
    "float64 through a head runs on the torch backend",
)
@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_combination(
    backend: str, device: str, interpreted: bool, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float64:
        small_chunks(monkeypatch, gather=2**20)
    cases = list(itertools.product((None, "bias", "mask"), (None, 2.5), (0.5, 1, 2.0), ((5,), (2, 1, 2), (), (0,))))
    for bias, softcap, temperature, shape in cases[:: 7 if interpreted else 1]:
        if bias == "mask" and softcap is not None:
            continue
        p = problem(shape, 37 if interpreted else 301, 7, dtype=dtype, bias=bias is not None, mask=bias == "mask",
                    softcap=softcap, device=device)  # fmt: skip
        check(kind, p, temperature, what=f"{bias} softcap {softcap} temperature {temperature} {shape}")


@pytest.mark.uncollect_if(
    lambda backend: backend == "triton", "its backward takes PyTorch's product, which differs in the last bits"
)
@pytest.mark.parametrize("kind", ["logprobs", "entropy"])
@pytest.mark.parametrize("rows", [3, 20])
def test_low_temperature(backend: str, device: str, kind: str, rows: int) -> None:
    """Backward sees the very logits that forward's normaliser counts: a difference grows by 1 / temperature."""
    check(kind, problem((rows,), 300, 64, dtype=torch.float32, device=device), 0.05)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(backend: str, device: str, interpreted: bool, kind: str, dtype: torch.dtype) -> None:
    check(kind, problem((2,) if interpreted else (33,), 131, 33, dtype=dtype, bias=True, softcap=8.0, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_gradient_and_statistics_see_the_same_logits(backend: str, device: str, dtype: torch.dtype) -> None:
    """Cold and narrow: a rounding that one of the two does not see shows up enlarged by the temperature."""
    hidden = 2 * randn(12, 16, dtype=dtype, device=device)
    lm_head, ref = (randn(50, 16, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    gradients = []
    for h, w, r, how in (
        (hidden.double(), lm_head.double(), ref.double(), "exact"),
        (hidden, lm_head, ref, "eager"),
        (hidden, lm_head, ref, "ours"),
    ):
        x = leaf(h)
        if how == "ours":
            kl = gk.linear_kl(x, w, h, r, temperature=0.5, eps=0.0)
        else:
            wide = torch.float64 if how == "exact" else torch.float32
            logp, logr = ((F.linear(a, b).to(wide) / 0.5).log_softmax(-1) for a, b in ((x, w), (h, r)))
            kl = (logp.exp() * (logp - logr)).sum(-1)
        gradients.append(torch.autograd.grad(kl.sum(), x)[0].double())
    exact, plain, ours = gradients
    assert (ours - exact).norm() <= 1.2 * (plain - exact).norm()


@every_kind
def test_only_what_is_asked_for(backend: str, device: str, kind: str) -> None:
    """Each of hidden, head and bias alone; the frozen get None; nothing asked for gives no graph."""
    p = problem((3,), 37, 5, bias=True, device=device)
    for eps in (0.0, 0.05):
        torch.manual_seed(0)
        inputs = [leaf(x) for x in (p.hidden, p.lm_head, p.bias)]
        full = with_gradients(call(kind, p, tuple(inputs), 1.0, eps), p, inputs)[1:]
        for i in range(3):
            torch.manual_seed(0)
            inputs = [leaf(x) if i == k else x for k, x in enumerate((p.hidden, p.lm_head, p.bias))]
            (call(kind, p, tuple(inputs), 1.0, eps) * p.dlogprobs).sum().backward()
            torch.testing.assert_close(inputs[i].grad, full[i], rtol=1e-5, atol=1e-6)
        assert not call(kind, p, (p.hidden, p.lm_head, p.bias), 1.0, eps).requires_grad


def test_reference_is_a_constant(backend: str, device: str) -> None:
    for eps in (0.0, 0.05):
        p = problem((3,), 37, 5, bias=True, device=device)
        ref = tuple(leaf(x) for x in reference_head(p))
        value = call("kl", p, (leaf(p.hidden), p.lm_head, p.bias), 1.0, eps, ref)
        value.sum().backward()
        assert all(x.grad is None for x in ref)
        alone = call("kl", p, (p.hidden, p.lm_head, p.bias), 1.0, eps, ref)
        assert not alone.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ref_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kl_to_a_reference_of_another_dtype(
    backend: str, device: str, dtype: torch.dtype, ref_dtype: torch.dtype
) -> None:
    """A frozen reference in float32 beside a policy in bfloat16, and the other way round."""
    p = problem((5,), 61, 7, bias=True, dtype=dtype, device=device)
    r = problem((5,), 61, 4, bias=True, dtype=ref_dtype, device=device, seed=3)
    hidden = leaf(p.hidden)
    value = call("kl", p, (hidden, p.lm_head, p.bias), 1.0, 0.0, (r.hidden, r.lm_head, r.bias))
    value.sum().backward()
    wide = leaf(p.hidden.double())
    logp = (wide @ p.lm_head.double().T + p.bias.double()).log_softmax(-1)
    logr = (r.hidden.double() @ r.lm_head.double().T + r.bias.double()).log_softmax(-1)
    truth = (logp.exp() * (logp - logr)).sum(-1)
    truth.sum().backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 0.05 if {dtype, ref_dtype} & {torch.bfloat16, torch.float16} else 1e-4
    torch.testing.assert_close(value.double(), truth.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)


def test_logprob_of_a_masked_token(backend: str, device: str) -> None:
    """It is -inf, and the masked logit gets gradient exactly 0 by every way to it."""
    p = problem((2,), 13, mask=True, device=device)
    ids = torch.ones(2, dtype=torch.int64, device=device)
    for softcap in (None, 2.5):
        for eps in (0.0, 0.05):
            head = hidden, lm_head, bias = leaf(p.hidden), leaf(p.lm_head), leaf(p.bias)
            value = gk.linear_logprobs(hidden, lm_head, ids, bias=bias, logit_softcap=softcap, eps=eps)
            assert (value == -math.inf).all()
            dhidden, dlm_head, dbias = torch.autograd.grad(value.sum(), head)
            assert dhidden.isfinite().all()
            assert (dlm_head[1] == 0).all()
            assert dbias[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
def test_kl_of_equal_models_is_zero(backend: str, device: str, dtype: torch.dtype, mask: bool) -> None:
    """So is its gradient, however large the logits."""
    for scale in (1.0, 30.0):
        p = problem((9,), 301, 7, bias=True, mask=mask, scale=scale, dtype=dtype, device=device)
        for eps in (0.0, 2**-5):
            inputs = [leaf(x) for x in (p.hidden, p.lm_head, p.bias)]
            value = call("kl", p, tuple(inputs), 0.9, eps, (p.hidden, p.lm_head, p.bias))
            assert value.abs().max() <= 1e-6 * (1e-8 if dtype == torch.float64 else 1)
            value.sum().backward()
            bound = 2e-5 if dtype == torch.float32 else 1e-12 if dtype == torch.float64 else 1e-2
            for x in inputs:
                # Logits of hundreds: those of forward and backward agree to rounding.
                assert x.grad.abs().max() <= bound * scale**2 * 30


def test_kl_against_closed_forms(backend: str, device: str) -> None:
    """Bernoulli, and uniform against anything: sum p log(p / r)."""
    p, r = 0.9, 0.3
    zero, ones = torch.zeros(1, 1, device=device), torch.ones(2, 1, device=device)
    value = gk.linear_kl(
        zero, ones, zero, ones, bias=torch.tensor([math.log(p), math.log(1 - p)], device=device),
        ref_bias=torch.tensor([math.log(r), math.log(1 - r)], device=device),
    )  # fmt: skip
    expected = p * math.log(p / r) + (1 - p) * math.log((1 - p) / (1 - r))
    assert value.item() == pytest.approx(expected, abs=1e-6)
    logits = randn(57, device=device)
    value = gk.linear_kl(zero, torch.ones(57, 1, device=device), zero, torch.ones(57, 1, device=device),
                         ref_bias=logits, temperature=0.5)  # fmt: skip
    expected = -math.log(57) - (logits.double() / 0.5).log_softmax(0).mean().item()
    assert value.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 2**-6])
def test_kl_through_one_head(backend: str, device: str, interpreted: bool, dtype: torch.dtype, eps: float) -> None:
    """An adapter's policy and its reference share a head, which may then be read once for both."""
    for n in (1, 3) if interpreted else (1, 9, 16, 33):
        p = problem((n,), 301, 7, bias=True, dtype=dtype, device=device)
        ref = randn(n, 7, dtype=dtype, device=device, seed=9)
        found = []
        for head in (p.lm_head, p.lm_head.clone()):
            hidden = leaf(p.hidden)
            torch.manual_seed(0)  # of the support
            value = call("kl", p, (hidden, p.lm_head, p.bias), 0.8, eps, (ref, head, p.bias))
            value.sum().backward()
            found.append((value.detach(), hidden.grad))
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_kl_is_never_negative(backend: str, device: str, interpreted: bool) -> None:
    """Beyond rounding: models that differ in their last bits, and ones that differ a lot."""
    n = 3 if interpreted else 400
    p = problem((n,), 301, 7, bias=True, device=device)
    for nudge in (1e-7, 1e-4, 1e-1, 3.0):
        value = call("kl", p, (p.hidden, p.lm_head, p.bias), 1.0, 0.0, (p.hidden * (1 + nudge), p.lm_head, p.bias))
        assert value.min() >= -2e-6
        assert value.isfinite().all()


def test_kl_with_masks(backend: str, device: str) -> None:
    """Tokens masked in both count nothing; a token only the policy masks neither; one only the reference masks: inf."""
    p = problem((3,), 30, 5, bias=True, device=device)
    free = torch.zeros(30, device=device)
    first = free.clone()
    first[10:25] = -math.inf
    both = call("kl", p, (p.hidden, p.lm_head, first), 1.0, 0.0, (p.hidden * 0.5, p.lm_head, first))
    keep = first > -math.inf
    expected = call("kl", p, (p.hidden, p.lm_head[keep], free[keep]), 1.0, 0.0,
                    (p.hidden * 0.5, p.lm_head[keep], free[keep]))  # fmt: skip
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)
    hidden = leaf(p.hidden)
    policy_only = call("kl", p, (hidden, p.lm_head, first), 1.0, 0.05, (p.hidden, p.lm_head, free))
    assert policy_only.isfinite().all()
    assert torch.autograd.grad(policy_only.sum(), hidden)[0].isfinite().all()
    reference_only = call("kl", p, (p.hidden, p.lm_head, free), 1.0, 0.0, (p.hidden, p.lm_head, first))
    assert (reference_only == math.inf).all()


def test_kl_is_infinite_wherever_the_forbidden_token_is(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the normaliser rises by a lot after it, in another chunk: inf, not NaN."""
    small_chunks(monkeypatch)
    bias, ref_bias = torch.zeros(600, device=device), torch.zeros(600, device=device)
    ref_bias[3] = -math.inf
    bias[500] = 80.0
    zero, ones = torch.zeros(1, 1, device=device), torch.ones(600, 1, device=device)
    value = gk.linear_kl(zero, ones, zero, ones, bias=bias, ref_bias=ref_bias)
    assert value.item() == math.inf


@pytest.mark.parametrize("vocab", [1, 2, 17, 1031])
def test_entropy_of_uniform(backend: str, device: str, vocab: int) -> None:
    zero = torch.zeros(2, 3, device=device)
    for temperature in (0.25, 1.0, 4.0):
        value = gk.linear_entropy(zero, torch.ones(vocab, 3, device=device), temperature=temperature)
        assert value.tolist() == pytest.approx([math.log(vocab)] * 2, abs=4e-6)
    certain = torch.zeros(vocab, device=device)
    certain[vocab // 2] = 300.0
    value = gk.linear_entropy(zero, torch.ones(vocab, 3, device=device), bias=certain)
    assert value.tolist() == pytest.approx([0.0] * 2, abs=1e-6)


def test_entropy_of_masked_tokens(backend: str, device: str) -> None:
    bias = torch.full((300,), -math.inf, device=device)
    bias[280:285] = 0.0
    value = gk.linear_entropy(torch.zeros(1, 2, device=device), torch.ones(300, 2, device=device), bias=bias)
    assert value.item() == pytest.approx(math.log(5), abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 64.0, 4096.0])
@every_kind
def test_a_constant_on_all_logits_changes_nothing(backend: str, device: str, kind: str, offset: float) -> None:
    """Softmax does not see it, and nothing is averaged at the size of the constant."""
    bias = torch.arange(40, device=device) % 7 * 1.0
    p = problem((1,), 40, 1, device=device)._replace(hidden=torch.zeros(1, 1, device=device), bias=bias)
    ref = (p.hidden, p.lm_head, (torch.arange(40, device=device) % 5 * 1.0))
    expected = call(kind, p, (p.hidden, p.lm_head, bias), 1.0, 0.0, ref)
    both = (*ref[:2], ref[2] + offset)
    for policy, reference in ((bias + offset, ref), (bias, both), (bias + offset, both)):
        moved = call(kind, p, (p.hidden, p.lm_head, policy), 1.0, 0.0, reference)
        torch.testing.assert_close(moved, expected, rtol=4e-6, atol=1e-6)


def test_logprobs_sum_to_one(backend: str, device: str) -> None:
    vocab = 67
    p = problem((1,), vocab, 7, bias=True, softcap=3.0, device=device)
    value = gk.linear_logprobs(
        p.hidden.expand(vocab, 7), p.lm_head, torch.arange(vocab, device=device), bias=p.bias, logit_softcap=3.0,
        temperature=0.6,
    )  # fmt: skip
    assert value.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (value <= 0).all()


def test_a_distant_cap_changes_nothing(backend: str, device: str) -> None:
    p, ids = problem((3,), 131, 7, device=device), torch.tensor([0, 64, 130], device=device)
    free = gk.linear_logprobs(p.hidden, p.lm_head, ids)
    for softcap in (1e5, 1e20, 1e38):
        torch.testing.assert_close(gk.linear_logprobs(p.hidden, p.lm_head, ids, logit_softcap=softcap), free)


def test_logprobs_are_those_of_the_sampler(backend: str, device: str, rows: int) -> None:
    p = problem((rows,), 131, 7, bias=True, softcap=4.0, device=device)
    ids, logprobs = gk.linear_gumbel_sample(p.hidden, p.lm_head, bias=p.bias, logit_softcap=4.0, noise=p.noise)
    again = gk.linear_logprobs(p.hidden, p.lm_head, ids, bias=p.bias, logit_softcap=4.0)
    torch.testing.assert_close(again, logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.uncollect_if(
    lambda backend: backend in ("cpu", "triton"), "float64 through a head runs on the torch backend"
)
@every_kind
def test_gradcheck(backend: str, device: str, kind: str) -> None:
    p = problem((2,), 11, 3, dtype=torch.float64, bias=True, softcap=2.0, device=device)
    inputs = tuple(leaf(x) for x in (p.hidden, p.lm_head, p.bias))
    assert torch.autograd.gradcheck(lambda *head: call(kind, p, head, 0.7, 0.0), inputs)


@every_kind
def test_value_does_not_depend_on_eps(backend: str, device: str, kind: str) -> None:
    """Forward is exact at every eps, with a graph and without."""
    p = problem((3,), 131, 7, bias=True, device=device)
    exact = call(kind, p, (p.hidden, p.lm_head, p.bias), 1.0, 0.0)
    for eps in (2**-11, 0.9):
        for hidden in (p.hidden, leaf(p.hidden)):
            value = call(kind, p, (hidden, p.lm_head, p.bias), 1.0, eps)
            torch.testing.assert_close(value.detach(), exact, rtol=1e-6, atol=1e-6)
