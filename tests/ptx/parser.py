"""Parses PTX text into kernels, instructions and basic blocks."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

# Bytes of a type. A predicate has no bytes: it is an array of bool.
SIZES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4,
    "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f16x2": 4, "bf16x2": 4,
    "u16x2": 4, "s16x2": 4, "pred": 0,
}  # fmt: skip

JUMPS = ("bra", "ret", "exit")
BARRIERS = ("bar.sync", "barrier.sync", "bar.cta.sync")
_SHARED = re.compile(r"^\s*(\.extern\s+)?\.shared\s.*?([\w$]+)\[", re.MULTILINE)
_KERNEL = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", re.DOTALL)
# A brace of a scope, a label, or a statement, whose operands may have braces.
_STATEMENT = re.compile(r"\s*(?:[{}]|[$\w%.]+:(?!:)|[^;{}]*(?:\{[^}]*\}[^;{}]*)*;)")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$.]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)


class Unsupported(Exception):
    """An instruction that the machine does not know."""


@dataclass(frozen=True)
class Address:
    """An operand in brackets: a register or a symbol, plus an offset in bytes."""

    base: str
    offset: int


Operand = str | Address | list


@dataclass(frozen=True)
class Instruction:
    op: str
    args: list[Operand]
    predicate: str | None
    negated: bool  # whether it runs if the predicate is false
    line: tuple[str, int] | None  # file and number of the source
    text: str

    @cached_property
    def parts(self) -> list[str]:
        return self.op.split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    @property
    def vector(self) -> int:
        """Number of values that a load or a store moves."""
        return next((int(p[1:]) for p in self.parts if re.fullmatch(r"v[248]", p)), 1)

    @property
    def jumps(self) -> bool:
        return self.name in JUMPS

    @property
    def waits(self) -> bool:
        return self.op.startswith(BARRIERS)


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int
    offset: int  # in the block of parameters


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    threads: int
    shared: set[str]  # symbols that stand for the start of dynamic shared memory
    instructions: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, int]  # bytes of each
    # Index of the first instruction of each basic block, and the index after its last.
    blocks: list[tuple[int, int]] = field(default_factory=list)


def parse(ptx: str) -> Kernel:
    """The kernel of a PTX text."""
    text = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    text = "\n".join(line.split("//")[0] for line in text.splitlines())
    files = {
        int(number): path.split("/")[-1]
        for number, path in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text)
    }
    text = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+).*$", r".loc \1 \2;", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.pragma.*$", "", text, flags=re.MULTILINE)
    shared = _SHARED.findall(text)
    if not all(extern for extern, _ in shared):
        raise Unsupported("static shared memory")
    found = _KERNEL.search(text)
    if found is None:
        raise Unsupported("no kernel")
    name, head, attributes = found.groups()
    parameters, size = _parameters(head)
    threads = re.search(r"\.reqntid\s+(\d+)", attributes)
    if threads is None:
        raise Unsupported(f"{name}: no number of threads")
    symbols = {symbol for _, symbol in shared}
    kernel = Kernel(name, parameters, size, int(threads[1]), symbols, [], {}, {})
    _Body(kernel, files).read(text[found.end() :])
    kernel.blocks = _blocks(kernel)
    return kernel


def _parameters(head: str) -> tuple[list[Parameter], int]:
    parameters, offset = [], 0
    for part in filter(None, (p.strip() for p in head.split(","))):
        kind = re.search(r"\.param\s+\.(\w+)", part)
        if kind is None or kind[1] not in SIZES:
            raise Unsupported(part)
        size = SIZES[kind[1]]
        offset = -(-offset // size) * size
        parameters.append(Parameter(part.split()[-1], size, offset))
        offset += size
    return parameters, offset


def _blocks(kernel: Kernel) -> list[tuple[int, int]]:
    starts = {0}
    for i, instruction in enumerate(kernel.instructions):
        if instruction.jumps or instruction.waits:
            starts.add(i + 1)
        if instruction.name == "bra":
            starts.add(kernel.labels[str(instruction.args[0])])
    end = len(kernel.instructions)
    cuts = [*sorted(s for s in starts if s < end), end]
    return list(pairwise(cuts))


def _split(text: str) -> list[str]:
    """`text`, split at the commas outside of braces."""
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


class _Body:
    """Reads the body of a kernel. Registers of an inner scope get unique names."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, str]] = [{}]
        self.line: tuple[str, int] | None = None

    def read(self, body: str) -> None:
        """Read the statements up to the brace that ends the body."""
        for found in _STATEMENT.finditer(body):
            statement = found[0].strip().removesuffix(";").rstrip()
            if statement == "{":
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            elif statement.endswith(":"):
                self.kernel.labels[statement[:-1]] = len(self.kernel.instructions)
            elif statement.startswith(".loc"):
                _, file, number = statement.split()
                self.line = (self.files.get(int(file), "?"), int(number))
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif statement and not statement.startswith("."):
                self.kernel.instructions.append(self._instruction(statement))

    def _declare(self, statement: str) -> None:
        _, kind, *tokens = statement.replace(",", " ").split()
        for token in tokens:
            many = re.fullmatch(r"(.*)<(\d+)>", token)
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [token]:
                if len(self.scopes) > 1:
                    self.scopes[-1][name] = f"{name}.{len(self.kernel.registers)}"
                    name = self.scopes[-1][name]
                self.kernel.registers[name] = SIZES[kind[1:]]

    def _instruction(self, statement: str) -> Instruction:
        found = _INSTRUCTION.fullmatch(statement)
        if found is None:
            raise Unsupported(statement)
        negated, predicate, op, rest = found.groups()
        args = [self._operand(token) for token in _split(rest)]
        predicate = predicate and self._renamed(predicate)
        return Instruction(op, args, predicate, bool(negated), self.line, statement)

    def _renamed(self, token: str) -> str:
        return next((scope[token] for scope in reversed(self.scopes) if token in scope), token)

    def _operand(self, token: str) -> Operand:
        if token.startswith("{"):
            return [self._operand(part) for part in _split(token[1:-1])]
        if token.startswith("["):
            found = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?", token[1:-1].strip())
            if found is None:
                raise Unsupported(f"address {token}")
            return Address(self._renamed(found[1]), int(found[2] or "0", 0))
        return self._renamed(token)
