import pytest

from mflow_kernels.interop import sequence, visitor


@pytest.fixture(autouse=True)
def _all_layers_are_replaced(request, monkeypatch):
    """Small models on a CPU would be left, as `test_costs.py` shows."""
    if request.module.__name__.endswith("test_costs"):
        return
    monkeypatch.setattr(visitor, "why_slower", lambda *_: "")
    monkeypatch.setattr(sequence, "rebuilding_gains", lambda *_: True)
