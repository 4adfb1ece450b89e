"""What the scenario asks of the store: that a state directory stays with given tasks or without, and whose a key is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage import tasks
from storage.models import NetworkRow
from streams.batch import BatchRejected
from supsupd.choices import Objective
from supsupd.config import ConfigError, Settings

if TYPE_CHECKING:
    from storage.db import Session

DEFAULT = "NNs"
"""Of a network that was stored before there was a choice."""


def to_stored(settings: Settings) -> dict[str, Any]:
    """What is kept of the settings with the network, as JSON."""
    return {"scenario": settings.recognition.scenario}


def check_stored(row: NetworkRow, settings: Settings) -> None:
    """Raises ConfigError when a stored network cannot go on under these settings.

    Tasks that were found have no key by which a batch could name them, and those that were named may be one
    distribution under several keys, which recognition could not keep apart.
    """
    begun, asked = row.config.get("scenario", DEFAULT), settings.recognition
    if (begun == DEFAULT) == asked.tasks_given:
        fitting = f"{DEFAULT!r}" if begun == DEFAULT else "'GG', 'GNs' or 'GNu'"
        raise ConfigError(
            [
                f"recognition.scenario: given {asked.scenario!r}; expected {fitting}, since {settings.state} was begun "
                f"with {begun!r}: set that, or another state directory"
            ]
        )
    if settings.reservoir.enabled and (kind := row.architecture["kind"]) != "units":
        raise ConfigError(
            [
                f"reservoir.enabled: given True; expected False, since {settings.state} was begun with a network of "
                f"kind {kind!r}: set that, or another state directory"
            ]
        )
    outputs = int(row.architecture["outputs"])
    if len(row.classes) > outputs - spare_outputs(asked.objective):
        raise ConfigError(
            [
                f"recognition.objective: given 'g'; expected 'entropy', 'energy' or 'max-logit', since the "
                f"{len(row.classes)} classes in {settings.state} fill all {outputs} outputs"
            ]
        )


def spare_outputs(objective: Objective) -> int:
    """How many outputs no class may take: objective g looks at one that stands for none."""
    return 1 if objective == "g" else 0


def find_given(session: Session, key: str) -> int | None:
    """The task that answers for a user's key; None when it is new. Raises BatchRejected for a retired one."""
    row = tasks.find_key(session, key)
    if row is None:
        return None
    if row.retired_at is not None:
        raise BatchRejected("task_retired", f"task {row.id} ({key}) is retired; expected one in use: reopen it")
    return row.id


def name_after_key(session: Session, task_id: int, key: str) -> None:
    """Records the user's key of a new task, and names the task so where the key is a valid and free name."""
    tasks.set_key(session, task_id, key)
    try:
        tasks.rename(session, task_id, key)
    except (tasks.NameInvalid, tasks.NameTaken):
        return
