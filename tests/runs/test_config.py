import dataclasses
import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hostile_names import NAMES

from mflow_kernels.ops.penalty_functions import RHOS
from mflow_kernels.ops.penalty_functions import Rho as OperatorRho
from mflow_kernels.runs.arguments import argument_texts, parse_config
from mflow_kernels.runs.config import RunConfig, TrainConfig
from mflow_kernels.runs.options import ModelOptions, Rho, TrainingOptions


def test_the_command_line_offers_every_rho():
    """`runs.options` repeats the names, because it does not import torch."""
    assert RHOS == get_args(OperatorRho) == get_args(Rho)


def test_a_configuration_is_read_back_from_its_yaml():
    config = TrainConfig(data="celeba", classes="Smiling,Male", stage_dims=[32, 16], max_steps=7)
    resolved = config.resolve((3, 64, 64), 148, ("not Smiling", "yes: no", "3"))
    read = RunConfig.from_yaml(resolved.to_yaml(), "config.yaml")
    assert read == resolved
    assert (read.image_shape, read.stage_dims) == ((3, 64, 64), [32, 16])
    assert (read.crop, read.class_names) == (148, ["not Smiling", "yes: no", "3"])


# A value other than the default for each option that is neither text nor a choice.
OTHER = {
    **{"image_size": 64, "n_bits": 5, "flips": True, "levels": 3, "steps": 5, "width": 65},
    **{"manifold_dim": 63, "stage_dims": [32, 16], "stage_steps": [3], "stage_width": [8, 9]},
    **{"stage_epochs": [1, 2], "stage_max_steps": [5], "stage_domain": ["data"]},
    **{"stage_rho": ["l1", "huber"], "stage_weight": [1e-30, 1e22], "stage_final_weight": [0.1]},
    **{"stage_weight_steps": [7], "stage_error_bound": [1e-7], "stage_delta": [0.3]},
    **{"stage_sigma": [0.7], "stage_learning_rate": [1e-05, 3e4], "release": True},
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
CHOICES = [
    {option: choice}
    for option, kind in get_type_hints(RunConfig).items()
    if get_origin(kind) is Literal
    for choice in get_args(kind)
]


@pytest.mark.parametrize("values", [*({n: v} for n, v in OTHER.items()), *TEXTS, *CHOICES])
def test_every_option_is_read_back(values, monkeypatch):
    """Checks of values and their combinations are left out: `check` would refuse some of these."""
    monkeypatch.setattr(RunConfig, "check", lambda config: None)
    config = dataclasses.replace(TrainConfig().resolve((1, 28, 28)), **values)
    text = config.to_yaml()
    assert text.isascii()  # the same file under every locale
    assert RunConfig.from_yaml(text, "config.yaml") == config


def test_every_option_has_a_value_above():
    values = [{name: value} for name, value in OTHER.items()] + TEXTS + CHOICES
    named = {name for value in values for name in value}
    assert named == {option.name for option in dataclasses.fields(RunConfig)}
    default = TrainConfig().resolve((1, 28, 28))
    assert not [name for name, value in OTHER.items() if getattr(default, name) == value]


def test_a_date_without_quotes_is_text():
    assert parse_config("data: 2024-01-01", "preset") == {"data": "2024-01-01"}


def test_further_flows_of_earlier_versions_have_the_weight_of_images():
    """Their files have no classes, and their default for --stage-weight was --weight."""
    lines = TrainConfig(weight=50.0).resolve((1, 28, 28)).to_yaml().splitlines(keepends=True)
    added = ("classes:", "crop:", "class_names:")
    older = "".join(line for line in lines if not line.startswith(added))
    assert [s.weight for s in RunConfig.from_yaml(older, "config.yaml").stages] == [50.0, 50.0]
    newer = RunConfig.from_yaml("".join(lines), "config.yaml")
    assert [s.weight for s in newer.stages] == [50.0, 1.0]


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
        ("stage_dims: [a]", "stage_dims: expected a whole number, got a"),
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


def test_a_file_of_an_earlier_version_has_the_scales_of_that_version():
    lines = WHOLE.splitlines()
    added = ("delta", "sigma", "stage_delta", "stage_sigma")
    old = [line for line in lines if line.split(":")[0] not in added]
    assert len(old) == len(lines) - len(added)
    config = RunConfig.from_yaml("\n".join(old), "config.yaml")
    assert [(s.delta, s.sigma) for s in config.stages] == [(1.0, 0.1), (1.0, 0.1)]


def test_max_steps_take_the_place_of_epochs():
    def budgets(**options):
        return [s.optimizer_steps(batches_per_pass=10) for s in TrainConfig(**options).stages]

    assert budgets(epochs=3) == [30, 30]
    assert budgets(epochs=3, max_steps=7) == [7, 7]
    two = {"stage_dims": [8, 4], "max_steps": 7}
    assert budgets(**two, stage_epochs=[2]) == [7, 20, 20]
    assert budgets(**two, stage_max_steps=[5, 6]) == [7, 5, 6]


def test_stages_take_one_value_for_all_or_one_each_or_those_of_the_image_flow():
    config = TrainConfig(
        stage_dims=[32, 16],
        stage_steps=[3],
        stage_width=[8, 9],
        stage_rho=["l1", "huber"],
        stage_learning_rate=[0.03, 0.001],
        weight=7.0,
        domain="data",
        stage_domain=["latent"],
    )
    config.check()
    image, *further = config.stages
    assert (image.dim, image.steps, image.rho, image.domain) == (64, 4, "l2", "data")
    found = [(s.dim, s.steps, s.width, s.rho, s.weight, s.domain) for s in further]
    assert [s.learning_rate for s in config.stages] == [2e-2, 0.03, 0.001]
    own = TrainConfig(learning_rate=0.5, stage_learning_rate=[])
    assert [s.learning_rate for s in own.stages] == [0.5, 0.5]
    # u has unit variance, which the weight of images does not fit.
    assert found == [(32, 3, 8, "l1", 1.0, "latent"), (16, 3, 9, "huber", 1.0, "latent")]
    assert [s.delta for s in config.stages] == [0.1, 2.0, 2.0]  # nor do deltas of images
    assert TrainConfig(weight="variance").stages[1].weight == "variance"
    assert TrainConfig(stage_weight=[3.0]).stages[1].weight == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stage_width": [1, 2, 3]},
            "stage_width: expected one value, or 2 as in stage_dims, got 3",
        ),
        ({"stage_steps": []}, "stage_steps: expected at least one value, got none"),
        ({"stage_epochs": [0]}, "stage_epochs: expected at least 1, got 0"),
        ({"stage_weight": [1.0, -1.0]}, "stage_weight: expected a finite number > 0, got -1"),
        ({"stage_learning_rate": [0.1, 0.0]}, "stage_learning_rate: expected a finite number"),
        ({"stage_weight": ["variance"], "stage_domain": ["latent"]}, "stage_weight: expected a"),
        ({"weight": "variance", "error_bound": 0.1}, "weight: expected a number with a final weig"),
        ({"error_bound": 0.0}, "error_bound: expected a finite number > 0, got 0"),
        ({"error_bound": 0.1, "domain": "latent"}, "error_bound: expected none in the latent dom"),
        (
            {"error_bound": 0.1, "final_weight": 2.0, "weight_steps": 3},
            "error_bound: expected none together with final_weight",
        ),
        ({"final_weight": 2.0}, "final_weight: expected weight_steps too, got none"),
        (
            {"stage_weight_steps": [2]},
            "stage_weight_steps: expected stage_final_weight too, got none",
        ),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number > 0, got inf"),
        ({"final_weight": 2.0, "weight_steps": 0}, "weight_steps: expected at least 1, got 0"),
        ({"stage_delta": [0.0]}, "stage_delta: expected a finite number > 0, got 0"),
        ({"weight": "variance", "domain": "latent"}, "weight: expected a number in the latent"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 to less than 1, got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm: expected a finite number > 0, got 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(stage_dims=[8, 4], **options).check()


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
    for options in (ModelOptions, TrainingOptions):
        text = inspect.cleandoc(options.__doc__ or "")
        indented = text.replace("\n", "\n    ")
        monkeypatch.setattr(options, "__doc__", text if clean else indented)
        assert set(argument_texts(options)) == {o.name for o in dataclasses.fields(options)}
