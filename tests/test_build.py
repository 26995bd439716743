"""Build the extension from scratch.

One build compiles C++, without optimization; this takes 13 s of CPU time. The others replace the
compilers by scripts that create empty files and keep a list of their arguments. The installed
extension was built by the real ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build into `folder` only, without the MFLOW_ settings of this machine."""
    settings = ("MFLOW_CSRC", "MFLOW_CUDA", "MFLOW_CUDA_ARCHS")
    clean = {k: v for k, v in os.environ.items() if k not in settings}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    folders = [f"--build-temp={folder / 'temp'}", f"--build-lib={folder / 'lib'}"]
    return subprocess.run(
        [*command, *folders], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True
    )


def script(path: Path, text: str) -> Path:
    """Write a shell script that can be executed, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def empty_files(log: Path) -> str:
    """Return a compiler that creates empty files and adds its arguments to `log`, as a script."""
    create = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done'
    return f'echo "$@" >>"{log}"\n{create}'


def fake_nvcc(folder: Path, archs: str, compile: str) -> str:
    """Make a CUDA_HOME whose nvcc knows `archs` and compiles by the commands `compile`."""
    lines = "\n".join(f"echo compute_{arch}" for arch in archs.split())
    listed = f'if [ "$1" = --list-gpu-arch ]; then\n{lines}\nexit 0\nfi'
    script(folder / "bin" / "nvcc", f"{listed}\n{compile}")
    return str(folder)


@pytest.mark.long
def test_without_cuda(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", 'exec c++ "$@" -O0')  # the last option counts
    done = build(tmp_path, CXX=str(compiler), MFLOW_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built the CPU part" in done.stdout
    assert "no CUDA: left out by MFLOW_CUDA=0" in done.stdout
    # Import the built module, and nothing else of this package.
    code = "import _C; print(_C.cuda_archs, _C.cuda_runtime, repr(_C.cuda_note))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path / "lib" / "mflow_kernels",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] 0 'left out by MFLOW_CUDA=0'"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"PATH": ""}, "no C++ compiler found"), ({"MFLOW_CSRC": "0"}, "left out by MFLOW_CSRC=0")],
)
def test_without_csrc_the_package_is_pure_python(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    done = build(tmp_path, **{"CXX": "", **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"built without csrc, so the CPU uses slower references: {reason}" in done.stdout
    assert not (tmp_path / "lib").exists()


def test_an_nvcc_that_fails_only_loses_the_cuda_part(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", empty_files(tmp_path / "log"))
    home = fake_nvcc(tmp_path / "cuda", "80 90", "exit 1")
    done = build(tmp_path, CXX=str(compiler), CUDA_HOME=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_86 left out" in done.stdout
    assert "built the CPU part" in done.stdout
    assert "no CUDA" in done.stdout
    *_, python = [a for a in (tmp_path / "log").read_text().splitlines() if "python.cpp -o" in a]
    assert f'-DMFLOW_CUDA_NOTE="{home}/bin/nvcc failed when the extension was built"' in python
    assert "MFLOW_WITH_CUDA" not in python


def test_with_cuda_for_one_architecture(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", empty_files(tmp_path / "log"))
    home = fake_nvcc(tmp_path / "cuda", "80 90 100", empty_files(tmp_path / "cuda" / "log"))
    done = build(tmp_path, CXX=str(compiler), CUDA_HOME=home, MFLOW_CUDA="1", MFLOW_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built the CUDA part for sm_90 compute_90" in done.stdout
    (python,) = [a for a in (tmp_path / "log").read_text().splitlines() if "python.cpp -o" in a]
    assert '-DMFLOW_WITH_CUDA -DMFLOW_CUDA_ARCHS="sm_90 compute_90"' in python
    compiled, linked = (tmp_path / "cuda" / "log").read_text().splitlines()
    for code in ("sm_90", "compute_90"):
        assert f"-gencode=arch=compute_90,code={code} " in compiled
    assert f"-ccbin {compiler}" in compiled
    assert "masked_penalty.cu" in compiled
    assert "-shared" in linked


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MFLOW_CUDA": "yes"}, "MFLOW_CUDA: expected 0 or 1, got 'yes'"),
        ({"MFLOW_CUDA_ARCHS": "90;12"}, "expected some of 80 90 (what"),
        ({"MFLOW_CSRC": "yes"}, "MFLOW_CSRC: expected 0 or 1, got 'yes'"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (tried no-such-compiler)"),
        ({"MFLOW_CSRC": "1", "PATH": ""}, "no C++ compiler found (tried c++, g++, clang++)"),
        (
            {"MFLOW_CUDA": "1", "CUDA_HOME": "", "PATH": "", "CXX": sys.executable},
            "MFLOW_CUDA=1, but nvcc was found neither",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    home = fake_nvcc(tmp_path / "cuda", "80 90", "exit 1")
    done = build(tmp_path, **{"CUDA_HOME": home, "CUDA_PATH": "", **environment})
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
