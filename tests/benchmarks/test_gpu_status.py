"""docs/gpu-status.md says what the files of the checks say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import status
from benchmarks.gpu_check.status import Seen

TEXT = (
    "by hand\n<!-- devices -->\nold\n<!-- end -->\n<!-- kernels -->\n<!-- end -->\nmore\n<!-- cuda -->\n<!-- end -->\n"
)
COMPILED = {
    "compiler": "triton 3.6.0",
    "kernels": {
        "head_scores_kernel": {
            "sm_80": {"builds": 4, "spilling": 0, "beyond_limits": 0},
            "sm_90": {"builds": 6, "spilling": 2, "beyond_limits": 1},
        }
    },
}
SIMULATED = {
    "simulator": "ptx", "compiler": "triton 3.9.0", "target": "sm_80",
    "kernels": {"head_scores_kernel": {"cases": 9, "passed": 9}, "one_hot_kernel": {"cases": 3, "passed": 2}},
}  # fmt: skip
DEVICE = {
    "device": "NVIDIA H200", "target": "sm_90", "compiler": "triton 3.8.0", "torch": "2.14.1",
    "kernels": {"one_hot_kernel": {"cases": 8, "passed": 8}}, "backends": {"cuda": {"cases": 5, "passed": 4}},
}  # fmt: skip


def page(folder: Path, **files: dict[str, Any]) -> str:
    seen = []
    for name, content in files.items():
        path = folder / f"{name.replace('_', '-')}.json"
        path.write_text(json.dumps(content))
        seen.append(Seen.read(path))
    return status.page(TEXT, seen)


def test_the_page_is_what_the_files_give() -> None:
    seen = [Seen.read(path) for path in sorted(status.FOLDER.glob("*.json"))]
    again = status.page(status.PAGE.read_text(), seen)
    assert status.PAGE.read_text() == again, "docs/gpu-status has changed: run python -m benchmarks.gpu_check.status"


def test_tables(tmp_path: Path) -> None:
    text = page(tmp_path, compiled_triton=COMPILED, simulated_triton=SIMULATED, gpu_h200=DEVICE)
    compiled = "triton 3.6.0: sm_80, sm_90 (2 of 6 spill, 1 of 6 beyond limits)"
    for line in (
        f"| `head_scores_kernel` | {compiled} | sm_80 by triton 3.9.0: 9 of 9 | never |",
        "| `one_hot_kernel` | not recorded | sm_80 by triton 3.9.0: 2 of 3 | NVIDIA H200, triton 3.8.0: 8 of 8 |",
        "| `support_kernel` | not recorded | never | never |",
        "| NVIDIA H200 | sm_90 | triton 3.8.0 | `cuda` | 4 of 5 |",
        "No file speaks of them.",
        "by hand",
        "more",
    ):
        assert line in text.splitlines(), line
    assert "old" not in text
    assert status.page(text, []) == page(tmp_path), "what a table replaces leaves nothing behind"


def test_names_of_inspect_stand_for_their_functions(tmp_path: Path) -> None:
    """Several builds of one function add up; a kernel that only inspection has is none of the package's."""
    pytest.importorskip("triton")
    some = {"sm_80": {"builds": 2, "spilling": 1, "beyond_limits": 0}}
    given = dict.fromkeys(("head sample", "head scores", "baseline sample"), some)
    text = page(tmp_path, compiled_triton={"compiler": "triton 3.9.0", "kernels": given})
    assert "| `head_scores_kernel` | triton 3.9.0: sm_80 (2 of 4 spill) | never | never |" in text.splitlines()
    assert text.count("triton 3.9.0") == 1


def test_kernels_of_nvcc(tmp_path: Path) -> None:
    given = {
        "compiler": "nvcc 13.0",
        "kernels": {"Sample": {"sm_80": {"builds": 1, "spilling": 0, "beyond_limits": 0}}},
    }
    assert "| `Sample` | nvcc 13.0: sm_80 | never | never |" in page(tmp_path, compiled_nvcc=given).splitlines()


def test_every_kernel_of_the_package_is_listed() -> None:
    found = status.kernels()
    assert {"sample_scan_kernel", "head_scores_kernel", "gather_sum_kernel", "row_tile_kernel"} <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other", COMPILED, r"is none of compiled-\*\.json, simulated-\*\.json, gpu-\*\.json"),
        ("compiled_x", {"kernels": {}}, "lacks compiler"),
        ("gpu_x", SIMULATED, "lacks device, backends"),
        ("simulated_x", SIMULATED | {"kernels": {"one_hot_kernel": {"cases": 1}}}, "must say cases, passed"),
        (
            "simulated_x",
            SIMULATED | {"kernels": {"no_kernel": {"cases": 1, "passed": 1}}},
            "no Triton kernel is called 'no_k",
        ),
    ],
)
def test_files_that_say_something_else(name: str, content: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=message):
        page(tmp_path, **{name: content})


def test_a_page_without_a_place_for_a_table() -> None:
    with pytest.raises(ValueError, match="one place for the table 'cuda', it has 0"):
        status.page(TEXT.replace("cuda", "other"), [])
