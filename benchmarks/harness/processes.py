"""Run functions in fresh processes, for measurements that earlier work must not influence."""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# Imported once by the server process, from which the others are forked. Missing ones are skipped.
PRELOADED = [
    "benchmarks.harness.models",
    "normflows",
    "nflows.transforms",
    "FrEIA.framework",
    "memcnn",
]


class Died(Exception):
    """The reason why a process returned no result."""


class Late(Died):
    """The process took too long, which says nothing about its results."""


def in_fresh_processes(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, seconds: float
) -> list[Any]:
    """Call the function on each job in a process of its own and return the results.

    A `Died` takes the place of a result if the function raised, the process crashed, or it took
    longer than `seconds`. `workers` processes run at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = []
    for start in range(0, len(jobs), workers):
        running = []
        for job in jobs[start : start + workers]:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, function, job))
            process.start()
            sender.close()
            running.append((process, receiver))
        for process, receiver in running:
            results.append(_received(receiver, seconds))
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _send(sender: Connection, function: Callable[[Any], Any], job: Any) -> None:
    try:
        sender.send(function(job))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        sender.send(Died(f"{type(error).__name__}: {lines[0]}"))


def _received(receiver: Connection, seconds: float) -> Any:
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return Late(f"no result within {seconds:g} s")
    except EOFError:
        return Died("the process died")
