"""Shared by all tests: nobody's own settings reach them."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SUPSUPD_")]:
            patch.delenv(name)
        yield
