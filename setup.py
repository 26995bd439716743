"""Builds mflow_kernels._C from csrc: the CPU loops always, the CUDA kernels where nvcc is found.

A build needs neither a GPU nor torch. Without a C++ compiler or Python.h, or on another system than
Linux, the package is built without csrc, in pure Python. Four environment variables steer it:
    MFLOW_CSRC        0 leaves csrc out, 1 makes its absence an error
    MFLOW_CUDA        0 leaves the CUDA part out, 1 makes its absence an error
    MFLOW_CUDA_ARCHS  the GPU architectures to compile for, such as "80;90"
    CXX               the C++ compiler
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUDA_ARCHS = ("80", "86", "89", "90", "100")
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -pthread -DNDEBUG -Wall "
    # These change no value. They drop the bookkeeping of floating-point exceptions and errno, which
    # keeps loops from vectorizing.
    "-fno-trapping-math -fno-math-errno"
)
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -cudart static"
RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $cxx_flags $defines -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule nvcc
  command = $nvcc -MMD -MF $out.d $nvcc_flags $gencode -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $link -shared -o $out $in
  description = link $out
"""


def say(line: str) -> None:
    print(f"mflow_kernels: {line}", flush=True)


def flag(variable: str) -> str:
    """Return the value of an environment variable: "0", "1" or nothing."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"mflow_kernels: {variable}: expected 0 or 1, got {value!r}")
    return value


def compilers() -> list[str]:
    """Return the names to try, best first."""
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def compiler() -> str | None:
    return next((name for name in compilers() if shutil.which(shlex.split(name)[0])), None)


def reason_without_csrc() -> str:
    """Return why csrc cannot be built here, or nothing."""
    wanted = flag("MFLOW_CSRC")
    if wanted == "0":
        return "left out by MFLOW_CSRC=0"
    include = sysconfig.get_path("include")
    if sys.platform != "linux" and not wanted:
        return f"nobody has tried it on {sys.platform} (MFLOW_CSRC=1 tries)"
    if compiler() is None:
        reason = (
            f"no C++ compiler found (tried {', '.join(compilers())}). "
            "Install one (for example the package g++) or set CXX."
        )
    elif not (Path(include) / "Python.h").is_file():
        reason = (
            f"no Python.h in {include}. Install Python's development files "
            "(for example the package python3-dev)."
        )
    else:
        return ""
    if wanted or os.environ.get("CXX"):
        raise SystemExit(f"mflow_kernels: {reason}")
    return reason


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


@dataclass
class Cuda:
    """The CUDA part of a build. If nvcc is empty there is none, and `note` says why."""

    nvcc: str = ""
    archs: tuple[str, ...] = ()
    note: str = ""

    @property
    def gencode(self) -> list[str]:
        newest = self.archs[-1]
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}", "--threads=0"]

    @property
    def contents(self) -> str:
        """The binary's contents: machine code for each architecture, and PTX for the newest."""
        return " ".join([*(f"sm_{a}" for a in self.archs), f"compute_{self.archs[-1]}"])


def without_cuda(note: str) -> Cuda:
    """Leave the CUDA part out, which is an error if MFLOW_CUDA=1 asks for it."""
    if os.environ.get("MFLOW_CUDA") == "1":
        raise SystemExit(f"mflow_kernels: MFLOW_CUDA=1, but {note}")
    return Cuda(note=note)


def choose_cuda() -> Cuda:
    """Choose the CUDA part of the build from the environment, and report what it leaves out."""
    if flag("MFLOW_CUDA") == "0":
        return Cuda(note="left out by MFLOW_CUDA=0")
    nvcc = find_nvcc()
    if nvcc is None:
        return without_cuda("nvcc was found neither in CUDA_HOME nor on PATH")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = re.findall(r"compute_(\w+)", listed.stdout)
    chosen = tuple(re.findall(r"[^;,\s]+", os.environ.get("MFLOW_CUDA_ARCHS", "")))
    archs = chosen or CUDA_ARCHS
    unknown = [arch for arch in archs if arch not in known]
    if unknown and chosen:
        raise SystemExit(
            f"mflow_kernels: MFLOW_CUDA_ARCHS: expected some of {' '.join(known)} "
            f"(what {nvcc} knows), got {' '.join(unknown)}"
        )
    for arch in unknown:
        say(f"sm_{arch} left out: {nvcc} does not know it")
    archs = tuple(sorted((a for a in archs if a in known), key=lambda a: int(re.sub(r"\D", "", a))))
    if not archs:
        return without_cuda(f"{nvcc} knows none of sm_{' sm_'.join(CUDA_ARCHS)}")
    return Cuda(nvcc, archs)


def ninja_escape(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaBuildExt(build_ext):
    """build_ext that writes one build.ninja and runs it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = choose_cuda()
        if cuda.nvcc and not self.run_ninja(ext, cuda):
            cuda = without_cuda(f"{cuda.nvcc} failed when the extension was built")
        if not cuda.nvcc and not self.run_ninja(ext, cuda):
            raise SystemExit(
                "mflow_kernels: the C++ part did not build; see the errors above. "
                "MFLOW_CSRC=0 installs the package without it."
            )
        say("built the CPU part")
        say(f"built the CUDA part for {cuda.contents}" if cuda.nvcc else f"no CUDA: {cuda.note}")

    def run_ninja(self, ext: Extension, cuda: Cuda) -> bool:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # pybind11's headers take longer to compile than the bindings, so those are one source.
        sources = [ROOT / source for source in ext.sources]
        bindings = [path for path in sources if path.name in ("module.cpp", "bindings.cpp")]
        loops = [path for path in sources if path not in bindings]
        python, text = folder / "python.cpp", "".join(f'#include "{path}"\n' for path in bindings)
        if not python.exists() or python.read_text() != text:  # ninja compiles newer files again
            python.write_text(text)
        (folder / "build.ninja").write_text(self.ninja_file([*loops, python], cuda, output))
        have_module = subprocess.run([sys.executable, "-c", "import ninja"], capture_output=True)
        ninja = ["ninja"] if have_module.returncode else [sys.executable, "-m", "ninja"]
        try:
            return subprocess.run([*ninja, "-C", str(folder)]).returncode == 0
        except FileNotFoundError:
            raise SystemExit("mflow_kernels: ninja is missing: pip install ninja") from None

    def ninja_file(self, sources: list[Path], cuda: Cuda, output: Path) -> str:
        import pybind11

        include = [sysconfig.get_path("include"), pybind11.get_include()]
        defines = [f'-DMFLOW_CUDA_NOTE="{cuda.note}"']
        nvcc = ""
        link = f"{compiler()} -pthread"
        if cuda.nvcc:
            defines = ["-DMFLOW_WITH_CUDA", f'-DMFLOW_CUDA_ARCHS="{cuda.contents}"']
            sources = [*sources, *sorted(CSRC.rglob("*.cu"))]
            nvcc = shlex.quote(cuda.nvcc)
            if os.environ.get("CXX"):
                nvcc += f" -ccbin {shlex.quote(os.environ['CXX'])}"
            link = f"{nvcc} -cudart static -Xcompiler -pthread"
        lines = [
            f"cxx = {compiler()}",
            f"cxx_flags = {CXX_FLAGS} {shlex.join(f'-isystem{path}' for path in include)}",
            f"nvcc = {nvcc}",
            f"nvcc_flags = {NVCC_FLAGS}",
            f"gencode = {shlex.join(cuda.gencode) if cuda.nvcc else ''}",
            f"link = {link}",
            RULES,
        ]
        objects = []
        for source in sources:
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            objects.append(f"{source.parent.name}/{source.name}.o")
            lines.append(f"build {objects[-1]}: {rule} {ninja_escape(source)}")
            if source.name == "python.cpp":  # no other source uses the defines
                lines.append(f"  defines = {shlex.join(defines)}")
        lines.append(f"build {ninja_escape(output)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


without = reason_without_csrc()
if without and {"bdist_wheel", "editable_wheel", "build_ext"} & {*sys.argv}:
    say(f"built without csrc, so the CPU uses slower references: {without}")
sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cpp"))
setup(
    ext_modules=[] if without else [Extension("mflow_kernels._C", sources=sources)],
    cmdclass={"build_ext": NinjaBuildExt},
)
