"""How wide a kernel's accesses to global memory are, for each of its pointer arguments.

The widths are read from PTX: the compiler has chosen them there, and arguments still have names.
Every 64-bit address is followed back to the argument that it was computed from.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

_PARAM = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
# A choice between two pointer arguments may become a load at a chosen offset of the parameters.
_PLACE = re.compile(r"mov\.b32\s+(%r\d+), \w+_param_(\d+);")
_CHOSEN = re.compile(r"(?:selp\.b32|ld\.param\.[bu]64)\s+(%rd?\d+), \[?(%r\d+.*);")
_MOVE = re.compile(r"^\s*(?:@!?%p\d+ )?[\w.:]+\s+(%rd\d+), (.*);")
_ACCESS = re.compile(r"(?P<op>ld|st|cp\.async)\.(?P<kind>[\w.:]*)\s+(?P<operands>[^;]*);")
_ADDRESS = re.compile(r"\[ *(%rd\d+)")
_VECTOR = re.compile(r"\.v([248])(?:\.|$)")
_SIZE = re.compile(r"\.[bfsu](\d+)$")


def access_bytes(ptx: str, arguments: Sequence[str]) -> dict[str, list[int]]:
    """Return the bytes that a lane moves in each global access, by argument.

    `arguments` are those that the compiled kernel still takes, in order.

    Raises:
        ValueError: if no argument's pointer went into the address of an access.
    """
    lines = ptx.splitlines()
    roots = _roots(lines)
    found: dict[str, list[int]] = defaultdict(list)
    for line in lines:
        access = _ACCESS.search(line)
        if access is None or "global" not in access["kind"].split("."):
            continue
        # The source of cp.async is its second address, in 64 bits; the first is in shared memory.
        address = _ADDRESS.search(access["operands"])
        if address and address[1] not in roots:
            continue  # no instruction computes the address, so this code never runs
        owners = roots[address[1]] if address else set()
        if not owners:
            raise ValueError(f"no argument owns the access {line.strip()!r}")
        for owner in owners:  # several if lanes choose between the halves of a state
            if owner < len(arguments):
                found[arguments[owner]].append(_bytes(access))
    return dict(found)


def _bytes(access: re.Match[str]) -> int:
    if access["op"] == "cp.async":
        return int(access["operands"].split(",")[2].strip(), 0)
    size, vector = _SIZE.search(access["kind"]), _VECTOR.search(access["kind"])
    assert size is not None
    return int(size[1]) // 8 * (int(vector[1]) if vector else 1)


def _roots(lines: Sequence[str]) -> dict[str, set[int]]:
    """Return, for each register of an address, the pointer arguments that went into it."""
    pointers = {int(n) for line in lines for n in re.findall(r"\.u64 \.ptr .*_param_(\d+)", line)}
    roots: dict[str, set[int]] = defaultdict(set)
    moves = []
    for line in lines:
        if (param := _PARAM.search(line) or _PLACE.search(line)) is not None:
            roots[param[1]] |= {int(param[2])} & pointers
        elif (chosen := _CHOSEN.search(line)) is not None:
            moves.append((chosen[1], re.findall(r"%r\d+", chosen[2])))
        elif (move := _MOVE.match(line)) is not None and not re.match(r"\s*(@\S+ )?ld\.", line):
            moves.append((move[1], re.findall(r"%rd\d+", move[2])))
    for target, _ in moves:
        roots[target] |= set()
    changed = True
    while changed:  # loops carry addresses backwards
        changed = False
        for target, sources in moves:
            reached = set().union(*(roots.get(s, set()) for s in sources)) - roots[target]
            if reached:
                roots[target] |= reached
                changed = True
    return roots
