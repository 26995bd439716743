"""Features of images, and the distances between sets of images that they give: FID and KID.

Weights come from a file on this machine, never from the network, and as tensors alone: no code of
the file runs. The distances themselves are those of torchmetrics.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

INCEPTION = "inception"
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # at most; all images where there are fewer
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
_INCEPTION_SIZE, _OTHER_SIZE = 299, 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class FeatureNetwork(nn.Module):
    """uint8 images (N, C, H, W), C of 1 or 3, to features (N, num_features), float32.

    Images are resized to a square of `size` (bilinear, antialiased) and then brought to what the
    network was trained on: value * scale + shift for each colour, of values 0 to 255.
    """

    def __init__(self, body: nn.Module, size: int, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.body = body
        self.size = size
        self.register_buffer("scale", scale.view(1, 3, 1, 1))
        self.register_buffer("shift", shift.view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = images.float().expand(-1, 3, -1, -1)
        x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.body(x * cast(Tensor, self.scale) + cast(Tensor, self.shift)).flatten(1)


def load_feature_network(name: str, weights: Path) -> FeatureNetwork:
    """A network whose features (what goes into its last linear layer) images are compared by.

    Args:
        name: "inception", the network that FID was defined with, its weights as torch-fidelity and
            pytorch-fid publish them (pt_inception-2015-12-05-*.pth); prepared as torchmetrics does
            by default. Or an image classifier of torchvision, by its name there, such as
            "resnet50", which gets images of 224x224, normalized as those of ImageNet.
        weights: a file of a state dict, .safetensors or what torch.save wrote.

    Raises:
        ValueError: no such file or network, weights that do not fit it.
    """
    if not weights.is_file():
        raise ValueError(
            f"feature_weights: expected a file of weights of {name!r}, found none at {weights} "
            "(nothing is downloaded; docs/evaluation.md says where they are published)"
        )
    state = _read_state(weights)
    last = _last_linear(name)
    shape = getattr(state.get(f"{last}.weight"), "shape", ())
    body = _build(name, shape[0] if shape else 1)
    try:
        # What batch norm counts is used by no evaluation, and older files lack it.
        counted = {k: v for k, v in body.state_dict().items() if k.endswith("num_batches_tracked")}
        body.load_state_dict({**counted, **state})
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]).strip() or str(error)
        key, *others = first.split(", ")  # one name tells as much as all
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"feature_weights: expected a state dict of {name!r} in {weights}: "
            f"{key.rstrip('. ')[:200]}{more}"
        ) from None
    parent, _, child = last.rpartition(".")
    setattr(body.get_submodule(parent), child, nn.Identity())
    if name == INCEPTION:
        _pool_as_in_fid(body)
        size, scale, shift = _INCEPTION_SIZE, torch.full((3,), 1 / 128), torch.full((3,), -1.0)
    else:
        mean, deviation = torch.tensor(_MEAN), torch.tensor(_DEVIATION)
        size, scale, shift = _OTHER_SIZE, 1 / (255 * deviation), -mean / deviation
    return FeatureNetwork(body, size, scale, shift).eval()


@dataclass(frozen=True)
class FeatureDistance:
    """Of two sets of images. kid is the mean over subsets, kid_deviation their standard
    deviation."""

    fid: float
    kid: float
    kid_deviation: float


def feature_distance(real: Tensor, fake: Tensor) -> FeatureDistance:
    """FID (Heusel et al., arXiv 1706.08500) and KID (Bińkowski et al., arXiv 1801.01401) by
    torchmetrics.

    In float64. KID with its cubic kernel, over KID_SUBSETS subsets of at most KID_SUBSET_SIZE
    images, drawn by a fixed seed.

    Args:
        real, fake: features (N, F) and (M, F), at least two of each.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = real.double(), fake.double()
    given = _Given(real.shape[1])
    fid = FrechetInceptionDistance(feature=given).to(real.device)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(0)
        size = min(KID_SUBSET_SIZE, len(real), len(fake))
        kid = KernelInceptionDistance(feature=given, subsets=KID_SUBSETS, subset_size=size)
        kid.update(real, real=True)
        kid.update(fake, real=False)
        mean, deviation = kid.compute()
    return FeatureDistance(fid.compute().item(), mean.item(), deviation.item())


class _Given(nn.Module):
    """Features in place of images, so that FID and KID share one pass of the network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Pooled(nn.Module):
    """A block of torchvision's Inception with another pooling in its last branch."""

    def __init__(self, block: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        *others, _ = self.block._forward(x)  # type: ignore[operator]
        return torch.cat([*others, self.block.branch_pool(self.pool(x))], 1)  # type: ignore[operator]


def _pool_as_in_fid(inception: nn.Module) -> None:
    """The network of FID is TensorFlow's of 2015: averages leave the padding out, and the last
    block takes maxima."""
    average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        name = f"Mixed_{name}"
        setattr(inception, name, _Pooled(inception.get_submodule(name), average))
    pool = nn.MaxPool2d(3, stride=1, padding=1)
    inception.Mixed_7c = _Pooled(inception.get_submodule("Mixed_7c"), pool)


def _build(name: str, classes: int | None = None) -> nn.Module:
    from torchvision import models

    how = {} if classes is None else {"num_classes": classes}
    if name == INCEPTION:
        return models.inception_v3(weights=None, aux_logits=False, init_weights=False, **how)
    if name not in models.list_models(module=models):
        raise ValueError(
            f"features: expected {INCEPTION!r} or an image classifier of torchvision, such as "
            f"'resnet50', got {name!r}"
        )
    if name in ("inception_v3", "googlenet"):
        how["init_weights"] = False
    return models.get_model(name, weights=None, **how)


def _last_linear(name: str) -> str:
    with torch.device("meta"):
        network = _build(name)
    modules = list(network.named_modules())
    if not isinstance(modules[-1][1], nn.Linear):
        raise ValueError(f"features: expected a network that ends in a linear layer, got {name!r}")
    return modules[-1][0]


def _read_state(weights: Path) -> dict[str, Tensor]:
    try:
        if weights.suffix == ".safetensors":
            state: object = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = f"could not read it ({str(error).split(chr(10))[0].split('. ')[0][:200]})"
    except Exception:  # pickle's own errors, of which weights_only has no list
        reason = "it is no file of torch.save, or holds more than tensors"
    else:
        if not isinstance(state, dict):
            reason = f"it holds a {type(state).__name__}"
        else:
            wrong = [(key, why) for key, value in state.items() if (why := _unusable(key, value))]
            if not wrong:
                return state
            reason = "its {!r} {}".format(*wrong[0])
    raise ValueError(
        f"feature_weights: expected a state dict of tensors in {weights}, but {reason}"
    )


def _unusable(key: object, value: object) -> str | None:
    """What is wrong with an entry of a state dict; None for a name and a tensor of finite
    numbers."""
    if not isinstance(key, str):
        return "is not the name of a tensor"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}"
    if value.dtype not in _DTYPES or value.layout != torch.strided or value.device.type != "cpu":
        return f"is not a plain tensor: {value.layout}, {value.dtype}, on {value.device}"
    if value.nbytes > value.untyped_storage().nbytes():  # strides of 0: petabytes in a small file
        return f"has the shape {tuple(value.shape)}, but fewer numbers in the file"
    if not value.isfinite().all():
        return "has values that are not finite"
    return None
