"""Compile the csrc kernels with nvcc, and read ptxas's report of their resources."""

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.reports.aot import Compiled

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NATIVE = sorted(str(path) for path in CSRC.rglob("*.cu"))
WARPS = 8  # in a block of every csrc kernel (kWarps)

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:.*?(\d+) bytes smem)?",
    re.DOTALL,
)


def compile_native(source: str, target: str) -> list[tuple[str, Compiled]]:
    """Return the name and the resources of each kernel instance in a .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "out.cubin")
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch={target}", "-cubin"]
        made = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{made.stderr}")
    entries = made.stderr.split("ptxas info    : Compiling entry")[1:]
    found = []
    for entry in entries:
        match = _ENTRY.search("Compiling entry" + entry)
        if match is None:
            raise RuntimeError(f"cannot read ptxas: {entry}")
        name, stores, loads, registers, shared = match.groups()
        spilled = max(int(stores), int(loads))
        found.append((name, Compiled(int(registers), spilled, int(shared or 0), WARPS)))
    names = _demangle([name for name, _ in found])
    return [(name, made) for name, (_, made) in zip(names, found, strict=True)]


def _demangle(names: list[str]) -> list[str]:
    """Return names such as `forward_kernel<float, 4, true>`, if binutils has installed c++filt."""
    try:
        demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    plain = [
        re.sub(r"\(anonymous namespace\)::|^void ", "", n) for n in demangled.stdout.splitlines()
    ]
    return [name.split("(")[0].removeprefix("mflow::") for name in plain]
