"""A machine that runs compiled Triton kernels on a CPU and checks them as a sanitizer would.

Triton's own interpreter tests a kernel's source; this package tests the compiler's output. Triton
compiles a launch for an NVIDIA architecture, and the machine executes the PTX on copies of the
tensors. It reports

    accesses that leave a tensor, or that are not aligned to their width,
    races: two threads access one location without an order, and at least one of them writes,
    reads of uninitialized memory,
    barriers and warp instructions that only some of the threads reach,
    the 32-byte sectors that each warp's request touches, and bank conflicts in shared memory.

The modules, from the PTX text to a result:

    parser              the text as kernels, instructions and basic blocks
    translator          a basic block as a Python function over numpy arrays, one element per
                        thread; arithmetic, memory_access and numerics are its instructions
    machine             grids, warps, barriers and program counters
    global_memory       tensors, their checks and their traffic
    shared_memory       shared memory, asynchronous copies, their checks and bank conflicts
    tensor_cores        mma and wgmma
    launch              a Triton driver whose device is this machine

PTX is not machine code: ptxas may still fuse, reorder and spill. The machine runs one schedule, in
which the threads of a warp move together, and searches that one for races.
"""
