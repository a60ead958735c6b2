"""Products with gathered rows, as they are compiled, at widths from a column to several blocks.

Runs in the simulator's process alone, which `test_kernels.py` starts: there lanes that disagree are seen.
"""

from __future__ import annotations

import pytest
import torch

from grade_kernels import backends
from tests.support.needs import needs
from tests.support.ptx.setting import SIMULATED

pytestmark = needs("the simulator of PTX, in whose process they run", SIMULATED)


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 40, 520])
def test_gathers(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(50, width, generator=generator).to(dtype)
    x = torch.randn(7, width, generator=generator).to(dtype)
    tokens = torch.randint(0, 50, (101,), generator=generator)
    rows = torch.randint(0, 7, (101,), generator=generator).sort().values
    rows[rows == 3] = 4  # a row without entries
    offsets = torch.searchsorted(rows, torch.arange(8))
    values = torch.randn(101, generator=generator)
    fused, plain = backends.get("triton"), backends.get("torch")
    for found, truth in (
        (
            fused.gather_sum(values, table, offsets, tokens),
            plain.gather_sum(values.double(), table.double(), offsets, tokens),
        ),
        (fused.gather_dot(x, table, rows, tokens), plain.gather_dot(x.double(), table.double(), rows, tokens)),
    ):
        torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=2e-5)
