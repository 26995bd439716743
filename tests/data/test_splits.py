from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import write_images

from mflow_kernels.data.batches import BatchStream, Position, flip_at_random
from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.named import NAMED_DATASETS, NamedDataset
from mflow_kernels.data.sources import DataError
from mflow_kernels.data.splits import ImageSet, load_evaluation_set, load_splits
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.training.cli import main
from mflow_kernels.training.memory import resolve_config


class TestDigits:
    def test_shapes_and_split(self):
        splits = load_splits("digits")
        assert splits.train.image_shape == (1, 28, 28)
        assert (len(splits.train), len(splits.test)) == (4500, 500)
        assert splits.test is splits.valid

    def test_held_out_images_are_mixed_and_not_trained_on(self):
        splits = load_splits("digits")
        train = {bytes(i.numpy()) for i in splits.train.batch(range(4500))}
        held = [bytes(i.numpy()) for i in splits.test.batch(range(500))]
        assert not train.intersection(held)
        # If they were sorted by class, these would all be zeros, which are dark in the middle.
        centres = splits.test.batch(range(500))[:, 0, 13:15, 13:15].float().mean((1, 2))
        assert (centres > 128).float().mean() > 0.3


class TestNamed:
    """A row of NAMED_DATASETS is all that a new data set needs."""

    @pytest.fixture(autouse=True)
    def stripes(self, monkeypatch):
        images = np.arange(20 * 12 * 12 * 3).reshape(20, 12, 12, 3).astype(np.uint8)
        labels = np.arange(20) % 3
        row = NamedDataset("colour stripes", 12, 3, len(images), lambda: (images, labels))
        monkeypatch.setitem(NAMED_DATASETS, "stripes", row)
        return images

    def test_it_is_loaded_split_and_resized(self, stripes):
        splits = load_splits("stripes")
        assert splits.train.image_shape == (3, 12, 12)
        assert (len(splits.train), len(splits.test)) == (18, 2)
        first = int(splits.manifest.names[0])
        assert np.array_equal(splits.images.batch([0])[0], stripes[first].transpose(2, 0, 1))
        assert load_splits("stripes", 4).train.image_shape == (3, 4, 4)
        images, _, manifest = load_evaluation_set("stripes")
        assert len(images) == len(manifest.names) == 2  # the held-out part

    def test_configuration_planner_help_and_errors_know_it(self, tmp_path, capsys):
        config = TrainConfig(data="stripes", manifold_dim=8)
        assert resolve_config(config, None, gpu=False).image_shape == (3, 12, 12)
        assert config.resolve((3, 12, 12)).data_name == "stripes"
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        assert '"stripes" (colour stripes)' in " ".join(capsys.readouterr().out.split())
        with pytest.raises(DataError, match="'stripes', a folder or zip"):
            load_splits(str(tmp_path / "absent"))


class TestFolder:
    def test_the_crop_is_central_and_resizing_antialiased(self, tmp_path):
        wide = np.full((32, 64), 255, np.uint8)
        wide[:, 16:48:2] = 0  # only the central square has black and white columns
        wide[:, 17:48:2] = 200
        Image.fromarray(wide).save(tmp_path / "a.png")
        images = load_evaluation_set(str(tmp_path), 8).images
        columns = images.batch([0])[0, 0, 0].float()
        # Without antialiasing, columns away from the border would be black or 200, not between.
        assert ((columns[1:-1] - 100).abs() < 2).all()
        assert columns.max() < 130  # and no white from outside

    def test_grey_only_has_one_channel_mixed_has_three(self, tmp_path):
        write_images(tmp_path, 1)
        assert load_evaluation_set(str(tmp_path), 8)[0].image_shape == (1, 8, 8)
        write_images(tmp_path / "more", 1, channels=3)
        images = load_evaluation_set(str(tmp_path), 8).images
        grey = images.batch([0])[0]
        assert images.image_shape == (3, 8, 8)
        assert torch.equal(grey[0], grey[1])
        assert torch.equal(grey[0], grey[2])

    def test_one_image_cannot_be_split(self, tmp_path):
        write_images(tmp_path, 1)
        with pytest.raises(ValueError, match="at least 2 images"):
            load_splits(str(tmp_path), 8)


class TestBatchStream:
    images = ImageSet(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1))

    def take(self, count, **kwargs):
        stream = iter(BatchStream(self.images, **{"batch_size": 3, "seed": 0, **kwargs}))
        return [next(stream).flatten().tolist() for _ in range(count)]

    def test_a_pass_sees_no_image_twice_and_passes_differ(self):
        batches = self.take(6)
        first = [image for batch in batches[:3] for image in batch]
        second = [image for batch in batches[3:] for image in batch]
        assert len(set(first)) == len(set(second)) == 9
        assert first != second

    @pytest.mark.parametrize("start", [1, 3, 4])
    def test_starting_later_continues_the_same_stream(self, start):
        position = Position().after(start, 3, 10)
        assert self.take(6)[start:] == self.take(6 - start, first=position)

    def test_another_batch_size_continues_the_pass(self):
        first = self.take(2)
        position = Position().after(2, 3, 10)
        assert position == Position(0, 6)
        second, third, *_ = self.take(3, batch_size=2, first=position)
        seen = [image for batch in (*first, second, third) for image in batch]
        assert sorted(seen) == list(range(10))
        whole = self.take(7, batch_size=2, first=position)
        assert position.after(7, 2, 10) == Position(2, 0)
        assert whole[2:] == self.take(5, batch_size=2, first=Position(1, 0))

    def test_rows_of_a_file_are_read_alike(self, tmp_path):
        rows = np.array([7, 1, 4, 2])
        pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
        (tmp_path / "pixels").write_bytes(pixels.tobytes())
        mapped = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=pixels.shape)
        batch = ImageSet(mapped, rows).batch([3, 0, 0])
        assert torch.equal(batch, torch.from_numpy(pixels[[2, 7, 7]]))

    def test_seeds_differ_and_a_large_batch_is_the_set(self):
        assert self.take(3) != self.take(3, seed=1)
        assert sorted(self.take(1, batch_size=64)[0]) == list(range(10))


MANY = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4).repeat(1000, 1, 1, 1)


def test_half_of_the_images_are_mirrored():
    flipped = flip_at_random(MANY, stream_generator(0, Stream.TRAINING_NOISE))
    same = (flipped == MANY).flatten(1).all(1)
    mirrored = (flipped == MANY.flip(-1)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 437 <= same.sum() <= 563  # 500 and 4 standard deviations of a fair coin
    assert flipped.dtype == torch.uint8


class TestCache:
    # The tests share one cache, so each of their folders has its own name.
    def test_decodes_once(self, tmp_path, cache, monkeypatch):
        write_images(tmp_path / "once", 2)
        first = load_splits(str(tmp_path / "once"), 8)
        assert len(list(cache.glob("once-8px-*"))) == 1
        with monkeypatch.context() as patch:
            patch.setattr("mflow_kernels.data.prepare.decode", None)
            again = load_splits(str(tmp_path / "once"), 8)
        assert torch.equal(first.train.batch([0]), again.train.batch([0]))

    def test_changed_folders_are_decoded_again(self, tmp_path, cache):
        for count in (2, 3):
            write_images(tmp_path / "faces2", count)
            assert len(load_evaluation_set(str(tmp_path / "faces2"), 8).images) == count
        assert len(list(cache.glob("faces2-8px-*"))) == 1  # it replaced the previous file

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        write_images(tmp_path / "faces", 1)
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MFLOW_CACHE", str(tmp_path / "file" / "below"))
        with pytest.raises(ValueError, match="set MFLOW_CACHE to another folder"):
            load_evaluation_set(str(tmp_path / "faces"), 8)


class TestDequantize:
    every_level = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)

    @pytest.mark.parametrize("n_bits", [1, 5, 8])
    def test_each_value_stays_in_its_own_bin(self, n_bits):
        x = dequantize(self.every_level, n_bits, stream_generator(0, Stream.TRAINING_NOISE))
        level = ((x.double() + 0.5) * 2**n_bits).floor()
        assert torch.equal(level, (self.every_level // 2 ** (8 - n_bits)).double())

    def test_eight_bits_round_trip(self):
        assert torch.equal(to_image(dequantize(self.every_level, 8)), self.every_level)

    def test_out_of_range_colours_are_clipped(self):
        assert to_image(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("draw", [flip_at_random, partial(dequantize, n_bits=8)])
def test_random_functions_follow_their_generator(draw):
    first, same, other = (
        draw(MANY, generator=stream_generator(0, Stream.TRAINING_NOISE, key)) for key in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dequantize(torch.zeros(1, 1, 2, 2), 8), TypeError, "uint8"),
        (lambda: dequantize(MANY, 9), ValueError, "n_bits: expected 1 to 8, got 9"),
        (lambda: ImageSet(torch.zeros(1, 1, 2, 2)), TypeError, "uint8"),
        (lambda: ImageSet(MANY[:0]), ValueError, r"\(N, C, H, W\)"),
        (lambda: ImageSet(MANY[:3]).batch([3]), IndexError, "index"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
