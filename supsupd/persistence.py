"""Between the learning engine's records and the database's rows: the one place that knows both.

`store_change` is the effect of a batch: masks, task, training state, decisions and ledger rows in the caller's single
transaction. A crash leaves all of it or nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from safetensors import SafetensorError

from storage import decisions, ledger, masks, networks, tasks, training_states
from storage.models import BatchRow, Kind, NetworkRow, TaskRow
from supsupd.explain import why
from supsupd.learning.continual import Change, LabelledBatch, Member, TaskRecord
from supsupd.learning.device import Device
from supsupd.learning.labels import ClassList
from supsupd.learning.learner import TrainingState
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.recognition import Reference

if TYPE_CHECKING:
    from storage.db import Session

log = structlog.get_logger("supsupd.storage")


def save_network(session: Session, network: Network, normaliser: Normaliser, classes: ClassList) -> None:
    rule, arrays = normaliser.to_stored()
    networks.save_network(
        session,
        networks.NetworkFields(
            architecture=network.architecture.to_json(),
            seed=network.seed,
            signs_sha256=network.sha256,
            normalisation=rule,
            normalisation_data=arrays,
            classes=list(classes.labels),
            label_kind="str" if classes.kind == "str" else "int",
            config={},
        ),
    )


def load_network(row: NetworkRow, device: Device) -> tuple[Network, Normaliser, ClassList]:
    """Rebuilds the network from its seed. Raises NetworkMismatch unless its signs are the stored ones."""
    network = Network(Architecture.from_json(row.architecture), row.seed, device)
    network.verify(row.signs_sha256)
    normaliser = Normaliser.from_stored(row.normalisation, row.normalisation_data)
    return network, normaliser, ClassList(tuple(row.classes), network.architecture.outputs)


def load_tasks(session: Session, network: Network) -> list[TaskRecord]:
    """All tasks, the one used last at the end. Raises MaskCorrupt."""
    heads = masks.load_heads(session)
    states = training_states.load_states(session)
    recency = {state.task_id: turn for turn, state in enumerate(reversed(states))}
    payloads = {state.task_id: state.payload for state in states}
    rows = sorted(tasks.list_tasks(session), key=lambda row: (recency.get(row.id, -1), row.id))
    return [_task_record(row, heads[row.id].bits, payloads.get(row.id), network) for row in rows]


def _task_record(row: TaskRow, bits: bytes, payload: bytes | None, network: Network) -> TaskRecord:
    return TaskRecord(
        task_id=row.id,
        version=row.version,
        packed=np.frombuffer(bits, dtype=np.uint8),
        density=row.density,
        reference=Reference.from_json(row.reference),
        batches=row.batches,
        samples=row.samples,
        state=_training_state(row.id, payload, network) if payload is not None else None,
    )


def _training_state(task_id: int, payload: bytes, network: Network) -> TrainingState | None:
    """None when the stored state is damaged: its mask is whole, and training goes on from the bits."""
    try:
        return TrainingState.from_bytes(payload, network.device)
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("training_state_damaged", task=task_id, reason=str(error))
        return None


def store_change(session: Session, change: Change, active_tasks: int) -> Change:
    """Writes all that a change did; returns it with the id that a new task got."""
    if change.task is not None:
        change = _store_task(session, change, change.task, active_tasks)
        for member in change.assigned:
            _finish(session, member.batch, change, "committed", _about(member, change))
    elif change.provisional is not None:
        _finish(session, change.provisional.members[-1].batch, change, "unsure", change.evidence)
    for batch in change.given_up:
        _finish(session, batch, change, "quarantined", change.evidence)
    return change


def _store_task(session: Session, change: Change, task: TaskRecord, active_tasks: int) -> Change:
    if task.task_id == 0:
        task = replace(task, task_id=tasks.create(session, _task_fields(task)))
    else:
        tasks.update(session, task.task_id, _task_fields(task))
    if change.trained:
        bits = task.packed.tobytes()
        masks.append_mask(
            session,
            masks.MaskRow(task.task_id, task.version, change.assigned[-1].batch.batch_id, bits, 8 * len(bits)),
        )
    if task.state is not None:
        training_states.save(session, task.task_id, task.version, task.state.to_bytes())
        training_states.keep_recent(session, active_tasks)
    return replace(change, task=task)


def _task_fields(task: TaskRecord) -> tasks.TaskFields:
    return tasks.TaskFields(
        version=task.version,
        batches=task.batches,
        samples=task.samples,
        density=task.density,
        bytes=task.packed.nbytes,
        reference=task.reference.to_json(),
        accuracy=task.reference.accuracy,
        entropy=task.reference.evidence["entropy"].mean,
    )


def _about(member: Member, change: Change) -> dict[str, Any]:
    """The evidence of the batch that decided, with the rows that were taken of this one."""
    own = {"rows": [member.start, member.stop], "batch_rows": len(member.batch.samples)}
    return change.evidence | own | {"decided_with": change.assigned[-1].batch.batch_id}


def _finish(
    session: Session, batch: LabelledBatch, change: Change, state: ledger.Result, evidence: dict[str, Any]
) -> None:
    task_id = change.task.task_id if change.task is not None and state == "committed" else None
    kind: Kind = change.kind if state == "committed" else "unsure"
    provisional = change.provisional.provisional_id if change.provisional and state == "unsure" else None
    outcome = ledger.Outcome(state, task_id, provisional, kind, why(change, state))
    ledger.finish(session, batch.batch_id, outcome)
    decisions.record(session, batch.batch_id, kind, task_id, evidence)


def member_rows(session: Session, row: BatchRow) -> tuple[int, int]:
    """The rows of an unsure batch that its provisional task took, from its newest decision."""
    evidence: dict[str, Any] = decisions.list_for_batch(session, row.id)[-1].evidence
    start, stop = evidence["rows"]
    return start, stop
