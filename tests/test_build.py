"""Build the extension from scratch.

The build with CUDA takes about 20 s, because nvcc starts three compilers. No other test covers how
setup.py calls them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build into `folder` only, without the MFLOW_ settings of this machine."""
    settings = ("MFLOW_CUDA", "MFLOW_CUDA_ARCHS")
    clean = {k: v for k, v in os.environ.items() if k not in settings}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    folders = [f"--build-temp={folder / 'temp'}", f"--build-lib={folder / 'lib'}"]
    return subprocess.run(
        [*command, *folders],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def inspect(folder: Path) -> str:
    """Import the built module, and nothing else of this package, and print its CUDA attributes."""
    code = "import _C; print(_C.cuda_archs, _C.cuda_runtime // 1000, repr(_C.cuda_note))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder / "lib" / "mflow_kernels",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_nvcc(folder: Path, archs: str, status: int) -> str:
    """A CUDA_HOME whose nvcc knows `archs` and compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lines = "".join(f"echo compute_{arch}\n" for arch in archs.split())
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --list-gpu-arch ]; then\n{lines}exit 0\nfi\nexit {status}\n'
    )
    nvcc.chmod(0o755)
    return str(folder)


def test_without_cuda(tmp_path: Path) -> None:
    done = build(tmp_path, MFLOW_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built the CPU part" in done.stdout
    assert "no CUDA: left out by MFLOW_CUDA=0" in done.stdout
    assert inspect(tmp_path) == "[] 0 'left out by MFLOW_CUDA=0'"
    # An nvcc that fails only loses the CUDA part.
    home = fake_nvcc(tmp_path / "cuda", "80 90", status=1)
    done = build(tmp_path, CUDA_HOME=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_86 left out" in done.stdout
    assert "no CUDA" in done.stdout
    assert "failed when the extension was built" in inspect(tmp_path)


@pytest.mark.skipif(
    shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"), reason="no nvcc here"
)
def test_with_cuda_for_one_architecture(tmp_path: Path) -> None:
    done = build(tmp_path, MFLOW_CUDA="1", MFLOW_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built the CUDA part for sm_90 compute_90" in done.stdout
    assert inspect(tmp_path).startswith("['sm_90', 'compute_90'] ")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MFLOW_CUDA": "yes"}, "MFLOW_CUDA: expected 0 or 1, got 'yes'"),
        ({"MFLOW_CUDA_ARCHS": "90;12"}, "expected some of 80 90 (what"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (tried no-such-compiler)"),
        (
            {"MFLOW_CUDA": "1", "CUDA_HOME": "", "PATH": "", "CXX": sys.executable},
            "MFLOW_CUDA=1, but nvcc was found neither",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    home = fake_nvcc(tmp_path / "cuda", "80 90", status=1)
    done = build(tmp_path, **{"CUDA_HOME": home, "CUDA_PATH": "", **environment})
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
