"""Weights in the layouts of openai/glow, rosinality/glow-pytorch and chaiyujin/glow-pytorch.

The tests write the files and compare the converted models with plain float64 code of the originals.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mflow_kernels.interop import glow_from_chaiyujin, glow_from_openai, glow_from_rosinality

SHAPE, LEVELS, STEPS, WIDTH = (3, 8, 8), 2, 2, 5


def draw(generator, *shape, by=0.2):
    return by * generator.normal(size=shape)


def level_channels():
    return [SHAPE[0] * 4 * 2**level for level in range(LEVELS)]


def gaussian(x, mean, log_sd):
    log_p = -0.5 * (math.log(2 * math.pi) + 2 * log_sd + ((x - mean) * (-log_sd).exp()) ** 2)
    return log_p.sum((1, 2, 3))


class Original:
    """Plain code of a Glow. Subclasses compute each layer as the originals do, from their weights;
    shifts and scales are interleaved, unless `halves` says otherwise."""

    def __init__(self, weights, affine=True, label=None):
        self.v = {name: torch.as_tensor(w) for name, w in weights.items()}
        self.affine, self.label = affine, label

    def halves(self, h):
        """The shift and the raw scale."""
        return h[:, 0::2], h[:, 1::2]

    def log_prob(self, x):
        total = torch.zeros(len(x), dtype=x.dtype)
        for level in range(LEVELS):
            x = F.pixel_unshuffle(x, 2)
            for step in range(STEPS):
                at = self.name(level, step)
                x, log_scale = self.actnorm(at, x)
                mix = self.mix(at)
                x = torch.einsum("ij,njhw->nihw", mix, x)
                own = log_scale.sum() + mix.det().abs().log()
                total = total + x.shape[2] * x.shape[3] * own
                a, b = x.chunk(2, 1)
                h = self.net(at, a)
                if self.affine:
                    shift, raw = self.halves(h)
                    s = torch.sigmoid(raw + 2)
                    b, total = (b + shift) * s, total + s.log().sum((1, 2, 3))
                else:
                    b = b + h
                x = torch.cat([a, b], 1)
            if level + 1 < LEVELS:
                x, z = x.chunk(2, 1)
                total = total + gaussian(z, *self.prior(level, x))
        return total + gaussian(x, *self.top(x))


# openai/glow: filters are (H, W, in, out).


def openai_variables(coupling=1, classes=0):
    g = np.random.default_rng(0)
    v = {}

    def actnorm(name, c):
        v[f"{name}actnorm_center/b"] = draw(g, 1, 1, 1, c)
        v[f"{name}actnorm_scale/logs"] = draw(g, 1, 1, 1, c, by=0.05)

    def zeros(name, c_in, c_out):
        v[f"{name}/W"] = draw(g, 3, 3, c_in + 1, c_out)
        v[f"{name}/b"], v[f"{name}/logs"] = draw(g, 1, 1, 1, c_out), draw(g, 1, c_out, by=0.1)

    for level, c in enumerate(level_channels()):
        for step in range(STEPS):
            at = f"{level}/{step}"
            actnorm(f"{at}/", c)
            v[f"{at}/invconv/W"] = np.linalg.qr(g.normal(size=(c, c)))[0] + draw(g, c, c, by=0.05)
            v[f"{at}/f1/l_1/W"] = draw(g, 3, 3, c // 2 + 1, WIDTH)
            v[f"{at}/f1/l_2/W"] = draw(g, 1, 1, WIDTH, WIDTH)
            for layer in ("l_1", "l_2"):
                actnorm(f"{at}/f1/{layer}/", WIDTH)
            zeros(f"{at}/f1/l_last", WIDTH, c if coupling else c // 2)
        if level + 1 < LEVELS:
            zeros(f"pool{level}/conv", c // 2, c)
    zeros("prior/p", c, 2 * c)
    if classes:
        v["prior/y_emb/W"] = draw(g, classes, 2 * c)
        v["prior/y_emb/b"], v["prior/y_emb/logs"] = draw(g, 1, 2 * c), draw(g, 1, 2 * c)
    return v


class OpenAI(Original):
    """A channel marks the padding, and logscale_factor is 3."""

    def name(self, level, step):
        return f"{level}/{step}"

    def conv(self, at, x):
        w = self.v[f"{at}/W"].permute(3, 2, 0, 1)
        if w.shape[2] == 3:
            mark = F.pad(torch.zeros_like(x[:, :1]), [1, 1, 1, 1], value=1)
            x = torch.cat([F.pad(x, [1, 1, 1, 1]), mark], 1)
        return F.conv2d(x, w)

    def actnorm(self, at, x):
        b, logs = self.v[f"{at}/actnorm_center/b"], 3 * self.v[f"{at}/actnorm_scale/logs"]
        return (x + b.view(-1, 1, 1)) * logs.view(-1, 1, 1).exp(), logs

    def mix(self, at):
        return self.v[f"{at}/invconv/W"].T

    def zeros(self, at, x):
        y = self.conv(at, x) + self.v[f"{at}/b"].view(-1, 1, 1)
        return y * (3 * self.v[f"{at}/logs"]).exp().view(-1, 1, 1)

    def net(self, at, x):
        for layer in (f"{at}/f1/l_1", f"{at}/f1/l_2"):
            x = self.actnorm(layer, self.conv(layer, x))[0].relu()
        return self.zeros(f"{at}/f1/l_last", x)

    def prior(self, level, x):
        return self.halves(self.zeros(f"pool{level}/conv", x))

    def top(self, x):
        h = self.zeros("prior/p", torch.zeros_like(x))
        if self.label is not None:
            row = self.v["prior/y_emb/W"][self.label] + self.v["prior/y_emb/b"]
            h = h + (row * (3 * self.v["prior/y_emb/logs"]).exp()).view(-1, 1, 1)
        return h.chunk(2, 1)


# rosinality/glow-pytorch.


def rosinality_weights(lu=True, affine=True):
    g = np.random.default_rng(1)
    v = {}

    def zero_conv(name, c_in, c_out):
        v[f"{name}.conv.weight"] = draw(g, c_out, c_in, 3, 3)
        v[f"{name}.conv.bias"] = draw(g, c_out)
        v[f"{name}.scale"] = draw(g, 1, c_out, 1, 1, by=0.1)

    for level, c in enumerate(level_channels()):
        for step in range(STEPS):
            at = f"blocks.{level}.flows.{step}"
            v[f"{at}.actnorm.loc"] = draw(g, 1, c, 1, 1)
            v[f"{at}.actnorm.scale"] = np.sign(g.normal(size=(1, c, 1, 1))) + draw(g, 1, c, 1, 1)
            v[f"{at}.actnorm.initialized"] = np.array(1, dtype=np.uint8)
            if lu:
                v[f"{at}.invconv.w_p"] = np.eye(c)[g.permutation(c)]
                for name in ("w_l", "w_u"):
                    v[f"{at}.invconv.{name}"] = draw(g, c, c)
                v[f"{at}.invconv.w_s"] = draw(g, c)
                v[f"{at}.invconv.s_sign"] = np.sign(g.normal(size=c))
                v[f"{at}.invconv.u_mask"] = np.triu(np.ones((c, c)), 1)
                v[f"{at}.invconv.l_mask"] = np.tril(np.ones((c, c)), -1)
                v[f"{at}.invconv.l_eye"] = np.eye(c)
            else:
                v[f"{at}.invconv.weight"] = np.linalg.qr(g.normal(size=(c, c)))[0][..., None, None]
            for i, (c_in, c_out, k) in {0: (c // 2, WIDTH, 3), 2: (WIDTH, WIDTH, 1)}.items():
                v[f"{at}.coupling.net.{i}.weight"] = draw(g, c_out, c_in, k, k)
                v[f"{at}.coupling.net.{i}.bias"] = draw(g, c_out)
            zero_conv(f"{at}.coupling.net.4", WIDTH, c if affine else c // 2)
        last = level + 1 == LEVELS
        zero_conv(f"blocks.{level}.prior", c if last else c // 2, 2 * c if last else c)
    return {name: torch.tensor(a) for name, a in v.items()}


class Rosinality(Original):
    """Padding is 1 before the convolutions that start at zero."""

    def halves(self, h):
        raw, shift = h.chunk(2, 1)
        return shift, raw

    def name(self, level, step):
        return f"blocks.{level}.flows.{step}"

    def actnorm(self, at, x):
        scale = self.v[f"{at}.actnorm.scale"]
        return scale * (x + self.v[f"{at}.actnorm.loc"]), scale.abs().log()

    def mix(self, at):
        at = f"{at}.invconv"
        if f"{at}.weight" in self.v:
            return self.v[f"{at}.weight"][:, :, 0, 0]
        lu = {n: self.v[f"{at}.{n}"] for n in ("w_p", "w_l", "w_u", "w_s", "s_sign")}
        lower = lu["w_l"] * self.v[f"{at}.l_mask"] + self.v[f"{at}.l_eye"]
        diagonal = torch.diag(lu["s_sign"] * lu["w_s"].exp())
        return lu["w_p"] @ lower @ (lu["w_u"] * self.v[f"{at}.u_mask"] + diagonal)

    def zeros(self, at, x):
        x = F.pad(x, [1, 1, 1, 1], value=1)
        y = F.conv2d(x, self.v[f"{at}.conv.weight"], self.v[f"{at}.conv.bias"])
        return y * (3 * self.v[f"{at}.scale"]).exp()

    def net(self, at, x):
        for name, padding in ((f"{at}.coupling.net.0", 1), (f"{at}.coupling.net.2", 0)):
            w, b = self.v[f"{name}.weight"], self.v[f"{name}.bias"]
            x = F.conv2d(x, w, b, padding=padding).relu()
        return self.zeros(f"{at}.coupling.net.4", x)

    def prior(self, level, x):
        return self.zeros(f"blocks.{level}.prior", x).chunk(2, 1)

    def top(self, x):
        return self.prior(LEVELS - 1, torch.zeros_like(x))


# chaiyujin/glow-pytorch: layers of all levels in one list, plain padding, and actnorms in networks.


def chaiyujin_weights(affine=True, classes=0):
    g = np.random.default_rng(2)
    v = {}

    def actnorm(name, c):
        v[f"{name}.actnorm.bias"] = draw(g, 1, c, 1, 1)
        v[f"{name}.actnorm.logs"] = draw(g, 1, c, 1, 1)

    def zero_conv(name, c_in, c_out):
        v[f"{name}.weight"], v[f"{name}.bias"] = draw(g, c_out, c_in, 3, 3), draw(g, c_out)
        v[f"{name}.logs"] = draw(g, c_out, 1, 1, by=0.1)

    for level, c in enumerate(level_channels()):
        first = level * (STEPS + 2) + 1  # after the squeeze
        for place in range(first, first + STEPS):
            at = f"flow.layers.{place}"
            actnorm(at, c)
            v[f"{at}.invconv.weight"] = np.linalg.qr(g.normal(size=(c, c)))[0] + draw(
                g, c, c, by=0.05
            )
            for i, (c_in, k) in {0: (c // 2, 3), 2: (WIDTH, 1)}.items():
                v[f"{at}.f.{i}.weight"] = draw(g, WIDTH, c_in, k, k)
                actnorm(f"{at}.f.{i}", WIDTH)
            zero_conv(f"{at}.f.4", WIDTH, c if affine else c // 2)
        if level + 1 < LEVELS:
            zero_conv(f"flow.layers.{first + STEPS}.conv", c // 2, c)
    zero_conv("learn_top", 2 * c, 2 * c)
    v["prior_h"] = np.zeros((4, 2 * c, 2, 2))
    if classes:
        v["project_ycond.weight"], v["project_ycond.bias"] = draw(g, 2 * c, classes), draw(g, 2 * c)
        v["project_ycond.logs"] = draw(g, 2 * c)
        v["project_class.weight"] = draw(g, classes, c)
    return {name: torch.tensor(a) for name, a in v.items()}


class Chaiyujin(Original):
    def name(self, level, step):
        return f"flow.layers.{level * (STEPS + 2) + 1 + step}"

    def actnorm(self, at, x):
        logs = self.v[f"{at}.actnorm.logs"]
        return (x + self.v[f"{at}.actnorm.bias"]) * logs.exp(), logs

    def mix(self, at):
        return self.v[f"{at}.invconv.weight"]

    def zeros(self, at, x):
        y = F.conv2d(x, self.v[f"{at}.weight"], self.v[f"{at}.bias"], padding=1)
        return y * (3 * self.v[f"{at}.logs"]).exp()

    def net(self, at, x):
        for layer, padding in ((f"{at}.f.0", 1), (f"{at}.f.2", 0)):
            y = F.conv2d(x, self.v[f"{layer}.weight"], padding=padding)
            x = self.actnorm(layer, y)[0].relu()
        return self.zeros(f"{at}.f.4", x)

    def prior(self, level, x):
        return self.halves(self.zeros(f"{self.name(level, STEPS)}.conv", x))

    def top(self, x):
        h = self.zeros("learn_top", x.new_zeros(1, 2 * x.shape[1], *x.shape[2:]))
        if self.label is not None:
            row = self.v["project_ycond.weight"][:, self.label] + self.v["project_ycond.bias"]
            h = h + (row * (3 * self.v["project_ycond.logs"]).exp())[:, None, None]
        return h.chunk(2, 1)


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


@pytest.mark.parametrize("coupling", [1, 0], ids=["affine", "additive"])
def test_openai(coupling, tmp_path):
    variables = openai_variables(coupling)
    scoped = {f"model/{name}": a.astype(np.float32) for name, a in variables.items()}
    np.savez(tmp_path / "glow.npz", **scoped, **{"model/0/0/invconv/W/Adam": np.zeros(1)})
    x = images()
    rounded = {name: a.astype(np.float32).astype(float) for name, a in variables.items()}
    assert_equal(
        glow_from_openai(tmp_path / "glow.npz", SHAPE), x, OpenAI(rounded, coupling).log_prob(x)
    )


def test_openai_classes():
    variables, x = openai_variables(classes=4), images()
    for label in (None, 4, -1):
        with pytest.raises(ValueError, match=f"label: expected a class from 0 to 3.*got {label}"):
            glow_from_openai(variables, SHAPE, label=label)
    with pytest.raises(ValueError, match="label: expected None, as these weights have no classes"):
        glow_from_openai(openai_variables(), SHAPE, label=0)
    for label in (0, 3):
        glow = glow_from_openai(variables, SHAPE, label=label)
        assert_equal(glow, x, OpenAI(variables, label=label).log_prob(x))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "additive"])
@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
def test_rosinality(lu, affine, tmp_path):
    weights = rosinality_weights(lu, affine)
    floats = {f"module.{name}": w if "init" in name else w.float() for name, w in weights.items()}
    torch.save(floats, tmp_path / "model.pt")
    x = images()
    glow = glow_from_rosinality(tmp_path / "model.pt", SHAPE)
    assert_equal(glow, x, Rosinality(weights, affine).log_prob(x))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "additive"])
def test_chaiyujin(affine, tmp_path):
    weights = chaiyujin_weights(affine)
    floats = {name: w.float() for name, w in weights.items()}
    torch.save({"global_step": 1, "graph": floats, "optim": {}}, tmp_path / "trained.pkg")
    x = images() + 0.5
    glow = glow_from_chaiyujin(tmp_path / "trained.pkg", SHAPE)
    assert_equal(glow, x, Chaiyujin(weights, affine).log_prob(x))


def test_chaiyujin_classes():
    weights, x = chaiyujin_weights(classes=4), images()
    with pytest.raises(ValueError, match=r"label: expected a class from 0 to 3.*got None"):
        glow_from_chaiyujin(weights, SHAPE)
    for label in (0, 3):
        glow = glow_from_chaiyujin(weights, SHAPE, label=label)
        assert_equal(glow, x, Chaiyujin(weights, label=label).log_prob(x))


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
