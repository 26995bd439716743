"""The report of `accelerate`, for people and programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """A layer, or a sequence of layers, that our kernels now compute."""

    name: str
    layer: str
    by: str


@dataclass(frozen=True)
class Left:
    """A layer that runs as before, and the reason."""

    name: str
    layer: str
    why: str


@dataclass(frozen=True)
class Report:
    """The result of `accelerate`, which `print(report)` shows.

    Attributes:
        library: "normflows", "nflows", "glasflow", "zuko" or "FrEIA" with its version; "" if it
            uses none.
        replaced: the layers that these kernels now compute, named as in `model.named_modules()`.
        left: the layers that run as before, named in the same way.
        notes: how the accelerated model differs from the original on purpose.
    """

    library: str
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = ["Nothing was replaced; the model is unchanged."]
        if self.replaced:
            lines = [f"Accelerated a model of {self.library}.", "replaced:"]
            lines += [f"  {r.name or '(model)'}  {r.layer} -> {r.by}" for r in self.replaced]
        if self.left:
            lines.append("left:")
            alike: dict[tuple[str, str], list[str]] = {}
            for one in self.left:
                alike.setdefault((one.layer, one.why), []).append(one.name or "(model)")
            for (layer, why), names in alike.items():
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"  {names[0]}{more}  {layer}: {why}")
        if self.notes:
            lines.append("notes:")
            lines += [f"  - {note}" for note in self.notes]
        return "\n".join(lines)
