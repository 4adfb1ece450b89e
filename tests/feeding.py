"""A stream in portions, and a client that hands them over however often the daemon refuses, or dies."""

import hashlib
import os
import re

from daemon_process import until
from digits import FIRST_MTIME, draw
from oracle import Given

from streams.batch import Batch
from streams.formats import encode
from supsupd.client import DaemonError, DaemonUnavailable

FIRED = re.compile(r"^failpoint (\S+) (\S+)$", re.MULTILINE)
TRIES = 60


def payload_of(task, seed, **changes):
    """The bytes of a labelled batch, or of one with other arrays."""
    arrays = draw(ord(task), seed, rows=32) | changes
    return encode(Batch(arrays["x"], arrays["y"]))


def portion(number):
    """The files of a portion, {name: bytes}: good ones, a copy, one without labels, no batch, one of another width."""
    task, seed = "ABBA"[number % 4], 10 * number
    first = payload_of(task, seed)
    wide = draw(ord(task), seed + 1, rows=16)["x"][:, :9]
    return {
        f"{number}-0.npz": first,
        f"{number}-1.npz": payload_of(task, seed + 2),
        f"{number}-2-copy.npz": first,
        f"{number}-3-unlabelled.npz": payload_of("A", seed + 3, y=None),
        f"{number}-4-broken.npz": b"no batch, whatever its name says " * 8 + bytes([number]),
        f"{number}-5-wide.npz": payload_of(task, seed + 1, x=wide, y=draw(ord(task), seed + 1, rows=16)["y"]),
        f"{number}-6.npz": payload_of(task, seed + 4),
    }


class Feeder:
    """Feeds a daemon, which it starts whenever it is down. `accepted`: what must not be lost. `deaths`: exit codes.

    arm: says before each life what that one is armed with, given the points that have fired.
    """

    def __init__(self, daemon, arm=lambda fired: ""):
        self.daemon, self._arm = daemon, arm
        self.accepted: list[Given] = []
        self.deaths: list[tuple[int, str | None]] = []
        self._turns = 0

    def fired(self) -> list[str]:
        """The points that have fired, in order."""
        return [name for name, _ in FIRED.findall(self.daemon.log.read_text() if self.daemon.log.exists() else "")]

    def feed(self, number):
        """All of a portion, through every death: files, a batch over the socket, and what an operator does."""
        self.put(number)
        self._settle()
        self._insist(lambda: self._submit(number))
        self._settle()
        self._insist(self._retry)
        self._settle()
        self._insist(self._drop)

    def put(self, number):
        """The files of a portion, in order."""
        for name, payload in portion(number).items():
            self._put(name, payload)

    def start(self):
        """Once it answers, or has just ended; where it had ended, it begins another life."""
        process = self.daemon.process
        if process is not None and process.poll() is not None:
            fired = self.fired()
            self.deaths.append((process.poll(), fired[-1] if fired else None))
            process = self.daemon.process = None
        if process is None:
            self.daemon.failpoints = self._arm(self.fired())
            self.daemon.launch()
        until(self._answers_or_ended)

    def end(self):
        """Its last status, and its exit code at SIGTERM."""
        status = self._insist(self.daemon.client.status)
        return status, self.daemon.stop()

    def _put(self, name, payload):
        self._turns += 1
        temporary = self.daemon.watch / f".{name}.tmp"
        temporary.write_bytes(payload)
        os.utime(temporary, (FIRST_MTIME + self._turns, FIRST_MTIME + self._turns))
        temporary.rename(self.daemon.watch / name)
        source = str(self.daemon.watch)
        self.accepted.append(Given(name, hashlib.sha256(payload).hexdigest(), source))

    def _submit(self, number):
        name, payload = f"{number}-sent.npz", payload_of("ABBA"[number % 4], 10 * number + 5)
        answer = self.daemon.client.submit(name, payload, key=f"portion {number}")
        self.accepted.append(Given(name, answer["sha256"], "socket"))

    def _retry(self):
        """What was rejected is sent in again once."""
        before = {row["name"] for row in self.daemon.client.batches("retried")}
        for row in self.daemon.client.rejected():
            if row["code"] == "schema_mismatch" and row["name"] not in before:
                self.daemon.client.retry(row["batch"])

    def _drop(self):
        for row in self.daemon.client.rejected():
            self.daemon.client.drop(row["batch"])

    def _settle(self):
        self._insist(lambda: self.daemon.client.wait(30))

    def _insist(self, step):
        """What `step` gives, in the end."""
        for _ in range(TRIES):
            try:
                self.start()
                return step()
            except (DaemonUnavailable, DaemonError, TimeoutError) as error:
                failure = error
        raise AssertionError(f"{failure}; fired: {self.fired()}; deaths: {self.deaths}")

    def _answers_or_ended(self):
        if self.daemon.process.poll() is not None:
            return True
        try:
            return self.daemon.client.status()["pid"] == self.daemon.process.pid
        except DaemonUnavailable:
            return False


def drive(daemon, portions, arm=lambda fired: "", until_fired=(), most=12) -> tuple[Feeder, int]:
    """Feeds `portions` and then more until all of `until_fired` have fired; the feeder, and how many it took."""
    feeder, number = Feeder(daemon, arm), 0
    while number < portions or (number < most and not set(until_fired) <= set(feeder.fired())):
        feeder.feed(number)
        number += 1
    return feeder, number
