from run_fixtures import cache, command, images, run, trained  # noqa: F401 - fixtures
