"""The unit files and the image: what can be checked without systemd running, and without a Docker engine."""

import re
import shutil
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
from daemon_process import BIN, DaemonProcess
from digits import draw
from syscalls import require_strace

from supsupd.config import load_settings

PACKAGING = Path(__file__).parent.parent / "packaging"
MOST_EXPOSED = 2.0
MAY_FAIL = {"mbind"}
"""Advice to a machine with several memories; whoever gives it goes on without."""


def analyze(*arguments):
    """What systemd-analyze says."""
    if shutil.which("systemd-analyze") is None:
        warnings.warn("no systemd-analyze: the unit files were not checked", stacklevel=2)
        pytest.skip("no systemd-analyze: the unit files were NOT checked")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def test_every_directive_of_the_units_is_known(tmp_path):
    for name in ("supsupd.service", "supsupd.socket"):
        unit = (PACKAGING / name).read_text()
        (tmp_path / name).write_text(unit.replace("/opt/supsupd/bin/supsupd", "/bin/true"))
    result = analyze("verify", "--man=no", *map(str, sorted(tmp_path.iterdir())))
    assert (result.returncode, result.stderr) == (0, "")


def test_the_service_is_hardly_exposed():
    threshold = str(int(MOST_EXPOSED * 10))
    result = analyze("security", "--offline=true", f"--threshold={threshold}", str(PACKAGING / "supsupd.service"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    (level,) = re.findall(r"exposure level for supsupd.service: ([\d.]+)", result.stdout)
    assert float(level) <= MOST_EXPOSED


def test_what_the_daemon_asks_of_the_system_its_unit_allows(tmp_path):
    require_strace()
    refused = system_calls("@known") - allowed_calls(PACKAGING / "supsupd.service") - MAY_FAIL
    trace = tmp_path / "trace"
    watched = ",".join(f"?{name}" for name in sorted(refused))
    strace = f"strace -D -f -qq --seccomp-bpf -e signal=none -e trace={watched} -o {trace}"
    traced = tmp_path / "supsupd"
    traced.write_text(f'#!/bin/sh\nexec {strace} {BIN}/supsupd "$@"\n')
    traced.chmod(0o700)
    flags = ["--grpc-socket", tmp_path / "grpc.sock"]
    with DaemonProcess(tmp_path / "daemon", *flags, programs=tmp_path) as daemon:
        daemon.drop("0", **draw(0, 0))
        daemon.start().wait()
        assert daemon.stop() == 0
    assert trace.read_text() == ""


def system_calls(*names):
    """Those that are named, and those of the groups (@...) that are."""
    groups = [name for name in names if name.startswith("@")]
    listed = analyze("syscall-filter", *groups).stdout if groups else ""
    members = [line.strip() for line in listed.splitlines() if line.startswith(" ") and "#" not in line]
    alone = {name for name in names if not name.startswith("@")}
    return alone | (system_calls(*members) if members else set())


def allowed_calls(unit):
    """What the lines `SystemCallFilter=` of a service leave, in their order."""
    allowed = system_calls("@default")
    for sign, names in re.findall(r"^SystemCallFilter=(~?)(.*)$", unit.read_text(), re.MULTILINE):
        calls = system_calls(*names.split())
        allowed = allowed - calls if sign else allowed | calls
    return allowed


def test_the_configuration_that_is_shown_can_be_used(tmp_path):
    text = (PACKAGING / "supsupd.toml").read_text().replace("/srv/supsupd/in", str(tmp_path))
    commented = re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE)
    for number, shown in enumerate((text, commented)):
        file = tmp_path / f"{number}.toml"
        file.write_text(shown)
        assert load_settings({}, file).serving.drain_seconds == tomllib.loads(shown)["serving"]["drain_seconds"]


def test_the_image_holds_no_secrets_runs_as_nobody_much_and_looks_after_its_health():
    lines = re.sub(r"\\\n", " ", (PACKAGING / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    last_stage = steps[max(i for i, (word, _) in enumerate(steps) if word == "FROM") :]
    assert dict(last_stage)["USER"] == "supsupd"
    assert "supsup-cli" in dict(last_stage)["HEALTHCHECK"]
    known = "FROM WORKDIR RUN COPY ENV USER VOLUME STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD"
    assert {word for word, _ in steps} <= set(known.split())
    ignored = (PACKAGING / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    for kept in (line[1:] for line in ignored if line.startswith("!")):
        assert (PACKAGING.parent / kept).exists()
