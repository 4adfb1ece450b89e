"""Shared by all tests: nobody's own settings reach them."""

import os

import pytest
from folders import open_source, watched  # noqa: F401 - fixtures for all
from stores import store_target  # noqa: F401 - a fixture for all

from supsupd.learning.device import use_threads


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SUPSUPD_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The networks here are small: more threads only wait for each other, above all on a machine with other work."""
    use_threads(1)
