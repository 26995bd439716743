"""Reversible training: its options, its limit of drift, and the condition of its weights."""

import pytest
import torch
from tiny_runs import metrics, spy, weights

from mflow_kernels import InvertibleConv1x1, ReversibleChain
from mflow_kernels.runs.folder import load_run, read_config
from mflow_kernels.training import module
from mflow_kernels.training.cli import main
from mflow_kernels.training.guard import StepGuard


@pytest.mark.parametrize(
    ("options", "reversible", "every"),
    [(["--no-reversible"], False, 8), (["--checkpoint-every", "null"], True, None)],
)
def test_options_reach_every_chain(options, reversible, every, command, trained, tmp_path):
    """Rebuilt and stored states give the same losses."""
    assert main([*command, *options]) == 0
    config = read_config(tmp_path / "run")
    assert (config.reversible, config.checkpoint_every) == (reversible, every)
    model = load_run(str(tmp_path / "run")).model
    chains = [m for m in model.modules() if isinstance(m, ReversibleChain)]
    assert [(c.reversible, c.checkpoint_every) for c in chains] == [(reversible, every)] * 2
    rows, rebuilt = (metrics(f, "loss_bits_per_dim") for f in (tmp_path / "run", trained))
    assert all(float(row["drift"]) < 1e-4 for row in rebuilt)
    assert [bool(row["drift"]) for row in rows] == [reversible] * 6
    # Only the image flow is compared: a vector flow initialized from four points has gradients that
    # are rounding errors, and Adam's first steps magnify them.
    losses, expected = ([float(r["loss_bits_per_dim"]) for r in of[:3]] for of in (rows, rebuilt))
    assert losses == pytest.approx(expected, rel=1e-4)


def drift_at(patch, step, drift):
    """Make the chains report this drift in one step of a run."""
    calls = []
    original = StepGuard.judge

    def judge(self, loss, norm, measured):
        calls.append(1)
        return original(self, loss, norm, measured if len(calls) <= step else torch.tensor(drift))

    patch.setattr(StepGuard, "judge", judge)


@pytest.mark.parametrize("drift", [0.02, float("nan"), float("inf")])
def test_drift_stops_before_its_gradients_are_used(drift, command, tmp_path, monkeypatch, capsys):
    stepped = []
    with monkeypatch.context() as patch:
        spy(patch, torch.optim.AdamW, "step", lambda *_: stepped.append(1))
        drift_at(patch, 4, drift)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert f"rebuilt states drifted by {drift:.2g} at step 4 (stage 2), more than" in error
    assert "--max-drift 0.01" in error
    assert "--checkpoint-every 4 or --no-reversible" in error
    assert len(stepped) == 4
    # The resumed run records the changed option, so that a further resume keeps it.
    assert main([*command, "--resume", "--checkpoint-every", "4"]) == 0
    assert read_config(tmp_path / "run").checkpoint_every == 4


def test_the_threshold_is_an_option(command, monkeypatch, capsys):
    drift_at(monkeypatch, 1, 0.02)
    assert main([*command, "--max-drift", "0.03"]) == 0
    assert main([*command, "--overwrite", "--checkpoint-every", "1", "--max-drift", "1e-3"]) == 1
    assert "--checkpoint-every 1 or" not in capsys.readouterr().err


def test_the_drift_of_both_passes_counts(command, monkeypatch, capsys):
    recorded = []
    original = ReversibleChain.record_drift

    def record(self, drift):
        # The backward pass reaches the inverse pass first. Its drift must not be overwritten.
        recorded.append(self)
        original(self, drift + (0.5 if self not in recorded[:-1] else 0.0))

    monkeypatch.setattr(ReversibleChain, "record_drift", record)
    assert main(command) == 1
    assert "drifted by 0.5 at step 0" in capsys.readouterr().err
    assert len(recorded) == 2


def test_conditions_are_logged(trained):
    logged = metrics(trained, "condition")
    assert len(logged) >= 2
    for row in logged:
        assert row["heldout_bits_per_dim"]
        assert 1 <= float(row["condition"]) < 2  # three steps from a rotation
        assert float(row["folded_condition"]) >= 1


def conditions(folder):
    model = load_run(str(folder)).model
    return [
        float(m.condition_number()) for m in model.modules() if isinstance(m, InvertibleConv1x1)
    ]


def test_the_condition_is_bounded(command, trained, tmp_path, monkeypatch):
    limit = 1 + (max(conditions(trained)) - 1) / 10
    monkeypatch.setattr(module, "_BOUND_EVERY", 1)
    bounded = [*command, "--max-condition", str(limit)]
    assert main(bounded) == 0
    assert max(conditions(tmp_path / "run")) < limit * (1 + 1e-5) < max(conditions(trained))
    whole = weights(tmp_path / "run")
    # A run that resumes starts from bounded weights too.
    with monkeypatch.context() as patch:
        drift_at(patch, 5, 1.0)
        assert main([*bounded, "--overwrite"]) == 1
    assert main([*bounded, "--resume"]) == 0
    torch.testing.assert_close(weights(tmp_path / "run"), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("domain", "first_message"),
    [
        ("data", "the loss is nan at step 1 (stage 1); a lower --learning-rate may help"),
        ("latent", "rebuilt states drifted by nan at step 1 (stage 1)"),
    ],
)
def test_weights_without_an_inverse(domain, first_message, command, capsys):
    wild = ["--learning-rate", "1000", "--max-steps", "30", "--domain", domain]
    capsys.readouterr()
    # In the latent domain nothing is inverted before the pictures are drawn.
    assert main([*command, *wild, "--no-reversible", "--max-skipped", "1000"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("mflow: error: training diverged (")
    assert message.endswith("a lower --learning-rate may help")
    assert main([*command, *wild, "--overwrite"]) == 1
    assert first_message in capsys.readouterr().err
