"""Static cost of the Triton kernels of a head, compiled ahead of time as `triton_static` does; needs no GPU.

    python -m benchmarks.triton_head_static [--targets sm_90 ...] [--dtypes bf16 ...] [--kernels sample ...] [--top]

Per kernel: registers, spills, and on NVIDIA the instructions per logit of a tile's epilogue: everything in the loop
over tiles outside the loop over the width, by the way of most tiles (no refined noise, not the vocabulary's edge).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from benchmarks.triton_static import TARGETS, amd_code, nvidia_code
from grade_kernels.backends.triton import head, head_relaxation, head_sampling

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 0}
INTEGERS = ("N", "group_start", "first_row", "first_split", "splits", "step", "s_slots")
FLOATS = (
    *("best", "plain_max", "plain_sum", "top", "total", "before_max", "before_sum", "tau", "score_max"),
    *("out_max", "out_sum", "out_total", "moment", "ref_top", "ref_total"),
)


def variants() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Name -> kernel, the arguments in which it differs, and products per tile."""
    scores = head_sampling.head_scores_kernel
    nothing = dict.fromkeys(("tau", "before_max", "before_sum", "top", "total", "slots", "counts", "places", "room"))
    softmax = head_relaxation.head_softmax_kernel
    without_slots = dict.fromkeys(("before_max", "before_sum", "slots", "counts", "places", "room"))
    nothing_ref = dict.fromkeys(("ref_hidden", "ref_weight", "ref_bias", "ref_softcap", "ref_top", "ref_total"))
    every = {"bias": "*fp32", "softcap": "fp32", "row_ids": "*i64", "EVEN_K": False}
    return {
        "sample": (scores, nothing, 1),
        "sample, all flags": (scores, {**nothing, **every, "SKEW": 3}, 1),
        "scores": (scores, {}, 1),
        "scores, all flags": (scores, {**every, "SKEW": 3}, 1),
        "softmax": (softmax, nothing_ref, 1),
        "softmax, ref, all flags": (softmax, {**every, "SKEW": 3, "ref_bias": "*fp32", "EVEN_R": False}, 2),
        "softmax, ref, eps 0": (softmax, {**without_slots, "ref_softcap": None}, 2),
        "scores, eps 0": (scores, without_slots, 1),
    }


def compile_variant(kernel: Any, changes: dict[str, Any], dtype: str, sizes: head.Config, target: str) -> Any:
    """Compile a kernel for a head of a dtype with contiguous rows of a multiple of 16."""
    gpu = TARGETS[target]
    options = head.tile_options(sizes, DTYPES[dtype], gpu.backend, CAPABILITY[target])
    arguments = {
        **dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(FLOATS, "*fp32"), "V": "i32", "H": "i32 aligned",
        **dict.fromkeys(("hidden", "weight", "ref_hidden", "ref_weight"), f"*{dtype}"), "eps": "fp32",
        "seed": "*i64", "index": "*i32", "slots": "*i64", "counts": "*i32", "places": "*i32", "room": "*i32",
        "s_hn": "i64 aligned", "s_hk": 1, "s_wv": "i64 aligned", "s_wk": 1,
        "s_rn": "i64 aligned", "s_rk": 1, "s_uv": "i64 aligned", "s_uk": 1, "R": "i32 aligned",
        "bias": None, "ref_bias": None, "softcap": None, "ref_softcap": None, "row_ids": None, "SKEW": 0,
        "EVEN_K": True, "EVEN_R": True, **options, **changes,
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name == "TARGET" or not isinstance(value, str):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = value.split()[0]
        if value.startswith("*") or value.endswith(" aligned"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiler = {k: options[k] for k in ("num_warps", "num_stages", "allow_flush_denorm") if k in options}
    return triton.compile(source, target=gpu, options=compiler)


def _loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Address ranges of loops: from the target of a backward branch to the branch."""
    found = []
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            found.append((int(branch[1], 16), address))
    return found


def epilogue(code: list[tuple[int, str]]) -> list[str]:
    """Instructions of the loop over tiles outside the loop over the width, by the shortest way.

    That is the common one: the ways of tiles that refine noise or lie at the vocabulary's edge do more. What the
    compiler moves ahead of the product counts as well, and so does the start of the next tile's loads.
    """
    products = [a for a, text in code if re.search(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)", text)]
    around = sorted((b - a, a, b) for a, b in _loops(code) if any(a <= x <= b for x in products))
    (_, begin, stop), (_, start, end) = around[0], around[-1]
    body = [(a, text) for a, text in code if start <= a <= end]
    best: dict[int, tuple[float, int]] = {}  # address -> shortest length to the end, and the next address
    for i in range(len(body) - 1, -1, -1):
        address, text = body[i]
        ways = []
        if i + 1 == len(body):
            ways.append((0.0, -1))
        elif not re.match(r"(BRA|EXIT)\b", text):
            ways.append((best[body[i + 1][0]][0], body[i + 1][0]))
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) in best:
            ways.append((best[int(jump[1], 16)][0], int(jump[1], 16)))
        length, after = min(ways, default=(float("inf"), -1))
        best[address] = (length + 1, after)
    texts, address, path = dict(body), body[0][0], []
    while address != -1:
        if not begin <= address <= stop:
            path.append(re.sub(r"^@\S+\s+", "", texts[address]))
        address = best[address][1]
    return path


def measure(name: str, dtype: str, sizes: head.Config, target: str) -> dict[str, Any]:
    """Static figures of one variant."""
    kernel, changes, _ = variants()[name]
    compiled = compile_variant(kernel, changes, dtype, sizes, target)
    if target.startswith("gfx"):
        return amd_code(compiled)[1]
    code, figures = nvidia_code(compiled)
    if dtype != "fp32":
        body = epilogue(code)
        figures["per_logit"] = round(len(body) / (sizes.BM * sizes.BN / (32 * sizes.num_warps)), 1)
        figures["top"] = dict(Counter(text.split()[0] for text in body).most_common(40))
    return figures


def configurations(dtype: str, products: int) -> list[head.Config]:
    """Every configuration that is shipped for a dtype."""
    if dtype == "fp32":
        return [c for _, c in head.WIDE]
    return [head.PAIR] if products > 1 else [c for _, c in head.NARROW]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", default=list(variants()))
    parser.add_argument("--sizes", nargs="+", help="BM,BN,BK,warps,stages to try instead of what is shipped")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--top", action="store_true", help="show the commonest instructions of the epilogue")
    args = parser.parse_args()
    results = []
    for target in args.targets:
        for dtype in args.dtypes:
            for name in args.kernels:
                tried = [head.Config(*map(int, text.split(","))) for text in args.sizes or ()]
                for sizes in tried or configurations(dtype, variants()[name][2]):
                    figures = measure(name, dtype, sizes, target)
                    results.append({"kernel": name, "dtype": dtype, "target": target, "sizes": sizes, **figures})
                    if not args.json:
                        top = figures.pop("top", None)
                        line = f"{name:20} {dtype:5} {target:7} {'x'.join(map(str, sizes)):14}"
                        print(line, figures, top if args.top else "", flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
