"""The memory and the kernels of a training step, from a walk through the step on fake tensors.

`walk` builds the model of a configuration and runs its second training step (the first one makes
the optimizer's moments) under `training.account`, once for each stage. Nothing is allocated. The
prediction leaves out what libraries allocate for themselves (cuDNN, oneDNN), the CUDA context
(about 0.5 GB) and fragmentation in the caching allocator.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mflow_kernels import HierarchicalFlow, VectorFlow
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.named import default_shape
from mflow_kernels.data.splits import count_classes
from mflow_kernels.evaluation.likelihood import stage_sums
from mflow_kernels.layers import ActNorm
from mflow_kernels.models.architecture import build
from mflow_kernels.models.chart import check_manifold_dim
from mflow_kernels.runs.config import RunConfig, TrainConfig, check_precision
from mflow_kernels.runs.folder import architecture, build_model
from mflow_kernels.training.account import Account, Kernel, counting, nbytes
from mflow_kernels.training.muon import moments_of, orthogonal

# Purposes of memory. At the peak, the last two are what the forward pass left and what the backward
# pass has made.
PARAMETERS, AVERAGE = "parameters and buffers", "averaged weights"
OPTIMIZER, GRADIENTS = "moments of the optimizer", "gradients of the parameters"
FORWARD = "images, latents and what the forward pass keeps"
BACKWARD = "backward pass: one step of flow, and gradients"
LIBRARIES = 2 * 10**9  # bytes for the CUDA context, cuDNN, and blocks that the allocator keeps
PURPOSES = (PARAMETERS, AVERAGE, OPTIMIZER, GRADIENTS, FORWARD, BACKWARD)


@dataclass(frozen=True)
class Step:
    """A training step of one stage.

    Attributes:
        stage: from 0.
        parameters: number of parameters of the stage's flow.
        weights: bytes of the parameters and buffers of all stages.
        moments: bytes of the optimizer's moments of the stage's flow.
        kernels: what a GPU launches, the optimizer included.
        peak: bytes in use when most are, by `PURPOSES`.
        model: that took the step, on meta tensors.
    """

    stage: int
    parameters: int
    weights: int
    moments: int
    kernels: list[Kernel]
    peak: dict[str, int]
    model: HierarchicalFlow

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def resolve_config(config: TrainConfig, channels: int | None, *, gpu: bool) -> RunConfig:
    """Check a configuration as `mflow train` does, and add the images' shape without reading them.

    Args:
        config: configuration to check; its `data` may be empty.
        channels: channels of the images; by default 3, or those of the named data set.
        gpu: whether it trains on a GPU, whatever its device says.

    Raises:
        ValueError: a value is out of range (the message names the first one), or the number of
            classes cannot be known without reading the images.
    """
    config.check()
    check_precision(config.precision, "cuda" if gpu else "cpu")
    default_channels, default_size = default_shape(config.data)
    channels = channels if channels is not None else default_channels
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    size = config.image_size or default_size
    resolved = config.resolve((channels, size, size))
    resolved.device = "cuda" if gpu else "cpu"
    if config.classes is not None:
        classes = range(count_classes(config.data, config.classes))
        resolved = dataclasses.replace(resolved, class_names=list(map(str, classes)))
    with torch.device("meta"):  # run the models' own checks without allocating their tensors
        flow = architecture(resolved)["stages"][0]["flow"]
        one = {"steps": 1, "width": 1} if config.flow == "glow" else {"couplings": 1, "depth": 1}
        check_manifold_dim(config.manifold_dim, build(flow | one).latent_shapes)
        for outer in config.flows[:-1]:
            VectorFlow(outer.dim, steps=1, width=1)
    return resolved


def walk(config: RunConfig) -> list[Step]:
    """Walk through a training step of each stage of a configuration."""
    model = empty_model(config)
    return [step_of(config, stage, model) for stage in range(len(config.flows))]


def choose_states(resolved: RunConfig, config: TrainConfig, memory: int, processes: int) -> None:
    """Let a configuration whose options leave the choice store its states if a card has room.

    There is room if the prediction, a tenth more, and `LIBRARIES` fit.

    Args:
        resolved: to change, from `config`.
        config: the options.
        memory: of a card, in bytes.
        processes: number of processes, each with a card, that share a batch.
    """
    if config.reversible is None:
        part = resolved.batch_size // processes
        stored = dataclasses.replace(resolved, reversible=False, batch_size=part, device="cuda")
        resolved.reversible = 1.1 * highest(walk(stored)).total + LIBRARIES > memory


def highest(steps: Sequence[Step]) -> Step:
    """Return the step that takes the most memory."""
    return max(steps, key=lambda step: step.total)


def step_of(
    config: RunConfig,
    stage: int,
    model: HierarchicalFlow | None = None,
    account: Account | None = None,
) -> Step:
    """Walk through a training step of one stage, with this model of the configuration and this
    account, or with new ones."""
    model = model or empty_model(config)
    account = account or Account(config.device != "cpu")
    with counting(account):
        account.purpose = PARAMETERS
        for t in (*model.parameters(), *model.buffers()):
            account.allocated(t)
        stages = list(model.stages)
        trained = stages[: stage + 1] if config.release else [stages[stage]]
        account.purpose = AVERAGE
        average = [torch.empty_like(t) for t in (*model.parameters(), *model.buffers())]
        account.purpose = OPTIMIZER
        moments = {
            p: [torch.empty_like(p) for _ in range(count)]
            for each in stages[: stage + 1]
            for p, count in moments_of(each, config.optimizer)
        }
        parameters = [p for each in trained for p in each.parameters()]
        hooks = [
            p.register_post_accumulate_grad_hook(
                lambda p: account.belongs(cast(Tensor, p.grad), GRADIENTS)
            )
            for p in parameters
        ]
        account.purpose = FORWARD
        images, context = empty_batch(config)
        x = dequantize(images, config.n_bits)
        parts = [t.chunk(config.accumulate) for t in ((x,) if context is None else (x, context))]
        for part in [*zip(*parts, strict=True)][:2]:  # any later part is like the second
            first, account.purpose = len(account.kernels), FORWARD
            loss = _loss(config, model, stage, *part)
            account.purpose = BACKWARD
            loss.backward()
            del loss
        account.kernels += account.kernels[first:] * (config.accumulate - 2)
        gradients = [cast(Tensor, p.grad) for p in parameters]
        account.add("norm of the gradients", gradients, [])
        account.add("clip", gradients, gradients)
        account.purpose = BACKWARD
        for p in parameters:
            if len(moments[p]) == 1:
                orthogonal(cast(Tensor, p.grad).flatten(1))
        own = [moment for p in parameters for moment in moments[p]]
        account.add("AdamW", [*parameters, *gradients, *own], [*parameters, *own])
        account.add("average", [*parameters, *parameters], parameters)
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    own_parameters = list(stages[stage].parameters())
    peak = {purpose: account.at_peak[purpose] for purpose in PURPOSES}
    return Step(
        stage,
        sum(p.numel() for p in own_parameters),
        sum(nbytes(t) for t in average),
        sum(nbytes(t) for p in own_parameters for t in moments[p]),
        account.kernels,
        peak,
        model,
    )


def empty_model(config: RunConfig) -> HierarchicalFlow:
    """Return the model of a configuration on meta tensors, as after its first batch."""
    with torch.device("meta"):
        model = build_model(config).to("meta")  # a permutation's order is on the CPU
    for module in model.modules():
        if isinstance(module, ActNorm):
            module.was_set = True
    return model


def empty_batch(config: RunConfig) -> tuple[Tensor, Tensor | None]:
    images = torch.empty(config.batch_size, *config.image_shape, dtype=torch.uint8, device="meta")
    if not config.class_names:
        return images, None
    return images, torch.empty(config.batch_size, dtype=torch.int64, device="meta")


def _loss(
    config: RunConfig, model: HierarchicalFlow, stage: int, x: Tensor, context: Any = None
) -> Tensor:
    dtype = getattr(torch, config.precision)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms, _ = model.terms_and_log_prob(x, stage=stage, release=config.release, context=context)
    return terms.loss.mean()


def checkpoint_bytes(steps: Sequence[Step]) -> int:
    """Return the size of the last checkpoint: weights, buffers, their average, and moments.

    Args:
        steps: of all stages.
    """
    return 2 * steps[0].weights + sum(step.moments for step in steps)


def evaluation_memory(config: RunConfig, batch: int) -> int:
    """Predict the memory at the peak of evaluating a trained model in batches of `batch` images.

    Networks compute in float32 and nothing is differentiated.
    """
    one = dataclasses.replace(config, batch_size=batch)
    model = empty_model(one).requires_grad_(False).eval()
    account = Account(config.device != "cpu")
    with counting(account), torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            account.allocated(t)
        images, context = empty_batch(one)
        stage_sums(model, dequantize(images, config.n_bits), context)
        return account.at_peak.total()


def largest_batch(config: RunConfig, memory: int, steps: Sequence[Step]) -> int:
    """Return the largest batch whose predicted peak fits in `memory` bytes; 0 if none does.

    A second walk, with a batch that nearly fits, shows how a step's memory grows with the batch.

    Args:
        steps: `walk(config)`.
    """
    size, parts = config.batch_size, config.accumulate

    def fitting(step: Step) -> float:
        growing = step.peak[FORWARD] + step.peak[BACKWARD]
        return size * (memory - step.total + growing) / growing

    here = min(steps, key=fitting)
    other = parts * max(1, int(fitting(here) / parts))
    other += parts * (other == size)
    changed = dataclasses.replace(config, batch_size=other)
    for_one = (step_of(changed, here.stage, here.model).total - here.total) / (other - size)
    return max(0, int((size + (memory - here.total) / for_one) / parts)) * parts
