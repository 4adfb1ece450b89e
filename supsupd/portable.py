"""A file of masks: one safetensors file that holds what some tasks are, and the network that they belong to.

The network's identity is JSON in the file's metadata. Of each task there are the tensors `task.N` (its record, as
JSON), `task.N.bits`, and where it has them `task.N.statistics` and `task.N.inputs`; all tensors are vectors of bytes.
The metadata's `sha256` is over all of it, so that a file is what was written, or is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "supsupd-masks-1"
MAX_BYTES = 64 << 30
MAX_HEADER = 64 << 20
"""Bytes of the list of tensors: some hundred thousand of them."""
MAX_RECORD = 4 << 20
"""Bytes of a task's record."""
PARTS = ("bits", "statistics", "inputs")
_TENSOR = re.compile(r"task\.([1-9][0-9]{0,17})(\.(bits|statistics|inputs))?")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


T = TypeVar("T", bound=BaseModel)


class FileRefused(ValueError):
    """A file is no whole file of masks; the text is one line that says why."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkIdentity(_Strict):
    """What rebuilds a network and says what its inputs and outputs mean, as `storage.networks` keeps it.

    normalisation_sha256: of the frozen arrays, which are a tensor of their own; None where there are none.
    """

    architecture: dict[str, Any]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    signs_sha256: Sha256
    normalisation: dict[str, Any]
    normalisation_sha256: Sha256 | None
    classes: list[int] | list[str]
    label_kind: Literal["int", "str"]
    config: dict[str, Any]


class MaskRecord(_Strict):
    """What is known of a task beside its bits; sha256 is that of the bits followed by the statistics."""

    task: Annotated[int, Field(ge=1)]
    version: Annotated[int, Field(ge=1)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    key: Annotated[str, Field(min_length=1, max_length=255)] | None
    batches: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=0)]
    nbits: Annotated[int, Field(ge=1)]
    density: Annotated[float, Field(ge=0, le=1)]
    sha256: Sha256
    reference: dict[str, Any]


@dataclass(frozen=True)
class PortableMask:
    """A task's newest mask with its record; inputs: what its inputs look like, opaque."""

    record: MaskRecord
    bits: bytes
    statistics: bytes | None = None
    inputs: bytes | None = None


@dataclass(frozen=True)
class MaskFile:
    """An open file that was found whole. `sha256`: of the file."""

    network: NetworkIdentity
    normalisation_data: bytes | None
    sha256: str
    _tensors: _Tensors

    def masks(self) -> Iterator[PortableMask]:
        """All of them by task, one in memory at a time. Raises FileRefused."""
        for number in self._tensors.tasks:
            yield self._mask(number)

    def _mask(self, number: int) -> PortableMask:
        record = _parsed(MaskRecord, self._tensors.load(f"task.{number}", MAX_RECORD), f"task.{number}")
        if record.task != number:
            raise FileRefused(f"task.{number}: its record is that of task {record.task}")
        bits, statistics, inputs = (self._tensors.find(f"task.{number}.{part}") for part in PARTS)
        if bits is None:
            raise FileRefused(f"task.{number}: there are no bits")
        if hashlib.sha256(bits + (statistics or b"")).hexdigest() != record.sha256:
            raise FileRefused(f"task.{number}: the bits have another SHA-256 than is recorded")
        return PortableMask(record, bits, statistics, inputs)


def write_masks(
    path: Path, network: NetworkIdentity, normalisation_data: bytes | None, masks: Iterable[PortableMask]
) -> None:
    """Writes a file, durably and whole or not at all; all masks are in memory meanwhile. Raises OSError."""
    tensors: dict[str, bytes | None] = {"network.normalisation": normalisation_data}
    for mask in masks:
        name = f"task.{mask.record.task}"
        tensors[name] = mask.record.model_dump_json().encode()
        tensors |= {f"{name}.{part}": getattr(mask, part) for part in PARTS}
    kept = {name: np.frombuffer(data, np.uint8) for name, data in tensors.items() if data is not None}
    metadata = {"format": FORMAT, "network": network.model_dump_json()}
    metadata["sha256"] = digest_of(metadata, ((name, kept[name]) for name in sorted(kept)))
    with _replacing(path) as temporary:
        save_file(kept, temporary, metadata)


@contextmanager
def open_masks(path: Path) -> Iterator[MaskFile]:
    """Opens a file of masks and checks all of it but the masks' records. Raises FileRefused, OSError."""
    _check_size(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with safe_open(path, framework="numpy") as opened:
            tensors = _Tensors(opened)
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT or set(metadata) != {"format", "network", "sha256"}:
                raise FileRefused(f"it is no file of masks: expected the format {FORMAT}")
            tensors.check_names()
            if digest_of(metadata, tensors.each()) != metadata["sha256"]:
                raise FileRefused("its content has another SHA-256 than is recorded: it was damaged or changed")
            network = _parsed(NetworkIdentity, metadata["network"].encode(), "network")
            data = tensors.find("network.normalisation")
            if (None if data is None else hashlib.sha256(data).hexdigest()) != network.normalisation_sha256:
                raise FileRefused("network: the normalisation has another SHA-256 than is recorded")
            yield MaskFile(network, data, sha256, tensors)
    except SafetensorError as error:
        raise FileRefused(f"it is no safetensors file: {' '.join(str(error).split())}") from None


class _Tensors:
    """The byte vectors of an open safetensors file."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.names: Sequence[str] = sorted(opened.keys())
        self._known = frozenset(self.names)

    @property
    def tasks(self) -> list[int]:
        """Those that there is a record of."""
        found = (_TENSOR.fullmatch(name) for name in self.names)
        return sorted(int(owned[1]) for owned in found if owned is not None and owned[2] is None)

    def check_names(self) -> None:
        """Raises FileRefused for a tensor that no such file has."""
        for name in self.names:
            place = self._opened.get_slice(name)
            if place.get_dtype() != "U8" or len(place.get_shape()) != 1:
                raise FileRefused(f"tensor {name[:40]!r}: expected a vector of bytes")
            owned = _TENSOR.fullmatch(name)
            if name != "network.normalisation" and (owned is None or f"task.{owned[1]}" not in self._known):
                raise FileRefused(f"tensor {name[:40]!r}: there is no such thing in a file of masks")

    def each(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self._opened.get_tensor(name)) for name in self.names)

    def find(self, name: str) -> bytes | None:
        return self._opened.get_tensor(name).tobytes() if name in self._known else None

    def load(self, name: str, most: int) -> bytes:
        """Raises FileRefused where it has more than `most` bytes."""
        if (size := self._opened.get_slice(name).get_shape()[0]) > most:
            raise FileRefused(f"{name}: {size} bytes, at most {most} are expected")
        data: bytes = self._opened.get_tensor(name).tobytes()
        return data


def digest_of(metadata: dict[str, str], tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over the format, the network, and each tensor's name, size and bytes, in the order of the names."""
    digest = hashlib.sha256()
    texts = (metadata["format"].encode(), metadata["network"].encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    for name, data in tensors:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded + data.nbytes.to_bytes(8, "little"))
        digest.update(data.data)
    return digest.hexdigest()


def _check_size(path: Path) -> None:
    """Before anything else looks at the file: what it says of itself fits in it."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FileRefused("it is not a file")
    size = found.st_size
    with path.open("rb") as file:
        start = file.read(8)
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > size - 8:
        raise FileRefused(f"truncated: {size} bytes, and it says that it has more")
    if size > MAX_BYTES or header > MAX_HEADER:
        raise FileRefused(f"too large: {size} bytes with a header of {header}, at most {MAX_BYTES} and {MAX_HEADER}")


def _parsed(kind: type[T], data: bytes, where: str) -> T:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, (where, *first["loc"])))
        raise FileRefused(f"{place}: {first['msg']}") from None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, durably, unless something is raised."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
