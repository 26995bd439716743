"""Options of `pytest benchmarks/ --benchmark-only`, and what its JSON says beside the rows."""

import shlex
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness.measurements import CLOCKS
from benchmarks.harness.session import Bench, open_bench


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mflow_kernels")
    group.addoption("--full", action="store_true", help="every shape, depth and peer: hours on CPU")
    group.addoption("--tiny", action="store_true", help="sizes that rehearse the code, no figures")
    group.addoption("--check", action="store_true",
                    help="hold every row to its reference, and measure nothing")  # fmt: skip
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=1, help="of the CPU; one is less noisy than two")
    group.addoption("--rounds", type=int, help="interleaved rounds; otherwise each file's own")
    group.addoption("--clock", choices=sorted(CLOCKS), default="wall",
                    help="of the CPU; process time ignores what else the machine does")  # fmt: skip
    group.addoption("--time-limit", type=float, metavar="SECONDS",
                    help="groups not started by then are skipped, and say so; 540 for the default "
                    "set, otherwise none")  # fmt: skip


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(request.config.getoption("--threads"))
    # Networks in float32 are float32: otherwise convolutions would round factors to 10 bits, and
    # outputs could not be held to the reference.
    torch.backends.cudnn.allow_tf32 = False
    yield open_bench(request.config)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


NOT_MEASURED = pytest.StashKey[list[dict[str, str]]]()
CHOSEN = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED], config.stash[CHOSEN] = [], []
    # `timeout` ends a run as Ctrl-C would: what was measured until then is saved.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[CHOSEN] = [item.nodeid for item in session.items]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note every row that is skipped or fails, with the reason."""
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed and not report.skipped:
        return
    told = report.longrepr
    if report.skipped:
        reason = str(told[2] if isinstance(told, tuple) else told).removeprefix("Skipped: ")
    else:
        reason = report.longreprtext.strip().splitlines()[-1]
    outcome = "failed" if report.failed else "skipped"
    row = {"name": item.nodeid, "outcome": outcome, "reason": reason}
    item.config.stash[NOT_MEASURED].append(row)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    not_measured = config.stash[NOT_MEASURED]
    told = {row["fullname"] for row in benchmarks} | {row["name"] for row in not_measured}
    output_json["not_measured"] = not_measured + [
        {"name": name, "outcome": "skipped", "reason": "the run was stopped before it"}
        for name in config.stash[CHOSEN] if name not in told
    ]  # fmt: skip
    arguments = list(config.invocation_params.args)
    if "--benchmark-json" in arguments:  # where the results went is no part of how they came
        at = arguments.index("--benchmark-json")
        del arguments[at : at + 2]
    run = {"command": shlex.join(["pytest", *arguments]), "datetime": output_json["datetime"]}
    output_json["commands"] = [run]
