"""Between the learning engine's records and the database's rows: the one place that knows both.

`store_change` is the effect of a batch: masks, task, training state, decisions and ledger rows in the caller's single
transaction. A crash leaves all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from safetensors import SafetensorError

from storage import decisions, features, ledger, masks, networks, tasks, training_states
from storage.masks import MaskCorrupt
from storage.models import BatchRow, Kind, NetworkRow, TaskRow
from supsupd.explain import seen_of, why, why_set_back
from supsupd.learning.bank import Key, Mask, MaskBank
from supsupd.learning.device import Device
from supsupd.learning.features import FeatureModel
from supsupd.learning.index import InputDensity, InputMoments
from supsupd.learning.labels import ClassList
from supsupd.learning.learner import TrainingState
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.pretrained import Pretrained
from supsupd.learning.records import Change, LabelledBatch, Member, TaskRecord, pooled
from supsupd.learning.reference import Reference
from supsupd.learning.transforms import Transforms
from supsupd.scenarios import name_after_key

if TYPE_CHECKING:
    from storage.db import Session

MASKS_READ = 500
"""Masks read by one query."""

log = structlog.get_logger("supsupd.storage")


def load_features(session: Session, network: Network, transforms: Transforms) -> FeatureModel:
    """What is known of the inputs of all tasks, retired ones too. Raises FeaturesCorrupt."""
    products = features.get_products(session)
    model = FeatureModel(network, transforms)
    if products is None:
        return model
    rows = tasks.list_tasks(session, retired=True)
    sums = {row.id: FeatureModel.task_from_bytes(row.statistics) for row in rows if row.statistics is not None}
    return replace(model, tasks=sums, products=FeatureModel.products_from_bytes(products))


def store_features(session: Session, model: FeatureModel, change: Change) -> FeatureModel:
    """Adds the rows that a stored change learned, takes those away that it took back, and writes what it comes to."""
    if change.task is None:
        return model
    task_id = change.task.task_id
    for member in change.assigned:
        model = model.learned(task_id, member.samples.x, member.samples.y)
    for member in change.recalled[:-1]:  # the last one has never been learned
        model = model.learned(task_id, member.samples.x, member.samples.y, sign=-1)
    features.save(session, model.products_to_bytes(), task_id, model.task_to_bytes(task_id))
    return model


def save_network(
    session: Session, network: Network, normaliser: Normaliser, classes: ClassList, config: dict[str, Any]
) -> None:
    """`config`: what is kept of the settings, as JSON."""
    rule, arrays = normaliser.to_stored()
    networks.save_network(
        session,
        networks.NetworkFields(
            architecture=_architecture(network),
            seed=network.seed,
            signs_sha256=network.sha256,
            normalisation=rule,
            normalisation_data=arrays,
            classes=list(classes.labels),
            label_kind="str" if classes.kind == "str" else "int",
            config=config,
        ),
    )


def _architecture(network: Network) -> dict[str, Any]:
    """With the place of the pretrained file, if there is one; what is in it is part of the network's hash."""
    path = {"pretrained": str(network.pretrained.path)} if network.pretrained is not None else {}
    return network.architecture.to_json() | path


def load_network(
    row: NetworkRow, device: Device, pretrained: Path | None = None
) -> tuple[Network, Normaliser, ClassList]:
    """Rebuilds the network from its seed, and from the pretrained file it was made with, wherever that lies now.

    Raises NetworkMismatch unless its weights are the stored ones, and PretrainedMismatch.
    """
    stored = row.architecture.get("pretrained")
    weights = Pretrained.load(pretrained or Path(stored)) if stored is not None else None
    network = Network(Architecture.from_json(row.architecture), row.seed, device, weights)
    network.verify(row.signs_sha256)
    normaliser = Normaliser.from_stored(row.normalisation, row.normalisation_data)
    return network, normaliser, ClassList(tuple(row.classes), network.architecture.outputs)


def load_tasks(
    session: Session, network: Network, bank: MaskBank, active: int
) -> tuple[list[TaskRecord], dict[int, str]]:
    """All tasks in use, the one used last at the end; the masks of those in memory as far as the bank has room, and
    the training states of the `active` ones used last.

    Beside them, by id, what is wrong with those whose mask was read and is damaged.
    """
    nbytes = network.architecture.mask_bytes
    found = {
        row.id: _task_record(row, bank.cold((row.id, row.version), nbytes), None, network)
        for row in tasks.iter_tasks(session)
    }
    for state in reversed(training_states.load_states(session, active)):
        if state.task_id in found:
            known = found.pop(state.task_id)  # and to the end: it was used later
            found[state.task_id] = replace(known, state=_training_state(state.task_id, state.payload, network))
    damaged: dict[int, str] = {}
    while True:
        try:
            bank.warm([record.mask for record in found.values()])
        except MaskCorrupt as error:
            damaged[error.task_id] = str(error)
            del found[error.task_id]
        else:
            return list(found.values()), damaged


def load_packed(session: Session, keys: Sequence[Key]) -> list[np.ndarray]:
    """Packed masks by task id and version, in order. Raises MaskCorrupt, also where one is missing."""
    parts = (keys[start : start + MASKS_READ] for start in range(0, len(keys), MASKS_READ))
    return [_packed(mask) for part in parts for mask in masks.load_masks(session, part)]


def load_task(session: Session, task_id: int, network: Network, version: int | None = None) -> TaskRecord:
    """One task, in use or not, with its newest mask; or with an earlier one and its record, as its newest version.

    Raises TaskUnknown, MaskUnknown, MaskCorrupt.
    """
    row, mask = tasks.load_task(session, task_id), masks.load_mask(session, task_id, version)
    if version is None:
        payload = training_states.get_payload(session, task_id)
        return _task_record(row, Mask(_packed(mask)), payload, network)
    return earlier(_task_record(row, Mask(_packed(mask)), None, network), mask)


def earlier(task: TaskRecord, mask: masks.MaskRow) -> TaskRecord:
    """A task as it was at an earlier version, as its newest one; it goes on from the bits."""
    return replace(
        task,
        version=task.version + 1,
        mask=Mask(_packed(mask)),
        density=mask.density,
        # Version 0.1 kept no record with a mask.
        reference=task.reference if mask.reference is None else Reference.from_json(mask.reference),
        state=None,
    )


def _packed(mask: masks.MaskRow) -> np.ndarray:
    return np.frombuffer(mask.packed, dtype=np.uint8)


def _task_record(row: TaskRow, mask: Mask, payload: bytes | None, network: Network) -> TaskRecord:
    return TaskRecord(
        task_id=row.id,
        version=row.version,
        mask=mask,
        density=row.density,
        reference=Reference.from_json(row.reference),
        batches=row.batches,
        samples=row.samples,
        state=_training_state(row.id, payload, network) if payload is not None else None,
        key=row.key,
        inputs=None if (moments := _moments(row.id, row.inputs)) is None else InputDensity.of(moments),
    )


def load_moments(session: Session, task_id: int) -> InputMoments | None:
    """What is known of a task's inputs; None if nothing is."""
    return _moments(task_id, tasks.get_inputs(session, task_id))


def merge_inputs(session: Session, task_id: int, other_id: int) -> InputDensity | None:
    """A task's inputs with those of another one, stored; None unless both are known."""
    own, other = load_moments(session, task_id), load_moments(session, other_id)
    if own is None or other is None:
        tasks.save_inputs(session, task_id, None)
        return None
    moments = own.joined(other)
    tasks.save_inputs(session, task_id, moments.to_bytes())
    return InputDensity.of(moments)


def _moments(task_id: int, stored: bytes | None) -> InputMoments | None:
    """None when nothing is stored, or what is stored is damaged: the task is then always among those looked at."""
    try:
        return None if stored is None else InputMoments.from_bytes(stored)
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("task_inputs_damaged", task=task_id, reason=str(error))
        return None


def _training_state(task_id: int, payload: bytes, network: Network) -> TrainingState | None:
    """None when the stored state is damaged: its mask is whole, and training goes on from the bits."""
    try:
        return TrainingState.from_bytes(payload, network.device)
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("training_state_damaged", task=task_id, reason=str(error))
        return None


def store_change(session: Session, change: Change, network: Network, active_tasks: int) -> Change:
    """Writes all that a change did; returns it with the id that a new task got."""
    if change.task is not None:
        change = _store_task(session, change, change.task, network)
        change = _store_inputs(session, change)
        training_states.keep_recent(session, active_tasks)
        for member in change.assigned:
            _finish(session, member.batch, change, "committed", _about(member, change))
        _take_back(session, change)
    elif change.provisional is not None:
        _finish(session, change.provisional.members[-1].batch, change, "unsure", change.evidence)
    for batch in change.released:
        ledger.release(session, batch.batch_id)
    for batch in change.given_up:
        _finish(session, batch, change, "quarantined", change.evidence)
        ledger.forget_content(session, batch.batch_id)  # nobody has learned it: it may be sent again
    return change


def _store_task(session: Session, change: Change, task: TaskRecord, network: Network) -> Change:
    if task.task_id == 0:
        task = replace(task, task_id=tasks.create(session, task_fields(task)))
        if task.key is not None:
            name_after_key(session, task.task_id, task.key)
    else:
        tasks.update(session, task.task_id, task_fields(task))
    if change.trained:
        maker = (*change.assigned, *change.recalled)[-1].batch.batch_id
        reason = why_set_back(change) if change.recalled else None
        masks.append_mask(session, mask_row(task, network.architecture, maker, reason))
    if task.state is not None:
        training_states.save(session, task.task_id, task.version, task.state.to_bytes())
    return replace(change, task=task)


def _store_inputs(session: Session, change: Change) -> Change:
    """Adds the rows that the task learned to what is known of its inputs; what it took back fades by itself."""
    task = change.task
    assert task is not None
    if not change.assigned:
        return change
    moments, known = InputMoments.of(pooled(change.assigned).x.cpu().numpy()), load_moments(session, task.task_id)
    if known is not None:
        moments = known.joined(moments)
    elif task.batches > len(change.assigned):
        return change  # learned by a version that kept no inputs: a few of its rows would misrepresent it
    tasks.save_inputs(session, task.task_id, moments.to_bytes())
    return replace(change, task=replace(task, inputs=InputDensity.of(moments)))


def mask_row(
    task: TaskRecord,
    architecture: Architecture,
    batch_id: int | None,
    reason: str | None = None,
    made_by: str | None = None,
) -> masks.MaskRow:
    """The task's mask as a version to store: bits and statistics apart, its record beside them."""
    packed, bit_bytes = task.packed.tobytes(), architecture.bit_bytes
    return masks.MaskRow(
        task_id=task.task_id,
        version=task.version,
        batch_id=batch_id,
        bits=packed[:bit_bytes],
        nbits=architecture.weights,
        statistics=packed[bit_bytes:] or None,
        reason=reason,
        reference=task.reference.to_json(),
        made_by=made_by,
    )


def task_fields(task: TaskRecord) -> tasks.TaskFields:
    return tasks.TaskFields(
        version=task.version,
        batches=task.batches,
        samples=task.samples,
        density=task.density,
        bytes=task.mask.nbytes,
        reference=task.reference.to_json(),
        accuracy=task.reference.accuracy,
        entropy=task.reference.evidence["entropy"].mean,
    )


def _about(member: Member, change: Change) -> dict[str, Any]:
    """The evidence of the batch that decided, with the rows that were taken of this one."""
    shared = {key: value for key, value in change.evidence.items() if key not in ("left_out", "recalled_from")}
    decider = (*change.assigned, *change.recalled)[-1].batch.batch_id
    return shared | member.to_json() | {"decided_with": decider}


def _take_back(session: Session, change: Change) -> None:
    """The batches of a late alarm, the last of which has never been learned, wait in a provisional task."""
    provisional = change.provisional.provisional_id if change.provisional is not None else None
    for member in change.recalled[:-1]:
        reason = why_set_back(change)
        ledger.recall(session, member.batch.batch_id, provisional, reason)
        decision = decisions.Decision("unsure", None, _about(member, change), reason)
        decisions.record(session, member.batch.batch_id, decision)
    if change.recalled and change.provisional is not None:
        newest = change.recalled[-1]
        _finish(session, newest.batch, change, "unsure", _about(newest, change))


def _finish(
    session: Session, batch: LabelledBatch, change: Change, state: ledger.Result, evidence: dict[str, Any]
) -> None:
    task_id = change.task.task_id if change.task is not None and state == "committed" else None
    kind: Kind = change.kind if state == "committed" else "unsure"
    provisional = change.provisional.provisional_id if change.provisional and state == "unsure" else None
    outcome = ledger.Outcome(state, task_id, provisional, kind, why(change, state) + seen_of(batch))
    if batch.came is not None:
        evidence = evidence | {"came": batch.came}
    ledger.finish(session, batch.batch_id, outcome)
    decisions.record(session, batch.batch_id, decisions.Decision(kind, task_id, evidence, outcome.reason))


@dataclass(frozen=True)
class TakenRows:
    """The rows of a batch that a task, or a provisional one, took (see `Member`); `turn` orders such steps.

    `batch_rows`: of how many that was, None where it was not recorded.
    """

    start: int
    stop: int
    left_out: tuple[int, ...] = ()
    recalled_from: int | None = None
    turn: int = 0
    batch_rows: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start - len(self.left_out)

    def to_json(self) -> dict[str, Any]:
        left_out = {"left_out": list(self.left_out)} if self.left_out else {}
        return {"rows": [self.start, self.stop]} | left_out

    def of(self, batch: LabelledBatch) -> Member:
        """All rows where other ones of the batch are learned by now, as after a change of `learning.memory_bytes`."""
        if self.batch_rows not in (None, len(batch.samples)):
            return Member(batch, 0, len(batch.samples), (), self.recalled_from)
        return Member(batch, self.start, self.stop, self.left_out, self.recalled_from)


def taken_rows(session: Session, row: BatchRow) -> TakenRows:
    """What was taken of a batch, from its newest decision; all its rows if that does not say."""
    newest = decisions.list_for_batch(session, row.id)[-1]
    evidence: dict[str, Any] = newest.evidence
    start, stop = evidence.get("rows", (0, row.samples or 0))
    left_out = tuple(evidence.get("left_out", ()))
    return TakenRows(start, stop, left_out, evidence.get("recalled_from"), newest.id, evidence.get("batch_rows"))


def may_explain_more(session: Session, row: BatchRow) -> bool:
    """Whether the step that decided this batch found a task or set one back: unsure batches are asked again then."""
    if row.decision == "new":
        return True
    return row.decision == "unsure" and "alarm" in decisions.list_for_batch(session, row.id)[-1].evidence
