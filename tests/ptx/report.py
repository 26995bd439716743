"""The report of a launch: faults, traffic, bank conflicts and instructions."""

import re
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass

from ptx.parser import Kernel


@dataclass
class Traffic:
    """Requests of loads or of stores to a region of global memory."""

    requests: int = 0  # one per warp and instruction
    bytes: int = 0  # requested by all threads
    sectors: int = 0  # sectors of 32 bytes that the requests touch, summed over requests
    fewest: int = 0  # the same if the bytes of each request were contiguous

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Touched:
    """The parts of a region that a launch touched, each counted once."""

    bytes: int = 0
    sectors: int = 0


@dataclass
class Fault:
    kind: str
    count: int  # threads
    example: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.example} ({self.count} such accesses)"


class Report:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._faults: dict[tuple[str, int | None], Fault] = {}
        self.traffic: defaultdict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self.touched: dict[tuple[str, str], Touched] = {}  # by region and "load" or "store"
        self.warps: Counter[int] = Counter()  # warps that issued an instruction, by its index
        self.banks: dict[int, tuple[int, int]] = {}  # wavefronts and the fewest, by instruction

    @property
    def faults(self) -> list[Fault]:
        return list(self._faults.values())

    @property
    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.faults}

    def fault(self, kind: str, at: int | None, count: int, example: str) -> None:
        """Add a fault of instruction `at`; further ones of its kind there add to its count."""
        if (kind, at) in self._faults:
            self._faults[kind, at].count += count
            return
        if at is not None:
            instruction = self.kernel.instructions[at]
            line = ":".join(map(str, instruction.line)) if instruction.line else "unknown line"
            text = re.sub(r"\{[^}]{40,}\}", "{...}", " ".join(instruction.text.split()))
            example += f"; {text} at {line}"
        self._faults[kind, at] = Fault(kind, count, example)

    @property
    def instructions(self) -> Counter[str]:
        """Warps that issued each kind of instruction."""
        counts: Counter[str] = Counter()
        for at, warps in self.warps.items():
            counts[self.kernel.instructions[at].op] += warps
        return counts

    @property
    def bank_conflicts(self) -> float:
        """Wavefronts of accesses to shared memory, over the fewest possible; 1 is best."""
        done = fewest = 0
        for at, (wavefronts, least) in self.banks.items():
            done += self.warps[at] * wavefronts
            fewest += self.warps[at] * least
        return done / fewest if fewest else 1.0
