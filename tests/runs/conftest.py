from tiny_runs import blank_pictures, cache, command, images, run, trained  # noqa: F401 - fixtures
