"""A pytest plugin that runs one part of the tests.

    pytest -p benchmarks.harness.pytest_shard --shard 2/16

The parts have about equal numbers of tests. A part is a run of consecutive tests, which share
compiled kernels and groups of rows.
"""

import argparse
import re

import pytest


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected PART/PARTS from 1/1 on, got {text}")
    return int(match[1]), int(match[2])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=_shard, default=(1, 1), metavar="PART/PARTS")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose this part from the tests that -k and -m selected."""
    part, parts = config.getoption("--shard")
    first, last = (len(items) * i // parts for i in (part - 1, part))
    config.hook.pytest_deselected(items=items[:first] + items[last:])
    items[:] = items[first:last]
