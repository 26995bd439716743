"""The options of a training run, and the checks that need neither images nor torch."""

import dataclasses
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentParser

from mflow_kernels.data.named import LABELS, NAMED_DATASETS
from mflow_kernels.runs.parser import OptionParser, parse_yaml, with_docstring

Precision = Literal["float32", "bfloat16", "float16"]
Domain = Literal["latent", "data"]
Rho = Literal["l2", "l1", "huber"]
Weight = float | Literal["variance"]


# In units of u, whose coordinates have unit variance: twice the deviation of a coordinate that is
# dropped, as the 0.1 of images is about twice the deviation of their errors.
_STAGE_DELTA = 2.0
# Options that the files of earlier versions lack, with the values that these versions used.
_ADDED_LATER: dict[str, Any] = {
    "final_weight": None,
    "weight_steps": None,
    "error_bound": None,
    "delta": 1.0,
    "sigma": 0.1,
    "stage_final_weight": [],
    "stage_weight_steps": [],
    "stage_error_bound": [],
    "stage_delta": [1.0],
    "stage_sigma": [],
    "stage_learning_rate": [],
    "init_from": None,
    "classes": None,
    "crop": None,
    "class_names": [],
}


@dataclass(frozen=True)
class Stage:
    """One flow of the hierarchy: manifold dimension, size of the networks, objective, training."""

    dim: int
    steps: int
    width: int
    domain: Domain
    rho: Rho
    weight: Weight
    final_weight: float | None
    weight_steps: int | None
    error_bound: float | None
    delta: float
    sigma: float
    learning_rate: float
    epochs: int
    max_steps: int | None

    def optimizer_steps(self, batches_per_pass: int) -> int:
        """Return the number of optimizer steps, given the number of batches in a pass."""
        return self.max_steps or self.epochs * batches_per_pass


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
        levels: Levels of the image flow. Each halves the image, so 2^levels must divide its size.
        steps: Flow steps in each level.
        width: Hidden channels of the image flow's coupling networks.
        manifold_dim: Dimensions of the manifold, taken from the coarsest latents first. A number
            that fills whole channels gives each part of the image the same number of dimensions.
    """

    levels: int = 2
    steps: int = 4
    width: int = 64
    manifold_dim: int = 64


@dataclass
class HierarchyOptions:
    """Hierarchy: further flows, each trained on the manifold coordinates of the flow before it.

    Args:
        stage_dims: Manifold dimensions of each further flow; without a value, there are no further
            flows. The other stage options take one value for all further flows, or one for each.
        stage_steps: Flow steps.
        stage_width: Hidden units of the coupling networks.
        stage_epochs: Passes over the training images; by default those of --epochs.
        stage_max_steps: Optimizer steps, instead of epochs; by default those of --max-steps.
        stage_domain: Domain of the penalty; by default that of --domain.
        stage_rho: Shape of the penalty; by default that of --rho.
        stage_weight: Weight of the penalty; by default 1, which fits coordinates of unit variance,
            or "variance" if --weight is.
        stage_final_weight: Last weight of a schedule; by default the weight is constant.
        stage_weight_steps: Steps in which the weight reaches that value.
        stage_error_bound: Bound on the mean squared error, in units of the coordinates; by default
            there is none.
        stage_delta: Threshold of huber, in units of the coordinates; by default 2, two standard
            deviations.
        stage_sigma: Standard deviation off the manifold; by default that of --sigma.
        stage_learning_rate: Highest learning rate; without a value, that of --learning-rate.
        release: Train each further flow together with the earlier flows, at its learning rate, on
            the joint likelihood and all penalties; by default the earlier flows are frozen.
    """

    stage_dims: list[int] = field(default_factory=lambda: [64])
    stage_steps: list[int] = field(default_factory=lambda: [12])
    stage_width: list[int] = field(default_factory=lambda: [128])
    stage_epochs: list[int] = field(default_factory=list)
    stage_max_steps: list[int] = field(default_factory=list)
    stage_domain: list[Domain] = field(default_factory=list)
    stage_rho: list[Rho] = field(default_factory=list)
    stage_weight: list[Weight] = field(default_factory=list)
    stage_final_weight: list[float] = field(default_factory=list)
    stage_weight_steps: list[int] = field(default_factory=list)
    stage_error_bound: list[float] = field(default_factory=list)
    stage_delta: list[float] = field(default_factory=list)
    stage_sigma: list[float] = field(default_factory=list)
    stage_learning_rate: list[float] = field(default_factory=lambda: [1e-2])
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
        reversible: Rebuild states instead of storing them, so that memory does not grow with the
            number of steps.
        checkpoint_every: Store every n-th state, which costs memory and makes the rebuilt states
            more exact; null stores none.
        max_drift: Largest error of a rebuilt image (whose range is 1) or vector; training stops
            above it, before the gradients of that step are used.
        max_condition: Largest condition number of the weights of the 1x1 convolutions, enforced
            every 100 steps; by default there is no limit.
    """

    reversible: bool = True
    checkpoint_every: int | None = 8
    max_drift: float = 0.01
    max_condition: float | None = None


@dataclass
class TrainingOptions:
    """Training.

    Args:
        batch_size: Images per step.
        epochs: Passes over the training images in each stage: first the image flow, then each
            further flow.
        max_steps: Optimizer steps in each stage, instead of epochs.
        learning_rate: Highest learning rate of AdamW, after warm-up; it then falls along a cosine.
        warm_up: Steps at the start of each stage in which the learning rate rises; at most a fifth
            of the stage.
        weight_decay: Weight decay of AdamW on the weights of the coupling networks.
        clip_norm: Largest norm of the gradient; longer gradients are scaled down to it.
        loss_spike: Skip a step whose loss exceeds the mean of the last hundred by more than this
            many standard deviations. Steps whose loss or gradient is not finite are skipped too.
        max_skipped: Stop after this many skipped steps in a row; the last checkpoint stays.
        ema_decay: Decay of the running average of the weights, which samples and evaluations use.
            The decay ramps up over the first steps of a stage; 0 disables averaging.
        init_from: Folder of another run; the model starts from its averaged weights. Its flows
            must have the same shapes, but it may have fewer or more stages.
        seed: Seed of weights, data order and noise.
        device: Device to train on; auto takes a GPU if there is one.
        precision: Data type of the coupling networks; the state of the flow is always float32.
        compile: Compile the coupling networks with torch.compile; the first step takes minutes.
        cuda_graphs: Capture the forward and backward pass of each stage once and replay them, so
            that a small model does not wait for kernel launches. Their memory stays allocated
            between steps. No GPU has run this yet.
        save_minutes: Longest time between two checkpoints, in minutes.
        save_steps: Largest number of steps between two checkpoints. A checkpoint is also written
            before each validation.
    """

    batch_size: int = 32
    epochs: int = 8
    max_steps: int | None = None
    learning_rate: float = 2e-2
    warm_up: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    loss_spike: float = 10.0
    max_skipped: int = 20
    ema_decay: float = 0.999
    init_from: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
    compile: bool = False
    cuda_graphs: bool = False
    save_minutes: float = 10.0
    save_steps: int | None = None


@dataclass
class TrainConfig(
    TrainingOptions, MemoryOptions, ObjectiveOptions, HierarchyOptions, ModelOptions, DataOptions
):
    """All options of `mflow train` that describe a run."""

    def check(self) -> None:
        """Raise ValueError for the first value out of range.

        The models check what depends on the images' shape, such as the number of levels.
        """
        for name in ("levels", "steps", "width", "manifold_dim", "warm_up", "max_skipped"):
            _check_at_least(name, getattr(self, name), 1)
        whole = ("image_size", "batch_size", "epochs", "max_steps", "checkpoint_every")
        for name in (*whole, "save_steps"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        _check_at_least("seed", self.seed, 0)
        if not 1 <= self.n_bits <= 8:
            raise ValueError(f"n_bits: expected 1 to 8, got {self.n_bits}")
        for name in ("learning_rate", "clip_norm", "loss_spike", "max_drift", "save_minutes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for rate in self.stage_learning_rate:
            if not 0 < rate < float("inf"):
                raise ValueError(f"stage_learning_rate: expected more than 0, got {rate}")
        if self.classes is not None and self.cuda_graphs:
            raise ValueError(
                "cuda_graphs: expected False for a class-conditional model (--classes), got True"
            )
        if self.max_condition is not None and not self.max_condition >= 1:
            raise ValueError(f"max_condition: expected at least 1, got {self.max_condition}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 to less than 1, got {self.ema_decay}")
        for name in ("stage_steps", "stage_width", "stage_epochs", "stage_max_steps"):
            for value in getattr(self, name):
                _check_at_least(name, value, 1)
        stages = self.stages
        for number, stage in enumerate(stages):
            _check_objective("stage_" if number else "", stage)
        for outer, inner in pairwise(stages):
            if not 1 <= inner.dim <= outer.dim:
                raise ValueError(
                    f"stage_dims: expected dimensions from 1 to the {outer.dim} of the stage "
                    f"before, got {inner.dim}"
                )

    @property
    def stages(self) -> "list[Stage]":
        """The image flow, then each further flow."""
        first = Stage(
            self.manifold_dim, self.steps, self.width, self.domain, self.rho, self.weight,
            self.final_weight, self.weight_steps, self.error_bound, self.delta, self.sigma,
            self.learning_rate, self.epochs, self.max_steps,
        )  # fmt: skip
        count = len(self.stage_dims)
        # --max-steps does not override --stage-epochs.
        steps = None if self.stage_epochs else self.max_steps
        weight = "variance" if self.weight == "variance" else 1.0
        columns = (
            self.stage_dims,
            _for_each("stage_steps", self.stage_steps, count, None),
            _for_each("stage_width", self.stage_width, count, None),
            _for_each("stage_domain", self.stage_domain, count, self.domain),
            _for_each("stage_rho", self.stage_rho, count, self.rho),
            _for_each("stage_weight", self.stage_weight, count, weight),
            _for_each("stage_final_weight", self.stage_final_weight, count, None),
            _for_each("stage_weight_steps", self.stage_weight_steps, count, None),
            _for_each("stage_error_bound", self.stage_error_bound, count, None),
            _for_each("stage_delta", self.stage_delta, count, _STAGE_DELTA),
            _for_each("stage_sigma", self.stage_sigma, count, self.sigma),
            _for_each("stage_learning_rate", self.stage_learning_rate, count, self.learning_rate),
            _for_each("stage_epochs", self.stage_epochs, count, self.epochs),
            _for_each("stage_max_steps", self.stage_max_steps, count, steps),
        )
        return [first, *(Stage(*values) for values in zip(*columns, strict=True))]

    @property
    def data_name(self) -> str:
        """The name of the data set, or of the folder, zip or prepared file."""
        path = Path(self.data).resolve()
        return path.stem if path.is_file() else path.name

    def default_run_dir(self) -> str:
        """Return a readable folder name that depends only on the configuration."""
        size = f"-{self.image_size}px" if self.image_size else ""
        classes = "" if self.classes is None else f"-{self.classes.replace(',', '-')}"
        return f"runs/{self.data_name}{size}{classes}-d{self.manifold_dim}-seed{self.seed}"

    def resolve(
        self,
        image_shape: tuple[int, int, int],
        crop: int | None = None,
        class_names: tuple[str, ...] = (),
    ) -> "RunConfig":
        """Return a RunConfig with the values that come from the data, and absolute paths."""
        values = dataclasses.asdict(self)
        values["image_size"] = image_shape[1]
        if self.data not in NAMED_DATASETS:
            values["data"] = str(Path(self.data).resolve())
        if self.init_from is not None:
            values["init_from"] = str(Path(self.init_from).resolve())
        return RunConfig(
            **values, channels=image_shape[0], crop=crop, class_names=list(class_names)
        )


@dataclass
class RunConfig(TrainConfig):
    """A TrainConfig with the values that come from the data, as a run's config.yaml stores it.

    Args:
        crop: side of the square that is cut out of each image first; None for the largest square.
        class_names: names of the classes, in the order of their numbers.
        channels: 1 (grey) or 3 (RGB). It is the last field, so a file that is cut off lacks it.
    """

    crop: int | None = None
    class_names: list[str] = field(default_factory=list)
    channels: int = 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        if self.image_size is None:
            raise ValueError("image_size: expected a whole number, got none")
        return self.channels, self.image_size, self.image_size

    def to_yaml(self) -> str:
        """Return all values as YAML, which `from_yaml` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str | bytes, source: str) -> "RunConfig":
        """Read what `to_yaml` wrote. `source` is the name of the file in error messages.

        Raises:
            ValueError: a name is unknown or missing, or a value has the wrong type or is out of
                range.
        """
        parser = OptionParser()
        add_options(parser)
        add_resolved_options(parser)
        values = parse_yaml(parser, text, source)
        if "classes" not in values and values.get("stage_weight") == [] and "weight" in values:
            values["stage_weight"] = [values["weight"]]  # the default of earlier versions
        for option in dataclasses.fields(cls):
            if option.name in _ADDED_LATER:
                values.setdefault(option.name, _ADDED_LATER[option.name])
            elif option.name not in values:  # the default may not fit the run's model
                raise ValueError(
                    f"{source}: expected every option of the run, found no {option.name}; is the "
                    "file cut off?"
                )
        config = cls(**values)
        try:
            config.check()
            if values["channels"] is None:  # the file is cut off before the number
                raise ValueError("channels: expected a whole number, got none")
            _check_at_least("channels", config.channels, 1)
            _ = config.image_shape  # ValueError without an image_size
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return config


def add_resolved_options(parser: ArgumentParser) -> None:
    """Add the options that RunConfig has beyond TrainConfig."""
    parser.add_argument("--channels", type=int)
    parser.add_argument("--crop", type=int | None)
    parser.add_argument("--class_names", type=list[str])


def add_options(parser: ArgumentParser) -> None:
    """Add every option of TrainConfig to `parser`, in groups."""
    for options in (
        DataOptions,
        ModelOptions,
        HierarchyOptions,
        ObjectiveOptions,
        MemoryOptions,
        TrainingOptions,
    ):
        # Added by hand, because jsonargparse expects lists as "[64,32]", which shells expand, and
        # booleans as "--reversible false".
        by_hand = {
            option.name: option
            for option in dataclasses.fields(options)
            if isinstance(_default(option), bool | list) or option.name == "classes"
        }
        parser.add_class_arguments(with_docstring(options), as_group=True, skip={*by_hand})
        group = (parser.groups or {})[options.__name__]
        for action in group._group_actions:
            action.help = (action.help or "").replace("{named_datasets}", _named_datasets())
        texts = _argument_texts(options)
        types = get_type_hints(options)
        for name, option in by_hand.items():
            how: dict[str, Any]
            if types[name] is bool:
                how = {"action": ActionYesNo(no_prefix="no-")}
            elif name == "classes":
                how = {"nargs": "?", "const": LABELS, "type": str, "metavar": "ATTRIBUTES"}
            else:
                (kind,) = get_args(types[name])
                how = {"nargs": "*", "type": kind, "metavar": name.split("_")[-1].upper()}
            group.add_argument(f"--{name}", default=_default(option), help=texts[name], **how)


def check_precision(precision: Precision, device: str) -> None:
    """Raise ValueError if a device type ("cpu" or "cuda") does not support `precision`."""
    if precision == "float16" and device == "cpu":
        raise ValueError("precision: expected float32 or bfloat16 on a CPU, got float16")


def check_cuda_graphs(cuda_graphs: bool, device: str) -> None:
    """Raise ValueError if `cuda_graphs` is set for a device type that has none."""
    if cuda_graphs and device != "cuda":
        raise ValueError(f"cuda_graphs: expected a CUDA device, got {device}")


def _named_datasets() -> str:
    return ", ".join(f'"{name}" ({named.description})' for name, named in NAMED_DATASETS.items())


def _default(option: "dataclasses.Field[Any]") -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def _argument_texts(options: type) -> dict[str, str]:
    """Return the text for each argument in the docstring of a class."""
    lines = (options.__doc__ or "").partition("Args:")[2]
    texts = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", lines, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}


def _for_each(name: str, values: list[Any], count: int, default: Any) -> list[Any]:
    """Return one value per further flow. `values` holds none (the default is used), one or all."""
    if not values and default is None and name in ("stage_steps", "stage_width"):
        raise ValueError(f"{name}: expected at least one value, got none")
    if len(values) > 1 and len(values) != count:
        raise ValueError(f"{name}: expected one value or {count}, as stage_dims, got {len(values)}")
    if len(values) == count:
        return values
    return (values or [default]) * count


def _check_objective(prefix: str, stage: Stage) -> None:
    """Check the penalty of a stage, whose options start with `prefix`."""
    varying = stage.final_weight is not None or stage.error_bound is not None
    if stage.weight == "variance":
        if stage.domain == "latent":
            raise ValueError(
                f"{prefix}weight: expected a number in the latent domain, got variance"
            )
        if varying:
            raise ValueError(
                f"{prefix}weight: expected a number with a final weight or an error bound, "
                "got variance"
            )
    for name in ("weight", "final_weight", "error_bound", "delta", "sigma"):
        value = getattr(stage, name)
        if value not in (None, "variance") and not 0 < value < float("inf"):
            raise ValueError(f"{prefix}{name}: expected more than 0, got {value}")
    if varying and stage.domain == "latent":
        name = "error_bound" if stage.final_weight is None else "final_weight"
        raise ValueError(f"{prefix}{name}: expected none in the latent domain")
    if stage.final_weight is not None and stage.error_bound is not None:
        raise ValueError(f"{prefix}error_bound: expected none together with {prefix}final_weight")
    if (stage.final_weight is None) != (stage.weight_steps is None):
        raise ValueError(
            f"{prefix}weight_steps: expected both or none of it and {prefix}final_weight"
        )
    if stage.weight_steps is not None:
        _check_at_least(f"{prefix}weight_steps", stage.weight_steps, 1)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
