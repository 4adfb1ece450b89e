"""Which task a batch says that it belongs to: by its own word, or else by the folder that it lies in."""

from pathlib import PurePosixPath
from typing import Literal

from streams.arrays import MAX_TASK_CHARACTERS
from streams.batch import BatchRejected

TaskRule = Literal["ignored", "labelled", "all"]
"""ignored: nobody looks for a task. labelled: every labelled batch has one, an unlabelled one only by its own word.
all: every batch has one."""


def told_task(own: str | None, labelled: bool, name: str, rule: TaskRule) -> str | None:
    """The task of a batch: `own`, its own word for it, or its folder in `name`, a path below the watched folder.

    Raises BatchRejected no_task or bad_task.
    """
    if rule == "ignored":
        return None
    if own is not None or (rule == "labelled" and not labelled):
        return own
    folder = PurePosixPath(name).parent.as_posix()
    if folder == ".":
        raise BatchRejected("no_task", "expected a member task, or a folder that names the task below the watched one")
    if len(folder) > MAX_TASK_CHARACTERS:
        raise BatchRejected("bad_task", f"a folder of {len(folder)} characters, at most {MAX_TASK_CHARACTERS} expected")
    return folder
