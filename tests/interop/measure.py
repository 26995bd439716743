"""Time and memory of accelerated models against their originals, in one run.

    OMP_NUM_THREADS=1 python tests/interop/measure.py

A training step is a forward and a backward pass of the negative log-likelihood. Time is process
time on the CPU, the median of steps that take turns; memory is what autograd keeps between the two
passes, each storage once, parameters left out.
"""

import copy
import statistics
import time
from collections.abc import Callable

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.transforms as nt
import normflows as nf
import torch
from nflows.nn.nets import ConvResidualNet
from torch import Tensor, nn

from mflow_kernels.interop import accelerate

N, SIZE, STEPS, WIDTH, REPEATS = 8, 32, 8, 32, 7


def normflows_glow() -> nn.Module:
    flows = [nf.flows.GlowBlock(12, WIDTH) for _ in range(STEPS)]
    base = nf.distributions.DiagGaussian((12, SIZE // 2, SIZE // 2))
    return nf.NormalizingFlow(base, [*flows, nf.flows.Squeeze()])


def nflows_glow() -> nn.Module:
    def net(c_in: int, c_out: int) -> nn.Module:
        return ConvResidualNet(c_in, c_out, hidden_channels=WIDTH, num_blocks=1)

    mask = torch.tensor([-1] * 6 + [1] * 6)
    steps: list[nn.Module] = []
    for _ in range(STEPS):
        steps += [
            nt.ActNorm(12), nt.OneByOneConvolution(12), nt.AffineCouplingTransform(mask, net),
        ]  # fmt: skip
    return nt.CompositeTransform([nt.SqueezeTransform(), *steps])


def freia_inn() -> nn.Module:
    def net(c_in: int, c_out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(c_in, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, c_out, 3, padding=1)
        )

    inn = Ff.SequenceINN(3, SIZE, SIZE)
    inn.append(Fm.IRevNetDownsampling)
    for _ in range(STEPS):
        inn.append(Fm.AllInOneBlock, subnet_constructor=net, permute_soft=True)
    return inn


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, nf.NormalizingFlow):
        return model.forward_kld(x)
    z, log_det = model(x)
    return (z.flatten(1).square().sum(1) / 2 - log_det).mean()


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd holds once the loss is there."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, x)
    del loss
    return sum(held.values())


def measure(make: Callable[[], nn.Module]) -> dict[str, tuple[float, int]]:
    torch.manual_seed(0)
    original = make()
    x = torch.rand(N, 3, SIZE, SIZE)
    loss_of(original, x)  # sets actnorms
    models = {"original": original}
    for name, reversible in (("accelerated", False), ("reversible", True)):
        models[name] = copy.deepcopy(original)
        accelerate(models[name], reversible=reversible)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(REPEATS + 1):
        for name, model in models.items():
            start = time.process_time()
            loss_of(model, x).backward()
            times[name].append(time.process_time() - start)
    return {
        name: (statistics.median(times[name][1:]), kept_bytes(model, x))
        for name, model in models.items()
    }


if __name__ == "__main__":
    print(f"{STEPS} steps of 12 channels, {SIZE // 2} x {SIZE // 2}, batch {N}, width {WIDTH}")
    for make in (normflows_glow, nflows_glow, freia_inn):
        results = measure(make)
        first = results["original"]
        for name, (seconds, held) in results.items():
            print(
                f"{make.__name__:15} {name:12} {1e3 * seconds:7.1f} ms "
                f"({first[0] / seconds:4.2f}x)  {held / 2**20:7.1f} MiB ({first[1] / held:5.1f}x)"
            )
