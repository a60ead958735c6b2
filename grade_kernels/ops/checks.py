"""Checks of arguments that the operations share: each names the argument, what came and what was expected.

Types, shapes and devices are checked where an operation is called. Values of tensors are checked inside the registered
operations, so that `torch.compile` traces through the public functions: always on the CPU, on a GPU only under
GRADE_KERNELS_CHECK=1, since reading them there would wait for the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import cast

import torch

from grade_kernels.arguments import canonical_int, check_local
from grade_kernels.backends.records import Noise, Posterior
from grade_kernels.estimators import ESTIMATORS, RAO
from grade_kernels.noise import GumbelNoise, PosteriorNoise, fresh_seed
from grade_kernels.ops.eager import ORDINARY
from grade_kernels.ops.transforms import without_wrappers
from grade_kernels.reference import tau_of_rows

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LIMITS = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in FLOATING}
_ROUNDING = 0.25  # of a log-probability near 0: a unit in the last place of logits of 32 and more in bfloat16
_MOST_DRAWS = 2**16
_FEW = 64  # values that Python's sum adds up sooner than PyTorch finds their maximum


def reads_values(tensor: torch.Tensor) -> bool:
    """Whether values of a tensor may be read: on the CPU, or anywhere when the user asked for it."""
    return tensor.device.type == "cpu" or os.environ.get("GRADE_KERNELS_CHECK") == "1"


def may_read(tensor: torch.Tensor) -> bool:
    """`reads_values` outside a registered operation, where tensors may be those of a tracer, which have no values."""
    if torch.compiler.is_compiling() or not reads_values(tensor):
        return False
    tracers = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    return all(torch._C._get_dispatch_mode(key) is None for key in tracers)


def _check_local(name: str, value: torch.Tensor) -> None:
    """`check_local`, without its cost for what can be seen to be an ordinary tensor."""
    if type(value) not in ORDINARY or torch._C._are_functorch_transforms_active():
        check_local(name, value)


def check_layout(name: str, value: torch.Tensor) -> None:
    """An ordinary tensor: not a sparse or nested one, which have no rows to view, nor a part of a distributed one."""
    _check_local(name, value)
    if value.layout != torch.strided or value.is_nested:
        what = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {what}")


def check_floating(name: str, value: object) -> None:
    """A dense tensor of one of the four floating dtypes, or TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_layout(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def check_logits(logits: object, dim: object = -1) -> int:
    """Floating logits with at least one token along dim; a dim that does not exist raises IndexError as in PyTorch.

    Returns:
        dim as an int of Python.
    """
    check_floating("logits", logits)
    assert isinstance(logits, torch.Tensor)
    index = dim if type(dim) is int else canonical_int("dim", dim)
    if logits.dim() == 0:
        raise IndexError("logits must have shape [..., V], got a 0-d tensor")
    if logits.size(index) == 0:
        raise ValueError(f"logits must have at least one token, got shape {tuple(logits.shape)} with dim {index}")
    return index


def check_same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors on one device, or ValueError naming both."""
    if value.device != other.device:
        raise ValueError(f"{name} is on device {str(value.device)!r}, but {other_name} on {str(other.device)!r}")


def canonical_noise(
    noise: GumbelNoise | PosteriorNoise | None,
    num_rows: int,
    device: torch.device,
    batch_shape: Sequence[int] | None = None,
) -> Noise:
    """The noise for `num_rows` rows; None draws a seed from torch's default generator.

    With `batch_shape`, of the logits without the vocabulary, the noise may be that of given tokens. Operations without a
    relaxation of `l + g` leave it out.
    """
    if noise is None:
        return Noise(fresh_seed(), None, 0)
    if isinstance(noise, PosteriorNoise):
        if batch_shape is None:
            raise TypeError(
                "noise must be a GumbelNoise or None here, where no noise is added to logits or the token is to be "
                "sampled; got a PosteriorNoise, made by `given`"
            )
        _check_ids("noise.ids", noise.ids, batch_shape)
        if noise.ids.device != device:
            raise ValueError(f"noise.ids is on device {str(noise.ids.device)!r}, but the logits on {str(device)!r}")
        if noise.logprobs is not None:
            check_layout("noise.logprobs", noise.logprobs)
        ids, logprobs = (None if x is None else x.reshape(-1) for x in (noise.ids, noise.logprobs))
        assert ids is not None
        prior = canonical_noise(noise.noise, num_rows, device)
        return prior._replace(posterior=Posterior(ids, logprobs, noise.draw))
    if not isinstance(noise, GumbelNoise):
        raise TypeError(f"noise must be a GumbelNoise or None, got {type(noise).__name__}")
    _check_local("noise.seed", noise.seed)
    if noise.row_ids is not None:
        check_layout("noise.row_ids", noise.row_ids)
        if noise.row_ids.numel() != num_rows:
            raise ValueError(f"noise.row_ids has {noise.row_ids.numel()} entries, but the logits have {num_rows} rows")
        if noise.row_ids.device != device:
            raise ValueError(
                f"noise.row_ids is on device {str(noise.row_ids.device)!r}, but the logits on {str(device)!r}"
            )
    if noise.seed.device.type not in ("cpu", device.type):
        raise ValueError(f"noise.seed is on device {str(noise.seed.device)!r}, but the logits on {str(device)!r}")
    return Noise(noise.seed, noise.row_ids, noise.vocab_start)


def positive_number(name: str, value: object, dtype: torch.dtype, expected: str = "a number") -> float:
    """A number that is positive and finite in `dtype`, too. Its subnormals are refused: kernels treat them as zero."""
    if type(value) is float:
        number = value
    elif isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    else:
        # torch.compile's symbols must stay symbols: float() would make constants of them.
        number = cast("float", value) if isinstance(value, (int, torch.SymFloat, torch.SymInt)) else float(value)
    least, most = _LIMITS[dtype]
    if not least <= number <= most:
        raise ValueError(f"{name} must be positive and finite in {dtype}, got {value}")
    return number


def canonical_tau(
    tau: float | torch.Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype, dim: int = -1
) -> torch.Tensor:
    """Tau as `[rows]` in compute precision, connected to a tensor tau's graph.

    `shape` is that of the logits, with the vocabulary at `dim`. Takes a positive number, or a tensor that gives one
    value per row by the rule of `reference.tau_of_rows`.
    """
    rows = math.prod(shape) // shape[dim]
    if isinstance(tau, torch.Tensor):
        check_layout("tau", tau)
        if tau.dtype == torch.bool or tau.dtype.is_complex:
            raise TypeError(f"tau must be a real number or tensor, got dtype {tau.dtype}")
        if tau.dim() == 0 and tau.device.type in ("cpu", device.type):
            # A number on the host is an argument of the product; a copy would wait for a GPU.
            return torch.ones(rows, dtype=dtype, device=device) * (tau if tau.device.type == "cpu" else tau.to(device))
        by_row = tau_of_rows(tau, shape, dim)
        if tau.device != device:
            raise ValueError(f"tau is on device {str(tau.device)!r}, but the logits on {str(device)!r}")
        return by_row.to(dtype).reshape(rows)
    number = positive_number("tau", tau, dtype, "a number or a tensor")
    if torch.compiler.is_compiling():
        # A product rather than torch.full: with a number that changes, torch.compile recompiles once, not every time.
        return torch.ones(rows, dtype=dtype, device=device) * number
    return torch.full((rows,), number, dtype=dtype, device=device)


def check_tau_values(tau: torch.Tensor) -> None:
    """Positive, finite values; ValueError with the first that is not."""
    if tau.numel() == 0:
        return
    least, most = (x.item() for x in tau.aminmax())
    if least >= torch.finfo(tau.dtype).tiny and most <= torch.finfo(tau.dtype).max:
        return
    bad = ~((tau >= torch.finfo(tau.dtype).tiny) & tau.isfinite())
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"tau must be positive and finite, got {tau[row].item()} (row {row})")


def check_ids_values(ids: torch.Tensor, vocab_size: int, name: str = "ids") -> None:
    """Ids inside the vocabulary; ValueError with the first that is not."""
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} must lie in [0, {vocab_size}), got {int(ids[row])} (row {row})")


def check_posterior_values(noise: Noise, vocab_size: int) -> None:
    """Given tokens inside the vocabulary, and log-probabilities that may be some; ValueError with the first that is not."""
    given = noise.posterior
    if given is None:
        return
    if reads_values(given.ids):
        check_ids_values(given.ids, vocab_size, "noise.ids")
    if given.logprobs is not None and reads_values(given.logprobs):
        bad = ~(given.logprobs.isfinite() & (given.logprobs <= _ROUNDING))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"noise.logprobs must be finite and not positive, got {given.logprobs[row].item()} (row {row})"
            )


def check_given_logits(chosen: torch.Tensor, name: str = "noise.ids") -> None:
    """Logits `[N]` of given tokens that are not masked; ValueError with the first that is."""
    masked = chosen == -torch.inf
    if masked.any():
        row = int(masked.nonzero()[0])
        raise ValueError(f"{name} must be tokens whose logits are not -inf, which that of row {row} is")


def holds_nan(x: torch.Tensor) -> bool:
    """Whether any value is NaN. The others are finite, so a sum is NaN for no other reason."""
    few = x.numel() <= _FEW
    return math.isnan(sum(x.tolist()) if few else x.max().item())


def check_rows(logits: torch.Tensor, bad: torch.Tensor) -> None:
    """Raise ValueError for the first row that a backend marked as having no distribution."""
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    values = logits[row]
    if values.isnan().any():
        what = "NaN"
    elif (values == torch.inf).any():
        what = "+inf"
    else:
        what = "only -inf"
    raise ValueError(f"logits must be finite or -inf with one finite value per row, but row {row} holds {what}")


def check_for_reference(
    logits: torch.Tensor | None,
    tau: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    vocab_size: int = 0,
    noise: Noise | None = None,
) -> None:
    """The errors of values that operations raise, for calls that the reference serves: it would compute with them.

    Args:
        logits: `[N, V]`, without graph.
        tau: `[N]`.
        ids: `[N]`, of a vocabulary of `vocab_size`.
        noise: of the rows. Its given tokens are those of `ids` where there are both.
    """
    if logits is not None and may_read(logits):
        rows = without_wrappers(logits)
        check_rows(rows, bad_rows(rows))
    if tau is not None and may_read(tau):
        check_tau_values(without_wrappers(tau))
    if ids is not None and may_read(ids):
        check_ids_values(without_wrappers(ids), vocab_size)
    given = None if noise is None else noise.posterior
    if noise is None or given is None or not may_read(given.ids):
        return
    tokens, logprobs = (None if x is None else without_wrappers(x) for x in (given.ids, given.logprobs))
    assert tokens is not None
    vocab_size = vocab_size if logits is None else logits.shape[1]
    check_posterior_values(noise._replace(posterior=Posterior(tokens, logprobs, given.draw)), vocab_size)
    if logits is not None and may_read(logits):
        rows = without_wrappers(logits)
        if len(rows) == len(tokens):  # else `vmap` maps over one of the two
            chosen = rows.gather(1, tokens.unsqueeze(1)).squeeze(1)
            check_given_logits(chosen, "noise.ids" if ids is None else "ids")


def check_head_rows(bad: torch.Tensor, prefix: str = "") -> None:
    """Raise ValueError for the first row of hidden states whose logits are no distribution."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{prefix}hidden and {prefix}lm_head must give logits without NaN and +inf and not only -inf, "
            f"but row {row} does not"
        )


def bad_rows(logits: torch.Tensor) -> torch.Tensor:
    """Rows `[N]` of `[N, V]` logits that hold NaN, +inf or only -inf."""
    return ~logits.amax(dim=1).isfinite()


def check_tables(
    embedding: object, vocab_size: int, other: torch.Tensor, other_name: str = "logits"
) -> tuple[torch.Tensor, ...]:
    """One or several `[V, D]` tables as a tuple."""
    tables = tuple(embedding) if isinstance(embedding, (tuple, list)) else (embedding,)
    if not tables:
        raise ValueError("embedding must hold at least one table, got an empty tuple")
    for i, table in enumerate(tables):
        name = f"embedding[{i}]" if isinstance(embedding, (tuple, list)) else "embedding"
        check_floating(name, table)
        if table.dim() != 2:
            raise ValueError(f"{name} must be two-dimensional [V, D], got shape {tuple(table.shape)}")
        if table.shape[0] != vocab_size:
            raise ValueError(f"{name} has {table.shape[0]} rows, but the vocabulary has {vocab_size} tokens")
        check_same_device(name, table, other_name, other)
    return tables


def check_ids(ids: object, batch_shape: Sequence[int], other: torch.Tensor, other_name: str = "logits") -> None:
    """Given ids: int64 of the batch shape (values are checked where they may be read)."""
    _check_ids("ids", ids, batch_shape)
    assert isinstance(ids, torch.Tensor)
    check_same_device("ids", ids, other_name, other)


def _check_ids(name: str, ids: object, batch_shape: Sequence[int]) -> None:
    """Ids wherever they are."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name} must be an int64 tensor, got {type(ids).__name__}")
    check_layout(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if tuple(ids.shape) != tuple(batch_shape):
        raise ValueError(f"{name} must have shape {tuple(batch_shape)}, got {tuple(ids.shape)}")


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are seen to hold the same values; where these are not read, they are not."""
    readable = a.device == b.device and may_read(a) and may_read(b)
    return readable and torch.equal(without_wrappers(a), without_wrappers(b))


def ids_once(ids: torch.Tensor | None, noise: object) -> torch.Tensor | None:
    """The tokens that are given, by `ids` or by the noise; ValueError where both give some that may differ."""
    if not isinstance(noise, PosteriorNoise) or ids is noise.ids:
        return ids
    if ids is not None and not _are_equal(ids, noise.ids):
        raise ValueError("ids must be left out where the noise is that of given tokens, or be these; got other ids")
    return noise.ids


def canonical_ignore_index(ignore_index: object, ids: object) -> int | None:
    """The id that marks rows to ignore among given ids, or None where no row is to be."""
    if ignore_index is None:
        return None
    if ids is None:
        raise ValueError(f"ignore_index marks rows among given ids, but ids is None; got ignore_index {ignore_index}")
    return canonical_int("ignore_index", ignore_index, "an int or None")


def check_estimator(estimator: object, *more: str) -> None:
    """One of the four names, or one more."""
    names = (*ESTIMATORS, *more)
    if estimator not in names:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, names))}, got {estimator!r}")


def canonical_draws(draws: object, estimator: str) -> int:
    """How many draws of posterior noise an estimator takes the mean of."""
    number = canonical_int("draws", draws)
    most = _MOST_DRAWS if estimator == RAO else 1
    if not 1 <= number <= most:
        raise ValueError(f"draws must lie in [1, {most}] for estimator {estimator!r}, got {draws}")
    return number
