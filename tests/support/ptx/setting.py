"""Whether this process runs Triton's and CUDA's kernels in the simulator: `GRADE_KERNELS_SIMULATE=1`.

Compiled kernels are kept in `build/`, apart from those of Triton's users, for which the assembler has run.
"""

from __future__ import annotations

import os

from tests.support import ROOT

__all__ = ["SIMULATED"]

SIMULATED = os.environ.get("GRADE_KERNELS_SIMULATE") == "1"
if SIMULATED:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "simulated")
