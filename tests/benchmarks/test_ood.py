"""The images and the table of `benchmarks.manifold.ood`."""

import torch

from benchmarks.manifold.ood import table
from benchmarks.manifold.other_images import other_images
from mflow_kernels.evaluation.ood import compare_sets


def test_other_images_have_the_form_of_the_digits():
    digits = torch.randint(0, 256, (6, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    digits = digits.to(torch.uint8)
    sets, again = other_images(digits, 6), other_images(digits, 6)
    assert len(sets) == 9
    for name, images in sets.items():
        assert images.dtype == torch.uint8
        assert images.shape == ((100 if name == "faces" else 6), 1, 28, 28), name
        assert torch.equal(images, again[name]), name
    letters = sets["letters"]
    assert (letters[..., 0, :] == 0).all()  # white on black, away from the edge
    assert (letters.flatten(1).amax(1) == 255).all()
    assert len(letters.flatten(1).unique(dim=0)) == 6
    shuffled = sets["digits with shuffled pixels"].flatten(1)
    assert torch.equal(shuffled.sort(1).values, digits.flatten(1).sort(1).values)


def test_the_table_has_a_row_for_each_set_and_their_mean():
    low, high = torch.arange(4.0), torch.arange(4.0) + 10
    rows = compare_sets(
        {
            "held out": {"bits_per_dim": low, "distance": low},
            "letters": {"bits_per_dim": high, "distance": low},
            "blank": {"bits_per_dim": -high, "distance": low},
        }
    )
    assert table(rows).splitlines()[2:] == [
        "| letters | 1.000 | 0.500 |",
        "| blank | 0.000 | 0.500 |",
        "| mean | 0.500 | 0.500 |",
    ]
