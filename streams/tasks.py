"""Which task a batch says that it belongs to: by its own member `task`, or else by the folder that it lies in."""

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Literal

from streams.batch import Batch, BatchRejected
from streams.formats import MAX_TASK_CHARACTERS, Limits, decode, encode

TaskRule = Literal["ignored", "labelled", "all"]
"""ignored: nobody looks for a task. labelled: every labelled batch has one, an unlabelled one only by its own member.
all: every batch has one."""


def accept(payload: bytes, name: str, rule: TaskRule, limits: Limits) -> tuple[bytes, Batch]:
    """The batch in the bytes of an .npz file called `name`, and the bytes that say all of it.

    They are other bytes only where the folder names the task: it is written into them, so that the same samples in
    two folders are two batches. Raises BatchRejected.
    """
    batch = decode(payload, limits, with_task=rule != "ignored")
    told = with_task(batch, name, rule)
    return (payload if told is batch else encode(told)), told


def with_task(batch: Batch, name: str, rule: TaskRule) -> Batch:
    """The batch with its task: its own, or that of its folder in `name`, a path below the watched folder.

    Raises BatchRejected no_task or bad_task.
    """
    if rule == "ignored" or batch.task is not None or (rule == "labelled" and batch.y is None):
        return batch
    folder = PurePosixPath(name).parent.as_posix()
    if folder == ".":
        raise BatchRejected("no_task", "expected a member task, or a folder that names the task below the watched one")
    if len(folder) > MAX_TASK_CHARACTERS:
        raise BatchRejected("bad_task", f"a folder of {len(folder)} characters, at most {MAX_TASK_CHARACTERS} expected")
    return replace(batch, task=folder)
