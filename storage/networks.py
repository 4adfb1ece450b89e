"""The one network of a state directory: written once; only its class list grows."""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.orm import Session

from storage.models import Blob, Json, LabelKind, NetworkRow, utc_now


class NetworkExists(RuntimeError):
    """The state directory has its network already."""


class NetworkUnknown(LookupError):
    """The state directory has no network yet."""


@dataclass(frozen=True, slots=True)
class NetworkFields:
    """What rebuilds the network.

    signs_sha256: of the generated sign bits, checked at every start; normalisation: at least {"rule": …};
    normalisation_data: its frozen arrays (safetensors); classes: the user's labels by output index.
    """

    architecture: Json
    seed: int
    signs_sha256: str
    normalisation: Json
    classes: list[Any]
    label_kind: LabelKind
    config: Json
    normalisation_data: Blob | None = None


def save_network(session: Session, fields: NetworkFields) -> None:
    """Record the network. Raises NetworkExists when there is one."""
    if get_network(session) is not None:
        raise NetworkExists("the network is written once")
    session.add(NetworkRow(id=1, created_at=utc_now(), **asdict(fields)))
    session.flush()


def get_network(session: Session) -> NetworkRow | None:
    """The network, or None before the first batch."""
    return session.get(NetworkRow, 1)


def extend_classes(session: Session, classes: list[Any]) -> None:
    """Replace the class list by a longer one that begins with it.

    Raises NetworkUnknown, and ValueError when a class would lose its output.
    """
    row = get_network(session)
    if row is None:
        raise NetworkUnknown("there is no network yet")
    if classes[: len(row.classes)] != row.classes:
        raise ValueError(f"the class list can only grow at its end: {row.classes} to {classes}")
    row.classes = list(classes)
    session.flush()
