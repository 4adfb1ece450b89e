"""Transforms of images: applied to every row alike, varied in training alone, stored with the network."""

import numpy as np
import pytest
import torch

from supsupd.config import ConfigError, load_settings
from supsupd.learning.learner import Learner, Samples
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.transforms import Transforms
from supsupd.sections import ImageTransforms, LearningSettings


def images(count=3, size=(8, 6), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def test_whole_numbers_are_scaled_and_channels_normalised():
    x = images()
    found = Transforms(mean=(0.5, 0.4, 0.3), sd=(0.2, 0.25, 0.5)).prepared(x)
    expected = (x / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.5])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_of_any_size_are_brought_to_one():
    normaliser = Normaliser.fitted("none", images(), Transforms(resize=(5, 4)))
    assert normaliser.output_shape == (5, 4, 3)
    for size in ((8, 6), (20, 30), (5, 4)):
        assert normaliser(images(2, size)).shape == (2, 5 * 4 * 3)
    with pytest.raises(ShapeMismatch):
        normaliser(images(2, (8, 6), channels=1))


def test_a_resized_constant_image_stays_constant():
    x = np.full((1, 9, 9), 51, np.uint8)
    found = Normaliser.fitted("none", x, Transforms(resize=(4, 4)))(x)
    np.testing.assert_allclose(found, 0.2, atol=1e-6)


def test_without_transforms_nothing_about_rows_changes():
    x = images()
    assert np.array_equal(Normaliser.fitted("sample", x)(x), Normaliser("sample", x.shape[1:])(x))


def test_the_stored_rule_is_the_rule():
    rule = Normaliser.fitted("sample", images(), Transforms((4, 4), (0.5,) * 3, (0.1,) * 3, True, False, 2))
    again = Normaliser.from_stored(*rule.to_stored())
    assert again == rule
    assert np.array_equal(again(images()), rule(images()))


@pytest.mark.parametrize("shape", [(3, 10), (3, 4, 4, 2)])
def test_rows_that_the_transforms_cannot_take_are_refused(shape):
    with pytest.raises(ShapeMismatch, match=r"transforms take images|mean has 3"):
        Normaliser.fitted("none", np.zeros(shape), Transforms(mean=(0.5,) * 3, sd=(0.1,) * 3))


def test_mean_and_sd_come_together(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(f'watch = ["{tmp_path}"]\nstate = "/tmp/x"\n[network.transforms]\nmean = [0.5]\nsd = [0.1, 0.2]\n')
    with pytest.raises(ConfigError, match=r"expected as many values as network.transforms.mean"):
        load_settings(file=file)


def augmented(transforms, x, seed=0):
    rows = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32))
    found = transforms.augmented(rows, x.shape[1:], np.random.Generator(np.random.Philox(seed)))
    return found.numpy().reshape(x.shape)


def test_each_row_flips_by_a_chance_of_its_own():
    x = images(64)
    found = augmented(Transforms(horizontal_flip=True), x)
    flipped = [np.array_equal(a, b[:, ::-1]) for a, b in zip(found, x, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(found, x, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48


def test_each_row_is_shifted_into_a_frame_of_zeros():
    x = images(40) + np.uint8(1) * (images(40) == 0)
    frame = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found, places = augmented(Transforms(crop=2), x), set()
    for row, framed in zip(found, frame, strict=True):
        cuts = {(i, j): framed[i : i + 8, j : j + 6] for i in range(5) for j in range(5)}
        places |= {place for place, cut in cuts.items() if np.array_equal(cut, row)}
    assert len(places) > 10


def test_augmented_training_repeats_and_leaves_the_rows_alone():
    network = Network(Architecture((8, 6, 3), (16,), 12), 0)
    samples = Samples.of(images(32).reshape(32, -1).astype(np.float32) / 255, np.arange(32) % 2, network.device)
    before = samples.x.clone()
    settings = LearningSettings(steps=3, minibatch=16)

    def mask(transforms):
        learner = Learner(network, settings, transforms)
        return learner.packed(learner.train(learner.fresh("a"), samples, seed=1))

    varied = Transforms(horizontal_flip=True, vertical_flip=True, crop=1)
    assert np.array_equal(mask(varied), mask(varied))
    assert not np.array_equal(mask(varied), mask(Transforms()))
    assert torch.equal(samples.x, before)


def test_settings_name_what_is_done():
    settings = ImageTransforms(resize=[4, 4], mean=[0.5], sd=[0.2], horizontal_flip=True)
    assert Transforms.of(settings) == Transforms((4, 4), (0.5,), (0.2,), True, False, 0)
