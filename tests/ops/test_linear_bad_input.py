"""Bad input to the operations through the head: the error's type, and that its words name what came and what was meant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import grade_kernels as gk
from tests.support.helpers import ESTIMATORS, raises

# Arguments are checked in front of all backends; what backends find in values, they find by themselves.
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.cover(1)]

N, H, V, D = 3, 4, 6, 2
Op = Callable[..., Any]


def good(device: str = "cpu", **changed: Any) -> dict[str, Any]:
    return {"hidden": torch.ones(N, H, device=device), "lm_head": torch.ones(V, H, device=device), **changed}


def _ste(device: str, **kwargs: Any) -> Any:
    kwargs.setdefault("embedding", torch.ones(V, D, device=device))
    return gk.linear_gumbel_ste(**kwargs)


def _logprobs(device: str, **kwargs: Any) -> Any:
    kwargs.setdefault("ids", torch.zeros(N, dtype=torch.int64, device=device))
    return gk.linear_logprobs(**kwargs)


def _kl(device: str, **kwargs: Any) -> Any:
    for name, x in good(device).items():
        kwargs.setdefault(f"ref_{name}", x)
    return gk.linear_kl(**kwargs)


OPS: dict[str, Op] = {
    "linear_gumbel_ste": _ste,
    "linear_gumbel_ste soft": lambda device, **kwargs: _ste(device, estimator="soft", **kwargs),
    "linear_gumbel_sample": lambda device, **kwargs: gk.linear_gumbel_sample(**kwargs),
    "linear_logprobs": _logprobs,
    "linear_kl": _kl,
    "linear_entropy": lambda device, **kwargs: gk.linear_entropy(**kwargs),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
STATISTICS = {name: op for name, op in OPS.items() if "gumbel" not in name}
every_statistic = pytest.mark.parametrize("op", STATISTICS.values(), ids=STATISTICS)
EPS = {name: op for name, op in OPS.items() if "sample" not in name}
every_op_with_eps = pytest.mark.parametrize("op", EPS.values(), ids=EPS)


def test_good_arguments_are_good(backend: str, device: str) -> None:
    for op in OPS.values():
        op(device, **good(device))
        op(device, **good(device, bias=torch.zeros(V, device=device), logit_softcap=3))


@every_op
def test_features_that_differ(backend: str, device: str, op: Op) -> None:
    with raises(ValueError, "hidden", "lm_head", 4, 5):
        op(device, **good(device, lm_head=torch.ones(V, 5, device=device)))


def test_vocabularies_that_differ(backend: str, device: str) -> None:
    with raises(ValueError, "embedding", 7, V):
        _ste(device, **good(device, embedding=torch.ones(7, D, device=device)))
    with raises(ValueError, "embedding[1]", 5, V):
        tables = (torch.ones(V, D, device=device), torch.ones(5, D, device=device))
        _ste(device, **good(device, embedding=tables))
    with raises(ValueError, "ref_lm_head", 9, V):
        _kl(device, **good(device, ref_lm_head=torch.ones(9, H, device=device)))


@every_op
def test_bias_of_a_wrong_shape(backend: str, device: str, op: Op) -> None:
    for shape in ((V + 1,), (1,), (V, 1), ()):
        with raises(ValueError, "bias", V, shape):
            op(device, **good(device, bias=torch.zeros(shape, device=device)))
    with raises(TypeError, "bias", "int64"):
        op(device, **good(device, bias=torch.zeros(V, dtype=torch.int64, device=device)))


def test_reference_that_does_not_fit(backend: str, device: str) -> None:
    with raises(ValueError, "ref_hidden", (N, "H"), (2, H)):
        _kl(device, **good(device, ref_hidden=torch.ones(2, H, device=device)))
    with raises(ValueError, "ref_hidden", "ref_lm_head", 4, 5):
        _kl(device, **good(device, ref_lm_head=torch.ones(V, 5, device=device)))
    with raises(ValueError, "ref_bias", V, (V + 2,)):
        _kl(device, **good(device, ref_bias=torch.zeros(V + 2, device=device)))
    with raises(TypeError, "ref_hidden", "ref_lm_head", "float16", "float32"):
        _kl(device, **good(device, ref_hidden=torch.ones(N, H, dtype=torch.float16, device=device)))


@every_op
@pytest.mark.parametrize("softcap", [0, 0.0, -1.5, math.nan, math.inf, 1e-60, 1e60])
def test_softcap_not_positive_and_finite(backend: str, device: str, op: Op, softcap: float) -> None:
    with raises(ValueError, "logit_softcap", softcap):
        op(device, **good(device, logit_softcap=softcap))


@every_op
@pytest.mark.parametrize("softcap", ["30", True, [30.0], torch.tensor(30.0)], ids=repr)
def test_softcap_that_is_no_number(backend: str, device: str, op: Op, softcap: Any) -> None:
    with raises(TypeError, "logit_softcap", type(softcap).__name__):
        op(device, **good(device, logit_softcap=softcap))


@every_op_with_eps
@pytest.mark.parametrize("eps", [1, 1.0, -1e-9, 2.0, math.nan, math.inf, np.float32(1.5)], ids=repr)
def test_eps_outside(backend: str, device: str, op: Op, eps: float) -> None:
    with raises(ValueError, "eps", "[0, 1)", eps):
        op(device, **good(device, eps=eps))


@every_op_with_eps
@pytest.mark.parametrize("eps", ["0.1", None, True, torch.tensor(0.1), [0.1]], ids=repr)
def test_eps_that_is_no_number(backend: str, device: str, op: Op, eps: Any) -> None:
    with raises(TypeError, "eps", type(eps).__name__):
        op(device, **good(device, eps=eps))


@every_statistic
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, math.inf, 1e-60, 1e60])
def test_temperature_not_positive_and_finite(backend: str, device: str, op: Op, temperature: float) -> None:
    with raises(ValueError, "temperature", temperature):
        op(device, **good(device, temperature=temperature))


@every_statistic
@pytest.mark.parametrize("temperature", ["1", None, True, torch.tensor(1.0)], ids=repr)
def test_temperature_that_is_no_number(backend: str, device: str, op: Op, temperature: Any) -> None:
    with raises(TypeError, "temperature", type(temperature).__name__):
        op(device, **good(device, temperature=temperature))


@every_op
def test_dtypes_that_differ(backend: str, device: str, op: Op) -> None:
    with raises(TypeError, "hidden", "lm_head", "float32", "bfloat16"):
        op(device, **good(device, lm_head=torch.ones(V, H, dtype=torch.bfloat16, device=device)))


@every_op
@pytest.mark.parametrize("name", ["hidden", "lm_head"])
def test_tensors_of_a_wrong_type(backend: str, device: str, op: Op, name: str) -> None:
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with raises(TypeError, name, dtype):
            op(device, **good(device, **{name: torch.ones(V, H, device=device).to(dtype)}))
    with raises(TypeError, name, "torch.sparse_coo"):
        op(device, **good(device, **{name: torch.ones(V, H, device=device).to_sparse()}))
    for value in (None, 1.0, [[1.0]], np.ones((N, H), dtype=np.float32)):
        with raises(TypeError, name, type(value).__name__):
            op(device, **good(device, **{name: value}))


@every_op
def test_shapes(backend: str, device: str, op: Op) -> None:
    with raises(ValueError, "hidden", "0-d"):
        op(device, **good(device, hidden=torch.ones((), device=device)))
    for shape in ((H,), (1, V, H), ()):
        with raises(ValueError, "lm_head", shape):
            op(device, **good(device, lm_head=torch.ones(shape, device=device)))
    with raises(ValueError, "lm_head", (0, H)):
        op(device, **good(device, lm_head=torch.ones(0, H, device=device)))
    with raises(ValueError, "lm_head", (V, 0)):
        op(device, **good(device, hidden=torch.ones(N, 0, device=device), lm_head=torch.ones(V, 0, device=device)))


@every_op
def test_devices_that_differ(backend: str, device: str, op: Op) -> None:
    elsewhere = {
        "lm_head": torch.ones(V, H, device="meta"), "bias": torch.zeros(V, device="meta"),
    }  # fmt: skip
    for name, value in elsewhere.items():
        with raises(ValueError, name, "meta", device):
            op(device, **good(device, **{name: value}))


def test_more_devices_that_differ(backend: str, device: str) -> None:
    table, ids = torch.ones(V, D, device="meta"), torch.zeros(N, dtype=torch.int64, device="meta")
    with raises(ValueError, "embedding", "meta", device):
        _ste(device, **good(device, embedding=table))
    for op in (_ste, _logprobs):
        with raises(ValueError, "ids", "meta", device):
            op(device, **good(device, ids=ids))
    with raises(ValueError, "ref_hidden", "meta", device):
        _kl(device, **good(device, ref_hidden=torch.ones(N, H, device="meta"),
                           ref_lm_head=torch.ones(V, H, device="meta")))  # fmt: skip
    with raises(ValueError, "row_ids", "meta", device):
        _ste(device, **good(device, noise=gk.GumbelNoise(1, torch.arange(N, device="meta"))))
    with raises(ValueError, "tau", "meta", device):
        _ste(device, **good(device, tau=torch.ones(N, device="meta")))


@every_op
def test_numbers_of_numpy(backend: str, device: str, op: Op) -> None:
    """A softcap, and where there are any a temperature and an eps, may be NumPy's."""
    numbers: dict[str, Any] = {"logit_softcap": 4.0, "noise": gk.GumbelNoise(1)}
    numbers |= {"eps": 0.25} if op in EPS.values() else {}
    numbers |= {"temperature": 2.0} if op in STATISTICS.values() else {"tau": 2.0} if op in EPS.values() else {}
    expected = op(device, **good(device, **numbers))
    for kind in (np.float64, np.float32, np.float16):
        given = {name: kind(x) if isinstance(x, float) else x for name, x in numbers.items()}
        ours = op(device, **good(device, **given))
        for a, b in zip((ours,) if isinstance(ours, torch.Tensor) else ours,
                        (expected,) if isinstance(expected, torch.Tensor) else expected, strict=True):  # fmt: skip
            assert torch.equal(a, b)
    op(device, **good(device, logit_softcap=np.int64(3)))


@pytest.mark.parametrize("op", [_ste, _logprobs], ids=["linear_gumbel_ste", "linear_logprobs"])
def test_ids(backend: str, device: str, op: Op) -> None:
    ids = torch.zeros(N, dtype=torch.int64, device=device)
    for dtype in (torch.int32, torch.float32, torch.bool):
        with raises(TypeError, "ids", "int64", dtype):
            op(device, **good(device, ids=ids.to(dtype)))
    for shape in ((N, 1), (N + 1,), (), (1, N)):
        with raises(ValueError, "ids", (N,), shape):
            op(device, **good(device, ids=torch.zeros(shape, dtype=torch.int64, device=device)))
    with raises(TypeError, "ids", "list"):
        op(device, **good(device, ids=[0] * N))
    if device == "cpu":
        for wrong in (-1, V, 2**40, -(2**62)):
            with raises(ValueError, "ids", V, wrong, "row 1"):
                op(device, **good(device, ids=torch.tensor([0, wrong, 0])))
    if op is _logprobs:
        with raises(TypeError, "ids", "NoneType"):
            op(device, **good(device, ids=None))


def test_estimator_noise_and_tau(backend: str, device: str) -> None:
    for estimator in ("STE", "gumbel", None, 1):
        with raises(ValueError, "estimator", "ste", "soft", "st", "reinmax"):
            _ste(device, **good(device, estimator=estimator))
    for op in (_ste, OPS["linear_gumbel_sample"]):
        with raises(TypeError, "noise", "int"):
            op(device, **good(device, noise=3))
        with raises(ValueError, "row_ids", N, N + 2):
            op(device, **good(device, noise=gk.GumbelNoise(1, torch.arange(N + 2, device=device))))
    for tau in (0.0, -1.0, math.nan, math.inf):
        with raises(ValueError, "tau", tau):
            _ste(device, **good(device, tau=tau))
        if device == "cpu":
            with raises(ValueError, "tau", tau, "row 2"):
                _ste(device, **good(device, tau=torch.tensor([1.0, 1.0, tau])))
    with raises(ValueError, "tau", (N,), (N + 1,)):
        _ste(device, **good(device, tau=torch.ones(N + 1, device=device)))
    with raises(ValueError, "embedding", "empty"):
        _ste(device, **good(device, embedding=()))


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda device: device != "cpu", "values are not read there")
@every_op
@pytest.mark.parametrize("where", ["hidden", "lm_head", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_distribution(backend: str, device: str, op: Op, where: str, value: float) -> None:
    """NaN and +inf, at the first, a middle and the last token; on a GPU the row reads NaN instead."""
    for token in (0, 300, 599):
        arguments = {"hidden": torch.ones(N, H), "lm_head": torch.ones(600, H), "bias": torch.zeros(600)}
        if where == "hidden":
            arguments["hidden"][1, 2] = value
        else:
            arguments[where][token] = value
        for name, x in (("embedding", torch.ones(600, D)), ("ref_lm_head", torch.ones(600, H))):
            if ("ste" in op.__name__ or op in (OPS["linear_gumbel_ste soft"],)) == (name == "embedding"):
                arguments[name] = x
        if op is not _kl:
            arguments.pop("ref_lm_head", None)
        with raises(ValueError, "row", 1 if where == "hidden" else 0):
            op(device, **arguments)


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda device: device != "cpu", "values are not read there")
@every_op
def test_only_masked_tokens(backend: str, device: str, op: Op) -> None:
    with raises(ValueError, "row 0"):
        op(device, **good(bias=torch.full((V,), -math.inf)))


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda device: device != "cpu", "values are not read there")
@pytest.mark.parametrize("value", [math.nan, math.inf, "masked"])
def test_a_reference_without_a_distribution(backend: str, device: str, value: Any) -> None:
    """A reference model that gives NaN is an error as well, not a NaN divergence."""
    ref_hidden, ref_bias = torch.ones(N, H), torch.zeros(V)
    if value == "masked":
        ref_bias.fill_(-math.inf)
    else:
        ref_hidden[1, 2] = value
    with raises(ValueError, "ref", "row"):
        _kl(device, **good(ref_hidden=ref_hidden, ref_bias=ref_bias))


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda device: device != "cpu", "values are not read there")
@every_op
def test_only_minus_infinity_rows_are_named(backend: str, device: str, op: Op) -> None:
    """The message names the row that is bad, not the first."""
    hidden = torch.ones(N, H)
    hidden[2] = math.nan
    with raises(ValueError, "row 2"):
        op(device, **good(hidden=hidden))


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda device: device != "cpu", "values are not read there")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bad_rows_are_found_for_every_estimator(backend: str, device: str, estimator: str) -> None:
    hidden = torch.ones(N, H)
    hidden[1, 0] = math.nan
    for eps in (0.0, 0.1):
        for wants in (False, True):
            with raises(ValueError, "row 1"):
                _ste(device, **good(hidden=hidden.clone().requires_grad_(wants), estimator=estimator, eps=eps))


# --- noise of given tokens


def test_noise_of_given_tokens_where_none_is_added(backend: str, device: str) -> None:
    """Samplers would have nothing to sample, and statistics draw noise for their support alone."""
    noise = gk.GumbelNoise(1).given(torch.zeros(N, dtype=torch.int64, device=device))
    for name, op in OPS.items():
        if "ste" in name:
            op(device, **good(device, noise=noise))
            continue
        with raises(TypeError, "noise", "GumbelNoise", "PosteriorNoise"):
            op(device, **good(device, noise=noise))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_given_tokens_with_bad_values(
    backend: str, device: str, estimator: str, graph: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    logprobs = torch.full((N,), -1.0, device=device)
    hidden = torch.ones(N, H, device=device, requires_grad=graph)

    def call(ids: list[int], logprobs: torch.Tensor | None, **changed: Any) -> None:
        noise = gk.GumbelNoise(1).given(torch.tensor(ids, device=device), logprobs)
        arguments: dict[str, Any] = {
            **good(device),
            "hidden": hidden,
            "noise": noise,
            "estimator": estimator,
            **changed,
        }
        _ste(device, **arguments)

    some = logprobs if known else None
    call([0, 1, 2], some)
    with raises(ValueError, "ids", V):
        call([0, 1, V], some)
    with raises(ValueError, "ids", (N,), (2,)):
        call([0, 1], logprobs[:2] if known else None)
    bias = torch.zeros(V, device=device)
    bias[1] = -math.inf
    with raises(ValueError, "ids", "-inf", "row 1"):
        call([0, 1, 2], some, bias=bias)
    for wrong in (math.nan, 0.5, -math.inf):
        with raises(ValueError, "logprobs", "row 2"):
            call([0, 1, 2], torch.tensor([0.0, 0.1, wrong], device=device))
    for wrong in (math.nan, math.inf):
        head = torch.ones(V, H, device=device)
        head[5] = wrong
        with raises(ValueError, "hidden", "row 0"):
            call([0, 1, 2], some, lm_head=head)
