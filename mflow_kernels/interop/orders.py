"""Permutations of channels, and tensors of modules that may change after `accelerate` read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.launch import transformed


@dataclass(frozen=True)
class Rotated:
    """A permutation that moves the first a channels behind the others.

    a is C // 2, or (C + 1) // 2 if `larger`. With `back`, this is the inverse permutation.
    """

    larger: bool
    back: bool = False

    def __call__(self, channels: int) -> tuple[int, ...]:
        first = (channels + 1) // 2 if self.larger else channels // 2
        if self.back:
            first = channels - first
        return (*range(first, channels), *range(first))


@dataclass(frozen=True)
class Listed:
    """A permutation of a fixed number of channels."""

    channels: tuple[int, ...]

    def __call__(self, channels: int) -> tuple[int, ...]:
        if len(self.channels) != channels:
            raise ValueError(f"x: expected {len(self.channels)} channels, got {channels}")
        return self.channels


def versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """Return what changes when one of these tensors does.

    It is None if one is an inference tensor, which has no version.
    """
    if any(t.is_inference() for t in tensors):
        return None
    return [(id(t), t._version) for t in tensors]


class Watched:
    """A value that is read from tensors of a module, such as the order in a mask. It is read again
    after a tensor has changed, for example by loading a checkpoint.

    Args:
        names: the tensors' names in the module.
    """

    def __init__(self, module: nn.Module, *names: str) -> None:
        self.module, self.names = module, names
        self._found: Any = None
        self._read_from: list[tuple[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read_from": None}

    def read(self, tensors: Sequence[Tensor]) -> Any:
        raise NotImplementedError

    def found(self) -> Any:
        """Return the result of `read`. A compiler or transform gets the last one."""
        tensors: list[Tensor] = [getattr(self.module, name) for name in self.names]
        if torch.compiler.is_compiling() or transformed() or any(t.is_meta for t in tensors):
            return self._found
        key = versions(tensors)
        if key is None or key != self._read_from:
            self._found, self._read_from = self.read(tensors), key
        return self._found


class OfMatrix(Watched):
    """The permutation that a fixed 0/1 matrix (C, C, ...) of a module stands for: row i has its 1
    in column order[i].

    Args:
        back: whether this is the inverse permutation.
    """

    def __init__(self, module: nn.Module, name: str, back: bool = False) -> None:
        super().__init__(module, name)
        self.back = back

    def holds(self, x: Tensor | None = None) -> bool:
        """Whether the matrix is a permutation now, and is not trained."""
        trained = getattr(self.module, self.names[0]).requires_grad
        return not trained and self.found() is not None

    def read(self, tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
        rows = tensors[0].detach().flatten(1)
        order = rows.argmax(1)
        alone = torch.zeros_like(rows).scatter_(1, order[:, None], 1.0)
        if not torch.equal(rows, alone) or len(order.unique()) < len(order):
            return None
        return tuple((order.argsort() if self.back else order).tolist())

    def __call__(self, channels: int) -> tuple[int, ...]:
        return Listed(self.found())(channels)


class SameBuffers(Watched):
    """Whether buffers of a module, such as a mask, still have the values that they had here."""

    def __init__(self, module: nn.Module, *names: str) -> None:
        super().__init__(module, *names)
        self._values = [getattr(module, name).detach().clone() for name in names]
        self._found = True

    def read(self, tensors: Sequence[Tensor]) -> bool:
        pairs = zip(tensors, self._values, strict=True)
        return all(torch.equal(now.cpu(), then.cpu()) for now, then in pairs)

    def __call__(self, x: Tensor) -> bool:
        return bool(self.found())


def inverse_of(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
