"""Which kernels the tests of a run executed in the simulator, and in how many passing cases, as a file.

A plugin of pytest, for runs with `GRADE_KERNELS_SIMULATE=1`. The file is named by `GRADE_KERNELS_SIMULATED_RECORD`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support.ptx.triton_driver import CAPABILITY, LAUNCHED

__all__ = ["Record"]


class Record:
    """Counts cases by kernel: a case is a test's that launched the kernel."""

    def __init__(self, path: Path, compiler: str) -> None:
        self.path, self.compiler = path, compiler
        self.cases: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        LAUNCHED.clear()
        good = False
        try:
            yield
            good = True
        finally:
            for name in LAUNCHED:
                self.cases[name] += 1
                self.passed[name] += good

    def pytest_sessionfinish(self) -> None:
        kernels = {name: {"cases": self.cases[name], "passed": self.passed[name]} for name in sorted(self.cases)}
        found = {
            "simulator": "tests/support/ptx",
            "compiler": self.compiler,
            "target": f"sm_{CAPABILITY}",
            "kernels": kernels,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(found, indent=1) + "\n")
