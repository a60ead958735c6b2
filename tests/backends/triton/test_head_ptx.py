"""The blocks of PTX in the head's kernels, run by an interpreter of the few instructions that they are made of.

No other test without a GPU sees them: Triton's interpreter takes another way.
"""

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from grade_kernels import noise
from grade_kernels.backends.triton import head_ptx

LANES = np.arange(32)
ALL = np.ones(32, bool)
SPECIAL = {"%laneid": LANES.astype(np.uint64), "%lanemask_lt": ((1 << LANES) - 1).astype(np.uint64)}
LOW = np.uint64(0xFFFFFFFF)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)


def number(x):
    return x.astype(np.uint32).view(np.float32)


def signed(x):
    return x.astype(np.uint32).view(np.int32).astype(np.int64)


COMPARE = {"gt": np.greater, "lt": np.less, "ne": np.not_equal}
VIEW = {"f32": number, "s32": signed, "u32": np.uint64}
ARITHMETIC = {
    "add.u32": lambda a, b: a + b & LOW,
    "sub.u32": lambda a, b: a - b & LOW,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b & LOW,
    "min.u32": np.minimum,
    "popc.b32": np.vectorize(lambda a: np.uint64(int(a).bit_count())),
    "mul.lo.u32": lambda a, b: a * b & LOW,
    "mul.wide.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c & LOW,
    "mad.wide.s32": lambda a, b, c: (signed(a) * signed(b)).view(np.uint64) + c,
    "cvt.rn.f32.u32": lambda a: bits(a.astype(np.float32)),
    "add.f32": lambda a, b: bits(number(a) + number(b)),
    "sub.f32": lambda a, b: bits(number(a) - number(b)),
    "mul.f32": lambda a, b: bits(number(a) * number(b)),
    "fma.rn.f32": lambda a, b, c: bits(number(a).astype(np.float64) * number(b) + number(c)),
    "lg2.approx.ftz.f32": lambda a: bits(np.log2(number(a))),
    "selp.b32": lambda a, b, p: np.where(p, a, b),
}


def run(ptx, operands):
    """Runs a block for 32 lanes; operands (`$n` to values) are changed. Returns its stores, by address and lane."""
    registers, stores = dict(operands), []

    def read(name):
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint64)
        if re.match(r"\d|-", name):
            return np.full(32, int(name, 0), np.uint64)
        return SPECIAL[name] if name in SPECIAL else registers[name]

    def write(name, value, active):
        old = registers.get(name, np.zeros(32, np.asarray(value).dtype))
        registers[name] = np.where(active, value, old)

    for statement in re.findall(r"[^;{}\n]*(?:\{[^}]*\}[^;{}]*)*;", ptx.strip()[1:]):
        guard, opcode, rest = re.fullmatch(r"\s*(?:@(\S+)\s+)?(\S+)\s+(.*?)\s*;", statement).groups()
        if opcode == ".reg":
            continue
        active = ALL
        if guard is not None:
            active = ~registers[guard[1:]] if guard.startswith("!") else registers[guard]
        names = [name for name in re.split(r"[,\s{}\[\]]+", rest) if name]
        if opcode == "bra.uni":
            assert active.all() == active.any()
            if active.all():
                break
        elif opcode.startswith("mov"):
            if "{" in rest:
                wide = read(names[2])
                write(names[0], wide & LOW, active)
                write(names[1], wide >> np.uint64(32), active)
            else:
                write(names[0], read(names[1]), active)
        elif opcode == "vote.sync.any.pred":
            write(names[0], np.full(32, read(names[1]).any()), active)
        elif opcode == "vote.sync.ballot.b32":
            write(names[0], np.full(32, int((read(names[1]).astype(np.int64) << LANES).sum()), np.uint64), active)
        elif opcode == "shfl.sync.idx.b32":
            write(names[0], read(names[1])[read(names[2]).astype(int)], active)
        elif opcode == "st.global.v2.b32":
            address, low, high = (read(name) for name in names)
            stores += [(int(address[i]), i, int(low[i]), int(high[i])) for i in LANES if active[i]]
        elif opcode.startswith("setp"):
            _, kind, *combined, view = opcode.split(".")
            found = COMPARE[kind](VIEW[view](read(names[1])), VIEW[view](read(names[2])))
            if combined:
                found = {"or": np.logical_or, "and": np.logical_and}[combined[0]](found, read(names[3]))
            write(names[0], found, active)
        else:
            write(names[0], ARITHMETIC[opcode](*(read(name) for name in names[1:])), active)
    operands.update({name: value for name, value in registers.items() if name in operands})
    return stores


def philox(counter, key):
    """The words of the noise contract, from its Random123 description."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize("rare", [False, True])
def test_refine(rare):
    rng = np.random.default_rng(0)
    words = rng.integers(256, 2**32, (4, 32), dtype=np.uint64)
    if rare:
        words[2, 7], words[0, 31] = 255, 0
    before = rng.normal(size=(4, 32)).astype(np.float32)
    counter = rng.integers(0, 2**32, (3, 32), dtype=np.uint64)
    key = rng.integers(0, 2**32, 2, dtype=np.uint64)
    operands = {f"${i}": np.zeros(32, np.uint64) for i in range(4)}
    operands |= {f"${4 + i}": bits(before[i]) for i in range(4)} | {f"${8 + i}": words[i] for i in range(4)}
    operands |= {f"${12 + i}": counter[i] for i in range(3)} | {f"${15 + i}": np.full(32, key[i]) for i in range(2)}
    assert run(head_ptx.REFINE.value, operands) == []
    expected = before.astype(np.float64)
    for i, lane in ((2, 7), (0, 31)) if rare else ():
        fine = philox([*map(int, counter[:, lane]), noise.DOMAIN_REFINE], list(map(int, key)))[i]
        word = int(words[i, lane])
        expected[i, lane] += np.log2((word + (fine + 0.5) / 2**32) / (word + 0.5))
    found = np.stack([number(operands[f"${i}"]) for i in range(4)])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (found == before).sum() == (126 if rare else 128)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_collect(threads, share):
    """Candidates of a row in token order, as many as there is room for; counts in all of the row's threads."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, (4, 32), dtype=np.uint64)
    threshold, capacity, base, stride = np.float32(2.0**-32), 9, 4096, 8 * 40
    hurdles = (words * 0x9E3779B1 & LOW).astype(np.float32) * threshold
    chosen = rng.random((4, 32)) < share
    weights = hurdles * np.where(chosen, np.float32(1.5), np.float32(0.5))
    scores = rng.normal(size=(4, 32)).astype(np.float32)
    rows = 3 + LANES // threads
    tokens = 64 + 4 * (LANES % threads)
    before = rng.integers(0, 6, 32)[LANES // threads]
    operands = {"$0": np.zeros(32, np.uint64), "$1": before.astype(np.uint64)}
    operands |= {f"${2 + i}": bits(weights[i]) for i in range(4)} | {f"${6 + i}": words[i] for i in range(4)}
    operands |= {f"${10 + i}": bits(scores[i]) for i in range(4)}
    others = tokens, rows, np.full(32, base), np.full(32, stride), np.full(32, capacity)
    operands |= {f"${14 + i}": x.astype(np.uint64) for i, x in enumerate(others)} | {
        "$19": bits(np.full(32, threshold))
    }
    stores = {address: (low, high) for address, _, low, high in run(head_ptx.COLLECT.value[threads], operands)}
    expected = {}
    counts = before.copy()
    for lane in LANES:
        first = lane // threads * threads
        for i in range(4):
            if chosen[i, lane]:
                if counts[first] < capacity:
                    address = base + stride * rows[lane] + 8 * counts[first]
                    expected[address] = tokens[lane] + i, int(bits(scores[i, lane]))
                counts[first] += 1
    assert stores == expected
    assert (operands["$0"] == counts[LANES // threads * threads]).all()
    # Threads that do not share rows as they should: nothing is written, and rows do not fit their slots.
    for name in ("$14", "$15"):
        operands[name] = np.roll(operands[name], 1)
    stores = run(head_ptx.COLLECT.value[threads], operands)
    if threads == 4 and share > 0:
        assert stores == []
        assert (operands["$0"] >= 2**30).all()
