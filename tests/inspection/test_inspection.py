"""What the Triton kernels compile to: limits on the code of representative ones, and the reader of machine code itself.

Compiling needs no GPU. Figures are cached by source, configuration and Triton version (see `compilation.cache_folder`).
"""

import argparse
import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from grade_kernels import cli
from grade_kernels.inspection import command, disassembly, inspect, inspector, limits, machine_code, prediction, select
from grade_kernels.inspection.configurations import TARGETS, Build, builds
from grade_kernels.inspection.devices import DEVICES, programs
from grade_kernels.inspection.disassembly import Instruction, Program
from grade_kernels.inspection.machine_code import PIPES, Figures

# What the interpreter does not see: types of scalars that are specialised, strides that are not, every flag at once.
HOPPER = (
    *("sample fp32 aligned", "sample+lse fp32 aligned", "ste apply fp32 aligned", "ste apply+logprob+dtau bf16 odd"),
    *("reinmax sums fp32 shard", "sample fp32 strided", "sample+lse fp32 tiny", "support write fp32 *"),
    *("head sample bf16 128x64*", "head scores bf16 128x64*", "baseline sample fp32 aligned"),
)
OTHERS = {
    "sm_80": ["sample fp32 aligned", "head sample bf16 128*"],
    "sm_100": ["head sample bf16 128*"],
    "sm_120": ["head sample bf16 128*"],
    "gfx942": ["sample fp32 aligned", "head sample bf16 128*"],
}


def representative(target: str, kernels: Sequence[str]) -> list[Figures]:
    """Figures of these kernels, which keep their limits. All kernels are the command's to check."""
    tasks = select([target], kernels)
    assert len(tasks) == len(kernels)
    results = inspect(tasks, processes=1)  # the suite has a process for every core already
    for (build, _), figures in zip(tasks, results, strict=True):
        assert limits.violations(build, figures) == []
        assert (figures.total is None) == (build.logits == 0), figures
        assert not figures.exchanges or figures.configuration != "aligned", figures
        # One program's epilogue is to hide behind another's product.
        assert not (target.startswith("sm_") and figures.kernel.startswith("head s")) or programs(figures) >= 2
    return results


@pytest.mark.takes_long("some seconds of ptxas for a head; Hopper's kernels are compiled from the same source")
@pytest.mark.parametrize("target", OTHERS)
def test_representative_kernels_keep_their_limits(target):
    representative(target, OTHERS[target])


def test_representative_kernels_on_hopper():
    found = {f"{f.kernel} {f.configuration} {f.target}": f for f in representative("sm_90", HOPPER)}
    # One Philox call per logit and library logarithms, against this package's noise.
    assert found["baseline sample aligned sm_90"].total > 3 * found["sample aligned sm_90"].total
    assert found["sample aligned sm_90"].bytes_per_logit == 4
    assert found["ste apply aligned sm_90"].bytes_per_logit == 12
    head = found["head sample 128x64x32x4x4 sm_90"]
    assert head.per_width["tensor"] > 0
    assert head.per_logit["special"] == pytest.approx(3.25, abs=0.2)  # two logarithms, an exponential, and one a group


def test_columns_are_permuted_where_accumulators_are_those_of_mma():
    """12.x multiplies as Ampere does, though it is called Blackwell like 10.x."""
    permuted = {target: select([target], ["head sample bf16 *"])[0][0].arguments["PERMUTED"] for target in TARGETS}
    assert permuted == {"sm_80": True, "sm_90": True, "sm_100": False, "sm_120": True, "gfx942": False}


def test_every_target_has_every_kernel():
    names = [list(dict.fromkeys((b.name, b.dtype) for b in builds(target))) for target in TARGETS]
    assert all(found == names[0] for found in names)
    labels = [(b.name, b.dtype, b.configuration) for b in builds("sm_90")]
    assert len(set(labels)) == len(labels)


# The reader of machine code


def build(**changes) -> Build:
    return Build("sample", "fp32", "aligned", "module:kernel", {}, {"num_warps": 4}, logits=2)._replace(**changes)


def figures(**changes) -> Figures:
    per_logit = dict.fromkeys(PIPES, 0.0) | {"fma": 10.0, "integer": 8.0, "special": 2.0}
    found = Figures(
        "sample", "fp32", "aligned", "sm_90", 64, 0, 0, 0, 4, 999, per_logit, None, 4.0, 0, {"FFMA": 20}, 0
    )  # fmt: skip
    return replace(found, **changes)


def test_pipes():
    expected = {
        "FFMA.FTZ": "fma", "HFMA2.BF16_V2": "fma", "IMAD.WIDE.U32": "multiply", "LOP3.LUT": "integer", "FMNMX": "integer",
        "MUFU.LG2": "special", "I2FP.F32.S32": "integer", "LDG.E.128": "memory", "LDGSTS.E.BYPASS.128": "memory",
        "LDGDEPBAR": "other", "HGMMA.64x64x16.F32.BF16": "tensor", "UTCHMMA": "tensor", "HMMA.16816.F32.BF16": "tensor",
        "LDTM.x32": "memory", "BRA.U": "other", "UIADD3": "other", "SHFL.BFLY": "memory",
    }  # fmt: skip
    assert {opcode: machine_code.pipe(opcode, "sm_90") for opcode in expected} == expected
    expected = {
        "v_mfma_f32_32x32x8_bf16": "tensor", "v_exp_f32_e32": "special", "v_mul_hi_u32": "multiply",
        "v_fmac_f32_e32": "fma", "v_pk_mul_f32": "fma", "v_xor_b32_e32": "integer", "ds_read_b128": "memory",
        "global_load_dwordx4": "memory", "s_add_i32": "other", "v_max_f32_e32": "integer",
    }  # fmt: skip
    assert {opcode: machine_code.pipe(opcode, "gfx942") for opcode in expected} == expected


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.128", 16), ("LDG.E", 4), ("LDG.E.U16", 2), ("LDG.E.ENL2.256", 32), ("STG.E.64", 8), ("LDGSTS.E.BYPASS.128", 16),
     ("LDS.128", 0), ("LDGDEPBAR", 0),
     ("global_load_dwordx4", 16), ("global_load_ushort", 2), ("buffer_store_dword", 4), ("FFMA", 0)],
)  # fmt: skip
def test_bytes(opcode, size):
    assert machine_code._bytes(opcode) == size


def code(*lines):
    """Instructions from "opcode" or "opcode ->position", the latter conditional unless it starts with a !."""
    found = []
    for line in lines:
        opcode, _, target = line.partition(" ->")
        always = opcode.startswith("!")
        goes = int(target) if target else None
        found.append(Instruction(opcode.lstrip("!"), goes is not None and not always, goes, always))
    return found


def test_main_loop_scans_whole_tiles():
    """Others mask the same loads, which is longer, or a part of them, which may be shorter."""
    scan = ["FFMA"] * 6 + ["LOP3"] * 4 + ["LDG.E"] * 2
    part = ["FFMA"] * 6 + ["LOP3"] * 4 + ["LDG.E"]
    lines = ["MOV", *scan, "BRA ->1", *scan, "FSETP", "SEL", "BRA ->14", *part, "BRA ->29", "LDS", "BRA ->41", "EXIT"]
    found = machine_code.figures(build(), "sm_90", Program(code(*lines), 40, 0, 0), 16)
    assert found.total == 13 / 2
    assert found.per_logit["fma"] == 3
    assert found.per_logit["integer"] == 2
    assert found.bytes_per_logit == 4
    assert found.instructions == len(lines)
    assert found.exchanges == 0


def test_kernels_are_read_one_after_the_other():
    """A branch in the second goes to the second's own instruction, wherever that lies."""
    first = [(0x0, "MOV R1, R2"), (0x10, "@P0 BRA 0x0"), (0x20, "EXIT"), (0x30, "BRA 0x30")]
    second = [(address, text.replace("BRA 0x", "BRA 0x4")) for address, text in first]
    second[1] = (0x10, "@P0 BRA 0x40")
    expected = code("MOV", "BRA ->0", "!EXIT")
    assert disassembly._instructions(first, 0) == expected
    assert disassembly._instructions(second, 0x40)[:3] == expected


def test_machine_code_of_a_cubin_is_its_only_kernel():
    names = b"\0.text.kernel\0.text.other\0.strtab\0"
    text = bytes(range(32))

    def cubin(*kernels):
        """An ELF file with these sections, all holding the same, and the names of sections last."""
        start = 64
        sections = [(names.index(b".text." + kernel), start, len(text)) for kernel in kernels]
        sections.append((names.index(b".strtab"), start + len(text), len(names)))
        table = b"".join(struct.pack("<2I4Q24x", name, 1, 0, 0, at, size) for name, at, size in sections)
        header = bytearray(64)
        struct.pack_into("<Q", header, 0x28, start + len(text) + len(names))
        struct.pack_into("<3H", header, 0x3A, 64, len(sections), len(sections) - 1)
        return bytes(header) + text + names + table

    assert disassembly._text(cubin(b"kernel")) == text
    with pytest.raises(ValueError, match="one kernel in a cubin, got 2"):
        disassembly._text(cubin(b"kernel", b"other"))


def test_sums_that_differ_between_lanes_are_found():
    """As Triton compiles `tl.sum(x * y, 1)` in float32 and float64, and the sum of what is rounded already."""
    single = """
        mul.f32 \t%r13, %r1, %r5;
        shfl.sync.bfly.b32 \t%r17, %r13, 2, 31, -1;
        {}
        shfl.sync.bfly.b32 \t%r19, %r18, 1, 31, -1;
        add.f32 \t%r20, %r18, %r19;
        fma.rn.f32 \t%r21, %r19, %r2, %r20;
    """
    assert disassembly.unequal_sums(single.format("fma.rn.f32 \t%r18, %r1, %r5, %r17;")) == 1
    assert disassembly.unequal_sums(single.format("add.f32 \t%r18, %r13, %r17;")) == 0
    double = """
        shfl.sync.bfly.b32 \t%r11, %r4, 2, 31, -1;
        shfl.sync.bfly.b32 \t%r12, %r3, 2, 31, -1;
        mov.b64 \t%rd30, {%r12, %r11};
        fma.rn.f64 \t%rd31, %rd1, %rd9, %rd30;
    """
    assert disassembly.unequal_sums(double) == 1


def test_batches_hold_every_task_once_and_heads_first():
    tasks = select(["sm_90", "gfx942"], ["head sample", "sample", "one hot"])
    batches = inspector._batches(tasks, 2)
    assert sorted(i for batch in batches for i in batch) == list(range(len(tasks)))
    assert all(len({tasks[i][1] for i in batch}) == 1 for batch in batches)
    heads = [all(tasks[i][0].tile is not None for i in batch) for batch in batches]
    assert heads == sorted(heads, reverse=True)
    assert len(batches) >= 8


def test_a_tile_is_counted_by_the_common_way_without_its_product():
    tile = select(["sm_90"], ["head sample bf16 128*"])[0][0].tile
    head = build(tile=tile, products=1, dtype="bf16", logits=4)
    lines = [
        "MOV",  # 0
        "LDGSTS.E.BYPASS.128",  # 1: the loop over tiles
        "BRA ->7",  # 2: past the product, which is not the common way
        "HGMMA",  # 3: the loop over the width
        *["LDGSTS.E.BYPASS.128"] * 2,
        "BRA ->3",  # 6
        "MUFU.LG2",  # 7
        "BRA ->11",  # 8: past what is rare
        *["IMAD"] * 2,
        "FFMA",  # 11
        "BRA ->1",  # 12
        "BRA ->15",  # 13: waiting, out of line, and back into the loop: no loop of its own
        "!BRA ->7",  # 14
        "!EXIT",
    ]
    found = machine_code.figures(head, "sm_90", Program(code(*lines), 40, 0, 0), 16)
    assert found.per_logit["special"] == found.per_logit["fma"] == 1 / 4
    assert found.per_logit["multiply"] == found.per_logit["tensor"] == 0
    assert found.per_logit["memory"] == 1 / 4
    # 32 bytes of each of 128 threads are a third of what a step of 32 loads: taken for one.
    assert found.per_width["tensor"] == 1 / (4 * 32)


def test_code_without_a_loop():
    found = machine_code.figures(build(), "sm_90", Program(code("FFMA", "!EXIT"), 8, 0, 0), 0)
    assert found.total is None
    assert found.bytes_per_logit is None


@pytest.mark.parametrize("tool", ["cuobjdump", "nvdisasm"])
def test_a_missing_disassembler_is_named(monkeypatch, tool):
    class Nothing:
        def __getattr__(self, name):
            raise RuntimeError(f"Cannot find {name}")

    monkeypatch.setattr(disassembly.knobs, "nvidia", Nothing())
    monkeypatch.setenv("PATH", "")
    disassembly._tool.cache_clear()
    with pytest.raises(FileNotFoundError, match=f"TRITON_{tool.upper()}_PATH"):
        disassembly._tool(tool)


# Limits and predictions


def test_worse_code_is_a_violation(monkeypatch):
    monkeypatch.setattr(limits, "TRITON", limits.MEASURED_WITH)
    label, (most, registers) = next(iter(limits.LIMITS["sm_90"].items()))
    name, dtype, configuration = label.rsplit(" ", 2)
    good = figures(kernel=name, dtype=dtype, configuration=configuration, registers=registers)
    good = replace(good, per_logit=dict.fromkeys(PIPES, 0.0) | {"fma": most})
    assert limits.violations(build(name=name), good) == []
    for worse, word in (
        ({"spills": 1}, "1 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"unequal": 2}, "2 sums in which lanes may disagree"),
        ({"registers": registers + 1}, f"{registers} allowed"),
        ({"per_logit": dict.fromkeys(PIPES, 0.0) | {"fma": most + 1}}, f"{most} allowed"),
        ({"per_logit": None}, "no main loop"),
    ):
        (words,) = limits.violations(build(name=name), replace(good, **worse))
        assert word in words
        assert label in words
    assert limits.violations(build(name="baseline sample"), replace(good, spills=9)) == []


def test_limits_are_of_kernels_that_exist():
    for target, labels in limits.LIMITS.items():
        assert set(labels) <= {f"{b.name} {b.dtype} {b.configuration}" for b in builds(target)}


def test_programs_on_a_multiprocessor():
    assert programs(figures(registers=128, warps=8)) == 2
    assert programs(figures(registers=129, warps=8)) == 1
    assert programs(figures(registers=32, warps=4, shared=100 * 1024)) == 2
    assert programs(figures(target="sm_80", registers=32, warps=4, shared=100 * 1024)) == 1
    assert programs(figures(target="gfx942", registers=128, warps=8)) == 2


def test_prediction_of_a_scan():
    h100 = DEVICES["H100"]
    logits = prediction.ROWS * prediction.VOCAB
    found = next(p for p in prediction.predict(build(), figures()) if p.device == "H100")
    assert found.floor == found.resources["memory"] == 4 * logits / h100.bandwidth
    # Two special functions at 16 a clock are 16 cycles of 128 lanes, as many as 8 integer instructions at 64.
    assert found.resources["special"] == pytest.approx(logits * 2 / 16 / (h100.multiprocessors * h100.clock))
    assert found.resources["issue"] == pytest.approx(logits * 20 / 128 / (h100.multiprocessors * h100.clock))
    assert found.seconds == max(found.resources.values())
    assert found.bound in ("memory", "issue")
    assert prediction.predict(build(), figures(per_logit=None)) == []


def test_prediction_of_a_product():
    tile = select(["sm_90"], ["head sample bf16 128*"])[0][0].tile
    head = build(tile=tile, products=1, dtype="bf16")
    found = figures(dtype="bf16", per_width=dict.fromkeys(PIPES, 0.0), bytes_per_logit=1.0, warps=8, registers=128)
    beside = next(p for p in prediction.predict(head, found) if p.device == "H100")
    product = 2 * 4096 * 151936 * 4096 / 989.4e12
    assert beside.floor == beside.resources["product"] == pytest.approx(product)
    assert "product, then epilogue" not in beside.resources
    alone = next(p for p in prediction.predict(head, replace(found, registers=200)) if p.device == "H100")
    epilogue = max(beside.resources[name] for name in DEVICES["H100"].pipes)
    assert alone.resources["product, then epilogue"] == pytest.approx(product + epilogue)


def test_a_head_of_many_rows_is_near_its_floor():
    """Predicted for H100 with 4096 rows, 151,936 tokens and 4096 hidden units: at most 1.2 times any product's floor."""
    tasks = select(["sm_90"], ["head sample bf16 128x256*", "head scores bf16 128x256*"])
    results = inspect(tasks, processes=1)
    assert [found.kernel for found in results] == ["head sample", "head scores"]
    for (tile, _), found in zip(tasks, results, strict=True):
        assert limits.violations(tile, found) == []
        (h100,) = [p for p in prediction.predict(tile, found) if p.device == "H100"]
        assert h100.rows == 4096
        assert h100.ratio <= 1.2, h100


def near_the_floor(targets: Sequence[str], kernels: Sequence[str]) -> None:
    """At most 1.3 times the floor on A100 and H100, for the kernels of a forward or a backward pass together."""
    tasks = select(targets, kernels)
    seconds: dict[tuple[str, str, bool], float] = defaultdict(float)
    floors: dict[tuple[str, str, bool], float] = defaultdict(float)
    for (rows, _), found in zip(tasks, inspect(tasks, processes=1), strict=True):
        assert limits.violations(rows, found) == []
        assert prediction.predict(rows, found), rows
        for p in prediction.predict(rows, found):
            part = p.device, rows.configuration, rows.name in ("row tile backward", "row sums", "row apply")
            seconds[part] += p.seconds
            floors[part] += p.floor
    ratios = {part: seconds[part] / floors[part] for part in seconds if part[0] in ("A100", "H100")}
    # With two tokens to a row, temperatures and scores are a large part of all bytes.
    assert {part: ratio for part, ratio in ratios.items() if ratio > 1.3 and not part[1].endswith("x2")} == {}


def test_many_small_rows_are_bound_by_their_bytes():
    """Predicted for H100, as all figures here."""
    near_the_floor(["sm_90"], ["row tile* fp32 1000000x6"])


@pytest.mark.takes_long("compiles every kernel over tiles; those of a million rows of six are compiled on each run")
def test_rows_of_every_width_are_bound_by_their_bytes():
    near_the_floor(["sm_80", "sm_90"], ["row *"])


@pytest.mark.takes_long("ten more kernels over strips, of the kind that others are compiled of on each run")
@pytest.mark.parametrize("layout", ["aligned", "odd"])
def test_long_rows_are_bound_by_their_bytes(layout):
    """Long rows are read twice, but the second time a part of them comes from the cache. A hard sample is read once."""
    names = ["sample", "one hot", "relax scan", "relax write", "ste sums", "ste apply"]
    tasks = select(["sm_80", "sm_90"], [f"{name} fp32 {layout}" for name in names])
    found = {(f.target, f.kernel): (b, f) for (b, _), f in zip(tasks, inspect(tasks, processes=1), strict=True)}
    for name in ("A100", "H100"):
        device = DEVICES[name]
        write = (
            4 * prediction.ROWS * prediction.VOCAB / device.bandwidth
        )  # what the kernel one_hot does, and nothing else

        def seconds(kernel, name=name, target=device.target):
            return next(p.seconds for p in prediction.predict(*found[target, kernel]) if p.device == name)

        assert seconds("sample") + write <= 1.3 * 2 * write
        assert seconds("relax scan") + seconds("relax write") <= 1.3 * 2 * write
        assert seconds("ste sums") + seconds("ste apply") <= 1.3 * 3 * write


# Choosing, caching, and the command


def test_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"target must be one of .*'sm_90'.*got 'sm_1'"):
        select(["sm_1"])
    with pytest.raises(ValueError, match="got 'nothing'; names: sample"):
        select(["sm_90"], ["sample", "nothing"])
    assert inspect([]) == []


def test_figures_come_from_the_cache(tmp_path):
    """In a process where kernels are compiled and not interpreted."""
    script = """
import json, os, warnings
from grade_kernels.inspection import compilation, select
warnings.simplefilter("ignore")
tasks = select(["sm_90"], ["normalizer", "sum splits"])
builds = [build for build, _ in tasks]
first = compilation.inspect_builds(builds, "sm_90")
files = sorted(compilation.cache_folder().glob("*.json"))
assert len(files) == 2
files[0].write_text(json.dumps(json.loads(files[0].read_text()) | {"registers": 77}))
files[1].write_text("{")  # cut short
again = compilation.inspect_builds(builds, "sm_90")
assert sorted(f.registers == 77 for f in again) == [False, True]
assert sum(f in first for f in again) == 1
changed = builds[0]._replace(options={"num_warps": 2})
(other,) = compilation.inspect_builds([changed], "sm_90")
assert other.warps == 2
assert len(list(compilation.cache_folder().glob("*.json"))) == 3
os.environ["XDG_CACHE_HOME"] = os.devnull  # where nothing can be kept
assert compilation.inspect_builds([changed], "sm_90") == [other]
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_command(tmp_path, capsys):
    arguments = ["inspect", "--target", "sm_90", "--kernel", "sample bf16 aligned", "sample combine"]
    paths = tmp_path / "kernels.json", tmp_path / "roofline.png"
    interpret = os.environ.get("TRITON_INTERPRET")
    assert cli.main([*arguments, "--json", str(paths[0]), "--plot", str(paths[1])]) == 0
    assert os.environ.get("TRITON_INTERPRET") == interpret
    shown = capsys.readouterr().out
    assert "H100: prediction" in shown
    assert "2 kernels, 0 beyond their limits" in shown
    kernels = json.loads(paths[0].read_text())["kernels"]
    assert [k["kernel"] for k in kernels] == ["sample", "sample combine"]
    assert kernels[0]["bytes_per_logit"] == 2
    assert {p["device"] for p in kernels[0]["predictions"]} == {"H100", "H200"}
    assert kernels[1]["predictions"] == []
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_command_fails_beyond_a_limit(monkeypatch, capsys):
    monkeypatch.setattr(command, "inspect", lambda tasks, done: [figures(dtype="bf16", spills=3) for _ in tasks])
    assert cli.main(["inspect", "--target", "sm_90", "--kernel", "sample bf16 aligned"]) == 1
    shown = capsys.readouterr().out
    assert "3 spills, 0 allowed" in shown
    assert "1 kernels, 1 beyond their limits" in shown
    assert cli.main(["inspect", "--kernel", "nothing"]) == 2


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--json", "missing/kernels.json", "no file can be written there"),
        ("--json", ".", "no file can be written there"),
        ("--plot", "roofline.txt", "must end with one of .png .svg .pdf"),
    ],
)
def test_command_checks_its_files_before_it_compiles(tmp_path, monkeypatch, capsys, option, file, message):
    monkeypatch.setattr(command, "inspect", lambda tasks, done: pytest.fail("compiled all the same"))
    assert cli.main(["inspect", option, str(tmp_path / file)]) == 2
    assert message in capsys.readouterr().out.replace("\n", "")


def test_command_with_nothing_to_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "inspect", lambda tasks, done: [figures(dtype="fp32") for _ in tasks])
    assert cli.main(["inspect", "--kernel", "sample fp32 aligned", "--plot", str(tmp_path / "roofline.png")]) == 2
    assert "nothing to plot" in capsys.readouterr().out


def test_command_needs_its_packages(monkeypatch, capsys):
    def run(arguments: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(command, "run", run)
    assert cli.main(["inspect"]) == 1
    assert "pip install 'grade-kernels[inspect]'" in capsys.readouterr().err
