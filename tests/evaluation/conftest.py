from run_fixtures import cache, images, one_thread, run, trained  # noqa: F401 - fixtures
