"""Random generators that are functions of a seed, a stream and a step."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """The use of a random stream. The numbers never change: they decide what a seed draws."""

    DATA_ORDER = 0
    TRAINING_NOISE = 1
    VALIDATION_NOISE = 2
    EVALUATION_NOISE = 3
    SAMPLES = 4
    OOD_NOISE = 5
    UNIFORM_IMAGES = 6
    REPORT_NOISE = 7
    REPORT_SAMPLES = 8
    MISSING_PIXELS = 9
    FIRST = 10  # images and noise that a stage starts from


def stream_generator(
    seed: int, stream: Stream, *key: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a random generator that is a function of (seed, stream, key) alone.

    Training keys its streams by the pass or the step. A resumed run therefore draws what an
    uninterrupted run draws, and no generator state has to be restored.

    Args:
        seed: seed of the run; 0 for draws that are the same in every run.
        stream: the use of the numbers.
        key: for example the step. Trailing zeros count as absent: () and (0,) draw the same.
        device: device of the generator.
    """
    state = np.random.SeedSequence([seed, stream, *key]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device=device)
    generator.manual_seed(int(state) >> 1)
    return generator
