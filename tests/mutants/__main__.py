"""Plant the faults of faults.txt, one at a time, and say which of their room's tests notices.

    python tests/mutants [--list] [--only NAME ...] [--room ROOM ...] [--jobs N] [--clean]

Each fault is planted in a copy of the tree; the checkout is never changed. The exit code is 1 if a
fault survives. `--clean` runs the same tests on unchanged copies: they must pass, or they would
seem to notice every fault. All faults take the better part of an hour on two cores.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds of a test run; a fault that makes a test hang is found


class Fault(NamedTuple):
    """One fault: in `file`, `old` becomes `new`.

    `tests` are arguments of pytest, after settings of the environment such as TRITON_INTERPRET=1.
    """

    room: str
    name: str
    file: str
    old: str
    new: str
    tests: str

    def planted(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected its old text once in {self.file}, found it "
                f"{text.count(self.old)} times: {self.old!r}"
            )
        return text.replace(self.old, self.new)


def read_faults() -> list[Fault]:
    """The faults of faults.txt, which describes its format."""
    found: list[dict[str, str]] = []
    room = tests = ""
    for line in Path(__file__).with_name("faults.txt").read_text().splitlines():
        key = {"- ": "old", "+ ": "new"}.get(line[:2])
        if line.startswith("== "):
            room, tests = line[3:].split(": ", 1)
        elif key:
            before = found[-1].get(key)
            found[-1][key] = line[2:] if before is None else f"{before}\n{line[2:]}"
        elif line and not line.startswith("#"):
            name, file, *own = line.split(maxsplit=2)
            found.append({"room": room, "name": name, "file": file, "tests": (*own, tests)[0]})
    return [Fault(**fault) for fault in found]


class Outcome(NamedTuple):
    """What the tests said: the first that failed, or None."""

    noticed: str | None
    seconds: float


def judge(fault: Fault, clean: bool = False) -> Outcome:
    """Run the fault's tests on a copy of the tree, with the fault unless `clean`."""
    with tempfile.TemporaryDirectory(prefix="mflow-mutant-") as folder:
        copy = Path(folder)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
        extension = [path.relative_to(ROOT) for path in ROOT.glob("mflow_kernels/_C*.so")]
        for name in (*filter(None, names.decode().split("\0")), *extension):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        path = copy / fault.file
        mutant = fault.planted(path.read_text())
        begin = time.monotonic()
        if not clean:
            path.write_text(mutant)
            if fault.file.startswith("csrc/"):
                build(copy)
        return Outcome(first_failure(copy, fault.tests), time.monotonic() - begin)


def build(copy: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=copy, env=os.environ | {"MFLOW_CUDA": "0"},
                         capture_output=True, text=True, check=False)  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"csrc was not built:\n{run.stderr[-2000:]}")


def first_failure(copy: Path, tests: str) -> str | None:
    words = shlex.split(tests)
    given = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    arguments = [word for word in words if not re.match("[A-Z_]+=", word)]
    command = [sys.executable, "-m", "pytest", "-x", "-n0", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | given
    environment["PYTHONPATH"] = f"{copy}{os.pathsep}{copy / 'tests'}"
    try:
        run = subprocess.run([*command, *arguments], cwd=copy, env=environment, text=True,
                             capture_output=True, timeout=LIMIT, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"a test that took more than {LIMIT} s"
    if run.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode > 2 or not failed:
        raise RuntimeError(
            f"pytest ended with {run.returncode}:\n{(run.stdout + run.stderr)[-2000:]}"
        )
    return failed[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the faults, and plant none")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these faults")
    parser.add_argument("--room", nargs="+", help="plant the faults of these rooms")
    parser.add_argument("--jobs", type=int, default=2, help="number of test runs at a time")
    parser.add_argument("--clean", action="store_true", help="plant none, but run the tests")
    options = parser.parse_args(arguments)
    faults = [f for f in read_faults() if not options.room or f.room in options.room]
    faults = [f for f in faults if not options.only or f.name in options.only]
    if not faults:
        parser.error("no such fault")
    if options.clean:
        faults = list({f.tests: f for f in faults}.values())
    if options.list:
        for fault in faults:
            print(f"{fault.room:11} {fault.name:34} {fault.file}: {fault.tests}")
        return 0
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(lambda fault: judge(fault, options.clean), faults)
        for fault, (noticed, seconds) in zip(faults, outcomes, strict=True):
            wrong += (noticed is None) is not options.clean
            if options.clean:
                said = f"fails: {noticed}" if noticed else "passes"
                print(f"{said} ({seconds:.0f} s): {fault.tests}", flush=True)
                continue
            said = f"found by {noticed}" if noticed else f"SURVIVED {fault.tests}"
            print(f"{fault.room:11} {fault.name:34} {seconds:4.0f} s  {said}", flush=True)
    print(f"{wrong} wrong" if options.clean else f"{len(faults) - wrong} found, {wrong} survived")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
