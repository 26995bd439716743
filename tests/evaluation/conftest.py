from tiny_runs import blank_pictures, cache, images, run, trained  # noqa: F401 - fixtures
