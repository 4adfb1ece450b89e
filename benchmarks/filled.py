"""State directories that hold any number of tasks, for the benchmarks of many tasks.

Some tasks are really trained: MNIST with its pixels in ten random orders, and where it is asked for turned by twelve
angles and split into five pairs of digits; LeNet 300-100 with 500 outputs, 300 steps each on 10,000 images. Every other
task is one of them, in turn, perturbed: the columns of its first layer's mask, and what its inputs look like, are in a
random order of their own. Such a mask has the density and the structure of one that was trained on other inputs, and
its parent's record, but no inputs are its own: there is nothing that it explains.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from common import StreamTask
from mnist_tasks import permuted, rotated, split
from paper_engine import Engine, Setup, begin_task, found, mnist

from storage import masks, tasks
from storage.db import Database, Session, upgrade
from supsupd import persistence
from supsupd.learning.bank import Mask
from supsupd.learning.index import InputMoments
from supsupd.learning.network import pack_rows
from supsupd.learning.records import TaskRecord
from supsupd.paths import DATABASE_NAME
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

TRAINED, ANGLES = 10, 12
TRAINING_ROWS, TRAINING_STEPS = 10_000, 300
OUTPUTS = 500
STORED_AT_ONCE = 500
"""Tasks of one transaction: 20 MB of masks."""


@dataclass(frozen=True)
class Trained:
    """The network and its really trained tasks, which have the ids 1, 2, … in this order."""

    engine: Engine
    records: tuple[TaskRecord, ...]
    inputs: tuple[InputMoments, ...]


@dataclass(frozen=True)
class Perturbed:
    """A trained mask with the columns of its first layer in another order: column i is the parent's `order[i]`.

    Args:
        parent: the trained task.
        order: int64 (inputs,).
        packed: uint8 (mask_bytes,).
        inputs: the parent's, in this order.
    """

    parent: TaskRecord
    order: np.ndarray
    packed: np.ndarray
    inputs: InputMoments


def orders(data: Path, part: str, seed: int = 0) -> list[StreamTask]:
    """MNIST's images of `part`, train or test, with their pixels in TRAINED random orders; `data` is a folder."""
    return permuted(mnist(data, part), np.random.default_rng(seed), TRAINED)


def all_kinds(data: Path, part: str, seed: int = 0) -> list[StreamTask]:
    """The same, then turned by ANGLES angles, then split into pairs of digits."""
    images, rng = mnist(data, part), np.random.default_rng(seed)
    return [*orders(data, part, seed), *rotated(images, rng, ANGLES), *split(images, rng, 10)]


def setup(seed: int = 0) -> Setup:
    """How their masks are trained; the network is the one that a daemon would make with these settings."""
    learning = LearningSettings(steps=TRAINING_STEPS, max_steps=TRAINING_STEPS, seed=seed)
    return Setup(NetworkSettings(outputs=OUTPUTS, seed=seed), learning, RecognitionSettings())


Tasks = Callable[[Path, str, int], list[StreamTask]]


@cache
def train(data: Path, seed: int = 0, made: Tasks = orders) -> Trained:
    """Trains the real masks, once in a process: some seconds each."""
    images = mnist(data, "train")
    engine = found(setup(seed), images.x[:TRAINING_ROWS], images.y[:TRAINING_ROWS])
    records, inputs = [], []
    for number, task in enumerate(made(data, "train", seed), start=1):
        samples = engine.samples(task.transform(task.x[:TRAINING_ROWS]), task.y[:TRAINING_ROWS])
        inputs.append(InputMoments.of(samples.x.numpy()))
        # Found, not given: a task of scenario NNs has no key.
        records.append(replace(begin_task(engine, samples, number, f"{seed} {task.name}"), key=None))
    return Trained(engine, tuple(records), tuple(inputs))


def iter_perturbed(trained: Trained, seed: int = 0) -> Iterator[Perturbed]:
    """Perturbed masks without end, one of each parent in turn; the first n are the same for the same seed."""
    network, rng = trained.engine.network, np.random.default_rng([seed, 2])
    first = network.architecture.layers[0]
    place = slice(first.offset, first.offset + first.nbytes)
    bits_of = [network.unpack(record.packed)[0].cpu().numpy() for record in trained.records]
    while True:
        for parent, inputs, bits in zip(trained.records, trained.inputs, bits_of, strict=True):
            order = rng.permutation(first.columns)
            packed = parent.packed.copy()
            packed[place] = pack_rows(bits.take(order, axis=1)).reshape(-1)
            moved = replace(inputs, mean=inputs.mean[order], square=inputs.square[order])
            yield Perturbed(parent, order, packed, moved)


def iter_records(trained: Trained, count: int, seed: int = 0) -> Iterator[tuple[TaskRecord, InputMoments]]:
    """`count` tasks with the ids 1, 2, …, and their inputs: the trained ones, then perturbed ones."""
    yield from zip(trained.records[:count], trained.inputs[:count], strict=True)
    ids = range(len(trained.records) + 1, count + 1)
    for task_id, perturbed in zip(ids, iter_perturbed(trained, seed), strict=False):
        yield replace(perturbed.parent, task_id=task_id, version=1, mask=Mask(perturbed.packed)), perturbed.inputs


def write_state(folder: Path, trained: Trained, count: int, seed: int = 0) -> Path:
    """Makes `folder` the state directory of a daemon that knows `count` tasks; its database.

    Tasks are made and written a few hundred at a time, so that memory does not grow with `count`. Raises
    storage.networks.NetworkExists for a folder that is one already.
    """
    path = folder / DATABASE_NAME
    upgrade(path)
    database = Database.open(path)
    try:
        engine = trained.engine
        config = {"scenario": engine.setup.recognition.scenario}
        with database.write() as session:
            persistence.save_network(session, engine.network, engine.normaliser, engine.classes, config)
        records = iter_records(trained, count, seed)
        while some := list(islice(records, STORED_AT_ONCE)):
            with database.write() as session:
                for record, inputs in some:
                    _store(session, record, engine)
                    tasks.save_inputs(session, record.task_id, inputs.to_bytes())
    finally:
        database.close()
    return path


def _store(session: Session, record: TaskRecord, engine: Engine) -> None:
    assert tasks.create(session, persistence.task_fields(record)) == record.task_id
    reason = "made for a benchmark"  # no batch made it
    masks.append_mask(session, persistence.mask_row(record, engine.network.architecture, None, reason))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path, help="the state directory to make")
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--tasks", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    started = time.monotonic()
    trained = train(options.data, options.seed)
    between = time.monotonic()
    path = write_state(options.state, trained, options.tasks, options.seed)
    size, seconds = path.stat().st_size / 1e6, time.monotonic() - between
    print(
        f"{path}: {options.tasks} tasks, {size:.0f} MB, trained in {between - started:.1f} s, stored in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
