"""/metrics: figures that add up with what was done, and stay few; health under its usual names."""

import random
import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny_engine
from daemon_process import until
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from supsupd.sections import ServingSettings
from supsupd.serving.engine import Prediction, Question
from supsupd.serving.front import Front
from supsupd.serving.metrics import margins

ROWS = 3
OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


@pytest.fixture
def asked(tmp_path):
    """(engine, a client of a server over it)."""
    engine = tiny_engine.TinyEngine()
    path = tmp_path / "s"
    with (
        tiny_engine.serving(engine, path, queue_requests=8),
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://supsupd") as http,
    ):
        yield engine, http


def infer(http, model="supsup", rows=ROWS, width=tiny_engine.INPUTS):
    tensor = {"name": "x", "shape": [rows, width], "datatype": "FP32", "data": [0.5] * rows * width}
    return http.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})


def figures(http, **headers):
    """{(name, its labels as sorted pairs): value}."""
    response = http.get("/metrics", headers=headers)
    assert response.status_code == 200, response.text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse(response.text)
        for sample in family.samples
    }


def test_the_figures_add_up_with_what_was_done(asked):
    engine, http = asked
    for _ in range(4):
        assert infer(http).status_code == 200
    assert infer(http, "task-1").status_code == 200
    assert infer(http, width=7).status_code == 400
    assert http.post("/v1/batches?name=a.npz", content=b"rows").status_code == 202
    assert http.get("/nowhere").status_code == 404
    now = figures(http)
    assert now["supsupd_queries_total", ("model", "auto"), ("outcome", "answered")] == 4
    assert now["supsupd_queries_total", ("model", "given"), ("outcome", "answered")] == 1
    assert now["supsupd_query_seconds_count", ("model", "given")] == 1
    answered = 5 * ROWS
    assert now[("supsupd_query_entropy_nats_count",)] == now[("supsupd_query_margin_count",)] == answered
    assert now["supsupd_query_margin_bucket", ("le", "+Inf")] == answered
    assert now[("supsupd_pass_rows_total",)] >= answered
    assert sum(value for name, value in now.items() if name[0] == "supsupd_passes_total") >= 5
    assert now[("supsupd_queue_requests",)] == now[("supsupd_queue_age_seconds",)] == 0
    assert now[("supsupd_tasks",)] == len(engine.weights)
    assert now["supsupd_batches", ("state", "staged")] == 1
    assert now["supsupd_http_requests_total", ("route", "/v2/models/{model}/infer"), ("status", "200")] == 5
    assert now["supsupd_http_requests_total", ("route", "/v2/models/{model}/infer"), ("status", "400")] == 1
    assert now["supsupd_http_requests_total", ("route", "none"), ("status", "404")] == 1
    assert now[("supsupd_connections",)] == now[("supsupd_connections_accepted_total",)] == 1
    assert now[("process_open_fds",)] > 0


def test_entropy_and_margin_are_those_of_the_answers(asked):
    _, http = asked
    outputs = {output["name"]: output["data"] for output in infer(http).json()["outputs"]}
    probabilities = np.array(outputs["probabilities"], np.float32).reshape(ROWS, -1)
    now = figures(http)
    assert now[("supsupd_query_entropy_nats_sum",)] == pytest.approx(sum(outputs["entropy"]), rel=1e-5)
    assert now[("supsupd_query_margin_sum",)] == pytest.approx(margins(probabilities).sum(), rel=1e-5)
    highest = np.sort(probabilities)[:, -2:]
    np.testing.assert_allclose(margins(probabilities), highest[:, 1] - highest[:, 0])
    assert margins(np.ones((2, 1), np.float32)).tolist() == [1, 1]


def test_labels_stay_few_whatever_is_asked(asked):
    _, http = asked
    infer(http)
    odd = random.Random(0)
    names = ["".join(odd.choices(string.ascii_letters + "./%-", k=12)) for _ in range(1000)]
    for name in names:
        place = odd.choice(["/", "/v2/models/", "/v1/batches/", "/v1/tasks/"])
        http.request(odd.choice(["GET", "POST", "DELETE", "OPTIONS"]), place + name)
    now = figures(http)
    assert sum(value for key, value in now.items() if key[0] == "supsupd_http_requests_total") >= len(names)
    assert len({key for key in now if key[0].startswith("supsupd_http")}) < 500
    assert not any(name in str(key) for key in now for name in names)


def test_openmetrics_is_spoken_with_those_who_prefer_it(asked):
    _, http = asked
    infer(http)
    response = http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(response.text)} >= {"supsupd_queries", "supsupd_query_margin"}


def test_health_is_a_small_constant_answer_under_every_name_and_garbage_is_passed_over(asked):
    engine, http = asked
    for path in ("/healthz", "/livez", "/v2/health/live"):
        answers = {http.get(path + garbage).text for garbage in ("", "?x=%00", "?" + "a" * 2000, "?;;&&==")}
        assert answers == {'{"live":true}'}
    assert http.get("/readyz?verbose").json() == {"ready": True}
    assert http.get("/metrics?x=1").status_code == 200
    engine.weights = engine.weights[:0]
    assert http.get("/readyz").status_code == 503
    assert http.get("/livez").status_code == 200


def test_every_figure_is_explained(asked):
    _, http = asked
    explained = OPERATIONS.read_text()
    named = {family.name for family in parse(http.get("/metrics").text) if family.name.startswith("supsupd_")}
    assert {name for name in named if f"`{name}`" not in explained and f"`{name}_total`" not in explained} == set()


def test_what_waits_is_told_while_it_waits(asked):
    engine, http = asked
    engine.gate.clear()
    with ThreadPoolExecutor() as threads:
        try:
            answers = []
            for gauge, value in (("passes_running", 1), ("passes_running", 2), ("queue_requests", 1)):
                answers.append(threads.submit(infer, http))
                until(lambda gauge=gauge, value=value: figures(http)[f"supsupd_{gauge}",] == value)
            assert figures(http)[("supsupd_queue_age_seconds",)] > 0
        finally:
            engine.gate.set()
        assert {answer.result().status_code for answer in answers} == {200}


def test_counting_a_query_takes_microseconds():
    metrics = Front(tiny_engine.TinyEngine(), ServingSettings()).metrics
    for rows, most in ((1, 150e-6), (32, 400e-6)):  # ten times what is measured
        p = np.random.default_rng(0).dirichlet(np.ones(10), rows).astype(np.float32)
        answer = Prediction([0] * rows, p, np.ones(rows), p[:, 0], p[:, 0] > 0, [0])
        question = Question(np.zeros((rows, 4)))
        began = time.thread_time()
        for _ in range(1000):
            metrics.count_query(question, answer, 0.001)
        assert (time.thread_time() - began) / 1000 < most
