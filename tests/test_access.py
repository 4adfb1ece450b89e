"""Who is let in over TCP: every route with every state that credentials can be in, and what else a request says."""

import contextlib
import http.client
import json
import re
import socket

import pytest
from credentials import Credentials
from tiny_engine import TinyEngine, port_of, serving

from supsupd.choices import ROLES
from supsupd.sections import ServingSettings
from supsupd.serving.access import Access, GuardedRoute
from supsupd.serving.front import Front
from supsupd.serving.http.app import create_app
from supsupd.serving.listeners import adopt
from supsupd.serving.server import Server
from supsupd.tokens import Tokens

CHALLENGE = {"www-authenticate": "Bearer"}


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    return Credentials(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def port(credentials, tmp_path_factory):
    limits = ServingSettings(hosts=["Box.Example"])
    access = Access(lambda: limits, credentials.tokens, ["listened.example", "0.0.0.0", "::"])
    with serving(TinyEngine(), tmp_path_factory.mktemp("run") / "s", tcp=True, access=access) as server:
        yield port_of(server)


def ask(port, method="GET", path="/v2", authorizations=(), headers=(("Host", "localhost"),), address="127.0.0.1"):
    """The status, the headers and the body of an answer."""
    with contextlib.closing(http.client.HTTPConnection(address, port, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in [*headers, *(("Authorization", value) for value in authorizations)]:
            connection.putheader(name, value)
        if method in ("POST", "PATCH"):
            connection.putheader("Content-Length", "0")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def error_of(body):
    return json.loads(body)["error"]


ROUTES = create_app(Front(TinyEngine(), ServingSettings())).routes


def every_call():
    """(method, a path, role) of every route; what stands for a parameter there is, where it is there at all."""
    for route in ROUTES:
        path = re.sub(r"\{(\w+)(:\w+)?\}", lambda found: {"model": "supsup"}.get(found[1], "1"), route.path)
        for method in sorted(route.methods):
            yield pytest.param(method, path, route.role, id=f"{method} {route.path}")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_says_which_role_it_takes(route):
    assert isinstance(route, GuardedRoute)
    assert route.role in (None, *ROLES)


def test_only_health_is_open_to_all():
    health = {"/v2/health/live", "/v2/health/ready", "/livez", "/readyz", "/healthz"}
    assert {route.path for route in ROUTES if route.role is None} <= health


@pytest.mark.parametrize(("method", "path", "role"), list(every_call()))
def test_a_route_takes_its_role_and_no_less(port, credentials, method, path, role):
    for state, sent in credentials.refused.items():
        status, headers, body = ask(port, method, path, sent)
        if role is None:
            assert status == 200
        else:
            assert (state, status) == (state, 401)
            assert headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or error_of(body).startswith("unauthenticated: ")
    for granted, sent in credentials.granted.items():
        status, headers, body = ask(port, method, path, [sent])
        assert "www-authenticate" not in headers
        if role is None or ROLES.index(granted) >= ROLES.index(role):
            assert status not in (401, 403), body
        else:
            assert (granted, status) == (granted, 403)
            assert error_of(body) == f"forbidden: this takes the role {role}, and yours is {granted}"


def test_a_posted_batch_is_its_tokens_whatever_the_label_and_a_key_is_nobody_elses(tmp_path):
    tokens, engine = Tokens(tmp_path), TinyEngine()
    access = Access(ServingSettings, tokens)
    with serving(engine, tmp_path / "s", tcp=True, access=access) as server:
        batches = set()
        for label in ("a", "b"):
            token, text = tokens.create("submit", label=label)
            headers = {"Host": "localhost", "Authorization": f"Bearer {text}", "Idempotency-Key": "same"}
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)) as connection:
                connection.request("POST", "/v1/batches?name=a.npz", label.encode(), headers)
                answer = connection.getresponse()
                assert answer.status == 202
                batches.add(json.loads(answer.read())["batch"])
            assert engine.sent_by == f"token {token.id}"
            assert len(engine.sent_by) <= 64
        assert len(batches) == 2


READ_ANOTHER_WAY = (
    "/v2/health/live/",
    "/v2/health%2Flive",
    "/v2/health/live%0A",
    "/%6Civez",
    "/livez%2F..%2Fv1%2Fstatus",
)


@pytest.mark.parametrize("path", ["/", "/v3", "/v2/models/", "/v1/status/", "//v1/status", "/.env", *READ_ANOTHER_WAY])
def test_who_is_unknown_does_not_learn_what_paths_there_are(port, credentials, path):
    assert ask(port, path=path)[0] == 401
    assert ask(port, path=path, authorizations=[credentials.granted["predict"]])[0] == 404
    assert ask(port, "DELETE", "/v1/status")[0] == 401


def test_no_role_reaches_a_route_above_it_by_another_reading(port, credentials):
    for path in ("/v1/tasks/1%2Fretire", "/v1/tasks%2F1/retire", "/v1/tasks/1/%72etire", "/v1/tasks/1/retire%2F"):
        status, _, _ = ask(port, "POST", path, [credentials.granted["predict"]])
        assert status in (404, 405)
    assert ask(port, "POST", "/v1/tasks/1/retire", [credentials.granted["predict"]])[0] == 403


def test_one_right_request_lets_no_other_of_its_connection_in(port, credentials):
    right = {"Host": "localhost", "Authorization": credentials.granted["admin"]}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        for headers, wanted in ((right, 200), ({"Host": "localhost"}, 401), (right, 200), ({"Host": "evil"}, 403)):
            connection.request("GET", "/v1/status", headers=headers)
            answer = connection.getresponse()
            assert (answer.status, len(answer.read()) > 0) == (wanted, True)


@pytest.mark.parametrize("name", ["access_token", "token", "authorization"])
def test_a_token_in_the_url_opens_nothing(port, credentials, name):
    token = credentials.granted["admin"].removeprefix("Bearer ")
    assert ask(port, path=f"/v1/status?{name}={token}")[0] == 401


def test_a_token_made_or_revoked_meanwhile_counts_at_once(port, credentials):
    token, text = credentials.tokens.create("predict", label="ci")
    for _ in range(3):
        assert ask(port, path="/v1/status", authorizations=[f"bearer  {text}"])[0] == 200
    credentials.tokens.revoke(token.id)
    assert ask(port, path="/v1/status", authorizations=[f"Bearer {text}"])[0] == 401


def test_a_token_is_good_over_tcp_for_what_the_settings_say(credentials):
    for most in ROLES:
        access = Access(lambda most=most: ServingSettings(tcp_role=most), credentials.tokens)
        for role, sent in credentials.granted.items():
            assert access.caller_of_token(sent).role == min(role, most, key=ROLES.index)


def test_what_a_token_does_is_written_down_under_its_id_and_label(credentials):
    token, text = credentials.tokens.create("admin", label="night shift")
    access = Access(ServingSettings, credentials.tokens)
    assert access.caller_of_token(f"Bearer {text}").name == f"token {token.id} (night shift)"


# -- where a request says it goes, and what it comes from -------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1",
        "127.0.0.1:99",
        "[::1]",
        "[::1]:99",
        "box.example:1",
        "listened.example",
    ],
)
def test_a_host_that_is_served_here_is_let_in(port, credentials, host):
    right = [credentials.granted["predict"]]
    assert ask(port, path="/v1/status", authorizations=right, headers=[("Host", host)])[0] == 200


def test_the_address_that_was_connected_to_is_a_host_on_a_socket_of_both_families_too(credentials):
    right = [credentials.granted["predict"]]
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as handed:
        handed.setblocking(False)
        front = Front(TinyEngine(), ServingSettings())
        access = Access(lambda: front.limits, credentials.tokens)
        server = Server(front, create_app(front, access), [adopt(handed)], access=access)
        server.start()
        try:
            for host, wanted in (("127.0.0.2:80", 200), ("127.0.0.3", 403)):
                given = [("Host", host)]
                assert ask(port_of(server), authorizations=right, headers=given, address="127.0.0.2")[0] == wanted
        finally:
            server.stop(1.0)


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example"],
        ["localhost.evil.example"],
        ["127.0.0.1.evil.example"],
        ["evil.example:80"],
        ["localhost:80:80"],
        ["box.example."],
        ["user@localhost"],
        ["0.0.0.0"],
        ["[::]:80"],
        [""],
        ["localhost", "localhost"],
    ],
    ids=lambda hosts: "+".join(hosts) or "empty",
)
@pytest.mark.parametrize("path", ["/v1/status", "/v2/health/live"])
def test_any_other_host_is_refused(port, credentials, hosts, path):
    right = [credentials.granted["admin"]]
    status, _, body = ask(port, path=path, authorizations=right, headers=[("Host", host) for host in hosts])
    assert status in (400, 403)  # two are not HTTP
    if len(hosts) == 1:
        assert error_of(body).startswith("forbidden: expected a Host")


def test_a_request_without_a_host_is_refused(port, credentials):
    assert ask(port, authorizations=[credentials.granted["admin"]], headers=[])[0] in (400, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost", ""])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_web_page_gets_nothing_not_even_leave_to_ask(port, credentials, origin, method):
    headers = [("Host", "localhost"), ("Origin", origin), ("Access-Control-Request-Method", "POST")]
    for path in ("/v2/models/supsup/infer", "/v2/health/live", "/none"):
        status, answered, body = ask(port, method, path, [credentials.granted["admin"]], headers)
        assert (status, error_of(body)) == (403, "forbidden: requests from web pages are refused")
        assert not any(name.startswith("access-control-") for name in answered)


def test_no_answer_lets_a_web_page_read_it(port, credentials):
    for path in ("/v2/health/live", "/v1/status", "/none"):
        _, headers, _ = ask(port, path=path, authorizations=[credentials.granted["admin"]])
        assert not any(name.startswith("access-control-") for name in headers)
