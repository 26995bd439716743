"""The protocol of layers that a `ReversibleChain` can run, and the program that they form."""

from collections.abc import Mapping, Sequence

from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.folding import ActNormConv, StepGroup
from mflow_kernels.reversible.program import (
    ChannelLinear,
    Couple,
    Instruction,
    Program,
    SpaceToDepth,
)


class ChainLayer(Bijection):
    """A layer that lists its instructions, so that a chain can fuse and rebuild it.

    `initialize` returns the state first; a layer with a `SplitOff` returns `((kept, latent), _)`.
    """

    @property
    def channels(self) -> int | None:
        """Channels of the input; None for a layer that takes any number."""
        return None

    def instructions(self) -> Sequence[Instruction | ActNormConv]:
        """The instructions that the layer consists of, in the direction data -> latent.

        An `ActNormConv` stands for the `ChannelLinear` instruction that the chain makes of it.
        """
        raise NotImplementedError


def assemble(layers: Mapping[str, ChainLayer]) -> Program:
    """The program of these layers in sequence, in the direction data -> latent.

    Linear maps with only couplings in between form one group, whose weights are folded together.

    Args:
        layers: keyed by the prefix that names each layer in errors, such as "layers.0.".

    Raises:
        ValueError: a layer makes fewer channels of more pixels.
    """
    program = Program()
    group: StepGroup | None = None
    for prefix, layer in layers.items():
        for instruction in layer.instructions():
            if isinstance(instruction, ActNormConv):
                if group is None:
                    group = StepGroup([], [], inverse=False)
                    program.groups.append(group)
                row = len(group.steps)
                group.steps.append(instruction)
                group.names.append(f"{prefix}conv")
                instruction = ChannelLinear(len(program.groups) - 1, row)
            elif not isinstance(instruction, Couple):
                group = None
                if isinstance(instruction, SpaceToDepth) and instruction.inverse:
                    raise ValueError(
                        f"{prefix.rstrip('.')}: expected SpaceToDepth(inverse=False), "
                        "got inverse=True"
                    )
            program.instructions.append(instruction)
    return program
