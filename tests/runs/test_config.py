import dataclasses
import inspect
import re
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
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


def test_a_configuration_is_read_back_from_its_yaml():
    stages = [StageOptions(dim=32), StageOptions(dim=16)]
    config = TrainConfig(data="celeba", classes="Smiling,Male", stages=stages, max_steps=7)
    resolved = config.resolve((3, 64, 64), 148, ("not Smiling", "yes: no", "3"))
    read = RunConfig.from_yaml(resolved.to_yaml(), "config.yaml")
    assert read == resolved
    assert (read.image_shape, read.stages) == ((3, 64, 64), stages)
    assert (read.crop, read.class_names) == (148, ["not Smiling", "yes: no", "3"])


# A value other than the default for each option that is neither text nor a choice.
OTHER = {
    **{"image_size": 64, "n_bits": 5, "flips": True, "levels": 3, "steps": 5, "width": 65},
    **{"manifold_dim": 63, "bins": 4, "release": True},
    **{"weight": 1e16, "final_weight": 2.0, "weight_steps": 3, "error_bound": 0.1},
    **{"delta": 1 / 3, "sigma": 1e-12, "reversible": False, "checkpoint_every": None},
    **{
        "max_drift": 1e-3,
        "batch_size": 2**40,
        "accumulate": 4,
        "epochs": 9,
        "max_steps": 10,
        "warm_up": 1,
    },
    **{"learning_rate": 5e-324, "weight_decay": 1e-4, "clip_norm": 1e300, "loss_spike": 1.5},
    **{"max_skipped": 1, "max_condition": 1e6, "ema_decay": 0.0, "seed": 2**63, "compile": True},
    **{"cuda_graphs": True, "save_minutes": 0.1, "save_steps": 4, "crop": 148, "channels": 3},
}
TEXTS = [
    *({"data": name, "init_from": name, "classes": name} for name in NAMES.values()),
    {"class_names": list(NAMES.values())},
]
# The same for the options of a further flow.
OTHER_OF_STAGES = {
    **{"dim": 32, "bins": 5, "steps": 3, "width": 9, "weight": 1e22, "final_weight": 0.1},
    **{"weight_steps": 7, "error_bound": 1e-7, "delta": 0.3, "sigma": 0.7, "epochs": 2},
    **{"learning_rate": 1e-05, "max_steps": 5},
}


def choices(cls):
    """Each value of each option that is a choice."""
    kinds = {name: (kind, *get_args(kind)) for name, kind in get_type_hints(cls).items()}
    return [
        {option: choice}
        for option, alternatives in kinds.items()
        for kind in alternatives
        if get_origin(kind) is Literal
        for choice in get_args(kind)
    ]


STAGES = [*({n: v} for n, v in OTHER_OF_STAGES.items()), *choices(StageOptions)]
STAGES += [{"learning_rate": None}]
CHOICES = choices(RunConfig)


@pytest.mark.parametrize(
    "values",
    [
        *({n: v} for n, v in OTHER.items()),
        *({"stages": [StageOptions(), StageOptions(**values)]} for values in STAGES),
        *({"stages": []}, *TEXTS, *CHOICES),
    ],
)
def test_every_option_is_read_back(values, monkeypatch):
    """Checks of values and their combinations are left out: `check` would refuse some of these."""
    monkeypatch.setattr(RunConfig, "check", lambda config: None)
    config = dataclasses.replace(TrainConfig().resolve((1, 28, 28)), **values)
    text = config.to_yaml()
    assert text.isascii()  # the same file under every locale
    assert RunConfig.from_yaml(text, "config.yaml") == config
    assert read_stages(f"[{', '.join(map(str, config.stages))}]") == config.stages


def test_every_option_has_a_value_above():
    values = [{name: value} for name, value in OTHER.items()] + TEXTS + CHOICES + [{"stages": []}]
    named = {name for value in values for name in value}
    assert named == {option.name for option in dataclasses.fields(RunConfig)}
    assert {n for values in STAGES for n in values} == {*vars(StageOptions())}
    for others, default in (
        (OTHER, TrainConfig().resolve((1, 28, 28))),
        (OTHER_OF_STAGES, StageOptions()),
    ):
        assert not [name for name, value in others.items() if getattr(default, name) == value]


def test_a_date_without_quotes_is_text():
    assert parse_config("data: 2024-01-01", "preset") == {"data": "2024-01-01"}


EARLIER = """
stage_dims: [32, 16]
stage_steps: [3]
stage_width: [8, 9]
stage_epochs: []
stage_max_steps: [5]
stage_domain: []
stage_rho: [l1, huber]
stage_weight: []
stage_final_weight: []
stage_weight_steps: []
stage_error_bound: []
stage_delta: []
stage_sigma: []
stage_learning_rate: []
"""


class TestFilesOfEarlierVersions:
    """They have lists of values for the further flows."""

    def read(self, *without: str, lists: str = EARLIER) -> RunConfig:
        """Read a whole configuration of an earlier version, without these options."""
        values = yaml.safe_load(TrainConfig(weight=50.0).resolve((1, 28, 28)).to_yaml())
        values |= yaml.safe_load(lists)
        for name in ("stages", "coupling", "bins", *without):
            del values[name]
        return RunConfig.from_yaml(yaml.safe_dump(values), "config.yaml")

    def test_each_list_has_one_value_for_all_or_one_each_or_none(self):
        shared = StageOptions(coupling="affine", steps=3, max_steps=5, learning_rate=None)
        assert self.read().stages == [
            dataclasses.replace(shared, dim=32, width=8, rho="l1"),
            dataclasses.replace(shared, dim=16, width=9, rho="huber"),
        ]
        assert self.read(lists=EARLIER.replace("[32, 16]", "[]").replace("[8, 9]", "[8]").replace(
            "[l1, huber]", "[]")).stages == []  # fmt: skip

    def test_options_that_came_later_have_the_values_of_before(self):
        added = ("delta", "sigma", "stage_delta", "stage_sigma", "stage_learning_rate")
        flows = self.read(*added).flows
        assert [(f.delta, f.sigma, f.learning_rate) for f in flows] == [(1.0, 0.1, 2e-2)] * 3

    def test_further_flows_have_the_weight_of_images_if_there_are_no_classes(self):
        """The default for --stage-weight was --weight."""
        flows = self.read("classes", "crop", "class_names").flows
        assert [flow.weight for flow in flows] == [50.0, 50.0, 50.0]
        assert [flow.weight for flow in self.read().flows] == [50.0, 1.0, 1.0]

    def test_they_are_presets_with_some_of_the_lists(self):
        def stages(text):
            return parse_config(text, "preset")["stages"]

        affine = StageOptions(coupling="affine")
        both = [dataclasses.replace(affine, dim=dim) for dim in (32, 16)]
        assert stages("stage_dims: [32, 16]") == both
        assert stages("stage_steps: [3]") == [dataclasses.replace(affine, steps=3)]
        assert stages("stage_dims: []") == []

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("stage_steps: 3", "stage_steps: expected a list of 1 or 1, got 3"),
            (
                "stage_dims: [8, 4]\nstage_width: [1, 2, 3]",
                "stage_width: expected a list of 1 or 2",
            ),
            ("stage_dims: [x]", r"stages\[0\]\.dim: expected a whole number, got x"),
            (
                "stages: [{}]\nstage_width: [8]",
                "stage_width: expected its values in the list stages",
            ),
            ("stage_colour: [red]", r"stages\[0\]: expected dim, .*, got colour"),
        ],
    )
    def test_bad_lists(self, text, message):
        with pytest.raises(ValueError, match=f"^own: {message}"):
            parse_config(text, "own")


def test_folders_are_recorded_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(data="faces").resolve((3, 64, 64)).data == str(tmp_path / "faces")


WHOLE = TrainConfig().resolve((1, 28, 28)).to_yaml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE.replace("levels: 2", "levels: two"), "levels: expected a whole number, got two"),
        (WHOLE.replace("levels: 2", "levels: 0"), "levels: expected at least 1, got 0"),
        (WHOLE.replace("channels: 1", "channels: 0"), "channels: expected at least 1, got 0"),
        (
            WHOLE.replace("image_size: 28", "image_size: null"),
            "image_size: expected a whole number",
        ),
        ("stages: 3", "stages: expected a list such as"),
        ("stages: [3]", r"stages\[0\]: expected options such as"),
        ("stages: [{dim: a}]", r"stages\[0\]\.dim: expected a whole number, got a"),
        ("stages: [{}, {stepz: 3}]", r"stages\[1\]: expected dim, .*, got stepz"),
        ("stages: [{steps: [3]}]", "stages: expected a value or a list of values, got deep nest"),
        ("rho: l3", f"rho: expected one of {', '.join(RHOS)}, got l3"),
        ("colour: red", "colour"),
        ("[1, 2]", "expected options and their values, got a list"),
        ("a: [", "flow node"),
        ("[" * 100_000, "got deep nesting"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("levels: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"levels: 2\xff", "invalid start byte"),
        (WHOLE[: WHOLE.index("save_steps")], "expected every option of the run, found no"),
        ("", "expected every option of the run, found no"),
    ],
)
def test_bad_yaml_gives_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        RunConfig.from_yaml(text, "runs/a/config.yaml")
    assert str(caught.value).startswith("runs/a/config.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", range(0, len(WHOLE) - 2, 13))
def test_a_file_cut_off_anywhere_is_not_filled_with_defaults(end):
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
        (32, 12, "huber", "data", 2e-2, 1.0, 1.0, 2.0),
    ]
    assert TrainConfig(weight="variance").flows[1].weight == "variance"
    assert TrainConfig(stages=[StageOptions(weight=3.0)], weight="variance").flows[1].weight == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": {"steps": 0}}, "steps: expected at least 1, got 0"),
        ({"stage": {"width": 0}}, "width: expected at least 1, got 0"),
        ({"stage": {"epochs": 0}}, "epochs: expected at least 1, got 0"),
        ({"stage": {"max_steps": 0}}, "max_steps: expected at least 1, got 0"),
        ({"stage": {"dim": 65}}, "dim: expected dimensions from 1 to the 64 of the stage before"),
        ({"stage": {"bins": 65}}, "bins: expected 2 to 64, got 65"),
        ({"bins": 1}, "bins: expected 2 to 64, got 1"),
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
        options, message = (
            {"stages": [StageOptions(), StageOptions(**options["stage"])]},
            (f"stages[1].{message}"),
        )
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
    """Python 3.13 removes the indentation of docstrings; earlier versions keep it."""
    for options in (ModelOptions, StageOptions, TrainingOptions):
        text = inspect.cleandoc(options.__doc__ or "")
        indented = text.replace("\n", "\n    ")
        monkeypatch.setattr(options, "__doc__", text if clean else indented)
        assert set(argument_texts(options)) == {o.name for o in dataclasses.fields(options)}
