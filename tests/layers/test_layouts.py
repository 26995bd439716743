"""Models run in channels_last on every device: states, params, gradients and network inputs.

On CUDA, torch's operators return other layouts than on a CPU. The tests therefore replace the
operators that models use by ones that behave as on CUDA: `pixel_shuffle` and `pixel_unshuffle`
return contiguous tensors, and a convolution is in channels_last if its input or its weight is. They
then check every tensor that a kernel (without the interpreter, a loop of csrc) reads or writes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import normal, perturbed
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from mflow_kernels import Glow
from mflow_kernels.ops import cpu
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import is_channels_last

pytestmark = pytest.mark.skipif(
    not KERNELS_ON_CPU and cpu.load_extension() is None, reason="csrc is not built"
)


class Seen:
    """The names of all checked image tensors, and of those in another layout."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.others: set[str] = set()

    def look(self, name: str, value: object) -> None:
        if isinstance(value, tuple | list):
            for part in value:
                self.look(name, part)
        elif isinstance(value, Tensor) and value.dim() == 4 and value.numel():
            self.names.add(name)
            # With one pixel, all layouts are the same memory, and torch's operators return either.
            free = name == "gradient in a network" and value.shape[2:] == (1, 1)
            if not is_channels_last(value) and not free:
                self.others.add(f"{name} {tuple(value.shape)} {value.stride()}")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()

    def conv2d(x: Tensor, weight: Tensor, *others: Any, **how: Any) -> Tensor:
        seen.look("network input", x)
        seen.look("network weight", weight)
        last = is_channels_last(x) or is_channels_last(weight)
        format = torch.channels_last if last else torch.contiguous_format
        given = x.view_as(x)
        y = torch.conv2d(given, weight, *others, **how).clone(memory_format=format)
        if given.requires_grad:
            given.register_hook(lambda dx: dx.clone(memory_format=format))
        for tensor in (given, y):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: seen.look("gradient in a network", gradient))
        return y

    for name in ("pixel_shuffle", "pixel_unshuffle"):
        real = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, factor, real=real: real(x, factor).contiguous())
    monkeypatch.setattr(F, "conv2d", conv2d)
    if KERNELS_ON_CPU:

        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            """Compute nothing, since layouts do not depend on values."""
            for name, value in zip(kernel.arg_names, args, strict=False):
                seen.look(f"{kernel.__name__}: {name}", value)

        for kind in (InterpretedFunction, JITFunction):
            monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: partial(launch, kernel))
        return seen

    def watch(loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        results = loop(*args, **kwargs)
        seen.look(f"{loop.__name__}: argument", [*args, *kwargs.values()])
        seen.look(f"{loop.__name__}: result", results)
        return results

    for loop in (
        *(cpu.change_half, cpu.change_half_backward, cpu.conv1x1),
        *(cpu.coupling_conv1x1_backward, cpu.conv1x1_backward, cpu.step, cpu.step_backward),
    ):
        monkeypatch.setattr(cpu, loop.__name__, partial(watch, loop))
    return seen


SHAPES = {
    "odd sizes": (3, 8, 24),  # the last level is 1 x 3
    "one pixel": (3, 8, 8),
    "one channel": (1, 8, 16),
}
CHAINS: dict[str, dict[str, Any]] = {
    "stored": {"reversible": False},
    "reversible": {"checkpoint_every": None},
    "checkpointed": {"checkpoint_every": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_model_runs_in_channels_last(
    seen: Seen, shape: tuple[int, int, int], chain: dict[str, Any], dtype: torch.dtype
) -> None:
    """A training step, the likelihood and sampling run in channels_last, although the images, the
    latents and the gradients of the latents are contiguous."""
    glow = perturbed(Glow(shape, 3, 2, 4, **chain))
    x = normal(2, *shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        z, logdet = glow(x)
        flat = torch.cat([part.flatten(1) for part in z], dim=1)  # its gradient is contiguous
        back, _ = glow.inverse(tuple(torch.zeros_like(part, requires_grad=True) for part in z))
        with torch.no_grad():
            glow(x)
            glow.inverse(tuple(normal(*part.shape) for part in z))
    loss = flat.square().sum() + (x - back).square().sum() - logdet.sum()
    loss.backward()
    assert not seen.others
    assert {"network input", "network weight", "gradient in a network"} < seen.names
    assert any(
        "conv1x1" in name or "step" in name for name in seen.names
    )  # the launches or loops of the chain
    for name, parameter in glow.named_parameters():
        assert parameter.grad is not None
        if parameter.dim() == 4:
            assert is_channels_last(parameter.grad), name


def test_gradients_of_one_latent_only(seen: Seen) -> None:
    glow = perturbed(Glow((3, 8, 8), 3, 1, 4, reversible=False))
    (_, middle, _), _ = glow(normal(2, 3, 8, 8))
    middle.sum().backward()  # its gradient has strides of 0
    assert not seen.others


def test_averages_and_copies_keep_the_layout_of_weights() -> None:
    glow = Glow((3, 8, 8), 2, 1, 4)
    copied = Glow((3, 8, 8), 2, 1, 4)
    copied.load_state_dict({k: v.contiguous() for k, v in glow.state_dict().items()})
    for model in (glow, copied, glow.double()):
        weights = [p for p in model.parameters() if p.dim() == 4]
        assert weights
        assert all(map(is_channels_last, weights))
