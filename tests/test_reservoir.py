"""The reservoir: held to its reference, stored with the task, and what comes back from it is the mask, bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from asking import predicted
from daemon_process import DaemonProcess, ask, edit, mask_hashes
from digits import draw, held_out
from intakes import intake_of
from structlog.testing import capture_logs
from test_worker import FullDisk, learn_all, stage, states, worker_of

from storage.db import Database, StoreError, upgrade, verify
from supsupd import attractors, operations
from supsupd.answers import Reservoir as DescribedReservoir
from supsupd.config import ConfigError, Settings, load_settings
from supsupd.learning.device import use_threads
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import TooFewRows
from supsupd.learning.reservoir import Recovery, Reservoir, pattern_hash, recall, signs_of, storkey
from supsupd.learning.reservoir_reference import UnitNetwork, reference_step, reference_storkey
from supsupd.sections import LearningSettings, NetworkSettings, ReservoirSettings
from supsupd.service import Service
from supsupd.serving.engine import BadInput

STREAM = "AAABBBACCC"
HIDDEN = [1024, 1024]
QUICK = """
[intake]
settle_seconds = 0.1
[network]
kind = "units"
hidden = [1024, 1024]
[learning]
lr = 0.01
[reservoir]
enabled = true
"""


# -- the rule and the descent -----------------------------------------------------------------------------------------


def network_of(hidden, norm="group", inputs=5):
    return Network(Architecture((inputs,), hidden, 4, "units", norm=norm), seed=7)


def random_masks(network, count, seed=0):
    """Packed masks of fair bits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = network.architecture.layers
    return [network.pack([torch.rand(1, s.columns, generator=generator) < 0.5 for s in shapes]) for _ in range(count)]


def holding(network, masks):
    reservoir = Reservoir.empty(network)
    for mask in masks:
        reservoir = reservoir.with_pattern(mask, network)
    return reservoir


def test_the_storkey_rule_is_that_of_its_reference():
    rng = np.random.default_rng(0)
    fast, slow = torch.zeros(24, 24), np.zeros((24, 24))
    for _ in range(6):
        x = rng.choice([-1.0, 1.0], 24)
        fast, slow = storkey(fast, torch.from_numpy(x).float()), reference_storkey(slow, x)
        assert np.allclose(fast.numpy(), slow, atol=1e-6)
        assert np.array_equal(fast.numpy(), fast.numpy().T)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("descent", ["projected", "paper"])
@pytest.mark.parametrize("rows", [1, 6])
def test_recovery_goes_step_for_step_as_its_reference(norm, descent, rows):
    network = network_of((9, 8), norm)
    settings = ReservoirSettings(steps=8, descent=descent, lr=50.0, gamma=0.01)
    recovery = Recovery(holding(network, random_masks(network, 3)), network, settings)
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))
    weights = [w.double().numpy() for w in network.fixed]
    matrices = [w.double().numpy() for w in recovery.reservoir.matrices]
    here = recovery.start()
    there = ([s.double().numpy() for s in here.scores], [v.double().numpy() for v in here.velocity])
    for number in range(1, settings.steps + 1):
        here = recovery.step(here, x, number)
        there = reference_step(there, matrices, UnitNetwork(weights, norm), (x.double().numpy(), number), settings)
        for fast, slow in zip([*here.scores, *here.velocity], [*there[0], *there[1]], strict=True):
            assert np.allclose(fast.numpy(), slow, rtol=1e-3, atol=1e-4), number


def test_storing_a_mask_twice_changes_nothing():
    network = network_of((40, 30))
    first, second = random_masks(network, 2)
    once = holding(network, [first, second])
    assert once.with_pattern(first, network) is once
    assert once.patterns == (pattern_hash(first), pattern_hash(second))


def test_recall_is_perfect_within_the_capacity_and_beyond_it_the_oldest_go_first():
    network = network_of((300, 300))
    masks = random_masks(network, int(4.0 * 0.138 * 300))
    within = masks[: int(0.138 * 300)]
    assert holding(network, within).load == pytest.approx(1.0, rel=0.05)
    assert all(recall(holding(network, within), within, network, turned=0.1, seed=0))
    back = recall(holding(network, masks), masks, network, turned=0.1, seed=0)
    assert not any(back[: len(masks) // 2])
    assert all(back[-10:])


def test_stored_masks_lie_in_valleys():
    network = network_of((300, 200))
    stored, other = random_masks(network, 4), random_masks(network, 1, seed=9)[0]
    reservoir = holding(network, stored)
    lowest = reservoir.energy(signs_of(other, network))
    assert all(reservoir.energy(signs_of(mask, network)) < lowest - 100 for mask in stored)


def test_the_size_does_not_grow_with_what_is_stored():
    network = network_of((300, 200))
    sizes = {holding(network, random_masks(network, count)).nbytes for count in (0, 1, 20)}
    assert sizes == {4 * (300 * 301 + 200 * 201)}


# -- a stream ---------------------------------------------------------------------------------------------------------


def settings_in(root, **reservoir):
    (root / "watch").mkdir(parents=True, exist_ok=True)
    return Settings(
        watch=[root / "watch"],
        state=root / "state",
        socket=root / "sock",
        network=NetworkSettings(kind="units", hidden=HIDDEN),
        learning=LearningSettings(lr=0.01),
        reservoir=ReservoirSettings(enabled=True, **reservoir),
    )


def batches_of(stream):
    return [draw("ABCD".index(letter), turn) for turn, letter in enumerate(stream)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder whose state has learned STREAM: tasks 1 and 2 are finished, task 3 is the newest."""
    root = tmp_path_factory.mktemp("reservoir")
    settings = settings_in(root)
    upgrade(settings.store)
    use_threads(1)
    with worker_of(settings, batches=batches_of(STREAM)) as worker:
        learn_all(worker)
    found = ask(settings.state, "SELECT task_id FROM batch ORDER BY id")
    assert [task for (task,) in found] == ["ABC".index(letter) + 1 for letter in STREAM]
    return root


@pytest.fixture
def settings(learned, tmp_path):
    """Of a copy of `learned`."""
    use_threads(1)
    shutil.copytree(learned, tmp_path / "copy")
    return settings_in(tmp_path / "copy")


def loaded(worker):
    worker.load()
    return worker.engine.reservoir


def go_on(settings, worker, letter, turn):
    stage(settings, worker.database, [draw("ABCD".index(letter), turn)])
    while worker.step():
        pass


def rows_of(letter, count=64):
    return held_out("ABCD".index(letter))[0][:count]


def test_a_mask_is_finished_when_the_stream_goes_on_and_never_changes_again(settings):
    patterns = ask(settings.state, "SELECT task_id, version FROM reservoir_pattern ORDER BY turn")
    assert [task for task, _ in patterns] == [1, 2]
    ids = {letter: STREAM.index(letter) + 1 for letter in "ABC"}
    # Finished at the first batch that was known to be another task's: nothing of task 1 is made after that.
    made = ask(settings.state, "SELECT max(version), max(batch_id) FROM mask_version WHERE task_id = 1")[0]
    assert made[0] == patterns[0][1]
    assert made[1] < ids["C"]
    before, counted = mask_hashes(settings.state)[1], ask(settings.state, "SELECT batches FROM task WHERE id = 1")[0][0]
    with worker_of(settings) as worker:
        worker.load()
        go_on(settings, worker, "A", 100)
        evidence = ask(settings.state, "SELECT evidence FROM decision ORDER BY id DESC LIMIT 1")[0][0]
        assert worker.predictor.tasks[0].version == patterns[0][1]
    assert mask_hashes(settings.state)[1] == before
    assert ask(settings.state, "SELECT batches FROM task WHERE id = 1")[0][0] == counted + 1
    assert json.loads(evidence)["finished"] is True
    reason = ask(settings.state, "SELECT reason FROM batch ORDER BY id DESC LIMIT 1")[0][0]
    assert reason.endswith("its mask is finished and was not trained")


def test_finished_masks_are_recovered_bit_for_bit_from_inputs_alone(settings):
    with worker_of(settings) as worker:
        worker.load()
        for task, letter in ((1, "A"), (2, "B")):
            answer = worker.predictor.predict(rows_of(letter), None, per_sample=False)
            assert (set(answer.task), answer.recovered.all()) == ({task}, True)
            x = torch.from_numpy(worker.predictor.normaliser(rows_of(letter)))
            found = worker.predictor.recovery.run(x)
            assert found.steps <= 30
            assert len(found.evidence) == len(found.energy) == found.steps
            assert found.packed.tobytes() == worker.predictor.tasks[task - 1].packed.tobytes()
        # The newest task is not finished, its mask is read.
        answer = worker.predictor.predict(rows_of("C"), None, per_sample=False)
        assert (set(answer.task), answer.recovered.any()) == ({3}, False)


def test_recovered_answers_are_those_of_the_mask_itself(settings):
    with worker_of(settings) as worker:
        worker.load()
        given = worker.predictor.predict(rows_of("B"), 1, per_sample=False)
        found = worker.predictor.predict(rows_of("B"), None, per_sample=False, method="recover")
        assert np.array_equal(found.probabilities, given.probabilities)
        assert given.recovered is None


def test_a_reservoir_survives_restart_bit_for_bit(settings):
    def story(worker):
        held = loaded(worker)
        x = torch.from_numpy(worker.predictor.normaliser(rows_of("A")))
        found = worker.predictor.recovery.run(x)
        return held.to_bytes(), held.patterns, found.packed.tobytes(), found.evidence, found.energy

    with worker_of(settings) as worker:
        first = story(worker)
        go_on(settings, worker, "B", 101)  # and with it task 3 is finished
        assert len(worker.engine.reservoir.patterns) == 3
        second = worker.engine.reservoir.to_bytes()
    with worker_of(settings) as worker:
        again = story(worker)
    assert again[0] == second != first[0]
    assert again[1][:2] == first[1]
    assert again[2] == first[2]
    assert verify(settings.store) == []


def test_matrices_are_stored_with_the_batch_or_not_at_all(settings):
    tables = "SELECT layer, patterns, sha256 FROM reservoir", "SELECT task_id, version FROM reservoir_pattern"
    before = mask_hashes(settings.state), [ask(settings.state, table) for table in tables]
    with worker_of(settings, FullDisk) as worker:
        held = loaded(worker)
        stage(settings, worker.database, [draw(1, 102)])
        worker.database.full = (worker.database.commits + 2,)  # the claim goes through, the change does not
        with pytest.raises(StoreError, match="disk full"):
            worker.step()
        assert states(settings)[-1] == "training"
        assert [ask(settings.state, table) for table in tables] == before[1]
        assert mask_hashes(settings.state) == before[0]
        assert worker.engine.reservoir is held
    with worker_of(settings) as worker:
        learn_all(worker)
        assert states(settings)[-1] == "committed"
        assert [len(ask(settings.state, table)) for table in tables] == [2, 3]
        assert {patterns for _, patterns, _ in ask(settings.state, tables[0])} == {3}


def test_a_damaged_matrix_is_made_anew_from_the_bits(settings):
    with worker_of(settings) as worker:
        before = loaded(worker).to_bytes()
        with worker.database.write() as session:
            session.connection().exec_driver_sql("UPDATE reservoir SET matrix = zeroblob(16) WHERE layer = 1")
    assert any("layer 1" in problem for problem in verify(settings.store))
    with worker_of(settings) as worker, capture_logs() as logs:
        assert loaded(worker).to_bytes() == before
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["reservoir_made_anew"]
    assert verify(settings.store) == []


def test_a_damaged_mask_leaves_the_reservoir_with_its_task_and_the_others_are_still_recovered(settings):
    edit(
        settings.state,
        "UPDATE mask_version SET bits = CAST(? || substr(bits, 2) AS BLOB) WHERE task_id = 1 AND version = "
        "(SELECT version FROM task WHERE id = 1)",
        b"\x5a",
    )
    with worker_of(settings) as worker:
        assert len(loaded(worker).patterns) == 1
        assert list(worker.engine.out_of_service) == [1]
        answer = worker.predictor.predict(rows_of("B"), None, per_sample=False)
        assert (set(answer.task), answer.recovered.all()) == ({2}, True)
        operations.rollback(worker, 1, 1)
        go_on(settings, worker, "B", 107)
        assert worker.engine.learner.is_finished(worker.engine.learner.tasks[1])
        assert set(worker.predictor.predict(rows_of("A"), None, per_sample=False).task) == {1}


def test_near_its_capacity_it_warns(settings):
    near = settings.model_copy(update={"reservoir": ReservoirSettings(enabled=True, warn_load=0.02)})
    with worker_of(near) as worker, capture_logs() as logs:
        worker.load()
        go_on(settings, worker, "A", 103)
    (warning,) = [line for line in logs if line["event"] == "reservoir_near_capacity"]
    assert (warning["patterns"], warning["load"]) == (3, round(3 / (0.138 * 1024), 3))


def test_beyond_its_capacity_a_task_is_not_finished(settings):
    with worker_of(settings) as worker, capture_logs() as logs:
        held = loaded(worker)
        full = Reservoir(tuple(w[:20, :20] for w in held.matrices), tuple(t[:20] for t in held.totals), held.patterns)
        with worker.database.write() as session:
            tasks = list(worker.engine.learner.tasks.values())
            assert attractors.finish(session, full, tasks, worker.engine.network) is full
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["reservoir_full"]


def test_a_retired_task_is_no_answer_and_comes_back_with_its_pattern(settings):
    with worker_of(settings) as worker:
        held = loaded(worker)
        operations.retire(worker, 1)
        assert 1 not in worker.predictor.predict(rows_of("A"), None, per_sample=False).task
        go_on(settings, worker, "B", 104)
        operations.reopen(worker, 1)
        assert worker.engine.reservoir.patterns[:2] == held.patterns
        answer = worker.predictor.predict(rows_of("A"), None, per_sample=False)
        assert (set(answer.task), answer.recovered.all()) == ({1}, True)


def test_tasks_learned_without_a_reservoir_are_finished_once_there_is_one(settings):
    with worker_of(settings) as worker:
        worker.load()
    without = settings.model_copy(update={"reservoir": ReservoirSettings()})
    with worker_of(without) as worker:
        worker.load()
        assert worker.engine.reservoir is None
        go_on(settings, worker, "A", 105)  # trained again: the stored pattern is no task's mask any more
        assert worker.predictor.tasks[0].version > ask(settings.state, "SELECT version FROM reservoir_pattern")[0][0]
    with worker_of(settings) as worker:
        assert len(loaded(worker).patterns) == 1
        go_on(settings, worker, "C", 106)
        finished = {t.task_id for t in worker.engine.learner.tasks.values() if worker.engine.learner.is_finished(t)}
        assert finished == {1, 2}
        assert worker.predictor.predict(rows_of("A"), None, per_sample=False).recovered.all()


# -- asking -----------------------------------------------------------------------------------------------------------


def test_the_service_tells_what_it_holds_and_what_that_costs(settings):
    with worker_of(settings) as worker:
        worker.load()
        told = attractors.describe(worker.predictor)
    assert (told["patterns"], told["tasks"], told["capacity"]) == (2, [1, 2], 141)
    assert told["matrix_bytes"] == 2 * 4 * 1024 * 1025
    assert told["raw_bytes"] == 2 * 2 * 1024 // 8
    assert told["break_even_patterns"] == 32800
    assert (told["recovery_tried"], told["recovered"], told["recovery_rate"]) == (2, 2, 1.0)


def test_unlabelled_batches_say_whether_their_mask_was_recovered(settings):
    with worker_of(settings) as worker:
        worker.load()
        stage(settings, worker.database, [{"x": rows_of("B")}])
        worker.step()
    row = ask(settings.state, "SELECT task_id, evidence FROM decision ORDER BY id DESC LIMIT 1")[0]
    assert (row[0], json.loads(row[1])["recovered"]) == (2, True)


def test_method_recover_needs_a_reservoir(settings):
    without = settings.model_copy(update={"reservoir": ReservoirSettings()})
    with worker_of(without) as worker:
        worker.load()
        intake = intake_of(without, worker)
        service = Service(without, worker.database, worker, intake)
        with pytest.raises(BadInput, match=r"^bad_method: method recover needs a reservoir"):
            predicted(service, rows_of("A"), None, False, "recover")
        assert service.reservoir() == {"enabled": False}


def test_units_normalised_by_the_batch_refuse_a_single_row(tmp_path):
    settings = settings_in(tmp_path)
    settings = settings.model_copy(update={"network": NetworkSettings(kind="units", hidden=HIDDEN, norm="batch")})
    upgrade(settings.store)
    use_threads(1)
    with worker_of(settings, Database, batches_of("AAA")) as worker:
        learn_all(worker)
        assert worker.predictor.predict(rows_of("A"), None, per_sample=False).recovered is not None
        for rows, single in ((1, False), (4, True)):
            with pytest.raises(TooFewRows, match="at least 2 together"):
                worker.predictor.predict(rows_of("A", rows), None, per_sample=single)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[reservoir]\nenabled = true\n", "network.kind: given 'mlp'; expected 'units'"),
        ("[recognition]\ninference = 'recover'\n", "recognition.inference: given 'recover'; expected 'exact'"),
        ("[reservoir]\nwarn_load = 2\n", "reservoir.warn_load: given 2"),
        ("[reservoir]\nsteps = 0\n", "reservoir.steps: given 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_line(tmp_path, text, problem):
    (tmp_path / "in").mkdir()
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings({"watch": [tmp_path / "in"]}, file)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]


def test_a_state_of_weights_is_refused(tmp_path):
    settings = settings_in(tmp_path)
    weights = settings.model_copy(update={"network": NetworkSettings(hidden=[20]), "reservoir": ReservoirSettings()})
    upgrade(settings.store)
    with worker_of(weights, batches=batches_of("A")) as worker:
        learn_all(worker)
    with worker_of(settings) as worker, pytest.raises(ConfigError, match=r"^reservoir.enabled: given True"):
        worker.load()


def test_the_command_line_and_the_socket_show_it(settings):
    with DaemonProcess(settings.state.parent, config=QUICK) as daemon:
        daemon.start()
        told = json.loads(daemon.cli("reservoir", "show", "--json").stdout)[0]
        assert told == daemon.client.reservoir()
        assert told.keys() == DescribedReservoir.__annotations__.keys()
        assert told["tasks"] == [1, 2]
        text = daemon.cli("reservoir", "show").stdout
        assert "The matrices take 16400 times the bytes of the raw bits; from 32800 masks on they would take" in text
        answers = daemon.client.predict(rows_of("A"))
        assert {row["task"] for row in answers} == {1}
        assert daemon.stop() == 0
