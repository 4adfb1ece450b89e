"""Bytes to Batch, by the name of their format, and a batch to canonical .npz bytes.

Every size is checked before memory is taken for it, and nothing is ever unpickled.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from types import MappingProxyType

from streams.arrays import MAX_LABEL_CHARACTERS, MAX_TASK_CHARACTERS
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.csvs import decode_csv
from streams.images import decode_images, pack_images
from streams.jsons import decode_json, decode_jsonl
from streams.npz import decode_npy, decode_npz, encode, pack_pair
from streams.reading import Columns, Limits, Reading
from streams.shards import decode_shard
from streams.tables import decode_arrow, decode_parquet

__all__ = [
    "FORMATS",
    "MAX_LABEL_CHARACTERS",
    "MAX_TASK_CHARACTERS",
    "Columns",
    "Limits",
    "Reading",
    "decode",
    "encode",
    "form_of_media_type",
    "form_of_name",
    "pack_images",
    "pack_pair",
    "prepare",
    "read",
    "sniff",
]

_DECODERS: Mapping[str, Callable[[bytes, Reading, Budget], Batch]] = MappingProxyType(
    {
        "npz": decode_npz,
        "npy": decode_npy,
        "images": decode_images,
        "tar": decode_shard,
        "parquet": decode_parquet,
        "csv": decode_csv,
        "arrow": decode_arrow,
        "jsonl": decode_jsonl,
        "json": decode_json,
    }
)
FORMATS = tuple(_DECODERS)
"""The names of all formats."""

_SUFFIXES = {
    ".npz": "npz",
    ".npy": "npy",
    ".tar": "tar",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
}
_MEDIA_TYPES = {
    "application/x-npz": "npz",
    "application/x-npy": "npy",
    "application/x-tar": "tar",
    "application/vnd.apache.parquet": "parquet",
    "text/csv": "csv",
    "application/vnd.apache.arrow.file": "arrow",
    "application/vnd.apache.arrow.stream": "arrow",
    "application/jsonl": "jsonl",
    "application/x-ndjson": "jsonl",
    "application/json": "json",
}
_MAGIC = {
    b"PK\x03\x04": "npz",
    b"PK\x05\x06": "npz",
    b"\x93NUMPY": "npy",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
}
_DEFAULTS = Limits()
_SHOWN = 32  # characters of a word that is no format


def read(payload: bytes, form: str, reading: Reading) -> Batch:
    """The batch that the bytes hold as `form`, a name of FORMATS; raises only BatchRejected."""
    if form not in _DECODERS:
        raise BatchRejected("unsupported_format", f"{form[:_SHOWN]!r}, expected one of {', '.join(FORMATS)}")
    if not payload:
        raise BatchRejected("truncated", "0 bytes")
    if payload[:1] == b"\x80" and payload[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise BatchRejected("forbidden_pickle", f"a pickle, expected {form}")
    try:
        return _DECODERS[form](payload, reading, Budget(len(payload), reading.limits))
    except MemoryError as error:
        raise BatchRejected("oom", f"{len(payload)} bytes of {form} take more memory than there is") from error


def prepare(form: str) -> None:
    """Loads what only `form` needs, so that the first batch of it takes no more memory than the next ones."""
    if form in ("parquet", "arrow"):
        with suppress(ImportError):  # `read` says so
            import pyarrow.compute
            import pyarrow.ipc
            import pyarrow.parquet  # noqa: F401


def decode(
    payload: bytes,
    limits: Limits = _DEFAULTS,
    with_task: bool = False,
    form: str = "npz",
    columns: Columns | None = None,
) -> Batch:
    """As `read`, by what is wanted of a `Reading`."""
    return read(payload, form, Reading(limits, columns or Columns(), with_task))


def form_of_name(name: str) -> str | None:
    """The format that a file's suffix tells; None where it tells none."""
    return _SUFFIXES.get(PurePosixPath(name).suffix.lower())


def form_of_media_type(text: str) -> str | None:
    """The format that a Content-Type tells; None where it tells none, as application/octet-stream."""
    return _MEDIA_TYPES.get(text.partition(";")[0].strip().lower())


def sniff(payload: bytes) -> str | None:
    """The format that the first bytes tell; None where they tell none, as those of CSV."""
    for magic, form in _MAGIC.items():
        if payload.startswith(magic):
            return form
    if payload[257:262] == b"ustar":
        return "tar"
    if payload[:64].lstrip().startswith(b"{"):
        _, newline, second = payload.partition(b"\n")
        return "jsonl" if newline and second[:64].lstrip().startswith(b"{") else "json"
    return None
