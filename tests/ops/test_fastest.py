"""The choice between two implementations, and the file that keeps it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mflow_kernels.ops import fastest

CARD = torch.device("cuda", 0)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of choices, on a machine with a card whose times are what functions return."""
    path = tmp_path / "cache" / "mflow_networks.json"
    monkeypatch.setattr(fastest, "_file", lambda: path)
    monkeypatch.setattr(fastest, "seconds", lambda function: function())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fastest._choices.cache_clear()
    yield path
    fastest._choices.cache_clear()


def never() -> float:
    raise AssertionError("measured again")


def took(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def choose(key: str, fused: Callable[[], float], by_torch: Callable[[], float]) -> bool:
    return fastest.fused_is_faster(key, fused, by_torch, CARD)


def test_the_faster_one_is_measured_once(file: Path) -> None:
    assert choose("a", took(1.0), took(2.0))
    assert not choose("b", took(2.0), took(1.0))
    assert choose("a", never, never)
    fastest._choices.cache_clear()  # another process
    assert choose("a", never, never)
    assert not choose("b", never, never)
    assert list(file.parent.iterdir()) == [file]
    key = f"a card, torch {torch.__version__}, a"
    assert json.loads(file.read_text())[key] is True


@pytest.mark.parametrize(
    "content", ["", '{"a card, t', "[1, 2]", "null", '{"%s": "yes"}', "\x00\xff"], ids=ascii
)
def test_a_torn_file_is_no_file(file: Path, content: str) -> None:
    file.parent.mkdir()
    key = f"a card, torch {torch.__version__}, a"
    file.write_text(content.replace("%s", key), encoding="latin-1")
    assert not choose("a", took(2.0), took(1.0))
    assert json.loads(file.read_text())[key] is False


def test_a_folder_that_cannot_be_written(file: Path) -> None:
    file.parent.write_text("a file")
    assert choose("a", took(1.0), took(2.0))
    assert choose("a", never, never)


def test_no_memory_to_measure_in(file: Path) -> None:
    """The process keeps to torch's layers; the next one measures."""

    def too_large() -> float:
        raise torch.OutOfMemoryError

    assert not choose("a", too_large, never)
    assert not choose("a", never, never)
    assert not file.exists()


def test_nothing_is_measured_while_a_graph_is_recorded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not choose("a", never, never)


def test_a_request_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fastest.VARIABLE, "fast")
    with pytest.raises(ValueError, match="MFLOW_NETWORK: expected auto, torch or fused, got"):
        fastest.requested()
    monkeypatch.delenv(fastest.VARIABLE)
    assert fastest.requested() == "auto"
