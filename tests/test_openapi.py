"""The OpenAPI description says what is there: all of it, and nothing else."""

import json
from collections import Counter

import httpx
import jsonschema_rs
import pytest
from daemon_process import DaemonProcess
from digits import draw, drop, held_out
from learned_state import learn_stream
from tiny_engine import TinyEngine

from supsupd.choices import ROLES
from supsupd.sections import ServingSettings
from supsupd.serving.front import Front
from supsupd.serving.http.app import create_app
from supsupd.serving.http.openapi import OPERATIONS

UNREACHED = {
    ("post", "/v1/batches/{batch}/retry"),  # only what had failed by no fault of its own is a batch the second time
    ("post", "/v1/sources/{source}/accept"),  # only a broker loses what nobody has read
}
"""What is not answered with success here."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon that knows three tasks and has rejected one batch."""
    with DaemonProcess(learn_stream(tmp_path_factory.mktemp("learned"))) as daemon:
        (daemon.watch / "bad.npz").write_bytes(b"PK\x03\x04 no zip")
        yield daemon.start().wait()


@pytest.fixture(scope="module")
def http(daemon):
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(daemon.socket)), base_url="http://localhost", timeout=60
    ) as http:
        yield http


@pytest.fixture(scope="module")
def description(http):
    return http.get("/openapi.json").json()


def routes():
    return create_app(Front(TinyEngine(), ServingSettings())).routes


def template(path):
    """As the description writes the path of a route."""
    return path.replace(":path}", "}")


def operations(description):
    return {
        (method, path): operation for path, item in description["paths"].items() for method, operation in item.items()
    }


def test_every_route_is_described_with_its_role_and_nothing_else_is(description):
    served = {
        (method.lower(), template(route.path)): route.role
        for route in routes()
        for method in route.methods
        if method != "HEAD"  # GET without the body
    }
    assert {key: operation["x-role"] for key, operation in operations(description).items()} == served
    for operation in operations(description).values():
        assert (operation["security"] == []) == (operation["x-role"] is None)
        assert operation["x-role"] in (None, *ROLES)


def test_nothing_is_said_of_routes_that_are_not_there(description):
    assert set(OPERATIONS) == {f"{method.upper()} {path}" for method, path in operations(description)}


def test_every_schema_is_one_and_every_reference_leads_somewhere(description):
    def walk(node):
        if isinstance(node, dict):
            if "$ref" in node:
                resolve(description, node["$ref"])
            if "schema" in node:
                jsonschema_rs.meta.validate(node["schema"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(description)
    for schema in description["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)
    used = Counter(json.dumps(description).split('"#/components/')[1:])
    assert {f"schemas/{name}" for name in description["components"]["schemas"]} <= {
        reference.split('"')[0] for reference in used
    }


def test_every_parameter_of_a_path_is_described(description):
    for (_, path), operation in operations(description).items():
        named = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
        assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}


# -- what is really answered ------------------------------------------------------------------------------------------


def resolve(description, reference):
    node = description
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


class Conversation:
    """Requests to the daemon, each answer held against the description."""

    def __init__(self, description, http):
        self.description = description
        self.http = http
        self.answered = set()

    def ask(self, method, path, status=200, content=None, **given):
        """path: as described; `given`: path parameters, `params` and `headers`."""
        request = {key: given.pop(key) for key in ("params", "headers") if key in given}
        url = path.format(**given)
        if isinstance(content, dict):
            request["json"] = content
        elif content is not None:
            request["content"] = content
        response = self.http.request(method, url, **request)
        assert response.status_code == status, (url, response.text)
        self.check(method.lower(), path, response)
        return response

    def check(self, method, path, response):
        described = self.description["paths"][path][method]["responses"][str(response.status_code)]
        described = resolve(self.description, described["$ref"]) if "$ref" in described else described
        media_type = response.headers["content-type"].split(";")[0]
        schema = described["content"][media_type].get("schema")
        if schema is not None:
            whole = {**schema, "components": self.description["components"]}
            jsonschema_rs.validate(whole, response.json())
        if response.is_success:
            self.answered.add((method, path))


@pytest.fixture(scope="module")
def conversation(description, http):
    return Conversation(description, http)


def query(x, **parameters):
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    return {"id": "q", "inputs": [tensor], "parameters": parameters}


def test_every_answer_is_as_described(conversation, tmp_path):
    ask, x = conversation.ask, held_out(0)[0][:3]
    posted = drop(tmp_path / "posted.npz", 0, **draw(0, 99))
    for path in (
        "/openapi.json",
        "/v1/status",
        "/v1/tasks",
        "/v1/batches",
        "/v1/rejected",
        "/v1/sources",
        "/v1/reservoir",
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        "/healthz",
        "/livez",
        "/readyz",
        "/v2/models/stats",
        "/v2/logging",
    ):
        assert ask("GET", path).json() != []
    assert "supsupd_" in ask("GET", "/metrics").text
    assert ask("GET", "/v1/tasks/{task}", task=1).json()["decisions"]
    assert ask("GET", "/v1/tasks/{task}/history", task=1).json()
    assert ask("GET", "/v1/batches/{batch}", batch=1).json()["state"] == "committed"
    assert ask("GET", "/v1/batches/{batch}/why", batch=1).json()["versions"]
    rejected = ask("GET", "/v1/rejected").json()[0]["batch"]
    ask("POST", "/v1/batches/{batch}/retry", 409, batch=rejected)
    ask("POST", "/v1/batches/{batch}/drop", batch=rejected)
    ask("POST", "/v1/batches", 202, posted.read_bytes(), params={"name": "posted.npz"})
    ask("POST", "/v1/scan")
    ask("POST", "/v1/sources/{source}/accept", 404, source="nowhere")
    for model, version in (("supsup", "1"), ("task-2", _served(conversation, "task-2"))):
        for base, given in (
            ("/v2/models/{model}", {}),
            ("/v2/models/{model}/versions/{version}", {"version": version}),
        ):
            assert ask("POST", base + "/infer", 200, query(x), model=model, **given).json()["id"] == "q"
            assert ask("POST", base + "/infer", 200, query(x, binary_data_output=True), model=model, **given).content
            shared = {"inputs": [{"name": "x", "parameters": {"shared_memory_region": "r"}}]}
            ask("POST", base + "/infer", 501, shared, model=model, **given)
            for path in ("", "/ready", "/config", "/stats"):
                ask("GET", base + path, model=model, **given)
    ask("POST", "/v2/repository/index")
    ask("POST", "/v2/repository/index", 200, {"ready": True})
    ask("POST", "/v2/repository/models/{model}/unload", 200, {}, model="task-3")
    ask("POST", "/v2/repository/models/{model}/load", 200, {}, model="task-3")
    ask("POST", "/v2/logging", 200, {"log_info": True})
    for path in ("/v2/systemsharedmemory/{rest}", "/v2/cudasharedmemory/{rest}", "/v2/trace/setting"):
        ask("GET", path, 501, rest="status")
        ask("POST", path, 501, rest="status")


def test_every_change_to_a_task_is_answered_as_described(conversation):
    task, ask = "/v1/tasks/{task}", conversation.ask
    assert ask("PATCH", task, 200, {"name": "a"}, task=1).json()["name"] == "a"
    ask("PATCH", task, 409, {"name": "a"}, task=2)
    ask("POST", task + "/retire", task=3)
    ask("POST", task + "/retire", 409, task=3)
    ask("POST", task + "/reopen", task=3)
    ask("POST", task + "/rollback", 200, {"to": 1}, task=3)
    split = ask("POST", task + "/split", 200, {"from": 9}, task=1).json()["task"]
    ask("POST", task + "/merge", 200, {"other": split}, task=1)
    assert ask("GET", "/v1/tasks", params={"all": "true"}).json()[-1]["merged_into"] == 1
    ask("GET", task, 404, task=99)


def test_all_that_is_described_was_answered(conversation, description):
    """Runs after the two before it, which ask for everything."""
    promised = {
        key
        for key, operation in operations(description).items()
        if any(status.startswith("2") for status in operation["responses"])
    }
    assert promised - conversation.answered == UNREACHED


def _served(conversation, model):
    return conversation.http.get(f"/v2/models/{model}").json()["versions"][0]
