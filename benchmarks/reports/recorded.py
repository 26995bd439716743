"""The launches that the presets' models make: training steps, evaluation and sampling, recorded."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from benchmarks.reports import aot
from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, ManifoldObjective, VectorFlow
from mflow_kernels.layers import ActNorm
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops.scale import Kind
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.presets import PRESETS, preset_options
from mflow_kernels.training.account import Account
from mflow_kernels.training.memory import resolve_config, step_of

BATCH = 2
FEW = 3  # steps of flow: a first, a middle and a last one make every kind of launch
SOME = 16  # the same for chains that store every eighth state: each level stores two

# Every scale function but tanh, the default, which the other models have.
OTHER_SCALES: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "tanh")

CHAINS: dict[str, dict[str, Any]] = {  # what a chain stores for its backward pass
    "stored": {"reversible": False},
    "reversible": {"checkpoint_every": None},
    "checkpointed": {"checkpoint_every": 8},
    "all states kept": {"checkpoint_every": 1},
}


class Network(NamedTuple):
    """A coupling network on a batch of states with these channels; `side` is None for vectors."""

    batch: int
    side: int | None
    channels: int
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.channels}" + (f"x{self.side}x{self.side}" if self.side else "")
        return f"{size} width {self.width}"


class _Networks(Account):
    def __init__(self) -> None:
        super().__init__(gpu=True)
        self.found = Counter[Network]()

    def add(
        self, name: str, read: Sequence[Tensor], written: Sequence[Tensor], flops: int = 0
    ) -> None:
        if (
            name.endswith("network_kernel") and len(written) == 3
        ):  # it keeps h1 and h2 for its gradient
            x, (sums, h1, _) = read[0], written
            side = x.shape[2] if x.dim() == 4 else None
            c_out = sums.shape[1] // (1 if side is None else 3)
            channels = x.shape[1] + c_out // 2
            self.found[Network(len(x), side, channels, h1.shape[1], x.dtype)] += 1


def networks_of(preset: str, **options: Any) -> list[Counter[Network]]:
    """The networks that the kernels compute in a training step of each stage of a preset, and how
    many of each there are."""
    # The penalty in the data domain would run each network of the image flow in two passes.
    changed = {**preset_options(preset), "domain": "latent", **options}
    config = resolve_config(TrainConfig(**changed), None, gpu=True)
    stages = [_Networks() for _ in config.flows]
    for stage, networks in enumerate(stages):
        step_of(config, stage, account=networks)
    return [networks.found for networks in stages]


@dataclass(frozen=True)
class Model:
    """A model to record.

    Attributes:
        name: its name in the report.
        image_shape, levels: of the image flow.
        manifold_dims: of the image flow and of the flows of vectors after it.
        steps: K of each of these flows.
        dtypes: of the state and of the coupling networks.
        channels_last: run `Glow`; if false, run its chain alone on contiguous states.
    """

    name: str
    image_shape: tuple[int, int, int]
    levels: int
    manifold_dims: tuple[int, ...]
    steps: tuple[int, ...] = (FEW, FEW)
    chain: str = "reversible"
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    scale: ScaleFunction = field(default_factory=lambda: ScaleFunction("tanh"))
    channels_last: bool = True


def preset_model(name: str, chain: str, network: torch.dtype) -> Model:
    """A preset with just enough steps to make every kind of launch."""
    config = resolve_config(TrainConfig(**preset_options(name)), None, gpu=True)
    dims, steps = zip(*((stage.dim, stage.steps) for stage in config.flows), strict=True)
    steps = tuple(min(SOME if chain == "checkpointed" else FEW, k) for k in steps)
    dtypes = (torch.float32, network)
    return Model(name, config.image_shape, config.levels, dims, steps, chain, dtypes)


def models() -> Iterator[Model]:
    """Every preset with float32 and bfloat16 networks and each kind of chain; odd sizes; and the
    options that no preset uses, at one size."""
    float32, bfloat16, float64 = torch.float32, torch.bfloat16, torch.float64
    for chain in CHAINS:
        for network in (float32, bfloat16):
            for preset in PRESETS:
                yield preset_model(preset, chain, network)
            dtypes = (float32, network)
            yield Model("odd sizes", (3, 24, 40), 3, (64, 33), (9, 9), chain, dtypes)
            yield Model(
                "contiguous", (3, 32, 32), 3, (64,), (9,), chain, dtypes, channels_last=False
            )
    yield Model("float64", (3, 32, 32), 2, (64,), (FEW,), dtypes=(float64, float64))
    for kind in OTHER_SCALES:
        yield Model(kind, (3, 32, 32), 1, (64,), (FEW,), scale=ScaleFunction(kind))
    glow = ScaleFunction("sigmoid", eps=1e-3, order="scale-shift")
    yield Model("scale, then shift", (3, 32, 32), 1, (64,), (FEW,), scale=glow)


def quick_models() -> Iterator[Model]:
    """Models of one level, which take seconds."""
    dtypes = (torch.float32, torch.bfloat16)
    yield Model("quick", (3, 32, 32), 1, (64,), (FEW,), "all states kept", dtypes)
    yield Model("quick", (3, 32, 32), 1, (64,), (FEW,), "stored", dtypes)


class Recorded(NamedTuple):
    model: str
    launch: aot.Launch


def record(model: Model) -> Iterator[Recorded]:
    """Every launch of a training step of each stage, of evaluation and of sampling."""
    with torch.device("meta"):
        flow = _build(model).to("meta")  # the order of a permutation is on the CPU
        x = torch.empty(BATCH, *model.image_shape, dtype=model.dtypes[0])
    autocasts = model.dtypes[0] != model.dtypes[1]
    for run in _runs(flow, x) if model.channels_last else _runs_of_chain(flow, x):
        with torch.autocast("cpu", model.dtypes[1] if autocasts else None, enabled=autocasts):
            launches = aot.capture(run)
        for launch in launches:
            yield Recorded(model.name, launch)


def _build(model: Model) -> HierarchicalFlow:
    how = CHAINS[model.chain]
    k, *ks = model.steps
    # Networks of one layer. The weights of 3x3 make their results channels_last, as of real ones.
    side = 3 if model.channels_last else 1
    convolution = partial(nn.Conv2d, kernel_size=side, padding=side // 2)
    flows: list[Glow | VectorFlow] = [
        Glow(model.image_shape, model.levels, k, network=convolution, scale=model.scale, **how)
    ]
    for dim, k in zip(model.manifold_dims, ks, strict=False):
        flows.append(VectorFlow(dim, k, network=nn.Linear, **how))
    stages = [
        ManifoldFlow(flow, dim, objective=ManifoldObjective("data", "l2", 1000.0))
        for flow, dim in zip(flows, model.manifold_dims, strict=True)
    ]
    built = HierarchicalFlow(stages).to(model.dtypes[0])
    for module in built.modules():
        if isinstance(module, ActNorm):
            module.was_set = True
    return built


def _runs(model: HierarchicalFlow, x: Tensor) -> Iterator[Callable[[], object]]:
    for stage in range(len(model.stages)):
        yield lambda stage=stage: model.initialize(x, stage=stage)
        yield lambda stage=stage: model.terms(x, stage=stage).loss.mean().backward()
    for evaluate in (model.log_prob, model.project):
        yield lambda evaluate=evaluate: torch.no_grad()(evaluate)(x)
    yield lambda: model.sample(BATCH)


def _runs_of_chain(model: HierarchicalFlow, x: Tensor) -> Iterator[Callable[[], object]]:
    chain = cast(Glow, cast(ManifoldFlow, model.stages[0]).flow).chain

    def train() -> None:
        z, logdet = chain(x)
        flat = torch.cat([part.flatten(1) for part in z], dim=1)
        (logdet.sum() + flat.square().sum()).backward()

    def sample() -> Tensor:
        with torch.no_grad():
            z, _ = chain(x)
            return chain.inverse(tuple(part.contiguous() for part in z))[0]

    yield train
    yield sample
