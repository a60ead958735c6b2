"""Static cost of the Triton kernels: compiles them ahead of time and reads the machine code. Needs no GPU.

    python benchmarks/triton_static.py [--targets sm_90 gfx942] [--layout odd] [--json]

For every kernel and target: registers, bytes of spill, and instructions per logit in the main loop (the loop over tiles
that need no masks). Instructions that a whole warp shares (scalar ones on AMD, uniform ones on NVIDIA) are counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("unset TRITON_INTERPRET: interpreted functions cannot be compiled")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grade_kernels.backends.triton import gradient, onehot, relaxation, sampling, tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCAB = 151936
# Rows aligned to 16 bytes; rows that are not; any strides, row ids and a shard at an odd offset; one row of one token.
LAYOUTS = ("aligned", "odd", "general", "tiny")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def variants(dtype: str, target: str, layout: str = "aligned") -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (kernel, arguments), for logits of a dtype in one of LAYOUTS."""
    compute = "fp64" if dtype == "fp64" else "fp32"
    torch_dtype = torch.float64 if dtype == "fp64" else torch.float32
    data, stat = f"*{dtype}", f"*{compute}"
    aligned, general, tiny = (layout == name for name in ("aligned", "general", "tiny"))
    skew = 3 if general else 0
    sizes = tiles.strip_sizes(1 if tiny else VOCAB + skew, torch_dtype, TARGETS[target].warp_size)
    row_stride = 1 if tiny else "i64 aligned" if aligned else "i32" if general else "i64"
    common = {
        "V": 1 if tiny else "i32 aligned" if aligned else "i32", "N": "i32", "group_start": "i32" if general else "i64",
        "logits": data, "seed": "*i64", "row_ids": "*i64" if general else None, "SKEW": skew, **sizes,
        "BLOCK_S": triton.next_power_of_2(sizes["SPLITS"]), "DTYPE": tiles.TRITON_DTYPE[torch_dtype],
        "FAST": target.startswith("sm_"), "ALIGNED": aligned and dtype != "fp64",
        "LOWEST": torch.finfo(torch_dtype).min,
        **dict.fromkeys(("s_n", "s_ln", "s_wn", "s_dyn", "s_outn"), row_stride),
        **dict.fromkeys(("s_v", "s_lv", "s_wv", "s_dyv", "s_outv", "s_tau"), "i64" if general else 1),
        **dict.fromkeys(("best", "top", "total", "score_max", "logit_max", "logit_sum"), stat),
        **dict.fromkeys(("partial", "pivots", "tau"), stat),
        "tile": "*i32", "ids": "*i64", "weights": data, "dy": data, "out": data,
        "dlogprobs": None, "partial_dtau": None, "NOISY": True, "REINMAX": False,
    }  # fmt: skip
    table = {
        "sample": (sampling.sample_scan_kernel, {"top": None, "total": None}),
        "sample+lse": (sampling.sample_scan_kernel, {}),
        "sample pick": (sampling.sample_pick_kernel, {}),
        "one hot": (onehot.one_hot_kernel, {"BLOCKS": "i32", "BLOCK": onehot.BLOCK}),
        "softmax total": (relaxation.softmax_kernel, {"weights": None, "total": None}),
        "softmax write": (relaxation.softmax_kernel, {}),
        "ste sums": (gradient.softmax_backward_sums_kernel, {}),
        "ste apply": (gradient.softmax_backward_apply_kernel, {}),
        "ste apply+logprob+dtau": (
            gradient.softmax_backward_apply_kernel, {"dlogprobs": stat, "partial_dtau": stat},
        ),
        "st sums": (gradient.softmax_backward_sums_kernel, {"NOISY": False}),
        "st apply": (gradient.softmax_backward_apply_kernel, {"NOISY": False}),
        "reinmax sums": (gradient.softmax_backward_sums_kernel, {"NOISY": False, "REINMAX": True}),
        "reinmax apply": (gradient.softmax_backward_apply_kernel, {"NOISY": False, "REINMAX": True}),
    }  # fmt: skip
    return {name: (kernel, {**common, **changes}) for name, (kernel, changes) in table.items()}


def compile_kernel(kernel: Any, arguments: dict[str, Any], target: str) -> Any:
    """Compile a kernel for arguments given as a type ("*fp32", "i32", "i64 aligned") or else as a constant."""
    names = kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = arguments[name]
        if not isinstance(value, str):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name] = value.split()[0]
        if value.startswith("*") or value.endswith(" aligned"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.NUM_WARPS, **tiles.target_options(TARGETS[target].backend)}
    return triton.compile(source, target=TARGETS[target], options=options)


def nvidia_code(compiled: Any) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """Instructions with their addresses, and registers and spill bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        run = [str(TOOLS / "cuobjdump"), str(path)]
        listing = subprocess.run([*run, "-sass"], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([*run, "-res-usage"], capture_output=True, text=True, check=True)
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    code = [(int(a, 16), b.strip()) for a, b in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]
    return code, {"registers": numbers["REG"], "spill": numbers["STACK"] + numbers["LOCAL"]}


def nvidia_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the loops: what lies between a backward branch and its target."""
    bodies = []
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            body = [re.sub(r"^@\S+\s+", "", b) for a, b in code if int(branch[1], 16) <= a <= address]
            bodies.append(body)
    return bodies


def amd_code(compiled: Any) -> tuple[list[str], dict[str, int]]:
    """Lines of assembly, and vector registers and spills."""
    text = compiled.asm["amdgcn"]
    numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    lines = [line.split(";")[0].strip() for line in text.splitlines()]
    # Scalar registers spill into lanes of vector registers; only the private segment is memory.
    return lines, {"registers": numbers["vgpr_count"], "spill": numbers["private_segment_fixed_size"]}


def amd_loops(lines: list[str]) -> list[list[str]]:
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    bodies = []
    for i, line in enumerate(lines):
        branch = re.match(r"s_c?branch\S*\s+(\.LBB\w+)", line)
        if branch and labels.get(branch[1], i) < i:
            bodies.append([x for x in lines[labels[branch[1]] : i + 1] if x and not x.startswith(".")])
    return bodies


def measure(kernel: Any, arguments: dict[str, Any], target: str) -> dict[str, Any]:
    """Static figures of one kernel: registers, spill, instructions per logit and the commonest of them."""
    compiled = compile_kernel(kernel, arguments, target)
    code, figures = amd_code(compiled) if target.startswith("gfx") else nvidia_code(compiled)
    loops = amd_loops(code) if target.startswith("gfx") else nvidia_loops(code)
    # The main loop is the shortest of those that scan: the others mask or refine as well.
    logits = 4 * arguments["STRIPS"]  # of a thread, in one round
    scans = [body for body in loops if len(body) > 5 * logits and not any("saveexec" in x for x in body)]
    if scans:
        body = min(scans, key=len)
        figures["per_logit"] = round(len(body) / logits, 2)
        figures["shared_memory_moves"] = sum(bool(re.match(r"(STS|LDS|ds_)", x)) for x in body)
        figures["top"] = dict(Counter(x.split()[0] for x in body).most_common(24))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16", "fp64"])
    parser.add_argument("--kernels", nargs="+", help="names, as in the first column")
    parser.add_argument("--layout", default="aligned", choices=LAYOUTS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--top", action="store_true", help="show the commonest instructions of the main loop")
    args = parser.parse_args()
    results = []
    for target in args.targets:
        for dtype in args.dtypes:
            for name, (kernel, arguments) in variants(dtype, target, args.layout).items():
                if args.kernels and name not in args.kernels:
                    continue
                figures = measure(kernel, arguments, target)
                results.append({"kernel": name, "dtype": dtype, "target": target, **figures})
                if not args.json:
                    top = figures.pop("top", None)
                    print(f"{name:24} {dtype:5} {target:7}", figures, top if args.top else "", flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
