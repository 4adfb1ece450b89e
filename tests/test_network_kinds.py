"""Every kind of network: runs under masks, keeps tasks apart, and is refused where it cannot be masked."""

from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from supsupd.learning.bodies import ModuleBody
from supsupd.learning.learner import Learner, Samples, TrainingState
from supsupd.learning.modules import UnsupportedNetwork, torchvision_model
from supsupd.learning.network import Architecture, Network, NetworkMismatch
from supsupd.learning.pretrained import Pretrained, PretrainedMismatch
from supsupd.sections import LearningSettings

IMAGE, OUTPUTS = (16, 16, 3), 12
KINDS = [
    ("mlp", "none"),
    ("units", "group"),
    ("units", "batch"),
    ("conv2", "none"),
    ("conv2", "task"),
    ("conv4", "group"),
    ("conv6", "batch"),
    ("resnet18-gem", "group"),
    ("resnet18-gem", "task"),
    ("resnet18", "group"),
    ("mobilenet_v3_small", "task"),
]


def architecture(kind, norm):
    hidden = {"mlp": (20,), "units": (30, 20)}.get(kind, (16,) if kind.startswith("conv") else ())
    return Architecture(IMAGE, hidden, OUTPUTS, kind, 0.1, norm)


@pytest.fixture(params=KINDS, ids=[f"{kind}-{norm}" for kind, norm in KINDS])
def network(request):
    return Network(architecture(*request.param), seed=3)


def rows(count, seed=0, shift=0.0):
    """Two classes that a mask can tell: bright at the top, or bright at the bottom."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((count, *IMAGE)), np.arange(count) % 2
    x[y == 0, :8] += 2.0
    x[y == 1, 8:] += 2.0
    return Samples.of((x + shift).reshape(count, -1).astype(np.float32), y, torch.device("cpu"))


def learner_of(network):
    return Learner(network, LearningSettings(steps=4, minibatch=32))


def trained(learner, key, samples):
    return learner.train(learner.fresh(key), samples, seed=1)


def test_a_packed_mask_holds_all_bits_and_the_statistics_of_its_task(network):
    shape = network.architecture
    masks = [torch.rand(s.rows, s.columns, generator=torch.Generator().manual_seed(1)) < 0.5 for s in shape.layers]
    statistics = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in shape.body.statistics]
    packed = network.pack(masks, statistics)
    assert packed.nbytes == shape.mask_bytes == shape.bit_bytes + shape.statistic_bytes
    assert all(torch.equal(a, b) for a, b in zip(network.unpack(packed), masks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(network.statistics(packed), statistics, strict=True))


def test_per_task_statistics_are_counted_in_the_bytes():
    grouped, own = (Architecture(IMAGE, (), OUTPUTS, "resnet18-gem", 0.1, norm) for norm in ("group", "task"))
    channels = sum(s.shape[0] for s in own.layers[:-1])  # one normalisation after each convolution
    assert grouped.mask_bytes == own.bit_bytes
    assert own.mask_bytes - own.bit_bytes == own.statistic_bytes == 2 * 4 * channels


def test_forgetting_is_exactly_zero(network):
    """Bits, statistics and predictions of a task are the same after others were learned."""
    learner = learner_of(network)
    first, probe = trained(learner, "a", rows(64)), rows(8, seed=9)
    packed = learner.packed(first)
    before, state = network.forward(probe.x, packed), first.to_bytes()
    for other in range(3):
        trained(learner, other, rows(64, seed=other + 1, shift=float(other)))
    assert np.array_equal(learner.packed(first), packed)
    assert first.to_bytes() == state
    assert torch.equal(network.forward(probe.x, packed), before)


def test_training_repeats_bit_for_bit_on_a_network_made_anew(network):
    again = Network(Architecture.from_json(network.architecture.to_json()), network.seed)
    again.verify(network.sha256)
    packed = [learner_of(n).packed(trained(learner_of(n), "a", rows(48))) for n in (network, again)]
    assert np.array_equal(*packed)


def test_a_mask_learns_and_its_state_survives_being_stored(network):
    learner = Learner(network, LearningSettings(steps=25, minibatch=32, lr=3e-3))
    state = learner.train(learner.fresh("a"), rows(96), seed=1)
    state = learner.train(TrainingState.from_bytes(state.to_bytes(), network.device), rows(96, seed=2), seed=2)
    probe = rows(64, seed=5)
    with torch.no_grad():
        found = network.forward(probe.x, learner.packed(state))[:, :2].argmax(1)
    assert float((found == probe.y).float().mean()) > 0.8


def test_training_goes_on_from_bits_and_statistics_alone(network):
    learner = learner_of(network)
    packed = learner.packed(trained(learner, "a", rows(64)))
    assert np.array_equal(learner.packed(learner.from_mask(packed)), packed)


def test_threads_do_not_see_each_others_masks(network):
    """Many queries at once, each under a mask of its own, answer as they do alone."""
    shape = network.architecture
    banks = [
        network.pack([torch.rand(s.rows, s.columns, generator=g) < 0.5 for s in shape.layers], [*_ones(shape)])
        for g in (torch.Generator().manual_seed(i) for i in range(6))
    ]
    x = rows(4).x
    with torch.no_grad():
        alone = [network.forward(x, packed) for packed in banks]
    found = [[] for _ in banks]

    def ask(i):
        with torch.no_grad():
            found[i] = [network.forward(x, banks[i]) for _ in range(5)]

    threads = [Thread(target=ask, args=(i,)) for i in range(len(banks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answer, alone[i]) for i, answers in enumerate(found) for answer in answers)


def _ones(shape):
    return [torch.ones(n) for n in shape.body.statistics]


@pytest.mark.parametrize("norm", ["none", "group", "task"])
def test_a_row_is_answered_alike_whoever_its_neighbours_are(norm):
    network = Network(architecture("conv4", norm), seed=1)
    learner = learner_of(network)
    packed, x = learner.packed(trained(learner, "a", rows(64))), rows(32, seed=4).x
    with torch.no_grad():
        together = network.forward(x, packed)
        alone = torch.cat([network.forward(x[i : i + 1], packed) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_task_statistics_are_those_of_the_inputs_under_the_kept_mask():
    network = Network(architecture("conv2", "task"), seed=1)
    learner = Learner(network, LearningSettings(steps=4, minibatch=64))
    state = learner.train(learner.fresh("a"), rows(64, shift=3.0), seed=1)
    weight = network.masked_weights(learner.packed(state))[0].view(network.architecture.layers[0].shape)
    images = rows(64, shift=3.0).x.view(64, *IMAGE).permute(0, 3, 1, 2)
    maps = torch.conv2d(images, weight, padding=1)
    torch.testing.assert_close(state.statistics[0], maps.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.statistics[1], maps.var(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18", "quantized_resnet18"])
def test_a_model_that_does_not_classify_images_is_refused(name):
    with pytest.raises(UnsupportedNetwork, match=f"{name} is no classification model of images"):
        Architecture.of_kind(name, (64, 64, 3), 10)


def test_an_unknown_kind_is_refused_with_what_there_is():
    with pytest.raises(UnsupportedNetwork, match="'resnet19', expected mlp, units, conv, conv2"):
        Architecture.of_kind("resnet19", (64, 64, 3), 10)


def test_a_network_without_a_maskable_layer_is_refused():
    with pytest.raises(UnsupportedNetwork, match="no maskable layer"):
        ModuleBody(nn.Sequential(nn.Flatten(), nn.ReLU()), IMAGE, 3)


@pytest.mark.parametrize(
    ("kind", "shape", "text"),
    [
        ("conv4", (784,), "takes rows of shape"),
        ("conv6", (7, 7, 3), "too small for 3 poolings"),
        ("alexnet", (16, 16, 3), "cannot take images of 16 x 16"),
        ("resnet18", (32, 32, 4), "1 or 3 channels, got 4"),
    ],
)
def test_rows_that_a_network_cannot_take_are_refused_with_the_reason(kind, shape, text):
    with pytest.raises(UnsupportedNetwork, match=text):
        Architecture.of_kind(kind, shape, 10)


def test_building_a_network_costs_nobody_randomness():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torchvision_model("resnet18", 10, "group")
    assert torch.equal(torch.rand(3), expected)


def test_grey_images_go_into_a_network_for_colours():
    network = Network(Architecture((32, 32), (), 10, "resnet18", norm="group"), seed=0)
    packed = network.pack([torch.ones(s.rows, s.columns, dtype=torch.bool) for s in network.architecture.layers])
    assert network.forward(torch.rand(2, 32 * 32), packed).shape == (2, 10)


# -- pretrained weights -------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A file of the network's own first layers, the last one left out as its classes are others."""
    shape = architecture("conv2", "group")
    generator = torch.Generator().manual_seed(2)
    tensors = {spec.name: torch.randn(spec.shape, generator=generator) for spec in shape.body.masked[:-1]}
    save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_pretrained_weights_take_the_place_of_signs_and_the_rest_keeps_its_signs(weights):
    shape = architecture("conv2", "group")
    plain, piggyback = Network(shape, 0), Network(shape, 0, pretrained=Pretrained.load(weights))
    tensors = Pretrained.load(weights).tensors
    for spec, weight in zip(shape.body.masked[:-1], piggyback.weights, strict=False):
        assert torch.equal(weight.view(spec.shape), tensors[spec.name])
    assert torch.equal(piggyback.weights[-1], plain.weights[-1])


def test_a_pretrained_network_starts_whole(weights):
    network = Network(architecture("conv2", "group"), 0, pretrained=Pretrained.load(weights))
    learner = learner_of(network)
    assert all(bool(mask.all()) for mask in learner.mask(learner.fresh("a")))


def test_other_pretrained_weights_are_refused(weights, tmp_path):
    shape = architecture("conv2", "group")
    network = Network(shape, 0, pretrained=Pretrained.load(weights))
    changed = {name: tensor + 1e-3 for name, tensor in Pretrained.load(weights).tensors.items()}
    save_file(changed, tmp_path / "other.safetensors")
    other = Network(shape, 0, pretrained=Pretrained.load(tmp_path / "other.safetensors"))
    with pytest.raises(NetworkMismatch, match=r"other\.safetensors gives weights with SHA-256"):
        other.verify(network.sha256)


def test_a_pretrained_file_that_does_not_fit_is_refused_with_the_tensor(weights, tmp_path):
    shape = replace(architecture("conv2", "group"), width=0.2)
    with pytest.raises(PretrainedMismatch, match=r"has shape .*, the network takes"):
        Network(shape, 0, pretrained=Pretrained.load(weights))
    save_file({"nothing.weight": torch.ones(2)}, tmp_path / "none.safetensors")
    with pytest.raises(PretrainedMismatch, match="none of the network's tensors"):
        Network(shape, 0, pretrained=Pretrained.load(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"junk")
    with pytest.raises(PretrainedMismatch, match="expected a safetensors file"):
        Pretrained.load(tmp_path / "bad.safetensors")


def test_a_pretrained_normalisation_keeps_its_statistics_for_all_tasks():
    module = torchvision_model("resnet18", 10, "fixed")
    body = ModuleBody(module, (32, 32, 3), 3)
    names = {spec.name: spec.value for spec in body.fixed}
    assert body.statistics == ()
    assert names["bn1.weight"] == 1.0
    assert torch.equal(names["bn1.running_var"], torch.ones(64))
