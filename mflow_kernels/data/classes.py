"""Classes of a data set's images: the names of their folders, a named data set's labels, or
attributes of CelebA."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from mflow_kernels.data.named import LABELS
from mflow_kernels.data.sources import DataError

MOST_CLASSES = 1000


class Classes(NamedTuple):
    """The classes of N images.

    Attributes:
        names: name of each class, in the order of their numbers.
        numbers: int64 (N,), the class of each image.
    """

    names: tuple[str, ...]
    numbers: np.ndarray


def classes_of_folders(names: Sequence[str]) -> Classes:
    """Return one class for each folder that directly contains images, in alphabetical order.

    Args:
        names: file name of each image, relative to the root, with slashes.

    Raises:
        DataError: an image lies in no folder, or there are not 2 to MOST_CLASSES folders.
    """
    folders = [PurePosixPath(name).parent.name for name in names]
    outside = [name for name, folder in zip(names, folders, strict=True) if not folder]
    if outside:
        raise DataError(
            f"classes: expected every image in a folder named after its class, got {outside[0]}"
        )
    found, numbers = np.unique(np.array(folders), return_inverse=True)
    if not 2 <= len(found) <= MOST_CLASSES:
        raise DataError(
            f"classes: expected 2 to {MOST_CLASSES} folders of images, found {len(found)}"
        )
    return Classes(tuple(found.tolist()), numbers.astype(np.int64))


def classes_of_attributes(chosen: str, attributes: Mapping[str, np.ndarray]) -> Classes:
    """Return one class for each combination of the chosen attributes.

    Args:
        chosen: names of attributes, separated by commas, such as "Smiling,Male".
        attributes: for each name, bool (N,): the images that have it.

    Raises:
        DataError: the images have no attributes, or `chosen` has an unknown name; see also
            `attribute_names`.
    """
    names = attribute_names(chosen)
    if not attributes:
        raise DataError(
            f"classes: expected {LABELS!r}, the folders of these images, got {chosen!r}; only "
            "CelebA has attributes, if list_attr_celeba.txt lies beside it when it is prepared"
        )
    for name in names:
        if name not in attributes:
            known = ", ".join(attributes)
            raise DataError(f"classes: expected attributes among {known}, got {name!r}")
    numbers = np.zeros(len(attributes[names[0]]), np.int64)
    labels = [""]
    for name in names:  # the first attribute changes slowest
        numbers = 2 * numbers + attributes[name]
        labels = [f"{before}{sign}{name} " for before in labels for sign in ("not ", "")]
    return Classes(tuple(label.strip() for label in labels), numbers)


def attribute_names(chosen: str) -> list[str]:
    """Split names of attributes at the commas.

    Raises:
        DataError: there are more than 6 names, or a name twice.
    """
    names = [name.strip() for name in chosen.split(",")]
    if len(names) > 6 or len(set(names)) != len(names):
        raise DataError(f"classes: expected up to 6 different attributes, got {chosen!r}")
    return names
