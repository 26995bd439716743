from tiny_runs import cache, images, trained  # noqa: F401 - fixtures
