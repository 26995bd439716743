"""Files that commands read, when torn, inconsistent or hostile. Each gives one line on stderr and
exit code 2, and nothing is written."""

import json
import math
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, refused

from mflow_kernels import HierarchicalFlow
from mflow_kernels.models.pretrained import ARCHITECTURE, WEIGHTS
from mflow_kernels.runs.checkpoints import Expected, newest_checkpoint, read_checkpoint
from mflow_kernels.runs.folder import build_model, checkpoint_tensors, initialize_from, read_config
from mflow_kernels.training.cli import main
from mflow_kernels.training.coupling_networks import parameter_groups

DEEP = 100_000
BYTES = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "binary": lambda whole: bytes(range(256)) * 8,
    "not UTF-8": lambda whole: b"\xff\xfe" + whole,
    "deep list": lambda whole: b"[" * DEEP,
    "deep mapping": lambda whole: b'{"a":' * DEEP,
    "long number": lambda whole: b"levels: " + b"9" * 5000,
    "code": lambda whole: b"!!python/object/apply:os.system [touch trapped]",
    "aliases": lambda whole: b"a: &a [1]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
    ),
    "other columns": lambda whole: b"a,b\r\n1,2\r\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(trained):
    return torch.load(trained / "last.ckpt", weights_only=True)


RUN_FILES = ("config.yaml", "metrics.csv", "images.csv", "last.ckpt")


@pytest.mark.parametrize("kind", BYTES)
def test_files_of_a_run(kind, run, capsys):
    """--resume reads all of these files."""
    (run / "previous.ckpt").unlink()
    resume = ["train", "--run-dir", str(run), "--resume"]
    for name in RUN_FILES:
        path = run / name
        before = path.read_bytes()
        path.write_bytes(BYTES[kind](before))
        # A crash may cut off the metrics, so their whole rows are still read.
        if not (name == "metrics.csv" and kind in ("empty", "half", "zeros")):
            assert name in refused(resume, run, capsys)
        if name in ("config.yaml", "last.ckpt"):
            for command in ("sample", "reconstruct", "evaluate"):
                assert name in refused([command, str(run)], run, capsys)
        path.write_bytes(before)


def test_folders_and_pipes_in_place_of_files(run, tmp_path, capsys):
    (run / "previous.ckpt").unlink()
    for name in RUN_FILES:
        path = (run / name).rename(tmp_path / "kept")
        (run / name).mkdir()
        refused(["train", "--run-dir", str(run), "--resume"], run, capsys)
        (run / name).rmdir()
        if name == "last.ckpt":
            assert "last.ckpt, found none" in refused(["sample", str(run)], run, capsys)
        path.rename(run / name)
    os.mkfifo(tmp_path / "pipe.yaml")
    for preset in ("pipe.yaml", "own\0.yaml"):
        refused(["train", "--preset", str(tmp_path / preset)], run, capsys)


@pytest.mark.parametrize("kind", BYTES)
def test_presets(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_bytes(BYTES[kind](b"levels: [8, 8, 8, 8"))
    if kind == "empty":  # no option is set
        assert main(["plan", *TINY, "--preset", "own.yaml"]) == 0
    else:
        command = ["train", "--preset", "own.yaml"]
        assert "--preset: own.yaml: " in refused(command, tmp_path, capsys)


@pytest.mark.parametrize("cell", ["x", "-1", "1e3", ""])
def test_metrics_with_a_row_that_training_did_not_write(cell, run, capsys):
    path = run / "metrics.csv"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, cell + second[1:], *rest]) + "\n")
    message = refused(["train", "--run-dir", str(run), "--resume"], run, capsys)
    assert "metrics.csv, line 2: expected a step and its metrics" in message


KEYS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def guarded(state, tensor):
    return state | {"state_dict": state["state_dict"] | {"guard.state": tensor}}


def moments(state, value):
    return state | {"optimizer_states": [{"state": value}]}


def progress(state, **values):
    return state | {"progress": state["progress"] | values}


class Trap:
    def __reduce__(self):
        return open, ("trapped", "w")


CRAFTED = {
    "code": lambda s: s | {"trap": Trap()},
    "a list": lambda s: [s],
    "a list for the weights": lambda s: s | {"state_dict": [1, 2]},
    "numbers for weights": lambda s: s | {"state_dict": dict.fromkeys(s["state_dict"], 1)},
    "keys of two types": lambda s: s | {"state_dict": {1: 1, "a": 2}},
    "sparse": lambda s: guarded(s, torch.zeros(5).to_sparse()),
    "another dtype": lambda s: guarded(s, torch.zeros(5)),
    "step a string": lambda s: s | {"global_step": "6"},
    "step a float": lambda s: s | {"global_step": 6.0},
    "step a bool": lambda s: s | {"global_step": True},
    "step negative": lambda s: s | {"global_step": -1},
    "step beyond the end": lambda s: s | {"global_step": 10**12},
    "no optimizer": lambda s: {k: v for k, v in s.items() if k != "optimizer_states"},
    "two optimizers": lambda s: s | {"optimizer_states": 2 * s["optimizer_states"]},
    "an empty optimizer": lambda s: moments(s, {}),
    "moments a list": lambda s: moments(s, [1]),
    "a moment too many": lambda s: moments(s, {10**6: {}}),
    "moments of another shape": lambda s: moments(s, {0: dict.fromkeys(KEYS, torch.zeros(()))}),
    "progress a list": lambda s: s | {"progress": [1]},
    "progress of another step": lambda s: progress(s, step=5),
    "a stage too many": lambda s: progress(s, begins=[0, 3, 4]),
    "a stage to come": lambda s: progress(s, begins=[0, 6]),
    "stages out of order": lambda s: progress(s, begins=[3, 0]),
    "passes over zero": lambda s: progress(s, passes=[1, 0]),
    "passes that are text": lambda s: progress(s, passes="11"),
    "a position beyond the images": lambda s: progress(s, position=[0, 11]),
    "a position of huge numbers": lambda s: progress(s, position=[10**400, 0]),
    "scaler a list": lambda s: s | {"grad_scaler": [1]},
    "scaler of strings": lambda s: s | {"grad_scaler": {"scale": "1"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(trained):
    model = build_model(read_config(trained))
    groups = [group for stage in model.stages for group in parameter_groups(stage)]
    return Expected(checkpoint_tensors(model), [(p, 2) for group in groups for p in group], 2, 10)


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_checkpoints(kind, whole, expected, run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    torch.save(CRAFTED[kind](whole), run / "last.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint: expected .*last\.ckpt") as caught:
        read_checkpoint(run / "last.ckpt", expected)
    assert "\n" not in str(caught.value)
    found = newest_checkpoint(run, expected)
    assert (found.path.name, found.step) == ("previous.ckpt", 4)
    assert "using previous.ckpt of step 4" in capsys.readouterr().err
    assert not (run / "trapped").exists()


def test_weights_that_are_not_finite_reach_no_picture(whole, run, capsys):
    name = next(n for n in whole["state_dict"] if n.startswith("average.") and "weight" in n)
    broken = whole["state_dict"] | {name: whole["state_dict"][name] * math.nan}
    torch.save(whole | {"state_dict": broken}, run / "last.ckpt")
    assert main(["sample", str(run), "--number", "1"]) == 0  # from the checkpoint before
    assert "values that are not finite); using previous.ckpt" in capsys.readouterr().err
    (run / "previous.ckpt").unlink()
    assert "values that are not finite" in refused(["sample", str(run)], run, capsys)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "model"
    assert main(["export", str(trained), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def export(exported):
    before = {name: (exported / name).read_bytes() for name in (ARCHITECTURE, WEIGHTS)}
    yield exported
    for name, content in before.items():
        (exported / name).write_bytes(content)


def refuses(export, message=""):
    with pytest.raises(ValueError, match=f"^folder: .*{message}") as caught:
        HierarchicalFlow.from_pretrained(export)
    assert "\n" not in str(caught.value)


def with_values(*path, **values):
    """Change values of one part of the architecture in an export's JSON."""

    def change(data):
        whole = json.loads(data)
        part = whole["model"]
        for name in path:
            part = part[name]
        part.update(values)
        return json.dumps(whole).encode()

    return change


GLOW = ("stages", 0, "flow")


EXPORTS = {
    "torn": (WEIGHTS, lambda data: data[:-10], "expected a valid model.safetensors"),
    "a zip": (WEIGHTS, lambda data: b"PK\3\4" + data[4:], "expected a valid model.safetensors"),
    "another width": (ARCHITECTURE, with_values(*GLOW, width=9), "its shape differs"),
    "endless": (ARCHITECTURE, with_values(*GLOW, steps=10**9), "no more steps than there"),
    "fractional": (ARCHITECTURE, with_values(*GLOW, levels=1.5), "levels: expected a whole number"),
    "indivisible": (ARCHITECTURE, with_values(*GLOW, levels=4), r"divisible by 2 \*\* levels"),
    "foreign": (ARCHITECTURE, lambda data: b'{"layers": 3}', "'mflow_kernels 2', got None"),
    "unknown": (ARCHITECTURE, with_values("stages", 0, **{"class": "os.system"}), "one of Glow"),
    "no model": (ARCHITECTURE, with_values(**{"class": "Squeeze"}), "expected the arguments"),
    "huge": (ARCHITECTURE, with_values(*GLOW, image_shape=[1, 2**20, 2**20]), "no more dimensions"),
    "no JSON": (
        ARCHITECTURE,
        lambda data: b"levels: 3",
        "expected an architecture of mflow export",
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_messages_about_an_export(case, export):
    name, change, message = EXPORTS[case]
    (export / name).write_bytes(change((export / name).read_bytes()))
    refuses(export, message)


def test_files_of_an_export(export):
    for name in (ARCHITECTURE, WEIGHTS):
        before = (export / name).read_bytes()
        for damaged in BYTES.values():
            (export / name).write_bytes(damaged(before))
            refuses(export)
        (export / name).write_bytes(before)
    (export / ARCHITECTURE).unlink()
    refuses(export, "expected model.json, which mflow export writes")


@pytest.mark.parametrize(
    "value", [2**20, 2**40, 2**70, 10**400, 0, -1, 1.5, True, None, "1", [], {}]
)
def test_numbers_of_an_architecture(value, export):
    whole = (export / ARCHITECTURE).read_bytes()
    changes = [with_values(stages=value), with_values(**{"class": value})]
    for stage in range(2):
        first, flow, objective = ((*("stages", stage), *n) for n in ((), ("flow",), ("objective",)))
        changes += [with_values(*first, **{n: value}) for n in ("manifold_dim", "flow", "class")]
        names = ("levels", "image_shape", "context_channels") if stage == 0 else ("dim",)
        changes += [with_values(*flow, **{n: value}) for n in ("steps", "width", "scale", *names)]
        changes += [with_values(*objective, **{n: value}) for n in ("domain", "rho")]
    for change in changes:
        content = change(whole)
        if content != json.dumps(json.loads(whole)).encode():
            (export / ARCHITECTURE).write_bytes(content)
            refuses(export)


def test_weights_of_an_export(export):
    """The message names the first tensor that does not fit."""
    first = next(iter(HierarchicalFlow.from_pretrained(export).state_dict()))
    whole = load_file(export / WEIGHTS)
    name = next(n for n, tensor in whole.items() if tensor.is_floating_point())
    index = next(n for n in whole if n.endswith("manifold_index"))
    for change in (
        {name: whole[name] * math.nan},
        {name: whole[name] * math.inf},
        {name: whole[name].half()},
        {name: whole[name].to(torch.complex64)},
        {name: whole[name].to(torch.float8_e4m3fn)},
        {index: whole[index] + 10**9},
        {"more": whole[name].clone()},
    ):
        save_file(whole | change, export / WEIGHTS)
        refuses(export)
    header = (export / WEIGHTS).read_bytes()
    for length in (0, 1, 2**31, 2**62):
        (export / WEIGHTS).write_bytes(struct.pack("<Q", length) + header[8:])
        refuses(export)
    save_file({name: tensor[None].clone() for name, tensor in whole.items()}, export / WEIGHTS)
    refuses(export, f"{first} is only in one of the two files")


def test_an_export_keeps_its_own_selection_of_latents(run, export):
    """A model of this shape takes others by itself."""
    tensors, name = load_file(export / WEIGHTS), "stages.0.manifold_index"
    mask = tensors["stages.0.off_mask_0"]
    tensors[name] = torch.arange(6)
    mask.copy_((torch.arange(mask.numel()) >= 6).view_as(mask))
    save_file(tensors, export / WEIGHTS)
    model = build_model(read_config(run))
    assert model.stages[0].manifold_index.tolist() != list(range(6))
    initialize_from(model, str(export))
    for each in (model, HierarchicalFlow.from_pretrained(export)):
        assert each.stages[0].manifold_index.tolist() == list(range(6))
        assert torch.equal(each.stages[0].off_mask_0, mask)
    tensors[name] = torch.arange(1, 7)
    save_file(tensors, export / WEIGHTS)
    with pytest.raises(ValueError, match="manifold_index differs from the masks"):
        HierarchicalFlow.from_pretrained(export)
