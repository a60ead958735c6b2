"""Every row of the table of bad input, for every operation and backend: the error's type, and what its words name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import grade_kernels as gk
from grade_kernels.backends import Noise, Rows
from tests.support.helpers import raises, resize

# Arguments are checked in front of all backends; what backends find in values, they find by themselves.
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.cover(1)]

VOCAB = 5
Op = Callable[..., Any]


def _sample(logits: Any, **kwargs: Any) -> Any:
    kwargs.pop("tau", None)
    return gk.gumbel_sample(logits, **kwargs)


def _embedding(logits: Any, tau: Any = 1.0, **kwargs: Any) -> Any:
    shape = logits.shape if isinstance(logits, torch.Tensor) and logits.dim() else (VOCAB,)
    table = torch.ones(shape[-1], 2, device=logits.device if isinstance(logits, torch.Tensor) else "cpu")
    return gk.gumbel_ste_embedding(logits, kwargs.pop("embedding", table), tau, **kwargs)


OPS: dict[str, Op] = {
    "gumbel_sample": _sample,
    "gumbel_softmax": gk.gumbel_softmax,
    "gumbel_softmax hard": lambda logits, tau=1.0, **kwargs: gk.gumbel_softmax(logits, tau, True, **kwargs),
    "gumbel_ste": gk.gumbel_ste,
    "gumbel_ste_embedding": _embedding,
    "gumbel_ste_embedding soft": lambda logits, tau=1.0, **kwargs: _embedding(logits, tau, estimator="soft", **kwargs),
}
WITH_TAU = {name: op for name, op in OPS.items() if name != "gumbel_sample"}
WITH_DIM = {name: op for name, op in OPS.items() if "embedding" not in name}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_op_with_tau = pytest.mark.parametrize("op", WITH_TAU.values(), ids=WITH_TAU)


def logits_on(device: str, *shape: int) -> torch.Tensor:
    return torch.zeros(*(shape or (3, VOCAB)), device=device)


# --- tau


@every_op_with_tau
@pytest.mark.parametrize("tau", [0, 0.0, -0.0, -1.5, math.nan, math.inf, -math.inf, np.float32(-2)])
def test_tau_not_positive_and_finite(backend: str, device: str, op: Op, tau: float) -> None:
    with raises(ValueError, "tau", tau):
        op(logits_on(device), tau)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if device == "cpu":
            with raises(ValueError, "tau", float(tau)):
                op(logits_on(device), torch.tensor(float(tau), dtype=dtype))


@every_op_with_tau
def test_tau_of_a_row_not_positive_and_finite(
    backend: str, device: str, op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0.0, -1.5, math.nan, math.inf):
        tau = torch.tensor([1.0, value, 1.0], device=device)
        if device != "cpu":
            op(logits_on(device), tau)  # a tensor's values are not read there, unless asked for
            monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
        with raises(ValueError, "tau", value):
            op(logits_on(device), tau)
        monkeypatch.delenv("GRADE_KERNELS_CHECK", raising=False)


@every_op_with_tau
@pytest.mark.parametrize("shape", [(2,), (4,), (3, VOCAB), (3, 2), (1, 3), (VOCAB,), (1, VOCAB), (0,), (3, 1, 1)])
def test_tau_of_a_wrong_shape(backend: str, device: str, op: Op, shape: tuple[int, ...]) -> None:
    with raises(ValueError, "tau", shape, (3,)):
        op(logits_on(device), torch.ones(shape, device=device))


@every_op_with_tau
@pytest.mark.parametrize(
    "tau", ["1", None, [1.0], (1.0,), 1j, True, object(), np.ones(3)], ids=lambda tau: type(tau).__name__
)
def test_tau_that_is_no_number(backend: str, device: str, op: Op, tau: Any) -> None:
    with raises(TypeError, "tau", type(tau).__name__):
        op(logits_on(device), tau)


@every_op_with_tau
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_tau_of_a_wrong_dtype(backend: str, device: str, op: Op, dtype: torch.dtype) -> None:
    with raises(TypeError, "tau", dtype):
        op(logits_on(device), torch.ones((), dtype=dtype, device=device))


@every_op_with_tau
def test_tau_is_checked_for_an_empty_batch(backend: str, device: str, op: Op) -> None:
    """A wrong number is wrong before the first row arrives; so is one that float32 does not tell from such a number."""
    for tau in (0.0, -1.0, math.nan, math.inf, 1e-39, 1e-60, 1e60):
        with raises(ValueError, "tau", tau):
            op(logits_on(device, 0, VOCAB), tau)


# --- types


@every_op
@pytest.mark.parametrize(
    "logits", [None, 1.0, [[1.0, 2.0]], np.zeros((2, 3)), "logits"], ids=lambda x: type(x).__name__
)
def test_logits_that_are_no_tensor(backend: str, op: Op, logits: Any) -> None:
    with raises(TypeError, "logits", type(logits).__name__):
        op(logits)


@every_op
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128]
)
def test_logits_of_a_wrong_dtype(backend: str, device: str, op: Op, dtype: torch.dtype) -> None:
    with raises(TypeError, "logits", dtype):
        op(torch.zeros(3, VOCAB, dtype=dtype, device=device))
    with raises(TypeError, "logits", "torch.sparse_coo"):
        op(torch.zeros(3, VOCAB, device=device).to_sparse())
    with raises(TypeError, "logits", "nested"):
        gk.gumbel_softmax(torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], device=device))


@every_op
@pytest.mark.parametrize("noise", [0, 1.5, "noise", torch.tensor(3), torch.Generator(), gk.GumbelNoise],
                         ids=["int", "float", "str", "tensor", "generator", "class"])  # fmt: skip
def test_noise_that_is_no_gumbel_noise(backend: str, device: str, op: Op, noise: Any) -> None:
    with raises(TypeError, "noise", "GumbelNoise", type(noise).__name__):
        op(logits_on(device), noise=noise)


def embed(device: str, **kwargs: Any) -> Any:
    arguments = {"embedding": torch.ones(VOCAB, 2, device=device), **kwargs}
    return gk.gumbel_ste_embedding(logits_on(device), **arguments)


def test_embedding_of_a_wrong_type(backend: str, device: str) -> None:
    good = torch.ones(VOCAB, 2, device=device)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with raises(TypeError, "embedding", dtype):
            embed(device, embedding=good.to(dtype))
        with raises(TypeError, "embedding[1]", dtype):
            embed(device, embedding=(good, good.to(dtype)))
    for wrong in (None, 3, "table", np.ones((VOCAB, 2)), torch.nn.Embedding(VOCAB, 2)):
        with raises(TypeError, "embedding", type(wrong).__name__):
            embed(device, embedding=wrong)
        with raises(TypeError, "embedding[0]", type(wrong).__name__):
            embed(device, embedding=(wrong, good))


def test_ids_of_a_wrong_type(backend: str, device: str) -> None:
    for dtype in (torch.int32, torch.float32, torch.bool, torch.uint8):
        with raises(TypeError, "ids", dtype):
            embed(device, ids=torch.zeros(3, dtype=dtype, device=device))
    for wrong in ([0, 1, 2], 1, np.zeros(3, dtype=np.int64)):
        with raises(TypeError, "ids", type(wrong).__name__):
            embed(device, ids=wrong)


def test_estimator_that_is_not_known(backend: str, device: str) -> None:
    for wrong in ("STE", "gumbel", "", None, 3):
        with raises(ValueError, "estimator", repr(wrong), "ste", "soft", "st", "reinmax"):
            embed(device, estimator=wrong)


# --- shapes


@every_op
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0), (2, 3, 0)])
def test_empty_vocabulary(backend: str, device: str, op: Op, shape: tuple[int, ...]) -> None:
    with raises(ValueError, "logits", shape):
        op(torch.zeros(shape, device=device))


@pytest.mark.parametrize("op", WITH_DIM.values(), ids=WITH_DIM)
def test_empty_vocabulary_at_dim(backend: str, device: str, op: Op) -> None:
    with raises(ValueError, "logits", (3, 0, 4)):
        op(torch.zeros(3, 0, 4, device=device), dim=1)


@pytest.mark.parametrize("shape", [(VOCAB,), (VOCAB, 2, 1), ()])
def test_table_that_is_not_two_dimensional(backend: str, device: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, "embedding", shape):
        embed(device, embedding=torch.ones(shape, device=device))
    with raises(ValueError, "embedding[1]", shape):
        embed(device, embedding=(torch.ones(VOCAB, 2, device=device), torch.ones(shape, device=device)))


def test_no_table(backend: str, device: str) -> None:
    with raises(ValueError, "embedding", "at least one"):
        embed(device, embedding=())


@pytest.mark.parametrize("count", [0, 1, VOCAB - 1, VOCAB + 1])
def test_rows_of_a_table(backend: str, device: str, count: int) -> None:
    with raises(ValueError, "embedding", count, VOCAB):
        embed(device, embedding=torch.ones(count, 2, device=device))
    with raises(ValueError, "embedding[1]", count, VOCAB):
        embed(device, embedding=(torch.ones(VOCAB, 2, device=device), torch.ones(count, 2, device=device)))


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**31, 2**40, -(2**63)])
def test_ids_out_of_range(backend: str, device: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([0, wrong, 1], device=device)
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    with raises(ValueError, "ids", wrong, VOCAB):
        embed(device, ids=ids)
    if device == "cpu":
        monkeypatch.delenv("GRADE_KERNELS_CHECK")
        with raises(ValueError, "ids", wrong, VOCAB):
            embed(device, ids=ids)


@pytest.mark.parametrize("shape", [(), (2,), (4,), (3, 1), (1, 3), (0,)])
def test_ids_of_a_wrong_shape(backend: str, device: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, "ids", shape, (3,)):
        embed(device, ids=torch.zeros(shape, dtype=torch.int64, device=device))


@every_op
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_row_ids_of_a_wrong_length(backend: str, device: str, op: Op, count: int) -> None:
    noise = gk.GumbelNoise(1, torch.zeros(count, dtype=torch.int64, device=device))
    with raises(ValueError, "row_ids", count, 3):
        op(logits_on(device), noise=noise)


@pytest.mark.parametrize("op", WITH_DIM.values(), ids=WITH_DIM)
@pytest.mark.parametrize("dim", [2, -3, 100])
def test_dim_out_of_range(backend: str, device: str, op: Op, dim: int) -> None:
    """The very error of PyTorch."""
    with pytest.raises(IndexError) as theirs:
        torch.softmax(logits_on(device), dim)
    with pytest.raises(IndexError) as ours:
        op(logits_on(device), dim=dim)
    assert str(ours.value) == str(theirs.value)


@every_op_with_tau
def test_tau_that_may_mean_two_things(backend: str, device: str, op: Op) -> None:
    """One value per row, or one per token as PyTorch broadcasts it: refused, and the message says what would not be."""
    for shape, given in (((4, 4), (4,)), ((2, 3, 6), (6,)), ((4, 4, 4), (4, 4)), ((1, 4), (4,)), ((4,), (4,))):
        with raises(ValueError, "tau", given, shape, "token", (*shape[:-1], 1)):
            op(logits_on(device, *shape), torch.ones(given, device=device))
    if op in WITH_DIM.values():
        for given in ((2, 5), (2, 2, 5)):
            with raises(ValueError, "tau", given, "token", (2, 1, 5)):
                op(logits_on(device, 2, 2, 5), torch.ones(given, device=device), dim=1)


@pytest.mark.parametrize("op", WITH_DIM.values(), ids=WITH_DIM)
def test_0d_logits(backend: str, device: str, op: Op) -> None:
    """One token, as for PyTorch, and its errors."""
    for dim in (-1, 0):
        y = op(torch.zeros((), device=device), dim=dim)
        assert y.shape == ()
        assert y == (0 if op is _sample else 1)
        assert y.dtype == (torch.int64 if op is _sample else torch.float32)
    with pytest.raises(IndexError) as theirs:
        torch.softmax(torch.zeros((), device=device), 1)
    with pytest.raises(IndexError) as ours:
        op(torch.zeros((), device=device), dim=1)
    assert str(ours.value) == str(theirs.value)
    if op is not _sample:
        for tau in (0.5, torch.tensor(0.5, device=device), torch.tensor([0.5], device=device)):
            x = torch.zeros((), device=device, requires_grad=True)
            assert torch.autograd.grad(op(x, tau, noise=gk.GumbelNoise(1)), x)[0] == 0
        with raises(ValueError, "tau", (2,)):
            op(torch.zeros((), device=device), torch.ones(2, device=device))


@pytest.mark.parametrize("estimator", ["ste", "soft"])
def test_0d_logits_of_a_lookup(backend: str, device: str, estimator: str) -> None:
    with raises(IndexError, "logits", "[..., V]", "0-d"):
        gk.gumbel_ste_embedding(torch.zeros((), device=device), torch.ones(1, 2, device=device), estimator=estimator)


# torch.softmax(x, dim) takes a 0-d tensor of whole numbers, and no other.
TENSORS_THAT_ARE_NO_INT = torch.tensor(1.0), torch.tensor(True), torch.tensor([1])


@pytest.mark.parametrize("op", WITH_DIM.values(), ids=WITH_DIM)
def test_dim_that_is_no_int(backend: str, device: str, op: Op) -> None:
    for wrong in (1.0, "0", None, True, np.float64(1), np.bool_(True), [1], *TENSORS_THAT_ARE_NO_INT):
        with raises(TypeError, "dim", type(wrong).__name__):
            op(logits_on(device), dim=wrong)


@pytest.mark.parametrize("op", WITH_DIM.values(), ids=WITH_DIM)
def test_numbers_of_numpy(backend: str, device: str, op: Op) -> None:
    """A number is a number: dim, tau, vocab_start and seed take NumPy's as they take Python's; ints may be 0-d tensors."""
    logits = torch.linspace(-1, 1, 3 * VOCAB, device=device).view(3, VOCAB)
    expected = op(logits, dim=0, noise=gk.GumbelNoise(3, vocab_start=7), tau=2.0)
    for integer in (np.int64, np.int32, np.uint8):
        noise = gk.GumbelNoise(integer(3), vocab_start=integer(7))
        assert torch.equal(op(logits, dim=integer(0), noise=noise, tau=integer(2)), expected)
    for integer in (torch.tensor, np.array):
        noise = gk.GumbelNoise(3, vocab_start=integer(7))
        assert torch.equal(op(logits, dim=integer(0), noise=noise, tau=2.0), expected)
    for floating in (np.float64, np.float32, np.float16):
        assert torch.equal(op(logits, dim=np.int64(0), noise=noise, tau=floating(2)), expected)


def test_scripts() -> None:
    """torch.jit.script says in one sentence what cannot be done and what can, wherever the operation is called."""

    def user(x: torch.Tensor) -> torch.Tensor:
        return gk.gumbel_softmax(x)

    for name in gk.__all__:
        if name.startswith(("gumbel_", "linear_")):
            with raises(RuntimeError, f"grade_kernels.{name} cannot be scripted", "torch.compile"):
                torch.jit.script(getattr(gk, name))
    with raises(RuntimeError, "grade_kernels.gumbel_softmax cannot be scripted", "torch.compile"):
        torch.jit.script(user)


# --- devices


@every_op_with_tau
def test_tensors_on_different_devices(backend: str, device: str, op: Op) -> None:
    """`meta` stands for a second device on machines that have one. A 0-d tau is a tensor like any other."""
    for tau in (torch.ones(3, device="meta"), torch.ones((), device="meta")):
        with raises(ValueError, "tau", "'meta'", device):
            op(logits_on(device), tau)


@every_op
def test_noise_on_another_device(backend: str, device: str, op: Op) -> None:
    with raises(ValueError, "row_ids", "'meta'", device):
        op(logits_on(device), noise=gk.GumbelNoise(1, torch.zeros(3, dtype=torch.int64, device="meta")))
    with raises(ValueError, "seed", "'meta'", device):
        op(logits_on(device), noise=gk.GumbelNoise(torch.zeros((), dtype=torch.int64, device="meta")))


def test_tables_and_ids_on_another_device(backend: str, device: str) -> None:
    good = torch.ones(VOCAB, 2, device=device)
    with raises(ValueError, "embedding", "'meta'", device):
        embed(device, embedding=good.to("meta"))
    with raises(ValueError, "embedding[1]", "'meta'", device):
        embed(device, embedding=(good, good.to("meta")))
    with raises(ValueError, "ids", "'meta'", device):
        embed(device, ids=torch.zeros(3, dtype=torch.int64, device="meta"))


# --- rows without a distribution

BAD_ROWS = {
    "nan": [0.0, math.nan, 0.0, 1.0, 0.0],
    "nan at the end": [0.0, 0.0, 0.0, 1.0, math.nan],
    "+inf": [0.0, math.inf, 0.0, 1.0, 0.0],
    "+inf at the start": [math.inf, 0.0, 0.0, 1.0, -math.inf],
    "nan and +inf": [math.inf, math.nan, 0.0, 1.0, -math.inf],
    "nan among -inf": [-math.inf, -math.inf, math.nan, -math.inf, -math.inf],
    "only -inf": [-math.inf] * VOCAB,
}


def with_bad_rows(values: list[float], dtype: torch.dtype, device: str, *bad: int) -> torch.Tensor:
    logits = torch.zeros(4, VOCAB, dtype=dtype)
    logits[list(bad)] = torch.tensor(values, dtype=dtype)
    return logits.to(device)


@pytest.mark.cover(2)
@every_op
@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_row_without_a_distribution(
    backend: str, device: str, interpreted: bool, op: Op, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first such row is named, counted over all leading dimensions."""
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1" if device != "cpu" else "0")
    for bad in ((0,), (2,), (3,), (1, 3))[:: 3 if interpreted else 1]:
        with raises(ValueError, "logits", f"row {bad[0]}"):
            op(with_bad_rows(BAD_ROWS[kind], dtype, device, *bad))
    with raises(ValueError, "logits", "row 2"):
        op(with_bad_rows(BAD_ROWS[kind], dtype, device, 2).view(2, 2, VOCAB))


@pytest.mark.cover(2)
@every_op
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_value_far_into_a_long_row(backend: str, device: str, op: Op, kind: str,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Vector lanes, tiles and chunks do not lose it: NaN passes through a comparison-based maximum without a trace."""
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1" if device != "cpu" else "0")
    vocab = 1031
    for at in (0, 15, 16, 17, 255, 512, 1025):
        logits = torch.zeros(2, vocab)
        if kind == "only -inf":
            logits[1] = -math.inf
        else:
            logits[1, at : at + VOCAB] = torch.tensor(BAD_ROWS[kind])
        with raises(ValueError, "logits", "row 1"):
            op(logits.to(device))
        if backend == "triton":
            return


@pytest.mark.cover(2)
@every_op
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_value_in_a_later_chunk(op: Op, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend in chunks of 256 tokens: the running maximum of earlier chunks does not hide it."""
    resize(monkeypatch, chunk=1)
    logits = torch.zeros(2, 1000)
    for at in (0, 254, 300, 990):
        logits[1] = -math.inf if kind == "only -inf" else 0.0
        logits[1, at : at + VOCAB] = torch.tensor(BAD_ROWS[kind])
        with gk.use_backend("torch"), raises(ValueError, "logits", "row 1"):
            op(logits)


@pytest.mark.cover(2)
@every_op
def test_masks_are_legal(backend: str, device: str, op: Op) -> None:
    logits = torch.full((3, VOCAB), -math.inf, device=device)
    logits[:, 2] = torch.tensor([0.0, -1e30, 1e30], device=device)
    out = op(logits)
    if isinstance(out, gk.GumbelSTEEmbedding):
        assert out.ids.tolist() == [2, 2, 2]
        assert out.logprobs.tolist() == [0, 0, 0]
    else:
        assert (out if out.dim() == 1 else out.argmax(-1)).tolist() == [2, 2, 2]


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference has no such module")
@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_rows_stay_alone_on_a_gpu(place: Any, backend: str, device: str, kind: str, dtype: torch.dtype) -> None:
    """What the Triton backend itself does, interpreter included: NaN in that row, an id in range, no
    other row touched. Elsewhere a backend marks the row, and the operation raises.
    """
    chosen = gk.backends.get(backend)
    noise, tau = Noise(torch.tensor(3, device=device), None, 0), torch.full((4,), 0.5, device=device)
    bad = with_bad_rows(BAD_ROWS[kind], dtype, device, 1)
    good = with_bad_rows(BAD_ROWS[kind], dtype, device)
    others = torch.tensor([0, 2, 3], device=device)
    ours, expected = (chosen.sample(x, noise, True) for x in (bad, good))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a[others], b[others])
    if backend != "triton" and device == "cpu":
        assert ours.ids[1] == -1
        return
    assert 0 <= ours.ids[1] < VOCAB
    assert ours.score_max[1].isnan()
    y, _ = chosen.softmax(Rows.of(bad, tau, noise), ours.score_max, normalize=True, dtype=dtype)
    clean, _ = chosen.softmax(Rows.of(good, tau, noise), expected.score_max, normalize=True, dtype=dtype)
    assert y[1].isnan().all()
    assert torch.equal(y[others], clean[others])


@pytest.mark.cover(2)
@pytest.mark.uncollect_if(lambda device: device == "cpu", "on the CPU such a row raises")
@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference is not meant for production")
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_of_operations_on_a_gpu(backend: str, device: str, kind: str) -> None:
    """Without GRADE_KERNELS_CHECK: that row is NaN, its id in range, no other row touched, backward included."""
    bad = with_bad_rows(BAD_ROWS[kind], torch.float32, device, 1).requires_grad_()
    good = with_bad_rows(BAD_ROWS[kind], torch.float32, device).requires_grad_()
    others, noise = torch.tensor([0, 2, 3], device=device), gk.GumbelNoise(3)
    ids = gk.gumbel_sample(bad, noise=noise)
    assert 0 <= ids[1] < VOCAB
    assert torch.equal(ids[others], gk.gumbel_sample(good, noise=noise)[others])
    for hard in (False, True):
        found = []
        for x in (bad, good):
            y = gk.gumbel_softmax(x, 0.5, hard, noise=noise)
            found.append((y, torch.autograd.grad((y * torch.arange(5, device=device)).sum(), x)[0]))
        assert found[0][0][1].isnan().all()
        for a, b in zip(*found, strict=True):
            assert torch.equal(a[others], b[others])
    table = torch.arange(10.0, device=device).view(VOCAB, 2)
    found = []
    for x in (bad, good):
        out = gk.gumbel_ste_embedding(x, table, noise=noise)
        (dx,) = torch.autograd.grad(out.embedding.sum() + out.logprobs.sum(), x)
        found.append((out.embedding, out.logprobs, dx))
    assert found[0][0][1].isnan().all()
    assert found[0][1][1].isnan()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[others], b[others])


# --- GumbelNoise


def test_bad_seeds() -> None:
    for wrong in (1.5, "1", None, True, [1], torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor(True)):
        with raises(TypeError, "seed"):
            gk.GumbelNoise(wrong)  # type: ignore[arg-type]
    for seed in (2**64, -(2**63) - 1):
        with raises(ValueError, "seed", seed):
            gk.GumbelNoise(seed)
    with raises(ValueError, "seed", (1,)):
        gk.GumbelNoise(torch.tensor([1]))


def test_bad_row_ids() -> None:
    for wrong in ([1, 2], 3, torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), np.zeros(2, dtype=np.int64)):
        with raises(TypeError, "row_ids"):
            gk.GumbelNoise(1, wrong)  # type: ignore[arg-type]
    for shape in ((), (1, 2)):
        with raises(ValueError, "row_ids", shape):
            gk.GumbelNoise(1, torch.zeros(shape, dtype=torch.int64))


def test_bad_vocab_start() -> None:
    for wrong in (1.0, "1", None, True):
        with raises(TypeError, "vocab_start", type(wrong).__name__):
            gk.GumbelNoise(1, vocab_start=wrong)  # type: ignore[arg-type]
    for outside in (-1, 2**62, 2**63 - 10, 2**64):
        with raises(ValueError, "vocab_start", outside):
            gk.GumbelNoise(1, vocab_start=outside)


def test_bad_dense() -> None:
    noise = gk.GumbelNoise(1, torch.zeros(3, dtype=torch.int64))
    with raises(ValueError, "row_ids", 3, 2):
        noise.dense(2, 5)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with raises(TypeError, "dtype", dtype):
            noise.dense(3, 5, dtype=dtype)
    for sizes, name in (((-1, 5), "num_rows"), ((3, -5), "vocab_size")):
        with raises(ValueError, name):
            noise.dense(*sizes)
    for wrong in (2.0, "3", None, True):
        for name in ("num_rows", "vocab_size", "vocab_start"):
            with raises(TypeError, name, type(wrong).__name__):
                noise.dense(**{"num_rows": 3, "vocab_size": 5, name: wrong})  # type: ignore[arg-type]
    for outside in (-1, 2**62 - 7, 2**63):
        with raises(ValueError, "vocab_start", outside):
            gk.GumbelNoise(1, vocab_start=7).dense(3, 5, vocab_start=outside)
    with raises(TypeError, "generator"):
        gk.GumbelNoise.from_generator(3)  # type: ignore[arg-type]


@every_op
def test_an_error_leaves_no_trace(backend: str, device: str, op: Op) -> None:
    """Bad arguments raise before a seed is drawn, so that catching the error keeps a run repeatable."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError):
        op(torch.zeros(3, 0, device=device))
    with pytest.raises(TypeError):
        op(torch.zeros(3, 2, dtype=torch.int64, device=device))
    assert torch.equal(torch.get_rng_state(), state)


# --- noise of given tokens


GIVEN = {name: op for name, op in OPS.items() if name != "gumbel_sample"}
every_op_with_given = pytest.mark.parametrize("op", GIVEN.values(), ids=GIVEN)
IDS = torch.tensor([0, 4, 2])


def test_noise_of_given_tokens_where_a_token_is_to_be_sampled(backend: str, device: str) -> None:
    with raises(TypeError, "noise", "GumbelNoise", "PosteriorNoise"):
        gk.gumbel_sample(logits_on(device), noise=gk.GumbelNoise(3).given(IDS.to(device)))


@pytest.mark.parametrize("ids", [None, [0, 1, 2], IDS.int(), IDS.double(), IDS.bool()])
def test_given_tokens_of_a_wrong_type(ids: Any) -> None:
    with raises(TypeError, "ids", "int64"):
        gk.GumbelNoise(3).given(ids)


@pytest.mark.parametrize("logprobs", [0.0, [0.0, -1.0, -1.0], torch.zeros(3, dtype=torch.int64), torch.zeros(3).bool()])
def test_log_probabilities_of_a_wrong_type(logprobs: Any) -> None:
    with raises(TypeError, "logprobs", "floating"):
        gk.GumbelNoise(3).given(IDS, logprobs)


def test_log_probabilities_of_another_shape() -> None:
    with raises(ValueError, "logprobs", (3,), (2,)):
        gk.GumbelNoise(3).given(IDS, torch.zeros(2))


@every_op_with_given
@pytest.mark.parametrize("shape", [(), (2,), (4,), (3, 1), (1, 3), (0,)])
def test_given_tokens_of_a_wrong_shape(backend: str, device: str, op: Op, shape: tuple[int, ...]) -> None:
    with raises(ValueError, "ids", (3,), shape):
        op(logits_on(device), noise=gk.GumbelNoise(3).given(torch.zeros(shape, dtype=torch.int64, device=device)))


@every_op_with_given
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**40, -(2**63)])
def test_given_tokens_out_of_range(
    backend: str, device: str, op: Op, wrong: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    ids = torch.tensor([0, wrong, 1], device=device)
    with raises(ValueError, "ids", VOCAB, wrong):
        op(logits_on(device), noise=gk.GumbelNoise(3).given(ids, torch.zeros(3, device=device) if known else None))


@every_op_with_given
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 0.3, 5.0])
def test_log_probabilities_that_are_none(
    backend: str, device: str, op: Op, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    logprobs = torch.tensor([-1.0, wrong, 0.2], device=device)
    with raises(ValueError, "logprobs", "row 1"):
        op(logits_on(device), noise=gk.GumbelNoise(3).given(IDS.to(device), logprobs))


@every_op_with_given
@pytest.mark.parametrize("known", [False, True])
def test_given_tokens_that_are_masked(
    backend: str, device: str, op: Op, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    logits = logits_on(device)
    logits[1, 4] = -math.inf
    with raises(ValueError, "ids", "-inf", "row 1"):
        op(
            logits,
            noise=gk.GumbelNoise(3).given(IDS.to(device), torch.full((3,), -1.0, device=device) if known else None),
        )


@every_op_with_given
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_given_token_of_a_row_without_a_distribution(
    backend: str, device: str, op: Op, kind: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    bad = with_bad_rows(BAD_ROWS[kind], torch.float32, device, 1)
    ids = torch.full((len(bad),), 2, device=device)
    logprobs = torch.full(ids.shape, -1.0, device=device) if known else None
    with raises(ValueError, "logits", "row 1"):
        op(bad, noise=gk.GumbelNoise(3).given(ids, logprobs))
