"""The machine on kernels written by hand: it computes the right numbers, and reports each kind of
fault that is planted."""

import numpy as np
import pytest

from ptx.handmade import run
from ptx.parser import Unsupported

ADD = """
add.u64 %d2, %a0, %d0; add.u64 %d3, %a1, %d0; add.u64 %d4, %a2, %d0;
ld.global.f32 %f0, [%d2]; ld.global.f32 %f1, [%d3];
add.f32 %f2, %f0, %f1; st.global.f32 [%d4], %f2;
"""
LOAD = "add.u64 %d2, %a0, %d0; ld.global.f32 %f0, [%d2];"


def words(n: int = 64, dtype: str = "u4") -> np.ndarray:
    return np.zeros(n, dtype)


def test_vector_add_is_exact_and_its_traffic_is_counted() -> None:
    x, y = np.arange(300, dtype="f4"), np.arange(300, dtype="f4") * 0.5
    guard = "setp.ge.u32 %p0, %r3, %n0; @%p0 bra $END;"
    (_, _, z), report = run(guard + ADD + "$END:", x, y, words(300, "f4"), grid=5, integers=[300])
    assert np.array_equal(z, x + y)
    assert not report.faults
    loads = report.traffic["a0", "load"]
    assert (loads.requests, loads.bytes, loads.sectors, loads.fewest) == (10, 1200, 38, 38)
    assert (report.touched["a2", "store"].bytes, report.touched["a2", "store"].sectors) == (
        1200,
        38,
    )


def test_accesses_past_the_end() -> None:
    x = words(300, "f4")
    _, report = run(ADD, x, x, x, grid=5)
    assert report.kinds == {"out of bounds"}
    assert [fault.count for fault in report.faults] == [20, 20, 20]
    assert "block 4 thread 44: 4 bytes at 0x4b0 past the 1200 bytes of a0" in str(report.faults[0])


def test_a_stride_of_two_touches_twice_the_sectors() -> None:
    _, report = run("shl.b64 %d0, %d0, 1;" + LOAD, words(128, "f4"))
    loads = report.traffic["a0", "load"]
    assert loads.sectors == 2 * loads.fewest


# Each thread writes its word, then reads that of the thread whose number differs in bits `span`.
READ_OTHER = """
xor.b32 %r7, %r0, {span}; shl.b32 %r7, %r7, 2; add.s32 %r7, %r5, %r7; ld.shared.u32 %r8, [%r7];
add.u64 %d2, %a0, %d1; st.global.u32 [%d2], %r8;
"""


EXCHANGED = "st.shared.u32 [%r6], %r0; bar.sync 0;" + READ_OTHER.format(span=63)
STORED = "or.b32 %r7, %r0, {}; st.shared.u32 [%r5], %r7;"  # by all threads, at one address
# A kernel, the arguments of `run`, and the kinds of faults.
KERNELS = {
    "a null pointer": ("mov.u64 %d2, 0; ld.global.f32 %f0, [%d2];", {}, "out of bounds"),
    "a misaligned vector": (
        "add.u64 %d2, %a0, 8; ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%d2];", {}, "misaligned"
    ),
    "a load": (LOAD, {}, ""),
    "a load of uninitialized memory": (LOAD, {"blank": [0]}, "uninitialized"),
    "stores at one address": ("st.global.u32 [%a0], %r0;", {}, "global race"),
    "stores of one value at one address": ("st.global.u32 [%a0], 7;", {}, ""),
    "NaNs with other bits": (STORED.format(0x7FC00000), {"shared": 256}, ""),
    "different numbers": (STORED.format(0x3F800000), {"shared": 256}, "race"),
    "a store after a barrier": (EXCHANGED, {"shared": 256}, ""),
    "a store after another thread's load": (
        EXCHANGED + "st.shared.u32 [%r6], %r8;", {"shared": 256}, "race"
    ),
    "uninitialized shared memory": ("ld.shared.u32 %r8, [%r6];", {"shared": 256}, "uninitialized"),
    "past shared memory": ("st.shared.u32 [%r6], %r0;", {"shared": 128}, "shared out of bounds"),
    "threads at different barriers": (
        "setp.lt.u32 %p0, %r0, 32; @%p0 bra $OTHER;"
        "bar.sync 0; bra $END; $OTHER: bar.sync 0; $END:", {}, "barrier",
    ),
    "part of a warp at a shuffle": (
        "setp.lt.u32 %p0, %r0, 7; @%p0 bra $END; shfl.sync.bfly.b32 %r8, %r0, 1, 31, -1; $END:",
        {}, "divergence",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KERNELS)
def test_faults(case: str) -> None:
    body, options, kind = KERNELS[case]
    assert run(body, words(), **options)[1].kinds == ({kind} if kind else set())


STORE = "st.shared.u32 [%r6], %r0;"
COPY = """
add.u64 %d3, %a1, %d1; cp.async.ca.shared.global [%r6], [%d3], 4; cp.async.commit_group;
"""


@pytest.mark.parametrize(
    ("body", "span", "races"),
    [
        (STORE + "bar.sync 0;", 63, False),
        (STORE, 63, True),
        (STORE + "bar.warp.sync -1;", 31, False),
        (STORE, 31, True),
        (STORE + "bar.warp.sync -1;", 63, True),
        (STORE, 0, False),
        (COPY + "cp.async.wait_group 0; bar.sync 0;", 63, False),
        (COPY + "bar.sync 0;", 63, True),
        (COPY + "cp.async.wait_group 1; bar.sync 0;", 63, True),  # leaves it in flight
        (COPY + "cp.async.wait_group 0;", 63, True),
        (COPY + "cp.async.wait_group 0;", 0, False),
    ],
)
def test_exchange_through_shared_memory(body: str, span: int, races: bool) -> None:
    numbers = np.arange(64, dtype="u4")
    (out, _), report = run(body + READ_OTHER.format(span=span), words(), numbers, shared=256)
    assert report.kinds - {"uninitialized"} == ({"race"} if races else set())
    if not races:
        assert not report.faults
        assert np.array_equal(out, numbers ^ span)


@pytest.mark.parametrize(("shift", "conflicts"), [(2, 1), (3, 2), (7, 32)])
def test_bank_conflicts(shift: int, conflicts: int) -> None:
    body = f"shl.b32 %r7, %r0, {shift}; add.s32 %r7, %r5, %r7; st.shared.u32 [%r7], %r0;"
    _, report = run(body, threads=32, shared=32 << shift)
    assert report.bank_conflicts == conflicts


def test_loops_of_different_lengths_then_shuffles() -> None:
    """Each thread sums 0 to its number; then a warp adds its threads up."""
    body = """
    mov.u32 %r8, 0; mov.u32 %r9, 0;
    $L: add.u32 %r8, %r8, %r9; add.u32 %r9, %r9, 1; setp.le.u32 %p1, %r9, %r0; @%p1 bra $L;
    shfl.sync.bfly.b32 %r10, %r8, 16, 31, -1; add.u32 %r8, %r8, %r10;
    shfl.sync.down.b32 %r10, %r8, 8, 31, -1; add.u32 %r8, %r8, %r10;
    add.u64 %d2, %a0, %d1; st.global.u32 [%d2], %r8;
    """
    (out,), report = run(body, words())
    lane = np.arange(32)
    sums = (np.arange(64) * np.arange(1, 65) // 2).reshape(2, 32)
    sums = sums + sums[:, lane ^ 16]
    sums = sums + sums[:, np.where(lane + 8 < 32, lane + 8, lane)]
    assert np.array_equal(out, sums.ravel())
    assert not report.faults


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


COMPARED = """
mov.b32 %r7, {one}; mov.b32 %r8, 0; setp.le.{kind} %p0|%p1, %r7, %r8;
selp.b32 %r7, 1, 0, %p0; selp.b32 %r8, 2, 0, %p1; add.u32 %r9, %r7, %r8
"""
# Instructions, and the %r9 that they give for %r7 and %r8 in thread t.
RESULTS = {
    "mul.hi.u32 %r9, %r7, %r8": lambda a, b, t: a * b >> 32,
    "mul.hi.s32 %r9, %r7, %r8": lambda a, b, t: signed(a) * signed(b) >> 32,
    "bfe.u32 %r9, %r7, 3, 7": lambda a, b, t: a >> 3 & 127,
    "bfe.s32 %r9, %r7, 3, 7": lambda a, b, t: (a >> 3 & 127) - (a >> 2 & 128),
    "bfi.b32 %r9, %r7, %r8, 8, 8": lambda a, b, t: (b & ~0xFF00) | (a & 0xFF) << 8,
    "prmt.b32 %r9, %r7, %r8, 0x7531": lambda a, b, t: (
        a >> 8 & 255 | (a >> 24) << 8 | (b >> 8 & 255) << 16 | (b >> 24) << 24
    ),
    "shr.s32 %r9, %r7, 4": lambda a, b, t: signed(a) >> 4,
    "shr.u32 %r9, %r7, 40": lambda a, b, t: 0,
    "div.s32 %r9, %r7, %r8": lambda a, b, t: int(signed(a) / signed(b)),
    "rem.u32 %r9, %r7, %r8": lambda a, b, t: a % b,
    "add.s16x2 %r9, %r7, %r8": lambda a, b, t: (
        ((a >> 16) + (b >> 16)) << 16 | ((a + b) & 0xFFFF)  # no carry between the halves
    ),
    # The sums of groups of eight threads of a warp.
    "and.b32 %r9, %r0, 24; shl.b32 %r9, 255, %r9; redux.sync.add.s32 %r9, %r0, %r9": (
        lambda a, b, t: sum(range(t & ~7, (t & ~7) + 8))
    ),
    # The lower half is -1, the upper one 1.
    COMPARED.format(one=0x3F80BF80, kind="bf16x2"): lambda a, b, t: 1,
    COMPARED.format(one=0x3C00BC00, kind="f16x2"): lambda a, b, t: 1,
}


@pytest.mark.parametrize("instruction", RESULTS)
def test_results(instruction: str) -> None:
    a = np.array([2**31 + 5, 7, 0xDEADBEEF, 1] * 16, "u4")
    b = np.array([3, 2**32 - 1, 0x12345, 9] * 16, "u4")
    body = f"""
    add.u64 %d5, %a0, %d1; ld.global.u32 %r7, [%d5]; add.u64 %d5, %a1, %d1;
    ld.global.u32 %r8, [%d5];
    {instruction}; add.u64 %d2, %a2, %d1; st.global.u32 [%d2], %r9;
    """
    (_, _, out), report = run(body, a, b, words())
    want = [
        RESULTS[instruction](*given) % 2**32
        for given in zip(a.tolist(), b.tolist(), range(64), strict=True)
    ]
    assert out.tolist() == want
    assert not report.faults


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 %f0, %f1, %f2",
        "fma.rn.sat.f32 %f0, %f1, %f2, %f3",
        "sqrt.rp.f32 %f0, %f1",
        "cvt.rz.bf16x2.f32 %r7, %f1, %f2",
        "cvt.rm.f32.s32 %f0, %r7",
        "cvt.rzi.s32.f32 %r7, %f0",
        "fma.rn.relu.bf16x2 %r7, %r8, %r9, %r10",
        "setp.lt.and.u32 %p0|%p1, %r0, %r7, %p2",
        "bar.sync 1, 64",
    ],
)
def test_other_forms_of_an_instruction_are_refused(instruction: str) -> None:
    with pytest.raises(Unsupported, match=instruction.split()[0]):
        run(f"{instruction};")
