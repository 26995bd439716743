"""The density and the samples of a bijection whose latents are standard normal."""

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.layers.autoregressive import MaskedAutoregressive
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.coupling import Coupling
from mflow_kernels.layers.distribution import FlowDistribution
from mflow_kernels.layers.model import Context, Model
from mflow_kernels.ops.checks import check_count
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.penalty_functions import HALF_LOG_2PI
from mflow_kernels.reversible.masks import mask_at


class Flow(Bijection, Model):
    """A bijection from x to latents that are standard normal under the model.

    A `context` is a tensor with one entry for each sample, and is passed to the coupling networks.
    One entry serves all samples: an int (a class), a tensor without axes, or one of length 1.
    Built-in networks with K context channels get classes, integers (N,) from 0 to K - 1, as one-hot
    vectors. If the model has `class_names`, a class may be a name, and a list may have one for each
    sample. `flow(x, context)`, `inverse` and `initialize` take it by position, as every `Bijection`
    does; the other methods take it as a keyword. That of a masked `ReversibleChain` is its mask, or
    a tuple (mask, context); padding then has no part in densities.

    Attributes:
        input_shape: shape of x without N; None if the flow takes any.
        latent_shapes: shape of each latent without N, finest first; None if input_shape is None.
    """

    input_shape: tuple[int, ...] | None
    latent_shapes: tuple[tuple[int, ...], ...] | None

    def log_prob(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return log p(x) (N,), or log p(x | context), in nats.

        Args:
            x: (N, *input_shape).
            context: one for each sample, or one for all.

        Returns:
            sum of log N(z; 0, 1) over all latents, plus log |det dz/dx|: float64 for float64 x,
            otherwise float32.
        """
        arguments = given(context, x, self)
        z, logdet = self(x, *arguments)
        mask = arguments[0] if self.masked else None
        return _with_log_normal(logdet, z if isinstance(z, tuple) else (z,), mask)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples x (n, *input_shape): the inverse of latents from N(0, temperature^2).

        Args:
            n: number of samples.
            context: one for each sample, or one for all.
            temperature: standard deviation of the latents, >= 0. Below 1, samples are more likely
                and vary less (arXiv 1807.03039, section 6).
            generator: on the model's device.

        Raises:
            ValueError: n or temperature is out of range, or the flow has no `input_shape`.
        """
        z = self._draw(n, temperature, generator)
        return self.inverse(z, *given(context, z[0], self))[0]

    def sample_and_log_prob(
        self,
        n: int,
        *,
        context: Context | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw n samples as `sample` does, and return them with their `log_prob` (n,).

        One inverse pass computes both. Both have gradients with respect to the parameters and the
        context, the latents being constant.
        """
        z = self._draw(n, temperature, generator)
        arguments = given(context, z[0], self)
        x, logdet = self.inverse(z, *arguments)
        return x, _with_log_normal(-logdet, z, arguments[0] if self.masked else None)

    def distribution(
        self, context: Context | None = None, *, generator: torch.Generator | None = None
    ) -> FlowDistribution:
        """Return p(x), or p(x | context), as a `torch.distributions.Distribution`.

        Its event_shape is `input_shape`. Its batch_shape is (N,) for a context with N entries, and
        () without a context or for a context without axes. `sample`, `rsample` and `log_prob` call
        this model, so their gradients reach its parameters.

        Args:
            context: as in `log_prob`.
            generator: of all samples, on the model's device.

        Raises:
            ValueError: the flow has no `input_shape`.
        """
        if self.input_shape is None:
            raise _no_input_shape()
        return FlowDistribution(self, self.input_shape, numbered(context, self), generator)

    def _draw(
        self, n: int, temperature: float, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        """Draw n of each latent."""
        if self.latent_shapes is None:
            raise _no_input_shape()
        return tuple(
            sample_normal(self, (n, *shape), temperature, generator) for shape in self.latent_shapes
        )


def numbered(context: Any, model: nn.Module) -> Any:
    """Return the context with numbers in place of the names of classes.

    Raises:
        ValueError: a name is none of the model's `class_names`.
    """
    names = [context] if isinstance(context, str) else context
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return context
    models = (m for m in model.modules() if isinstance(m, Model))
    known = next((m.class_names for m in models if m.class_names), ())
    for name in names:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "no name without class_names"
            raise ValueError(f"context: expected {expected}, got {name!r}")
    numbers = [known.index(name) for name in names]
    return numbers[0] if isinstance(context, str) else torch.tensor(numbers, dtype=torch.int64)


def for_each(context: Any, x: Tensor, model: nn.Module) -> Any:
    """Return the context of a model with one entry for each sample of x; see `Flow`.

    None, and objects of other types, are returned unchanged.
    """
    if isinstance(context, (int, str, Sequence)) and not isinstance(context, bool):
        context = numbered(context, model)
        if isinstance(context, (int, Tensor)):
            context = torch.as_tensor(context, device=x.device)
    if isinstance(context, Tensor) and (context.dim() == 0 or len(context) == 1 != len(x)):
        return context.expand(len(x), *context.shape[1:])
    return context


def given(context: Any, x: Tensor, flow: nn.Module) -> tuple[Any, ...]:
    """Return `for_each(context, x, flow)` as further arguments of a flow: none or one, after the
    mask of a masked flow.

    Classes become one-hot vectors, in x's dtype, if the flow's first network has context channels.

    Raises:
        TypeError: there is no context, but the flow's first network requires one.
        ValueError: a class is out of range, or their number is not that of the samples.
    """
    if getattr(flow, "masked", False):
        mask, *rest = context if isinstance(context, tuple) else (context,)
        return tuple(for_each(one, x, flow) for one in (mask, *rest))
    if context is not None:
        own = for_each(context, x, flow)
        if isinstance(own, Tensor) and own.dim() == 1 and not own.is_floating_point():
            classes = getattr(_first_network(flow), "context_channels", 0)
            return (_one_hot(own, x, classes) if classes else own,)
        return (own,)
    if not torch.compiler.is_compiling():
        net = _first_network(flow)
        required = _required(getattr(type(net), "forward", None))
        if net is not None and required is not None:
            raise TypeError(
                f"context: expected the argument {required!r} of {type(net).__name__}, got none"
            )
    return ()


def _first_network(flow: nn.Module) -> nn.Module | None:
    return next(
        (m.net for m in flow.modules() if isinstance(m, (Coupling, MaskedAutoregressive))), None
    )


def _one_hot(own: Tensor, x: Tensor, classes: int) -> Tensor:
    """Return the classes (N,) of the samples x as vectors (N, classes)."""
    if own.shape != (len(x),):
        raise ValueError(
            f"context: expected one class for each of {len(x)} samples, got {tuple(own.shape)}"
        )
    # Only where reading values costs no synchronization, and breaks no transform or graph.
    plain = not transformed() and not torch.compiler.is_compiling()
    if plain and own.device.type == "cpu" and len(own):
        low, high = (int(bound) for bound in own.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"context: expected classes from 0 to {classes - 1}, got {low} to {high}"
            )
    return (own[:, None] == torch.arange(classes, device=own.device)).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _required(forward: Any) -> str | None:
    """Return the name of the argument that a network's `forward` requires besides x, or None."""
    try:
        _, _, *further = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # it is no function, or has another form
        return None
    positional = (p for p in further if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return next((p.name for p in positional if p.default is p.empty), None)


def sample_normal(
    model: nn.Module, shape: tuple[int, ...], temperature: float, generator: torch.Generator | None
) -> Tensor:
    """Draw `shape`, (n, ...), from N(0, temperature^2) with the parameters' device and dtype."""
    check_count("n", shape[0], 1)
    check_temperature(temperature)
    like = next(model.parameters(), torch.empty(0))
    normal = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return temperature * normal


def check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")


def _with_log_normal(log_prob: Tensor, z: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    """Return log_prob plus the sum of log N(z; 0, 1) over all latents, (N,), without padding."""
    for latent in z:
        terms = latent.to(log_prob.dtype).square() / 2 + HALF_LOG_2PI
        terms = terms if mask is None else terms * mask_at(mask, terms)
        log_prob = log_prob - terms.flatten(1).sum(1)
    return log_prob


def _no_input_shape() -> ValueError:
    return ValueError(
        "input_shape: sampling derives the shapes of the latents from it; give it to the "
        "constructor"
    )
