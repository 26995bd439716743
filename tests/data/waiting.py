import time

import pytest


def wait_until(holds):
    """Return when `holds()` is true. It fails after ten minutes, which no machine needs."""
    for _ in range(60_000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("waited for ten minutes")
