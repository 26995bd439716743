"""The list of faults that `tests/mutants` plants; CONTRIBUTING.md says when to plant them."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = runpy.run_path(str(ROOT / "tests/mutants"))["read_faults"]()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_be_planted(fault) -> None:
    """Its old text occurs once, and its tests exist."""
    text = (ROOT / fault.file).read_text()
    assert fault.planted(text) != text
    files = [word for word in fault.tests.split() if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_names_differ() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
