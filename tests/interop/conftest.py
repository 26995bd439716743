import pytest

from mflow_kernels.interop import visitor


@pytest.fixture(autouse=True)
def _all_layers_are_replaced(request, monkeypatch):
    """Small models on a CPU would be left, as `test_costs.py` shows."""
    if request.module.__name__.endswith("test_costs"):
        return
    monkeypatch.setattr(visitor, "why_slower", lambda *_: "")


def pytest_generate_tests(metafunc):
    """Run the tests of `LibraryTests` with every model that a library's class names."""
    for argument, attribute in (("name", "models"), ("trained", "trained")):
        if argument in metafunc.fixturenames and hasattr(metafunc.cls, attribute):
            metafunc.parametrize(argument, list(getattr(metafunc.cls, attribute)))
