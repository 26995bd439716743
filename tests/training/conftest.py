"""Fixtures of tests that train."""

from captures import fake_capture, gpu  # noqa: F401 - fixtures
from tiny_runs import blank_pictures, cache, command, images, run, trained  # noqa: F401 - fixtures
