"""Every kernel of the Triton backend in every configuration that its launchers choose, and the baseline.

A kernel's arguments are written as the types that Triton specialises it on ("*fp32", "i32", "i64 aligned"), everything
else is a constant. What depends on sizes is taken from the launchers' own functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from grade_kernels import noise
from grade_kernels.backends.triton import gather, head_chunks, head_support, head_tiles, onehot, row_tiles, strips
from grade_kernels.backends.triton.sizes import HeadTile, TritonSizes
from grade_kernels.backends.triton.targets import TRITON, Target
from grade_kernels.dtypes import compute_dtype
from grade_kernels.inspection import baseline

__all__ = ["ROWS", "TARGETS", "VOCAB", "Build", "builds"]


def _as_is(x: torch.Tensor) -> torch.Tensor:
    return x


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCAB = 151936
ROWS = 4096  # beside it, what predictions are made for
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_BACKEND = "grade_kernels.backends.triton"
_SIZES = TritonSizes()
# Of the row kernels: rows aligned to 16 bytes; rows that are not; any strides and row ids; the same and a shard at an
# odd offset; one row of one token, which Triton specialises on. float64 is never read 16 bytes at a time.
_LAYOUTS = {
    "aligned": ("fp32", "bf16", "fp16"),
    "odd": ("bf16", "fp32", "fp64"),
    "strided": ("fp32",),
    "shard": ("fp32",),
    "tiny": ("fp32",),
}
# Logits [A, V, B] of float32 that users have (docs/kernels.md), and whether their sample is hard.
_GIVEN: dict[str, tuple[torch.Tensor, bool]] = {
    name: (make(torch.empty(shape, device="meta")), hard)
    for name, shape, make, hard in (
        ("25088x2", (25088, 2, 1), _as_is, True),
        ("1000000x6", (1000000, 6, 1), _as_is, False),
        ("1000000x6, every second column", (1000000, 12, 1), lambda x: x[:, ::2], False),
        ("300000x4", (300000, 4, 1), _as_is, True),
        ("8192x64", (8192, 64, 1), _as_is, True),
        ("25600x32", (25600, 32, 1), _as_is, True),
        ("96x64x196", (96, 64, 196), _as_is, True),
        ("6000x320", (6000, 320, 1), _as_is, True),
        ("4x8192x256", (4, 8192, 256), _as_is, True),
        ("8x512x1024", (8, 512, 1024), _as_is, False),
        ("4096x1024", (4096, 1024, 1), _as_is, False),
    )
}
# No launcher passes these as anything but 32-bit integers, or float32 arrays.
_HEAD_INTEGERS = ("N", "group_start", "first_row", "first_split", "start", "splits", "step", "s_slots")
_HEAD_FLOATS = (
    *("best", "plain_max", "plain_sum", "top", "total", "before_max", "before_sum", "tau", "score_max"),
    *("moment", "ref_top", "ref_total"),
)


class Problem(NamedTuple):
    """Given logits that a kernel's prediction is for.

    Attributes:
        rows, vocab: N and V.
        least: bytes of the kernel's share of what the whole operation must move: each of its tensors once.
        memory: bytes that the kernel moves from and to memory.
        cached: bytes that it reads again while the cache holds them.
    """

    rows: int
    vocab: int
    least: int
    memory: int
    cached: int = 0


class Build(NamedTuple):
    """One kernel with everything that its machine code depends on.

    Attributes:
        name, dtype, configuration: what the report calls it.
        kernel: "module:function".
        arguments: type or constant of each parameter (and of others, which are not looked at).
        options: of the compiler.
        logits: that a thread handles in one round of the main loop, or with `whole` in all; 0 if there is neither.
        tile: of a product, or None.
        products: per tile.
        rows: N that its prediction is for: a tile of few rows is not launched for many if there is one of many.
        problem: that its prediction is for, if not `rows` rows of VOCAB tokens.
        whole: whether there is no loop, and everything is counted.
        chunks: heads whose library products it reads, chunk by chunk; its prediction is with them.
    """

    name: str
    dtype: str
    configuration: str
    kernel: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    logits: float = 0
    tile: HeadTile | None = None
    products: int = 0
    rows: int = ROWS
    problem: Problem | None = None
    whole: bool = False
    chunks: int = 0


def builds(target: str) -> list[Build]:
    """Everything that is compiled for a target, each machine code once."""
    found = [build for layout, dtypes in _LAYOUTS.items() for dtype in dtypes for build in _rows(dtype, target, layout)]
    found += [build for name, given in _GIVEN.items() for build in _tiles(name, given, target)]
    for dtype in ("bf16", "fp16", "fp32"):
        found += _heads(dtype, target)
        found += _gathers(dtype)
    found += _chunks(target)
    found += _combining(target)
    return found


def _rows(dtype: str, target: str, layout: str) -> list[Build]:
    """Kernels over given logits of a dtype, in one of `_LAYOUTS`."""
    compute = compute_dtype(_DTYPES[dtype])
    data, stat = f"*{dtype}", "*fp64" if compute == torch.float64 else "*fp32"
    aligned, shard, tiny = (layout == name for name in ("aligned", "shard", "tiny"))
    strided, skew = shard or layout == "strided", 3 if shard else 0
    gpu = TARGETS[target]
    sizes = strips.strip_sizes(1 if tiny else VOCAB + skew, _DTYPES[dtype], gpu.warp_size, _SIZES)
    row_stride = 1 if tiny else "i64 aligned" if aligned else "i32" if strided else "i64"
    options = strips.strip_compiler_options(_DTYPES[dtype], launched_on(target))
    common = {
        "V": 1 if tiny else "i32 aligned" if aligned else "i32", "N": "i32", "group_start": "i32" if strided else "i64",
        "logits": data, "seed": "*i64", "row_ids": "*i64" if strided else None, "SKEW": skew, **sizes,
        "BLOCK_S": triton.next_power_of_2(sizes["SPLITS"]), "DTYPE": strips.TRITON_DTYPE[compute],
        "FAST": gpu.backend == "cuda", "ALIGNED": aligned, "LOWEST": torch.finfo(compute).min,
        **dict.fromkeys(("s_n", "s_ln", "s_wn", "s_dyn", "s_outn"), row_stride),
        **dict.fromkeys(("s_v", "s_lv", "s_wv", "s_dyv", "s_outv", "s_tau"), "i64" if strided else 1),
        **dict.fromkeys(("best", "top", "total", "score_max", "logit_max", "logit_sum"), stat),
        **dict.fromkeys(("partial", "pivots", "tau"), stat),
        "tile": "*i32", "ids": "*i64", "weights": data, "dy": data, "out": data,
        "dlogprobs": None, "partial_dtau": None, "NOISY": True, "REINMAX": False,
    }  # fmt: skip
    sample, relaxation = f"{_BACKEND}.sampling:sample_scan_kernel", f"{_BACKEND}.relaxation:softmax_kernel"
    sums = f"{_BACKEND}.gradient:softmax_backward_sums_kernel"
    apply = f"{_BACKEND}.gradient:softmax_backward_apply_kernel"
    quiet, reinmax = {"NOISY": False}, {"NOISY": False, "REINMAX": True}
    scans: dict[str, tuple[str, dict[str, Any]]] = {
        "sample": (sample, {"top": None, "total": None}),
        "sample+lse": (sample, {}),
        "softmax total": (relaxation, {"weights": None, "total": None, "best": None}),
        "softmax write": (relaxation, {"best": None}),
        "relax scan": (f"{_BACKEND}.relaxation:relax_scan_kernel", {}),
        "relax write": (relaxation, {}),
        "ste sums": (sums, {}),
        "ste apply": (apply, {}),
        "ste apply+logprob+dtau": (apply, {"dlogprobs": stat, "partial_dtau": stat}),
        "st sums": (sums, quiet),
        "st apply": (apply, quiet),
        "reinmax sums": (sums, reinmax),
        "reinmax apply": (apply, reinmax),
    }
    # A skewed shard is masked all over, strip by strip.
    unrolled = 1 if skew else sizes["STRIPS"]
    logits = 0 if tiny else sizes["LANES"] * unrolled // (gpu.warp_size * strips.NUM_WARPS)
    size = ROWS * VOCAB * _DTYPES[dtype].itemsize
    # Launchers take rows that are read twice in parts, which the cache still holds.
    again = {"relax write": 1, "ste apply": 2, "ste apply+logprob+dtau": 2, "st apply": 2, "reinmax apply": 2}
    found = [
        Build(
            name, dtype, layout, kernel, {**common, **changes}, options, logits,
            problem=Problem(ROWS, VOCAB, size, size, again[name] * size) if name in again else None,
        )
        for name, (kernel, changes) in scans.items()
    ]  # fmt: skip
    found.append(
        Build("sample pick", dtype, layout, f"{_BACKEND}.sampling:sample_pick_kernel", common, options)
    )  # fmt: skip
    if not strided:  # it writes what it makes itself, so strides and offsets do not come in
        one_hot = {**common, "BLOCKS": "i32", "BLOCK": onehot.BLOCK}
        found.append(Build("one hot", dtype, layout, f"{_BACKEND}.onehot:one_hot_kernel", one_hot, options))
    if aligned and dtype != "fp16":
        naive = {**common, "BLOCK": baseline.BLOCK}
        per_thread = baseline.BLOCK // (gpu.warp_size * strips.NUM_WARPS)
        kernel = f"{baseline.__name__}:sample_kernel"
        found.append(Build("baseline sample", dtype, layout, kernel, naive, options, per_thread))
    return found


def _tiles(name: str, given: tuple[torch.Tensor, bool], target: str) -> list[Build]:
    """Kernels over tiles of rows, as they are launched for these logits and a contiguous result and gradient."""
    logits, hard = given
    plain = torch.empty(logits.shape, device="meta")
    device = launched_on(target)
    forward, _, tile = row_tiles.tile_constants(_SIZES, device, 0, l=logits, out=plain)
    backward, _, _ = row_tiles.tile_constants(_SIZES, device, 0, l=logits, dy=plain, out=plain)
    rows, vocab = logits.shape[0] * logits.shape[2], logits.shape[1]
    size, row = 4 * rows * vocab, 4 * rows  # bytes of a tensor, and of a number for each row
    # Memory is read in sectors of eight numbers. Where no two of the logits are neighbours, others come along.
    read = size * min(8, *(step for step, n in zip(logits.stride(), logits.shape, strict=True) if n > 1))
    stats = ("tau", "score_max", "best", "totals", "dots", "dtau")
    arguments = {
        **dict.fromkeys(("logits", "dy", "out", *stats), "*fp32"), "seed": "*i64", "row_ids": None, "s_tau": 1,
        "dtau": None, "partial_dtau": None, "HARD": hard, "found": "*i32" if hard else "*fp32", "STEPS": tile.steps,
        "SPLITS": tile.splits, "BLOCK_S": triton.next_power_of_2(max(1, tile.splits)),
        "LOWEST": torch.finfo(torch.float32).min,
    }  # fmt: skip

    def build(kernel: str, module: str, constants: dict[str, Any], least: int, memory: int, cached: int = 0) -> Build:
        logits_of_program = tile.rows * (4 * tile.groups if tile.splits else vocab)
        return Build(
            kernel.replace("_", " "), "fp32", name, f"{_BACKEND}.{module}:{kernel}_kernel",
            arguments | {key: _specialised(key, value) for key, value in constants.items()},
            row_tiles.tile_compiler_options(tile, device), logits_of_program / (device.warp_size * constants["num_warps"]),
            problem=Problem(rows, vocab, least, memory, cached), whole=not tile.splits,
        )  # fmt: skip

    if not tile.splits:
        taus = 0 if hard else row  # a hard sample does not depend on them
        return [
            build("row_tile", "row_relaxation", forward, read + size, read + size + row + taus),
            build("row_tile_backward", "row_gradient", backward, read + 2 * size, read + 2 * size + 2 * row),
        ]
    shares = 2 * tile.splits * row
    return [
        build("row_scan", "row_relaxation", forward, read, read + shares),
        build("row_write", "row_relaxation", forward, size, size + shares, 0 if hard else read),
        build("row_sums", "row_gradient", backward, read + size, read + size + shares),
        build("row_apply", "row_gradient", backward, size, size + shares, read + size),
    ]


def _specialised(name: str, value: Any) -> Any:
    """An argument of the kernels over tiles as Triton specialises it."""
    if name in ("A", "B", "V", "group_start"):
        return "i32"
    if name.startswith("s_") and value != 1:
        return "i32 aligned" if value % 16 == 0 else "i32"
    return value


# What kernels over a head lack without candidates, a temperature, or a reference.
_NO_SLOTS = dict.fromkeys(("before_max", "before_sum", "slots", "counts", "places", "room"))
_SAMPLE_ONLY = {**_NO_SLOTS, **dict.fromkeys(("tau", "top", "total"))}
_NO_REF = dict.fromkeys(("ref_hidden", "ref_weight", "ref_bias", "ref_softcap", "ref_top", "ref_total"))
# Kernels over a head: the function, changes to the arguments of most, and products.
_SCORES, _SOFTMAX = f"{_BACKEND}.head_sampling:head_scores_kernel", f"{_BACKEND}.head_relaxation:head_softmax_kernel"
_PASSES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sample": (_SCORES, _SAMPLE_ONLY, 1),
    "scores": (_SCORES, {}, 1),
    "scores, eps 0": (_SCORES, _NO_SLOTS, 1),
    "softmax": (_SOFTMAX, _NO_REF, 1),
    "softmax, eps 0": (_SOFTMAX, {**_NO_REF, **_NO_SLOTS}, 1),
    "softmax, ref": (_SOFTMAX, {}, 2),
    "softmax, ref, eps 0": (_SOFTMAX, _NO_SLOTS, 2),
}


def _heads(dtype: str, target: str) -> list[Build]:
    """Kernels over the product with a head of a dtype with contiguous rows."""
    every = {"bias": "*fp32", "softcap": "fp32", "row_ids": "*i64", "EVEN_K": False, "SKEW": 3}
    every_ref = {"ref_bias": "*fp32", "ref_softcap": "fp32", "EVEN_R": False}
    variants = {f"head {name}": given for name, given in _PASSES.items()} | {
        "head sample, all flags": (_SCORES, {**_SAMPLE_ONLY, **every}, 1),
        "head scores, all flags": (_SCORES, every, 1),
        "head softmax, all flags": (_SOFTMAX, {**_NO_REF, **every}, 1),
        "head softmax, ref, all flags": (_SOFTMAX, {**every, **every_ref}, 2),
    }
    added = ("bias", "softcap", "ref_bias", "ref_softcap")
    found = []
    for name, (kernel, changes, products) in variants.items():
        capability = launched_on(target).capability
        few, many = (_SIZES.head_tile(_DTYPES[dtype], products, capability, many, TRITON) for many in (False, True))
        build = head_build(name, dtype, few, target, kernel, changes, products)
        if many != few:
            found.append(build if any(changes.get(key) for key in added) else build._replace(rows=few.BM))
            build = head_build(name, dtype, many, target, kernel, {**changes, **dict.fromkeys(added)}, products)
        found.append(build)
    if dtype == "bf16":
        kernel = f"{baseline.__name__}:head_sample_kernel"
        found.append(head_build("baseline head sample", dtype, _SIZES.tiles[1], target, kernel, {}, 1))
    return found


def _chunks(target: str) -> list[Build]:
    """The same kernels where they read a product that the library has made, whatever the head's dtype."""
    gpu = TARGETS[target]
    options = head_chunks.chunk_tile_options(_SIZES, launched_on(target))
    tile = head_chunks.chunk_tile(_SIZES, launched_on(target))
    every = {"bias": "*fp32", "softcap": "fp32", "row_ids": "*i64", "SKEW": 3}
    variants = _PASSES | {
        "scores, all flags": (_SCORES, every, 1),
        "softmax, ref, all flags": (_SOFTMAX, {**every, "ref_bias": "*fp32", "ref_softcap": "fp32"}, 2),
    }
    found = []
    for name, (kernel, changes, products) in variants.items():
        build = head_build(f"chunk {name}", "fp32", tile, target, kernel, changes, products)
        buffers = {
            "weight": None, "ref_weight": None, **dict.fromkeys(("s_hn", "s_rn", "s_wv", "s_wk"), "i32 aligned"),
            **dict.fromkeys(("s_uv", "s_uk", "H", "R"), "i32 aligned"), "EVEN_R": False,
        }  # fmt: skip
        found.append(
            build._replace(
                configuration=f"{tile.BM}x{tile.BN}x{tile.num_warps}", arguments={**build.arguments, **buffers, **options},
                options={key: options[key] for key in options.keys() - arguments_of_tiles()},
                logits=tile.BM * tile.columns // (gpu.warp_size * tile.num_warps), tile=None, products=0, chunks=products,
            )
        )  # fmt: skip
    return found


def head_build(
    name: str, dtype: str, tile: HeadTile, target: str, kernel: str, changes: dict[str, Any], products: int
) -> Build:
    """A kernel over a head in one size of tiles, shipped or not, and with changes to the arguments of most."""
    gpu = TARGETS[target]
    options = head_tiles.tile_options(tile, _DTYPES[dtype], launched_on(target), _SIZES.head_split)
    arguments = {
        **dict.fromkeys(_HEAD_INTEGERS, "i32"), **dict.fromkeys(_HEAD_FLOATS, "*fp32"), "V": "i32", "H": "i32 aligned",
        **dict.fromkeys(("hidden", "weight", "ref_hidden", "ref_weight"), f"*{dtype}"), "eps": "fp32",
        "seed": "*i64", "index": "*i32", "slots": "*i64", "counts": "*i32", "places": "*i32", "room": "*i32",
        "s_hn": "i64 aligned", "s_hk": 1, "s_wv": "i64 aligned", "s_wk": 1,
        "s_rn": "i64 aligned", "s_rk": 1, "s_uv": "i64 aligned", "s_uk": 1, "R": "i32 aligned",
        "bias": None, "ref_bias": None, "softcap": None, "ref_softcap": None, "row_ids": None, "SKEW": 0,
        "EVEN_K": True, "EVEN_R": True, **options, **changes,
    }  # fmt: skip
    compiler = {key: options[key] for key in options.keys() - arguments_of_tiles()}
    per_thread = tile.BM * tile.columns // (gpu.warp_size * tile.num_warps)
    return Build(name, dtype, str(tile), kernel, arguments, compiler, per_thread, tile, products)


def launched_on(target: str) -> Target:
    """One of `TARGETS` as launchers know it."""
    gpu = TARGETS[target]
    return Target(gpu.backend, gpu.warp_size, int(gpu.arch) if gpu.backend == "cuda" else 0)


def arguments_of_tiles() -> set[str]:
    """Those of `head_tiles.tile_options` that kernels take; the others are the compiler's."""
    return {"BM", "BN", "BK", "BN2", "SERIALISE", "TILES", "THREADS", "PERMUTED", "TARGET"}


def _gathers(dtype: str) -> list[Build]:
    """Kernels over gathered rows of a table."""
    common = {
        "x": f"*{dtype}", "table": f"*{dtype}", "rows": "*i64", "tokens": "*i64", "values": "*fp32", "offsets": "*i64",
        "out": "*fp32", "s_xn": "i32 aligned", "s_tv": "i32 aligned", "s_xd": 1, "s_td": 1, "K": "i32",
        "D": "i32 aligned", "BLOCK": gather.BLOCK_COLUMNS,
    }  # fmt: skip
    kernels = {
        "gather dot": (f"{_BACKEND}.gather:gather_dot_kernel", gather.DOT_ENTRIES),
        "gather sum": (f"{_BACKEND}.gather:gather_sum_kernel", gather.SUM_ENTRIES),
    }
    return [
        Build(name, dtype, "contiguous", kernel, {**common, "ENTRIES": entries}, {"num_warps": 4})
        for name, (kernel, entries) in kernels.items()
    ]


def _combining(target: str) -> list[Build]:
    """Kernels that combine splits."""
    splits = head_tiles.split_count(VOCAB, 0, _SIZES.head_split)
    common = {
        **dict.fromkeys(
            ("top", "total", "tau", "best", "plain_max", "plain_sum", "score_max", "moment", "ref_top", "ref_total"),
            "*fp32",
        ),
        **dict.fromkeys(
            ("out_max", "out_sum", "out_total", "out_moment", "out_ref_max", "out_ref_sum", "p", "partial"), "*fp32"
        ),
        "index": "*i32", "ids": "*i64", "splits": "i32", "V": "i32", "BLOCK_S": triton.next_power_of_2(splits),
        "SHIFT": 0.0, "slots": "*i64", "counts": "*i32", "places": "*i32", "room": "*i32", "seed": "*i64",
        "row_ids": "*i64", "kept": "*i32", "offsets": "*i64", "tokens": "*i64", "s_slots": "i32", "first_row": "i32",
        "group_start": "i32", "eps": "fp32", "SKEW": 0, "DOMAIN": noise.DOMAIN_GUMBEL,
        "FAST": TARGETS[target].backend == "cuda",
        "SPLITS": strips.strip_sizes(VOCAB, torch.float32, 32, _SIZES)["SPLITS"],
    }  # fmt: skip
    support = f"{head_support.__name__}:support_kernel"
    kernels: dict[str, tuple[str, dict[str, Any]]] = {
        "normalizer": (f"{head_support.__name__}:normalizer_kernel", {}),
        "sample combine": (f"{_BACKEND}.head_sampling:sample_combine_kernel", {}),
        "softmax combine": (f"{_BACKEND}.head_relaxation:softmax_combine_kernel", {}),
        "support count": (support, dict.fromkeys(("offsets", "tokens", "p"))),
        "support write": (support, {}),
        "sum splits": (f"{strips.__name__}:sum_splits_kernel", {}),
    }
    return [
        Build(name, "fp32", f"V {VOCAB}", kernel, {**common, **changes}, {"num_warps": 1})
        for name, (kernel, changes) in kernels.items()
    ]
