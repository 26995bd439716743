"""Kernels written in PTX by hand, run on numpy arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ptx.global_memory import GlobalMemory, Region
from ptx.machine import Machine
from ptx.parser import parse
from ptx.report import Report
from ptx.translator import Translator

# Registers on entry. %a0, %a1, ...: addresses of the arrays; %n0, ...: the integers; %r0: index of
# the thread in its block; %r3: index of the thread in the grid; %d1: 4 * %r0; %d0: 4 * %r3;
# %r5: address of shared memory; %r6: address of the thread's word there.
_HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k({parameters}) .reqntid {threads} {{
.reg .b32 %r<20>; .reg .b64 %d<20>; .reg .b64 %a<5>; .reg .b32 %n<5>; .reg .pred %p<5>;
.reg .f32 %f<9>;
{loads}
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
mad.lo.s32 %r3, %r1, %r2, %r0;
mul.wide.u32 %d0, %r3, 4; mul.wide.u32 %d1, %r0, 4;
shl.b32 %r4, %r0, 2; mov.b32 %r5, smem; add.s32 %r6, %r5, %r4;
{body}
ret;
}}
"""


def run(
    body: str,
    *arrays: NDArray,
    threads: int = 64,
    grid: int = 1,
    shared: int = 0,
    integers: Sequence[int] = (),
    blank: Sequence[int] = (),
) -> tuple[list[NDArray], Report]:
    """The arrays after a launch, and its report. `blank` lists the arrays (by index) that are
    uninitialized before it."""
    parameters = [f".param .u64 a{i}" for i in range(len(arrays))]
    parameters += [f".param .u32 n{i}" for i in range(len(integers))]
    loads = [f"ld.param.u64 %a{i}, [a{i}];" for i in range(len(arrays))]
    loads += [f"ld.param.u32 %n{i}, [n{i}];" for i in range(len(integers))]
    text = _HEAD.format(
        parameters=", ".join(parameters), threads=threads, loads="\n".join(loads), body=body
    )
    kernel = parse(text)
    memory = GlobalMemory(Report(kernel))
    regions = [
        Region(
            f"a{i}", a.tobytes(), 4, unwritten=np.ones(a.nbytes // 4, bool) if i in blank else None
        )
        for i, a in enumerate(arrays)
    ]
    packed = np.array([memory.add(region) for region in regions], "u8").tobytes()
    packed += np.array(integers, "u4").tobytes()
    Machine(Translator(kernel), memory, packed, (grid, 1, 1), shared).run()
    after = [r.data[: r.nbytes].view(a.dtype) for r, a in zip(regions, arrays, strict=True)]
    return after, memory.report
