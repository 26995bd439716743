"""The images and the tables of `benchmarks.manifold.ood`."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.manifold import ood
from benchmarks.manifold.other_images import beside_digits, beside_faces, faces


def test_other_images_have_the_form_of_the_digits():
    digits = torch.randint(0, 256, (6, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    digits = digits.to(torch.uint8)
    sets, again = beside_digits(digits, 6), beside_digits(digits, 6)
    assert len(sets) == 9
    for name, images in sets.items():
        assert images.dtype == torch.uint8
        assert images.shape == ((100 if name == "faces" else 6), 1, 28, 28), name
        assert torch.equal(images, again[name]), name
    letters = sets["letters"]
    assert (letters[..., 0, :] == 0).all()  # white on black, away from the edge
    assert (letters.flatten(1).amax(1) == 255).all()
    assert len(letters.flatten(1).unique(dim=0)) == 6
    shuffled = sets["shuffled pixels"].flatten(1)
    assert torch.equal(shuffled.sort(1).values, digits.flatten(1).sort(1).values)


def test_sets_beside_faces_have_their_form():
    assert faces().shape == (100, 1, 24, 24)
    sets = beside_faces(faces()[:5])
    assert "faces" not in sets
    sizes = {name: len(images) for name, images in sets.items()}
    made = ("upside down", "shuffled pixels", "blank", "negatives (255 - image)", "uniform noise")
    assert sizes == {name: 5 if name in made else 100 for name in sizes}
    assert {images.shape[1:] for images in sets.values()} == {(1, 24, 24)}


def test_the_table_has_means_and_deviations_over_runs_of_each_set_and_of_their_mean():
    made = {"commit": "c", "date": "2026-11-27", "torch": "2"}
    rows = [
        {"seed": seed, "made": made, "auroc": {
            "letters": {"bits_per_dim": 0.9 + seed / 10, "distance": 0.5},
            "blank": {"bits_per_dim": seed / 10, "distance": 0.5},
        }} for seed in (0, 1)
    ]  # fmt: skip
    assert ood.table(rows).splitlines()[:5] == [
        "| set | bits per dimension | distance |",
        "|---|---:|---:|",
        "| letters | 0.950 ± 0.071 | 0.500 |",
        "| blank | 0.050 ± 0.071 | 0.500 |",
        "| mean | 0.500 ± 0.071 | 0.500 |",
    ]


def test_faces_that_are_scored_are_not_those_of_training(monkeypatch):
    monkeypatch.setattr(ood, "FACE_STEPS", 3)
    scored = []
    monkeypatch.setattr(
        ood, "_scored", lambda model, train, held_out, *rest: scored.append((train, held_out)) or {}
    )
    assert ood.of_faces(0, quick=True)["seed"] == 0
    train, held_out = (part.flatten(1).tolist() for part in scored[0])
    assert (len(train), len(held_out)) == (70, 30)
    assert not {tuple(x) for x in train} & {tuple(x) for x in held_out}


def test_a_run_of_other_images_is_refused():
    other = SimpleNamespace(config=SimpleNamespace(image_shape=(3, 8, 8)))
    with pytest.raises(ValueError, match="run: expected 28x28 grey images"):
        ood.of_run(other, 5, quick=True)


def test_a_run_is_scored_again_with_other_images_or_scores_only(trained, tmp_path, monkeypatch):
    scored = []

    def of_run(run, number, quick):
        scored.append((number, quick))
        return {"seed": run.config.seed, "auroc": {"blank": {"distance": 0.5}}}

    monkeypatch.setattr(ood, "of_run", of_run)
    options = [str(trained), "--no-faces", "--out", str(tmp_path)]
    for further in ([], [], ["--images", "7"], ["--quick"], ["--quick"]):
        ood.main(options + further)
    assert scored == [(500, False), (7, False), (500, True)]
    assert "| blank | 0.500 |" in (tmp_path / "ood-digits.md").read_text()
