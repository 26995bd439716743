"""Instructions that reach memory or other threads: loads, stores, copies, matrices, shuffles."""

import re

from ptx.parser import SIZES, Address, Instruction, Unsupported
from ptx.translator import Translator, instruction


def _space(i: Instruction) -> str:
    if "global" in i.parts:
        return "global"
    if "shared" in i.parts or "shared::cta" in i.parts or ":cta" in i.op:
        return "shared"
    raise Unsupported(i.op)


def _store(space: str) -> str:
    return "M.memory" if space == "global" else "M.shared"


@instruction("ld")
def _ld(t: Translator, i: Instruction) -> None:
    size = SIZES[i.type]
    to = i.args[0] if isinstance(i.args[0], list) else [i.args[0]]
    if "param" in i.parts:
        source = i.args[1]
        assert isinstance(source, Address), source
        t.write(f"a = M.spread({t.read(source.base, 'u64')})")
        for j, one in enumerate(to):
            offset = source.offset + j * size
            t.put(one, f"M.parameter(a, {offset}, {size}, {i.type[0] == 's'}, {t.mask()})")
        return
    space = _space(i)
    address = t.address(i.args[1], space)
    t.write(f"v = {_store(space)}.load({address}, {size}, {i.vector}, {t.mask()}, {t.at})")
    for j, one in enumerate(to):
        t.put(one, f"v[{j}].view(i{size})" if i.type[0] == "s" else f"v[{j}]")


@instruction("st")
def _st(t: Translator, i: Instruction) -> None:
    size, space = SIZES[i.type], _space(i)
    values = t.spread(i.args[1] if isinstance(i.args[1], list) else [i.args[1]], f"b{8 * size}")
    address = t.address(i.args[0], space)
    t.write(f"{_store(space)}.store({address}, {size}, {values}, {t.mask()}, {t.at})")


def _matrices(i: Instruction) -> int:
    return int(next(p for p in i.parts if re.fullmatch(r"x[124]", p))[1:])


@instruction("ldmatrix")
def _ldmatrix(t: Translator, i: Instruction) -> None:
    address, transposed = t.address(i.args[1], "shared"), "trans" in i.parts
    t.write(
        f"v = M.shared.load_matrices({address}, {_matrices(i)}, {transposed}, {t.mask()}, {t.at})"
    )
    for j, one in enumerate(i.args[0]):
        t.put(one, f"v[{j}]")


@instruction("stmatrix")
def _stmatrix(t: Translator, i: Instruction) -> None:
    assert isinstance(i.args[1], list)
    address, values = t.address(i.args[0], "shared"), t.spread(i.args[1], "b32")
    t.write(
        f"M.shared.store_matrices({address}, {'trans' in i.parts}, {values}, {t.mask()}, {t.at})"
    )


@instruction("mma")
def _mma(t: Translator, i: Instruction) -> None:
    _, a, b, c = i.args
    assert isinstance(a, list)
    assert isinstance(b, list)
    assert isinstance(c, list)
    # mma.sync.aligned.SHAPE.row.col.D.A.B.C
    kind, sums = i.parts[-2], i.parts[-1]
    word = "f64" if kind == "f64" else "b32"
    if sums not in ("f32", "f64") or i.parts[4:6] != ["row", "col"]:
        raise Unsupported(i.op)
    t.write(
        f"v = M.tensor_cores.mma({i.parts[3]!r}, {kind!r}, {t.spread(a, word)},"
        f" {t.spread(b, word)}, {t.spread(c, sums)}, {t.mask()}, {t.at})"
    )
    for j, one in enumerate(i.args[0]):
        t.put(one, f"v[{j}]")


@instruction("wgmma")
def _wgmma(t: Translator, i: Instruction) -> None:
    if i.parts[1] == "fence":
        return
    if i.parts[1] == "commit_group":
        return t.write(f"M.tensor_cores.commit({t.mask()})")
    if i.parts[1] == "wait_group":
        return t.write(f"M.tensor_cores.wait({int(str(i.args[0]), 0)}, {t.mask()})")
    # wgmma.mma_async.sync.aligned.m64nNkK.f32.A.B d, a, b, scale-d, scale-a, scale-b, transposes
    d, a, b, scale, *rest = i.args
    assert isinstance(d, list)
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    known = i.parts[5] == "f32" and i.parts[6] in ("tf32", "bf16", "f16")
    if shape is None or not known or rest[:2] != ["1", "1"]:
        raise Unsupported(i.op)
    # Only a matrix in shared memory has a flag that says whether it is transposed.
    flags = [flag == "1" for flag in rest[2:]]
    a_t, b_t = (flags if len(flags) == 2 else [False, *flags]) if flags else [False, False]
    left = t.spread(a, "b32") if isinstance(a, list) else f"M.spread({t.read(a, 'b64')})"
    t.write(
        f"v = M.tensor_cores.wgmma({shape[1]}, {i.parts[6]!r}, {t.spread(d, 'f32')}, {left},"
        f" M.spread({t.read(b, 'b64')}), {a_t}, {b_t}, M.spread({t.read(scale, 'pred')}),"
        f" {t.mask()}, {t.at})"
    )
    for j, one in enumerate(d):
        t.put(one, f"v[{j}]")


@instruction("fence")
def _fence(t: Translator, i: Instruction) -> None:
    if "proxy" in i.parts:
        t.write(f"M.shared.proxy_fence({t.mask()})")


@instruction("shfl")
def _shfl(t: Translator, i: Instruction) -> None:
    to, _, found = str(i.args[0]).partition("|")
    a, b, c, _ = i.args[1:]
    t.write(
        f"v = M.shuffle({i.parts[2]!r}, M.spread({t.read(a, 'u32')}), M.spread({t.read(b, 'u32')}),"
        f" M.spread({t.read(c, 'u32')}), {t.mask()}, {t.at})"
    )
    t.put(to, "v[0]")
    if found:
        t.put(found, "v[1]")


@instruction("redux")
def _redux(t: Translator, i: Instruction) -> None:
    if i.parts[2] != "add":
        raise Unsupported(i.op)
    to, value, members = i.args
    t.write(
        f"v = M.sum_of_members(M.spread({t.read(value, 'u32')}),"
        f" M.spread({t.read(members, 'u32')}), {t.mask()}, {t.at})"
    )
    t.put(to, "v")


@instruction("bar")
def _bar(t: Translator, i: Instruction) -> None:
    if i.parts[1] != "warp":
        raise Unsupported(i.op)
    t.write(f"M.lanes.warp_barrier({t.mask()}, {t.at})")


@instruction("cp")
def _cp(t: Translator, i: Instruction) -> None:
    if i.parts[1] != "async" or "bulk" in i.parts:
        raise Unsupported(i.op)
    if "commit_group" in i.parts:
        return t.write(f"M.shared.commit({t.mask()})")
    if "wait_group" in i.parts:
        return t.write(f"M.shared.wait({int(str(i.args[0]), 0)}, {t.mask()})")
    if "wait_all" in i.parts:
        raise Unsupported(i.op)
    size = int(str(i.args[2]), 0)
    # The copy reads `taken` bytes and sets the rest of `size` to zero.
    taken = t.read(i.args[3], "u32") if len(i.args) > 3 else f"u4({size})"
    t.write(
        f"M.shared.copy_async(M.memory, {t.address(i.args[0], 'shared')},"
        f" {t.address(i.args[1], 'global')}, {size}, M.spread({taken}), {t.mask()}, {t.at})"
    )


@instruction("membar")
def _membar(t: Translator, i: Instruction) -> None:
    """Nothing to do: the machine runs memory accesses in the order of the program."""
