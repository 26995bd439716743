"""Options that may change when a run resumes, and runs that start from another run's weights."""

import shutil

import pytest
import torch
from tiny_runs import assert_same_run, checkpoint, logged, refused, spy, train_until, weights

from mflow_kernels.runs.folder import read_config
from mflow_kernels.training.cli import main
from mflow_kernels.training.module import FlowTraining


class TestChanges:
    def test_a_finished_run_is_lengthened(self, run, capsys):
        resume = ["train", "--run-dir", str(run), "--resume"]
        assert main([*resume, "--max-steps", "5"]) == 0
        message = capsys.readouterr().err
        assert "from step 6 on: --max-steps 3 -> 5" in message
        assert "continuing from step 6 of 8, in stage 2" in message
        assert checkpoint(run)["global_step"] == 8
        assert logged(run, "stage") == [0, 0, 0, 1, 1, 1, 1, 1]
        assert read_config(run).max_steps == 5
        assert (run / "changes.csv").read_text().splitlines()[1:] == ["6,max_steps,3,5"]
        assert main(resume) == 0
        assert "has taken all of its 8 steps; larger --stage-epochs" in capsys.readouterr().err
        assert checkpoint(run)["global_step"] == 8

    def test_rate_budget_and_batch_size_change_from_the_next_step_on(
        self, command, trained, tmp_path, monkeypatch, capsys
    ):
        folder = tmp_path / "run"
        train_until(4, [*command, "--save-steps", "1"], monkeypatch)
        seen = []
        spy(
            monkeypatch, FlowTraining, "training_step", lambda _, batch, __: seen.append(len(batch))
        )
        changes = "--learning-rate 1e-4 --schedule constant --batch-size 3 --stage-max-steps 4"
        assert main(["train", "--run-dir", str(folder), "--resume", *changes.split()]) == 0
        assert seen == [3, 3, 3]
        assert logged(folder, "stage") == [0, 0, 0, 1, 1, 1, 1]
        assert logged(folder, "learning_rate")[:4] == logged(trained, "learning_rate")[:4]
        assert logged(folder, "learning_rate")[4:] == pytest.approx([1e-4] * 3)
        message = capsys.readouterr().err
        for line in ("--learning-rate 0.002 -> 0.0001", "--batch-size 4 -> 3"):
            assert f"from step 4 on: {line}" in message
        assert "--stages[0].max_steps null -> 4" in message

    def test_a_changed_run_resumes_with_the_same_bits(self, run, tmp_path, monkeypatch):
        """The change comes at step 6, in the middle of a pass; the interruption, at step 9."""
        changes = ["--stage-max-steps", "9", "--batch-size", "3"]
        other = shutil.copytree(run, tmp_path / "other")
        resume = ["train", "--run-dir", str(run), "--resume"]
        train_until(9, [*resume, *changes, "--save-steps", "1"], monkeypatch)
        assert main(resume) == 0
        assert main(["train", "--run-dir", str(other), "--resume", *changes]) == 0
        assert checkpoint(run)["global_step"] == 12
        assert_same_run(run, other)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--width 16", "--width: cannot change on resume (the run has 8, got 16); --learning-"),
            ("--stage-steps 2", "--stage-steps: cannot change on resume (the run has 1, got 2)"),
            ("--stages [{},{}]", "--stages: cannot change on resume (the run has 1, got 2)"),
        ],
    )
    def test_the_refusal_lists_what_may_change(self, options, message, run, tmp_path, capsys):
        resume = ["train", "--run-dir", str(run), "--resume", *options.split()]
        assert message in refused(resume, tmp_path, capsys)


class TestInitFrom:
    @pytest.mark.parametrize("source", ["run", "export"])
    def test_training_starts_from_the_averaged_weights(
        self, source, trained, command, tmp_path, monkeypatch
    ):
        """Actnorm's weights are copied too: an initialized stage is not initialized again."""
        folder = trained if source == "run" else tmp_path / "export"
        if source == "export":
            assert main(["export", str(trained), "--out", str(folder)]) == 0
        first = []

        def note(training, *args):
            if training._step_in_stage(training.stage) == 0:
                state = training.model.stages[training.stage].flow.state_dict()
                first.append({name: value.clone() for name, value in state.items()})

        spy(monkeypatch, FlowTraining, "training_step", note)
        options = ["--init-from", str(folder), "--seed", "1", "--weight", "variance"]
        assert main([*command, *options]) == 0
        saved = weights(trained)
        for stage, state in enumerate(first):
            for name, value in state.items():
                key = f"average.model.stages.{stage}.flow.{name}"
                assert torch.equal(value, saved[key]), key
        assert main(["sample", str(tmp_path / "run"), "--number", "1"]) == 0

    def test_it_may_have_other_stages(self, trained, command, tmp_path, capsys):
        command = [*command, "--init-from", str(trained), "--overwrite"]
        for stages in ("[{}, {}]", "[]"):
            assert main([*command, "--stages", stages]) == 0
        smaller = [*command, "--manifold-dim", "5"]  # selects other latents of the same flow
        assert "stage 2 differs" in refused(smaller, tmp_path, capsys)
        assert main([*smaller, "--stages", "[]"]) == 0

    def test_before_the_first_checkpoint_a_resumed_run_starts_there_again(
        self, trained, command, tmp_path, monkeypatch
    ):
        command = [*command, "--init-from", str(trained)]
        train_until(0, command, monkeypatch)
        assert not (tmp_path / "run" / "last.ckpt").exists()
        assert main(["train", "--run-dir", str(tmp_path / "run"), "--resume"]) == 0
        whole = weights(tmp_path / "run")
        assert main([*command, "--overwrite"]) == 0
        torch.testing.assert_close(weights(tmp_path / "run"), whole, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--width 16", "but stage 1 differs ("),
            ("--stage-width 16", "but stage 2 differs ("),
            ("--steps 2", "no such weight there)"),
            ("--init-from nowhere", "--init-from: expected a folder of mflow train"),
        ],
    )
    def test_another_architecture_is_refused_by_name(
        self, options, message, trained, command, tmp_path, capsys
    ):
        command = [*command, "--init-from", str(trained), *options.split()]
        assert message in refused(command, tmp_path, capsys)


class TestPreset:
    def test_the_configuration_of_a_run_is_a_preset(self, trained, tmp_path, capsys):
        preset = ["--preset", str(trained / "config.yaml")]
        assert main(["train", *preset, "--run-dir", str(tmp_path / "again")]) == 0
        torch.testing.assert_close(weights(tmp_path / "again"), weights(trained), rtol=0, atol=0)
        capsys.readouterr()
        assert main(["plan", *preset, "--images", "10"]) == 0
        assert "8x8" in capsys.readouterr().out
