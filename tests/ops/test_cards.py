"""What runs on which card: mocked capabilities, ROCm, and versions of Triton."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from own_process import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from mflow_kernels.ops import channel_products, coupling_network, launch
from mflow_kernels.ops import coupling_network_tiles as tiles
from mflow_kernels.ops.coupling_network_tiles import Shape

CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it with a capability, and a version of ROCm or None."""

    def become(capability: tuple[int, int], hip: str | None = None) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        monkeypatch.setattr(torch.version, "hip", hip)

    def forget() -> None:
        launch._capability.cache_clear()
        launch._supports.cache_clear()

    yield become
    forget()


def on_card() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 4, device="cuda:0")


@pytest.mark.parametrize(
    ("capability", "hip", "architecture", "served"),
    [
        ((7, 5), None, 75, False),
        ((8, 0), None, 80, True),
        ((8, 6), None, 86, True),
        ((9, 0), None, 90, True),
        ((12, 0), None, 120, True),
        ((9, 0), "6.4", launch.AMD, True),  # an MI200
        ((9, 4), "6.4", launch.AMD, True),  # an MI300
    ],
)
def test_cards(
    card: Any, capability: tuple[int, int], hip: str | None, architecture: int, served: bool
) -> None:
    card(capability, hip)
    x = on_card()
    assert launch.architecture(CARD) == architecture
    if not served:
        with pytest.warns(UserWarning, match=r"a card has compute capability 7\.5.*plain torch"):
            assert not launch.uses_triton(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert launch.uses_triton(x) == served
    precision = "ieee" if architecture == launch.AMD else "tf32x3"
    assert channel_products.arithmetic(x, "tf32x3")["PRECISION"] == precision


def test_an_mi200_gets_no_tiles_of_hopper(card: Any) -> None:
    s = Shape(4096, 32, 32, 6, 12, 512, 9, 2)
    card((9, 0))
    assert tiles.hopper_tiles(s, launch.architecture(CARD)) is not None
    card((9, 0), "6.4")
    arch = launch.architecture(CARD)
    assert tiles.hopper_tiles(s, arch) is None
    assert not launch.geforce(arch)
    with FakeTensorMode():
        x, w1, w3 = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda:0")
            for shape in ((2, 6, 16, 16), (512, 6, 3, 3), (12, 512, 3, 3))
        )
    assert not coupling_network.supports(x, w1, w3)
    card((9, 0))
    assert coupling_network.supports(x, w1, w3)


@pytest.mark.parametrize(("hip", "given"), [(None, True), ("6.4", False)])
def test_amds_compiler_gets_no_limit_of_registers(card: Any, hip: str | None, given: bool) -> None:
    card((9, 0), hip)
    seen: dict[str, Any] = {}

    def launched(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        seen.update(options)

    walk = launch.Walk(True, lambda *given: None, launched, CARD)
    with launch.walking(walk), torch.device("meta"):
        weight = torch.empty(24, 24)
        channel_products.launch_conv1x1(torch.empty(2, 24, 8, 8), weight, None, "tf32x3")
    assert ("maxnreg" in seen) == given
    assert seen["enable_fp_fusion"]


VERSION = """
import triton
triton.__version__ = "{version}"
from mflow_kernels.ops import channel_products, compiler, rebuild_conv1x1
print(compiler.GLUON, channel_products.FENCES_COPIES, channel_products.ONE_GROUP,
      rebuild_conv1x1.MOST_SLICED)
"""


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("3.5.1", "False False None 64"),
        ("3.7.1", "True True None 64"),
        ("3.9.0", "True True 1 96"),
        ("3.10.0", "False True 1 96"),  # its Gluon is not known
    ],
)
def test_versions_of_triton(version: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run_python("-c", VERSION.format(version=version))
    assert done.stdout.strip() == expected, done.stderr
