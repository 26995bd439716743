import time

import pytest


def wait_until(holds):
    """Wait until `holds()` is true. Fail after ten minutes, more than any machine needs."""
    for _ in range(60_000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("waited for ten minutes")
