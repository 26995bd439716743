"""A machine that runs compiled Triton kernels on a CPU and checks them as a sanitizer would.

Triton's own interpreter tests a kernel's source. This package tests what the compiler made of it:
Triton compiles a launch for an NVIDIA architecture, and the machine executes the PTX on copies of
the tensors. It reports

    accesses that leave a tensor, or that are not aligned to their width,
    races: two threads on one location, at least one of them writing, with nothing that orders them,
    reads of memory that nothing has written,
    barriers and warp instructions that only part of the threads reach,
    the 32-byte sectors that each warp's request touches, and bank conflicts in shared memory.

From the PTX text to a result, in this order:

    parser              the text as kernels, instructions and basic blocks
    translator          a basic block as a Python function over numpy arrays, one element a thread;
                        arithmetic, memory_access and numerics are its instructions
    machine             grids, warps, barriers and program counters
    global_memory       tensors, their checks and their traffic
    shared_memory       shared memory, asynchronous copies, their checks and bank conflicts
    tensor_cores        mma and wgmma
    launch              a Triton driver whose device is this machine

PTX is not machine code: ptxas may still fuse, reorder and spill. Races are looked for in one
schedule, in which the threads of a warp move together.
"""
