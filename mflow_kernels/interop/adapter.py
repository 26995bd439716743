"""The interface between `accelerate` and a library: each has an `Adapter` in its own folder."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mflow_kernels.interop.parts import Part
from mflow_kernels.interop.report import Left, Replaced
from mflow_kernels.interop.sequence import FusedSequence

# Folder of each library's adapter, by the package with its classes.
LIBRARIES = {
    "normflows": "normflows",
    "nflows": "nflows",
    "glasflow.nflows": "glasflow",
    "FrEIA": "freia",
    "zuko": "zuko",
}

PartsOf = Callable[[Any], tuple[Part, ...] | str]
"""Maps a layer to its parts, data -> latent, or to the reason why our kernels cannot compute it."""

Methods = Mapping[str, Callable[..., Any]]
"""Methods that replace those of a module's class, by name."""


class Fuser(Protocol):
    """The part of `Visitor` that `Adapter.fuse` uses.

    Attributes:
        replaced, left: the lists of the report; `fuse` adds to them.
    """

    replaced: list[Replaced]
    left: list[Left]

    def fuse_sequences(
        self,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        conditions: Sequence[tuple[int, ...]] | None = None,
    ) -> list[tuple[list[nn.Module], FusedSequence | None]]:
        """Cut a list of layers, data -> latent, into fused sequences and single layers.

        Args:
            names: names of the layers, as in `model.named_modules()`.
            conditions: for each layer, the indices of the container's conditions that it takes.
        """

    def accelerates(self, layer: nn.Module) -> bool:
        """Whether a layer will be accelerated, in a sequence or alone."""


class Adapter(Protocol):
    """A library of flows. Its folder's `adapter.py` has an instance named ADAPTER.

    Attributes:
        folder: the adapter's folder.
        layers: the classes that can be accelerated. Subclasses of them are not accelerated.
        containers: the classes of models and composites whose layers can run as one sequence.
        methods: for each kind of layer (see `kind_of`) and for the name of each container class,
            the methods of the accelerated module. They find its `FusedSequence` or fused container
            with `implementation_of(self)`.
        fingerprints: for each module of the library, the fingerprints of the versions that the
            tests ran against (see `fingerprints.py`).
        functions: for classes of modules that compute with functions of another module of the
            library, the name of that module.
        repaired: the report's text for kinds of layers that the library's own code still computes,
            with a bug fixed, when they stand alone.
    """

    folder: str
    layers: Mapping[type, PartsOf]
    containers: tuple[type[nn.Module], ...]
    methods: Mapping[str, Methods]
    fingerprints: dict[str, set[str]]
    functions: Mapping[type, str] = {}
    repaired: Mapping[str, str] = {}

    def is_layer(self, module: nn.Module) -> bool:
        """Whether the report has to name this module, as replaced or as left."""

    def why_left(self, layer: nn.Module) -> str:
        """Say why a layer whose class is not in `layers` is left."""
        return "mflow_kernels has no such layer"

    def kind_of(self, cls: type) -> str:
        """Return the key of the methods of an accelerated layer of this class."""

    def channels_of(self, layer: Any) -> int | None:
        """Return the number of channels of a layer's states; None if it is unknown."""
        return None

    def probe(self, layer: Any) -> Callable[[Any], list[Tensor]] | None:
        """Return a function that computes values of a layer, or of a copy, on a fixed random state
        in both directions; None if the library's layers do not show the shape of their states."""
        return None

    def fuse(self, container: nn.Module, name: str, kind: type[nn.Module], fuser: Fuser) -> None:
        """Make a container, an instance of `kind` in `containers`, run fused sequences.

        `fuser.fuse_sequences` finds them; `accelerate_module` replaces the container's methods.
        A library without `containers` needs no such method.
        """
        return None

    def notes(self, modules: Sequence[nn.Module]) -> list[str]:
        """Say how these accelerated modules differ from the library's on purpose."""
        return []


def load_adapter(folder: str) -> Adapter:
    """Import and return the adapter in this folder. It imports its library."""
    adapter: Adapter = importlib.import_module(f"mflow_kernels.interop.{folder}.adapter").ADAPTER
    return adapter
