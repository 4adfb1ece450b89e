"""A real `supsupd start` of one's own: a process with a temporary state, socket, log and watched folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from supsupd.client import Client, DaemonUnavailable

START_SECONDS = 60.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.1


class DaemonFailed(Exception):
    """The daemon ended, or did not start, when it should have been running."""


class DaemonProcess:
    """A daemon below the folder `root`, with the settings of `config` if given.

    Use `daemon_running`, which also cleans up.
    """

    def __init__(self, root: Path, config: Path | None = None) -> None:
        self.watch, self.socket, self.log = root / "watch", root / "s", root / "log"
        self._staging = root / "staging"
        for folder in (self.watch, self._staging):
            folder.mkdir()
        command: list[str | Path] = [script("supsupd"), "start", "--watch", self.watch]
        command += ["--state", root / "state", "--socket", self.socket]
        if config is not None:
            command += ["--config", config]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=own_environment())

    def await_ready(self) -> None:
        """Waits until the socket answers. Raises DaemonFailed."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                with Client(self.socket) as client:
                    client.status()
                    return
            except DaemonUnavailable:
                time.sleep(POLL_SECONDS)
        raise DaemonFailed(f"the daemon did not answer within {START_SECONDS:g} s")

    def check_alive(self) -> None:
        """Raises DaemonFailed when the process has ended."""
        if (code := self._process.poll()) is not None:
            raise DaemonFailed(f"the daemon ended with exit code {code}")

    def stage(self, name: str, x: np.ndarray, y: np.ndarray) -> Path:
        """Writes a batch where the daemon does not look yet; `drop` it from there."""
        path = self._staging / f"{name}.npz"
        np.savez(path, x=x, y=y)
        return path

    def drop(self, staged: Path) -> None:
        """Renames a staged file into the watched folder: whole from the first moment that it is seen."""
        staged.rename(self.watch / staged.name)

    def stop(self) -> int:
        """SIGTERM; the exit code. Kills what does not end in time."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def tail(self, lines: int = 20) -> str:
        """The end of the daemon's log."""
        with self.log.open(encoding="utf-8", errors="replace") as log:
            return "".join(deque(log, maxlen=lines))


@contextmanager
def daemon_running(config: Path | None = None) -> Iterator[DaemonProcess]:
    """A daemon that answers, in a temporary folder that goes with it. Raises DaemonFailed."""
    root = Path(tempfile.mkdtemp(prefix="supsupd-"))
    try:
        daemon = DaemonProcess(root, config)
        try:
            daemon.await_ready()
            yield daemon
        except Exception as error:
            error.add_note(f"the end of the daemon's log:\n{daemon.tail()}")
            raise
        finally:
            daemon.stop()
    finally:
        shutil.rmtree(root)


def script(name: str) -> Path:
    """One of the console scripts of this environment."""
    return Path(sysconfig.get_path("scripts")) / name


def own_environment() -> dict[str, str]:
    """The environment without the user's own settings of supsupd."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SUPSUPD_")}
