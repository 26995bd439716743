"""The interface between `accelerate` and a library: each has an `Adapter` in its own folder."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mflow_kernels.interop.parts import Part
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


Piece = tuple[list[nn.Module], FusedSequence | None]
"""Layers of a container, data -> latent, that run as one sequence; or one layer alone."""


class Adapter(Protocol):
    """A library of flows. Its folder's `adapter.py` has an instance named ADAPTER.

    Attributes:
        folder: the adapter's folder.
        layers: the classes that can be accelerated. Subclasses of them are not accelerated.
        containers: the classes of models and composites whose layers can run as one sequence.
        methods: for each kind of layer and for the name of each container class, the methods of the
            accelerated module. They find its `FusedSequence` or fused container with
            `implementation_of(self)`.
        kinds: the kinds of layers that have methods of their own; that of the others is "layer".
        fingerprints: for each module of the library, the fingerprints of the versions that the
            tests ran against (see `fingerprints.py`).
        functions: for classes of modules that compute with functions of another module of the
            library, the name of that module.
        repaired: the report's text for kinds of layers that the library's own code still computes,
            with a bug fixed, when they stand alone.
        notes: says how accelerated modules differ from the library's on purpose: texts for the
            report, each with a function that finds the modules that it is about.
    """

    folder: str
    layers: Mapping[type, PartsOf]
    containers: tuple[type[nn.Module], ...]
    methods: Mapping[str, Methods]
    kinds: Mapping[type, str] = {}
    fingerprints: dict[str, set[str]]
    functions: Mapping[type, str] = {}
    repaired: Mapping[str, str] = {}
    notes: Sequence[tuple[str, Callable[[Any], bool]]] = ()

    def is_layer(self, module: nn.Module) -> bool:
        """Whether the report has to name this module, as replaced or as left."""

    def why_left(self, layer: nn.Module) -> str:
        """Say why a layer whose class is not in `layers` is left."""
        return "mflow_kernels has no such layer"

    def channels_of(self, layer: Any) -> int | None:
        """Return the number of channels of a layer's states; None if it is unknown."""
        return None

    def probe(self, layer: Any) -> Callable[[Any], list[Tensor]] | None:
        """Return a function that computes values of a layer, or of a copy, on a fixed random state
        in both directions; None if the library's layers do not show the shape of their states."""
        return None

    def fuse(
        self, container: nn.Module, kind: type[nn.Module], cut: Callable[..., list[Piece]]
    ) -> Any:
        """Return what the methods of a fused container need; None if it has nothing to fuse.

        The result is a string if the container cannot be fused: the reason.

        Args:
            container: an instance of `kind`, which is one of `containers`.
            cut: cuts a list of layers, data -> latent, into pieces. Its arguments are the layers,
                their names in the container and, if the container has conditions, the indices of
                those that each layer takes.
        """
        return None


def instance_of(*classes: type) -> Callable[[Any], bool]:
    """Return a function that finds modules of these classes."""
    return lambda module: isinstance(module, classes)


def load_adapter(folder: str) -> Adapter:
    """Import and return the adapter in this folder. It imports its library."""
    adapter: Adapter = importlib.import_module(f"mflow_kernels.interop.{folder}.adapter").ADAPTER
    return adapter
