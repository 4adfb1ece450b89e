"""The scenarios: with given tasks a key is a task and nothing else is asked; without them nobody looks at a key."""

import hashlib
import io
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from asking import predicted
from daemon_process import DaemonProcess, ask, what_was_learned
from digits import PIXELS, draw, drop, held_out
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from intakes import intake_of, take_all
from learning_stream import samples_of, small_network

from storage.db import Database, upgrade
from storage.spool import Spool
from streams.batch import BatchRejected
from streams.directory import DirectorySettings, DirectorySource
from supsupd import operations
from supsupd.config import ConfigError, Settings
from supsupd.daemon import EXIT_CONFIG, run
from supsupd.learning.continual import ContinualLearner
from supsupd.learning.device import pick_device, use_threads
from supsupd.learning.given import GivenLearner
from supsupd.learning.inference import Scorer
from supsupd.learning.records import LabelledBatch
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings
from supsupd.service import Service
from supsupd.serving.engine import BadInput, EngineError
from supsupd.worker import Worker

GIVEN = ("GG", "GNs", "GNu")


@pytest.fixture(autouse=True)
def one_thread():
    use_threads(1)


@pytest.fixture
def settings_of(tmp_path):
    """Makes settings of a scenario over one state directory for each name."""

    def make(scenario, name="one", objective="entropy", **network):
        root = tmp_path / name
        (root / "watch").mkdir(parents=True, exist_ok=True)
        return Settings(
            watch=[root / "watch"],
            state=root / "state",
            socket=root / "sock",
            network=NetworkSettings(hidden=[50], **network),
            recognition=RecognitionSettings(scenario=scenario, objective=objective),
        )

    return make


class Parts:
    """The daemon's parts over one state directory, in this process and without its threads."""

    def __init__(self, settings, database):
        self.settings, self.database = settings, database
        self.worker = Worker(settings, database, Spool(settings.state / "spool"), pick_device("cpu"))
        self.worker.load()
        self.intake = intake_of(settings, self.worker)
        times = DirectorySettings(settle_seconds=0, incomplete_seconds=0)
        self.source = DirectorySource(settings.watch[0], name="in", cursors={}, settings=times)
        self.service = Service(settings, database, self.worker, self.intake)

    def drop(self, name, turn=0, **arrays):
        drop(self.settings.watch[0] / name, turn, **arrays)

    def run(self):
        """Takes and learns all that is there; what became of each batch by its name."""
        take_all(self.intake, self.source)
        while self.worker.step():
            pass
        return {row["name"]: row for row in self.service.batches(None, None)}

    def keys(self):
        return {row["task"]: row["key"] for row in self.service.tasks()}


@contextmanager
def running(settings):
    upgrade(settings.store)
    database = Database.open(settings.store)
    parts = None
    try:
        parts = Parts(settings, database)
        yield parts
    finally:
        if parts is not None:
            parts.source.close()
        database.close()


def npz(**arrays):
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def few_classes(task, seed, classes, rows=32):
    batch = draw(task, seed, rows=400)
    mine = np.isin(batch["y"], classes)
    return {key: value[mine][:rows] for key, value in batch.items()}


# --- the engine -----------------------------------------------------------------------------------------------------


def given_learner(**learning):
    network = small_network(hidden=(20,))
    settings = LearningSettings(**({"steps": 2} | learning))
    return GivenLearner(network, Scorer(network, threads=1), settings, RecognitionSettings())


def consider(learner, number, key, x, y, given_id=None):
    digest = hashlib.sha256(f"{number}".encode()).hexdigest()
    batch = LabelledBatch(number, digest, samples_of(x, y), key, given_id)
    change = learner.consider(batch, classes=10)
    if change.kind == "new":
        change = replace(change, task=replace(change.task, task_id=len(learner.tasks) + 1))
    learner.apply(change)
    return change


@examples(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=12))
def test_as_many_keys_as_tasks_whatever_the_data_are(stream):
    """Equal inputs under other keys, other inputs under one key, batches of one row, labels that are noise."""
    learner, random = given_learner(), np.random.default_rng(0)
    for number, (key, kind, rows) in enumerate(stream):
        x = [held_out(0)[0][:rows], held_out(1)[0][:rows], random.normal(size=(rows, PIXELS)).astype(np.float32)][kind]
        change = consider(learner, number, key, x, random.integers(0, 10, rows))
        assert change.task.key == key
        assert not learner.provisionals
    batches = [key for key, _, _ in stream]
    assert {task.key: task.batches for task in learner.tasks.values()} == {key: batches.count(key) for key in batches}


def test_a_given_batch_leaves_every_other_task_as_it_is():
    learner = given_learner()
    for number, key in enumerate("ab"):
        consider(learner, number, key, *held_out(0))
    before = learner.tasks[1]
    consider(learner, 2, "b", *held_out(1))
    assert learner.tasks[1] is before


def test_a_given_task_keeps_a_record_of_rows_that_it_was_not_trained_on():
    learner = given_learner()
    x, y = held_out(0)
    first = consider(learner, 0, "a", x[:80], y[:80]).task
    assert first.reference.errors + first.reference.hits == 10  # an eighth of the rows is held out
    assert {gauge.count for gauge in first.reference.evidence.values()} == {10}
    assert sum(first.reference.labels.values()) == 80
    second = consider(learner, 1, "a", x[80:160], y[80:160])
    assert second.task.reference.errors + second.task.reference.hits == 90  # all, before any was trained on
    assert second.evidence["candidates"][0]["task"] == 1
    assert second.evidence["given"] == "a"


def test_a_given_task_may_start_from_what_others_have_learned():
    """With steps too small to change a bit, a second task is where it starts."""
    masks = {}
    for transfer in ("none", "best"):
        learner = given_learner(transfer=transfer, lr=1e-9)
        masks[transfer] = [consider(learner, n, "ab"[n], *held_out(0)).task.packed.tobytes() for n in (0, 1)]
    assert masks["best"][1] == masks["best"][0] == masks["none"][0] != masks["none"][1]


def test_another_key_may_name_a_task_that_answers_for_it():
    learner = given_learner()
    consider(learner, 0, "a", *held_out(0))
    assert consider(learner, 1, "b", *held_out(0), given_id=1).task.task_id == 1
    assert len(learner.tasks) == 1


def test_a_label_that_a_given_task_sees_late_is_learned_too():
    learner = given_learner()
    x, y = held_out(0)
    consider(learner, 0, "a", x[y < 5], y[y < 5])
    assert set(consider(learner, 1, "a", x[y >= 5], y[y >= 5]).task.reference.labels) == set(range(10))


# --- given tasks, from a file to a mask -----------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", GIVEN)
def test_the_file_says_the_task_or_else_its_folder(settings_of, scenario):
    with running(settings_of(scenario)) as parts:
        parts.drop("line3/1.npz", 1, **draw(0, 0))
        parts.drop("other/2.npz", 2, **draw(0, 1), task="line3")
        parts.drop("3.npz", 3, **draw(1, 2), task=7)
        parts.drop("deep/er/4.npz", 4, **draw(2, 3))
        parts.drop("5.npz", 5, **draw(2, 4), task=np.full(64, "deep/er"))
        rows = parts.run()
        assert [row["task"] for row in rows.values()] == [1, 1, 2, 3, 3]
        assert [row["given_task"] for row in rows.values()] == ["line3", "line3", "7", "deep/er", "deep/er"]
        assert parts.keys() == {1: "line3", 2: "7", 3: "deep/er"}
        assert [row["name"] for row in parts.service.tasks()] == ["line3", "7", "task-3"]  # deep/er is no name
        assert rows["line3/1.npz"]["reason"] == "the task was given: line3, its first batch"
        assert rows["other/2.npz"]["reason"].startswith("the task was given: line3; ")


@pytest.mark.parametrize("scenario", GIVEN)
def test_a_labelled_batch_without_a_task_is_refused_in_one_line(settings_of, scenario):
    with running(settings_of(scenario)) as parts:
        parts.drop("1.npz", 1, **draw(0, 0))
        row = parts.run()["1.npz"]
        assert row["state"] == "quarantined"
        assert row["reason"] == (
            "no_task: expected a member task, or a folder that names the task below the watched one"
        )
        with pytest.raises(BatchRejected, match="no_task"):
            parts.intake.staging.submit("1.npz", "npz", npz(**draw(0, 0)))
        assert parts.intake.staging.submit("line3/1.npz", "npz", npz(**draw(0, 0)))[0].duplicate is False
        assert parts.intake.staging.submit("2.npz", "npz", npz(**draw(0, 1), task="line3"))[0].duplicate is False
        assert {row["task"] for row in parts.run().values()} == {None, 1}


def test_the_same_samples_under_another_key_are_another_batch(settings_of):
    with running(settings_of("GNs")) as parts:
        for turn, name in enumerate(["a/1.npz", "a/2.npz", "b/1.npz", "b/deep.npz"]):
            parts.drop(name, turn, **draw(0, 0))
        parts.drop("a/x/3.npz", 9, **draw(0, 0), task="a")
        states = [row["state"] for row in parts.run().values()]
        assert states == ["committed", "duplicate", "committed", "duplicate", "committed"]
        assert parts.keys() == {1: "a", 2: "b"}


def test_a_restart_keeps_keys_and_goes_on_with_them(settings_of):
    settings = settings_of("GNu")
    with running(settings) as parts:
        for turn, key in enumerate(["a", "b", "c/d"]):
            parts.drop(f"{key}/1.npz", turn, **draw(turn, 0))
        parts.run()
        parts.service.rename(1, "renamed")
        keys = parts.keys()
    with running(settings) as parts:
        assert parts.keys() == keys == {1: "a", 2: "b", 3: "c/d"}
        parts.drop("a/2.npz", 10, **draw(0, 1))
        assert parts.run()["a/2.npz"]["task"] == 1
        assert [row["batches"] for row in parts.service.tasks()] == [2, 1, 1]


def test_batches_of_a_merged_key_go_to_the_task_that_answers_for_it(settings_of):
    settings = settings_of("GNs")
    with running(settings) as parts:
        for turn, key in enumerate("ab"):
            parts.drop(f"{key}/1.npz", turn, **draw(0, turn))
        parts.run()
        operations.merge(parts.worker, 1, 2)
        parts.drop("b/2.npz", 9, **draw(0, 2))
        assert parts.run()["b/2.npz"]["task"] == 1
    with running(settings) as parts:
        parts.drop("b/3.npz", 10, **draw(0, 3))
        assert parts.run()["b/3.npz"]["task"] == 1


def test_a_batch_for_a_retired_task_is_refused(settings_of):
    with running(settings_of("GNs")) as parts:
        for turn, key in enumerate("ab"):
            parts.drop(f"{key}/1.npz", turn, **draw(turn, 0))
        parts.run()
        operations.retire(parts.worker, 1)
        parts.drop("a/2.npz", 9, **draw(0, 1))
        assert parts.run()["a/2.npz"]["reason"].startswith("task_retired: task 1 (a) is retired")


# --- inference ------------------------------------------------------------------------------------------------------


@pytest.fixture
def split_parts(settings_of):
    """Makes parts that have learned two tasks of the same pixels: digits 0 to 4 and 5 to 9."""

    @contextmanager
    def make(scenario, **changes):
        with running(settings_of(scenario, **changes)) as parts:
            for turn in range(4):
                parts.drop(f"low/{turn}.npz", 2 * turn, **few_classes(0, turn, range(5)))
                parts.drop(f"high/{turn}.npz", 2 * turn + 1, **few_classes(0, turn, range(5, 10)))
            parts.run()
            yield parts

    return make


@pytest.mark.parametrize("scenario", ["GG", "GNu"])
def test_a_task_answers_only_with_labels_that_it_has_learned(split_parts, scenario):
    with split_parts(scenario) as parts:
        x, _ = held_out(0)
        for task, own in (("low", range(5)), ("high", range(5, 10))):
            answer = predicted(parts.service, x, task, per_sample=False)
            others = ~np.isin(answer.classes, own)
            assert set(answer.labels) <= set(own)
            assert (answer.probabilities[:, others] == 0).all()
            np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, atol=1e-5)


def test_inferred_tasks_too_answer_only_with_their_own_labels(split_parts):
    with split_parts("GNu") as parts:
        x, _ = held_out(0)
        answer = predicted(parts.service, x, None, per_sample=True)
        assert set(answer.task.tolist()) == {1, 2}
        assert all((label < 5) == (task == 1) for label, task in zip(answer.labels, answer.task, strict=True))


def test_shared_labels_are_all_possible(split_parts):
    with split_parts("GNs") as parts:
        assert (predicted(parts.service, held_out(0)[0], "low", per_sample=False).probabilities > 0).all()


def test_in_gg_a_query_names_its_task(split_parts):
    x = held_out(0)[0][:4]
    with split_parts("GG") as parts:
        with pytest.raises(BadInput, match="no_task: in scenario GG every query names its task") as caught:
            predicted(parts.service, x, None, per_sample=False)
        assert caught.value.status == 400
        assert {int(predicted(parts.service, x, name, False).task[0]) for name in (2, "high", "id:2", "key:high")} == {
            2
        }
        with pytest.raises(EngineError, match="there is no task middle"):
            predicted(parts.service, x, "middle", per_sample=False)


def test_in_gg_an_unlabelled_batch_names_its_task_and_waits_for_it(settings_of):
    with running(settings_of("GG")) as parts:
        parts.drop("b/0.npz", 0, x=held_out(1)[0][:20])
        parts.drop("1.npz", 1, x=held_out(0)[0][:20])
        parts.drop("a/2.npz", 2, **draw(0, 0))
        rows = parts.run()
        assert rows["1.npz"]["reason"].startswith("no_task: ")
        assert (rows["b/0.npz"]["state"], rows["b/0.npz"]["reason"]) == (
            "unsure",
            "task b is not known yet; it is scored as soon as it is",
        )
        parts.drop("b/3.npz", 3, **draw(1, 0))
        row = parts.run()["b/0.npz"]
        assert (row["state"], row["task"]) == ("scored", 2)


@pytest.mark.parametrize("scenario", ["GNs", "GNu"])
def test_in_gn_the_task_of_an_unlabelled_batch_is_inferred_unless_the_file_says_it(settings_of, scenario):
    with running(settings_of(scenario)) as parts:
        for turn in range(6):
            parts.drop(f"{'ab'[turn % 2]}/{turn}.npz", turn, **draw(turn % 2, turn))
        parts.drop("a/x.npz", 9, x=held_out(1)[0][:100])  # the folder says where it lies, no more
        parts.drop("a/y.npz", 10, x=held_out(1)[0][:99], task="a")
        rows = parts.run()
        assert (rows["a/x.npz"]["task"], rows["a/y.npz"]["task"]) == (2, 1)


# --- without given tasks --------------------------------------------------------------------------------------------


def learned(state):
    """All that the daemon decided, except for the hashes of the files."""
    found = what_was_learned(state)
    found["ledger"] = [row[:2] + row[3:] for row in found["ledger"]]
    found["evidence"] = ask(state, "SELECT batch_id, kind, task_id, evidence FROM decision ORDER BY id")
    return found


def test_nns_never_looks_at_the_task(settings_of):
    stories = ["never", [b"no"], 3, "line3", np.arange(5), np.array("x" * 999), float("nan")]
    plain, told = settings_of("NNs", "plain"), settings_of("NNs", "told")
    for settings in (plain, told):
        with running(settings) as parts:
            for turn in range(12):
                task = {"task": np.array(stories[turn % len(stories)])} if settings is told else {}
                parts.drop(f"folder{turn % 3}/{turn}.npz", turn, **draw(turn // 2 % 2, turn, rows=48), **task)
            parts.run()
            assert set(parts.keys().values()) == {None}
    before, after = learned(plain.state), learned(told.state)
    for part, value in before.items():
        assert after[part] == value, part
    assert len(ask(plain.state, "SELECT id FROM task")) == 2
    assert ask(told.state, "SELECT DISTINCT given_task FROM batch") == [(None,)]


def test_nns_takes_the_same_bytes_in_two_folders_for_one_batch(settings_of):
    with running(settings_of("NNs")) as parts:
        for turn, folder in enumerate("ab"):
            parts.drop(f"{folder}/1.npz", turn, **draw(0, 0))
        assert [row["state"] for row in parts.run().values()] == ["unsure", "duplicate"]


# --- a state directory stays as it was begun ------------------------------------------------------------------------


@pytest.mark.parametrize(("begun", "asked"), [("NNs", "GNs"), ("NNs", "GG"), ("GG", "NNs"), ("GNu", "NNs")])
def test_given_tasks_and_found_ones_do_not_mix(settings_of, begun, asked):
    with running(settings_of(begun)) as parts:
        parts.drop("a/1.npz", **draw(0, 0))
        parts.run()
    with pytest.raises(ConfigError) as caught, running(settings_of(asked)):
        pass
    (line,) = caught.value.problems
    assert line.startswith(f"recognition.scenario: given {asked!r}; expected '")
    assert f"was begun with {begun!r}" in line


def test_the_daemon_says_so_in_one_line_and_ends(settings_of, capfd):
    with running(settings_of("GG")) as parts:
        parts.drop("a/1.npz", **draw(0, 0))
        parts.run()
    assert run(settings_of("NNs")) == EXIT_CONFIG
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("supsupd: ")]
    assert line.startswith("supsupd: recognition.scenario: given 'NNs'; expected 'GG', 'GNs' or 'GNu', since ")


@pytest.mark.parametrize(("begun", "asked"), [("GG", "GNs"), ("GNs", "GNu"), ("GNu", "GG")])
def test_scenarios_with_given_tasks_go_on_with_each_other(settings_of, begun, asked):
    with running(settings_of(begun)) as parts:
        parts.drop("a/1.npz", **draw(0, 0))
        parts.run()
    with running(settings_of(asked)) as parts:
        parts.drop("a/2.npz", 1, **draw(0, 1))
        assert parts.run()["a/2.npz"]["task"] == 1


# --- objective g ----------------------------------------------------------------------------------------------------


def test_objective_g_keeps_an_output_that_is_no_class(settings_of):
    with running(settings_of("GNs", objective="g", outputs=5)) as parts:
        parts.drop("a/1.npz", 1, **few_classes(0, 0, [0, 1, 2]))
        parts.drop("a/2.npz", 2, **few_classes(0, 1, [0, 1, 2, 3]))
        parts.drop("a/3.npz", 3, **few_classes(0, 2, [0, 1, 2, 3, 4]))
        rows = parts.run()
        assert [row["state"] for row in rows.values()] == ["committed", "committed", "quarantined"]
        assert rows["a/3.npz"]["reason"].startswith("bad_labels: ")
        assert len(predicted(parts.service, held_out(0)[0][:4], None, False, objective="g").labels) == 4


def test_a_first_batch_that_would_leave_no_output_for_objective_g_founds_nothing(settings_of):
    with running(settings_of("GNs", objective="g", outputs=5)) as parts:
        parts.drop("a/1.npz", 1, **few_classes(0, 0, range(5)))
        assert parts.run()["a/1.npz"]["reason"].startswith("bad_labels: ")
        assert parts.service.model() is None


def test_classes_that_fill_the_outputs_leave_nothing_for_objective_g(settings_of):
    with running(settings_of("GNs", outputs=5)) as parts:
        parts.drop("a/1.npz", 1, **few_classes(0, 0, range(5)))
        parts.run()
        with pytest.raises(BadInput, match="bad_objective: ") as caught:
            predicted(parts.service, held_out(0)[0][:4], None, False, objective="g")
        assert caught.value.status == 400
    with (
        pytest.raises(ConfigError, match=r"recognition.objective: given 'g'; expected .* 5 classes .* all 5 outputs"),
        running(settings_of("GNs", objective="g", outputs=5)),
    ):
        pass


@pytest.mark.parametrize("method", ["exact", "one-shot", "binary"])
@pytest.mark.parametrize("objective", ["entropy", "g", "energy", "max-logit"])
def test_a_query_chooses_how_its_task_is_inferred(split_parts, method, objective):
    with split_parts("GNs") as parts:
        x, y = held_out(0)
        answer = predicted(parts.service, x[y < 5], None, False, method, objective)
        assert set(answer.task.tolist()) <= {1, 2}
        if method == "exact" and objective == "entropy":
            assert answer.labels == predicted(parts.service, x[y < 5], None, False).labels


# --- the whole program ----------------------------------------------------------------------------------------------

GG_CONFIG = """
[intake]
settle_seconds = 0.1
[network]
hidden = [50]
[recognition]
scenario = "GG"
"""


def test_the_daemon_in_gg_from_folders_to_answers(tmp_path):
    with DaemonProcess(tmp_path, config=GG_CONFIG) as daemon:
        daemon.start()
        for turn in range(3):
            daemon.drop(f"low/{turn}", **few_classes(0, turn, range(5)))
            daemon.drop(f"high/{turn}", **few_classes(0, turn, range(5, 10)))
        daemon.wait()
        assert {row["key"]: row["batches"] for row in daemon.client.tasks()} == {"low": 3, "high": 3}
        queries = tmp_path / "query.npz"
        np.savez(queries, x=held_out(0)[0][:20])
        refused = daemon.cli("predict", queries)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "no_task: in scenario GG every query names its task" in refused.stderr
        rows = daemon.listing("predict", queries, "--task", "high", "--method", "binary", "--objective", "G")
        assert {row["label"] for row in rows} <= set(range(5, 10))
        unknown = daemon.cli("predict", queries, "--task", "high", "--method", "magic")
        assert "method must be one of exact, one-shot, binary" in unknown.stderr


def test_a_learner_without_given_tasks_has_no_use_for_keys():
    network = small_network(hidden=(20,))
    learner = ContinualLearner(network, Scorer(network, threads=1), LearningSettings(), RecognitionSettings())
    batch = LabelledBatch(1, "0" * 64, samples_of(*held_out(0)))
    told = replace(batch, given="a")
    plain, ignored = learner.consider(batch, 10), learner.consider(told, 10)
    assert (plain.kind, plain.evidence) == (ignored.kind, ignored.evidence)
    assert plain.provisional.mask.packed.tobytes() == ignored.provisional.mask.packed.tobytes()
