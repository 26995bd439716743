"""Weights in the layouts of openai/glow, rosinality/glow-pytorch and chaiyujin/glow-pytorch.

The tests draw a Glow, write it in each layout, and compare the converted models with plain float64
code of the drawn one.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.interop import glow_from_chaiyujin, glow_from_openai, glow_from_rosinality

SHAPE, LEVELS, STEPS, WIDTH = (3, 8, 8), 2, 2, 5


class Conv(NamedTuple):
    """exp(log_scale) * (weight * x + bias)."""

    weight: Tensor
    bias: Tensor
    log_scale: Tensor

    def swapped(self):
        return Conv(*(torch.cat(t.chunk(2)[::-1]) for t in self))

    def interleaved(self):
        return Conv(*(torch.stack(t.chunk(2), 1).flatten(0, 1) for t in self))


class Step(NamedTuple):
    """matrix @ (scale * (x + bias)), then a coupling, whose network gives shifts and raw scales."""

    bias: Tensor
    scale: Tensor
    matrix: Tensor
    net: list[Conv]


class Flow(NamedTuple):
    """A Glow. The networks of splits and of the top latent give means and log-deviations.

    A class adds exp(classes.log_scale) * (its row of classes.weight + classes.bias) to the latter.
    """

    edge: str  # see `pad`
    steps: dict[tuple[int, int], Step]
    splits: list[Conv]
    top: Conv
    classes: Conv


def drawn(edge, affine=True, top_inputs=1, classes=4):
    """A Glow with random weights."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape, by=0.2):
        return by * torch.randn(*shape, generator=g, dtype=torch.float64)

    def conv(c_in, c_out, size=3):
        marks = edge == "marked" and size == 3
        return Conv(normal(c_out, c_in + marks, size, size), normal(c_out), normal(c_out))

    steps, splits = {}, []
    for level in range(LEVELS):
        c = SHAPE[0] * 4 * 2**level
        for step in range(STEPS):
            matrix = torch.linalg.qr(normal(c, c))[0] + normal(c, c, by=0.05)
            last = conv(WIDTH, c if affine else c // 2)
            net = [conv(c // 2, WIDTH), conv(WIDTH, WIDTH, 1), last]
            steps[level, step] = Step(normal(c), normal(c).exp(), matrix, net)
        splits.append(conv(c // 2, c))
    top = conv(top_inputs * c, 2 * c)
    of_classes = Conv(normal(classes, 2 * c), normal(2 * c), normal(2 * c))
    return Flow(edge, steps, splits[:-1], top, of_classes)


def pad(x, edge):
    """Pad with zeros; with "ones"; or with zeros that a further channel marks ("marked")."""
    padded = F.pad(x, [1, 1, 1, 1], value=float(edge == "ones"))
    if edge != "marked":
        return padded
    return torch.cat([padded, F.pad(torch.zeros_like(x[:, :1]), [1, 1, 1, 1], value=1)], 1)


def run(conv, x, edge):
    x = pad(x, edge) if conv.weight.shape[2] == 3 else x
    return F.conv2d(x, conv.weight, conv.bias) * conv.log_scale.exp().view(-1, 1, 1)


def gaussian(x, mean, log_sd):
    log_p = -0.5 * (math.log(2 * math.pi) + 2 * log_sd + ((x - mean) * (-log_sd).exp()) ** 2)
    return log_p.sum((1, 2, 3))


def log_prob(flow, x, label=None):
    total = torch.zeros(len(x), dtype=x.dtype)
    inside = "zeros" if flow.edge == "ones" else flow.edge  # ones surround the last layers only
    for level in range(LEVELS):
        x = F.pixel_unshuffle(x, 2)
        for step in range(STEPS):
            bias, scale, matrix, (first, second, last) = flow.steps[level, step]
            x = scale.view(-1, 1, 1) * (x + bias.view(-1, 1, 1))
            x = torch.einsum("ij,njhw->nihw", matrix, x)
            own = scale.log().sum() + matrix.det().abs().log()
            total = total + x.shape[2] * x.shape[3] * own
            a, b = x.chunk(2, 1)
            h = run(second, run(first, a, inside).relu(), inside).relu()
            h = run(last, h, flow.edge)
            if h.shape[1] == x.shape[1]:
                shift, raw = h.chunk(2, 1)
                s = torch.sigmoid(raw + 2)
                b, total = (b + shift) * s, total + s.log().sum((1, 2, 3))
            else:
                b = b + h
            x = torch.cat([a, b], 1)
        if level + 1 < LEVELS:
            x, z = x.chunk(2, 1)
            total = total + gaussian(z, *run(flow.splits[level], x, flow.edge).chunk(2, 1))
    inputs = flow.top.weight.shape[1] - (flow.edge == "marked")
    h = run(flow.top, x.new_zeros(len(x), inputs, *x.shape[2:]), flow.edge)
    if label is not None:
        row = flow.classes.weight[label] + flow.classes.bias
        h = h + (row * flow.classes.log_scale.exp()).view(-1, 1, 1)
    return total + gaussian(x, *h.chunk(2, 1))


def openai_variables(flow=None, classes=False):
    """Filters are (H, W, in, out); log-scales are divided by 3; shifts and scales alternate."""
    flow, v = flow or drawn("marked"), {}

    def conv(name, conv, bias="b", logs="logs"):
        v[f"{name}/W"] = conv.weight.permute(2, 3, 1, 0)
        v[f"{name}/{bias}"] = conv.bias.view(1, 1, 1, -1)
        v[f"{name}/{logs}"] = conv.log_scale.view(1, -1) / 3

    for (level, step), (bias, scale, matrix, net) in flow.steps.items():
        at = f"{level}/{step}"
        v[f"{at}/actnorm_center/b"] = bias.view(1, 1, 1, -1)
        v[f"{at}/actnorm_scale/logs"] = scale.log().view(1, 1, 1, -1) / 3
        v[f"{at}/invconv/W"] = matrix.T
        for layer, one in zip(("l_1", "l_2"), net, strict=False):
            conv(f"{at}/f1/{layer}", one, "actnorm_center/b", "actnorm_scale/logs")
        affine = len(net[2].bias) == len(bias)
        conv(f"{at}/f1/l_last", net[2].interleaved() if affine else net[2])
    for level, split in enumerate(flow.splits):
        conv(f"pool{level}/conv", split.interleaved())
    conv("prior/p", flow.top)
    if classes:
        v["prior/y_emb/W"], v["prior/y_emb/b"] = flow.classes.weight, flow.classes.bias[None]
        v["prior/y_emb/logs"] = flow.classes.log_scale[None] / 3
    return {name: array.numpy() for name, array in v.items()}


def rosinality_weights(flow=None, lu=True):
    """Scales of actnorms may be negative, and those of couplings come before the shifts."""
    flow, v = flow or drawn("ones"), {}

    def last(name, conv):
        v[f"{name}.conv.weight"], v[f"{name}.conv.bias"] = conv.weight, conv.bias
        v[f"{name}.scale"] = conv.log_scale.view(1, -1, 1, 1) / 3

    for (level, step), (bias, scale, matrix, net) in flow.steps.items():
        at = f"blocks.{level}.flows.{step}"
        sign = torch.ones_like(scale)
        sign[::3] = -1
        v[f"{at}.actnorm.loc"] = bias.view(1, -1, 1, 1)
        v[f"{at}.actnorm.scale"] = (sign * scale).view(1, -1, 1, 1)
        v[f"{at}.actnorm.initialized"] = torch.tensor(1, dtype=torch.uint8)
        matrix = matrix * sign
        if lu:  # masks, which the files also have, hide the other triangles
            p, lower, upper = torch.linalg.lu(matrix)
            names = ("w_p", "w_l", "w_u", "w_s", "s_sign")
            factors = (p, lower, upper, upper.diagonal().abs().log(), upper.diagonal().sign())
            v |= {f"{at}.invconv.{n}": factor for n, factor in zip(names, factors, strict=True)}
        else:
            v[f"{at}.invconv.weight"] = matrix[..., None, None]
        for i, conv in zip((0, 2), net, strict=False):
            by = conv.log_scale.exp()
            v[f"{at}.coupling.net.{i}.weight"] = conv.weight * by.view(-1, 1, 1, 1)
            v[f"{at}.coupling.net.{i}.bias"] = conv.bias * by
        affine = len(net[2].bias) == len(bias)
        last(f"{at}.coupling.net.4", net[2].swapped() if affine else net[2])
    for level, split in enumerate([*flow.splits, flow.top]):
        last(f"blocks.{level}.prior", split)
    return v


def chaiyujin_weights(flow=None, classes=False):
    """Layers of all levels are in one list; shifts and scales alternate."""
    flow, v = flow or drawn("zeros", top_inputs=2), {}

    def actnorm(name, bias, log_scale):
        v[f"{name}.actnorm.bias"] = bias.view(1, -1, 1, 1)
        v[f"{name}.actnorm.logs"] = log_scale.view(1, -1, 1, 1)

    def last(name, conv):
        v[f"{name}.weight"], v[f"{name}.bias"] = conv.weight, conv.bias
        v[f"{name}.logs"] = conv.log_scale.view(-1, 1, 1) / 3

    for (level, step), (bias, scale, matrix, net) in flow.steps.items():
        at = f"flow.layers.{level * (STEPS + 2) + 1 + step}"  # each level begins with a squeeze
        actnorm(at, bias, scale.log())
        v[f"{at}.invconv.weight"] = matrix
        for i, conv in zip((0, 2), net, strict=False):
            v[f"{at}.f.{i}.weight"] = conv.weight
            actnorm(f"{at}.f.{i}", conv.bias, conv.log_scale)
        affine = len(net[2].bias) == len(bias)
        last(f"{at}.f.4", net[2].interleaved() if affine else net[2])
    for level, split in enumerate(flow.splits, start=1):
        last(f"flow.layers.{level * (STEPS + 2) - 1}.conv", split.interleaved())
    last("learn_top", flow.top)
    v["prior_h"] = torch.zeros(4, len(flow.top.bias), 2, 2)
    if classes:
        v["project_ycond.weight"], v["project_ycond.bias"] = (
            flow.classes.weight.T,
            flow.classes.bias,
        )
        v["project_ycond.logs"] = flow.classes.log_scale / 3
    return v


def images():
    return torch.rand(3, *SHAPE, dtype=torch.float64) - 0.5


def assert_equal(glow, x, want):
    """Compare log p, in float64 with weights rounded to float32, and the round trip."""
    glow = glow.double()
    latents, logdet = glow(x)
    log_p = sum(-0.5 * (z**2 + math.log(2 * math.pi)).flatten(1).sum(1) for z in latents)
    # Each of about 5,000 weights has a relative rounding error of 6e-8.
    torch.testing.assert_close(log_p + logdet, want, rtol=1e-5, atol=0)
    back, logdet_back = glow.inverse(latents)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(logdet_back, -logdet)


AFFINE = pytest.mark.parametrize("affine", [True, False], ids=["affine", "additive"])


@AFFINE
def test_openai(affine, tmp_path):
    flow, x = drawn("marked", affine), images()
    scoped = {f"model/{n}": a.astype(np.float32) for n, a in openai_variables(flow).items()}
    np.savez(tmp_path / "glow.npz", **scoped, **{"model/0/0/invconv/W/Adam": np.zeros(1)})
    assert_equal(glow_from_openai(tmp_path / "glow.npz", SHAPE), x, log_prob(flow, x))


@AFFINE
@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
def test_rosinality(lu, affine, tmp_path):
    flow, x = drawn("ones", affine), images()
    weights = rosinality_weights(flow, lu)
    floats = {f"module.{name}": w if "init" in name else w.float() for name, w in weights.items()}
    torch.save(floats, tmp_path / "model.pt")
    assert_equal(glow_from_rosinality(tmp_path / "model.pt", SHAPE), x, log_prob(flow, x))


@AFFINE
def test_chaiyujin(affine, tmp_path):
    flow, x = drawn("zeros", affine, top_inputs=2), images() + 0.5
    floats = {name: w.float() for name, w in chaiyujin_weights(flow).items()}
    torch.save({"global_step": 1, "graph": floats, "optim": {}}, tmp_path / "trained.pkg")
    assert_equal(glow_from_chaiyujin(tmp_path / "trained.pkg", SHAPE), x, log_prob(flow, x))


@pytest.mark.parametrize(
    ("convert", "write", "flow"),
    [
        (glow_from_openai, openai_variables, drawn("marked")),
        (glow_from_chaiyujin, chaiyujin_weights, drawn("zeros", top_inputs=2)),
    ],
    ids=["openai", "chaiyujin"],
)
def test_classes(convert, write, flow):
    weights, x = write(flow, classes=True), images()
    for label in (None, 4, -1):
        with pytest.raises(ValueError, match=f"label: expected a class from 0 to 3.*got {label}"):
            convert(weights, SHAPE, label=label)
    with pytest.raises(ValueError, match="label: expected None, as these weights have no classes"):
        convert(write(flow), SHAPE, label=0)
    for label in (0, 3):
        assert_equal(convert(weights, SHAPE, label=label), x, log_prob(flow, x, label))


def test_other_checkpoints_raise():
    variables = openai_variables()
    with pytest.raises(ValueError, match="expected '0/0/actnorm_center/b'"):
        glow_from_openai({}, SHAPE)
    with pytest.raises(ValueError, match="expected '0/1/invconv/W': only the learned permutation"):
        glow_from_openai({n: a for n, a in variables.items() if n != "0/1/invconv/W"}, SHAPE)
    with pytest.raises(ValueError, match="expected 'pool0/conv/logs'"):
        glow_from_openai({n: a for n, a in variables.items() if n != "pool0/conv/logs"}, SHAPE)
    with pytest.raises(ValueError, match=r"1x1 weights of shape \(4, 4\) for such an image"):
        glow_from_openai(variables, (1, 8, 8))
    with pytest.raises(ValueError, match=r"blocks.0.flows.0.actnorm.loc"):
        glow_from_rosinality({}, SHAPE)
    weights = rosinality_weights()
    weights["blocks.0.flows.0.actnorm.loc"] += float("nan")
    with pytest.raises(ValueError, match=r"actnorm.loc' is not finite"):
        glow_from_rosinality(weights, SHAPE)
    weights = chaiyujin_weights()
    with pytest.raises(ValueError, match=r"expected 'flow.layers.1.actnorm.bias'"):
        glow_from_chaiyujin({}, SHAPE)
    weights.pop("flow.layers.5.invconv.weight")
    with pytest.raises(ValueError, match=r"flow.layers.5.invconv.weight': only plain 1x1"):
        glow_from_chaiyujin(weights, SHAPE)
