"""Memory layouts that torch allows and no model uses: tensors of x's shape and dtype."""

import random
from collections.abc import Callable

import torch
from torch import Tensor


def permuted(x: Tensor, rng: random.Random) -> Tensor:
    order = rng.sample(range(x.dim()), x.dim())
    back = [order.index(axis) for axis in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def expanded(x: Tensor, rng: random.Random) -> Tensor:
    axis = rng.randrange(x.dim())
    return x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)


def one_number(x: Tensor, rng: random.Random) -> Tensor:
    return x.flatten()[0].expand(x.shape) if x.numel() else x


def apart(x: Tensor, rng: random.Random) -> Tensor:
    axis, step = rng.randrange(x.dim()), rng.choice((2, 3))
    index = [slice(None)] * x.dim()
    index[axis] = slice(None, None, step)
    return x.repeat_interleave(step, axis)[tuple(index)]


def part_of_more(x: Tensor, rng: random.Random) -> Tensor:
    axis = rng.randrange(x.dim())
    before, after = (x.narrow(axis, 0, min(n, x.shape[axis])) for n in (1, 2))
    return torch.cat([before, x, after], axis).narrow(axis, before.shape[axis], x.shape[axis])


def negated_lazily(x: Tensor, rng: random.Random) -> Tensor:
    return torch.complex(x, x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


def odd_strides(x: Tensor, rng: random.Random) -> Tensor:
    """Change strides that nothing uses: those of axes of length 1, and all in an empty tensor."""
    lengths = zip(x.shape, x.stride(), strict=True)
    strides = [s if n > 1 and x.numel() else rng.randrange(2000) for n, s in lengths]
    return x.as_strided(x.shape, strides)


VIEWS: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    permuted, permuted, expanded, one_number, apart, part_of_more, negated_lazily,
    odd_strides,
)  # fmt: skip
