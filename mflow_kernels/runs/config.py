"""The configuration of a run: its options, and the checks that need neither images nor torch."""

import dataclasses
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.runs.arguments import parse_config
from mflow_kernels.runs.options import (
    MAX_BINS,
    DataOptions,
    Domain,
    HierarchyOptions,
    MemoryOptions,
    ModelOptions,
    ObjectiveOptions,
    Precision,
    Rho,
    StageOptions,
    TrainingOptions,
    Weight,
    check_at_least,
    check_positive,
)
from mflow_kernels.version import __version__


@dataclass(frozen=True)
class Stage(StageOptions):
    """One flow of the hierarchy, with the values that its options leave to the flow before it or to
    the options of the image flow."""

    dim: int = 0
    domain: Domain = "data"
    rho: Rho = "l2"
    weight: Weight = 1.0
    sigma: float = 1.0
    learning_rate: float = 0.0
    epochs: int = 0

    def optimizer_steps(self, batches_per_pass: int) -> int:
        """Return the number of optimizer steps, given the number of batches in a pass."""
        return self.max_steps or self.epochs * batches_per_pass


@dataclass
class TrainConfig(
    TrainingOptions, MemoryOptions, ObjectiveOptions, HierarchyOptions, ModelOptions, DataOptions
):
    """All options of `mflow train` that describe a run."""

    def check(self) -> None:
        """Raise ValueError for the first value out of range.

        The models check what depends on the images' shape, such as the number of levels.
        """
        model = ("image_size", "levels", "manifold_dim", "checkpoint_every")
        jet = ("patch", "couplings", "depth", "heads")
        training = ("batch_size", "accumulate", "warm_up", "max_skipped", "save_steps")
        for name in (*model, *jet, *training):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size, {self.batch_size}, "
                f"got {self.accumulate}"
            )
        check_at_least("seed", self.seed, 0)
        if not 1 <= self.n_bits <= 8:
            raise ValueError(f"n_bits: expected 1 to 8, got {self.n_bits}")
        for name in ("clip_norm", "loss_spike", "max_drift", "save_minutes"):
            check_positive(name, getattr(self, name))
        if self.max_condition is not None and not self.max_condition >= 1:
            raise ValueError(f"max_condition: expected at least 1, got {self.max_condition}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 to less than 1, got {self.ema_decay}")
        flows = self.flows
        for number, flow in enumerate(flows):
            _check_flow(f"stages[{number - 1}]." if number else "", flow)
        for number, (outer, inner) in enumerate(pairwise(flows)):
            if not 1 <= inner.dim <= outer.dim:
                raise ValueError(
                    f"stages[{number}].dim: expected dimensions from 1 to the {outer.dim} of the "
                    f"stage before, got {inner.dim}"
                )

    @property
    def part_size(self) -> int:
        """Images of a batch that are computed together."""
        return max(1, self.batch_size // self.accumulate)

    @property
    def flows(self) -> list[Stage]:
        """The image flow, then each further flow."""
        image = {
            o.name: getattr(self, o.name)
            for o in fields(Stage)
            if o.name not in ("dim", "components")
        }
        flows = [Stage(dim=self.manifold_dim, components=1, **image)]
        left = {name: image[name] for name in ("domain", "rho", "sigma", "learning_rate", "epochs")}
        left["weight"] = "variance" if self.weight == "variance" else 1.0
        for stage in self.stages:
            own = {name: value for name, value in vars(stage).items() if value is not None}
            left["dim"] = flows[-1].dim
            # --max-steps does not override a stage's own epochs.
            left["max_steps"] = self.max_steps if stage.epochs is None else None
            flows.append(Stage(**left | own))
        return flows

    def values(self) -> dict[str, Any]:
        """Every value by its name in messages, such as "stages[0].dim" for those of a further flow;
        `stages` is the number of further flows."""
        found = dict(vars(self)) | {"stages": len(self.stages)}
        for number, stage in enumerate(self.stages):
            found |= {f"stages[{number}].{name}": value for name, value in vars(stage).items()}
        return found

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
        """Return a RunConfig with the values that come from the data, and absolute paths.

        States are rebuilt unless `reversible` is False; `memory.choose_states` knows the card.
        """
        values = dict(vars(self))
        values["reversible"] = self.reversible is not False
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
        values = parse_config(text, source)
        for option in fields(cls):
            if option.name not in values:  # the default may not fit the run's model
                raise ValueError(
                    f"{source}: expected every option of mflow_kernels {__version__}, found no "
                    f"{option.name}; is the file cut off, or of another version?"
                )
        config = cls(**values)
        try:
            config.check()
            if values["channels"] is None:  # the file is cut off before the number
                raise ValueError("channels: expected a whole number, got none")
            check_at_least("channels", config.channels, 1)
            _ = config.image_shape  # ValueError without an image_size
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return config


def check_precision(precision: Precision, device: str) -> None:
    """Raise ValueError if a device type ("cpu" or "cuda") does not support `precision`."""
    if precision == "float16" and device == "cpu":
        raise ValueError("precision: expected float32 or bfloat16 on a CPU, got float16")


def _check_flow(prefix: str, stage: Stage) -> None:
    """Check the values of a flow, whose names in messages start with `prefix`."""
    for name in ("steps", "width", "components", "epochs", "max_steps", "weight_steps"):
        if getattr(stage, name) is not None:
            check_at_least(f"{prefix}{name}", getattr(stage, name), 1)
    if not 2 <= stage.bins <= MAX_BINS:
        raise ValueError(f"{prefix}bins: expected 2 to {MAX_BINS}, got {stage.bins}")
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
    for name in ("weight", "final_weight", "error_bound", "delta", "sigma", "learning_rate"):
        value = getattr(stage, name)
        if value not in (None, "variance"):
            check_positive(f"{prefix}{name}", value)
    if varying and stage.domain == "latent":
        name = "error_bound" if stage.final_weight is None else "final_weight"
        raise ValueError(f"{prefix}{name}: expected none in the latent domain")
    if stage.final_weight is not None and stage.error_bound is not None:
        raise ValueError(f"{prefix}error_bound: expected none together with {prefix}final_weight")
    if (stage.final_weight is None) != (stage.weight_steps is None):
        there, lacks = "final_weight", "weight_steps"
        if stage.final_weight is None:
            there, lacks = lacks, there
        raise ValueError(f"{prefix}{there}: expected {prefix}{lacks} too, got none")
