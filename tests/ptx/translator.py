"""Turns a basic block of PTX into a Python function over numpy arrays, one element per thread.

The function is f(M, R, C, m): the machine, the registers, the constants, and the mask of the
threads that run (None for all). Each instruction has a function in `INSTRUCTIONS`, from
`arithmetic` or `memory_access`, which appends lines to the block.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx import numerics
from ptx.numerics import UNSIGNED
from ptx.parser import SIZES, Address, Instruction, Kernel, Operand, Unsupported

SHARED_BASE = 0x1000  # address of the first byte of shared memory; not 0, so that null is invalid

# Modifiers that change a result and that no instruction here implements.
REFUSED = {"cc", "relu", "rm", "rp", "rz", "sat", "satfinite"}

Emit = Callable[["Translator", Instruction], None]
INSTRUCTIONS: dict[str, Emit] = {}


def instruction(*names: str) -> Callable[[Emit], Emit]:
    """Register a function that translates the instructions of these names."""

    def register(emit: Emit) -> Emit:
        INSTRUCTIONS.update(dict.fromkeys(names, emit))
        return emit

    return register


def numpy_kind(kind: str) -> str:
    """The name in `numerics` of a PTX type's numpy dtype; bits are unsigned integers."""
    if kind == "bf16" or kind.endswith("x2"):
        raise Unsupported(f"numpy has no {kind}")
    return {"f": "f", "s": "i", "u": "u", "b": "u"}[kind[0]] + str(SIZES[kind])


def is_float(kind: str) -> bool:
    return kind in ("f16", "f32", "f64")


def natural(kind: str) -> str:
    """`kind` for floats and predicates; unsigned integers for the others."""
    return kind if kind == "pred" or is_float(kind) else bits_of(kind)


def bits_of(kind: str) -> str:
    """The type of unsigned integers as wide as `kind`."""
    return f"u{SIZES[kind] * 8}"


class Translator:
    """The basic blocks of a kernel as functions, translated when they first run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.widths = list(kernel.registers.values())
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.constants: list[Any] = []
        self.functions: dict[tuple[int, bool], Callable[..., None]] = {}
        # The block and the instruction that are being translated.
        self.masked, self.lines, self.at, self.now = False, [""], 0, kernel.instructions[0]

    def block(self, number: int, masked: bool) -> Callable[..., None]:
        """The function of a block; `masked` if only some threads of the batch run it."""
        key = (number, masked)
        if key not in self.functions:
            self.functions[key] = self._compiled(number, masked)
        return self.functions[key]

    def _compiled(self, number: int, masked: bool) -> Callable[..., None]:
        self.masked, self.lines = masked, []
        start, end = self.kernel.blocks[number]
        for at in range(start, end):
            now = self.kernel.instructions[at]
            if now.jumps or now.waits:
                continue  # the machine handles these
            self.at, self.now = at, now
            try:
                if REFUSED & set(now.parts):
                    raise Unsupported(now.op)
                INSTRUCTIONS[now.name](self, now)
            except (Unsupported, KeyError, IndexError, AttributeError, TypeError) as error:
                raise Unsupported(f"{' '.join(now.text.split())}: {error!r}") from error
        source = "def f(M, R, C, m):\n" + "".join(
            f"    {line}\n" for line in self.lines or ["pass"]
        )
        scope = vars(numerics) | {"np": np}
        exec(compile(source, f"<{self.kernel.name} block {number}>", "exec"), scope)
        return scope["f"]

    def write(self, line: str) -> None:
        self.lines.append(line)

    # Operands, as expressions

    def constant(self, value: object) -> str:
        self.constants.append(value)
        return f"C[{len(self.constants) - 1}]"

    def read(self, arg: Operand, kind: str) -> str:
        """An operand as PTX type `kind`."""
        if arg in self.index:
            return self._register(arg, kind)
        if arg.startswith("%"):
            return self._special(arg)
        if arg in self.parameters:  # its address in the parameter space
            return self.constant(UNSIGNED[SIZES[kind]](self.parameters[arg]))
        if arg in self.kernel.shared:
            return self.constant(UNSIGNED[SIZES[kind]](SHARED_BASE))
        return self.constant(_immediate(arg, kind))

    def _register(self, name: str, kind: str) -> str:
        i = self.index[name]
        if kind == "pred":
            return f"R[{i}]"
        width, want = self.widths[i], numpy_kind(kind)
        if width < SIZES[kind]:
            return f"R[{i}].astype({want})"
        narrow = f"R[{i}]" if width == SIZES[kind] else f"R[{i}].astype(u{SIZES[kind]})"
        return narrow if want[0] == "u" else f"{narrow}.view({want})"

    @staticmethod
    def _special(name: str) -> str:
        found = re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", name)
        if found is None:
            raise Unsupported(name)
        return f"M.special[{found[1]!r}][{'xyz'.index(found[2])}]"

    def spread(self, arg: Operand, kind: str) -> str:
        """An operand as an array, or a list of operands as a list of arrays."""
        if isinstance(arg, list):
            return "[" + ", ".join(self.spread(a, kind) for a in arg) + "]"
        return f"M.spread({self.read(arg, kind)})"

    def address(self, arg: Address, space: str) -> str:
        kind = "u32" if space == "shared" else "u64"
        if arg.base not in self.kernel.shared | self.parameters.keys() | self.index.keys():
            raise Unsupported(f"address {arg}")
        base = self.spread(arg.base, kind)
        if not arg.offset:
            return base
        offset = arg.offset & ((1 << 8 * SIZES[kind]) - 1)
        return f"{base} + {self.constant(UNSIGNED[SIZES[kind]](offset))}"

    def mask(self) -> str:
        """The mask of the threads that run this instruction; "None" for all."""
        predicate = self.now.predicate
        if predicate is None:
            return "m" if self.masked else "None"
        p = f"{'~' if self.now.negated else ''}R[{self.index[predicate]}]"
        return f"({p} & m)" if self.masked else f"({p})"

    def put(self, arg: Operand, expression: str) -> None:
        """Assign an expression, as wide as the register or narrower, to a register."""
        if arg == "_":
            return
        i = self.index[arg]
        width = self.widths[i]
        value = f"M.fit({expression}, {f'u{width}' if width else 'bool'})"
        mask = self.mask()
        self.write(f"R[{i}] = {value if mask == 'None' else f'np.where({mask}, {value}, R[{i}])'}")

    def put_all(self, args: list[Operand], expression: str, suffix: str = "") -> None:
        """Assign a list of arrays to registers."""
        self.write(f"v = {expression}")
        for j, one in enumerate(args):
            self.put(one, f"v[{j}]{suffix}")

    def call(self, method: str, *args: object) -> str:
        """A call of a method of the machine, which gets the mask and the instruction's index."""
        return f"M.{method}({', '.join(map(str, (*args, self.mask(), self.at)))})"

    def compute(self, i: Instruction, kinds: Sequence[str], template: str) -> None:
        """Assign `template`, in which {0}, {1}, ... are the operands, read as types `kinds`."""
        operands = [self.read(a, kind) for a, kind in zip(i.args[1:], kinds, strict=True)]
        self.put(i.args[0], template.format(*operands))


def _immediate(text: str, kind: str) -> Any:
    if kind == "pred":
        return np.bool_(int(text, 0) != 0)
    dtype = getattr(numerics, numpy_kind(kind))
    found = re.fullmatch("0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text)
    if found:  # the bits of a float
        bits = bytes.fromhex(found[1] or found[2])[::-1]
        letter = "f" if is_float(kind) else "u"
        number = np.frombuffer(bits, f"{letter}{len(bits)}")[0]
        return dtype(number) if is_float(kind) else number
    number = int(text.rstrip("U"), 0)
    if is_float(kind):
        return dtype(number)
    return UNSIGNED[SIZES[kind]](number & ((1 << 8 * SIZES[kind]) - 1)).view(dtype)
