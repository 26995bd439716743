"""FID, KID, precision and recall of a set of images, computed from the features of a network.

The network's weights are read from a local file; nothing is downloaded. Only tensors are loaded, so
the file cannot run code. torchmetrics computes FID and KID.
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
KID_SUBSET_SIZE = 1000  # or the number of images, if that is smaller
NEIGHBOURS = 3  # an image's ball reaches to its NEIGHBOURS-th neighbour in its own set
_DISTANCE_BLOCK = 1000  # rows of a matrix of distances that are computed together
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
_INCEPTION_SIZE, _OTHER_SIZE = 299, 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those of ImageNet


class FeatureNetwork(nn.Module):
    """Maps uint8 images (N, C, H, W), with C of 1 or 3, to float32 features (N, num_features).

    Images are resized to a square of side `size` (bilinear, antialiased), then normalized as in the
    network's training: value * scale + shift for each colour channel, with values from 0 to 255.
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
    """Load a network. Its features are the input of its last linear layer.

    Args:
        name: "inception", the network that FID was defined with. Its weights are those that
            torch-fidelity and pytorch-fid publish (pt_inception-2015-12-05-*.pth), and images are
            prepared as torchmetrics does by default. Any other name is that of an image classifier
            of torchvision, such as "resnet50"; it gets 224x224 images normalized as for ImageNet.
        weights: file with a state dict, written as .safetensors or by torch.save.

    Raises:
        ValueError: there is no such file or network, or the weights do not fit the network.
    """
    if not weights.is_file():
        raise ValueError(
            f"feature_weights: expected a file of weights of {name!r}, found none at {weights} "
            "(nothing is downloaded; docs/evaluation.md says where to get the weights)"
        )
    state = _read_state(weights)
    body = _build(name)
    last, layer = [*body.named_modules()][-1]
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"features: expected a network that ends in a linear layer, got {name!r}")
    parent, _, child = last.rpartition(".")
    setattr(body.get_submodule(parent), child, nn.Identity())
    state = {key: value for key, value in state.items() if not key.startswith(f"{last}.")}
    try:
        # Evaluation does not use batch norm's counters, and older files lack them.
        counted = {k: v for k, v in body.state_dict().items() if k.endswith("num_batches_tracked")}
        body.load_state_dict({**counted, **state})
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]).strip() or str(error)
        key, *others = first.split(", ")  # one name is enough
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"feature_weights: expected a state dict of {name!r} in {weights}: "
            f"{key.rstrip('. ')[:200]}{more}"
        ) from None
    if name == INCEPTION:
        _pool_as_in_fid(body)
        size, scale, shift = _INCEPTION_SIZE, torch.full((3,), 1 / 128), torch.full((3,), -1.0)
    else:
        mean, deviation = torch.tensor(_MEAN), torch.tensor(_DEVIATION)
        size, scale, shift = _OTHER_SIZE, 1 / (255 * deviation), -mean / deviation
    return FeatureNetwork(body, size, scale, shift).eval()


@dataclass(frozen=True)
class FeatureDistance:
    """Distances between two sets of images. `kid` is the mean over random subsets and
    `kid_deviation` the standard deviation over them. `precision` and `recall` are those of
    `precision_and_recall`, or None for sets of NEIGHBOURS images or fewer."""

    fid: float
    kid: float
    kid_deviation: float
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class SampleQuality:
    """Distance between `images` samples at one temperature and as many evaluated images.

    The samples are on the manifold, or off it if `ambient`.
    """

    temperature: float
    network: str
    images: int
    distance: FeatureDistance
    ambient: bool

    def cells(self) -> list[str]:
        """Return the row of a table under QUALITY_HEADINGS."""
        found = self.distance
        shares = (found.precision, found.recall)
        return [
            f"{self.temperature:g}",
            f"{found.fid:.2f}",
            f"{1000 * found.kid:.3f}",
            f"{1000 * found.kid_deviation:.3f}",
            *("" if share is None else f"{share:.3f}" for share in shares),
        ]


QUALITY_HEADINGS = (
    *("temperature", "FID", "KID x 1000", "its standard deviation", "precision", "recall"),
)


def feature_distance(real: Tensor, fake: Tensor) -> FeatureDistance:
    """Compute FID (Heusel et al., arXiv 1706.08500) and KID (Bińkowski et al., arXiv 1801.01401),
    precision and recall.

    All are computed in float64. KID uses its cubic kernel and KID_SUBSETS subsets of at most
    KID_SUBSET_SIZE images, drawn with a fixed seed.

    Args:
        real, fake: features (N, F) and (M, F), with N and M at least 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = real.double(), fake.double()
    # In place of a network of images: FID and KID share the features from one pass of the real one.
    network = nn.Identity()
    network.num_features = real.shape[1]  # type: ignore[assignment]
    fid = FrechetInceptionDistance(feature=network).to(real.device)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(0)
        size = min(KID_SUBSET_SIZE, len(real), len(fake))
        kid = KernelInceptionDistance(feature=network, subsets=KID_SUBSETS, subset_size=size)
        kid.update(real, real=True)
        kid.update(fake, real=False)
        mean, deviation = kid.compute()
    shares: tuple[float | None, float | None] = None, None
    if min(len(real), len(fake)) > NEIGHBOURS:
        shares = precision_and_recall(real, fake)
    return FeatureDistance(fid.compute().item(), mean.item(), deviation.item(), *shares)


def precision_and_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Return two shares after Kynkäänniemi et al., arXiv 1904.06991: of `fake` in the support of
    `real`, and of `real` in the support of `fake`.

    The support of a set is the union of a closed ball around each of its images. The ball's radius
    is the distance to the image's NEIGHBOURS-th neighbour in the set.

    Args:
        real, fake: features (N, F) and (M, F), with N and M above NEIGHBOURS.

    Raises:
        ValueError: a set has too few images.
    """
    if min(len(real), len(fake)) <= NEIGHBOURS:
        raise ValueError(
            f"real, fake: expected more than {NEIGHBOURS} images, got {len(real)} and {len(fake)}"
        )
    real_radii, fake_radii = _radii(real), _radii(fake)
    covered = torch.zeros_like(real_radii, dtype=torch.bool)  # real images in the support of `fake`
    inside = 0  # fake images in the support of `real`
    for rows, radii in zip(
        fake.split(_DISTANCE_BLOCK), fake_radii.split(_DISTANCE_BLOCK), strict=True
    ):
        distances = _distances(rows, real)
        inside += int((distances <= real_radii).any(1).sum())
        covered |= (distances <= radii[:, None]).any(0)
    return inside / len(fake), covered.double().mean().item()


def _radii(features: Tensor) -> Tensor:
    """Return the distance from each row (N, F) to its NEIGHBOURS-th neighbour, (N,)."""
    parts = features.split(_DISTANCE_BLOCK)
    # The first of the smallest distances is that of the row to itself.
    return torch.cat([_distances(p, features).kthvalue(NEIGHBOURS + 1).values for p in parts])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Without products of matrices, whose rounding would separate an image from its copy.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class _Pooled(nn.Module):
    """A block of torchvision's Inception whose last branch uses another pooling."""

    def __init__(self, block: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        *others, _ = self.block._forward(x)  # type: ignore[operator]
        return torch.cat([*others, self.block.branch_pool(self.pool(x))], 1)  # type: ignore[operator]


def _pool_as_in_fid(inception: nn.Module) -> None:
    """Replace the pooling by that of TensorFlow's network of 2015, which FID was defined with.

    There, averages exclude the padding, and the last block takes maxima.
    """
    average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        name = f"Mixed_{name}"
        setattr(inception, name, _Pooled(inception.get_submodule(name), average))
    pool = nn.MaxPool2d(3, stride=1, padding=1)
    inception.Mixed_7c = _Pooled(inception.get_submodule("Mixed_7c"), pool)


def _build(name: str) -> nn.Module:
    from torchvision import models

    if name == INCEPTION:
        return models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    if name not in models.list_models(module=models):
        raise ValueError(
            f"features: expected {INCEPTION!r} or an image classifier of torchvision, such as "
            f"'resnet50', got {name!r}"
        )
    how = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return models.get_model(name, weights=None, **how)


def _read_state(weights: Path) -> dict[str, Tensor]:
    try:
        if weights.suffix == ".safetensors":
            state: object = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = f"could not read it ({str(error).split(chr(10))[0].split('. ')[0][:200]})"
    except Exception:  # weights_only can raise any error that unpickling does
        reason = "it is not a file of torch.save, or it holds more than tensors"
    else:
        if not isinstance(state, dict):
            reason = f"it holds a {type(state).__name__}"
        else:
            problems = ((key, _problem(key, value)) for key, value in state.items())
            wrong = [(key, problem) for key, problem in problems if problem]
            if not wrong:
                return state
            reason = "its {!r} {}".format(*wrong[0])
    raise ValueError(
        f"feature_weights: expected a state dict of tensors in {weights}, but {reason}"
    )


def _problem(key: object, value: object) -> str | None:
    """Say why an entry of a state dict cannot be used; None if it is a name and a finite tensor."""
    if not isinstance(key, str):
        return "is not the name of a tensor"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}"
    if value.dtype not in _DTYPES or value.layout != torch.strided or value.device.type != "cpu":
        return f"is not a plain tensor: {value.layout}, {value.dtype}, on {value.device}"
    if value.nbytes > value.untyped_storage().nbytes():  # strides of 0 can claim petabytes
        return f"has the shape {tuple(value.shape)}, but the file holds fewer numbers"
    if not value.isfinite().all():
        return "has values that are not finite"
    return None
