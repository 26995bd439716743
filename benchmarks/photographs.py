"""The photographs in scikit-image and scikit-learn that are natural images in colour."""

from collections.abc import Callable

import numpy as np
import skimage.data
from sklearn.datasets import load_sample_image

# Each function returns uint8 (H, W, 3).
PHOTOGRAPHS: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "temple": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
}
