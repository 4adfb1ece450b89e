"""Daemons forked from a process that has imported all there is to import: a start takes a fraction of a second.

Each is a process of its own, which runs the command line from its beginning, with signals and an end of its own. What
a daemon began while it was imported would be shared: there is nothing, which is asserted.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from daemon_process import QUICK, DaemonProcess

IMPORTED = (
    "cli.supsupd",
    "supsupd.daemon",
    "supsupd.learning.kernels",
    "supsupd.learning.training_kernels",
    "torch.fx.experimental.symbolic_shapes",  # torch itself does so at the first training step
    "torch.nested._internal.nested_tensor",
    "numba.np.ufunc.parallel",
)


class Nursery:
    """The process that forks; a context manager. `bug`: a function of planted_bugs that every child calls first;
    `program`: another one than this, that calls `fork_each`."""

    def __init__(self, bug: str = "", program=__file__):
        one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, program, bug]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def fork(self, arguments, log, failpoints=""):
        """A child that runs `supsupd ARGUMENTS`; one at a time."""
        return self.bear({"arguments": [str(a) for a in arguments], "log": str(log), "failpoints": failpoints})

    def bear(self, request):
        """A child that lives by this request; one at a time."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Child(int(self._process.stdout.readline()), self._process.stdout)


class Child:
    """As a subprocess.Popen of it would be."""

    def __init__(self, pid, answers):
        self.pid = pid
        self.returncode = None
        self._ended = threading.Event()
        threading.Thread(target=self._await_end, args=(answers,), daemon=True).start()

    def _await_end(self, answers):
        self.returncode = int(answers.readline() or -1)
        self._ended.set()

    def poll(self):
        return self.returncode if self._ended.is_set() else None

    def wait(self, timeout=None):
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("supsupd", timeout)
        return self.returncode

    def send_signal(self, number):
        if not self._ended.is_set():
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(9)


class ForkedDaemon(DaemonProcess):
    """`failpoints`: what the next life is armed with, as in SUPSUPD_FAILPOINTS."""

    def __init__(self, nursery: Nursery, folder: Path, config=QUICK):
        super().__init__(folder, config=config)
        self._nursery = nursery
        self.failpoints = ""

    def launch(self):
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        self.process = self._nursery.fork(["start", *paths, *self.flags], self.log, self.failpoints)
        return self


# -- the process that forks --------------------------------------------------------------------------------------------


def main():
    for name in IMPORTED:
        importlib.import_module(name)
    fork_each(live)


def fork_each(live):
    """A child for each line of the standard input, which calls `live` with what it says."""
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    assert threads == 1, f"{threads} threads would not survive the fork"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            live(json.loads(line))
        print(child, flush=True)  # noqa: T201 - the answer
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


def live(request):
    """A child's whole life."""
    from storage import failpoints

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir("/")
    counts, actions = failpoints.parse(request["failpoints"])
    failpoints._armed.update(counts)
    failpoints._actions.update(actions)
    if bug := sys.argv[1]:
        import planted_bugs

        getattr(planted_bugs, bug)()
    from cli.supsupd import app

    sys.argv = ["supsupd", *request["arguments"]]
    code = 1
    try:
        app()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the log is all that is left of it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
