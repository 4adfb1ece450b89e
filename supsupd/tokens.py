"""Bearer tokens, for those who come over TCP: the file STATE/tokens.json, written beside a running daemon too.

Of a secret only the SHA-256 is kept. That it is quick to compute is right here: it has 256 random bits, which no one
guesses; slow hashes are for passwords, which people make up.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from storage.durable import Files
from supsupd.choices import Role

FILE_NAME = "tokens.json"
ID_FORM = "[0-9a-f]{12}"
_FORM = re.compile(f"supsupd_({ID_FORM})_([A-Za-z0-9_-]{{43}})")
SECRET_BYTES = 32

log = structlog.get_logger("supsupd.tokens")


class TokensRefused(Exception):
    """The file of tokens can't be used; the text says why, in one line, and how to mend it."""


class TokenUnknown(LookupError):
    """There is no token of this id."""


class Token(BaseModel):
    """What is kept of a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=f"^{ID_FORM}$")]
    """Public: it stands in listings and histories."""
    role: Role
    label: Annotated[str, Field(max_length=64)] = ""
    created: AwareDatetime
    expires: AwareDatetime | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the secret, in hexadecimal."""

    @property
    def is_expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


class _TokenFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    tokens: list[Token] = []


_NOBODY = Token(id="0" * 12, role="predict", created=datetime.min.replace(tzinfo=UTC), sha256="0" * 64)
"""Stands in for ids that do not exist; no secret has this hash."""

_Identity = tuple[int, int, int]


class Tokens:
    """The tokens of one state folder, which need not exist. Safe to use from any thread and beside other processes.

    Args:
        state: the state folder.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / FILE_NAME
        self._place = os.fspath(self.path)
        self._seen: tuple[_Identity | None, Mapping[str, Token]] = (None, {})

    def find(self, text: str) -> Token | None:
        """The token that `text` is, if it is one that may be used now."""
        form = _FORM.fullmatch(text)
        identifier, secret = form.groups() if form else ("", text)
        # The same work whether or not the id exists: how long it takes tells nobody which ids there are.
        token = self._current().get(identifier, _NOBODY)
        is_it = hmac.compare_digest(_digest(secret), token.sha256)
        return token if is_it and not token.is_expired else None

    def read(self) -> list[Token]:
        """All tokens, also expired ones, oldest first. Raises TokensRefused for a file that others may have read or
        changed, or that is damaged."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._refused(error) from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            self._check(status)
            text = file.read()
        try:
            return _TokenFile.model_validate_json(text).tokens
        except ValidationError:  # whose text would quote the file
            raise TokensRefused(f"{self.path} is not a file of tokens; restore it, or remove it and make new") from None

    def create(self, role: Role, label: str = "", days: int | None = None) -> tuple[Token, str]:
        """A new token, good for so many days or for ever, and the text that its holder sends: it is kept nowhere.

        Raises TokensRefused, ValueError (a label that is too long or not printable), and OSError.
        """
        if len(label) > 64 or not label.isprintable():
            raise ValueError(f"label: given {label!r}; expected up to 64 printable characters")
        now = datetime.now(UTC).replace(microsecond=0)
        secret = secrets.token_urlsafe(SECRET_BYTES)
        token = Token(
            id=secrets.token_hex(6),
            role=role,
            label=label,
            created=now,
            expires=None if days is None else now + timedelta(days=days),
            sha256=_digest(secret),
        )
        with self._alone():
            self._write([*self.read(), token])
        return token, f"supsupd_{token.id}_{secret}"

    def revoke(self, identifier: str) -> Token:
        """The token that opens nothing from now on. Raises TokenUnknown, TokensRefused and OSError."""
        with self._alone():
            tokens = self.read()
            revoked = next((token for token in tokens if token.id == identifier), None)
            if revoked is None:
                raise TokenUnknown(f"there is no token {identifier!r}")
            self._write([token for token in tokens if token is not revoked])
        return revoked

    def _current(self) -> Mapping[str, Token]:
        """The tokens as the file has them now; of a file that can't be used, none."""
        identity = _identity(self._place)
        seen, tokens = self._seen
        if identity != seen:
            try:
                tokens = {token.id: token for token in self.read()}
            except TokensRefused as error:
                tokens = {}
                log.error("tokens_refused", reason=str(error))
            self._seen = identity, tokens
        return tokens

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise TokensRefused(f"{self.path} is not a file; remove it")
        if status.st_uid not in (0, self.path.parent.stat().st_uid):
            raise TokensRefused(f"{self.path} belongs to another user; remove it, and make new tokens")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise TokensRefused(f"{self.path} is open to others (mode {mode:04o}); run: chmod 600 {self.path}")

    def _refused(self, error: OSError) -> TokensRefused:
        if self.path.is_symlink():
            return TokensRefused(f"{self.path} is a symbolic link; put the file itself there")
        return TokensRefused(f"{self.path} can't be read: {error.strerror}; its owner must be the user of the daemon")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of two who write, the second reads what the first has written."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, tokens: list[Token]) -> None:
        """Replaces the file, whole and durably; root writes for the owner of the folder."""
        files, new, folder = Files(), self.path.with_suffix(".new"), self.path.parent.stat()
        files.remove(new)  # of a writer that died
        descriptor = files.write(new, _TokenFile(tokens=tokens).model_dump_json(indent=1).encode())
        if os.geteuid() == 0:
            os.fchown(descriptor, folder.st_uid, folder.st_gid)
        files.sync(descriptor)
        files.rename(new, self.path)
        files.sync_folder(self.path.parent)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _identity(place: str) -> _Identity | None:
    """Differs once the file is another one."""
    try:
        status = os.lstat(place)  # for every request: a Path takes three times as long
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
