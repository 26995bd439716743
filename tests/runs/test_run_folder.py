"""Run folders: the images that a run records, locks, and what an interrupted run repeats."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, exit_code, listing, refused, start, write_images

from mflow_kernels.data.files import lock_folder, make_folder, remove_temporary
from mflow_kernels.data.manifest import TEST, TRAIN, Manifest
from mflow_kernels.data.splits import load_splits
from mflow_kernels.evaluation.likelihood import held_out_images
from mflow_kernels.runs.changes import changed_options, record_changes
from mflow_kernels.runs.folder import load_run, read_config
from mflow_kernels.training.cli import main


class TestData:
    @pytest.fixture
    def data(self, tmp_path):
        return write_images(tmp_path / "many", count=300)

    def test_no_image_that_was_trained_on_is_evaluated_as_held_out(self, data, tmp_path, capsys):
        run = tmp_path / "run"
        command = ["train", *TINY, "--data", str(data), "--run-dir", str(run)]
        assert main(command) == 0
        then = Manifest.read(run / "images.csv")
        shutil.copy(write_images(tmp_path / "one", count=1, seed=7) / "000.png", data / "000a.png")
        capsys.readouterr()
        assert main(["reconstruct", str(run)]) == 0
        message = capsys.readouterr().err
        assert "its data has changed: 1 image added (000a.png)" in message
        assert "using 30 of the 30 images that the run held out" in message
        found = held_out_images(load_run(str(run)), None).images
        before = load_splits(str(data), 8)
        names = {n for n, part in zip(then.names, then.parts, strict=True) if part == TEST}
        wanted = [row for row, name in enumerate(before.manifest.names) if name in names]
        assert torch.equal(found.batch(range(30)), before.images.batch(wanted))
        # Today's split would have taken images that were trained on.
        today = [n for n, p in zip(before.manifest.names, before.manifest.parts, strict=True) if p]
        trained = {n for n, part in zip(then.names, then.parts, strict=True) if part == TRAIN}
        assert trained & set(today)
        for path in sorted(data.iterdir())[:200]:
            path.unlink()
        message = refused([*command, "--resume"], tmp_path, capsys)
        assert (
            "--data: expected the images that the run was trained on, but these differ: " in message
        )
        assert "1 image added" not in message  # it is among those that were deleted
        assert "missing (000.png, 001.png, 002.png, ...)" in message

    def test_a_run_that_recorded_no_images(self, run, capsys):
        (run / "images.csv").unlink()
        assert main(["reconstruct", str(run)]) == 0
        assert (
            "has no images.csv: the model may have been trained on these images"
            in capsys.readouterr().err
        )


class TestChanges:
    """Options that change when a run resumes."""

    def test_each_resume_adds_its_own(self, run):
        for step, budget in ((6, 5), (8, 7)):
            config = read_config(run)
            wanted = dataclasses.replace(config, max_steps=budget)
            record_changes(run, wanted, changed_options(wanted, config), step)
        rows = ["step,option,before,after", "6,max_steps,3,5", "8,max_steps,5,7"]
        assert (run / "changes.csv").read_text().splitlines() == rows
        assert read_config(run).max_steps == 7

    @pytest.mark.parametrize("change", [{"width": 16}, {"classes": "labels"}, {"image_size": None}])
    def test_data_and_model_stay(self, change, trained):
        config = read_config(trained)
        with pytest.raises(ValueError, match=f"^{next(iter(change))}: cannot change on resume"):
            changed_options(dataclasses.replace(config, **change), config)


class TestPlan:
    @pytest.mark.parametrize("count", [12, 2])
    def test_batches_that_a_later_stage_cannot_start_from(self, count, tmp_path, capsys):
        data = write_images(tmp_path / "data", count=count)
        command = ["train", *TINY, "--data", str(data), "--run-dir", str(tmp_path / "run")]
        command += ["--batch-size", "1"] if count > 2 else []
        message = refused(command, tmp_path, capsys)
        assert "--batch-size: expected at least 2 images in a step, because stage 2" in message

    def test_one_image_is_enough_for_the_image_flow(self, command):
        assert main([*command, "--batch-size", "1", "--stages", "[]"]) == 0


class TestFolders:
    @pytest.mark.parametrize(
        ("folder", "message"),
        [
            ("file/run", "file is a file"),
            ("file", "expected a folder, but"),
            (f"{'x' * 300}/run", "File name too long"),
            ("x" * 300, "File name too long"),
            ("loop/run", "loop"),
            ("a\0b", "null"),
        ],
    )
    def test_impossible_run_folders(self, folder, message, command, tmp_path, capsys):
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "loop").symlink_to("loop")
        path = str(tmp_path / folder)
        command += ["--run-dir", path]
        assert message in refused(command, tmp_path, capsys)
        for option in ("--overwrite", "--resume"):
            assert "--run-dir: " in refused([*command, option], tmp_path, capsys)
        exports = ["export", path, "--out"]
        for reads in (["sample", path], ["evaluate", path], [*exports, str(tmp_path / "out")]):
            line = refused(reads, tmp_path, capsys)
            assert "run: expected a folder of mflow train with config.yaml, got " in line
        refused([*exports, path], tmp_path, capsys)

    def test_the_longest_name_that_a_folder_may_have(self, command, tmp_path):
        assert main([*command, "--run-dir", str(tmp_path / ("x" * 255))]) == 0

    @pytest.mark.parametrize("error", ["EROFS", "EACCES", "ENOSPC"])
    def test_a_disk_that_cannot_be_written(self, error, command, tmp_path, monkeypatch, capsys):
        number = getattr(errno, error)
        mkdir = Path.mkdir

        def refuse(self, *args, **kwargs):
            if self.is_relative_to(tmp_path):  # the cache is on another disk
                raise OSError(number, os.strerror(number), str(self))
            mkdir(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
        message = refused(command, tmp_path, capsys, code=1 if error == "ENOSPC" else 2)
        assert os.strerror(number) in message
        assert not (tmp_path / "run").exists()

    def test_overwrite_replaces_what_a_link_leads_to(self, run, command, tmp_path):
        link = tmp_path / "link"
        link.symlink_to(run)
        (run / "stray.txt").write_text("old")
        assert main([*command, "--run-dir", str(link), "--overwrite"]) == 0
        assert link.is_symlink()
        assert "stray.txt" not in listing(run)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run"]

    def test_leftovers_of_killed_processes_are_removed(self, command, tmp_path):
        for name in (".run.1234567.tmp", ".run.1234567.old"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.yaml").write_text("")
        (tmp_path / ".run.notes").mkdir()
        assert main(command) == 0
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"run", ".run.notes"}

    def test_a_failed_replacement_leaves_the_old_run(self, run, command, monkeypatch, capsys):
        rename = Path.rename

        def fail(self, target):
            if target == run:
                monkeypatch.setattr(Path, "rename", rename)
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        before = listing(run.parent)
        line = refused([*command, "--overwrite"], run / "tensorboard", capsys, code=1)
        assert "No space left on device" in line
        assert listing(run.parent) == before


class TestTwoProcesses:
    @pytest.mark.parametrize("option", ["--resume", "--overwrite"])
    def test_train(self, option, run, command, capsys):
        lock = lock_folder(run, "")
        line = refused([*command, option], run, capsys)
        assert "--run-dir: another process is writing to" in line
        assert main(["sample", str(run), "--number", "1"]) == 0  # needs no lock
        lock.release()

    def test_two_runs_that_start_at_once(self, command):
        children = [start(command), start(command)]
        assert sorted(map(exit_code, children)) == [0, 2]

    def test_evaluate(self, run, capsys):
        (run / "report").mkdir()
        lock = lock_folder(run / "report", "")
        assert "--out: another process is writing to" in refused(
            ["evaluate", str(run)], run, capsys
        )
        assert not (run / "report" / "report.html").exists()
        lock.release()

    def test_a_folder_that_appears_meanwhile(self, tmp_path):
        folder = tmp_path / "new"

        def fill(temporary):
            folder.mkdir()
            (folder / "file of another process").write_text("1")

        with pytest.raises(ValueError, match=r"out: expected a new folder, but .* exists"):
            make_folder(folder, fill, "out")
        assert listing(tmp_path) == ["new", "new/file of another process"]

    def test_the_temporary_file_of_a_running_process_stays(self, tmp_path):
        running, dead = tmp_path / f".a.{os.getppid()}.tmp", tmp_path / ".a.1234567.tmp"
        for path in (running, dead):
            path.write_text("")
        remove_temporary(tmp_path)
        assert listing(tmp_path) == [running.name]
