"""What the name and the version of a model mean, and why a model can't be asked."""

import re
from functools import lru_cache

from supsupd.serving.engine import MODEL_NAME, EngineError, TaskModel

OWN_VERSION = 1
"""Of `supsup`: what it is does not change."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_VERSION = re.compile(r"[0-9]{1,18}")
_TASK = re.compile(r"task-([1-9][0-9]{0,17})")


class UnknownModel(EngineError):
    """There never was such a model, or such a version of it."""

    status = 404

    def __init__(self, name: str, version: str = "") -> None:
        if not _NAME.fullmatch(name):
            text = "a model's name is 1 to 64 letters, digits, dots, _ and -"
        elif version and not _VERSION.fullmatch(version):
            text = "a version is 1 to 18 digits"
        else:
            text = f"model {name} has no version {version}" if version else f"there is no model {name}"
        super().__init__(f"unknown_model: {text}")


class NotLoaded(EngineError):
    """There is such a model, and it can't be asked now."""

    status = 503

    def __init__(self, model: TaskModel, version: int | None = None) -> None:
        super().__init__(f"not_loaded: {reason(model, version)}")


def reason(model: TaskModel, version: int | None) -> str:
    """Why a task's model, or this version of it, can't be asked, and what would change that."""
    if model.retired:
        return f"{model.problem}; load task-{model.task} to take it into use again"
    if model.served is None:
        return model.problem or f"task {model.task} is not served"
    return (
        f"version {model.served} of task-{model.task} is served; "
        f"load it with the parameter version {version} to roll back to that"
    )


@lru_cache(maxsize=1024)
def meant(name: str, version: str) -> tuple[int | None, int | None]:
    """The task that a model stands for, None for `supsup`; the version, None for whichever is served.

    Raises UnknownModel.
    """
    task = _TASK.fullmatch(name)
    if task is None and name != MODEL_NAME:
        raise UnknownModel(name)
    if version and not _VERSION.fullmatch(version):
        raise UnknownModel(name, version)
    wanted = int(version) if version else None
    if task is None and wanted not in (None, OWN_VERSION):
        raise UnknownModel(name, version)
    return int(task[1]) if task is not None else None, wanted
