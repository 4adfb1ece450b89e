"""Shared by all tests: nobody's own settings reach them."""

import logging
import os

import pytest
import structlog
from folders import open_source, watched  # noqa: F401 - fixtures for all
from hypothesis import HealthCheck, settings
from stores import store_target  # noqa: F401 - a fixture for all

from supsupd.learning.device import use_threads

# The same examples every time, and as long as they take: how fast the machine is, and what an earlier run found, decide
# nothing. What is new is sought by `make fuzz`.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")
UMASK = os.umask(0o022)
os.umask(UMASK)


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SUPSUPD_", "OTEL_")) or _names_proxy(name)]:
            patch.delenv(name)
        yield


def _names_proxy(name):
    """Whether the variable sends requests elsewhere; all that tests ask is here."""
    return name.lower() in ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The networks here are small: more threads only wait for each other, above all on a machine with other work."""
    use_threads(1)


@pytest.fixture(autouse=True)
def process_as_it_was():
    """What a command line changes of its process does not reach the next test: the umask, and where logs go."""
    os.umask(UMASK)  # a fixture for several tests may have called one too
    yield
    os.umask(UMASK)
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    structlog.reset_defaults()
