"""Kernels that are broken on purpose, in the text of their PTX: the simulator sees it.

Runs in the simulator's process alone, which `test_kernels.py` starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends import Noise
from tests.support.needs import needs
from tests.support.ptx.machine import translated
from tests.support.ptx.memory import ExecutionError
from tests.support.ptx.setting import SIMULATED
from tests.support.rows import REFINED, SEED

pytestmark = needs("the simulator of PTX, in whose process they run", SIMULATED)

VOCAB = 2053  # more than a strip, and a ragged end
ROW, TOKEN = REFINED[0]


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], str]], None]]:
    """Has PTX changed before it is executed, for the rest of the test."""
    from grade_kernels.backends.triton import sampling
    from tests.support.ptx import triton_driver

    kernels = (sampling.sample_scan_kernel, sampling.sample_pick_kernel)

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()

    def edit(change: Callable[[str], str]) -> None:
        def load_binary(self: Any, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
            return None, translated(change(kernel.decode()))[name], 0, 0, 1024

        forget()
        monkeypatch.setattr(triton_driver._Utilities, "load_binary", load_binary)

    yield edit
    forget()


def sample(dtype: torch.dtype = torch.float32) -> backends.Sample:
    """Of two rows, of which the second has a token whose noise is refined."""
    logits = torch.zeros(2, VOCAB, dtype=dtype)
    noise = Noise(torch.tensor(SEED), torch.tensor([5, ROW]), TOKEN // 4 * 4 - 40)
    return backends.get("triton").sample(logits, noise, True)


def changed(pattern: str, by: str, which: int | None = None) -> Callable[[str], str]:
    """Replaces the occurrence of that number, or all."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))
        if which is None:
            return re.sub(pattern, by, text)
        if which >= len(found):
            return text
        return text[: found[which].start()] + found[which].expand(by) + text[found[which].end() :]

    return change


def test_as_it_is(edited: Callable[[Callable[[str], str]], None]) -> None:
    edited(lambda text: text)
    found = sample()
    assert found.ids[1] == TOKEN % 4 + 40
    assert found.score_max[1] > 16.6


def test_without_a_barrier(edited: Callable[[Callable[[str], str]], None]) -> None:
    texts: list[str] = []
    edited(lambda text: texts.append(text) or text)
    sample()
    count = max(len(re.findall(r"bar\.sync \t*0;", text)) for text in texts)
    assert count > 0
    for which in range(count):
        edited(changed(r"bar\.sync \t*0;", "", which))
        with pytest.raises(ExecutionError, match=r"race|nobody wrote"):
            sample()


def test_without_a_mask(edited: Callable[[Callable[[str], str]], None]) -> None:
    edited(changed(r"@%p\d+ (ld\.global)", r"\1"))
    with pytest.raises(ExecutionError, match="a read outside of every buffer"):
        sample()


def test_without_a_vote(edited: Callable[[Callable[[str], str]], None]) -> None:
    """Each thread asks its own words alone whether one is to be refined, and the block parts before a barrier."""
    edited(changed(r"redux\.sync\.min\.u32 (\s*%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;"))
    with pytest.raises(ExecutionError, match=r"a part of warp|elsewhere|never reach|disagree|race"):
        sample()
