"""What a connection does with bytes, on a Unix socket and on TCP alike: each refusal is one, and hurts nobody else."""

import socket
import ssl

import pytest
from certificates import Authority
from raw_http import LIVE, good_client, open_door, read_all, read_answer
from tiny_engine import INPUTS, TinyEngine, port_of, serving

from supsupd.config import ConfigError
from supsupd.sections import ServerTlsSettings
from supsupd.serving.http.framing import MAX_CHUNKS, MAX_FRAMING_BYTES, MAX_HEAD_BYTES, MAX_HEADERS
from supsupd.serving.listeners import SocketInUse, SocketRefused, bind_tcp, bind_unix, tls_context

ROW = b'{"inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","data":[%s]}]}' % (INPUTS, b",".join([b"1"] * INPUTS))
CHUNKED = "Transfer-Encoding: chunked"
INFER = "/v2/models/supsup/infer"


@pytest.fixture(scope="module", params=["unix", "tcp"])
def door(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    with open_door(request.param, folder, max_body_bytes=100_000, header_seconds=15.0) as door, good_client(door):
        yield door


def chunked(*chunks, last=b"0\r\n\r\n"):
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + last


# -- what is no HTTP/1.1 ----------------------------------------------------------------------------------------------

NOT_HTTP = {
    "noise": b"hello\r\n\r\n",
    "zeros": bytes(100),
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + b"\x01" * 60,
    "HTTP/0.9": b"GET /v2/health/live\r\n",
    "HTTP/0.9 with its blank line": b"GET /v2/health/live\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 in words": b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "no method of HTTP": b"FETCH / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "lines that end with LF": b"GET / HTTP/1.1\nHost: localhost\n\n",
    "a NUL in a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\x00c\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "no path": b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bytes in the path": b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("script", NOT_HTTP.values(), ids=NOT_HTTP.keys())
def test_what_is_no_http_is_refused_at_once(door, script):
    (answer,) = door.say(script)
    assert (answer.status, answer.headers["connection"]) == (400, "close")  # one that was waited for is a 408
    assert answer.error.startswith("bad_request: ")


# -- two readings of one request --------------------------------------------------------------------------------------

AMBIGUOUS = {
    "a length and chunks": ["Content-Length: 3", CHUNKED],
    "chunks and a length": [CHUNKED, "Content-Length: 3"],
    "two lengths": ["Content-Length: 3", "Content-Length: 4"],
    "one length twice": ["Content-Length: 3", "Content-Length: 3"],
    "a list of lengths": ["Content-Length: 3, 3"],
    "a negative length": ["Content-Length: -3"],
    "a signed length": ["Content-Length: +3"],
    "a length in hexadecimal": ["Content-Length: 0x3"],
    "a length beyond 64 bits": ["Content-Length: 99999999999999999999"],
    "no length": ["Content-Length: "],
    "another coding": ["Transfer-Encoding: gzip, chunked"],
    "chunks twice": ["Transfer-Encoding: chunked, chunked"],
    "chunks in two headers": [CHUNKED, CHUNKED],
    "nearly chunks": ["Transfer-Encoding: xchunked"],
    "no host": [],
    "two hosts": ["Host: localhost"],
    "a body behind an upgrade": ["Connection: upgrade", "Upgrade: h2c", "Content-Length: 3"],
}


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(door, headers):
    head = door.head("POST", INFER, *headers, host="Host: localhost" if headers else None)
    answers = door.say(head + b"abc" + door.head() * 3)
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(400, "close")]


CHUNKS = {
    "a negative size": b"-1\r\nabc\r\n0\r\n\r\n",
    "a prefix": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a space": b"3 \r\nabc\r\n0\r\n\r\n",
    "more than the size": b"3\r\nabcd\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "a line that ends with LF": b"3\nabc\r\n0\r\n\r\n",
    "a size beyond 64 bits": b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("body", CHUNKS.values(), ids=CHUNKS.keys())
def test_a_bad_chunk_is_refused_and_nothing_behind_it_is_read(door, body):
    answers = door.say(door.head("POST", INFER, CHUNKED) + body + door.head() * 3)
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(400, "close")]


def test_chunks_are_not_for_http_1_0(door):
    (answer,) = door.say(door.head("POST", INFER, CHUNKED, version="HTTP/1.0") + chunked(ROW))
    assert answer.status == 400


# -- too much ---------------------------------------------------------------------------------------------------------


def endless(line, times=100):
    return [line * (1 + (1 << 20) // (len(line) * times)) for _ in range(times)]


TOO_MUCH = {
    "a header of a megabyte": [b"A: ", *endless(b"a")],
    "a path of a megabyte": None,
    "many headers": endless(b"A: b\r\n"),
    "blank lines": None,
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_head_that_is_too_large_is_refused(door, kind):
    begin = {"a path of a megabyte": [b"GET /", *endless(b"a")], "blank lines": endless(b"\r\n")}
    script = begin.get(kind) or [door.head()[:-2], *TOO_MUCH[kind]]
    (answer,) = door.say(script)
    assert (answer.status, answer.error.split(":")[0]) == (431, "head_too_large")


def test_as_many_headers_as_may_be_are_answered_and_one_more_is_not(door):
    free = MAX_HEADERS - door.head().count(b"\r\n") + 2
    for count, status in ((free, 200), (free + 1, 431)):
        (answer,) = door.say(door.head("GET", LIVE, *[f"A{i}: b" for i in range(count)]), then_end=True)
        assert answer.status == status
    padding = "A: " + "b" * (MAX_HEAD_BYTES - len(door.head("GET", LIVE, "A: ")))
    for header, status in ((padding, 200), (padding + "b", 431)):
        (answer,) = door.say(door.head("GET", LIVE, header), then_end=True)
        assert answer.status == status


TRAILERS = {
    "one long trailer": b"0\r\nA: " + b"a" * MAX_FRAMING_BYTES * 2,
    "many trailers": b"0\r\n" + b"A: b\r\n" * MAX_FRAMING_BYTES,
    "a long extension": b"3;a=" + b"a" * MAX_FRAMING_BYTES * 2,
    "zeros before a size": b"0" * MAX_FRAMING_BYTES * 2 + b"3\r\n",
}


@pytest.mark.parametrize("body", TRAILERS.values(), ids=TRAILERS.keys())
def test_what_lies_around_chunks_is_bounded(door, body):
    (answer,) = door.say([door.head("POST", INFER, CHUNKED), *[body[i : i + 5000] for i in range(0, len(body), 5000)]])
    assert answer.status in (400, 431)


def test_a_body_may_have_so_many_chunks_and_no_more(door):
    one_byte = b"1\r\n \r\n"
    for count, status in ((MAX_CHUNKS - 2, 200), (MAX_CHUNKS + 1, 413)):
        body = one_byte * count + chunked(ROW)
        (answer,) = door.say([door.head("POST", INFER, CHUNKED, "Connection: close"), body])
        assert answer.status == status


@pytest.mark.parametrize("length", [100_001, 10**12, 2**63 - 1])
def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(door, length):
    (answer,) = door.say(door.head("POST", INFER, f"Content-Length: {length}", "Expect: 100-continue"))
    assert answer.status == 413


@pytest.mark.parametrize("headers", [["Content-Length: 5000000"], [CHUNKED]])
def test_a_client_that_sends_too_large_a_body_all_the_same_reads_why(door, headers):
    body = [b"x" * 50_000] * 100 if headers != [CHUNKED] else [b"c350\r\n" + b"x" * 50_000 + b"\r\n"] * 100
    (answer,) = door.say([door.head("POST", INFER, *headers), *body])
    assert answer.status == 413


def test_a_body_is_asked_for_once_its_length_is_accepted(door):
    with door.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(door.head("POST", INFER, f"Content-Length: {len(ROW)}", "Expect: 100-continue"))
        assert [stream.readline(), stream.readline()] == [b"HTTP/1.1 100 Continue\r\n", b"\r\n"]
        connection.sendall(ROW)
        assert read_answer(stream).status == 200


def test_another_expectation_is_refused(door):
    (answer,) = door.say(door.head("POST", INFER, "Content-Length: 3", "Expect: the-worst"))
    assert answer.status == 417


# -- one connection, many requests ------------------------------------------------------------------------------------


def test_requests_are_answered_one_after_the_other_however_they_are_cut(door):
    requests = [door.head(), door.post(ROW), door.head("POST", INFER, CHUNKED) + chunked(ROW[:9], ROW[9:]), door.head()]
    script = b"".join(requests)
    for size in (1, 7, 100, len(script)):
        with door.connect() as connection, connection.makefile("rb") as stream:
            for at in range(0, len(script), size):
                connection.sendall(script[at : at + size])
            answers = [read_answer(stream) for _ in requests]
        assert [answer.status for answer in answers] == [200] * 4
        assert [b"outputs" in answer.body for answer in answers] == [False, True, True, False]


def test_blank_lines_within_a_chunk_are_data(door):
    body = chunked(b"\r\n\r\n", ROW, b"\r\n\r\n\r\n\r", b"\n\r\n")
    answers = door.say(door.head("POST", INFER, CHUNKED) + body + door.head("GET", LIVE, "Connection: close"))
    assert [answer.status for answer in answers] == [200, 200]


def test_trailers_are_nobodys_headers(door):
    last = b"0\r\nConnection: close\r\nOrigin: http://evil.example\r\n\r\n"
    body = chunked(ROW, last=last)
    (answer,) = door.say(door.head("POST", INFER, CHUNKED) + body + door.head())
    assert (answer.status, b"outputs" in answer.body) == (200, True)


def test_a_client_that_has_ended_its_side_still_gets_its_answer(door):
    (answer,) = door.say(door.post(ROW), then_end=True)
    assert answer.status == 200
    (answer,) = door.say(door.post(ROW)[:-1], then_end=True) or [None]
    assert answer is None or answer.status == 400


def test_http_1_0_is_answered_once(door):
    answers = door.say(door.head(version="HTTP/1.0", host=None) * 2)
    wanted = 200 if door.kind == "unix" else 403  # over TCP the host must be named
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(wanted, "close")]


def test_an_upgrade_is_not_taken_up(door):
    answers = door.say(door.head("GET", LIVE, "Connection: Upgrade", "Upgrade: websocket") + door.head())
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(200, "close")]


def test_an_early_answer_ends_the_connection_whose_body_is_still_to_come(door):
    with door.connect() as connection:
        connection.sendall(door.head("POST", "/nothing/here", "Content-Length: 50"))
        (answer,) = read_all(connection)
    assert (answer.status, answer.headers["connection"]) == (404, "close")


# -- what is listened on ----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_said_to_be(door):
    with pytest.raises(SocketInUse, match=r"^127\.0\.0\.1:\d+ can't be listened on: Address already in use$"):
        bind_tcp("127.0.0.1", door.port)


def test_an_address_that_is_not_ours_is_refused_in_one_line():
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(SocketRefused, match=f"{host}:0 can't be listened on: "):
            bind_tcp(host, 0)


def test_a_group_that_is_not_there_can_have_no_socket(tmp_path):
    with pytest.raises(SocketRefused, match=r"serving\.socket_group: given 'nobodys-group'"):
        bind_unix(tmp_path / "s", group="nobodys-group")


class TestTls:
    @pytest.fixture(autouse=True)
    def files(self, tmp_path):
        self.authority = Authority(tmp_path)
        self.own = self.authority.issue()
        self.engine, self.path = TinyEngine(), tmp_path / "run" / "s"

    def served(self, header_seconds=20.0, **more):
        settings = ServerTlsSettings(certificate=self.own.certificate, key=self.own.key, **more)
        return serving(self.engine, self.path, tcp=True, tls=tls_context(settings), header_seconds=header_seconds)

    def ask(self, server, certificate=None, **versions):
        context = ssl.create_default_context(cafile=self.authority.certificate)
        for name, value in versions.items():
            setattr(context, name, value)
        if certificate:
            context.load_cert_chain(certificate.certificate, certificate.key)
        with (
            socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(f"GET {LIVE} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return read_all(connection)

    def test_a_client_of_the_authority_is_answered(self):
        with self.served() as server:
            assert [answer.status for answer in self.ask(server)] == [200]

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
    def test_old_versions_are_refused(self):
        with self.served() as server, pytest.raises((ssl.SSLError, ConnectionError)):
            self.ask(server, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)

    def test_with_mutual_tls_only_a_client_with_a_certificate_is(self, tmp_path):
        (tmp_path / "other").mkdir()
        strange = Authority(tmp_path / "other").issue("stranger")
        with self.served(client_ca=self.authority.certificate) as server:
            assert [answer.status for answer in self.ask(server, self.authority.issue("client"))] == [200]
            for certificate in (None, strange):
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    assert self.ask(server, certificate) == []
                    raise ConnectionResetError  # TLS 1.3 may end the connection without a word

    def test_plain_http_and_a_handshake_that_never_comes_are_cut_off(self):
        with self.served(header_seconds=2.0) as server:
            for script in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b""):
                with socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as plain:
                    plain.sendall(script)
                    assert not plain.recv(4096).startswith(b"HTTP/1.1 200")
            assert [answer.status for answer in self.ask(server)] == [200]

    def test_files_that_are_no_pair_are_named(self):
        other = self.authority.issue("other")
        with pytest.raises(ConfigError, match=r"tls\.certificate, tls\.key: given"):
            tls_context(ServerTlsSettings(certificate=self.own.certificate, key=other.key))
        with pytest.raises(ConfigError, match=r"tls\.client_ca: given"):
            tls_context(ServerTlsSettings(certificate=self.own.certificate, key=self.own.key, client_ca=self.own.key))

    def test_a_key_with_a_password_is_refused_without_asking_for_it(self):
        secret = self.authority.issue("secret", passphrase=b"secret")
        with pytest.raises(ConfigError, match=r"tls\.certificate, tls\.key: given"):
            tls_context(ServerTlsSettings(certificate=secret.certificate, key=secret.key))
