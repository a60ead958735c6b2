"""The documentation is true where a program can tell: examples run, links and paths lead somewhere, tables are complete."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support import ROOT
from tests.support.helpers import leaf, randn

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
# A path of this repository, as pages write it: from the root, or from the package.
PATH = re.compile(r"`((?:\.?[\w-]+/)+[\w.-]*\.(?:py|md|h|inl|cpp|cu|csv|png|sh))`")
every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent == ROOT else str(page.parent.name) + "-" + page.name
)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_examples_of_the_training_guide_run():
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    names: dict[str, object] = {}
    blocks = python_blocks("docs/training.md")
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)


def test_the_line_of_the_readme_is_its_six_lines():
    """With the same noise: the same tokens, embeddings and gradients, to rounding."""
    six, one, _ = python_blocks("README.md")
    assert len(six.strip().splitlines()) == 6
    assert len(one.strip().splitlines()) == 1
    # Both read the same noise, and the line its exact backward; nothing else of the text is changed.
    plain, draws = re.subn(r"^gumbel = .*$", "gumbel = noise.dense(*logits.shape, dtype=logits.dtype)", six, flags=re.M)
    ours, calls = re.subn(r", tau\)$", ", tau, noise=noise, eps=0)", one, flags=re.M)
    assert draws == calls == 1
    seen = []
    for block in (plain, ours):
        names = {"torch": torch, "F": F, "gk": gk, "noise": gk.GumbelNoise(3), "tau": 0.7}
        inputs = {
            name: leaf(randn(*shape, dtype=torch.float64, seed=seed))
            for seed, (name, shape) in enumerate(
                {"hidden": (5, 7), "lm_head": (31, 7), "model_table": (31, 4), "reward_table": (31, 6)}.items()
            )
        }
        names |= inputs
        exec(block, names)
        found = [names["embeds"], names["reward_embeds"]]
        upstream = [randn(*x.shape, dtype=torch.float64, seed=9) for x in found]
        gradients = torch.autograd.grad(found, [inputs["hidden"], inputs["lm_head"]], upstream)
        seen.append((names["ids"], *found, *gradients))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)


def test_the_usage_of_the_readme_runs():
    torch.manual_seed(0)
    rows, vocab, width = 6, 50, 8
    names: dict[str, object] = {
        "logits": torch.randn(rows, vocab),
        "sequence": torch.arange(rows) // 3,
        "position": torch.arange(rows) % 3,
        "hidden": torch.randn(rows, width),
        "ref_hidden": torch.randn(rows, width),
        "lm_head": torch.nn.Linear(width, vocab),
        "ref_lm_head": torch.nn.Linear(width, vocab),
        "model_table": torch.randn(vocab, width),
        "reward_table": torch.randn(vocab, 5),
    }
    exec(python_blocks("README.md")[2], names)
    kl = names["kl"]
    assert isinstance(kl, torch.Tensor)
    assert kl.shape == (rows,)


@every_page
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = page if not name else (page.parent / name).resolve()
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}, but the page has no such heading"


@every_page
def test_named_files_exist(page: Path):
    roots = (ROOT, ROOT / "grade_kernels", page.parent)
    named = [path for path in PATH.findall(page.read_text()) if not path.startswith("bench-output/")]
    missing = {path for path in named if not any((root / path).exists() for root in roots)}
    assert not missing, f"{page.name} names files that are not there: {sorted(missing)}"


def test_the_picture_is_that_of_the_page():
    drawing = runpy.run_path(str(ROOT / "docs" / "pictures" / "design.py"))
    found = drawing["rooms"]((ROOT / "docs" / "design.md").read_text())
    assert all(found[name] for name in drawing["BOXES"])
    drawn = drawing["described"](found).encode() in drawing["PICTURE"].read_bytes()
    assert drawn, "the table of docs/design.md has changed: run python docs/pictures/design.py"
