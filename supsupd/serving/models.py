"""The models that clients see: `supsup`, which infers the task, and one for each task, whose versions are its mask's.

All answers are plain objects in the protocol's JSON form; REST and gRPC both tell them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from starlette.concurrency import run_in_threadpool

from supsupd import __version__
from supsupd.serving.batching import Pass
from supsupd.serving.engine import MODEL_NAME, EngineError, NoModelYet, Prediction, TaskModel, TaskUnknown
from supsupd.serving.front import Front
from supsupd.serving.loading import version_to_load
from supsupd.serving.log_settings import change_log_settings, log_settings
from supsupd.serving.outputs import model_config, model_metadata, output_tensors, wanted_outputs
from supsupd.serving.protocol import InferAnswer, InferRequest, ProtocolError, question_of, timeout_of

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
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


class Models:
    """Everything of Open Inference Protocol v2 but its two wires. Used in the thread of the event loop.

    Where a name or a version means nothing, each raises EngineError 404 (`unknown_model`), where it can't be asked now,
    503 (`not_loaded`); requests that break the protocol raise ProtocolError.
    """

    def __init__(self, front: Front) -> None:
        self.front = front
        self.engine = front.engine

    def server_metadata(self) -> dict[str, Any]:
        """{"name", "version", "extensions"}"""
        return {"name": "supsupd", "version": __version__, "extensions": list(EXTENSIONS)}

    def is_server_ready(self) -> bool:
        """Whether it can predict, and is not about to end."""
        return not self.front.draining and self.engine.ready()

    def check_name(self, name: str, version: str = "") -> None:
        """Raises EngineError 404 for what can't be a model's name or version, before anything is read."""
        _meant(name, version)

    async def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a model, or this version of it, can be asked."""
        return await self.problem(name, version) is None

    async def problem(self, name: str, version: str = "") -> EngineError | None:
        """Why a model, or this version of it, can't be asked; None: it can."""
        task, wanted = _meant(name, version)
        if task is None:
            return None if self.engine.ready() else NoModelYet()
        served = self.engine.served_version(task)
        if served is not None and wanted in (None, served):
            return None
        model = await self._task_model(task, wanted)
        return NotLoaded(model, wanted) if model.served is None or wanted not in (None, model.served) else None

    async def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """{"name", "versions", "platform", "inputs", "outputs"}; -1 stands for any number of rows."""
        served = await self._served(name, version)
        return model_metadata(name, [served], await self.shapes())

    async def config(self, name: str, version: str = "") -> dict[str, Any]:
        """Triton's ModelConfig by its JSON names."""
        served = await self._served(name, version)
        return model_config(name, served, await self.shapes(), self.front.limits)

    async def shapes(self) -> dict[str, Any]:
        """What `Engine.model` says. Raises NoModelYet."""
        model = await run_in_threadpool(self.engine.model)
        if model is None:
            raise NoModelYet
        return model

    async def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """{"model_stats": [...]}: of one model, or of all that can be asked."""
        if name:
            versions = {name: await self._served(name, version)}
        else:
            versions = {MODEL_NAME: OWN_VERSION} if self.engine.ready() else {}
            models = await run_in_threadpool(self.engine.task_models)
            versions |= {f"task-{model.task}": model.served for model in models if model.served is not None}
        return {"model_stats": [self.front.statistics.show(name, str(version)) for name, version in versions.items()]}

    async def index(self, ready: bool = False) -> list[dict[str, Any]]:
        """[{"name", "version", "state", "reason"}]: every version of every model, or only those that are ready."""
        problem = await self.problem(MODEL_NAME)
        listed = [_listed(MODEL_NAME, OWN_VERSION, "" if problem is None else problem.text)]
        for model in await run_in_threadpool(self.engine.task_models):
            for version in model.versions:
                why = "" if version == model.served else reason(model, version)
                listed.append(_listed(f"task-{model.task}", version, why))
        return [entry for entry in listed if entry["state"] == "READY"] if ready else listed

    async def load(self, name: str, parameters: dict[str, Any], by: str | None) -> None:
        """Takes a retired task into use again, and rolls it back to the version that the parameters name.

        by: who asks. Raises EngineError 409 too.
        """
        version = version_to_load(parameters)
        task, wanted = _meant(name, "" if version is None else str(version))
        if task is None:
            return
        model = await self._task_model(task, wanted)
        if model.retired:
            await run_in_threadpool(self.engine.reopen, task, by)
        if wanted not in (None, model.versions[-1]):
            await run_in_threadpool(self.engine.rollback, task, wanted, by)
        elif model.served is None and not model.retired:
            raise NotLoaded(model)

    async def unload(self, name: str, by: str | None) -> None:
        """Retires a task; `by`: who asks. Raises EngineError 409 too."""
        task, _ = _meant(name, "")
        if task is None:
            raise ProtocolError(f"bad_request: {MODEL_NAME} can't be unloaded; unload a task's model")
        model = await self._task_model(task)
        if not model.retired:
            await run_in_threadpool(self.engine.retire, task, by)

    def log_settings(self, changes: Mapping[str, Any] | None = None, by: str | None = None) -> dict[str, Any]:
        """Which lines are logged, after these changes; `by`: who asks."""
        return change_log_settings(changes, by) if changes else log_settings()

    async def infer(self, name: str, version: str, request: InferRequest) -> InferAnswer:
        """The answer to a request. Raises what `Front.infer` raises, too."""
        began = time.monotonic()
        task, wanted = _meant(name, version)
        try:
            question, outputs = question_of(request, task), wanted_outputs(request.outputs)
            passes: list[Pass] = []
            asked = time.monotonic()
            prediction = await self.front.infer(question, timeout_of(request), passes.append)
            answered = time.monotonic()
            if task is not None:
                await self._check(task, wanted, prediction)
            tensors = output_tensors(prediction, outputs)
        except (EngineError, ProtocolError) as error:
            if task is None or self.engine.served_version(task) is not None:
                self.front.statistics.failed(name, time.monotonic() - began)
            if task is not None and isinstance(error, EngineError) and error.status == 404:
                raise await self.problem(name, version) or error from None
            raise
        stages = (passes[0].began - asked, asked - began, answered - passes[0].began, time.monotonic() - answered)
        self.front.statistics.succeeded(name, len(question.x), stages, passes[0])
        return InferAnswer(name, str(OWN_VERSION if task is None else prediction.version), request.id, tensors)

    async def _check(self, task: int, wanted: int | None, prediction: Prediction) -> None:
        """Raises EngineError unless this task answered, by the version that was asked for."""
        if prediction.task[0] != task or wanted not in (None, prediction.version):
            raise NotLoaded(await self._task_model(task, wanted), wanted)

    async def _served(self, name: str, version: str) -> int:
        """The version of a model that answers."""
        if (problem := await self.problem(name, version)) is not None:
            raise problem
        task, _ = _meant(name, version)
        return OWN_VERSION if task is None else self.engine.served_version(task) or 0

    async def _task_model(self, task: int, version: int | None = None) -> TaskModel:
        """Raises UnknownModel."""
        try:
            (model,) = await run_in_threadpool(self.engine.task_models, task)
        except TaskUnknown:
            raise UnknownModel(f"task-{task}") from None
        if version is not None and version not in model.versions:
            raise UnknownModel(f"task-{task}", str(version))
        return model


@lru_cache(maxsize=1024)
def _meant(name: str, version: str) -> tuple[int | None, int | None]:
    """The task that a model stands for, None for `supsup`; the version, None for whichever is served."""
    task = _TASK.fullmatch(name)
    if task is None and name != MODEL_NAME:
        raise UnknownModel(name)
    if version and not _VERSION.fullmatch(version):
        raise UnknownModel(name, version)
    wanted = int(version) if version else None
    if task is None and wanted not in (None, OWN_VERSION):
        raise UnknownModel(name, version)
    return int(task[1]) if task is not None else None, wanted


def _listed(name: str, version: int, why: str) -> dict[str, Any]:
    return {"name": name, "version": str(version), "state": "UNAVAILABLE" if why else "READY", "reason": why}
