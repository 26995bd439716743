import dataclasses
import inspect
import re
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hostile_names import NAMES

from mflow_kernels.layers.step import CouplingKind
from mflow_kernels.ops import spline
from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.ops.penalty_functions import Rho as OperatorRho
from mflow_kernels.runs.arguments import argument_texts, parse_config, read_stages
from mflow_kernels.runs.config import RunConfig, TrainConfig
from mflow_kernels.runs.options import (
    MAX_BINS,
    Coupling,
    ModelOptions,
    Rho,
    StageOptions,
    TrainingOptions,
)


def test_the_command_line_offers_what_operators_and_layers_do():
    """`runs.options` repeats these, because it does not import torch."""
    assert RHOS == get_args(OperatorRho) == get_args(Rho)
    assert get_args(CouplingKind) == get_args(Coupling)
    assert spline.MAX_BINS == MAX_BINS


# Values of each type, some of which YAML could take for another type.
VALUES = {
    bool: (False, True),
    int: (3, 2**63),
    float: (1 / 3, 1e-05, 1e22, 5e-324),
    str: [NAMES[kind] for kind in ("a number", "null", "a date", "YAML", "nearly all of these")],
    NoneType: (None,),
    list[str]: (list(NAMES.values()),),
    list[StageOptions]: ([], [StageOptions(), StageOptions(dim=4)]),
}


def values_of(kind):
    """All values of a choice, and VALUES of another type or of the types that it unites."""
    if kind in VALUES:
        return VALUES[kind]
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(value for one in get_args(kind) for value in values_of(one))


def test_every_option_is_read_back(monkeypatch):
    """Each configuration has another value for every option that has more. `check` would refuse
    some of the combinations."""
    monkeypatch.setattr(RunConfig, "check", lambda config: None)
    values = {name: values_of(kind) for name, kind in get_type_hints(RunConfig).items()}
    values["image_size"] = VALUES[int]  # the configuration of a run has a size
    for turn in range(max(map(len, values.values()))):
        options = {name: given[turn % len(given)] for name, given in values.items()}
        config = dataclasses.replace(TrainConfig().resolve((1, 28, 28)), **options)
        text = config.to_yaml()
        assert text.isascii()  # the same file under every locale
        assert vars(RunConfig.from_yaml(text, "config.yaml")) == vars(config)


@pytest.mark.parametrize("option", get_type_hints(StageOptions))
def test_every_option_of_a_further_flow_is_read_back(option):
    """In the notation of --stages, which configurations share."""
    for value in values_of(get_type_hints(StageOptions)[option]):
        stages = [StageOptions(), StageOptions(**{option: value})]
        assert read_stages(f"[{', '.join(map(str, stages))}]") == stages


def test_folders_are_recorded_by_their_whole_path(tmp_path, monkeypatch):
    assert parse_config("data: 2024-01-01", "preset") == {"data": "2024-01-01"}  # text, no date
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(data="faces").resolve((3, 64, 64)).data == str(tmp_path / "faces")


WHOLE = TrainConfig().resolve((1, 28, 28)).to_yaml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE.replace("levels: 2", "levels: two"), "levels: expected a whole number, got two"),
        (WHOLE.replace("levels: 2", "levels: 0"), "levels: expected at least 1, got 0"),
        (WHOLE.replace("size: 28", "size: null"), "image_size: expected a whole number"),
        ("stages: 3", "stages: expected a list such as"),
        ("stages: [{}, {stepz: 3}]", r"stages\[1\]: expected dim, .*, got stepz"),
        ("stages: [{steps: [3]}]", "stages: expected a value or a list of values, got deep nest"),
        ("colour: red", "colour: mflow_kernels .* has no such option"),
        ("[1, 2]", "expected options and their values, got a list"),
        ("[" * 100_000, "got deep nesting"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("levels: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"levels: 2\xff", "invalid start byte"),
        (WHOLE[: WHOLE.index("save_steps")], "expected every option of mflow_kernels .*, found no"),
        ("", "expected every option of mflow_kernels .*, found no"),
    ],
)
def test_bad_yaml_gives_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        RunConfig.from_yaml(text, "runs/a/config.yaml")
    assert str(caught.value).startswith("runs/a/config.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_anywhere_is_not_filled_with_defaults():
    for end in range(0, len(WHOLE) - 2, 61):
        with pytest.raises(ValueError, match=r"config\.yaml: "):
            RunConfig.from_yaml(WHOLE[:end], "config.yaml")


def test_max_steps_take_the_place_of_epochs():
    def budgets(*stages, **options):
        config = TrainConfig(stages=[StageOptions(**stage) for stage in stages], **options)
        return [flow.optimizer_steps(batches_per_pass=10) for flow in config.flows]

    assert budgets({}, epochs=3) == [30, 30]
    assert budgets({}, epochs=3, max_steps=7) == [7, 7]
    assert budgets({"epochs": 2}, {"max_steps": 6}, {}, max_steps=7) == [7, 20, 6, 7]


def test_further_flows_have_values_of_their_own_or_those_of_the_image_flow():
    own = StageOptions(32, steps=3, rho="l1", domain="latent", learning_rate=0.03, sigma=2.0)
    config = TrainConfig(stages=[own, StageOptions(learning_rate=None)], weight=7.0, rho="huber")
    config.check()
    names = ("dim", "steps", "rho", "domain", "learning_rate", "sigma", "weight", "delta")
    assert [tuple(getattr(flow, name) for name in names) for flow in config.flows] == [
        (64, 4, "huber", "data", 2e-2, 1.0, 7.0, 0.1),
        # u has unit variance, which neither the weight nor the delta of images fits.
        (32, 3, "l1", "latent", 0.03, 2.0, 1.0, 2.0),
        (32, 6, "huber", "data", 2e-2, 1.0, 1.0, 2.0),
    ]
    assert TrainConfig(weight="variance").flows[1].weight == "variance"
    assert TrainConfig(stages=[StageOptions(weight=3.0)], weight="variance").flows[1].weight == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": {"steps": 0}}, "steps: expected at least 1, got 0"),
        ({"stage": {"max_steps": 0}}, "max_steps: expected at least 1, got 0"),
        ({"stage": {"dim": 65}}, "dim: expected dimensions from 1 to the 64 of the stage before"),
        ({"stage": {"bins": 65}}, "bins: expected 2 to 64, got 65"),
        ({"stage": {"weight": -1.0}}, "weight: expected a finite number > 0, got -1"),
        ({"stage": {"learning_rate": 0.0}}, "learning_rate: expected a finite number"),
        ({"stage": {"weight": "variance", "domain": "latent"}}, "weight: expected a number in the"),
        ({"weight": "variance", "error_bound": 0.1}, "weight: expected a number with a final weig"),
        ({"error_bound": 0.0}, "error_bound: expected a finite number > 0, got 0"),
        ({"error_bound": 0.1, "domain": "latent"}, "error_bound: expected none in the latent dom"),
        (
            {"error_bound": 0.1, "final_weight": 2.0, "weight_steps": 3},
            "error_bound: expected none together with final_weight",
        ),
        ({"final_weight": 2.0}, "final_weight: expected weight_steps too, got none"),
        ({"stage": {"weight_steps": 2}}, "weight_steps: expected stages[1].final_weight too, got"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number > 0, got inf"),
        ({"final_weight": 2.0, "weight_steps": 0}, "weight_steps: expected at least 1, got 0"),
        ({"stage": {"delta": 0.0}}, "delta: expected a finite number > 0, got 0"),
        ({"weight": "variance", "domain": "latent"}, "weight: expected a number in the latent"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 to less than 1, got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm: expected a finite number > 0, got 0"),
    ],
)
def test_bad_values(options, message):
    if "stage" in options:
        options = {"stages": [StageOptions(), StageOptions(**options["stage"])]}
        message = f"stages[1].{message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        TrainConfig(**options).check()


def test_the_default_folder_tells_runs_apart():
    names = {
        TrainConfig(**options).default_run_dir()
        for options in ({}, {"manifold_dim": 32}, {"seed": 1}, {"image_size": 32}, {"data": "a/b"})
    }
    assert len(names) == 5
    assert "runs/b-d64-seed0" in names
    faces = TrainConfig(data="celeba", classes="Smiling,Male")
    assert faces.default_run_dir() == "runs/celeba-Smiling-Male-d64-seed0"


@pytest.mark.parametrize("clean", [True, False], ids=["Python 3.13", "before"])
def test_help_does_not_depend_on_how_python_keeps_docstrings(
    monkeypatch: pytest.MonkeyPatch, clean: bool
) -> None:
    """Python 3.13 removes the indentation of docstrings, which Python keeps before."""
    for options in (ModelOptions, StageOptions, TrainingOptions):
        text = inspect.cleandoc(options.__doc__ or "")
        indented = text.replace("\n", "\n    ")
        monkeypatch.setattr(options, "__doc__", text if clean else indented)
        assert set(argument_texts(options)) == {o.name for o in dataclasses.fields(options)}
