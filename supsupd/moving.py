"""Moves tasks from one state directory to another: what `supsupd masks export` writes and `import` takes in."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from storage import masks, networks, tasks
from storage.models import NetworkRow, TaskRow
from supsupd.admission import architecture_of, check_mask, check_same
from supsupd.learning.network import Architecture, Network
from supsupd.learning.pretrained import Pretrained
from supsupd.learning.reference import Reference
from supsupd.portable import FileRefused, MaskFile, MaskRecord, NetworkIdentity, PortableMask, write_masks

if TYPE_CHECKING:
    from storage.db import Session

SHOWN_HASH = 16


class NothingToMove(LookupError):
    """There is no network yet, or no task."""


class AlreadyThere(ValueError):
    """A mask of the file is the newest mask of a task already."""


def export_masks(session: Session, path: Path, wanted: Collection[int] = ()) -> list[int]:
    """Writes the newest masks of these tasks, or of all tasks in use, to a file; the tasks' ids.

    Raises NothingToMove, TaskUnknown, MaskCorrupt, OSError.
    """
    network = networks.get_network(session)
    if network is None:
        raise NothingToMove("there is no network yet, and therefore no mask")
    rows = [tasks.load_task(session, task_id) for task_id in sorted(set(wanted))] or tasks.list_tasks(session)
    if not rows:
        raise NothingToMove("there is no task in use")
    found = [portable_of(session, row) for row in rows]
    write_masks(path, identity_of(network), network.normalisation_data, found)
    return [row.id for row in rows]


def portable_of(session: Session, row: TaskRow) -> PortableMask:
    """Raises MaskCorrupt."""
    mask = masks.load_mask(session, row.id)
    record = MaskRecord(
        task=row.id,
        version=mask.version,
        name=row.name,
        key=row.key,
        batches=row.batches,
        samples=row.samples,
        nbits=mask.nbits,
        density=mask.density,
        sha256=mask.sha256,
        reference=row.reference,
    )
    return PortableMask(record, mask.bits, mask.statistics, tasks.get_inputs(session, row.id))


def identity_of(row: NetworkRow) -> NetworkIdentity:
    """Of a pretrained file only the name goes along; what is in it is part of the network's hash."""
    stored = row.architecture
    path = {"pretrained": Path(stored["pretrained"]).name} if "pretrained" in stored else {}
    data = row.normalisation_data
    return NetworkIdentity(
        architecture=stored | path,
        seed=row.seed,
        signs_sha256=row.signs_sha256,
        normalisation=row.normalisation,
        normalisation_sha256=None if data is None else hashlib.sha256(data).hexdigest(),
        classes=row.classes,
        label_kind="str" if row.label_kind == "str" else "int",
        config=row.config,
    )


def import_masks(
    session: Session, file: MaskFile, by: str | None, again: bool = False, pretrained: Path | None = None
) -> dict[int, int]:
    """Makes a new task of each one in the file; their new ids by their ids there.

    A state without a network gets that of the file, built anew and checked; `pretrained` are its weights, where it was
    made with such. `again`: also masks that are there already.

    Raises FileRefused, NetworkDiffers, AlreadyThere, NetworkMismatch, PretrainedMismatch: then nothing may be kept.
    """
    architecture = architecture_of(file.network, file.normalisation_data)
    row = networks.get_network(session)
    if next(file.masks(), None) is None:
        raise FileRefused("there is no task in it")
    for mask in file.masks():
        check_mask(mask, architecture, len(file.network.classes))
    if row is None:
        _found(session, file, architecture, pretrained)
    else:
        check_same(row, file)
        longer = max(row.classes, file.network.classes, key=len)
        networks.extend_classes(session, longer)
    there = masks.list_head_hashes(session)
    moved: dict[int, int] = {}
    for mask in file.masks():
        if mask.record.sha256 in there and not again:
            twin = masks.find_newest(session, mask.record.sha256)
            raise AlreadyThere(
                f"task {mask.record.task} of the file has the mask of task {twin}; --again takes it anyhow"
            )
        moved[mask.record.task] = _take_in(session, mask, file.sha256, by)
    return moved


def _take_in(session: Session, mask: PortableMask, file_sha256: str, by: str | None) -> int:
    """Stores a new task and the first version of its mask; its id."""
    record, reference = mask.record, Reference.from_json(mask.record.reference)
    fields = tasks.TaskFields(
        version=1,
        batches=record.batches,
        samples=record.samples,
        density=record.density,
        bytes=len(mask.bits) + len(mask.statistics or b""),
        reference=record.reference,
        accuracy=reference.accuracy,
        entropy=reference.evidence["entropy"].mean,
    )
    task_id = tasks.create(session, fields)
    tasks.name_freely(session, task_id, record.name)
    if record.key is not None:
        tasks.set_key_freely(session, task_id, record.key)
    tasks.save_inputs(session, task_id, mask.inputs)
    reason = f"imported from {file_sha256[:SHOWN_HASH]}, task {record.task} version {record.version}"
    bits = (mask.bits, record.nbits, mask.statistics)
    masks.append_mask(session, masks.MaskRow(task_id, 1, None, *bits, reason, record.reference, by))
    return task_id


def _found(session: Session, file: MaskFile, architecture: Architecture, pretrained: Path | None) -> None:
    """Stores the file's network as that of the state directory.

    Raises FileRefused, NetworkMismatch, PretrainedMismatch.
    """
    identity, weights = file.network, None
    stored = {key: value for key, value in identity.architecture.items() if key != "pretrained"}
    if "pretrained" in identity.architecture:
        if pretrained is None:
            name = str(identity.architecture["pretrained"])[:80]
            raise FileRefused(f"its network was made with the weights of {name!r}: say where they are by --pretrained")
        weights = Pretrained.load(pretrained)
        stored["pretrained"] = str(pretrained.absolute())
    Network(architecture, identity.seed, "cpu", weights).verify(identity.signs_sha256)
    networks.save_network(
        session,
        networks.NetworkFields(
            architecture=stored,
            seed=identity.seed,
            signs_sha256=identity.signs_sha256,
            normalisation=identity.normalisation,
            normalisation_data=file.normalisation_data,
            classes=list(identity.classes),
            label_kind=identity.label_kind,
            config=identity.config,
        ),
    )
