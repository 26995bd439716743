"""The coupling network as one operator, against float64 that rounds where the kernels round."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import LAYOUTS, Calls, normal, on_tensor_cores
from torch import Tensor

from mflow_kernels.ops import coupling_network as module
from mflow_kernels.ops import coupling_network_launches as launches
from mflow_kernels.ops import coupling_network_tiles as tiles
from mflow_kernels.ops.compiler import GLUON
from mflow_kernels.ops.coupling_network import (
    coupling_network,
    coupling_network_ref,
    network_backward,
    network_forward,
)
from mflow_kernels.ops.coupling_network_launches import launch_network, pack
from mflow_kernels.ops.coupling_network_tiles import Shape
from mflow_kernels.ops.launch import HOPPER
from mflow_kernels.testing import assert_close

DTYPES = [torch.bfloat16, torch.float16]
Case = tuple[tuple[int, ...], int, int]  # x's shape, width and C_out
# Vectors; one pixel; one row; odd channels and sizes with several tiles of pixels; dW2 outside the
# kernels; taps in several blocks of columns; wide states.
CASES: list[Case] = [
    ((37, 9), 40, 10),
    ((1, 1, 1, 1), 16, 2),
    ((3, 2, 1, 6), 32, 5),
    ((2, 3, 5, 7), 20, 8),
    ((2, 6, 5, 3), 160, 6),
    ((1, 9, 4, 4), 136, 30),
    ((1, 22, 3, 3), 40, 44),
]
# Tiles of 64 pixels that begin and end within a row, that share a row, or that hold whole rows.
TILED: list[Case] = [((1, 2, 12, 13), 16, 3), ((2, 1, 2, 70), 16, 2), ((1, 3, 10, 16), 16, 4)]


# Hopper's tiles, for both kinds of d W2: whole rows of images, and one that leaves over pixels.
HOPPER_TILED: list[Case] = [
    ((1, 6, 10, 16), 128, 12),
    ((1, 6, 10, 16), 256, 12),
    ((1, 12, 10, 8), 128, 24),
    ((1, 12, 10, 8), 256, 24),
    ((1, 24, 5, 8), 128, 48),
    ((1, 24, 5, 8), 256, 48),
    ((1, 6, 9, 16), 512, 12),
    ((1, 24, 9, 8), 512, 48),
    ((1, 6, 3, 7), 128, 12),  # tiles begin within a row
]


class _Rounded(torch.autograd.Function):
    """Rounds values to a dtype in the forward pass, and gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).double()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy.to(ctx.dtype).double(), None


def reference(given: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The network in float64, whose hidden tensors and their gradients have `dtype`, so that ReLU
    cuts the same numbers as in the kernels."""
    x, w1, b1, w2, b2, w3, b3 = given
    h1 = _Rounded.apply(module.layer(x, w1, b1).relu(), dtype)
    h2 = _Rounded.apply(module.layer(h1, w2, b2).relu(), dtype)
    return module.layer(h2, w3, b3)


def sample(
    shape: tuple[int, ...], width: int, c_out: int, dtype: torch.dtype, device: torch.device,
    layout: str = "channels_last", weights: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """x, weights of order 1 / sqrt(inputs) and biases, rounded to `dtype`, with gradients."""
    _, c_in, *spatial = shape
    images = len(spatial) == 2
    layers = [(width, c_in, 3), (width, width, 1), (c_out, width, 3)]
    x = normal(*shape, device=device)
    given = [LAYOUTS[layout](x) if images else x]
    for out, into, side in layers:
        w = normal(out, into, *((side, side) if images else ()), device=device)
        w = w / (w[0].numel() ** 0.5)
        given += [LAYOUTS[layout](w) if images else w, normal(out, device=device)]
    rounded = [t.to(dtype) for t in given]
    if weights is not None:
        rounded[1:] = [t.to(weights) for t in rounded[1:]]
    return [t.requires_grad_() for t in rounded]


def gradients(
    run: Callable[..., Tensor], given: list[Tensor], dparams: Tensor
) -> tuple[Tensor, ...]:
    params = run(*given)
    return params, *torch.autograd.grad(params, given, dparams.to(params.dtype))


def assert_matches(given: list[Tensor]) -> None:
    x = given[0]
    params = coupling_network(*given)
    dparams = normal(*params.shape, device=x.device).to(x.dtype)
    got = gradients(coupling_network, given, dparams)
    doubled = [t.detach().double().requires_grad_() for t in given]
    want = gradients(lambda *t: reference(list(t), x.dtype), doubled, dparams.double())
    pixels = x.numel() // x.shape[1]
    width, taps = given[1].shape[0], given[1][0, 0].numel()
    # Hidden gradients are sums over taps and width. Gradients of weights are sums over pixels, of
    # terms of order one.
    forward, backward = taps * width, taps * width + pixels
    names = ("params", "dx", "dw1", "db1", "dw2", "db2", "dw3", "db3")
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == (x.dtype if name in ("params", "dx") else given[1].dtype), name
        if a.dtype == torch.float32 and x.dtype != torch.float32:
            # A float32 product of rounded factors is only as exact as the dtype of x.
            a = a.to(x.dtype)
        terms = forward if name == "params" else backward
        size = (pixels**0.5) if name.startswith("d") and name != "dx" else 0.0
        assert_close(a, b, terms=terms, scale=size, name=name)
    assert x.dim() == 2 or got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(kernel_device: torch.device, case: Case, dtype: torch.dtype) -> None:
    assert_matches(sample(*case, dtype, kernel_device))


@pytest.mark.parametrize(
    ("case", "layout", "weights"),
    [
        *((case, "channels_last", None) for case in TILED),
        (((2, 3, 5, 7), 20, 8), "contiguous", None),
        (((2, 3, 5, 7), 20, 8), "transposed", None),
        (((2, 3, 5, 7), 20, 8), "second half, channels_last", None),
        (((2, 3, 4, 4), 32, 8), "channels_last", torch.float32),  # as under autocast
    ],
    ids=str,
)
def test_tiles_layouts_and_wide_weights(
    kernel_device: torch.device, case: Case, layout: str, weights: torch.dtype | None
) -> None:
    assert_matches(sample(*case, torch.bfloat16, kernel_device, layout, weights))


@pytest.mark.parametrize("case", HOPPER_TILED, ids=str)
def test_hoppers_tiles(kernel_device: torch.device, case: Case) -> None:
    given = sample(*case, torch.bfloat16, kernel_device)
    s = Shape.of(given[0], case[1], case[2])
    found = tiles.hopper_tiles(s, HOPPER)
    assert found is not None
    assert found.forward.gluon == (GLUON and (case[1] > 128 or case[2] == 48))
    assert_matches(given)


def test_kernels_in_gluon_are_for_hopper_whole_rows_and_known_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = Shape(2**15, 16, 16, 12, 24, 512, 9, 2)
    monkeypatch.setattr(tiles, "GLUON", True)
    assert tiles.forward_tile(s, HOPPER).gluon
    assert tiles.dh2_tile(s, HOPPER).gluon
    assert tiles.dh1_tile(s, HOPPER).gluon
    other = [
        (s, 80), (s, 100), (s._replace(image_width=24), HOPPER), (s._replace(taps=1), HOPPER),
        (s._replace(itemsize=4), HOPPER), (s._replace(width=1024), HOPPER),
        (s._replace(width=384), HOPPER), (s._replace(c_in=11), HOPPER),
    ]  # fmt: skip
    for shape, arch in other:
        assert not tiles.forward_tile(shape, arch).gluon, (shape, arch)
        assert not tiles.dh2_tile(shape, arch).gluon, (shape, arch)
        assert not tiles.dh1_tile(shape, arch).gluon, (shape, arch)
    monkeypatch.setattr(tiles, "GLUON", False)
    assert not tiles.forward_tile(s, HOPPER).gluon
    assert not tiles.dh2_tile(s, HOPPER).gluon
    assert not tiles.dh1_tile(s, HOPPER).gluon


@pytest.mark.parametrize(
    "case",
    [
        ((1, 6, 10, 40), 128, 12),
        ((3, 6, 9, 8), 160, 6),
        ((5, 24, 8, 8), 256, 48),
        ((7, 24, 8, 8), 128, 48),
    ],
    ids=str,
)
def test_programs_of_the_two_backward_launches(
    kernel_device: torch.device, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch shares its tiles among programs of its own, and one launch adds both kinds of
    partial sums."""

    def few(s: Shape, weights: bool, device: torch.device) -> tuple[int, int, int]:
        return 3, 2, 3 * sum(s.sums[:3]) + 2 * sum(s.sums[3:])

    monkeypatch.setattr(launches, "partial_sums", few)
    assert_matches(sample(*case, torch.bfloat16, kernel_device))


def test_programs_fill_the_card_and_sums_stay_small() -> None:
    def programs(card: int, pixels: int, width: int, numbers: int) -> int:
        s = Shape(pixels, 8, 8, 6, 12, width, 9, 2)
        tile = tiles.Tile(64, 128, 64, 0, 8)
        return tiles.splits(s, tile, numbers, card)

    assert programs(132, 2**20, 512, 0) == 66  # two for each of 132 multiprocessors, in 4 blocks
    assert programs(132, 2**20, 512, 10**5) == 33  # one
    assert programs(108, 2**20, 512, 10**5) == 27
    assert programs(132, 2**13, 512, 10**5) == 8  # 1,024 pixels each
    assert programs(132, 2**13, 512, 2**19) == 4  # the 8 MiB of a hidden tensor
    assert programs(132, 1, 512, 10**5) == 1
    assert programs(132, 130, 512, 0) == 3  # one for each tile


def test_a_sample_that_is_not_finite_stays_alone(kernel_device: torch.device) -> None:
    """Samples share tiles, and a pixel's taps come from other pixels of its tile."""
    given = [t.detach() for t in sample((5, 2, 3, 3), 16, 4, torch.bfloat16, kernel_device)]
    expected = coupling_network(*given)
    given[0][2, :, 1, 1] = float("inf")
    found = coupling_network(*given)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hidden_tensors_change_no_bit(
    kernel_device: torch.device, case: Case, dtype: torch.dtype
) -> None:
    """A reversible chain runs a network twice: without stored hidden tensors, then with them."""
    given = [t.detach() for t in sample(*case, dtype, kernel_device)]
    x, w1, b1, w2, b2, w3, b3 = given
    packed = pack(x, w1, w2, w3)
    kept, h1, h2 = launch_network(x, packed, b1, b2, b3, True)
    params, *nothing = launch_network(x, packed, b1, b2, b3, False)
    assert torch.equal(params, kept)
    assert nothing == [None, None]
    assert h1 is not None
    assert h2 is not None
    dparams = normal(*params.shape, device=x.device).to(dtype)
    runs = [network_backward(dparams, x, h1, h2, packed, True, True) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_the_kernels_skip_gradients_of_frozen_weights(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass of a frozen network is three launches: without partial sums to reduce, and
    without the product that computes a wide network's d W2."""
    kernels: list[str] = []
    launch = launches.launch

    def noted(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        kernels.append(kernel.__name__.replace("_hopper", ""))
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launches, "launch", noted)
    for case in (((2, 3, 5, 7), 20, 8), ((2, 6, 5, 3), 160, 6), ((2, 12, 2, 8), 256, 24)):
        given = sample(*case, torch.bfloat16, kernel_device)
        expected = gradients(coupling_network, given, torch.ones(2, case[2], *case[0][2:]))[1]
        for t in given[1:]:
            t.requires_grad_(False)
        params = coupling_network(*given)
        kernels.clear()
        with Calls() as calls:
            (dx,) = torch.autograd.grad(params, given[0], torch.ones_like(params))
        assert torch.equal(dx, expected)
        assert kernels == ["_dh2_kernel", "_dh1_kernel", "_sum_taps_kernel"]
        ran = {func.overloadpacket for func, _ in calls.found}
        assert not {torch.ops.aten.sum, torch.ops.aten.mm} & ran


@pytest.fixture
def tf32() -> Iterator[None]:
    """Torch's default on CUDA: float32 convolutions may round their factors to TF32."""
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("case", CASES[1:] + TILED[:2], ids=str)
def test_tf32(kernel_device: torch.device, case: Case) -> None:
    """float32 networks, whose factors tensor cores round to TF32.

    TF32 keeps 10 bits: rounded or cut off, a factor is off by at most 2^-10 of itself, and a
    product of two by 2^-9. The interpreter multiplies in float32. Hidden tensors have float32, so
    the reference of the gradients starts from those of the kernels, and ReLU cuts the same numbers.
    """
    given = [t.detach() for t in sample(*case, torch.float32, kernel_device)]
    x, w1, b1, w2, b2, w3, b3 = given
    assert module.supports(x, w1, w3)
    params, h1, h2, packed = network_forward(*given, True, True)
    dparams = normal(*params.shape, device=x.device)
    dx, sums, separate_dw2 = network_backward(dparams, x, h1, h2, packed, True, True)
    s = Shape.of(x, len(w1), len(w3))
    dw1, dw2, db1, dw3, db2, db3 = sums.split(s.sums)
    got = [params, dx, dw1, db1, dw2 if s.sums[1] else separate_dw2, db2, dw3, db3]
    doubled = [t.double() for t in (x, w1, b1, w2, b2, w3, b3)]
    expected = coupling_network_ref(*doubled)[0]
    dx, *others = module.network_by_layers_backward(
        dparams.double(), doubled[0], h1.double(), h2.double(), *doubled[1::2], weights=True
    )
    want = [dx, *(launches.rows(t) if t.dim() == 4 else t for t in others)]
    names = ("params", "dx", "dw1", "db1", "dw2", "db2", "dw3", "db3")
    for name, a, b in zip(names, got, [expected, *want], strict=True):
        assert a.dtype == torch.float32, name
        # Three products follow each other, and errors of a sum's terms are independent.
        bound = 8 * (3 * 2**-9 if on_tensor_cores(x.device) else 2**-23 * (9 * len(w1)) ** 0.5)
        assert (a.flatten() - b.flatten()).norm() <= bound * b.norm(), name


@pytest.mark.usefixtures("tf32")
def test_tf32_is_used_where_torch_allows_it(kernel_device: torch.device) -> None:
    x, w1, _, _, _, w3, _ = sample((1, 2, 3, 3), 16, 4, torch.float32, kernel_device)
    assert module.supports(x, w1, w3)
    assert not module.supports(x.double(), w1, w3)
    vector = sample((3, 2), 16, 4, torch.float32, kernel_device)
    assert not module.supports(vector[0], vector[1], vector[5])  # of products, it is off by default
    torch.backends.cudnn.allow_tf32 = False
    assert not module.supports(x, w1, w3)


def test_relu_keeps_nan(kernel_device: torch.device) -> None:
    """Otherwise a network that has diverged would look healthy."""
    given = sample((1, 2, 3, 3), 16, 4, torch.bfloat16, kernel_device)
    with torch.no_grad():
        given[3][0] = float("nan")
        assert coupling_network(*given)[0, :, 1, 1].isnan().any()
        given[3].zero_()[0, 0, 0, 0] = float("nan")
        assert coupling_network(*given).isnan().any()


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of convolutions and products that also add a bias and apply ReLU, as on a GPU."""
    calls: list[str] = []

    def convolution(
        x: Tensor, w: Tensor, b: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        calls.append("convolution")
        return torch.conv2d(x, w, b, stride, padding, dilation, groups).relu_()

    def product(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
        calls.append("product")
        return torch.addmm(b, x, w).relu_()

    monkeypatch.setattr(module, "_has_cudnn", lambda device: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution)
    monkeypatch.setattr(torch, "_addmm_activation", product)
    return calls


LAYERED: list[Case] = [
    ((5, 3), 6, 4),
    ((1, 2, 1, 1), 7, 2),
    ((2, 3, 5, 4), 130, 6),
    ((2, 49, 3, 3), 8, 98),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LAYERED, ids=str)
def test_layer_by_layer(case: Case, dtype: torch.dtype, epilogues: list[str]) -> None:
    """Networks without a kernel have the values and gradients of torch's layers."""
    given = sample(*case, dtype, torch.device("cpu"))
    expected = coupling_network_ref(*given)[0]
    dparams = normal(*expected.shape).to(dtype)
    want = torch.autograd.grad(expected, given, dparams)
    params = coupling_network(*given, kernels=False)
    assert epilogues == ["product" if params.dim() == 2 else "convolution"] * 2
    terms = given[1].shape[0] * 9
    assert_close(params, expected, terms=terms)
    for got, exact in zip(torch.autograd.grad(params, given, dparams), want, strict=True):
        assert got.dtype == dtype
        assert_close(got, exact, terms=terms + params.numel(), scale=1.0)
    with torch.no_grad():
        assert torch.equal(coupling_network(*given, kernels=False), params)


def test_frozen_weights_cost_no_gradients(epilogues: list[str]) -> None:
    given = sample((2, 3, 4, 4), 8, 4, torch.float32, torch.device("cpu"))
    for t in given[1:]:
        t.requires_grad_(False)
    expected = torch.autograd.grad(coupling_network_ref(*given)[0].sum(), given[0])
    params = coupling_network(*given, kernels=False)
    with Calls() as calls:
        (dx,) = torch.autograd.grad(params.sum(), given[0])
    assert torch.equal(dx, expected[0])
    backward = torch.ops.aten.convolution_backward.default
    masks = [args[-1] for func, args in calls.found if func == backward]
    assert masks == [[True, False, False]] * 3
