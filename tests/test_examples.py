"""The examples are short, run, and print the right numbers."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"(-?[\d.]+(?:e[+-]\d+)?)"


def printed(name, capsys, monkeypatch):
    """Run an example and return its output."""
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(pattern, out):
    return [float(n) for n in re.findall(pattern.replace("#", NUMBER), out)]


def test_each_is_short_and_tested():
    assert len(list(EXAMPLES.glob("*.py"))) == 7
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 60, path.name
        assert f'"{path.stem}"' in Path(__file__).read_text(), path.name


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_accelerate_normflows(capsys, monkeypatch):
    out = printed("accelerate_normflows", capsys, monkeypatch)
    assert "Squeeze, 4 GlowBlock -> one reversible run of" in out
    (difference,) = numbers("log p differs by # nats", out)
    assert difference < 1e-3
    losses = numbers(r"step \d: # nats", out)
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5


def test_fused_step(capsys, monkeypatch):
    out = printed("fused_step", capsys, monkeypatch)
    (error,) = numbers("round trip within #", out)
    assert error < 1e-5
    means = numbers("#[,\\]]", re.search("means (.*)", out)[1])
    assert len(means) == 4
    assert all(abs(mean - 3) < 0.5 for mean in means)  # 2 / sqrt(8 * 36) is the standard error


def test_manifold_flow(capsys, monkeypatch):
    out = printed("manifold_flow", capsys, monkeypatch)
    losses = numbers("loss # nats", out)
    assert losses == sorted(losses, reverse=True)
    assert numbers("off the manifold by # per pixel", out)[0] < 0.2


def test_jet(capsys, monkeypatch):
    out = printed("jet", capsys, monkeypatch)
    losses = numbers("step \\d+: # nats", out)
    assert losses == sorted(losses, reverse=True)
    assert numbers("rule: #%", out)[0] > 95


def test_hierarchy(capsys, monkeypatch):
    out = printed("hierarchy", capsys, monkeypatch)
    firsts, lasts = numbers("# nats at first", out), numbers("at first, # after", out)
    assert len(firsts) == len(lasts) == 2
    assert all(last < first for first, last in zip(firsts, lasts, strict=True))


def test_export_and_sample(capsys, monkeypatch):
    (error,) = numbers("off the model's by #", printed("export_and_sample", capsys, monkeypatch))
    assert error < 1e-5


def test_glow_tts(capsys, monkeypatch):
    out = printed("glow_tts", capsys, monkeypatch)
    losses = numbers("loss # nats", out)
    assert losses[-1] < losses[0] - 0.05
    assert numbers("round trip within #", out)[0] < 1e-5
