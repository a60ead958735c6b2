"""What some tests need of a machine. Cases that lack it are not collected, and the summary counts them by what they need."""

from __future__ import annotations

import pytest

from grade_kernels import backends
from tests.support import cuda_host


def needs(what: str, met: object) -> pytest.MarkDecorator:
    return pytest.mark.needs(what, met=bool(met))


def needs_backend(name: str) -> pytest.MarkDecorator:
    reason = backends.status()[name]
    return needs(f"the backend {name} ({reason})", reason is None)


def needs_cuda_on_the_host() -> pytest.MarkDecorator:
    reason = cuda_host.why_unavailable()
    return needs(f"csrc/cuda on the host ({reason})", reason is None)
