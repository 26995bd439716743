"""Programs: the instructions of a sequence of flow layers, fused and in order."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.layouts import in_layout_of
from mflow_kernels.reversible.instructions import Call, Instruction, Shape


class Program:
    """Instructions in the order in which they run; neighbours that share launches are one."""

    def __init__(self, instructions: Iterable[Instruction] = ()) -> None:
        self.instructions: list[Instruction] = []
        for instruction in instructions:
            while self.instructions:
                fused = self.instructions[-1].fused(instruction)
                if fused is None:
                    break
                self.instructions.pop()
                instruction = fused
            self.instructions.append(instruction)

    @property
    def splits(self) -> int:
        """The number of latents that it splits off."""
        return sum(i.splits for i in self.instructions)

    @property
    def calls(self) -> list[Call]:
        """The calls of networks and layers that it makes, in order."""
        return [call for i in self.instructions for call in i.calls]

    def inverted(self) -> "Program":
        """The program that undoes this one."""
        inverse = Program()
        inverse.instructions = [i.inverse() for i in reversed(self.instructions)]
        return inverse

    def latent_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes, without N, of the latents that a state of this shape becomes, finest first;
        the last one is that of the state at the end.

        Raises:
            ValueError: the state does not fit an instruction.
        """
        latents = []
        for instruction in self.instructions:
            if instruction.splits:
                latents.append(instruction.latent_shape(shape))
            shape = instruction.shape(shape)
        return (*latents, shape)

    def segments(self) -> list[Sequence[Instruction]]:
        """The parts that are one node of autograd's graph each.

        They begin where the number of pixels changes, which is the begin of a level. A part without
        a module or linear map joins the next one.
        """
        starts, works = [0], [i.computes for i in self.instructions]
        for i, instruction in enumerate(self.instructions):
            if instruction.resizes and any(works[starts[-1] : i]) and any(works[i:]):
                starts.append(i)
        ends = [*starts[1:], len(self.instructions)]
        return [self.instructions[a:b] for a, b in zip(starts, ends, strict=True)]


def keep_layout(state: Tensor) -> None:
    """Convert the gradient of `state` to the memory layout of `state` when it arrives.

    A loss may return a gradient in another layout, which every later launch would read slowly. One
    copy here avoids that. It does nothing under compilers, which choose layouts themselves, in
    transforms of torch.func, and for vectors, whose layout matters less than a hook costs.
    """
    if not state.requires_grad or state.dim() == 2:
        return
    if transformed() or torch.compiler.is_compiling():
        return
    like = torch.empty_like(state, device="meta")
    state.register_hook(lambda gradient: None if gradient is None else in_layout_of(like, gradient))
