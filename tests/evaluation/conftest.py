from run_fixtures import cache, images, run, trained  # noqa: F401 - fixtures
