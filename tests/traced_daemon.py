"""A daemon under strace: what it asks of the system, from its start to its end."""

import re
import subprocess
import sys
from pathlib import Path

import planted_bugs
from daemon_process import BIN, QUICK, DaemonProcess, until
from syscalls import STRACE, Call, parse


class TracedDaemon(DaemonProcess):
    """`bug`: a function of planted_bugs that is called in it first."""

    def __init__(self, folder: Path, config=QUICK, bug: str | None = None):
        super().__init__(folder, config=config)
        self.trace = folder / "trace"
        self._program = [BIN / "supsupd"] if bug is None else [sys.executable, planted_bugs.__file__, bug]

    def launch(self):
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        command = [*STRACE, "-o", self.trace, *self._program, "start", *paths]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        return self

    def calls(self) -> list[Call]:
        """Of the whole life, once it is over."""
        end = re.compile(rf"{self.process.pid} +\+\+\+ exited with")  # strace pads short numbers
        until(lambda: any(end.match(line) for line in self._lines()))
        return parse(self._lines())

    def _lines(self):
        return self.trace.read_text(encoding="utf-8", errors="replace").splitlines()


def trace_command(folder: Path, *command) -> tuple[int, list[Call]]:
    """Runs a command to its end: its exit code, and its calls."""
    trace = folder / "trace"
    traced = [part for part in STRACE if part != "-D"]
    done = subprocess.run([*traced, "-o", trace, *command], capture_output=True, text=True, timeout=90, check=False)
    return done.returncode, parse(trace.read_text(encoding="utf-8", errors="replace").splitlines())
