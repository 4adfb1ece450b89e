"""Real daemons: whatever a batch is called and wherever it comes from, nothing is written outside the folder of
predictions, and the next good batch is learned; the same while nobody reads the log."""

import contextlib
import json
import os
import subprocess

import pytest
from brokers import KafkaBench, NatsBench, RedisBench
from daemon_process import BIN, QUICK, DaemonProcess, tree_of, until
from digits import draw, held_out
from syscalls import STRACE, parse, require_strace

from streams.batch import Batch
from streams.formats import encode
from supsupd.predictions import place_of

NAMES = [
    "../../x",
    "/etc/supsupd/x",
    "../state/tokens",
    "x" * 255,
    "é" * 255,
    "x" * 4000,
    "a",
    "a.json/b",
    "a/../b",
    "~",
]


def unlabelled(seed, rows=3):
    return encode(Batch(held_out(0)[0][seed : seed + rows], None))


class Fed(DaemonProcess):
    """Fed from a folder, a socket, standard input and three brokers, with a task that it knows."""

    def __init__(self, folder, benches):
        self.benches = benches
        config = "".join(
            f'[[sources]]\nkind = "{kind}"\nname = "{kind}"\n{place}\n'
            for kind, place in {
                "nats": f'stream = "{benches["nats"].stream}"',
                "redis": f'key = "{benches["redis"].stream}"',
                "kafka": f'servers = "{benches["kafka"].servers}"\ntopic = "{benches["kafka"].stream}"',
            }.items()
        )
        self.out = folder / "out"
        super().__init__(folder, "--stdin", "--predictions", self.out, config=QUICK + config)

    def launch(self):
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        command = [BIN / "supsupd", "start", *paths, *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/")
        return self

    def say(self, name, seed):
        """A line on its standard input."""
        line = {"name": name, "x": held_out(0)[0][seed : seed + 3].tolist()}
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def send(self, source, name, seed):
        if source == "socket":
            self.client.submit(name, unlabelled(seed))
        elif source == "stdin":
            self.say(name, seed)
        else:
            self.benches[source].publish(unlabelled(seed), supsupd_name=name)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        benches = {}
        for kind, make in {"nats": NatsBench, "redis": RedisBench, "kafka": lambda **_: KafkaBench(mock=True)}.items():
            benches[kind] = make(direct=True)
            stack.callback(benches[kind].cleanup)
        daemon = stack.enter_context(Fed(tmp_path_factory.mktemp("fed"), benches))
        for turn in range(3):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.start().wait()
        assert daemon.client.status()["tasks"] == 1
        yield daemon


SOURCES = ["nats", "redis", "kafka", "stdin", "socket"]


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_written_outside_the_folder_whatever_a_source_calls_its_batches(daemon, source):
    tokens = daemon.state / "tokens.json"
    tokens.write_text("mine")
    names = [name for name in NAMES if source != "socket" or len(name) <= 255]
    first = 1 + 40 * SOURCES.index(source)
    before = len(daemon.client.batches())
    for number, name in enumerate(names):
        daemon.send(source, name, first + 3 * number)
    until(lambda: len(daemon.client.batches()) == before + len(names))
    daemon.wait()
    rows = [row for row in daemon.client.batches() if row["source"] == source]
    assert {row["state"] for row in rows} == {"scored"}
    assert all(len(row["name"].encode()) <= 1020 for row in rows)
    assert tokens.read_text() == "mine"
    seen = {path.name for path in daemon.watch.parent.iterdir()}
    assert seen == {"watch", "state", "sock", "log", "config.toml", "out"}
    files = [path for path in daemon.out.joinpath(source).rglob("*") if path.is_file()]
    assert len(files) == len(names)
    daemon.drop(f"good after {source}", **draw(0, 100 + SOURCES.index(source)))
    assert daemon.wait().row(f"good after {source}")["state"] == "committed"
    assert daemon.client.status()["problems"] == []


def test_a_file_of_any_bytes_has_its_predictions_and_stops_nothing(daemon):
    for seed, name in enumerate([b"\xe9" * 46, b"x" * 251, "é".encode() * 120, b"new\nline"], 300):
        (daemon.watch / os.fsdecode(name + b".npz")).write_bytes(unlabelled(seed))
    until(lambda: sum(row["state"] == "scored" for row in daemon.client.batches() if "/" in row["source"]) == 4)
    daemon.drop("good after bytes", **draw(0, 200))
    assert daemon.wait().row("good after bytes")["state"] == "committed"
    (folder,) = daemon.out.glob("%2F*")
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 4


def test_a_planted_link_is_told_and_never_written_through(daemon, tmp_path):
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    own = daemon.out / "socket" / f"@uid%20{os.getuid()}"
    own.mkdir(parents=True, exist_ok=True)
    (own / "trap").symlink_to(secret)
    before = tree_of(secret)
    asked = daemon.client.submit("trap/x", unlabelled(350))["batch"]
    until(lambda: daemon.client.batch(str(asked))["state"] == "scored")
    (problem,) = daemon.client.status()["problems"]
    assert (problem["who"], problem["kind"]) == ("predictions", "predictions_unwritten")
    assert f"{own}/trap/x.json: " in problem["text"]
    assert tree_of(secret) == before
    daemon.drop("good after link", **draw(0, 201))
    assert daemon.wait().row("good after link")["state"] == "committed"
    (own / "trap").unlink()
    until(lambda: daemon.client.status()["problems"] == [])
    assert (own / "trap" / "x.json").exists()


# -- order ------------------------------------------------------------------------------------------------------------


class TracedPredicting(DaemonProcess):
    def launch(self):
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        command = [*STRACE, "-o", self.config.with_name("trace"), BIN / "supsupd", "start", *paths, *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        return self


@pytest.mark.slow
def test_predictions_are_durable_before_their_batch_is_scored(tmp_path):
    require_strace()
    with TracedPredicting(tmp_path, "--predictions", tmp_path / "out") as daemon:
        for turn in range(3):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.drop("asked", x=held_out(0)[0][:5])
        daemon.start().wait()
        assert daemon.row("asked")["state"] == "scored"
        assert daemon.stop() == 0
    calls = parse((tmp_path / "trace").read_text(errors="replace").splitlines())
    source, name = place_of(str(daemon.watch), None, "asked.npz")
    (renamed,) = [call for call in calls if call.name.startswith("rename") and f'"{name}"' in call.arguments]
    folder = f"{tmp_path}/out/{source}>"
    file = [c for c in calls if c.name == "fsync" and f"/{source}/." in c.arguments and c.end < renamed.begin]
    names = [c for c in calls if c.name == "fsync" and folder in c.arguments and c.begin > renamed.end]
    logged = [c for c in calls if c.name == "pwrite64" and "-wal>" in c.arguments and "asked.npz" in c.arguments]
    scored = [c for c in logged if "scored" in c.arguments]
    assert len(file) == 1
    assert names[0].end < min(call.begin for call in scored)


# -- the log ----------------------------------------------------------------------------------------------------------


class Unheard(DaemonProcess):
    """Its stderr is a pipe that is full and that nobody reads."""

    def launch(self):
        read, write = os.pipe()
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b" " * 4095 + b"\n")
        os.set_blocking(write, True)
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        self.process = subprocess.Popen([BIN / "supsupd", "start", *paths], stdout=write, stderr=write, cwd="/")
        os.close(write)
        self.unread = read
        return self


def test_a_daemon_whose_log_nobody_reads_learns_says_so_and_ends(tmp_path):
    with Unheard(tmp_path) as daemon:
        for turn in range(4):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.start().wait()
        assert daemon.client.status()["batches"]["committed"] == 4
        (problem,) = daemon.client.status()["problems"]
        assert (problem["who"], problem["kind"]) == ("log", "log_stalled")
        assert daemon.stop() == 0
        os.close(daemon.unread)


def test_folders_and_sockets_may_have_any_bytes_in_their_paths(tmp_path):
    folder = tmp_path / "a\udce9\n\\b"
    with DaemonProcess(folder, "--predictions", folder / "out") as daemon:
        for turn in range(3):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.drop("asked", x=held_out(0)[0][:5])
        daemon.start().wait()
        assert daemon.row("asked")["state"] == "scored"
        (source,) = daemon.client.sources()
        assert source["name"] == f"{tmp_path}/a\\udce9\\n\\\\b/watch"
        assert (folder / "out").joinpath(*place_of(source["name"], None, "asked.npz")).exists()
        assert daemon.stop() == 0
