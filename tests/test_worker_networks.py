"""The learning thread over every part of a network that is stored: kinds, statistics, features, pretrained weights."""

import numpy as np
import pytest
import torch
from daemon_process import DaemonProcess, ask
from digits import draw, held_out
from safetensors.torch import save_file
from test_worker import killed_lives, learn_all, new_store, one_thread, worker_of  # noqa: F401 - fixtures

from supsupd.founding import check_network
from supsupd.learning.modules import UnsupportedNetwork
from supsupd.learning.network import Architecture, NetworkMismatch
from supsupd.learning.pretrained import PretrainedMismatch
from supsupd.sections import ImageTransforms, NetworkSettings, RecognitionSettings

FEATURES = RecognitionSettings(features=True, objective="features")


def stream(tasks=(0, 1), visits=8, shape=None):
    batches = [draw(task, 100 * task + seed) for task in tasks for seed in range(visits)]
    return [b | {"x": b["x"].reshape(-1, *shape)} for b in batches] if shape else batches


def probe(task, shape=None):
    x = held_out(task)[0][:32]
    return x.reshape(-1, *shape) if shape else x


def answers(settings, shape=None):
    """What a freshly started worker answers, the given tasks' probabilities and the inferred task of each probe."""
    with worker_of(settings) as worker:
        worker.load()
        predictor = worker.predictor
        given = [predictor.predict(probe(t, shape), t, False).probabilities for t in range(len(predictor.tasks))]
        return given, [int(predictor.predict(probe(t, shape), None, False).task[0]) for t in range(len(given))]


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ({"kind": "conv2", "width": 0.1, "norm": "task"}, (8, 8)),
        ({"kind": "resnet18-gem", "width": 0.2}, (8, 8, 1)),
    ],
    ids=["conv2 with statistics", "resnet"],
)
def test_tasks_of_any_kind_of_network_are_found_and_answer_alike_after_a_restart(new_store, network, shape):  # noqa: F811
    settings = new_store(**network)
    with worker_of(settings, batches=stream(shape=shape)) as worker:
        learn_all(worker)
        predictor = worker.predictor
        before = [predictor.predict(probe(t, shape), t, False).probabilities for t in range(len(predictor.tasks))]
    assert len(before) == 2
    given, inferred = answers(settings, shape)
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True))
    assert inferred == [1, 2]


def test_statistics_are_stored_with_the_version_and_counted_in_its_bytes(new_store):  # noqa: F811
    settings = new_store(kind="conv2", width=0.1, norm="task")
    with worker_of(settings, batches=stream((0,), 4, (8, 8))) as worker:
        learn_all(worker)
        shape = worker.predictor.scorer.network.architecture
    rows = ask(settings.state, "SELECT length(bits), length(statistics) FROM mask_version")
    assert set(rows) == {(shape.bit_bytes, shape.statistic_bytes)}
    assert ask(settings.state, "SELECT bytes FROM task") == [(shape.mask_bytes,)]


def test_transforms_are_stored_with_the_network_whatever_the_settings_say_later(new_store):  # noqa: F811
    transforms = ImageTransforms(resize=[6, 6], mean=[0.3], sd=[0.4], horizontal_flip=True, crop=1)
    settings = new_store(kind="conv2", width=0.1, transforms=transforms)
    with worker_of(settings, batches=stream((0,), 5, (8, 8))) as worker:
        learn_all(worker)
        before = worker.predictor.predict(probe(0, (8, 8)), 0, False).probabilities
        assert worker.predictor.scorer.network.architecture.input_shape == (6, 6)
    plain = settings.model_copy(update={"network": NetworkSettings()})
    given, _ = answers(plain, (8, 8))
    assert np.array_equal(given[0], before)


def test_features_survive_any_crash_bit_for_bit_and_name_the_tasks(new_store):  # noqa: F811
    whole, torn = (new_store().model_copy(update={"recognition": FEATURES}) for _ in range(2))
    with worker_of(whole, batches=stream((0, 1, 2), 5)) as worker:
        learn_all(worker)
        kept = worker.engine.features
    assert killed_lives(torn, stream((0, 1, 2), 5), (3, 2)) > 2
    with worker_of(torn) as worker:
        worker.load()
        again = worker.engine.features
    assert again.products_to_bytes() == kept.products_to_bytes()
    assert [again.task_to_bytes(t) for t in sorted(again.tasks)] == [kept.task_to_bytes(t) for t in sorted(kept.tasks)]
    assert answers(whole)[1] == answers(torn)[1] == [1, 2, 3]


def test_a_network_without_features_of_its_own_keeps_none_and_goes_on(new_store):  # noqa: F811
    settings = new_store(kind="conv2", width=0.1, norm="task").model_copy(update={"recognition": FEATURES})
    with worker_of(settings, batches=stream((0,), 3, (8, 8))) as worker:
        learn_all(worker)
        assert worker.engine.features is None
        assert len(worker.predictor.tasks) == 1


@pytest.fixture
def weights(tmp_path):
    specs = Architecture((64,), (100,), 100).body.masked[:-1]
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "weights.safetensors"
    save_file({s.name: 0.2 * torch.randn(s.shape, generator=generator) for s in specs}, path)
    return path


def test_a_daemon_over_pretrained_weights_refuses_others(new_store, weights, tmp_path):  # noqa: F811
    settings = new_store(pretrained=weights)
    with worker_of(settings, batches=stream((0,), 4)) as worker:
        learn_all(worker)
        assert worker.predictor.scorer.network.pretrained is not None
    assert answers(settings)[1] == [1]
    save_file({"layers.0.weight": torch.zeros(100, 64)}, weights)
    with worker_of(settings) as worker, pytest.raises(NetworkMismatch, match="the store expects"):
        worker.load()
    weights.unlink()
    with worker_of(settings) as worker, pytest.raises(PretrainedMismatch, match="expected a safetensors file"):
        worker.load()


def test_what_can_be_told_before_there_is_data_is_told_at_the_start(tmp_path):
    check_network(NetworkSettings(kind="resnet50"))
    with pytest.raises(UnsupportedNetwork, match="no classification model"):
        check_network(NetworkSettings(kind="fcn_resnet50"))
    with pytest.raises(PretrainedMismatch, match="expected a safetensors file"):
        check_network(NetworkSettings(pretrained=tmp_path / "none.safetensors"))


def test_a_first_batch_that_no_such_network_can_take_is_quarantined_with_the_reason(new_store):  # noqa: F811
    settings = new_store(kind="conv6")
    with worker_of(settings, batches=[draw(0, 0)]) as worker:
        learn_all(worker)
    [(state, reason)] = ask(settings.state, "SELECT state, reason FROM batch")
    assert state == "quarantined"
    assert "conv6 takes rows of shape (H, W) or (H, W, C)" in reason


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('kind = "fcn_resnet50"', "torchvision's fcn_resnet50 is no classification model of images"),
        ('pretrained = "/nowhere/w.safetensors"', "/nowhere/w.safetensors: "),
    ],
)
def test_the_daemon_refuses_a_network_that_cannot_be_with_one_line(tmp_path, line, said):
    code, lines = DaemonProcess(tmp_path, config=f"[network]\n{line}\n").refusal()
    assert code == 78
    assert len(lines) == 1
    assert lines[0].startswith(f"supsupd: {said}")
