"""A state that has learned a short stream of three tasks, and a worker with the service in front of it."""

import shutil
from contextlib import contextmanager

from asking import predicted
from daemon_process import ask
from digits import draw, held_out
from intakes import intake_of
from test_worker import learn_all, stage, worker_of

from storage.db import Database, upgrade
from supsupd.config import Settings
from supsupd.learning.device import use_threads
from supsupd.sections import NetworkSettings
from supsupd.service import Service

STREAM = "AAABBBACCCABCABC"
TASK = {"A": 1, "B": 2, "C": 3}
LAST = {letter: STREAM.rindex(letter) + 1 for letter in TASK}  # ledger id of the newest batch


def settings_in(root):
    (root / "watch").mkdir(parents=True, exist_ok=True)
    shape = NetworkSettings(hidden=[100])
    return Settings(watch=[root / "watch"], state=root / "state", socket=root / "sock", network=shape)


def learn_stream(root):
    """A folder whose state has learned STREAM."""
    settings = settings_in(root)
    upgrade(settings.store)
    use_threads(1)
    batches = [draw("ABC".index(letter), turn) for turn, letter in enumerate(STREAM)]
    with worker_of(settings, batches=batches) as worker:
        learn_all(worker)
    found = ask(settings.state, "SELECT task_id FROM batch ORDER BY id")
    assert [task for (task,) in found] == [TASK[letter] for letter in STREAM]
    return root


def copy_of(learned, root):
    """Settings of a copy of `learned`, made at `root`."""
    use_threads(1)
    shutil.copytree(learned, root)
    return settings_in(root)


class Run:
    """A worker that was loaded from the state, and the service in front of it."""

    def __init__(self, worker, settings):
        worker.load()
        self.worker, self.state = worker, settings.state
        intake = intake_of(settings, worker)
        self.service = Service(settings, worker.database, worker, intake)

    def answers(self, task, letter):
        """Everything that a query hears about held-out rows under a given task's mask."""
        told = predicted(self.service, held_out("ABC".index(letter))[0], task, per_sample=True)
        arrays = (told.probabilities, told.task, told.entropy, told.known)
        return [told.labels, *(array.tobytes() for array in arrays)]

    def inferred(self, letter):
        return set(predicted(self.service, held_out("ABC".index(letter))[0][:64], None, False).task.tolist())

    def learn(self, letter, turn):
        """The ledger row of one batch more."""
        stage(settings_in(self.state.parent), self.worker.database, [draw("ABC".index(letter), turn)])
        while self.worker.step():
            pass
        return ask(self.state, "SELECT id, state, task_id FROM batch ORDER BY id DESC LIMIT 1")[0]


@contextmanager
def running(settings, kind=Database):
    with worker_of(settings, kind) as worker:
        yield Run(worker, settings)


def versions(settings, task):
    return ask(settings.state, f"SELECT version, batch_id, sha256, reason FROM mask_version WHERE task_id = {task}")
