"""The random numbers that a module's run draws, and which its second run uses again.

They are kept, and not drawn again from a generator whose state is set back: other threads may draw
from that generator at the same time. Other threads then never change the numbers of a second run,
a generator that the module owns is repeated too, and a CUDA graph can contain both runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mflow_kernels.ops.launch import capturing

aten = torch.ops.aten

# The state of the CPU generator, and the seed and offset of the CUDA device's generator.
RandomState = tuple[Tensor, tuple[int, int] | None]


def random_state(device: torch.device) -> RandomState:
    """The state of the default generators that a network on `device` may draw from."""
    cuda = None
    if device.type == "cuda" and not capturing(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        cuda = generator.initial_seed(), generator.get_offset()
    return torch.default_generator.get_state(), cuda


def same_random_state(a: RandomState, b: RandomState) -> bool:
    return a[1] == b[1] and torch.equal(a[0], b[0])


class Drawn(NamedTuple):
    """The result of an operator that draws."""

    operator: Any
    written: list[Tensor]  # the values of arguments that it filled
    result: Any  # None if it returned such an argument


class DrewOtherNumbers(Exception):
    """A second run drew by another operator, or its derivative drew."""


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled networks stay compiled, and draw by operators as others do

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            return self.draw(func, args, kwargs or {})
        return func(*args, **kwargs or {})

    def draw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError


class Recorded(_Mode):
    """Keeps what the operators inside of it draw.

    Attributes:
        drawn: in order; None for an operator that can draw and did not, as attention without
            dropout.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.drawn: list[Drawn | None] = []

    def draw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        before = random_state(self.device)
        result = func(*args, **kwargs)
        drew = capturing(self.device) or any(
            isinstance(a, torch.Generator) for a in kwargs.values()
        )
        if not drew and same_random_state(before, random_state(self.device)):
            self.drawn.append(None)
            return result
        given = _written(func, args, kwargs)
        # Dropout keeps one byte for each number.
        zero_or_one = func.overloadpacket is aten.bernoulli_
        written = [t.bool() if zero_or_one else t.detach().clone() for t in given]
        if any(result is t for t in given):
            kept = None
        elif func is aten.native_dropout.default:
            kept = result[1]
        else:
            kept = tree_map(_copy, result)
        self.drawn.append(Drawn(func, written, kept))
        return result


class Refused(Recorded):
    """Raises DrewOtherNumbers if an operator inside of it draws."""

    def draw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = super().draw(func, args, kwargs)
        if self.drawn.pop() is not None:
            raise DrewOtherNumbers
        return result


class Repeated(_Mode):
    """Gives the operators inside of it the numbers that the first run drew.

    Raises:
        DrewOtherNumbers: from an operator that is not that of the first run.
    """

    def __init__(self, drawn: Sequence[Drawn | None]) -> None:
        super().__init__()
        self._left = list(reversed(drawn))

    def draw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self._left:
            raise DrewOtherNumbers
        first = self._left.pop()
        if first is None:
            return func(*args, **kwargs)
        given = _written(func, args, kwargs)
        shapes = [t.shape for t in given], [t.shape for t in first.written]
        if func is not first.operator or shapes[0] != shapes[1]:
            raise DrewOtherNumbers
        for t, value in zip(given, first.written, strict=True):
            t.copy_(value)
        if first.result is None:
            return given[0]
        if func is aten.native_dropout.default:
            kept = 1 - args[1]
            scale = 1 / kept if kept else 0.0
            mask = first.result
            return aten.native_dropout_backward(args[0], mask, scale), mask.clone()
        return tree_map(_copy, first.result)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator fills."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs[argument.name])
    return written


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
