"""Tasks told by their inputs: sums that equal a plain computation and are the same after a restart."""

import numpy as np
import pytest
import torch
from digits import draw, held_out
from learning_stream import samples_of, small_network

from supsupd.learning.features import RIDGE, FeatureModel
from supsupd.learning.modules import UnsupportedNetwork
from supsupd.learning.network import FEATURES, Architecture, Network
from supsupd.learning.transforms import Transforms

TASKS = (1, 2, 3)


def batch(task, seed=0, rows=200):
    arrays = draw(task, seed, rows)
    return samples_of(arrays["x"], arrays["y"])


@pytest.fixture(scope="module")
def model():
    found = FeatureModel(small_network(), Transforms())
    for task in TASKS:
        for seed in range(3):
            samples = batch(task, seed)
            found = found.learned(task, samples.x, samples.y)
    return found


def reference_densities(network, x, tasks):
    """Log densities of rows under each task by the textbook: means, pooled covariance, inverse."""
    rows = {t: [batch(t, seed) for seed in range(3)] for t in tasks}
    features = {t: np.concatenate([network.features(s.x).numpy() for s in rows[t]]).astype(np.float64) for t in tasks}
    labels = {t: np.concatenate([s.y.numpy() for s in rows[t]]) for t in tasks}
    means = {t: {c: features[t][labels[t] == c].mean(axis=0) for c in np.unique(labels[t])} for t in tasks}
    residuals = [f - means[t][c] for t in tasks for f, c in zip(features[t], labels[t], strict=True)]
    covariance = np.cov(np.stack(residuals), rowvar=False, bias=True)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    inverse, probe = np.linalg.inv(covariance), network.features(x).numpy().astype(np.float64)
    found = []
    for task in tasks:
        differences = [probe - mean for mean in means[task].values()]
        logs = np.stack([-0.5 * np.einsum("nd,de,ne->n", d, inverse, d) for d in differences])
        found.append(np.log(np.exp(logs - logs.max(axis=0)).mean(axis=0)) + logs.max(axis=0))
    return np.stack(found)


def test_densities_equal_the_textbook_but_for_a_term_that_all_tasks_share(model):
    x = batch(1, 99, 20).x
    found, expected = -model.surprise(x, TASKS), reference_densities(model.network, x, TASKS)
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-2, atol=0.1)


def test_single_rows_are_given_to_their_task(model):
    right = [
        (model.surprise(samples_of(*held_out(t)).x, TASKS).argmin(axis=0) == i).mean() for i, t in enumerate(TASKS)
    ]
    assert min(right) > 0.9


def test_rows_that_are_taken_away_leave_nothing_behind(model):
    extra, x = batch(2, 50), batch(2, 60).x
    there = model.learned(2, extra.x, extra.y)
    back = there.learned(2, extra.x, extra.y, sign=-1)
    assert not np.allclose(there.surprise(x, TASKS), model.surprise(x, TASKS), atol=1e-6)
    np.testing.assert_allclose(back.surprise(x, TASKS), model.surprise(x, TASKS), rtol=1e-3, atol=1e-2)


def test_what_is_stored_gives_the_same_densities_bit_for_bit(model):
    again = FeatureModel(
        model.network,
        model.transforms,
        {task: FeatureModel.task_from_bytes(model.task_to_bytes(task)) for task in TASKS},
        FeatureModel.products_from_bytes(model.products_to_bytes()),
    )
    x = batch(1, 99).x
    assert np.array_equal(again.surprise(x, TASKS), model.surprise(x, TASKS))


def test_a_task_that_was_never_measured_is_never_named(model):
    assert np.isinf(model.surprise(batch(1).x, (1, 77))[1]).all()


@pytest.mark.parametrize(
    ("kind", "norm", "size"),
    [("conv2", "group", 4 * (6 + 6)), ("conv2", "none", 4 * (6 + 6)), ("resnet18-gem", "group", None)],
)
def test_images_leave_the_quarters_of_their_maps(kind, norm, size):
    network = Network(Architecture((16, 16, 3), (16,), 12, kind, 0.1, norm), 0)
    found = network.features(torch.randn(3, network.architecture.inputs))
    assert found.shape[0] == 3
    assert found.shape[1] == size or size is None
    assert found.shape[1] <= FEATURES
    alone = network.features(torch.randn(3, network.architecture.inputs, generator=torch.Generator().manual_seed(1)))
    again = network.features(
        torch.randn(3, network.architecture.inputs, generator=torch.Generator().manual_seed(1))[:1]
    )
    torch.testing.assert_close(alone[:1], again)


@pytest.mark.parametrize(("kind", "norm"), [("units", "batch"), ("conv2", "task"), ("resnet18-gem", "batch")])
def test_a_network_whose_rows_depend_on_each_other_has_no_features(kind, norm):
    network = Network(Architecture((16, 16, 3), (16,), 12, kind, 0.1, norm), 0)
    with pytest.raises(UnsupportedNetwork, match="no features of its own"):
        FeatureModel(network, Transforms()).check()


def test_an_image_and_its_mirror_image_have_the_same_features_where_training_flips():
    network = Network(Architecture((16, 16, 3), (16,), 12, "conv2", 0.1, "group"), 0)
    model = FeatureModel(network, Transforms(horizontal_flip=True))
    images = torch.randn(5, 16, 16, 3)
    plain, mirrored = (model.features(x.reshape(5, -1)) for x in (images, images.flip(2)))
    np.testing.assert_allclose(plain, mirrored, atol=1e-5)
