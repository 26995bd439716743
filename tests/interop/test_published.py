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


# openai/glow, as NHWC.


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


class OpenAI:
    """The original model: NHWC, filters (H, W, in, out), a channel that marks the
    padding, interleaved shifts and scales, logscale_factor 3."""

    def __init__(self, variables, coupling=1, label=None):
        self.v = {name: torch.tensor(a) for name, a in variables.items()}
        self.coupling, self.label = coupling, label

    def conv(self, x, w):
        if w.shape[0] == 3:
            n, h, width, _ = x.shape
            mark = torch.ones(n, h + 2, width + 2, 1, dtype=x.dtype)
            mark[:, 1:-1, 1:-1] = 0
            x = torch.cat([F.pad(x, [0, 0, 1, 1, 1, 1]), mark], 3)
        return F.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)

    def actnorm(self, at, x):
        b, logs = self.v[f"{at}actnorm_center/b"], 3 * self.v[f"{at}actnorm_scale/logs"]
        return (x + b) * logs.exp(), logs

    def zeros(self, at, x):
        y = self.conv(x, self.v[f"{at}/W"]) + self.v[f"{at}/b"]
        return y * (3 * self.v[f"{at}/logs"]).exp()

    def net(self, at, x):
        for layer in ("l_1", "l_2"):
            x = self.conv(x, self.v[f"{at}/{layer}/W"])
            x = self.actnorm(f"{at}/{layer}/", x)[0].relu()
        return self.zeros(f"{at}/l_last", x)

    def log_prob(self, image):
        z = image.permute(0, 2, 3, 1)
        total = torch.zeros(len(z), dtype=z.dtype)
        for level in range(LEVELS):
            n, h, w, c = z.shape
            z = z.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4)
            z = z.reshape(n, h // 2, w // 2, 4 * c)
            c, pixels = 4 * c, h * w // 4
            for step in range(STEPS):
                at = f"{level}/{step}"
                z, logs = self.actnorm(f"{at}/", z)
                mix = self.v[f"{at}/invconv/W"]
                z = z @ mix
                total = total + pixels * (logs.sum() + mix.det().abs().log())
                z1, z2 = z[..., : c // 2], z[..., c // 2 :]
                h_ = self.net(f"{at}/f1", z1)
                if self.coupling:
                    s = torch.sigmoid(h_[..., 1::2] + 2)
                    z2 = (z2 + h_[..., 0::2]) * s
                    total = total + s.log().sum((1, 2, 3))
                else:
                    z2 = z2 + h_
                z = torch.cat([z1, z2], 3)
            if level + 1 < LEVELS:
                z, z2 = z[..., : c // 2], z[..., c // 2 :]
                h_ = self.zeros(f"pool{level}/conv", z)
                total = total + gaussian(z2, h_[..., 0::2], h_[..., 1::2])
        top = self.zeros("prior/p", torch.zeros_like(z))
        if self.label is not None:
            row = self.v["prior/y_emb/W"][self.label] + self.v["prior/y_emb/b"]
            top = top + row * (3 * self.v["prior/y_emb/logs"]).exp()
        return total + gaussian(z, top[..., :c], top[..., c:])


def gaussian(x, mean, log_sd):
    log_p = -0.5 * (math.log(2 * math.pi) + 2 * log_sd + ((x - mean) * (-log_sd).exp()) ** 2)
    return log_p.sum((1, 2, 3))


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


def rosinality_log_prob(v, x, affine=True):
    def zero_conv(at, x):
        y = F.conv2d(F.pad(x, [1, 1, 1, 1], value=1), v[f"{at}.conv.weight"], v[f"{at}.conv.bias"])
        return y * (3 * v[f"{at}.scale"]).exp()

    total = torch.zeros(len(x), dtype=x.dtype)
    for level in range(LEVELS):
        x = F.pixel_unshuffle(x, 2)
        pixels = x.shape[2] * x.shape[3]
        for step in range(STEPS):
            at = f"blocks.{level}.flows.{step}"
            scale = v[f"{at}.actnorm.scale"]
            x = scale * (x + v[f"{at}.actnorm.loc"])
            if f"{at}.invconv.weight" in v:
                mix = v[f"{at}.invconv.weight"][:, :, 0, 0]
            else:
                lu = {n: v[f"{at}.invconv.{n}"] for n in ("w_p", "w_l", "w_u", "w_s", "s_sign")}
                lower = lu["w_l"] * v[f"{at}.invconv.l_mask"] + v[f"{at}.invconv.l_eye"]
                diagonal = torch.diag(lu["s_sign"] * lu["w_s"].exp())
                mix = lu["w_p"] @ lower @ (lu["w_u"] * v[f"{at}.invconv.u_mask"] + diagonal)
            x = F.conv2d(x, mix[:, :, None, None])
            total = total + pixels * (scale.abs().log().sum() + mix.det().abs().log())
            a, b = x.chunk(2, 1)
            h = a
            for i, padding in ((0, 1), (2, 0)):
                name = f"{at}.coupling.net.{i}"
                h = F.conv2d(h, v[f"{name}.weight"], v[f"{name}.bias"], padding=padding).relu()
            h = zero_conv(f"{at}.coupling.net.4", h)
            if affine:
                log_s, t = h.chunk(2, 1)
                s = torch.sigmoid(log_s + 2)
                b = (b + t) * s
                total = total + s.log().sum((1, 2, 3))
            else:
                b = b + h
            x = torch.cat([a, b], 1)
        if level + 1 < LEVELS:
            x, z = x.chunk(2, 1)
            mean, log_sd = zero_conv(f"blocks.{level}.prior", x).chunk(2, 1)
        else:
            z = x
            mean, log_sd = zero_conv(f"blocks.{level}.prior", torch.zeros_like(x)).chunk(2, 1)
        total = total + gaussian(z, mean, log_sd)
    return total


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


def chaiyujin_log_prob(v, x, affine=True, label=None):
    def actnorm(at, x):
        return (x + v[f"{at}.actnorm.bias"]) * v[f"{at}.actnorm.logs"].exp()

    def zero_conv(at, x):
        y = F.conv2d(x, v[f"{at}.weight"], v[f"{at}.bias"], padding=1)
        return y * (3 * v[f"{at}.logs"]).exp()

    total, place = torch.zeros(len(x), dtype=x.dtype), 0
    for level in range(LEVELS):
        x = F.pixel_unshuffle(x, 2)
        for _ in range(STEPS):
            place += 1
            at = f"flow.layers.{place}"
            mix = v[f"{at}.invconv.weight"]
            x = torch.einsum("ij,njhw->nihw", mix, actnorm(at, x))
            own = v[f"{at}.actnorm.logs"].sum() + mix.det().abs().log()
            total = total + x.shape[2] * x.shape[3] * own
            a, b = x.chunk(2, 1)
            h = actnorm(f"{at}.f.0", F.conv2d(a, v[f"{at}.f.0.weight"], padding=1)).relu()
            h = actnorm(f"{at}.f.2", F.conv2d(h, v[f"{at}.f.2.weight"])).relu()
            h = zero_conv(f"{at}.f.4", h)
            if affine:
                s = torch.sigmoid(h[:, 1::2] + 2)
                b = (b + h[:, 0::2]) * s
                total = total + s.log().sum((1, 2, 3))
            else:
                b = b + h
            x = torch.cat([a, b], 1)
        if level + 1 < LEVELS:
            x, z = x.chunk(2, 1)
            h = zero_conv(f"flow.layers.{place + 1}.conv", x)
            total = total + gaussian(z, h[:, 0::2], h[:, 1::2])
            place += 2
    top = zero_conv("learn_top", x.new_zeros(1, 2 * x.shape[1], *x.shape[2:]))
    if label is not None:
        row = v["project_ycond.weight"][:, label] + v["project_ycond.bias"]
        top = top + (row * (3 * v["project_ycond.logs"]).exp())[:, None, None]
    return total + gaussian(x, *top.chunk(2, 1))


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
    assert_equal(glow, x, rosinality_log_prob(weights, x, affine))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "additive"])
def test_chaiyujin(affine, tmp_path):
    weights = chaiyujin_weights(affine)
    floats = {name: w.float() for name, w in weights.items()}
    torch.save({"global_step": 1, "graph": floats, "optim": {}}, tmp_path / "trained.pkg")
    x = images() + 0.5
    glow = glow_from_chaiyujin(tmp_path / "trained.pkg", SHAPE)
    assert_equal(glow, x, chaiyujin_log_prob(weights, x, affine))


def test_chaiyujin_classes():
    weights, x = chaiyujin_weights(classes=4), images()
    with pytest.raises(ValueError, match=r"label: expected a class from 0 to 3.*got None"):
        glow_from_chaiyujin(weights, SHAPE)
    for label in (0, 3):
        glow = glow_from_chaiyujin(weights, SHAPE, label=label)
        assert_equal(glow, x, chaiyujin_log_prob(weights, x, label=label))


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
