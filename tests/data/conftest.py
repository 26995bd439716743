from run_fixtures import blank_pictures, cache, images, run, trained  # noqa: F401 - fixtures
