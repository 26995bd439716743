"""Report what this installation can do and what it lacks: `python -m mflow_kernels.env`.

With --check, compare each operator's kernels with its reference on every GPU too. The exit code is
1 if one disagrees, does not compile or does not fit.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mflow_kernels.data.printable import counted


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absent(extra: str) -> list[str]:
    """Return the packages that an extra of this package requires and that are not installed."""
    try:
        needs = importlib.metadata.requires("mflow_kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    of_extra = re.compile(rf"""([\w.-]+).*;.*extra == ['"]{extra}['"]""")
    names = [found.group(1) for need in needs if (found := of_extra.match(need))]
    return [name for name in names if _version(name) is None]


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    path = str(nvcc) if nvcc and nvcc.is_file() else shutil.which("nvcc")
    if path is None:
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+?),", output)
    return f"{release.group(1) if release else 'unknown version'} ({path})"


def _dotted(cuda_version: int) -> str:
    return f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"


def _runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a device.

    Machine code (sm_) runs on devices of the same major version and the same or a later minor one.
    PTX (compute_) runs on all later devices.
    """
    for arch in archs:
        kind, number = arch.split("_")
        digits = re.sub(r"\D", "", number)
        compiled_for = (int(digits[:-1]), int(digits[-1]))
        if compiled_for <= capability and (kind == "compute" or compiled_for[0] == capability[0]):
            return True
    return False


def _torch_lines(archs: list[str] | None, missing: list[str]) -> list[tuple[str, str]]:
    """Return the lines about torch, triton and devices; append to `missing` what they lack."""
    try:
        import torch
    except ImportError as error:
        missing.append(f"torch does not import ({error}): pip install torch")
        return [("torch", "missing")]
    built_for = torch.version.cuda
    lines = [("torch", f"{torch.__version__} ({f'CUDA {built_for}' if built_for else 'CPU only'})")]
    lines.append(("triton", _version("triton") or "missing"))
    if _version("triton") is None:
        missing.append(
            "triton: states on a GPU are computed by plain torch without it: pip install triton"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    lines.append(("devices", f"CPU, {counted(torch.get_num_threads(), 'thread')}, {capability}"))
    if not torch.cuda.is_available():
        why = "no GPU or driver seen" if built_for else "this torch is built for the CPU only"
        missing.append(f"a GPU: {why}; everything runs on the CPU, without Triton kernels")
        return lines
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        memory = properties.total_memory / 2**30
        lines.append(("", f"cuda:{index} {properties.name}, sm_{major}{minor}, {memory:.0f} GiB"))
        lines += [("", line) for line in _what_runs(torch.device("cuda", index))]
        if archs and not _runs_on(archs, (major, minor)):
            missing.append(
                f"csrc kernels for cuda:{index}: rebuild with MFLOW_CUDA_ARCHS={major}{minor}"
            )
    if archs is not None and not archs:
        missing.append(
            "the CUDA kernels in csrc: install a CUDA toolkit with nvcc, then rebuild from source "
            "with MFLOW_CUDA=1"
        )
    return lines


def _what_runs(device: Any) -> list[str]:
    """Which operators' kernels and which networks' implementations earlier runs chose on a card."""
    from mflow_kernels.ops import agreement, fastest
    from mflow_kernels.ops.compiler import KERNELS, VARIABLE

    if KERNELS == "torch":
        return [f"plain torch computes all operators, because {VARIABLE} is torch"]
    faults = agreement.stored_faults(device)
    compared = f"{len(faults)} of {len(agreement.OPERATORS)} operators were compared here"
    lines = [f"kernels: {compared}; --check compares all"]
    lines += [f"kernels: {name} is not used: {why}" for name, why in faults.items() if why]
    lines += [f"network {key}: {choice}" for key, choice in fastest.choices(device).items()]
    return lines


def check() -> tuple[str, bool]:
    """Compare all operators on all GPUs now: a table, and whether all agree."""
    import torch

    from mflow_kernels.ops import agreement
    from mflow_kernels.ops.compiler import TRITON_INSTALLED

    if not (TRITON_INSTALLED and torch.cuda.is_available()):
        return "nothing to check: kernels need a GPU and Triton", True
    rows = [("device", "operator", "largest error of a tile", "limit", "")]
    agrees = True
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for case, finding in agreement.check(device):
            error = "-" if finding.error is None else f"{finding.error:.1e}"
            rows.append(
                (str(device), case.name, error, f"{case.limit:g}", finding.fault or "agrees")
            )
            agrees &= not finding.fault
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    text = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]
    return "\n".join(text), agrees


def report() -> str:
    """Describe versions, devices, the GPU architectures in the extension, and missing parts."""
    missing: list[str] = []
    archs: list[str] | None = None
    runtime = "none"
    try:
        native = importlib.import_module("mflow_kernels._C")
        archs = list(native.cuda_archs)
        contents = "CPU" + (f", {' '.join(archs)}" if archs else f"; no CUDA: {native.cuda_note}")
        runtime = f"{_dotted(native.cuda_runtime)}, linked statically" if archs else "none"
    except ImportError as error:
        contents = f"missing ({error})"
        missing.append(
            "the compiled extension (the CPU uses slower reference code without it): install a C++ "
            "compiler, then pip install . or python setup.py build_ext --inplace"
        )
    lines = [
        ("mflow_kernels", _version("mflow_kernels") or "not installed (run from a checkout)"),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *_torch_lines(archs, missing),
        ("extension", contents),
        ("CUDA runtime", runtime),
        ("nvcc", _nvcc() or "not found (needed only to build the CUDA kernels)"),
    ]
    absent = _absent("train")
    if absent:
        missing.append(f"for mflow: {', '.join(absent)}; pip install 'mflow_kernels[train]'")
    width = max(len(name) for name, _ in lines) + 2
    text = [f"{name:<{width}}{value}" for name, value in lines]
    text += ["", *(["missing"] if missing else ["nothing is missing"])]
    text += [f"  {line}" for line in missing]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m mflow_kernels.env", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the kernels on every GPU")
    options = parser.parse_args(arguments)
    print(report())
    if not options.check:
        return 0
    table, agrees = check()
    print(f"\n{table}")
    return int(not agrees)


if __name__ == "__main__":
    sys.exit(main())
