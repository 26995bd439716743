"""Methods of every model: save, load, and read images."""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound="Model")

# One context for each sample (a tensor, or names of classes), or one for all: a class as a number
# or a name, a tensor without axes, or one of length 1. A tuple is a mask and a context (`Flow`).
Context: TypeAlias = Tensor | int | str | Sequence[str] | tuple[Any, ...]


class Model:
    """The base of flows and of charts, beside `torch.nn.Module`.

    Attributes:
        n_bits: bits per value of the training images. Loading a model sets it. Set it on a model
            that you train yourself, so that `preprocess` and `bits_per_dim` work.
        crop: side of the square that is cut out of an image first, as for CelebA; None stands for
            the largest square.
        class_names: names of the classes, if the context is a class, in the order of their numbers.
            A context may then be a name. Setting it also sets it on the flows inside the model.
    """

    n_bits: int | None = None
    crop: int | None = None
    _class_names: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        for module in cast(nn.Module, self).modules():
            if isinstance(module, Model):
                module._class_names = tuple(names)

    def describe_images(
        self, n_bits: int | None, crop: int | None, class_names: tuple[str, ...]
    ) -> None:
        """Set `n_bits`, `crop` and `class_names`."""
        self.n_bits, self.crop, self.class_names = n_bits, crop, class_names

    def preprocess(
        self, images: Any, *, noise: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return images as x (N, C, H, W), prepared like the model's training images.

        The images are turned upright, converted to grey or RGB, cropped, resized, reduced to
        `n_bits` and scaled: x = (level + 1/2) / 2^n_bits - 1/2.

        Args:
            images: a Pillow image, a uint8 array (H, W) or (H, W, C), or a sequence of these.
            noise: add dequantization noise, uniform on [0, 1), in place of 1/2, as training does.
            generator: generator for the noise, on the model's device.

        Returns:
            x with the model's device and dtype.

        Raises:
            TypeError, ValueError: an image has another type or is smaller than `crop`, `n_bits` is
                None, or the model's data are no images.
        """
        shape, n_bits = self._image_shape(), self._n_bits()
        like = next(cast(nn.Module, self).parameters(), torch.empty(0))
        levels = _models("images").crop_to_model(images, shape, self.crop)
        how = importlib.import_module("mflow_kernels.data.dequantization")
        levels = levels.to(like.device)
        x = how.dequantize(levels, n_bits, generator) if noise else how.bin_centres(levels, n_bits)
        return x.to(like.dtype)

    def postprocess(self, x: Tensor) -> list[Any]:
        """Return x (N, C, H, W) as a list of Pillow images: the inverse of `preprocess`.

        Values outside [-1/2, 1/2) are clipped. A model with C = 1 gives grey images.

        Raises:
            ValueError: x has another shape, or the model's data are no images.
        """
        shape = self._image_shape()
        if tuple(x.shape[1:]) != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"x: expected shape (N, {expected}), got {tuple(x.shape)}")
        return _models("images").to_pillow(x)

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        *,
        context: Context | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the bits per dimension of images, (N,): an upper bound of -log2 p(image) / D.

        Each image gets one draw of dequantization noise. `images` and `generator` are as for
        `preprocess`, `context` is as for `log_prob`.
        """
        x = self.preprocess(images, noise=True, generator=generator)
        log_prob = cast(Any, self).log_prob(x, context=context)
        dimensions = math.prod(self._image_shape())
        return _models("bits").bits_per_dimension(log_prob, dimensions, self._n_bits())

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the model into a new folder, from which `from_pretrained` loads it.

        With `overwrite`, the folder may exist if it holds a model and no other file.

        The folder has `model.safetensors` with every tensor, and `model.json` with the
        architecture. Other modules of the architecture than those of this package are not stored.

        Raises:
            TypeError: the model has a part that the file cannot describe, such as a network of your
                own. The message names it.
            ValueError: the folder exists and is not replaced, or cannot be created; a number of
                the model is not finite; or `n_bits`, `crop` or `class_names` do not fit it.
        """
        _models("pretrained").save(self, folder, overwrite)

    @classmethod
    def from_pretrained(cls: type[_M], folder: str | Path) -> _M:
        """Load a model from a folder that `save_pretrained` or `mflow export` wrote.

        The model is on the CPU, in evaluation mode, and has the dtype that it was saved with.
        `n_bits`, `crop` and `class_names` are set. A `ManifoldFlow` and a `HierarchicalFlow` of one
        stage are the same model, and each class loads both.

        Raises:
            ValueError: a file is missing or damaged, was written by something else, or holds a
                model of another class.
        """
        return _models("pretrained").load(cls, folder)

    def _image_shape(self) -> tuple[int, ...]:
        shape = cast(Any, self).input_shape
        if shape is None or len(shape) != 3:
            raise ValueError(
                f"input_shape: expected a model of images (C, H, W), got input_shape {shape}"
            )
        return tuple(shape)

    def _n_bits(self) -> int:
        if self.n_bits is None:
            raise ValueError(
                "n_bits: expected a number from 1 to 8, got None; set it on a model that was not "
                "loaded"
            )
        return self.n_bits


def _models(module: str) -> Any:
    """Import a module of `models` when a method needs it, because `models` imports this module."""
    return importlib.import_module(f"mflow_kernels.models.{module}")
