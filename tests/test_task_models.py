"""The tasks of a real engine as models: their versions are the stored masks, and operators' tools show in them."""

import asyncio

import pytest
from asking import ask as post
from asking import infer, predicted
from daemon_process import DaemonProcess, ask
from digits import draw, held_out
from learned_state import copy_of, learn_stream, running, versions
from test_out_of_service import damage

from supsupd import operations
from supsupd.sections import ServingSettings
from supsupd.serving.engine import EngineError
from supsupd.serving.front import Front
from supsupd.serving.oip.models import Models
from supsupd.serving.oip.protocol import InferRequest
from supsupd.serving.oip.tensors import Tensor


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return learn_stream(tmp_path_factory.mktemp("learned"))


@pytest.fixture
def settings(learned, tmp_path):
    return copy_of(learned, tmp_path / "copy")


def rows(letter):
    return held_out("ABC".index(letter))[0][:40]


def answered(models, name, version=""):
    """(the version that answered, the raw probabilities), or (the status, the text) of a refusal."""
    request = InferRequest((Tensor("x", "FP32", rows("B").shape, rows("B")),))
    try:
        answer = asyncio.run(models.infer(name, version, request, models.front.memory.holding()))
    except EngineError as error:
        return error.status, error.text
    return int(answer.model_version), answer.outputs[1].data.tobytes()


def index(models):
    listed = asyncio.run(models.index())
    return {(entry["name"], int(entry["version"])): (entry["state"], entry["reason"]) for entry in listed}


def test_a_tasks_model_answers_by_its_newest_mask_and_lists_every_version(settings):
    with running(settings) as run:
        models = Models(Front(run.service, ServingSettings()))
        listed = index(models)
        for task in (1, 2, 3):
            stored = [version for version, *_ in versions(settings, task)]
            assert [version for name, version in listed if name == f"task-{task}"] == stored
            wanted = predicted(run.service, rows("B"), task).probabilities.tobytes()
            assert answered(models, f"task-{task}") == (stored[-1], wanted)
            assert [listed[f"task-{task}", version][0] for version in stored[-2:]] == ["UNAVAILABLE", "READY"]
            assert answered(models, f"task-{task}", str(stored[0]))[0] == 503
            assert answered(models, f"task-{task}", str(stored[-1] + 1))[0] == 404


def test_what_operators_do_to_tasks_shows_in_their_models(settings):
    with running(settings) as run:
        models = Models(Front(run.service, ServingSettings()))
        operations.retire(run.worker, 1)
        operations.merge(run.worker, 3, 2)
        reasons = {
            "task-1": "task 1 is retired; load task-1 to take it into use again",
            "task-2": "task 2 was merged into task 3",
        }
        for (name, _), told in index(models).items():
            if name in reasons:
                assert told == ("UNAVAILABLE", reasons[name])
        for name, reason in reasons.items():
            assert answered(models, name) == (503, f"not_loaded: {reason}")
            assert not asyncio.run(models.is_ready(name))
        with pytest.raises(EngineError, match="was merged into task 3"):
            asyncio.run(models.load("task-2", {}, None))
        before = answered(models, "task-3")
        operations.rollback(run.worker, 3, 1)
        now = answered(models, "task-3")
        assert now[0] == before[0] + 1
        assert now[1] != before[1]
        names = [stats["name"] for stats in asyncio.run(models.statistics())["model_stats"]]
        assert names == ["supsup", "task-3"]


def test_a_model_whose_mask_is_damaged_says_so_and_the_others_answer(settings):
    damage(settings.state, 2)
    with running(settings) as run:
        models = Models(Front(run.service, ServingSettings()))
        status, text = answered(models, "task-2")
        assert (status, text.partition(": ")[0]) == (503, "mask_corrupt")
        newest = versions(settings, 2)[-1][0]
        assert index(models)["task-2", newest][0] == "UNAVAILABLE"
        assert not asyncio.run(models.is_ready("task-2"))
        assert answered(models, "task-1")[0] == versions(settings, 1)[-1][0]


@pytest.mark.slow
def test_a_daemons_tasks_are_loaded_rolled_back_and_unloaded(tmp_path):
    with DaemonProcess(tmp_path) as daemon:
        for turn, letter in enumerate("AAABBB"):
            daemon.drop(f"{turn}-{letter}", **draw("AB".index(letter), turn))
        daemon.start().wait()

        def repository(name, way, **parameters):
            url = f"/v2/repository/models/{name}/{way}"
            return post(daemon.socket, "POST", url, json={"parameters": parameters}, timeout=60)

        (version,) = post(daemon.socket, url="/v2/models/task-1").json()["versions"]
        assert repository("task-1", "load", version=1).status_code == 200
        assert post(daemon.socket, url="/v2/models/task-1").json()["versions"] == [str(int(version) + 1)]
        ((made_by, reason),) = ask(
            daemon.state, f"SELECT made_by, reason FROM mask_version WHERE task_id = 1 AND version = {int(version) + 1}"
        )
        assert made_by is not None
        assert reason.startswith("rolled back to version 1")
        assert repository("task-1", "unload").status_code == 200
        refused = post(daemon.socket, "POST", "/v2/models/task-1/infer", json=infer(rows("A")))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert repository("task-1", "load").status_code == 200
        answer = post(daemon.socket, "POST", "/v2/models/task-1/infer", json=infer(rows("A"))).json()
        assert answer["model_version"] == str(int(version) + 1)
        assert daemon.stop() == 0
