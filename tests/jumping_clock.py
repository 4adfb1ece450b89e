"""A wall clock that a test sets, for processes that are started with it."""

import os
import shutil
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest


class JumpingClock:
    """The system's clock, and `jump` sets it. `folder`: for what is built."""

    def __init__(self, folder: Path):
        self._library, self._file = folder / "jumping_clock.so", folder / "ahead"
        self._ahead = 0
        self._file.write_bytes(struct.pack("q", 0))
        self.is_built = shutil.which("cc") is not None
        if self.is_built:
            source = Path(__file__).with_suffix(".c")
            subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", self._library, source], check=True)

    @contextmanager
    def worn(self):
        """Processes that are started here, and their children, go by it."""
        with pytest.MonkeyPatch.context() as patch:
            if self.is_built:
                patch.setenv("LD_PRELOAD", str(self._library))
                patch.setenv("JUMPING_CLOCK", str(self._file))
            yield

    def jump(self, seconds: int):
        """From one moment to the next it is so much later, or earlier."""
        self._ahead += seconds
        with self._file.open("r+b") as file:
            os.pwrite(file.fileno(), struct.pack("q", self._ahead), 0)

    def now(self) -> float:
        return time.time() + self._ahead
