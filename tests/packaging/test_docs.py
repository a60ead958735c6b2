"""The examples of the documentation run as they stand."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

pytest.importorskip("transformers")
pytest.importorskip("datasets")


def test_the_examples_of_the_training_guide_run():
    text = (ROOT / "docs" / "training.md").read_text()
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
