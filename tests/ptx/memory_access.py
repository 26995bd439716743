"""Instructions that reach memory or other threads: loads, stores, copies, matrices, shuffles."""

import re

from ptx.parser import SIZES, Instruction, Operand, Unsupported
from ptx.translator import Translator, instruction


def _space(i: Instruction) -> str:
    found = re.search(r"\.(global|shared|param)(?:::cta)?\.", i.op)
    if found is None:
        raise Unsupported(i.op)
    return found[1]


def _listed(arg: Operand) -> list[Operand]:
    return arg if isinstance(arg, list) else [arg]


@instruction("ld")
def _ld(t: Translator, i: Instruction) -> None:
    space, sign = _space(i), f".view(i{SIZES[i.type]})" if i.type[0] == "s" else ""
    loaded = t.call(f"{space}_memory.load", t.address(i.args[1], space), SIZES[i.type], i.vector)
    t.put_all(_listed(i.args[0]), loaded, sign)


@instruction("st")
def _st(t: Translator, i: Instruction) -> None:
    size, space = SIZES[i.type], _space(i)
    values = t.spread(_listed(i.args[1]), f"b{8 * size}")
    t.write(t.call(f"{space}_memory.store", t.address(i.args[0], space), size, values))


@instruction("ldmatrix")
def _ldmatrix(t: Translator, i: Instruction) -> None:
    address, transposed = t.address(i.args[1], "shared"), "trans" in i.parts
    loaded = t.call("shared_memory.load_matrices", address, len(i.args[0]), transposed)
    t.put_all(i.args[0], loaded)


@instruction("stmatrix")
def _stmatrix(t: Translator, i: Instruction) -> None:
    address, values = t.address(i.args[0], "shared"), t.spread(i.args[1], "b32")
    t.write(t.call("shared_memory.store_matrices", address, "trans" in i.parts, values))


@instruction("mma")
def _mma(t: Translator, i: Instruction) -> None:
    # mma.sync.aligned.SHAPE.row.col.D.A.B.C
    d, a, b, c = i.args
    shape, layouts, kind, sums = i.parts[3], i.parts[4:6], i.parts[-2], i.parts[-1]
    word = "f64" if kind == "f64" else "b32"
    if sums not in ("f32", "f64") or layouts != ["row", "col"]:
        raise Unsupported(i.op)
    operands = t.spread(a, word), t.spread(b, word), t.spread(c, sums)
    t.put_all(d, t.call("tensor_cores.mma", repr(shape), repr(kind), *operands))


@instruction("wgmma")
def _wgmma(t: Translator, i: Instruction) -> None:
    if i.parts[1] == "fence":
        return
    if i.parts[1] in ("commit_group", "wait_group"):
        return _group(t, i, "tensor_cores", "products")
    # wgmma.mma_async.sync.aligned.m64nNkK.f32.A.B d, a, b, scale-d, scale-a, scale-b, transposes
    d, a, b, scale, *rest = i.args
    shape, kind = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4]), i.parts[6]
    known = i.parts[5] == "f32" and kind in ("tf32", "bf16", "f16")
    if shape is None or not known or rest[:2] != ["1", "1"]:
        raise Unsupported(i.op)
    # Only a matrix in shared memory has a flag that says whether it is transposed.
    flags = [False, False, *(flag == "1" for flag in rest[2:])][-2:]
    operands = t.spread(d, "f32"), t.spread(a, "b32" if isinstance(a, list) else "b64")
    operands += t.spread(b, "b64"), *flags, t.spread(scale, "pred")
    t.put_all(d, t.call("tensor_cores.wgmma", shape[1], repr(kind), *operands))


def _group(t: Translator, i: Instruction, unit: str, groups: str) -> None:
    """Close a group of asynchronous copies or products, or wait for all but the last groups."""
    if "commit_group" in i.parts:
        return t.write(f"M.{unit}.{groups}.commit({t.mask()})")
    t.write(f"M.{unit}.wait({int(i.args[0], 0)}, {t.mask()})")


@instruction("fence", "membar")
def _fence(t: Translator, i: Instruction) -> None:
    """Memory accesses run in the order of the program, but for those of tensor cores."""
    if "proxy" in i.parts:
        t.write(f"M.shared_memory.proxy_fence({t.mask()})")


@instruction("shfl")
def _shfl(t: Translator, i: Instruction) -> None:
    operands = [t.spread(a, "u32") for a in i.args[1:4]]
    t.put_all(i.args[0].split("|"), t.call("shuffle", repr(i.parts[2]), *operands))


@instruction("redux")
def _redux(t: Translator, i: Instruction) -> None:
    if i.parts[2] != "add":
        raise Unsupported(i.op)
    to, *operands = i.args
    t.put(to, t.call("sum_of_members", *(t.spread(a, "u32") for a in operands)))


@instruction("bar")
def _bar(t: Translator, i: Instruction) -> None:
    if i.parts[1] != "warp":
        raise Unsupported(i.op)
    t.write(t.call("lanes.warp_barrier"))


@instruction("cp")
def _cp(t: Translator, i: Instruction) -> None:
    if i.parts[1] != "async" or {"bulk", "wait_all"} & set(i.parts):
        raise Unsupported(i.op)
    if {"commit_group", "wait_group"} & set(i.parts):
        return _group(t, i, "shared_memory", "copies")
    to, source, size, *taken = i.args
    # The copy reads `taken` bytes and sets the rest of `size` to zero.
    addresses = t.address(to, "shared"), t.address(source, "global")
    count = t.spread((taken or [size])[0], "u32")
    t.write(t.call("shared_memory.copy_async", "M.global_memory", *addresses, size, count))
