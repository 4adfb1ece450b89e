"""Where things are when nobody says otherwise. Light to import, for the command lines."""

import warnings
from pathlib import Path

import platformdirs

DATABASE_NAME = "supsup.db"
MAX_SOCKET_PATH = 107
"""Bytes that fit in a Linux `sockaddr_un.sun_path`, less the final NUL."""


def default_state() -> Path:
    """The user's state directory for supsupd, e.g. ~/.local/state/supsupd."""
    return platformdirs.user_state_path("supsupd")


def default_socket() -> Path:
    """The user's runtime directory's supsupd.sock, e.g. /run/user/1000/supsupd.sock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no XDG_RUNTIME_DIR: the fallback is as good to us
        return platformdirs.user_runtime_path() / "supsupd.sock"
