"""SIGINT (Ctrl-C) and SIGTERM during training."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into SystemExit with code 128 + the signal's number.

    Lightning would turn a KeyboardInterrupt into exit code 1. `Checkpoints` replaces these handlers
    while steps are trained. Only the main thread can set handlers; elsewhere this does nothing.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
