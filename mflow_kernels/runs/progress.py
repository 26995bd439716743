"""The progress of a run, which a checkpoint records so that the options may change on resume."""

from fractions import Fraction
from itertools import chain, pairwise
from typing import Any, NamedTuple

from mflow_kernels.data.batches import Position


class Progress(NamedTuple):
    """Progress of training after `step` optimizer steps."""

    step: int = 0
    begins: tuple[int, ...] = (0,)  # first step of each stage that has begun
    passes: Fraction = Fraction(0)  # passes over the images in the last of these stages
    position: Position = Position()  # position of the next batch

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint."""
        return {
            "step": self.step,
            "begins": [*self.begins],
            "passes": [*self.passes.as_integer_ratio()],
            "position": [*self.position],
        }

    @classmethod
    def from_dict(cls, values: object, step: int, stages: int, images: int) -> "Progress":
        """Read `to_dict`'s values from a checkpoint of `step` steps.

        Args:
            values: the values; nothing about them is trusted.
            step: number of steps that the checkpoint has taken.
            stages: number of stages of the run.
            images: number of training images.

        Raises:
            ValueError: the values do not belong to such a checkpoint.
        """
        if not isinstance(values, dict) or values.keys() != {*cls._fields}:
            raise ValueError("progress: expected the stages and images of the run so far")
        lists = begins, passes, position = [values[n] for n in ("begins", "passes", "position")]
        numbers = [values["step"], *chain.from_iterable(map(_list, lists))]
        fits = (
            all(type(number) is int and number >= 0 for number in numbers)
            and values["step"] == step
            and 1 <= len(begins) <= stages
            and begins[0] == 0
            and all(a < b for a, b in pairwise(begins))
            and begins[-1] < max(1, step)
            and len(passes) == len(position) == 2
            and passes[1] > 0
            and passes[0] <= step * passes[1]
            and position[0] <= step
            and position[1] <= images
        )
        if not fits:
            raise ValueError(f"progress: {str(values)[:60]}")
        return cls(step, tuple(begins), Fraction(*passes), Position(*position))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [None]
