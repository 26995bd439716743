from run_fixtures import cache, images, trained  # noqa: F401 - fixtures
