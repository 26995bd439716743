"""The options of a training run in groups, as `mflow train --help` shows them.

The docstrings are the help texts. Nothing here imports torch, so that --help is fast.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
Domain = Literal["latent", "data"]
Rho = Literal["l2", "l1", "huber"]
Weight = float | Literal["variance"]
Coupling = Literal["affine", "spline"]
ImageFlow = Literal["glow", "jet"]
Optimizer = Literal["adamw", "muon"]
RateSchedule = Literal["cosine", "constant"]
MAX_BINS = 64


@dataclass
class DataOptions:
    """Images.

    Args:
        data: {named_datasets}, a file of mflow prepare, or a folder or zip of images (CelebA as
            downloaded is one), which is prepared in a cache first.
        image_size: Side of the square images in pixels; other images are cropped and resized. By
            default that of the named data set or prepared file, else 64.
        n_bits: Bits per colour that the model sees, 1 to 8.
        flips: Mirror each image left to right with probability 1/2 in training.
        classes: Train a density and a manifold for each class. Without a value, the classes are the
            labels of a named data set, or the folders that contain the images. CelebA takes names
            of attributes, separated by commas, as in "Smiling,Male".
    """

    data: str = "digits"
    image_size: int | None = None
    n_bits: int = 8
    flips: bool = False
    classes: str | None = None


@dataclass
class ModelOptions:
    """Model.

    Args:
        flow: The image flow: glow has convolutions, levels and steps; jet has vision transformers
            on patches, and costs more.
        levels: Levels of a glow. Each halves the image, so 2^levels must divide its size.
        coupling: Couplings of a glow's steps, affine or monotone splines.
        bins: Bins of each spline, 2 to 64.
        steps: Flow steps in each level of a glow.
        patch: Side of the patches of a jet in pixels, a power of 2.
        couplings: Couplings of a jet. Each at most doubles a number, so images with constant areas,
            such as digits, need 20 or more.
        depth: Transformer blocks in each network of a jet.
        heads: Attention heads of a jet, which must divide the width.
        width: Hidden channels of the image flow's coupling networks, or channels of their tokens.
        manifold_dim: Dimensions of the manifold, taken from the coarsest latents first. A number
            that fills whole channels gives each part of the image the same number of dimensions.
    """

    flow: ImageFlow = "glow"
    levels: int = 2
    coupling: Coupling = "affine"
    bins: int = 8
    steps: int = 4
    patch: int = 2
    couplings: int = 20
    depth: int = 1
    heads: int = 2
    width: int = 64
    manifold_dim: int = 64


@dataclass(frozen=True)
class StageOptions:
    """A further flow, trained on the manifold coordinates of the flow before it.

    Args:
        dim: Manifold dimensions; by default those of the flow before.
        coupling: Couplings of the flow, affine or monotone splines.
        bins: Bins of each spline, 2 to 64.
        steps: Flow steps.
        width: Hidden units of the coupling networks.
        components: Gaussians of the mixture that is the density of this flow's coordinates, each
            with dim x dim numbers; 1 stands for the standard Gaussian.
        domain: Domain of the penalty; by default that of the image flow.
        rho: Shape of the penalty; by default that of the image flow.
        weight: Weight of the penalty; by default 1, which fits coordinates of unit variance, or
            "variance" if --weight is.
        final_weight: Last weight of a schedule; by default the weight is constant.
        weight_steps: Steps in which the weight reaches final_weight.
        error_bound: Bound on the mean squared error, in units of the coordinates.
        delta: Difference at which the penalty huber turns from quadratic to linear, in units of
            the coordinates, so that 2 is two standard deviations.
        sigma: Standard deviation off the manifold; by default that of the image flow.
        learning_rate: Highest learning rate; null stands for that of --learning-rate.
        epochs: Passes over the training images; by default those of --epochs.
        max_steps: Optimizer steps, instead of epochs; by default those of --max-steps.
    """

    dim: int | None = None
    coupling: Coupling = "affine"
    bins: int = 8
    steps: int = 6
    width: int = 128
    components: int = 20
    domain: Domain | None = None
    rho: Rho | None = None
    weight: Weight | None = None
    final_weight: float | None = None
    weight_steps: int | None = None
    error_bound: float | None = None
    delta: float = 2.0
    sigma: float | None = None
    learning_rate: float | None = 2.5e-3
    epochs: int | None = None
    max_steps: int | None = None

    def __str__(self) -> str:
        """The values that are not the defaults, as YAML in one line."""
        import yaml

        values = {o.name: getattr(self, o.name) for o in fields(self)}
        own = {o.name: values[o.name] for o in fields(self) if values[o.name] != o.default}
        text: str = yaml.safe_dump(own, default_flow_style=True, sort_keys=False, width=1000)
        return text.strip()


# The values of a further flow that have an option on the command line, such as --stage-dim.
SHORT_STAGE_OPTIONS = (
    *("dim", "coupling", "bins", "steps", "width", "components", "weight"),
    *("learning_rate", "epochs", "max_steps"),
)


@dataclass
class HierarchyOptions:
    """Hierarchy: further flows, each trained on the manifold coordinates of the flow before it.

    Args:
        stages: The further flows, as a list in YAML such as "[{dim: 32}, {dim: 16, steps: 4}]", or
            "[]" for none. What an entry leaves out has its default. The --stage options hold for
            every further flow of the list, which has one entry by default.
        release: Train each further flow together with the earlier flows, at its learning rate, on
            the joint likelihood and all penalties; by default the earlier flows are frozen.
    """

    stages: list[StageOptions] = field(default_factory=lambda: [StageOptions()])
    release: bool = False


@dataclass
class ObjectiveOptions:
    """Objective.

    Args:
        domain: Domain of the penalty: latent penalizes the off-manifold latents, data the
            difference between an image and its projection on the manifold.
        rho: Shape of the penalty.
        weight: Weight of the penalty: a number, or "variance", which tracks the weight that fits
            the penalized differences best. With l2 it is the inverse of their variance. Only in
            the data domain.
        final_weight: Last weight of a schedule: the weight starts at --weight and changes by the
            same factor in each of --weight-steps steps. Only in the data domain.
        weight_steps: Steps in which the weight reaches --final-weight.
        error_bound: Largest mean squared error of the projection. The weight then starts at
            --weight and changes during training, so that the error stays at or below the bound.
            Pixels have a range of 1. Only in the data domain.
        delta: Difference at which the penalty huber turns from quadratic to linear.
        sigma: Standard deviation of the off-manifold latents in the data domain. It only sets
            their scale.
    """

    domain: Domain = "data"
    rho: Rho = "l2"
    weight: Weight = 400.0
    final_weight: float | None = None
    weight_steps: int | None = None
    error_bound: float | None = None
    delta: float = 0.1
    sigma: float = 1.0


@dataclass
class MemoryOptions:
    """Memory and exactness: how the backward pass obtains the states of the forward pass.

    Args:
        reversible: Rebuild states instead of storing them, so that memory hardly grows with the
            number of steps. By default states are rebuilt, except on a GPU whose memory has room
            for them by the prediction of mflow plan: storing them is faster.
        checkpoint_every: Store every n-th state, which costs memory and makes the rebuilt states
            more exact; null stores none.
        max_drift: Largest error of a rebuilt image, vector or state, divided by its largest number
            if that is above 1; training stops above it, before the gradients of that step are used.
        max_condition: Largest condition number of the weights of the 1x1 convolutions, enforced
            every 100 steps; by default there is no limit.
    """

    reversible: bool | None = None
    checkpoint_every: int | None = 8
    max_drift: float = 0.01
    max_condition: float | None = None


@dataclass
class TrainingOptions:
    """Training.

    Args:
        batch_size: Images per step.
        accumulate: Parts of a batch that are computed one after another, so that memory is that of
            one part. Their gradients are added. The first batch of each stage also passes through
            its flow whole, without gradients, to initialize the scales.
        epochs: Passes over the training images in each stage: first the image flow, then each
            further flow.
        max_steps: Optimizer steps in each stage, instead of epochs.
        optimizer: AdamW, or Muon for the weights of the coupling networks and AdamW for the rest.
            Muon wants about half of AdamW's learning rate.
        learning_rate: Highest learning rate, after warm-up.
        schedule: Course of the learning rate after warm-up: cosine, which ends at a fiftieth of the
            highest rate, or constant.
        warm_up: Steps at the start of each stage in which the learning rate rises; at most a fifth
            of the stage.
        weight_decay: Weight decay, as AdamW's, on the weights of the coupling networks.
        clip_norm: Largest norm of the gradient; longer gradients are scaled down to it.
        loss_spike: Skip a step whose loss exceeds the mean of the last hundred losses by more than
            this many standard deviations. Steps whose loss or gradient is not finite are skipped
            too.
        max_skipped: Stop after this many skipped steps in a row; the last checkpoint stays.
        ema_decay: Decay of the running average of the weights, which samples and evaluations use.
            The decay ramps up over the first steps of a stage; 0 disables averaging.
        init_from: Folder of another run; the model starts from its averaged weights. Its flows
            must have the same shapes, but it may have fewer or more stages.
        seed: Seed of weights, data order and noise.
        device: Device to train on; auto takes a GPU if there is one.
        precision: Data type of the coupling networks; the state of the flow is always float32.
        compile: Compile the coupling networks with torch.compile; the first step takes minutes.
        cuda_graphs: On a GPU, capture the forward and backward pass of each stage once and replay
            them, so that the GPU does not wait for kernel launches. Their memory stays allocated
            between steps. No GPU has run this yet.
        save_minutes: Longest time between two checkpoints, in minutes.
        save_steps: Largest number of steps between two checkpoints. A checkpoint is also written
            before each validation.
    """

    batch_size: int = 32
    accumulate: int = 1
    epochs: int = 8
    max_steps: int | None = None
    optimizer: Optimizer = "adamw"
    learning_rate: float = 2e-2
    schedule: RateSchedule = "cosine"
    warm_up: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    loss_spike: float = 10.0
    max_skipped: int = 20
    ema_decay: float = 0.999
    init_from: str | None = None
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "float32"
    compile: bool = False
    cuda_graphs: bool = True
    save_minutes: float = 10.0
    save_steps: int | None = None


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError if an option is below `least`."""
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError if an option is not a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
