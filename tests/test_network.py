"""The fixed network: the same from its seed for ever, and exactly what a mask says of it."""

import math

import numpy as np
import pytest
import torch
from learning_stream import small_network

from supsupd.learning.inference import reference_logits
from supsupd.learning.network import Architecture, Network, NetworkMismatch

# Stored masks mean nothing over any other network: this hash may never change.
GOLDEN = "38a184c9c36bbb1dbde6fcd10c53a49c38be42f4868a8a934e6b12620a4a1642"


def random_mask(network, density, seed=0):
    rng = np.random.default_rng(seed)
    shapes = network.architecture.layers
    return [torch.from_numpy(rng.random((s.rows, s.columns)) < density) for s in shapes]


def test_a_seed_gives_the_same_signs_for_ever():
    network = Network(Architecture((784,), (300, 100), 100), seed=0)
    assert network.sha256 == GOLDEN
    network.verify(GOLDEN)


def test_another_seed_or_shape_is_another_network_and_is_refused():
    network = small_network()
    for other in (small_network(seed=1), small_network(hidden=(99,)), small_network(outputs=99)):
        assert other.sha256 != network.sha256
        with pytest.raises(NetworkMismatch, match="masks would be meaningless"):
            other.verify(network.sha256)


def test_every_weight_is_plus_or_minus_the_kaiming_constant_in_equal_parts():
    network = small_network(inputs=784, hidden=(300,))
    for weight, shape in zip(network.weights, network.architecture.layers, strict=True):
        assert torch.equal(weight.abs(), torch.full_like(weight, math.sqrt(2 / shape.columns)))
        assert abs(float((weight > 0).float().mean()) - 0.5) < 0.01


def test_layers_do_not_share_their_signs():
    network = Network(Architecture((64,), (64,), 64), seed=3)
    first, second = network.weights
    assert abs(float((first.sign() == second.sign()).float().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("widths", [(64, (100,), 10), (13, (7, 9), 3), (1, (1,), 1), (8, (), 16)])
def test_packing_a_mask_and_unpacking_it_gives_it_back(widths):
    inputs, hidden, outputs = widths
    network = Network(Architecture((inputs,), hidden, outputs), seed=5)
    mask = random_mask(network, 0.4)
    packed = network.pack(mask)
    assert packed.nbytes == network.architecture.mask_bytes
    assert all(torch.equal(a, b) for a, b in zip(network.unpack(packed), mask, strict=True))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("widths", [(64, (100,), 10), (13, (7, 9), 3)])
def test_forward_equals_the_dense_reference(widths, density):
    inputs, hidden, outputs = widths
    network = Network(Architecture((inputs,), hidden, outputs), seed=5)
    packed = network.pack(random_mask(network, density))
    x = np.random.default_rng(1).standard_normal((17, inputs)).astype(np.float32)
    found = network.forward(torch.from_numpy(x), packed).numpy()
    np.testing.assert_allclose(found, reference_logits(network, packed, x), rtol=1e-4, atol=1e-5)


def test_an_architecture_survives_json():
    architecture = Architecture((28, 28, 3), (300, 100), 50)
    assert Architecture.from_json(architecture.to_json()) == architecture


@pytest.mark.parametrize("widths", [((0,), (3,), 2), ((3,), (0,), 2), ((3,), (3,), 0)])
def test_a_width_of_zero_is_refused(widths):
    with pytest.raises(ValueError, match="at least 1"):
        Architecture(*widths)
