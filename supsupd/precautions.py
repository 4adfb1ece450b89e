"""What must hold before anything is opened or created: nobody else can change, read or reach what is the daemon's.

Each refusal is one line: the setting, what is there, what was expected, and how to mend it.
"""

import os
import stat
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from supsupd.config import ConfigError, Settings
from supsupd.sections import ServerTlsSettings, split_address
from supsupd.serving.listeners import tls_context
from supsupd.serving.peer import group_id, show_user
from supsupd.tokens import Tokens, TokensRefused

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO
TOKENS = "tokens"
"""What lies in the state folder, and is no setting."""


def check(settings: Settings) -> None:
    """Raises ConfigError with a line for each thing that is not safe. Creates nothing."""
    problems = [
        *_state(settings.state, {os.geteuid()}),
        *_tcp(settings),
        *_tls(settings.tls),
        *_socket("socket", settings.socket),
        *_socket("grpc_socket", settings.grpc_socket),
        *_group(settings.serving.socket_group),
    ]
    if problems:
        raise ConfigError([_placed(problem, settings) for problem in problems])


def _placed(problem: str, settings: Settings) -> str:
    """A line whose keys are named as they stand where they were set."""
    keys, _, rest = problem.partition(": ")
    if keys == TOKENS:
        return problem
    return f"{', '.join(settings.name(key) for key in keys.split(', '))}: {rest}"


def check_state(state: Path) -> None:
    """Raises ConfigError unless the state folder, where there is one, is this user's alone, or anybody's for root."""
    status = _status(state)
    owners = {os.geteuid()} | ({status.st_uid} if status is not None and os.geteuid() == 0 else set())
    if problems := list(_state(state, owners)):
        raise ConfigError(problems)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Of names, only localhost is sure."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _state(state: Path, owners: set[int]) -> Iterator[str]:
    status = _status(state)
    if status is None:
        return
    own = show_user(os.geteuid())
    if stat.S_ISLNK(status.st_mode):
        yield f"state: given {state}, a symbolic link; expected the folder itself; set state to {state.resolve()}"
    elif not stat.S_ISDIR(status.st_mode):
        yield f"state: given {state}, which is not a folder; expected a folder, or nothing there yet"
    elif status.st_uid not in owners:
        yield (
            f"state: given {state} of {show_user(status.st_uid)}; expected a folder of {own}; run this as its owner,"
            f" or: chown -R {os.geteuid()} {state}"
        )
    elif status.st_mode & WRITABLE_BY_OTHERS:
        yield (
            f"state: given {state} ({_mode(status)}), which others may write to; expected a folder of {own} alone;"
            f" run: chmod go-w {state}"
        )


def _tcp(settings: Settings) -> Iterator[str]:
    tokens = Tokens(settings.state)
    try:
        is_usable = any(not token.is_expired for token in tokens.read())
    except TokensRefused as error:
        yield f"{TOKENS}: {error}"
        return
    for key, address in (("http", settings.http), ("grpc", settings.grpc)):
        if address is None:
            continue
        if not is_usable:
            yield (
                f"{key}: given {address} without any valid token in {tokens.path}; expected one at least;"
                f" run: supsupd token create --role predict --state {settings.state}"
            )
        if settings.tls.certificate is None and not is_loopback(split_address(address)[0]):
            yield (
                f"{key}: given {address}, which other machines may reach, without TLS; expected a loopback address"
                f" such as 127.0.0.1:{split_address(address)[1]}; or set tls.certificate and tls.key"
            )


def _tls(tls: ServerTlsSettings) -> Iterator[str]:
    files = {"certificate": tls.certificate, "key": tls.key, "client_ca": tls.client_ca}
    named = {key: path for key, path in files.items() if path is not None}
    if named and not {"certificate", "key"} <= named.keys():
        missing = "key" if "certificate" in named else "certificate"
        yield f"tls.{missing}: given nothing; expected a PEM file, since tls.{min(named)} is set"
        return
    unreadable = [f"tls.{key}: {problem}" for key, path in named.items() for problem in _unreadable(path)]
    yield from unreadable
    if not named or unreadable:
        return
    yield from _private("tls.key", named["key"])
    try:
        tls_context(tls)
    except ConfigError as error:
        yield from error.problems


def _unreadable(path: Path) -> Iterator[str]:
    try:
        path.read_bytes()
    except OSError as error:
        yield f"given {path}: {error.strerror}; expected a PEM file that {show_user(os.geteuid())} can read"


def _private(key: str, path: Path) -> Iterator[str]:
    """A key is its owner's alone; root's may be lent to a group, as systems do it."""
    status = path.stat()
    lent = stat.S_IRGRP if status.st_uid == 0 else 0
    if status.st_mode & OPEN_TO_OTHERS & ~lent:
        yield f"{key}: given {path} ({_mode(status)}), open to others; expected 0600; run: chmod 600 {path}"


def _socket(key: str, path: Path | None) -> Iterator[str]:
    if path is None:
        return
    users = (0, os.geteuid())
    folder = _status(path.parent.resolve())
    if folder is not None:
        if folder.st_uid not in users:
            yield (
                f"{key}: given {path} in a folder of {show_user(folder.st_uid)}, who could replace it; expected a"
                f" folder of {show_user(os.geteuid())} or root; choose another"
            )
        elif folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
            yield (
                f"{key}: given {path} in a folder where anybody could replace it ({_mode(folder)}); expected one that"
                f" others do not write to; run: chmod o-w {path.parent}"
            )
    there = _status(path)
    if there is not None and not stat.S_ISSOCK(there.st_mode):
        yield f"{key}: given {path}, which is not a socket and is left alone; expected a socket, or nothing there"
    elif there is not None and there.st_uid not in users:
        yield f"{key}: given {path}, a socket of {show_user(there.st_uid)}; expected nothing there; choose another path"


def _group(name: str | None) -> Iterator[str]:
    if name is None:
        return
    try:
        gid = group_id(name)
    except KeyError:
        yield f"serving.socket_group: given {name!r}; expected a group of this system; run: groupadd {name}"
        return
    if os.geteuid() != 0 and gid not in (os.getegid(), *os.getgroups()):
        user = show_user(os.geteuid())
        yield f"serving.socket_group: given {name!r}; expected a group that {user} is in, to give it the socket"


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _mode(status: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(status.st_mode):04o}"
