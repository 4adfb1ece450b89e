"""The daemon as its users meet it: real processes, files and sockets, and a small real stream."""

import json
import signal

import httpx
import numpy as np
import pytest
from daemon_process import QUICK, DaemonProcess, ask, copy_database, edit, mask_hashes, tree_of, until
from digits import PIXELS, draw, drop, held_out

from supsupd.client import DaemonError
from supsupd.predictions import place_of

STREAM = "AAABBBACCCABC"
TASKS = {"A": 0, "B": 1, "C": 2}
NAMES = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One that has learned STREAM, after an unlabelled batch that came when there was no task."""
    folder = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(folder, "--predictions", folder / "predictions") as daemon:
        daemon.predictions = folder / "predictions"
        daemon.drop("early", x=held_out(TASKS["A"])[0][:40])
        for turn, letter in enumerate(STREAM):
            daemon.drop(f"stream/{turn:02}-{letter}", **draw(TASKS[letter], turn))
        daemon.start().wait()
        daemon.found = {letter: daemon.row(f"stream/{STREAM.index(letter):02}-{letter}")["task"] for letter in TASKS}
        yield daemon


@pytest.fixture
def daemon(learned):
    """The same, started again where a test has left it down."""
    if learned.process.poll() is not None:
        learned.start().wait()
    return learned


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """One whose labels are strings, with room for two more classes."""
    with DaemonProcess(tmp_path_factory.mktemp("named")) as daemon:
        with daemon.config.open("a") as config:
            config.write("outputs = 12\n[recognition]\npromote_error = 1e-12\n")
        for turn in range(4):
            batch = draw(0, turn)
            daemon.drop(f"{turn}", x=batch["x"], y=NAMES[batch["y"]])
        yield daemon.start().wait()


def snapshot(daemon):
    """Everything that must not change by itself: mask hashes, and all outputs for every task, given and inferred."""
    rows = {letter: held_out(task)[0][:40] for letter, task in TASKS.items()}
    answers = [daemon.infer(x, **how) for x in rows.values() for how in ({}, {"per_sample": True})]
    given = [daemon.infer(x, task=daemon.found[letter]) for letter, x in rows.items()]
    return mask_hashes(daemon.state), answers, given


# -- learning ---------------------------------------------------------------------------------------------------------


def test_a_stream_of_tasks_that_return_is_learned_and_exactly_they_are_found(daemon):
    rows = {row["name"]: row for row in daemon.listing("batches", "list")}
    for turn, letter in enumerate(STREAM):
        row = rows[f"stream/{turn:02}-{letter}.npz"]
        assert (row["state"], row["task"]) == ("committed", daemon.found[letter])
    assert sorted(daemon.found.values()) == [1, 2, 3]
    assert {row["task"]: row["batches"] for row in daemon.listing("tasks", "list")}.keys() == {1, 2, 3}


@pytest.mark.parametrize("letter", TASKS)
def test_the_task_of_a_query_is_inferred_and_its_labels_are_right(daemon, letter):
    x, y = held_out(TASKS[letter])
    rows = daemon.client.predict(x)
    assert {(row["task"], row["known"]) for row in rows} == {(daemon.found[letter], True)}
    assert np.mean([row["label"] == label for row, label in zip(rows, y, strict=True)]) > 0.8


def test_learning_one_task_leaves_the_bits_and_predictions_of_another_identical(daemon):
    x = held_out(TASKS["A"])[0]
    before = mask_hashes(daemon.state)[daemon.found["A"]], daemon.infer(x, task=daemon.found["A"])
    for turn in range(3):
        daemon.drop(f"other/{turn}", **draw(TASKS["B"], 100 + turn))
    daemon.wait()
    assert {daemon.row(f"other/{turn}")["task"] for turn in range(3)} == {daemon.found["B"]}
    assert (mask_hashes(daemon.state)[daemon.found["A"]], daemon.infer(x, task=daemon.found["A"])) == before


def test_wait_returns_0_once_all_is_learned(daemon):
    for turn in range(3):
        daemon.drop(f"waited/{turn}", **draw(TASKS["C"], 200 + turn))
    assert daemon.cli("wait", "--timeout", "150").returncode == 0
    assert {daemon.row(f"waited/{turn}")["state"] for turn in range(3)} == {"committed"}


def test_a_renamed_task_keeps_its_name(daemon):
    assert daemon.cli("tasks", "rename", str(daemon.found["C"]), "cats").returncode == 0
    assert daemon.client.task(daemon.found["C"])["name"] == "cats"
    with pytest.raises(DaemonError, match="named"):
        daemon.client.rename(daemon.found["A"], "cats")
    daemon.drop("renamed", **draw(TASKS["C"], 300))
    assert daemon.wait().client.task(daemon.found["C"])["name"] == "cats"


def test_queries_are_answered_while_a_batch_trains(daemon):
    x = held_out(TASKS["A"])[0][:8]
    before = daemon.client.status()["batches"]
    daemon.drop("large", **draw(TASKS["A"], 400, rows=20_000))

    def is_training():
        return bool(daemon.client.batches(state="training"))

    answered = 0
    until(is_training)
    while is_training():
        answered += len(daemon.client.predict(x)) == len(x) and is_training()
    assert answered >= 1
    assert daemon.wait().row("large")["task"] == daemon.found["A"]
    assert daemon.client.status()["batches"]["committed"] == before["committed"] + 1


# -- unlabelled -------------------------------------------------------------------------------------------------------


def predicted(daemon, name):
    """What the file says that belongs to a batch of the watched folder."""
    return json.loads(daemon.predictions.joinpath(*place_of(str(daemon.watch), None, name)).read_text())


def test_an_unlabelled_batch_that_comes_before_any_task_is_scored_once_there_is_one(daemon):
    row = daemon.row("early")
    assert row["batch"] == 1
    assert (row["state"], row["task"]) == ("scored", daemon.found["A"])
    assert len(predicted(daemon, "early.npz")) == 40


def test_an_unlabelled_batch_is_scored_and_never_trained_on(daemon):
    x, y = held_out(TASKS["B"])
    masks, tasks = mask_hashes(daemon.state), daemon.client.tasks()
    daemon.drop("deep/unlabelled", x=x)
    row = daemon.wait().row("deep/unlabelled")
    assert (row["state"], row["task"], row["decision"]) == ("scored", daemon.found["B"], "known")
    assert (mask_hashes(daemon.state), daemon.client.tasks()) == (masks, tasks)
    written = predicted(daemon, "deep/unlabelled.npz")
    assert [{**r, "entropy": pytest.approx(r["entropy"], abs=1e-6)} for r in daemon.client.predict(x)] == written
    assert np.mean([r["label"] == label for r, label in zip(written, y, strict=True)]) > 0.8


# -- replays ----------------------------------------------------------------------------------------------------------


def test_the_same_bytes_under_another_name_change_nothing(daemon):
    before = snapshot(daemon), daemon.client.tasks()
    again = daemon.drop("again", **draw(TASKS["A"], 0))
    assert again.read_bytes() == (daemon.watch / "stream/00-A.npz").read_bytes()
    first, row = daemon.wait().row("stream/00-A"), daemon.row("again")
    assert (row["state"], row["reason"]) == ("duplicate", f"duplicate of batch {first['batch']}")
    assert (snapshot(daemon), daemon.client.tasks()) == before


def test_a_batch_that_is_posted_twice_is_learned_once(daemon, tmp_path):
    payload = drop(tmp_path / "posted.npz", 0, **draw(TASKS["B"], 500)).read_bytes()
    first, second = (daemon.client.submit("posted.npz", payload) for _ in range(2))
    assert (first["state"], second["state"]) == ("staged", "duplicate")
    daemon.wait()
    rows = [row for row in daemon.client.batches() if row["sha256"] == first["sha256"]]
    assert [row["state"] for row in rows] == ["committed", "duplicate"]
    assert first["batch"] == second["batch"] == rows[0]["batch"]
    assert rows[0]["task"] == daemon.found["B"]


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x_width", "labels", "reason"),
    [
        ("wide", PIXELS + 1, np.zeros(16, int), "schema_mismatch: rows of shape (65,) came"),
        ("kind", PIXELS, np.array(["one", "two"] * 8), "bad_labels: labels of kind str came"),
        ("range", PIXELS, np.full(16, 1000), "bad_labels: label 1000 is out of range"),
        ("negative", PIXELS, np.full(16, -1), "bad_labels: label -1 is out of range"),
    ],
)
def test_a_labelled_batch_that_does_not_fit_is_quarantined_and_the_next_is_learned(
    daemon, name, x_width, labels, reason
):
    daemon.drop(f"bad/{name}", x=np.ones((16, x_width), np.float32), y=labels)
    daemon.drop(f"good/{name}", **draw(TASKS["A"], 600 + ord(name[0])))
    daemon.wait()
    bad = daemon.row(f"bad/{name}")
    assert (bad["state"], bad["task"]) == ("quarantined", None)
    assert bad["reason"].startswith(reason)
    assert daemon.row(f"good/{name}")["state"] == "committed"


def test_an_unlabelled_batch_of_another_width_is_quarantined(daemon):
    daemon.drop("bad/unlabelled", x=np.ones((16, PIXELS - 1)))
    assert daemon.wait().row("bad/unlabelled")["reason"].startswith("schema_mismatch: rows of shape (63,) came")


# -- strings ----------------------------------------------------------------------------------------------------------


def test_string_labels_come_back_as_strings(named):
    x, y = held_out(0)
    rows = named.client.predict(x)
    assert np.mean([row["label"] == label for row, label in zip(rows, NAMES[y], strict=True)]) > 0.8
    assert named.infer(x[:3])["label"]["datatype"] == "BYTES"
    assert named.infer(x[:3])["label"]["data"] == [row["label"] for row in named.client.predict(x[:3])]


@pytest.mark.parametrize(
    ("name", "labels", "reason"),
    [
        ("many", np.array(["ten", "eleven", "twelve"]), "bad_labels: 3 new classes (first 'eleven') do not fit"),
        ("numbers", np.arange(3), "bad_labels: labels of kind int came"),
    ],
)
def test_labels_that_do_not_join_the_strings_are_quarantined_and_the_next_is_learned(named, name, labels, reason):
    named.drop(f"bad-{name}", x=np.ones((3, PIXELS)), y=labels)
    batch = draw(0, 700 + ord(name[0]))
    named.drop(f"good-{name}", x=batch["x"], y=NAMES[batch["y"]])
    named.wait()
    bad = named.row(f"bad-{name}")
    assert bad["state"] == "quarantined"
    assert bad["reason"].startswith(reason)
    assert named.row(f"good-{name}")["state"] == "committed"
    assert len(named.client.status()["network"]["classes"]) == 10


def test_unsure_batches_survive_a_kill_and_are_decided_with_later_ones(named):
    def drop_other(turn):
        batch = draw(1, turn, rows=32)
        named.drop(f"other-{turn}", x=batch["x"], y=NAMES[batch["y"]])

    drop_other(0)
    unsure = named.wait().row("other-0")
    assert (unsure["state"], unsure["decision"], unsure["task"]) == ("unsure", "unsure", None)
    named.kill()
    assert named.socket.is_socket()  # nobody answers there: it is replaced
    named.start().wait()
    assert named.socket.stat().st_mode & 0o777 == 0o600
    assert named.row("other-0") == unsure
    for turn in range(1, 6):
        drop_other(turn)
    named.wait()
    rows = [named.row(f"other-{turn}") for turn in range(6)]
    assert {(row["state"], row["task"]) for row in rows} == {("committed", 2)}
    assert len(named.client.tasks()) == 2


# -- lifecycle --------------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_state_is_refused_and_the_first_keeps_its_socket(daemon, tmp_path):
    second = DaemonProcess(tmp_path)
    second.state, second.socket = daemon.state, daemon.socket
    code, lines = second.refusal()
    assert code == 75
    assert lines == [f"supsupd: {daemon.state} is used by another supsupd (pid {daemon.process.pid})"]
    assert daemon.client.status()["pid"] == daemon.process.pid


def test_a_daemon_with_another_state_does_not_get_the_socket_of_a_living_one(daemon, tmp_path):
    second = DaemonProcess(tmp_path)
    second.socket = daemon.socket
    code, lines = second.refusal()
    assert code == 75
    assert lines == [f"supsupd: {daemon.socket} is the socket of another server that answers"]
    assert daemon.client.status()["pid"] == daemon.process.pid


def test_a_restart_gives_the_same_masks_and_predictions_bit_for_bit(daemon):
    before = snapshot(daemon), daemon.client.tasks(), daemon.client.batches()
    assert daemon.stop(signal.SIGTERM) == 0
    assert not daemon.socket.exists()
    daemon.start().wait()
    assert (snapshot(daemon), daemon.client.tasks(), daemon.client.batches()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_amid_learning_ends_it_and_nothing_is_lost(daemon, number):
    files = [f"{number.name}/{turn:02}" for turn in range(12)]
    for turn, name in enumerate(files):
        daemon.drop(name, **draw(TASKS["ABC"[turn % 3]], 800 + 100 * number + turn, rows=256))
    until(lambda: daemon.client.batches(state="training"))
    assert daemon.stop(number) == 0
    assert not daemon.socket.exists()
    assert "Traceback" not in daemon.log.read_text()
    before = dict(ask(daemon.state, "SELECT id, state FROM batch WHERE state IN ('committed', 'staged', 'training')"))
    assert "staged" in before.values()
    daemon.start().wait()
    assert [daemon.row(name)["task"] for name in files] == [daemon.found["ABC"[turn % 3]] for turn in range(12)]
    assert not daemon.client.batches(state="staged")


def test_the_same_folder_with_a_fresh_cursor_adds_only_duplicates(daemon):
    before = snapshot(daemon), daemon.client.tasks()
    rows = daemon.client.batches()
    daemon.stop()
    edit(daemon.state, "DELETE FROM cursor")
    daemon.start().wait()
    assert (snapshot(daemon), daemon.client.tasks()) == before
    later = daemon.client.batches()
    assert later[: len(rows)] == rows
    added = {row["name"]: row["state"] for row in later[len(rows) :]}
    assert set(added) == {str(path.relative_to(daemon.watch)) for path in daemon.watch.rglob("*.npz")}
    assert set(added.values()) == {"duplicate"}


@pytest.mark.parametrize(
    ("statement", "value", "said"),
    [
        ("UPDATE network SET signs_sha256 = ?", "0" * 64, "network: seed 0 gives weights with SHA-256"),
    ],
)
def test_a_state_that_would_give_wrong_answers_refuses_to_start(daemon, tmp_path, statement, value, said):
    other = DaemonProcess(tmp_path)
    copy_database(daemon.state, other.state)
    edit(other.state, statement, value)
    before = ask(other.state, "SELECT * FROM mask_version"), tree_of(other.watch)
    code, lines = other.refusal()
    assert code == 65
    assert len(lines) == 1
    assert lines[0].startswith(f"supsupd: {said}")
    assert (ask(other.state, "SELECT * FROM mask_version"), tree_of(other.watch)) == before
    assert not other.socket.exists()


def test_a_daemon_that_drains_says_that_it_ends_and_answers_all_else_as_before(tmp_path):
    with DaemonProcess(tmp_path, config=QUICK + "[serving]\ndrain_seconds = 2.0\n") as daemon:
        for turn in range(4):
            daemon.drop(f"{turn}", **draw(TASKS["A"], turn))
        daemon.start().wait()
        transport = httpx.HTTPTransport(uds=str(daemon.socket))
        with httpx.Client(transport=transport, base_url="http://supsupd") as http:
            others = ["/v2", "/v2/models/supsup", "/v2/models/supsup/ready", "/v2/models/supsup/config", "/v1/tasks"]
            before = {path: http.get(path).json() for path in others}
            daemon.process.send_signal(signal.SIGTERM)
            until(lambda: http.get("/readyz").status_code == 503)
            for path in ("/readyz", "/v2/health/ready"):
                told = http.get(path)
                assert (told.status_code, told.headers["retry-after"]) == (503, "1")
                assert told.json() == {"error": "shutting_down: the daemon is about to end"}
            assert {path: http.get(path).json() for path in others} == before
            assert "supsupd_ready 0.0" in http.get("/metrics").text.splitlines()
        assert daemon.process.wait(10) == 0
