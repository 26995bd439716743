"""A flow as a `torch.distributions.Distribution`."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


class Density(Protocol):
    """The part of a flow that `FlowDistribution` uses."""

    def log_prob(self, x: Tensor, *, context: Any = None) -> Tensor: ...
    def sample_and_log_prob(
        self, n: int, *, context: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]: ...


class FlowDistribution(Distribution):
    """The density of a flow, or one density for each context.

    `Flow.distribution` describes the shapes and arguments. As in torch.distributions, `sample` and
    `rsample` return (*sample_shape, *batch_shape, *event_shape), and `log_prob` takes a value whose
    leading axes broadcast with batch_shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        flow: Density,
        event_shape: tuple[int, ...],
        context: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        has_entries = isinstance(context, Tensor) and context.dim() > 0
        batch_shape = context.shape[:1] if has_entries else torch.Size()
        # The flow checks values itself.
        super().__init__(batch_shape, torch.Size(event_shape), validate_args=False)
        self.flow, self.context, self.generator = flow, context, generator
        self._per_entry = context.shape[1:] if has_entries else None  # None: one context for all

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(
        self, batch_shape: Sequence[int], _instance: "FlowDistribution | None" = None
    ) -> "FlowDistribution":
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.generator, new._per_entry = self.flow, self.generator, self._per_entry
        new.context = self.context
        if self._per_entry is not None:
            new.context = self.context.expand(*batch_shape, *self._per_entry)
        super(FlowDistribution, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples that have gradients with respect to the flow's parameters and context."""
        leading = torch.Size(sample_shape) + self.batch_shape
        x, _ = self.flow.sample_and_log_prob(
            math.prod(leading), context=self._context(leading), generator=self.generator
        )
        return x.reshape(leading + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, in nats, with the leading axes of value and batch_shape.

        Raises:
            ValueError: the last axes of the value are not event_shape, or its others do not
                broadcast with batch_shape.
        """
        axes = value.dim() - len(self.event_shape)
        try:
            if axes < 0 or value.shape[axes:] != self.event_shape:
                raise ValueError
            leading = torch.broadcast_shapes(value.shape[:axes], self.batch_shape)
        except (ValueError, RuntimeError):
            batch, event = tuple(self.batch_shape), tuple(self.event_shape)
            raise ValueError(
                f"value: expected leading axes that broadcast with {batch}, then {event}, "
                f"got {tuple(value.shape)}"
            ) from None
        x = value.expand(leading + self.event_shape).reshape(-1, *self.event_shape)
        return self.flow.log_prob(x, context=self._context(leading)).reshape(leading)

    def _context(self, leading: torch.Size) -> Any:
        """Return the context of samples with these leading axes, in one axis."""
        if self._per_entry is None:
            return self.context
        return self.context.expand(leading + self._per_entry).reshape(-1, *self._per_entry)
