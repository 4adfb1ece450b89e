"""Schemathesis, as it is, against a real daemon over TCP: it makes requests of the daemon's own description, right ones
and wrong ones, and holds each answer against it."""

import subprocess
from pathlib import Path

from daemon_process import BIN
from tcp_daemon import tcp_daemon

CONFIG = Path(__file__).with_name("schemathesis.toml")
EXAMPLES, SEED, SECONDS = 10, 6, 240


def test_no_request_is_answered_otherwise_than_described(tmp_path):
    with tcp_daemon(tmp_path / "daemon") as (daemon, address, token):
        command = [BIN / "schemathesis", "--config-file", CONFIG, "run", f"http://{address}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {token}", "--request-timeout", "30", "--continue-on-failure"]
        command += ["--max-examples", str(EXAMPLES), "--seed", str(SEED), "--warnings", "off"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
        assert told.returncode == 0, told.stdout[-10_000:]
        assert "Coverage" in told.stdout
        assert "Fuzzing" in told.stdout
        assert daemon.client.ready()
        assert daemon.stop() == 0
    log = daemon.log.read_text()
    assert token not in log
    assert "Traceback" not in log
