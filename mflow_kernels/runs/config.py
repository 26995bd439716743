"""What a training run can be told, and the checks that need neither data nor torch."""

import dataclasses
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentParser

from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.runs.parser import OptionParser, parse_yaml, with_docstring

Precision = Literal["float32", "bfloat16", "float16"]
Domain = Literal["latent", "data"]
Rho = Literal["l2", "l1", "huber"]
Weight = float | Literal["variance"]


@dataclass(frozen=True)
class Stage:
    """One flow of the hierarchy: its manifold's dimension, its networks, objective and budget."""

    dim: int
    steps: int
    width: int
    domain: Domain
    rho: Rho
    weight: Weight
    epochs: int
    max_steps: int | None

    def optimizer_steps(self, batches_per_pass: int) -> int:
        """Its budget, where a pass over the images has so many batches."""
        return self.max_steps or self.epochs * batches_per_pass


@dataclass
class DataOptions:
    """Images.

    Args:
        data: {named_datasets}, a file of mflow prepare, or a folder or zip of images (CelebA as
            downloaded is one), which is prepared in a cache first.
        image_size: Side of the square images in pixels; other images are cropped and resized. By
            default that of the named data set or prepared file, else 64.
        n_bits: Bits of each colour that the model sees, 1 to 8.
        flips: Mirror each image left to right with probability 1/2 in training.
    """

    data: str = "digits"
    image_size: int | None = None
    n_bits: int = 8
    flips: bool = False


@dataclass
class ModelOptions:
    """Model.

    Args:
        levels: Levels of the image flow; each halves the image, so 2^levels must divide its size.
        steps: Flow steps in each level.
        width: Hidden channels of the image flow's coupling networks.
        manifold_dim: Dimensions of the manifold, filled from the coarsest latents on.
    """

    levels: int = 2
    steps: int = 4
    width: int = 64
    manifold_dim: int = 64


@dataclass
class HierarchyOptions:
    """Hierarchy: further flows, each trained on the manifold coordinates of the one before.

    Args:
        stage_dims: Manifold dimensions of each further flow; none given adds no flow. The other
            options of stages take one value for all further flows or one for each.
        stage_steps: Flow steps.
        stage_width: Hidden units of the coupling networks.
        stage_epochs: Passes over the training images; by default as --epochs.
        stage_max_steps: Optimizer steps, instead of epochs; by default as --max-steps.
        stage_domain: What is penalized; by default as --domain.
        stage_rho: Shape of the penalty; by default as --rho.
        stage_weight: Weight of the penalty; by default as --weight.
        release: Let the earlier flows train on with each further one, on the joint likelihood and
            their own penalties; by default they stay as they are.
    """

    stage_dims: list[int] = field(default_factory=lambda: [64])
    stage_steps: list[int] = field(default_factory=lambda: [8])
    stage_width: list[int] = field(default_factory=lambda: [128])
    stage_epochs: list[int] = field(default_factory=list)
    stage_max_steps: list[int] = field(default_factory=list)
    stage_domain: list[Domain] = field(default_factory=list)
    stage_rho: list[Rho] = field(default_factory=list)
    stage_weight: list[Weight] = field(default_factory=list)
    release: bool = False


@dataclass
class ObjectiveOptions:
    """Objective.

    Args:
        domain: What is penalized: the off-manifold latents, or the difference between the image and
            its projection on the manifold.
        rho: Shape of the penalty.
        weight: Weight of the penalty: a number, or in the data domain "variance", half the inverse
            of the penalized differences' variance, tracked as training goes.
    """

    domain: Domain = "data"
    rho: Rho = "l2"
    weight: Weight = 1000.0


@dataclass
class MemoryOptions:
    """Memory and exactness: how the backward pass comes by the states of the forward pass.

    Args:
        reversible: Rebuild states instead of storing them, in memory that does not grow with the
            number of steps.
        checkpoint_every: Keep every so many-th state, which costs memory and makes the others more
            exact; null keeps none.
        max_drift: Largest error of a rebuilt image (in units of its range, 0 to 1) or vector;
            training stops above it, before the gradients of that step are used.
        max_condition: Largest condition number of the 1x1 convolutions' weights, brought down to it
            every 100 steps; by default they go where training takes them.
    """

    reversible: bool = True
    checkpoint_every: int | None = 8
    max_drift: float = 0.01
    max_condition: float | None = None


@dataclass
class TrainingOptions:
    """Training.

    Args:
        batch_size: Images in a step.
        epochs: Passes over the training images in each stage: first the image flow, then each
            further flow.
        max_steps: Optimizer steps in each stage, instead of epochs.
        learning_rate: Highest learning rate of AdamW, after warm-up; it then falls along a cosine.
        warm_up: Steps of each stage in which the learning rate rises, at most a fifth of them.
        weight_decay: Of AdamW, on the weights of the coupling networks.
        clip_norm: Longest gradient; longer ones are shortened to it.
        loss_spike: Skip a step whose loss lies above the last hundred's mean by more than so many
            of their standard deviations, as steps are whose loss or gradient is not finite.
        max_skipped: Stop when so many steps in a row were skipped; the last checkpoint stays.
        ema_decay: Of the running average of the weights, which is what samples and evaluations are
            made from; it is lower for the first steps of a stage. 0 takes the weights as they are.
        seed: Seed of weights, data order and noise.
        device: Where to train; auto takes a GPU if there is one.
        precision: Arithmetic of the coupling networks; the flow's state is always float32.
        compile: Compile the coupling networks with torch.compile; the first step takes minutes.
        cuda_graphs: Capture the forward and backward pass of each stage once and replay them, so
            that a small model does not wait for the host to launch its kernels; holds their memory
            between steps. No GPU has run this yet.
        save_minutes: Write a checkpoint at least every so many minutes.
        save_steps: Write one at least every so many steps; one is written before each validation
            anyway.
    """

    batch_size: int = 64
    epochs: int = 7
    max_steps: int | None = None
    learning_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    loss_spike: float = 10.0
    max_skipped: int = 20
    ema_decay: float = 0.999
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
    """What `mflow train` can be told of a run."""

    def check(self) -> None:
        """ValueError for the first value out of range. What depends on the images' shape (levels
        that divide it, dimensions it has) the models check themselves."""
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
        if self.max_condition is not None and not self.max_condition >= 1:
            raise ValueError(f"max_condition: expected at least 1, got {self.max_condition}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 to less than 1, got {self.ema_decay}")
        _check_weight("weight", self.weight, self.domain)
        for name in ("stage_steps", "stage_width", "stage_epochs", "stage_max_steps"):
            for value in getattr(self, name):
                _check_at_least(name, value, 1)
        stages = self.stages
        for outer, inner in pairwise(stages):
            if not 1 <= inner.dim <= outer.dim:
                raise ValueError(
                    f"stage_dims: expected dimensions from 1 to the {outer.dim} of the stage "
                    f"before, got {inner.dim}"
                )
            _check_weight("stage_weight", inner.weight, inner.domain)

    @property
    def stages(self) -> "list[Stage]":
        """The image flow, then each further flow."""
        first = Stage(
            self.manifold_dim, self.steps, self.width, self.domain, self.rho, self.weight,
            self.epochs, self.max_steps,
        )  # fmt: skip
        count = len(self.stage_dims)
        # Epochs of its own are not overruled by the image flow's steps.
        steps = None if self.stage_epochs else self.max_steps
        columns = (
            self.stage_dims,
            _for_each("stage_steps", self.stage_steps, count, None),
            _for_each("stage_width", self.stage_width, count, None),
            _for_each("stage_domain", self.stage_domain, count, self.domain),
            _for_each("stage_rho", self.stage_rho, count, self.rho),
            _for_each("stage_weight", self.stage_weight, count, self.weight),
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
        """A readable folder name that is a function of the configuration."""
        size = f"-{self.image_size}px" if self.image_size else ""
        return f"runs/{self.data_name}{size}-d{self.manifold_dim}-seed{self.seed}"

    def resolve(self, image_shape: tuple[int, int, int]) -> "RunConfig":
        """This configuration for images of shape (C, H, W), with nothing left to be decided."""
        values = dataclasses.asdict(self)
        values["image_size"] = image_shape[1]
        if self.data not in NAMED_DATASETS:
            values["data"] = str(Path(self.data).resolve())
        return RunConfig(**values, channels=image_shape[0])


@dataclass
class RunConfig(TrainConfig):
    """A TrainConfig with the images' size and channels known: all that a run is made from, and
    what its config.yaml holds."""

    channels: int = 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        if self.image_size is None:
            raise ValueError("image_size: expected a whole number, got nothing")
        return self.channels, self.image_size, self.image_size

    def to_yaml(self) -> str:
        """Every value, as text that `from_yaml` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str | bytes, source: str) -> "RunConfig":
        """The configuration that `to_yaml` wrote. `source` is what errors call the file.

        Raises:
            ValueError: unknown or missing names, values of the wrong type or out of range.
        """
        parser = OptionParser()
        add_options(parser)
        parser.add_argument("--channels", type=int)
        values = parse_yaml(parser, text, source)
        for option in dataclasses.fields(cls):
            if option.name not in values:  # a default in its place could be another model's
                raise ValueError(
                    f"{source}: expected every option of the run, found no {option.name}; is the "
                    "file cut off?"
                )
        config = cls(**values)
        try:
            config.check()
            _check_at_least("channels", config.channels, 1)
            _ = config.image_shape  # ValueError without an image_size
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return config


def add_options(parser: ArgumentParser) -> None:
    """Give `parser` every option of TrainConfig, in groups."""
    for options in (
        DataOptions,
        ModelOptions,
        HierarchyOptions,
        ObjectiveOptions,
        MemoryOptions,
        TrainingOptions,
    ):
        # By hand: a list[int] of the signature would be typed "[64,32]", which shells expand, and a
        # bool "--reversible false".
        by_hand = {
            option.name: option
            for option in dataclasses.fields(options)
            if isinstance(_default(option), bool | list)
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
            else:
                (kind,) = get_args(types[name])
                how = {"nargs": "*", "type": kind, "metavar": name.split("_")[-1].upper()}
            group.add_argument(f"--{name}", default=_default(option), help=texts[name], **how)


def check_precision(precision: Precision, device: str) -> None:
    """ValueError for what a type of device ("cpu" or "cuda") cannot do."""
    if precision == "float16" and device == "cpu":
        raise ValueError("precision: expected float32 or bfloat16 on a CPU, got float16")


def check_cuda_graphs(cuda_graphs: bool, device: str) -> None:
    """ValueError where they are asked for on a type of device that has none."""
    if cuda_graphs and device != "cuda":
        raise ValueError(f"cuda_graphs: expected a CUDA device to use them on, got {device}")


def _named_datasets() -> str:
    return ", ".join(f'"{name}" ({named.description})' for name, named in NAMED_DATASETS.items())


def _default(option: "dataclasses.Field[Any]") -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def _argument_texts(options: type) -> dict[str, str]:
    """What the docstring of a class says of each argument."""
    lines = (options.__doc__ or "").partition("Args:")[2]
    texts = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", lines, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}


def _for_each(name: str, values: list[Any], count: int, default: Any) -> list[Any]:
    """One value for each further flow, out of none (the default), one or as many as there are."""
    if not values and default is None and name in ("stage_steps", "stage_width"):
        raise ValueError(f"{name}: expected at least one value, got none")
    if len(values) > 1 and len(values) != count:
        raise ValueError(f"{name}: expected one value or {count}, as stage_dims, got {len(values)}")
    if len(values) == count:
        return values
    return (values or [default]) * count


def _check_weight(name: str, weight: Weight, domain: Domain) -> None:
    if weight == "variance":
        if domain == "latent":
            raise ValueError(f"{name}: expected a number in the latent domain, got variance")
    elif not 0 < weight < float("inf"):
        raise ValueError(f"{name}: expected more than 0, got {weight}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
