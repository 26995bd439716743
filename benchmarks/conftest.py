"""Options of `pytest benchmarks/ --benchmark-only`, its closing table, and entries of its JSON."""

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.measurements import CLOCKS
from benchmarks.harness.session import Bench, Group, open_bench, size_and_gpu, slug


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mflow_kernels")
    group.addoption(
        "--full", action="store_true", help="every shape, depth and peer; takes hours on a CPU"
    )
    group.addoption("--tiny", action="store_true", help="tiny sizes that only test the code")
    group.addoption("--check", action="store_true",
                    help="compare every row with its reference, without measuring")  # fmt: skip
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=1, help="CPU threads (1, the least noisy)")
    group.addoption("--rounds", type=int, help="interleaved rounds (default: each file's own "
                    "number; of claims, more while they are noisy)")  # fmt: skip
    group.addoption("--clock", choices=sorted(CLOCKS), default="wall",
                    help="CPU clock; process time ignores other load on the machine")  # fmt: skip
    group.addoption("--time-limit", type=float, metavar="SECONDS",
                    help="skip groups that have not started by then (285 for the claims, 540 for "
                    "files that are named, otherwise none)")  # fmt: skip


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(request.config.getoption("--threads"))
    # tf32 rounds the factors of convolutions to 10 bits, too few to compare with the reference.
    torch.backends.cudnn.allow_tf32 = False
    groups = len({_group(item).name for item in request.session.items})
    yield open_bench(request.config, claims_only(request.config), groups)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = [
        pytest.param(group, variant, id=slug(*group.words, variant))
        for group in metafunc.module.groups(*size_and_gpu(metafunc.config))
        for variant in group.variants
    ]
    metafunc.parametrize(("group", "variant"), rows)


def _group(item: pytest.Item) -> Group:
    return item.callspec.params["group"]  # type: ignore[attr-defined, no-any-return]


NOT_MEASURED = pytest.StashKey[list[dict[str, str]]]()
CHOSEN = pytest.StashKey[list[str]]()
CLAIMS_FILE = "bench_claims.py"


def _named(config: pytest.Config) -> bool:
    """Whether the command names files or rows."""
    return any(".py" in argument for argument in config.args) or bool(config.option.keyword)


def claims_only(config: pytest.Config) -> bool:
    option = config.getoption
    return not (_named(config) or option("--full") or option("--tiny") or option("--check"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the claims if nothing else is asked for; keep other files otherwise."""
    items[:] = [item for item in items if isinstance(_group(item), Group)]  # a file may have none
    if config.getoption("--full"):
        items.sort(key=lambda item: item.path.name != CLAIMS_FILE)
        return
    if any(CLAIMS_FILE in argument for argument in config.args):
        return
    only = claims_only(config)
    left = [item for item in items if (item.path.name == CLAIMS_FILE) != only]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED], config.stash[CHOSEN] = [], []
    # Each group prints its own lines, which pytest-benchmark's table of long names would repeat.
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True
    # Treat SIGTERM, which `timeout` sends, like Ctrl-C: pytest then saves the results so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[CHOSEN] = [item.nodeid for item in session.items]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Record every row that is skipped or fails, with the reason."""
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed and not report.skipped:
        return
    cause = report.longrepr
    if report.skipped:
        reason = str(cause[2] if isinstance(cause, tuple) else cause).removeprefix("Skipped: ")
    else:
        reason = report.longreprtext.strip().splitlines()[-1]
    outcome = "failed" if report.failed else "skipped"
    row = {"name": item.nodeid, "outcome": outcome, "reason": reason, "group": _group(item).name}
    item.config.stash[NOT_MEASURED].append(row)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    not_measured = config.stash[NOT_MEASURED]
    known = {row["fullname"] for row in benchmarks} | {row["name"] for row in not_measured}
    output_json["not_measured"] = not_measured + [
        {"name": name, "outcome": "skipped", "reason": "the run was stopped before it"}
        for name in config.stash[CHOSEN] if name not in known
    ]  # fmt: skip
    arguments = list(config.invocation_params.args)
    if "--benchmark-json" in arguments:  # leave out the path of the results
        at = arguments.index("--benchmark-json")
        del arguments[at : at + 2]
    run = {"command": shlex.join(["pytest", *arguments]), "datetime": output_json["datetime"]}
    output_json["commands"] = [run]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the claims, and one line for each reason why something was left out."""
    from benchmarks.bench_claims import claims
    from benchmarks.harness.closing import closing_lines, rows_of
    from benchmarks.harness.pictures import draw_claims

    measured = getattr(config, "_benchmarksession", None)
    if measured is None or not config.stash[CHOSEN]:
        return
    rows = rows_of(measured.benchmarks)
    with_claims = any(CLAIMS_FILE in name for name in config.stash[CHOSEN])
    for line in closing_lines(rows, config.stash[NOT_MEASURED], config, with_claims):
        terminalreporter.write_line(line)
    if with_claims and measured.json is not None:
        picture = Path(measured.json).with_suffix(".png")
        draw_claims(claims(size_and_gpu(config)[1]), rows, picture)
        terminalreporter.write_line(f"picture: {picture}")
