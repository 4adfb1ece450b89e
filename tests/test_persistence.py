"""Between records and rows: what the engine knows of a task comes back as it was, bits and statistics apart."""

from dataclasses import replace

import numpy as np
import pytest

from storage import masks, tasks
from storage.db import Database, upgrade
from supsupd import persistence
from supsupd.learning.bank import Mask
from supsupd.learning.network import Architecture, Network
from supsupd.learning.records import TaskRecord
from supsupd.learning.reference import Gauge, Reference

ARCHITECTURES = {
    "rows that do not fill their bytes": Architecture((5,), (7,), 11),
    "with statistics": Architecture.of_kind("conv2", (8, 8, 3), 11, width=0.1, norm="task", hidden=(9,)),
}


@pytest.fixture
def store(tmp_path):
    upgrade(tmp_path / "supsup.db")
    store = Database.open(tmp_path / "supsup.db")
    yield store
    store.close()


def packed_at_random(network):
    """A mask with weights kept at random, and statistics of any value."""
    random = np.random.default_rng(3)
    bits = [
        np.packbits(random.random((s.rows, s.columns)) < 0.3, axis=1, bitorder="little")
        for s in network.architecture.layers
    ]
    rest = random.normal(size=network.architecture.statistic_bytes // 4).astype(np.float32)
    return np.concatenate([*(part.ravel() for part in bits), rest.view(np.uint8)])


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_mask_comes_back_bit_for_bit_and_its_density_counts_weights(store, architecture):
    network = Network(architecture, 0)
    packed = packed_at_random(network)
    kept = int(np.bitwise_count(packed[: architecture.bit_bytes]).sum())
    reference = Reference(errors=1.5, hits=9.0, labels={3: 7}, evidence={"entropy": Gauge(8.0, 0.5, 0.25)})
    task = TaskRecord(0, 1, Mask(packed), kept / architecture.weights, reference, batches=2, samples=128)
    with store.write() as session:
        task_id = tasks.create(session, persistence.task_fields(task))
        masks.append_mask(session, persistence.mask_row(replace(task, task_id=task_id), architecture, None, "why"))
    with store.read() as session:
        row, loaded = masks.load_mask(session, task_id), persistence.load_task(session, task_id, network)
    assert loaded.packed.tobytes() == packed.tobytes()
    assert (len(row.bits), len(row.statistics or b"")) == (architecture.bit_bytes, architecture.statistic_bytes)
    assert row.density == loaded.density == kept / architecture.weights
    assert (loaded.reference, loaded.batches, loaded.samples, loaded.state) == (reference, 2, 128, None)
    assert Reference.from_json(row.reference) == reference
