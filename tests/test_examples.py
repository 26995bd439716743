"""The examples are short, run, and print the right numbers."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
NUMBER = r"(-?[\d.]+(?:e[+-]\d+)?)"
Check = Callable[[list[float]], bool]


def below(limit: float) -> Check:
    return lambda found: len(found) == 1 and found[0] < limit


def falls(found: list[float]) -> bool:
    return len(found) > 1 and found == sorted(found, reverse=True)


# By example: what it prints, with # for a number, and what holds for the numbers.
EXAMPLES: dict[str, dict[str, Check]] = {
    "accelerate_normflows": {
        "flows.0.4  Squeeze, # GlowBlock -> one reversible run of": lambda found: found == [4],
        "log p differs by # nats": below(1e-3),
        r"step \d: # nats": lambda found: falls(found) and len(found) == 5,
    },
    "export_and_sample": {"off the model's by #": below(1e-5)},
    "fused_step": {
        "round trip within #": below(1e-5),
        # 2 / sqrt(8 * 36) is the standard error of the means of four channels.
        r"[[ ]#[],]": lambda found: len(found) == 4 and all(abs(x - 3) < 0.5 for x in found),
    },
    "glow_tts": {
        "loss # nats": lambda found: found[-1] < found[0] - 0.05,
        "round trip within #": below(1e-5),
    },
    "hierarchy": {f"stage {i}: # nats at first, # after": falls for i in range(2)},
    "jet": {r"step \d+: # nats": falls, "rule: #%": lambda found: found[0] > 95},
    "posterior": {
        "C2ST #": lambda found: len(found) == 2 and all(abs(x - 0.5) < 0.05 for x in found)
    },
    "manifold_flow": {"loss # nats": falls, "off the manifold by # per pixel": below(0.2)},
}


def test_each_is_short_and_tested() -> None:
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
    assert {path.stem for path in FOLDER.glob("*.py")} == {*EXAMPLES}


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_prints_the_right_numbers(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    for printed, holds in EXAMPLES[name].items():
        matches = re.finditer(printed.replace("#", NUMBER), out)
        found = [float(number) for match in matches for number in match.groups()]
        assert holds(found), (printed, found)
