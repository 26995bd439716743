import pytest

from mflow_kernels.training.config import RunConfig, TrainConfig


def test_a_resolved_configuration_survives_its_yaml():
    config = TrainConfig(stage_dims=[32, 16], max_steps=7, domain="latent", seed=3)
    resolved = config.resolve((1, 28, 28))
    assert resolved.image_shape == (1, 28, 28)
    assert RunConfig.from_yaml(resolved.to_yaml()) == resolved


def test_folders_are_recorded_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(data="faces").resolve((3, 64, 64)).data == str(tmp_path / "faces")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("levels: two", "levels: expected a whole number, got two"),
        ("levels: 0", "levels: expected at least 1, got 0"),
        ("stage_dims: [a]", "stage_dims: expected a whole number, got a"),
        ("rho: l3", "rho: expected one of l2, l1, huber, got l3"),
        ("colour: red", "colour"),
        ("[1, 2]", "config.yaml"),
        ("a: [", "config.yaml"),
    ],
)
def test_bad_yaml_is_told_in_one_line(text, told):
    with pytest.raises(ValueError, match=told) as caught:
        RunConfig.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_max_steps_take_the_place_of_epochs():
    assert TrainConfig(epochs=3).steps_per_stage(batches_per_pass=10) == 30
    assert TrainConfig(epochs=3, max_steps=7).steps_per_stage(batches_per_pass=10) == 7


def test_the_default_folder_tells_runs_apart():
    names = {
        TrainConfig(**options).default_run_dir()
        for options in ({}, {"manifold_dim": 32}, {"seed": 1}, {"image_size": 32}, {"data": "a/b"})
    }
    assert len(names) == 5
    assert "runs/b-d64-seed0" in names
