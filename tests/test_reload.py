"""SIGHUP: what can change does so at once, what cannot is named, and a bad file changes nothing."""

import json
import signal
import ssl

import pytest
from certificates import Authority
from daemon_process import QUICK, DaemonProcess, until
from tcp_daemon import tcp_addresses, token_for

from supsupd.client import DaemonError

LIMITED = QUICK + "[serving]\nmax_body_bytes = 1000\nmax_connections = 7\n[learning]\nsteps = 3\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(a daemon that speaks TLS, too; the lines of its configuration about that)."""
    folder = tmp_path_factory.mktemp("reload")
    tls = tls_of(Authority(folder).issue())
    (folder / "state").mkdir(mode=0o700)
    token_for(folder / "state")
    with DaemonProcess(folder, "--http", "127.0.0.1:0", config=QUICK + tls) as daemon:
        yield daemon.start(), tls


def tls_of(issued):
    return f'[tls]\ncertificate = "{issued.certificate}"\nkey = "{issued.key}"\n'


def events(daemon, name):
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def hang_up(daemon, expected):
    """Sends SIGHUP; the new log line of this event."""
    before = len(events(daemon, expected))
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: len(events(daemon, expected)) > before)
    return events(daemon, expected)[-1]


def submits(daemon, size):
    try:
        daemon.client.submit("a.npz", b"x" * size)
    except DaemonError as error:
        return str(error)
    return "taken"


def test_limits_change_at_once_and_what_cannot_is_named(served):
    daemon, tls = served
    assert "too_large" not in submits(daemon, 2000)
    daemon.config.write_text('log_level = "debug"\n' + LIMITED + tls)
    assert hang_up(daemon, "needs_a_restart")["settings"] == ["learning.steps"]
    assert set(events(daemon, "reloaded")[-1]["changed"]) == {
        "log_level",
        "serving.max_body_bytes",
        "serving.max_connections",
    }
    assert "1000 bytes" in submits(daemon, 2000)
    daemon.client.status()
    until(lambda: "/v1/status" in {line["path"] for line in events(daemon, "request")})  # it follows the answer
    daemon.config.write_text(QUICK + tls)
    hang_up(daemon, "reloaded")
    assert "1000 bytes" not in submits(daemon, 2000)


def test_a_bad_file_changes_nothing_and_its_lines_are_told(served):
    daemon, tls = served
    daemon.config.write_text(LIMITED + tls + "[servign]\n[intake]\nmax_queue = 0\n")
    (problem,) = hang_up(daemon, "reload_refused")["problems"]
    assert str(daemon.config) in problem
    assert "1000 bytes" not in submits(daemon, 2000)
    daemon.config.unlink()
    assert "No such file" in hang_up(daemon, "reload_refused")["problems"][0]
    assert daemon.answers()


def test_a_new_certificate_is_shown_to_whoever_comes_next(served, tmp_path):
    daemon, _ = served
    host, port = tcp_addresses(daemon)[0].split(":")
    before = ssl.get_server_certificate((host, int(port)))
    issued = Authority(tmp_path).issue()
    daemon.config.write_text(QUICK + tls_of(issued))
    hang_up(daemon, "reloaded")
    after = ssl.get_server_certificate((host, int(port)))
    assert before != after
    assert after == issued.certificate.read_text()
