"""Logs: one stream on stderr, as objects for machines, or as lines that no terminal obeys for people."""

import json
import subprocess
import sys

SCRIPT = """
import logging, structlog
from supsupd import logs
logs.configure({format!r}, "info")
log = structlog.get_logger("supsupd.storage")
log.info("batch_staged", name="a\\x1b[2J.npz", batch=3)
log.debug("hidden")
logging.getLogger("uvicorn.error").info("hidden")
logging.getLogger("uvicorn.error").warning("%s is slow", "disk")
secret = "swordfish"
try:
    1 / 0
except ZeroDivisionError:
    log.exception("loop_failed")
"""


def lines(log_format):
    script = SCRIPT.format(format=log_format)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert "hidden" not in result.stderr
    assert "swordfish" not in result.stderr
    assert "\x1b" not in result.stderr
    return result.stderr.splitlines()


def test_json_logs_are_an_object_a_line_whoever_speaks():
    for log_format in ("json", "auto"):  # auto: stderr is a pipe here
        staged, slow, failed = map(json.loads, lines(log_format))
        assert (staged["event"], staged["logger"], staged["batch"]) == ("batch_staged", "supsupd.storage", 3)
        assert (slow["event"], slow["logger"], slow["level"]) == ("disk is slow", "uvicorn.error", "warning")
        assert "ZeroDivisionError" in failed["exception"]


def test_console_logs_are_lines_for_people():
    staged, slow, failed, *traceback = lines("console")
    assert "batch_staged" in staged
    assert "batch=3" in staged
    assert "disk is slow" in slow
    assert "loop_failed" in failed
    assert traceback[-1] == "ZeroDivisionError: division by zero"
