"""Fixtures of tests of models."""

from captures import fake_capture, gpu  # noqa: F401 - fixtures
