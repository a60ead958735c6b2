"""`linear_gumbel_ste` without rounding (eps = 0): every combination of arguments against the formulas in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import grade_kernels as gk
from tests.support.covering import Case, covering
from tests.support.helpers import (
    DTYPES,
    ESTIMATORS,
    assert_same_ids,
    leaf,
    noise_given,
    noise_of,
    randn,
    top_two_gap,
)
from tests.support.problems import (
    GRADIENTS,
    Answer,
    Problem,
    assert_answer,
    by_hand,
    everything,
    flat,
    logits_of,
    loss,
    problem,
    run,
    scores_of,
    small_chunks,
    widened,
)

pytestmark = pytest.mark.usefixtures("poison")

SLIM = {torch.float64: 200.0, torch.float32: 24.0, torch.bfloat16: 1.0, torch.float16: 1.0}
TABLES = {
    "one": (torch.float32,),
    "several": (torch.float32, torch.bfloat16, torch.float64, torch.float16),
}


def unit(dtype: torch.dtype) -> float:
    """Epsilon of the arithmetic whose rounding PyTorch and we do in different orders."""
    return torch.finfo(dtype).eps


def check(p: Problem, wanted: tuple[str, ...] | None = None, what: str = "", slim: float = 1.0) -> Answer:
    """One exact call against the truth, by the tolerance rule."""
    ours = run(p, 0.0, wanted)
    truth, theirs = by_hand(widened(p), ours.ids), by_hand(p, ours.ids)
    if p.ids is not None:
        assert torch.equal(ours.ids, p.ids)
    elif p.hidden.dtype in (torch.float32, torch.float64):
        assert_same_ids(ours.ids, scores_of(p), p.hidden.dtype)
    if p.estimator != "soft":
        for e, table in zip(ours.embedding, p.tables, strict=True):
            assert torch.equal(e, table[ours.ids]), "a looked-up row is a copy"
    assert_answer(ours, theirs, truth, everything(p) if wanted is None else wanted,
                  slim * SLIM[p.hidden.dtype], unit(p.hidden.dtype), what)  # fmt: skip
    return ours


def combinations(estimator: str, dtype: torch.dtype, every: bool) -> list[dict[str, Any]]:
    """Every combination of the other arguments, or those in which each pair of values occurs; leading shapes take turns."""
    shapes = itertools.cycle(((4,), (2, 1, 2), (), (1, 3)))
    choices = itertools.product((None, "bias", "mask"), (None, 2.5), TABLES, (False, True), ("float", "0-d", "row"))
    found, cases = [], []
    for (bias, softcap, tables, given, tau), shape in zip(choices, shapes, strict=False):
        if bias == "mask" and softcap is not None:
            continue  # see test_softcap_leaves_masked_tokens_masked
        table_dtypes = TABLES[tables] if tables == "several" else (dtype,)
        temperature = {"float": 0.7, "0-d": torch.tensor(0.7, dtype=dtype), "row": "row"}[tau]
        found.append({
            "bias": bias is not None, "mask": bias == "mask", "softcap": softcap, "table_dtypes": table_dtypes,
            "given": given, "tau": temperature, "shape": shape, "estimator": estimator, "dtype": dtype,
        })  # fmt: skip
        values = {"bias": bias, "softcap": softcap, "tables": tables, "given": given, "tau": tau, "shape": shape}
        cases.append(Case(str(values), values))
    return found if every else [found[i] for i in sorted(covering(cases))]


@pytest.mark.uncollect_if(
    lambda backend: backend in ("cpu", "triton"), "float64 through a head runs on the torch backend"
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_combination_in_float64(
    backend: str,
    device: str,
    interpreted: bool,
    estimator: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Float64 is served by `torch` and `reference`; all gradients, with one table's dtype narrower or the same."""
    small_chunks(monkeypatch, gather=2**20)
    for i, kwargs in enumerate(combinations(estimator, torch.float64, request.config.getoption("every_combination"))):
        p = problem(vocab=301, features=5, device=device, **kwargs)
        if isinstance(p.tau, torch.Tensor):
            p = p._replace(tau=p.tau.to(device))
        slim = 4.0 if len(kwargs["table_dtypes"]) == 1 else 2.0**44 / SLIM[torch.float64]
        check(p, what=str(kwargs), slim=slim)
        if i % 7 == 0:  # no number of values has this divisor, so each comes up
            check(p, ("hidden",), what=f"hidden alone {kwargs}", slim=slim)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_combination_in_float32(
    backend: str, device: str, interpreted: bool, estimator: str, request: pytest.FixtureRequest
) -> None:
    cases = combinations(estimator, torch.float32, request.config.getoption("every_combination"))
    for kwargs in cases[:: 5 if interpreted else 1]:
        p = problem(vocab=37, features=7, device=device, **kwargs)
        if isinstance(p.tau, torch.Tensor):
            p = p._replace(tau=p.tau.to(device))
        # Through bfloat16 tables dY is rounded, in PyTorch and here, not always the same way: one such rounding more.
        check(p, what=str(kwargs), slim=1.0 if len(kwargs["table_dtypes"]) == 1 else 2.0**15 / SLIM[torch.float32])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES if torch.bfloat16 in (a, b) or a == b],
                         ids=lambda pair: "-".join(str(d)[6:] for d in pair))  # fmt: skip
def test_dtypes(
    backend: str, device: str, interpreted: bool, estimator: str, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    """Head and table of different dtypes; results in the table's, gradients in their tensors'."""
    dtype, table_dtype = pair
    narrow = torch.bfloat16 in pair or torch.float16 in pair
    shape, vocab = ((2,), 67) if interpreted else ((33,), 131)
    p = problem(shape, vocab, 33, dtype=dtype, table_dtypes=(table_dtype,), bias=True, estimator=estimator, device=device,
                tau="row")  # fmt: skip
    ours = run(p)
    truth, theirs = by_hand(widened(p), ours.ids), by_hand(p, ours.ids)
    assert ours.embedding[0].dtype == table_dtype
    assert ours.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    widest = max((dtype, table_dtype), key=lambda d: torch.finfo(d).eps)
    assert_answer(ours, theirs, truth, everything(p), 2.0 if narrow else 48.0, unit(widest), str(pair))
    alone = run(p, 0.0, ("hidden", "tau"))
    assert_answer(alone, theirs, truth, ("hidden", "tau"), 2.0 if narrow else 48.0, unit(widest), f"{pair} alone")


@pytest.mark.parametrize("known", [False, True], ids=["", "known logprobs"])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_of_given_tokens(
    backend: str,
    device: str,
    interpreted: bool,
    estimator: str,
    dtype: torch.dtype,
    softcap: float | None,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunk by chunk, with what is known of the tokens or without: the formulas with the noise of the reference."""
    small_chunks(monkeypatch, gather=2**20)
    p = problem((2, 1) if interpreted else (2, 3), 301, 5, dtype=dtype, table_dtypes=(dtype,), mask=softcap is None,
                softcap=softcap, estimator=estimator, tau="row", device=device)  # fmt: skip
    logits = logits_of(widened(flat(p))).reshape(*p.dlogprobs.shape, -1).to(device)
    check(p._replace(noise=noise_given(p.noise, logits, known=known)))


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float64_with_narrower_tables(backend: str, device: str, estimator: str, eps: float) -> None:
    """Arithmetic is float64, as if the tables had been cast."""
    p = problem(dtype=torch.float64, table_dtypes=(torch.float32, torch.bfloat16), estimator=estimator, device=device)
    wide = p._replace(tables=tuple(t.double() for t in p.tables), upstream=tuple(d.double() for d in p.upstream))
    ours, truth = (run(x, eps, ("hidden", "lm_head")) for x in (p, wide))
    torch.testing.assert_close(ours.hidden, truth.hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lm_head, truth.lm_head, rtol=1e-12, atol=1e-12)


@pytest.mark.uncollect_if(
    lambda backend, dtype: backend == "reference" and dtype != torch.float32, "the reference computes in float32"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_peaked_rows_that_got_another_token(backend: str, device: str, estimator: str, dtype: torch.dtype) -> None:
    """Replay of a token that the relaxation hardly sees: a small gradient, whatever else is asked for.

    One token has nearly all probability, so `p (dY - D)` is nearly nought everywhere: rounding p dY and p D apart would
    leave more of it than the gradient is.
    """
    p = problem((4,), 300, 16, dtype=dtype, estimator=estimator, tau=0.5, device=device)
    winner = (p.lm_head[7].double() / p.lm_head[7].double().norm() ** 2 * 30).to(dtype)
    p = p._replace(hidden=winner.expand(4, 16).contiguous(), dlogprobs=torch.zeros_like(p.dlogprobs),
                   ids=torch.tensor([1, 2, 3, 4], device=device))  # fmt: skip
    for wanted in (("hidden",), ("hidden", "lm_head")):
        ours = run(p, 0.0, wanted).hidden
        truth, eager = (by_hand(x, p.ids).hidden for x in (widened(p), p))
        error, theirs = ((x.double().cpu() - truth).abs().max() for x in (ours, eager))
        size = float(truth.abs().max())
        # Of the order of what PyTorch leaves in the same dtype (float32: of dY's own rounding).
        allowed = 4 * theirs + 0.02 * size + (1e-6 if dtype == torch.float32 else 0)
        assert error <= allowed, f"{wanted}: error {error:.1e}, PyTorch {theirs:.1e}, largest entry {size:.1e}"


@pytest.mark.uncollect_if(
    lambda backend: backend == "triton", "its backward takes PyTorch's product, which differs in the last bits"
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [8, 20])
def test_saturated_rows(backend: str, device: str, estimator: str, rows: int) -> None:
    """Logits in the thousands leave one token, whose log-probability no longer moves: backward sees forward's logits."""
    p = problem((rows,), 300, 64, estimator=estimator, scale=3e3, device=device)
    p = p._replace(upstream=tuple(torch.zeros_like(d) for d in p.upstream))
    assert run(p).hidden.abs().max() <= 1e-6 * p.lm_head.abs().max()


@pytest.mark.uncollect_if(lambda interpreted: interpreted, "70,000 tokens in Triton's interpreter")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float16_sums_over_a_large_vocabulary(backend: str, device: str, interpreted: bool, estimator: str) -> None:
    """Flat logits over 70,000 tokens whose head rows share a direction: a sum without weights would pass 65504."""
    vocab = 70000
    p = problem((1,), vocab, 4, dtype=torch.float16, table_dtypes=(torch.float16,), estimator=estimator, tau=2.0,
                device=device)  # fmt: skip
    p = p._replace(hidden=torch.zeros_like(p.hidden), lm_head=(1 + 0.01 * p.lm_head.double()).half(),
                   dlogprobs=torch.ones_like(p.dlogprobs))  # fmt: skip
    for eps in (0.0, 2**-8):
        for wanted in (("hidden",), ("hidden", "lm_head")):
            answer = run(p, eps, wanted)
            assert answer.hidden.isfinite().all(), f"eps {eps}, {wanted}: {answer.hidden.tolist()}"
            for e in answer.embedding:
                assert e.isfinite().all()
    # Where the temperature is high, the weights of soft lookups, too, add up to as much as their number.
    table = torch.full((vocab, 2), 20.0, dtype=torch.float16, device=device)
    for embedding in (
        gk.linear_gumbel_ste(p.hidden, p.lm_head, table, 30.0, estimator=estimator, noise=noise_of()).embedding,
        gk.gumbel_ste_embedding(p.hidden @ p.lm_head.T, table, 30.0, estimator=estimator, noise=noise_of()).embedding,
    ):
        torch.testing.assert_close(embedding, table[:1])


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_what_is_asked_for(backend: str, device: str, interpreted: bool, estimator: str, eps: float) -> None:
    """Each gradient alone, and all but one: the same numbers, and None for the frozen."""
    p = problem((2,), 37, bias=True, tau="row", estimator=estimator, device=device,
                table_dtypes=(torch.float32, torch.bfloat16))  # fmt: skip
    full = run(p, eps)
    subsets = [(name,) for name in GRADIENTS]
    if not interpreted:
        subsets += [tuple(n for n in GRADIENTS if n != name) for name in GRADIENTS]
    for wanted in subsets:
        part = run(p, eps, wanted)
        for name in GRADIENTS:
            ours, theirs = getattr(part, name), getattr(full, name)
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
                if name in wanted:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, w=wanted: f"{n} of {w}: {m}")  # fmt: skip # noqa: E501
                else:
                    assert a is None, f"{name} has a gradient although only {wanted} were asked for"


def test_one_frozen_table_of_two(backend: str, device: str) -> None:
    for estimator in ("ste", "soft"):
        p = problem((2,), 37, table_dtypes=(torch.float32, torch.float32), device=device, estimator=estimator)
        first, second = leaf(p.tables[0]), p.tables[1]
        out = gk.linear_gumbel_ste(
            leaf(p.hidden), p.lm_head, (first, second), estimator=estimator, noise=p.noise, eps=0.0
        )
        (grad,) = torch.autograd.grad(loss(p, out), first)
        expected = run(p._replace(tau=1.0)).tables[0]
        torch.testing.assert_close(grad, expected)


def test_nothing_asked_for(backend: str, device: str) -> None:
    p = problem((2,), 37, bias=True, device=device)
    out = gk.linear_gumbel_ste(p.hidden, p.lm_head, p.tables[0], bias=p.bias, noise=p.noise)
    assert not out.embedding.requires_grad
    assert not out.logprobs.requires_grad
    with torch.no_grad():
        again = gk.linear_gumbel_ste(leaf(p.hidden), leaf(p.lm_head), leaf(p.tables[0]), bias=p.bias, noise=p.noise)
    assert not again.embedding.requires_grad
    assert torch.equal(out.ids, again.ids)
    assert not out.ids.requires_grad


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tied_head_and_embedding(backend: str, device: str, estimator: str, eps: float) -> None:
    """One parameter in both places gets the sum of the two gradients, once."""
    p = problem((3,), 37, 5, estimator=estimator, device=device)
    weight = p.lm_head
    p = p._replace(tables=(weight,), upstream=(randn(3, 5, device=device, seed=9),))
    apart = run(p, eps)
    tied = leaf(weight)
    calls: list[torch.Tensor] = []
    tied.register_hook(calls.append)
    out = gk.linear_gumbel_ste(leaf(p.hidden), tied, tied, p.tau, estimator=estimator, noise=p.noise, eps=eps)
    ((out.logprobs * p.dlogprobs).sum() + (out.embedding * p.upstream[0]).sum()).backward()
    assert len(calls) == 1
    torch.testing.assert_close(tied.grad, apart.lm_head + apart.tables[0])


@pytest.mark.parametrize("which", ["embedding", "logprobs", "second"])
@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_output_alone(backend: str, device: str, estimator: str, eps: float, which: str) -> None:
    """A loss that uses one output only: what the others would send is nought, not garbage."""
    p = problem((3,), 37, table_dtypes=(torch.float32, torch.float32), bias=True, tau="row", estimator=estimator,
                device=device)  # fmt: skip
    zero = p._replace(
        dlogprobs=p.dlogprobs * (which == "logprobs"),
        upstream=(p.upstream[0] * (which == "embedding"), p.upstream[1] * (which in ("embedding", "second"))),
    )
    expected = run(zero, eps)
    hidden, head, bias, tau = leaf(p.hidden), leaf(p.lm_head), leaf(p.bias), leaf(p.tau)
    tables = tuple(leaf(t) for t in p.tables)
    out = gk.linear_gumbel_ste(hidden, head, tables, tau, bias=bias, estimator=estimator, noise=p.noise, eps=eps)
    total = {
        "logprobs": lambda: (out.logprobs * zero.dlogprobs).sum(),
        "second": lambda: (out.embedding[1] * zero.upstream[1]).sum(),
        "embedding": lambda: sum((e * d).sum() for e, d in zip(out.embedding, zero.upstream, strict=True)),
    }[which]()
    total.backward()
    for ours, theirs in zip(
        (hidden.grad, head.grad, bias.grad, tau.grad, *(t.grad for t in tables)),
        (expected.hidden, expected.lm_head, expected.bias, expected.tau, *expected.tables),
        strict=True,
    ):
        torch.testing.assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_strides(backend: str, device: str, estimator: str, eps: float) -> None:
    """Transposed, sliced and expanded arguments and upstream gradients are what their values are."""
    p = problem((2, 3), 37, 6, bias=True, estimator=estimator, device=device, tau="row")
    expected = run(p, eps)

    def spread(x: torch.Tensor) -> torch.Tensor:
        """The same values with gaps between, dimensions in reversed order in memory."""
        wide = torch.full([2 * n + 1 for n in reversed(x.shape)], float("nan"), dtype=x.dtype, device=x.device)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
        view.copy_(x)
        return view

    ours = run(
        p._replace(hidden=spread(p.hidden), lm_head=spread(p.lm_head), bias=spread(p.bias), tau=spread(p.tau),
                   tables=tuple(spread(t) for t in p.tables), upstream=tuple(spread(d) for d in p.upstream)),
        eps,
    )  # fmt: skip
    for name in Answer._fields:
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (getattr(ours, name), getattr(expected, name))),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # Expanded: one hidden row for all, one upstream number for all.
    row = leaf(p.hidden[0, 0])
    out = gk.linear_gumbel_ste(row.expand(2, 3, 6), p.lm_head, p.tables[0], estimator=estimator, noise=p.noise, eps=eps)
    (a,) = torch.autograd.grad(out.embedding.sum() + out.logprobs.sum(), row)
    copy = leaf(row.expand(2, 3, 6).clone())
    out = gk.linear_gumbel_ste(copy, p.lm_head, p.tables[0], estimator=estimator, noise=p.noise, eps=eps)
    (b,) = torch.autograd.grad((out.embedding * torch.ones_like(out.embedding)).sum() + out.logprobs.sum(), copy)
    torch.testing.assert_close(a, b.sum((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_ids_are_those_of_materialised_logits(
    backend: str, device: str, interpreted: bool, dtype: torch.dtype, softcap: float | None
) -> None:
    """`gumbel_sample` on the logits with the same noise, wherever rounding cannot decide; both functions."""
    rows = 3 if interpreted else 200
    p = problem((rows,), 257, 9, dtype=dtype, bias=True, softcap=softcap, device=device,
                noise=noise_of(5, rows, device, vocab_start=3))  # fmt: skip
    logits = torch.nn.functional.linear(p.hidden.double(), p.lm_head.double(), p.bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = gk.gumbel_sample(logits, noise=p.noise)
    arguments = {"bias": p.bias, "logit_softcap": softcap, "noise": p.noise}
    ids, logprobs = gk.linear_gumbel_sample(p.hidden, p.lm_head, **arguments)
    out = gk.linear_gumbel_ste(p.hidden, p.lm_head, p.tables[0], 0.3, **arguments)
    soft = gk.linear_gumbel_ste(p.hidden, p.lm_head, p.tables[0], 0.3, estimator="soft", **arguments)
    clear = top_two_gap(scores_of(p)) > 4 * torch.finfo(dtype).eps * float(logits.abs().max().clamp(min=8))
    clear = clear.to(device)
    assert clear.double().mean() > 0.6
    for found in (ids, out.ids, soft.ids):
        assert torch.equal(found[clear], expected[clear])
        assert ((found >= 0) & (found < 257)).all()
    truth = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    allowed = 4 * torch.finfo(dtype).eps * float(logits.abs().max().clamp(min=1))
    assert (logprobs.double() - truth).abs().max() <= allowed
    assert logprobs.dtype == torch.float32
    assert not logprobs.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logprob_of_a_certain_token(backend: str, device: str, estimator: str, dtype: torch.dtype) -> None:
    """Whatever rounding a backend's product has, a token without competitors has log-probability 0."""
    p = problem((5,), 3, 33, scale=10.0, dtype=dtype, estimator=estimator, device=device)
    bias = torch.tensor([-float("inf"), 0.0, -float("inf")], dtype=dtype, device=device)
    out = gk.linear_gumbel_ste(p.hidden, p.lm_head, p.tables, bias=bias, estimator=estimator, noise=p.noise)
    assert (out.ids == 1).all()
    torch.testing.assert_close(out.logprobs, torch.zeros_like(out.logprobs), rtol=0, atol=1e-4)


def test_sampling_is_the_training_forward(backend: str, device: str, rows: int) -> None:
    """Rollout and training agree on every token, bit for bit, whatever temperature and estimator."""
    p = problem((rows,), 131, 7, bias=True, softcap=3.0, device=device)
    arguments = {"bias": p.bias, "logit_softcap": 3.0, "noise": p.noise}
    ids, logprobs = gk.linear_gumbel_sample(leaf(p.hidden), leaf(p.lm_head), **arguments)
    assert not logprobs.requires_grad
    for estimator in ESTIMATORS:
        for tau in (0.25, 3.0):
            for hidden in (p.hidden, leaf(p.hidden)):
                out = gk.linear_gumbel_ste(hidden, p.lm_head, p.tables[0], tau, estimator=estimator, **arguments)
                assert torch.equal(out.ids, ids)
                torch.testing.assert_close(out.logprobs.detach(), logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("features", [5, 16, 83])
def test_few_rows_are_sampled_as_many_are(backend: str, device: str, interpreted: bool, features: int) -> None:
    """A decoding step has a row per sequence, for which a backend may have another product."""
    rows, vocab = (9, 37) if interpreted else (40, 1003)
    p = problem((rows,), vocab, features, bias=True, mask=True, softcap=9.0, device=device)
    arguments = {"bias": p.bias, "logit_softcap": 9.0}
    seed, row_ids = 3, torch.arange(rows, device=device)
    ids, logprobs = gk.linear_gumbel_sample(p.hidden, p.lm_head, noise=gk.GumbelNoise(seed, row_ids), **arguments)
    first = 0
    for count in (1, 3, 4, 8) if interpreted else (1, 2, 3, 4, 5, 7, 8):
        part = slice(first, min(first + count, rows))
        noise = gk.GumbelNoise(seed, row_ids[part])
        few, few_logprobs = gk.linear_gumbel_sample(p.hidden[part], p.lm_head, noise=noise, **arguments)
        assert torch.equal(few, ids[part])
        torch.testing.assert_close(few_logprobs, logprobs[part], rtol=1e-5, atol=1e-5)
        first += count


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_replay_of_given_ids(backend: str, device: str, rows: int, estimator: str) -> None:
    """The rollout's own tokens come back with the same embedding, log-probabilities and gradients, bit for bit."""
    for eps in (0.0, 0.05):
        p = problem((rows,), 131, 7, bias=True, estimator=estimator, tau="row", device=device)
        ids, logprobs = gk.linear_gumbel_sample(p.hidden, p.lm_head, bias=p.bias, noise=p.noise)
        drawn, given = run(p, eps), run(p._replace(ids=ids), eps)
        for name in Answer._fields:
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (getattr(drawn, name), getattr(given, name))),
                            strict=True):  # fmt: skip
                assert torch.equal(a, b), name
        torch.testing.assert_close(given.logprobs, logprobs, rtol=1e-6, atol=1e-6)
        out = gk.linear_gumbel_ste(p.hidden, p.lm_head, p.tables, p.tau, bias=p.bias, noise=p.noise, ids=ids)
        assert backend == "reference" or out.ids.data_ptr() != ids.data_ptr(), (
            "the caller's ids must not become an output"
        )


def test_other_ids_change_the_relaxation_of_reinmax_only(backend: str, device: str) -> None:
    for estimator in ESTIMATORS:
        p = problem((3,), 37, 5, estimator=estimator, device=device)
        p = p._replace(dlogprobs=torch.zeros_like(p.dlogprobs))
        first, second = (run(p._replace(ids=torch.full((3,), i, device=device))) for i in (4, 9))
        assert torch.equal(first.hidden, second.hidden) == (estimator != "reinmax")


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_tokens(backend: str, device: str, rows: int, estimator: str, eps: float) -> None:
    """A bias of -inf: never sampled, gradient exactly 0, whole chunks of it, first or last."""
    vocab = 31
    for masked in (torch.arange(vocab) < 20, torch.arange(vocab) > 4, torch.arange(vocab) != 11):
        p = problem((rows,), vocab, bias=True, estimator=estimator, tau="row", device=device)
        bias = p.bias.masked_fill(masked.to(device), -float("inf"))
        answer = run(p._replace(bias=bias), eps)
        assert not masked.to(device)[answer.ids].any()
        assert (answer.bias[masked.to(device)] == 0).all()
        assert (answer.lm_head[masked.to(device)] == 0).all()
        if estimator == "soft":
            assert (answer.tables[0][masked.to(device)] == 0).all()
        for x in (answer.logprobs, answer.hidden, answer.lm_head, answer.bias, answer.tau, *answer.tables):
            assert x.isfinite().all()


def test_softcap_leaves_masked_tokens_masked(backend: str, device: str) -> None:
    """A bias of -inf masks a token, as the docstring says, with a softcap as well (tanh would make it -c)."""
    p = problem((400,) if backend != "triton" else (4,), 8, bias=True, softcap=1.0, scale=0.1, device=device)
    masked = torch.arange(8, device=device) != 3
    bias = torch.zeros(8, device=device).masked_fill(masked, -float("inf"))
    ids, logprobs = gk.linear_gumbel_sample(p.hidden, p.lm_head, bias=bias, logit_softcap=1.0, noise=p.noise)
    assert (ids == 3).all()
    torch.testing.assert_close(logprobs, torch.zeros_like(logprobs), rtol=0, atol=1e-6)
    entropy = gk.linear_entropy(p.hidden, p.lm_head, bias=bias, logit_softcap=1.0)
    torch.testing.assert_close(entropy, torch.zeros_like(entropy), rtol=0, atol=1e-6)


def test_given_masked_id(backend: str, device: str) -> None:
    """A replayed token that the mask forbids: log-probability -inf, and a masked logit gets gradient exactly 0."""
    for estimator in ESTIMATORS:
        for eps in (0.0, 0.05):
            p = problem((2,), 13, mask=True, estimator=estimator, device=device)
            p = p._replace(ids=torch.ones(2, dtype=torch.int64, device=device))
            assert p.bias[1] == -float("inf")
            answer = run(p, eps)
            assert (answer.logprobs == -float("inf")).all()
            assert (answer.bias[1] == 0).all(), f"{estimator}, eps {eps}: gradient {answer.bias[1]} of a masked logit"
            assert (answer.lm_head[1] == 0).all()


@pytest.mark.parametrize(("tau", "scale"), [(1e-3, 1.0), (1e3, 1.0), (1.0, 100.0)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_temperatures_and_logits(
    backend: str, device: str, rows: int, estimator: str, tau: float, scale: float
) -> None:
    """No overflow: tau from 1e-3 to 1e3, logits of hundreds."""
    p = problem((rows,), 67, 5, tau=tau, scale=scale, estimator=estimator, bias=True, device=device)
    for eps in (0.0, 2**-5):
        answer = run(p, eps)
        for x in (*answer.embedding, answer.logprobs, answer.hidden, answer.lm_head, answer.bias, *answer.tables):
            assert x.isfinite().all()
    check(p, slim=max(1.0, 4 * scale) * max(1.0, 0.1 / tau))


@pytest.mark.uncollect_if(
    lambda backend: backend in ("cpu", "triton"), "float64 through a head runs on the torch backend"
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck_of_the_relaxation(backend: str, device: str, estimator: str) -> None:
    """Finite differences: `soft` differentiates what it computes, and log-probabilities in every estimator do."""
    p = problem((2,), 11, 3, dtype=torch.float64, table_dtypes=(torch.float64,), bias=True, softcap=2.0, tau="row",
                device=device)  # fmt: skip

    def f(hidden: Any, head: Any, bias: Any, table: Any, tau: Any) -> Any:
        out = gk.linear_gumbel_ste(
            hidden, head, table, tau, bias=bias, logit_softcap=2.0, estimator=estimator, noise=p.noise, eps=0.0
        )
        return (out.embedding, out.logprobs) if estimator == "soft" else out.logprobs

    inputs = tuple(leaf(x) for x in (p.hidden, p.lm_head, p.bias, p.tables[0], p.tau))
    assert torch.autograd.gradcheck(f, inputs)
