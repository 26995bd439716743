"""A masked network whose units are sorted by degree, for the loop and the kernel of its inverse.

`SortedNetwork` is settled by the masks. Its `plan` is a list of whole numbers: for each operation
its kind, its number of units, the value that it reads, where the units of each degree begin, and
which rows of other values they need (csrc/autoregressive/bindings.cpp reads it). `numbers` gathers
the weights, biases and constants in the sorted order, by one gather.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mflow_kernels.ops.masked_network import (
    ACTIVATIONS,
    Activation,
    Add,
    AddContext,
    Affine,
    Degrees,
    Gate,
    Linear,
    Operation,
    Pick,
    tensors_of,
)

KINDS = (Linear, Activation, Add, Affine, AddContext, Gate, Pick)  # in csrc's order
VARIABLE = len(KINDS)


class _Value:
    """A value's units in the order of their degrees.

    Attributes:
        order: the units, without those that no variable needs.
        row: the row of each unit in this order; -1 if it is not in it.
        starts: the first row of each degree, and the number of rows.
    """

    def __init__(self, degrees: Tensor, count: int, order: Tensor | None = None) -> None:
        if order is None:
            order = degrees.argsort(stable=True)
        self.order = order[degrees[order] < count]
        self.row = torch.full_like(degrees, -1)
        self.row[self.order] = torch.arange(len(self.order))
        self.starts = torch.searchsorted(degrees[self.order], torch.arange(count + 1))


class SortedNetwork:
    """The order of a network's units.

    Args:
        operations: the network.
        degrees: its degrees.
        owner: the variable of each of the params.

    Attributes:
        plan: int64.
        activations: a bit for each activation that occurs, by its index in `ACTIVATIONS`.
    """

    def __init__(self, operations: Sequence[Operation], degrees: Degrees, owner: Tensor) -> None:
        count = degrees.count
        features = len(degrees.variables)
        # All variables are values that the loop returns, those of the last degree, too.
        variables = _Value(degrees.variables, count)
        by_variable = owner.argsort(stable=True).view(features, -1)
        values = [variables]
        values += [_Value(d, count) for d in degrees.units[1:-1]]
        values.append(_Value(degrees.units[-1], count, by_variable[variables.order].flatten()))
        head = [features, count, len(operations)]
        lists: list[Tensor] = []
        entries: list[int | Tensor] = [variables.order, variables.starts]
        # The gather reads all tensors, then the constants, then 0.
        self._sizes = sizes = [t.numel() for t in tensors_of(operations)]
        self._constants = [o.constant for o in operations if isinstance(o, Activation)]
        self._constants.append(0.0)
        names = list(ACTIVATIONS)
        kinds = {names.index(o.kind) for o in operations if isinstance(o, Activation)}
        self.activations = sum(1 << kind for kind in kinds)
        self._last = torch.tensor(self._constants)
        total = sum(sizes) + len(self._constants)
        zero = total - 1
        constant = sum(sizes)
        first = 0
        gathered: list[Tensor] = []
        length = 0

        def gather(index: Tensor) -> int:
            nonlocal length
            gathered.append(index.flatten())
            length += index.numel()
            return length - index.numel()

        for i, o in enumerate(operations):
            source, value = values[o.source], values[i + 1]
            order = value.order
            kind = next(k for k, cls in enumerate(KINDS) if isinstance(o, cls))
            entries += [kind, len(order), o.source, value.starts]
            if isinstance(o, Linear):
                inputs = o.weight.shape[1]
                # The degrees of the variables as units are higher by one.
                known = source.starts[:-1] if o.source == 0 else source.starts[1:]
                index = first + order[:, None] * inputs + source.order
                if o.mask is not None:
                    kept = o.mask.detach().cpu()[order][:, source.order] != 0
                    index = torch.where(kept, index, zero)
                entries += [known, gather(index)]
                first += o.weight.numel()
                if o.bias is None:
                    entries.append(gather(torch.full_like(order, zero)))
                else:
                    entries.append(gather(first + order))
                    first += o.bias.numel()
                continue
            units = o.units.cpu()[order] if isinstance(o, Pick) else order
            entries.append(source.row[units])
            if isinstance(o, Activation):
                entries += [names.index(o.kind), gather(torch.tensor([constant]))]
                constant += 1
            elif isinstance(o, Affine):
                entries += [gather(first + order), gather(first + o.weight.numel() + order)]
                first += o.weight.numel() + o.bias.numel()
            elif isinstance(o, Add):
                entries += [o.other, values[o.other].row[order]]
            elif isinstance(o, (AddContext, Gate)):
                entries += [o.context, order]
        # Lists follow the numbers that refer to them.
        at = len(head) + len(entries)
        numbers = list(head)
        for entry in entries:
            if isinstance(entry, Tensor):
                numbers.append(at)
                lists.append(entry)
                at += len(entry)
            else:
                numbers.append(entry)
        self.plan = torch.cat([torch.tensor(numbers), *lists])
        # Where each context begins if all are columns of one tensor.
        widths = {
            o.context: len(units)
            for o, units in zip(operations, degrees.units[1:], strict=True)
            if isinstance(o, (AddContext, Gate))
        }
        starts = accumulate(
            (widths.get(i, 0) for i in range(max(widths, default=-1) + 1)), initial=0
        )
        self._context_starts = list(starts)
        # Masked elements become no number. Their gradient is that of the last number, an unused 0.
        gathered.append(torch.tensor([zero]))
        self._gathered = torch.cat(gathered)
        places = torch.full((total,), length)
        places[self._gathered[:-1]] = torch.arange(length)
        self._places = places[: sum(sizes)]
        self._instructions: tuple[Tensor, int] | None = None

    def numbers(self, tensors: Sequence[Tensor], like: Tensor) -> Tensor:
        """The numbers of the plan, in the dtype and on the device of `like`, from the tensors of
        the operations (`tensors_of`)."""
        if self._last.dtype != like.dtype or self._last.device != like.device:
            self._last = like.new_tensor(self._constants)
            self._gathered = self._gathered.to(like.device)
        flat = [t.detach().reshape(-1) for t in tensors]
        return torch.cat([*flat, self._last]).index_select(0, self._gathered)

    def gradients(self, tensors: Sequence[Tensor], dnumbers: Tensor) -> list[Tensor]:
        """The gradients of these tensors from that of the numbers."""
        self._places = self._places.to(dnumbers.device)
        parts = dnumbers.index_select(0, self._places).split(self._sizes)
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def instructions(self, params: int, device: torch.device) -> tuple[Tensor, int]:
        """The rows of the values as instructions of the kernel, (count, 6), in the order in which
        they can be computed, and the number of rows.

        An instruction is its kind, as in the plan, or 7 for a variable; the row that it writes; the
        (first) row that it reads; for a linear operation the number of rows, otherwise another row,
        an activation, a context's column or a variable; and the places of two numbers.

        Args:
            params: how many params a variable has.
        """
        if self._instructions is None or self._instructions[0].device != device:
            found, rows = _instructions(self.plan.tolist(), params, self._context_starts)
            self._instructions = torch.tensor(found, device=device), rows
        return self._instructions


def _instructions(
    plan: list[int], params: int, context_starts: list[int]
) -> tuple[list[list[int]], int]:
    features, count, operations, order, starts = plan[:5]
    by_degree: list[list[list[int]]] = [[] for _ in range(count)]
    first_rows = [0]
    rows, at = features, 5
    for _ in range(operations):
        kind, units, source, begins = plan[at : at + 4]
        rest = plan[at + 4 :]
        base, below = rows, first_rows[source]
        for degree in range(count):
            for r in range(plan[begins + degree], plan[begins + degree + 1]):
                name = KINDS[kind]
                read = 0 if name is Linear else below + plan[rest[0] + r]
                last = [0, 0, 0]
                if name is Linear:
                    inputs = (*first_rows, rows)[source + 1] - below
                    read = below
                    last = [plan[rest[0] + degree], rest[1] + r * inputs, rest[2] + r]
                elif name is Activation:
                    last = [rest[1], rest[2], 0]
                elif name is Affine:
                    last = [0, rest[1] + r, rest[2] + r]
                elif name is Add:
                    last = [first_rows[rest[1]] + plan[rest[2] + r], 0, 0]
                elif name in (AddContext, Gate):
                    last = [context_starts[rest[1]] + plan[rest[2] + r], 0, 0]
                by_degree[degree].append([kind, base + r, read, *last])
        first_rows.append(base)
        rows += units
        at += 4 + (1 if KINDS[kind] is Pick else 3)
    for degree, made in enumerate(by_degree):
        for v in range(plan[starts + degree], plan[starts + degree + 1]):
            made.append([VARIABLE, v, first_rows[-1] + v * params, plan[order + v], 0, 0])
    return [instruction for made in by_degree for instruction in made], rows
