"""DTensors: every operation says of every argument that it wants an ordinary tensor, and where the DTensor lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import grade_kernels as gk
from tests.support.helpers import raises
from tests.support.needs import needs

N, H, V, D = 4, 3, 5, 2
pytestmark = needs("torch.distributed", dist.is_available())


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


HEAD: dict[str, torch.Tensor] = {"hidden": torch.ones(N, H), "lm_head": torch.ones(V, H), "bias": torch.zeros(V)}
IDS = torch.zeros(N, dtype=torch.int64)
ROWS: dict[str, torch.Tensor] = {"logits": torch.zeros(N, V), "tau": torch.ones(N)}
# Each operation with all tensors that it takes.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gumbel_sample": {"logits": ROWS["logits"]},
    "gumbel_softmax": ROWS,
    "gumbel_ste": ROWS,
    "gumbel_ste_embedding": {**ROWS, "embedding": torch.ones(V, D), "ids": IDS},
    "linear_gumbel_sample": HEAD,
    "linear_gumbel_ste": {**HEAD, "embedding": torch.ones(V, D), "tau": torch.ones(N), "ids": IDS},
    "linear_logprobs": {**HEAD, "ids": IDS},
    "linear_kl": {**HEAD, **{f"ref_{name}": x for name, x in HEAD.items()}},
    "linear_entropy": HEAD,
}
CASES = [(name, argument) for name, given in ARGUMENTS.items() for argument in given]


def call(name: str, **changed: Any) -> Any:
    operation: Callable[..., Any] = getattr(gk, name)
    return operation(**{**ARGUMENTS[name], **changed})


def test_all_operations_are_here() -> None:
    assert set(ARGUMENTS) == {name for name in gk.__all__ if name.startswith(("gumbel_", "linear_"))}
    for name in ARGUMENTS:
        call(name)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_arguments(backend: str, mesh: Any, name: str, argument: str) -> None:
    given = ARGUMENTS[name][argument]
    for placement in (Shard(0), Replicate()):
        with raises(TypeError, argument, "DTensor", f"({placement!r},)", f"{argument}.full_tensor()"):
            call(name, **{argument: distribute_tensor(given, mesh, [placement])})
    parameter = given.is_floating_point()
    if parameter:
        with raises(TypeError, argument, "DTensor"):
            call(name, **{argument: torch.nn.Parameter(distribute_tensor(given, mesh, [Shard(0)]))})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_noise(backend: str, mesh: Any, name: str) -> None:
    rows = distribute_tensor(torch.arange(N), mesh, [Shard(0)])
    with raises(TypeError, "noise.row_ids", "DTensor", "Shard(dim=0)"):
        call(name, noise=gk.GumbelNoise(1, rows))
    seed = distribute_tensor(torch.tensor(1), mesh, [Replicate()])
    with raises(TypeError, "noise.seed", "DTensor", "Replicate()"):
        call(name, noise=gk.GumbelNoise(seed))


def test_one_table_of_several(backend: str, mesh: Any) -> None:
    table = torch.ones(V, D)
    for name in ("gumbel_ste_embedding", "linear_gumbel_ste"):
        with raises(TypeError, "embedding[1]", "DTensor", "Shard(dim=1)"):
            call(name, embedding=(table, distribute_tensor(table, mesh, [Shard(1)])))


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_under_transforms(backend: str, mesh: Any, name: str, argument: str) -> None:
    """A wrapper of torch.func hides what it wraps: vmap's, grad's, and both."""
    stacked = torch.stack([ARGUMENTS[name][argument]] * 2)
    many, one = (distribute_tensor(x, mesh, [Replicate()]) for x in (stacked, stacked[0]))

    def f(x: torch.Tensor) -> torch.Tensor:
        call(name, noise=gk.GumbelNoise(1), **{argument: x})
        return x.sum()

    sentence = TypeError, f"{argument} must be an ordinary tensor, got a DTensor"
    with raises(*sentence):
        torch.func.vmap(f)(many)
    if one.is_floating_point():
        with raises(*sentence):
            torch.func.grad(f)(one)
        with raises(*sentence):
            torch.func.vmap(torch.func.grad(f))(many)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_reference(mesh: Any, name: str, argument: str) -> None:
    """The functions of `grade_kernels.reference` themselves, with arguments by name and by position."""
    operation: Callable[..., Any] = getattr(gk.reference, name)
    operation(**ARGUMENTS[name])
    given = {**ARGUMENTS[name], argument: distribute_tensor(ARGUMENTS[name][argument], mesh, [Replicate()])}
    with raises(TypeError, argument, "DTensor", f"{argument}.full_tensor()"):
        operation(**given)
    if argument in ("logits", "hidden"):
        with raises(TypeError, argument, "DTensor", f"{argument}.full_tensor()"):
            operation(given.pop(argument), **given)


def test_table_and_head_of_the_reference(mesh: Any) -> None:
    table = distribute_tensor(torch.ones(V, D), mesh, [Shard(1)])
    with raises(TypeError, "embedding[1]", "DTensor"):
        gk.reference.gumbel_ste_embedding(ROWS["logits"], (torch.ones(V, D), table))
    with raises(TypeError, "lm_head", "DTensor"):
        gk.reference.head_logits(HEAD["hidden"], distribute_tensor(HEAD["lm_head"], mesh, [Shard(0)]))


def test_dense_noise(mesh: Any) -> None:
    rows = distribute_tensor(torch.arange(N), mesh, [Shard(0)])
    with raises(TypeError, "noise.row_ids", "DTensor", "Shard(dim=0)"):
        gk.GumbelNoise(1, rows).dense(N, V)
    seed = distribute_tensor(torch.tensor(1), mesh, [Replicate()])
    with raises(TypeError, "noise.seed", "DTensor", "Replicate()"):
        gk.GumbelNoise(seed).dense(N, V)


def test_compiled(mesh: Any) -> None:
    """The sentence is in what torch.compile says."""
    torch._dynamo.reset()
    compiled = torch.compile(gk.gumbel_softmax, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="logits must be an ordinary tensor, got a DTensor"):
        compiled(distribute_tensor(ROWS["logits"], mesh, [Shard(0)]))
