"""The choice between two implementations, and the file that keeps it."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mflow_kernels.ops import fastest
from mflow_kernels.ops.card_files import card_of_results
from mflow_kernels.testing import EPS

CARD = torch.device("cuda", 1)
ENTERED: list[torch.device] = []  # devices that were made current


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of choices, on a machine with a simulated card; functions return their times."""
    path = tmp_path / "cache" / "mflow_networks.json"
    monkeypatch.setattr(fastest, "_file", lambda: path)
    monkeypatch.setattr(fastest, "seconds", lambda function: function().seconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(ENTERED.append(device)))
    ENTERED.clear()
    monkeypatch.setattr(fastest, "_decided", {})
    monkeypatch.setattr(fastest, "_warned", set())
    card_of_results.cache_clear()
    yield path
    card_of_results.cache_clear()


class Took(list[Tensor]):
    """The results of a candidate, and the time that it took."""

    def __init__(self, seconds: float, *results: Tensor) -> None:
        super().__init__(results or (torch.ones(3),))
        self.seconds = seconds


def never() -> Took:
    raise AssertionError("measured again")


def took(seconds: float, *results: Tensor) -> Callable[[], Took]:
    return lambda: Took(seconds, *results)


def choose(key: str, fused: Callable[[], Took], by_torch: Callable[[], Took]) -> bool:
    candidates = {"torch": by_torch, "kernels": fused}
    return fastest.fastest(key, candidates, CARD) == "kernels"


def test_the_faster_one_is_measured_once(file: Path) -> None:
    assert choose("a", took(1.0), took(2.0))
    assert not choose("b", took(2.0), took(1.0))
    assert choose("a", never, never)
    fastest._decided.clear()  # as in another process
    assert choose("a", never, never)
    assert not choose("b", never, never)
    assert list(file.parent.iterdir()) == [file]
    key = f"{card_of_results(CARD)}, a"
    assert key.startswith(f"a card, torch {torch.__version__}, triton ")
    assert json.loads(file.read_text())[key] == "kernels"


def test_candidates_are_timed_on_their_own_device(file: Path) -> None:
    """Triton's timer records events on the current device, which may be another one."""

    def on_card() -> Took:
        assert ENTERED[-1:] == [CARD]
        return Took(1.0)

    assert choose("a", on_card, on_card) is False
    assert choose("a", never, never) is False
    assert ENTERED == [CARD]


@pytest.mark.parametrize("inference", [False, True])
def test_a_caller_disturbs_no_candidate(file: Path, inference: bool) -> None:
    """Its hooks see no tensor that a candidate saves, and its inference mode ends."""

    def trains() -> Took:
        x = torch.ones(3, requires_grad=True)
        with torch.enable_grad():
            return Took(1.0, *torch.autograd.grad(x.square().sum(), x))

    def saved(tensor: Tensor) -> Tensor:
        raise AssertionError("a hook of the caller saw a candidate's tensor")

    with torch.inference_mode(inference), saved_tensors_hooks(saved, lambda tensor: tensor):
        assert choose("a", trains, took(2.0, torch.full((3,), 2.0)))


@pytest.mark.parametrize(
    "content",
    ["", '{"a card, t', "[1, 2]", "null", '{"%s": true}', '{"%s": "yes"}', "\x00\xff"],
    ids=ascii,
)
def test_a_torn_file_is_no_file(file: Path, content: str) -> None:
    file.parent.mkdir()
    key = f"{card_of_results(CARD)}, a"
    file.write_text(content.replace("%s", key), encoding="latin-1")
    assert not choose("a", took(2.0), took(1.0))
    assert json.loads(file.read_text())[key] == "torch"


def test_a_folder_that_cannot_be_written(file: Path) -> None:
    file.parent.write_text("a file")
    assert choose("a", took(1.0), took(2.0))
    assert choose("a", never, never)


def test_no_memory_to_measure_in(file: Path) -> None:
    """The process keeps to torch's layers until `retry`, though other choices were saved."""

    def too_large() -> Took:
        raise torch.OutOfMemoryError

    with pytest.warns(UserWarning, match="no memory to compare in"):
        assert not choose("a", too_large, never)
    assert not choose("a", never, never)
    assert not file.exists()
    assert choose("b", took(1.0), took(2.0))
    assert list(json.loads(file.read_text())) == [f"{card_of_results(CARD)}, b"]
    assert not choose("a", never, never)
    assert fastest.choices(CARD) == {"a": "no memory", "b": "kernels"}
    assert fastest.choices(torch.device("cpu")) == {}
    fastest.retry()
    assert choose("b", never, never)
    assert choose("a", took(1.0), took(2.0))
    assert choose("a", never, never)


class Ranks:
    """A process group of two ranks, of which this process is both, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = torch.distributed.HashStore()
        group = torch.distributed.distributed_c10d
        monkeypatch.setattr(group, "_get_default_store", lambda: store)
        monkeypatch.setattr(fastest, "_world", lambda: 2)
        self.monkeypatch = monkeypatch

    def become(self, file: Path) -> None:
        """Another rank, on a machine of its own."""
        self.monkeypatch.setattr(fastest, "_file", lambda: file)
        fastest._decided.clear()


def test_all_ranks_make_one_choice(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose own measurement, or file, says otherwise follows the first one."""
    ranks = Ranks(monkeypatch)
    other = file.with_name("other")
    other.parent.mkdir()
    key = f"{card_of_results(CARD)}, a"
    other.write_text(json.dumps({key: "torch"}))
    assert choose("a", took(1.0), took(2.0))
    ranks.become(other)
    assert choose("a", never, never)
    assert choose("b", took(1.0), took(2.0))  # a computation that only this rank has
    ranks.become(file)
    assert choose("b", took(2.0), took(1.0))


def test_no_rank_waits_for_one_that_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)

    def fails() -> Took:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="is not used"):
        choose("a", took(1.0), fails)  # torch's own layers fail
    ranks.become(file)
    with pytest.warns(UserWarning, match="no memory to compare in"):
        assert not choose("a", never, never)
    fastest.retry()
    assert choose("a", took(1.0), took(2.0))


def test_a_candidate_that_reads_what_it_has_not_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New memory is often zero. The comparison fills free memory with NaN."""
    memory = torch.zeros(3)
    monkeypatch.setattr(fastest, "_poison", lambda device: memory.fill_(float("nan")))

    def reads() -> Took:
        return Took(1.0, 0 * memory + torch.ones(3))

    with pytest.warns(UserWarning, match="'kernels' is not used on this card"):
        assert not choose("a", reads, took(2.0))


def test_all_free_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[torch.Tensor] = []
    empty = torch.empty

    def on_cpu(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == CARD
        filled.append(empty(size, dtype=dtype))
        return filled[-1]

    def blocks(*sizes: int) -> list[dict[str, object]]:
        used = {"size": 1, "state": "active_allocated"}
        return [used, *({"size": n, "state": "inactive"} for n in sizes)]

    snapshot = [{"device": 1, "blocks": blocks(8, 512)}, {"device": 0, "blocks": blocks(4)}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    monkeypatch.setattr(torch, "empty", on_cpu)
    fastest._poison(CARD)
    assert [len(t) for t in filled] == [8, 512]
    assert all(t.view(dtype).isnan().all() for t in filled for dtype in EPS)


def broken() -> Took:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    "wrong",
    [
        broken,
        took(1.0, torch.tensor([1.0, 1.0, 1.6])),
        took(1.0, torch.tensor([1.0, 1.0, float("nan")])),
        took(1.0, torch.ones(4)),
    ],
    ids=["raises", "differs", "nan", "another shape"],
)
def test_a_candidate_that_is_wrong_is_left_out(file: Path, wrong: Callable[[], Took]) -> None:
    """It is left out however fast it is, with one warning, and in later processes too."""
    rounded = took(2.0, torch.tensor([1.0, 1.0, 1.01]))
    candidates = {"torch": took(3.0), "layers": rounded, "kernels": wrong}
    with pytest.warns(UserWarning, match="'kernels' is not used on this card") as warned:
        assert fastest.fastest("a", candidates, CARD) == "layers"
    assert len(warned) == 1
    fastest._decided.clear()
    assert fastest.fastest("a", dict.fromkeys(candidates, never), CARD) == "layers"


def test_results_of_zero_agree(file: Path) -> None:
    zero, tiny = torch.zeros(2), torch.full((2,), 1e-9)
    assert choose("a", took(1.0, zero), took(2.0, zero))
    with pytest.warns(UserWarning, match="differ"):
        assert not choose("b", took(1.0, tiny), took(2.0, zero))


def test_nothing_is_measured_while_a_graph_is_recorded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture is told, and the choice is made afterwards."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="Run the model once before the capture") as warned:
        assert not choose("a", never, never)
    assert not choose("a", never, never)
    assert len(warned) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose("a", took(1.0), took(2.0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("a", never, never)


def test_one_wrong_tile_of_many_is_found(file: Path) -> None:
    right = torch.randn(1024 * 64)
    wrong = right.clone()
    wrong[64:128] = 0
    with pytest.warns(UserWarning, match="of their size in a tile"):
        assert not choose("a", took(1.0, wrong), took(2.0, right))


def test_a_request_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fastest.VARIABLE, "fast")
    with pytest.raises(ValueError, match="MFLOW_NETWORK: expected auto, torch or fused, got"):
        fastest.requested()
    monkeypatch.delenv(fastest.VARIABLE)
    assert fastest.requested() == "auto"
