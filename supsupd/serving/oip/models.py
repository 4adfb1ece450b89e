"""The models that clients see: `supsup`, which infers the task, and one for each task, whose versions are its mask's.

All answers are plain objects in the protocol's JSON form; REST and gRPC both tell them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from supsupd import __version__
from supsupd.serving.batching import Pass
from supsupd.serving.engine import MODEL_NAME, EngineError, NoModelYet, Prediction, TaskModel, TaskUnknown
from supsupd.serving.front import Front
from supsupd.serving.memory import Holding
from supsupd.serving.oip.loading import version_to_load
from supsupd.serving.oip.log_settings import change_log_settings, log_settings
from supsupd.serving.oip.naming import OWN_VERSION, NotLoaded, UnknownModel, meant, reason
from supsupd.serving.oip.outputs import model_config, model_metadata, output_tensors, row_bytes, wanted_outputs
from supsupd.serving.oip.protocol import InferAnswer, InferRequest, ProtocolError, question_of, timeout_of

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
LIGHT_BYTES, LIGHT_TEXT, LIGHT_VALUES = 1 << 20, 1 << 16, 1 << 10
"""What is gone through in well under a millisecond: as an array, as JSON, and one by one; more is left to another
thread. Handing over costs some tenths of a millisecond itself."""
LIGHT_ROWS = 16
"""So few have no answer that is worth counting."""

T = TypeVar("T")


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
        return self.front.problem() is None

    def check_name(self, name: str, version: str = "") -> None:
        """Raises EngineError 404 for what can't be a model's name or version, before anything is read."""
        meant(name, version)

    async def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a model, or this version of it, can be asked."""
        return await self.problem(name, version) is None

    async def problem(self, name: str, version: str = "") -> EngineError | None:
        """Why a model, or this version of it, can't be asked; None: it can."""
        task, wanted = meant(name, version)
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
        task, wanted = meant(name, "" if version is None else str(version))
        if task is None:
            return
        model = await self._task_model(task, wanted)
        if model.retired:
            await self.front.patiently(self.engine.reopen, task, by)
        if wanted not in (None, model.versions[-1]):
            await self.front.patiently(self.engine.rollback, task, wanted, by)
        elif model.served is None and not model.retired:
            raise NotLoaded(model)

    async def unload(self, name: str, by: str | None) -> None:
        """Retires a task; `by`: who asks. Raises EngineError 409 too."""
        task, _ = meant(name, "")
        if task is None:
            raise ProtocolError(f"bad_request: {MODEL_NAME} can't be unloaded; unload a task's model")
        model = await self._task_model(task)
        if not model.retired:
            await self.front.patiently(self.engine.retire, task, by)

    def log_settings(self, changes: Mapping[str, Any] | None = None, by: str | None = None) -> dict[str, Any]:
        """Which lines are logged, after these changes; `by`: who asks."""
        return change_log_settings(changes, by) if changes else log_settings()

    async def infer(self, name: str, version: str, request: InferRequest, holding: Holding) -> InferAnswer:
        """The answer to a request, for which `holding` takes the memory. Raises what `Front.infer` raises, too."""
        began = time.monotonic()
        task, wanted = meant(name, version)
        try:
            outputs = wanted_outputs(request.outputs)
            question = await self._away(_bytes_of(request) > LIGHT_BYTES, question_of, request, task)
            if len(question.x) > LIGHT_ROWS:
                size = len(question.x) * row_bytes(outputs, (self.engine.model() or {}).get("classes", ()))
                await holding.take("answered", size, f"an answer to {len(question.x)} rows", timeout_of(request))
            passes: list[Pass] = []
            asked = time.monotonic()
            prediction = await self.front.infer(question, timeout_of(request), passes.append)
            answered = time.monotonic()
            if task is not None:
                await self._check(task, wanted, prediction)
            values = len(question.x) * (1 + sum(classes or 0 for _, classes in outputs))
            tensors = await self._away(values > LIGHT_VALUES, output_tensors, prediction, outputs)
        except (EngineError, ProtocolError) as error:
            if task is None or self.engine.served_version(task) is not None:
                self.front.statistics.failed(name, time.monotonic() - began)
            if task is not None and isinstance(error, EngineError) and error.status == 404:
                raise await self.problem(name, version) or error from None
            raise
        stages = (passes[0].began - asked, asked - began, answered - passes[0].began, time.monotonic() - answered)
        self.front.statistics.succeeded(name, len(question.x), stages, passes[0])
        return InferAnswer(name, str(OWN_VERSION if task is None else prediction.version), request.id, tensors)

    async def _away(self, is_long: bool, work: Callable[..., T], *given: Any) -> T:
        """What `work` gives; done by another thread if it would hold up the loop."""
        return await self.front.heavily(work, *given) if is_long else work(*given)

    async def _check(self, task: int, wanted: int | None, prediction: Prediction) -> None:
        """Raises EngineError unless this task answered, by the version that was asked for."""
        if prediction.task[0] != task or wanted not in (None, prediction.version):
            raise NotLoaded(await self._task_model(task, wanted), wanted)

    async def _served(self, name: str, version: str) -> int:
        """The version of a model that answers."""
        if (problem := await self.problem(name, version)) is not None:
            raise problem
        task, _ = meant(name, version)
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


def _bytes_of(request: InferRequest) -> int:
    return sum(tensor.nbytes for tensor in request.inputs)


def _listed(name: str, version: int, why: str) -> dict[str, Any]:
    return {"name": name, "version": str(version), "state": "UNAVAILABLE" if why else "READY", "reason": why}
