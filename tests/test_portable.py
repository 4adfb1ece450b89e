"""Masks in a file: what comes out on another machine is what went in, and a file that is not whole is refused."""

import hashlib
import json
import re
import shutil
import sqlite3
import stat

import numpy as np
import pytest
from daemon_process import DaemonProcess, ask, edit, mask_hashes, what_was_learned
from digits import draw, held_out
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from learned_state import Run, copy_of, learn_stream, running, settings_in
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stores import postgresql_target
from test_worker import worker_of
from typer.testing import CliRunner

from cli.supsupd import app
from storage.db import verify
from storage.lock import StateLock
from supsupd import operations
from supsupd.config import Settings
from supsupd.learning.network import Architecture
from supsupd.portable import MAX_HEADER, FileRefused, digest_of, open_masks

TASKS = "ABC"


def supsupd(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def moved_from(settings, file, *flags):
    return supsupd("masks", "export", file, "--state", settings.state, *flags)


def moved_to(settings, file, *flags):
    return supsupd("masks", "import", file, "--state", settings.state, *flags)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return learn_stream(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def file(learned):
    assert moved_from(settings_in(learned), learned / "masks") == (0, f"exported 3 tasks to {learned / 'masks'}\n", "")
    return learned / "masks"


@pytest.fixture
def settings(learned, tmp_path):
    return copy_of(learned, tmp_path / "copy")


@pytest.fixture
def fresh(tmp_path):
    return settings_in(tmp_path / "fresh")


def answers(run):
    return {letter: run.answers(task, letter) for task, letter in enumerate(TASKS, start=1)}


# -- from one state to another ----------------------------------------------------------------------------------------


def test_a_fresh_state_predicts_bit_for_bit_as_the_one_that_learned_and_knows_its_tasks(settings, fresh, file):
    assert moved_to(fresh, file) == (0, "imported 3 tasks: 1 as 1, 2 as 2, 3 as 3\n", "")
    with running(settings) as here, running(fresh) as there:
        assert answers(there) == answers(here)
        for letter in TASKS:
            assert there.inferred(letter) == here.inferred(letter)
        for task, letter in enumerate(TASKS, start=1):
            assert there.learn(letter, 700)[1:] == ("committed", task)
        kept = [
            {key: value for key, value in row.items() if key not in ("version", "created", "last_seen")}
            for row in here.service.tasks()
        ]
    columns = "seed, signs_sha256, normalisation, classes, label_kind, config"
    network = f"SELECT {columns} FROM network"
    assert ask(fresh.state, network) == ask(settings.state, network)
    assert [row["name"] for row in kept] == [name for (name,) in ask(fresh.state, "SELECT name FROM task")]
    assert verify(fresh.store) == []


def test_what_a_fresh_state_learns_next_is_what_the_first_one_learns_from_the_same_bits(settings, fresh, file):
    edit(settings.state, "DELETE FROM training_state")  # it does not go along: training goes on from the bits
    moved_to(fresh, file)
    with running(settings) as here, running(fresh) as there:
        for run in (here, there):
            assert run.learn("B", 701)[1:] == ("committed", 2)
    assert mask_hashes(fresh.state)[2][-1] == mask_hashes(settings.state)[2][-1]


def test_every_imported_version_says_where_it_comes_from_and_who_brought_it(settings, fresh, file):
    moved_to(fresh, file)
    with open_masks(file) as found:
        sha256 = found.sha256
    with running(fresh) as run:
        for task in (1, 2, 3):
            (row,) = run.service.history(task)
            version = ask(settings.state, f"SELECT version FROM task WHERE id = {task}")[0][0]
            assert row["reason"] == f"imported from {sha256[:16]}, task {task} version {version}"
            assert (row["version"], row["batch"], row["served"]) == (1, None, True)
            assert row["made_by"].endswith(")")


def test_masks_that_are_there_already_are_refused_unless_asked_for_again(settings, file):
    before = what_was_learned(settings.state)
    code, _, told = moved_to(settings, file)
    assert (code, told) == (1, "task 1 of the file has the mask of task 1; --again takes it anyhow\n")
    assert what_was_learned(settings.state) == before
    assert moved_to(settings, file, "--again")[:2] == (0, "imported 3 tasks: 1 as 4, 2 as 5, 3 as 6\n")
    with running(settings) as run:
        assert [row["name"] for row in run.service.tasks()] == [f"task-{task}" for task in range(1, 7)]
        assert run.answers(4, "A")[0] == run.answers(1, "A")[0]


def test_names_and_keys_that_are_taken_get_a_number(learned, settings, tmp_path):
    edit(settings.state, "UPDATE task SET name = 'cats', key = 'day/1' WHERE id = 1")
    assert moved_from(settings, tmp_path / "one", "--tasks", "1")[0] == 0
    for _ in range(2):
        assert moved_to(settings, tmp_path / "one", "--again")[0] == 0
    found = ask(settings.state, "SELECT id, name, key FROM task ORDER BY id")
    assert found[0] == (1, "cats", "day/1")
    assert found[3:] == [(4, "cats-2", "day/1-2"), (5, "cats-3", "day/1-3")]
    assert verify(settings.store) == []


def test_a_task_that_has_learned_more_joins_beside_the_old_one(settings, file):
    with running(settings) as run:
        operations.retire(run.worker, 2)
        operations.rollback(run.worker, 1, 1)
    (code, told, _) = moved_to(settings, file, "--again")
    assert (code, told) == (0, "imported 3 tasks: 1 as 4, 2 as 5, 3 as 6\n")
    with running(settings) as run:
        assert run.service.ready()
        assert run.inferred("B") == {5}


def test_an_export_runs_beside_a_daemon_and_an_import_does_not(settings, fresh, file, tmp_path):
    with running(settings) as run, StateLock.acquire(settings.state):
        assert run.learn("A", 702)[1:] == ("committed", 1)
        assert moved_from(settings, tmp_path / "beside")[0] == 0
        code, _, told = moved_to(settings, file, "--again")
    assert (code, "is used by another supsupd" in told) == (1, True)
    moved_to(fresh, tmp_path / "beside")
    assert mask_hashes(fresh.state)[1][-1] == mask_hashes(settings.state)[1][-1]


def test_masks_move_into_postgresql_are_rolled_back_there_and_come_out_again(settings, fresh, file, tmp_path):
    with postgresql_target() as url:
        there = Settings(**fresh.model_dump(exclude={"database"}), database=url)
        assert moved_to(there, file, "--database", url) == (0, "imported 3 tasks: 1 as 1, 2 as 2, 3 as 3\n", "")
        assert moved_to(there, file, "--database", url)[0] == 1
        with running(settings) as here, worker_of(there, batches=[draw(1, 720)]) as worker:
            run = Run(worker, there)
            assert answers(run) == answers(here)
            while worker.step():
                pass
            assert [row["batch"] for row in run.service.history(2)] == [None, 1]
            operations.rollback(worker, 2, 1, by="ann (1000)")
            newest = run.service.history(2)[-1]
            assert (newest["version"], newest["made_by"], newest["served"]) == (3, "ann (1000)", True)
            assert newest["reason"] == "rolled back to version 1: the training by batches 1 is undone"
            assert answers(run) == answers(here)
        assert moved_from(there, tmp_path / "back", "--database", url)[0] == 0
    with open_masks(file) as first, open_masks(tmp_path / "back") as back:
        assert back.network == first.network
        for one, other in zip(first.masks(), back.masks(), strict=True):
            assert (other.bits, other.statistics) == (one.bits, one.statistics)
            assert other.record.reference == one.record.reference


def test_the_file_is_private_whole_or_not_there_and_replaces_an_older_one(settings, tmp_path):
    target = tmp_path / "masks"
    target.write_bytes(b"older")
    assert moved_from(settings, target, "--tasks", "2")[1] == f"exported 1 task to {target}\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "masks"}
    with open_masks(target) as found:
        assert [mask.record.task for mask in found.masks()] == [2]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--tasks", "9"], 1, "there is no task 9"),
        (["--tasks", "one"], 2, "--tasks: given 'one'; expected ids as 1,2"),
    ],
)
def test_an_export_of_what_there_is_not_is_refused(settings, tmp_path, flags, code, told):
    assert moved_from(settings, tmp_path / "masks", *flags) == (code, "", f"{told}\n")
    assert not (tmp_path / "masks").exists()


def test_a_state_without_masks_has_nothing_to_export(fresh, tmp_path):
    code, _, told = moved_from(fresh, tmp_path / "masks")
    assert (code, told) == (66, f"there is no database at {fresh.state / 'supsup.db'}\n")
    supsupd("db", "upgrade", "--state", fresh.state)
    code, _, told = moved_from(fresh, tmp_path / "masks")
    assert (code, told) == (1, "there is no network yet, and therefore no mask\n")


def test_a_damaged_mask_is_not_exported(settings, tmp_path):
    edit(settings.state, "UPDATE mask_version SET density = 0.25 WHERE task_id = 2")
    code, _, told = moved_from(settings, tmp_path / "masks")
    assert code == 65
    assert told.startswith("mask of task 2, version ")
    assert moved_from(settings, tmp_path / "masks", "--tasks", "1,3")[0] == 0


KIND_OF_SCENARIO = "kind of scenario (tasks given, or found)"


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE network SET signs_sha256 = replace(signs_sha256, substr(signs_sha256, 1, 4), 'abcd')", "weights"),
        ("UPDATE network SET normalisation = json_set(normalisation, '$.rule', 'none')", "normalisation"),
        ("UPDATE network SET classes = '[1, 0, 2, 3, 4, 5, 6, 7, 8, 9]'", "order of classes"),
        (
            "UPDATE network SET config = json_set(config, '$.scenario', 'GG')",
            "kind of scenario (tasks given, or found)",
        ),
        ("UPDATE network SET label_kind = 'str'", "kind of labels"),
    ],
)
def test_masks_of_another_network_are_refused(settings, file, statement, told):
    edit(settings.state, statement)
    before = what_was_learned(settings.state)
    assert moved_to(settings, file, "--again") == (
        65,
        "",
        f"{file}: the masks are those of another network: its {told} differ\n",
    )
    assert what_was_learned(settings.state) == before


def test_a_class_list_that_begins_alike_is_extended(settings, file):
    edit(settings.state, "UPDATE network SET classes = '[0, 1, 2]'")
    assert moved_to(settings, file, "--again")[0] == 0
    assert ask(settings.state, "SELECT classes FROM network") == [(json.dumps(list(range(10))),)]


# -- damaged and hostile files ----------------------------------------------------------------------------------------


def refused(path):
    """The one line that says why a file is refused."""
    with pytest.raises(FileRefused) as caught, open_masks(path) as found:
        list(found.masks())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x80\x02}q\x00.", "truncated: 6 bytes"),
        (b"PK\x03\x04" + bytes(100), "truncated: 104 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated: 10 bytes"),
        ((10).to_bytes(8, "little") + b'{"a":' + bytes(100), "it is no safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "it is no file of masks"),
    ],
)
def test_what_is_no_file_of_masks_is_refused_in_one_line(tmp_path, fresh, content, told):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert told in refused(path)
    code, _, said = moved_to(fresh, path)
    assert (code, said.count("\n"), said.startswith(f"{path}: ")) == (65, 1, True)
    assert not fresh.state.exists()


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.write((MAX_HEADER + 1).to_bytes(8, "little"))
        sparse.truncate(MAX_HEADER + 100)
    assert refused(path).startswith("too large")


def test_what_is_no_file_at_all_is_refused(tmp_path):
    assert refused(tmp_path) == "it is not a file"
    none = tmp_path / "none"
    told = f"{none}: No such file or directory\n"
    assert supsupd("masks", "import", none, "--state", tmp_path / "state") == (66, "", told)


def test_an_export_into_no_folder_says_which(settings, tmp_path):
    told = f"{tmp_path / 'none'}: there is no such folder\n"
    assert moved_from(settings, tmp_path / "none" / "masks") == (66, "", told)


@examples(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_flipped_bit_or_a_missing_end_is_always_noticed(file, tmp_path, data):
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        header = int.from_bytes(content[:8], "little")
        most = data.draw(st.sampled_from([8 + header, len(content)])) - 1
        place = data.draw(st.integers(0, most))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        found = read_all(path)
    except FileRefused as error:
        assert "\n" not in str(error)
    else:
        assert found == read_all(file)  # white space in the header


def read_all(path):
    with open_masks(path) as found:
        return found.network, found.normalisation_data, list(found.masks())


def rewritten(file, target, change):
    """A file with its content changed and its own hashes made right again: what only a liar writes."""
    tensors = load_file(file)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    change(metadata, tensors)
    if "network" in metadata:
        metadata["sha256"] = digest_of(metadata, ((name, tensors[name]) for name in sorted(tensors)))
    save_file(tensors, target, metadata)


def set_record(**changes):
    def change(metadata, tensors):
        record = json.loads(tensors["task.2"].tobytes())
        record = {k: v for k, v in (record | changes).items() if v is not ...}
        tensors["task.2"] = np.frombuffer(json.dumps(record).encode(), np.uint8)

    return change


def set_network(**changes):
    def change(metadata, tensors):
        metadata["network"] = json.dumps(json.loads(metadata["network"]) | changes)

    return change


def set_tensor(name, value):
    def change(metadata, tensors):
        tensors[name] = value

    return change


MLP = {"kind": "mlp", "input_shape": [64], "hidden": [10], "outputs": 100}
LIES = {
    "another hash": (set_record(sha256="0" * 64), "task.2: the bits have another SHA-256 than is recorded"),
    "another density": (set_record(density=0.9), "task.2: [0-9]+ bits are set, recorded is a density of 0.9"),
    "another task": (set_record(task=3), "task.2: its record is that of task 3"),
    "a name with a slash": (set_record(name="../x"), "task.2.name: String should match pattern"),
    "no record": (set_record(reference={}), "task.2: 'errors'"),
    "an unknown field": (set_record(run="me"), "task.2.run: Extra inputs are not permitted"),
    "a field less": (set_record(nbits=...), "task.2.nbits: Field required"),
    "infinite": (set_record(density=float("inf")), "task.2"),
    "an unknown tensor": (set_tensor("weights", np.zeros(3, np.uint8)), "tensor 'weights': there is no such thing"),
    "floats": (set_tensor("task.2.bits", np.zeros(3, np.float32)), "tensor 'task.2.bits': expected a vector of bytes"),
    "bits of no task": (set_tensor("task.7.bits", np.zeros(3, np.uint8)), "tensor 'task.7.bits': there is no such"),
    "damaged inputs": (set_tensor("task.2.inputs", np.zeros(30, np.uint8)), "task.2: "),
    "another seed": (set_network(seed=5), "network: seed 5 gives weights with SHA-256"),
    "a width that no mask has": (
        set_network(architecture=MLP | {"hidden": [10**6]}),
        "task.1: .* weights, bytes of bits and of statistics, expected",
    ),
    "a network of no kind": (
        set_network(architecture=MLP | {"kind": "os.system"}),
        "network: ",
    ),
    "no architecture": (set_network(architecture={}), "network: "),
    "classes twice": (set_network(classes=[1, 1]), "network: 2 classes, expected up to 100 different ones"),
    "too few classes": (set_network(classes=[1]), "task.1: reference: a class beyond the 1 there are"),
    "mixed classes": (set_network(classes=[1, "a"]), "network.classes"),
    "an unknown rule": (set_network(normalisation={"rule": "x", "input_shape": [64]}), "network: normalisation: 'x'"),
    "missing arrays": (set_network(normalisation={"rule": "feature", "input_shape": [64]}), "network: normalisation"),
    "pretrained": (
        set_network(
            architecture={"kind": "mlp", "input_shape": [64], "hidden": [100], "outputs": 100, "pretrained": "/etc/x"}
        ),
        "its network was made with the weights of '/etc/x': say where they are by --pretrained",
    ),
    "metadata besides": (lambda metadata, tensors: metadata.update(more="x"), "it is no file of masks"),
    "another format": (lambda metadata, tensors: metadata.update(format="2"), "it is no file of masks"),
    "no task": (lambda metadata, tensors: tensors.clear(), "there is no task in it"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_in_one_line_and_nothing_is_kept(file, fresh, tmp_path, lie):
    change, told = LIES[lie]
    rewritten(file, tmp_path / "lie", change)
    code, out, said = moved_to(fresh, tmp_path / "lie")
    assert (code, out) == (65, "")
    assert said.count("\n") == 1
    assert re.match(re.escape(f"{tmp_path / 'lie'}: ") + told, said), said
    if (fresh.state / "supsup.db").exists():
        with sqlite3.connect(fresh.state / "supsup.db") as connection:
            for table in ("network", "task", "mask_version"):
                assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_bits_that_belong_to_no_weight_are_refused(tmp_path, fresh, file):
    """The kernels read whole bytes: what lies behind a row's end must be 0."""

    def change(metadata, tensors):
        architecture = Architecture.from_json(json.loads(metadata["network"])["architecture"])
        layer = next(layer for layer in architecture.layers if layer.columns % 8)
        bits = tensors["task.2.bits"].copy()
        row = next(
            layer.offset + (r + 1) * layer.row_bytes - 1
            for r in range(layer.rows)
            if bits[layer.offset + (r + 1) * layer.row_bytes - 1] & 1
        )
        bits[row] ^= 0b1000_0001  # as many bits as before
        tensors["task.2.bits"] = bits
        record = json.loads(tensors["task.2"].tobytes()) | {"sha256": hashlib.sha256(bits.tobytes()).hexdigest()}
        tensors["task.2"] = np.frombuffer(json.dumps(record).encode(), np.uint8)

    rewritten(file, tmp_path / "lie", change)
    code, _, said = moved_to(fresh, tmp_path / "lie")
    assert (code, said) == (65, f"{tmp_path / 'lie'}: task.2: bits are set that belong to no weight\n")


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_daemon_on_the_other_side_answers_alike_and_goes_on_learning(settings, file, tmp_path):
    x = held_out(1)[0][:32]
    with DaemonProcess(tmp_path / "here") as here, DaemonProcess(tmp_path / "there") as there:
        shutil.copytree(settings.state, here.state)
        assert supsupd("masks", "import", file, "--state", there.state)[0] == 0
        here.start()
        there.start()
        for task in (1, 2, 3, None):
            asked = {} if task is None else {"task": task}
            assert there.infer(x, **asked) == here.infer(x, **asked)
        there.drop("new", **draw(1, 710))
        there.wait()
        assert there.row("new")["task"] == 2
        assert [there.stop(), here.stop()] == [0, 0]
