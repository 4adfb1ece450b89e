"""Who is let in over gRPC, and where it listens."""

import grp
import os
import socket
import stat
import subprocess
import sys
import threading

import grpc
import pytest
from certificates import Authority
from credentials import REFUSED, Credentials
from daemon_process import until
from grpc_served import TCP, Caller, Served, infer_request, refused
from tiny_engine import TinyEngine

from supsupd.choices import ROLES
from supsupd.paths import MAX_SOCKET_PATH
from supsupd.sections import ServerTlsSettings
from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.grpc.methods import Methods
from supsupd.serving.listeners import SocketInUse, SocketRefused

Code = grpc.StatusCode
METHODS = Methods(None).all()
HEADERS = [*REFUSED, *ROLES]


@pytest.fixture
def engine():
    return TinyEngine(labels=("a", "b", "c"))


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """(target, {credentials: headers}) of a server that is open to tokens over TCP."""
    credentials = Credentials(tmp_path_factory.mktemp("state"))
    with Served(TinyEngine(), TCP, state=credentials.tokens.path.parent) as served:
        headers = {role: [sent] for role, sent in credentials.granted.items()}
        yield served.targets()[0], credentials.refused | headers


@pytest.mark.parametrize("given", HEADERS)
def test_every_method_asks_for_its_role(given, doors):
    target, headers = doors
    known = given in ROLES
    with Caller(target, *headers[given]) as call:
        for name, method in METHODS.items():
            if method.role is None or (known and method.role == "predict") or given == "admin":
                assert outcome(call, name) not in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED), name
            else:
                assert outcome(call, name) == (Code.PERMISSION_DENIED if known else Code.UNAUTHENTICATED), name
        assert call.health() == 1


def outcome(call, name):
    try:
        call.raw(name)
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


@pytest.mark.parametrize("given", HEADERS)
def test_that_there_is_no_such_method_is_told_only_to_who_is_known(given, doors):
    target, headers = doors
    with Caller(target, *headers[given]) as call:
        for method in ("/inference.GRPCInferenceService/Nothing", "/another.Service/Check"):
            with refused(Code.UNIMPLEMENTED if given in ROLES else Code.UNAUTHENTICATED):
                call.channel.unary_unary(method)(b"", timeout=20, metadata=call.metadata)


def test_a_stream_asks_for_its_role(doors):
    target, headers = doors
    for given in HEADERS:
        with Caller(target, *headers[given]) as call:
            if given in ROLES:
                assert [answer.error_message for answer in call.stream([infer_request()])] == [""]
            else:
                with refused(Code.UNAUTHENTICATED, "unauthenticated"):
                    next(call.stream([infer_request()]))


def test_a_stream_of_a_stranger_is_refused_before_it_has_said_anything(doors):
    target, headers = doors
    silent = threading.Event()

    def nothing():
        silent.wait(20)
        yield infer_request()

    for given in REFUSED:
        with Caller(target, *headers[given]) as call, refused(Code.UNAUTHENTICATED, "unauthenticated"):
            next(call.stream(nothing()))
    silent.set()


def test_a_reader_of_log_settings_changes_none(doors):
    target, headers = doors
    changed = MESSAGE["LogSettingsRequest"]()
    changed.settings["log_verbose_level"].uint32_param = 1
    with Caller(target, *headers["predict"]) as call:
        assert call("LogSettings").settings["log_error"].bool_param
        with refused(Code.PERMISSION_DENIED, "forbidden"):
            call("LogSettings", changed)


def test_a_revoked_token_ends_a_stream(engine, tmp_path):
    with Served(engine, TCP, state=tmp_path) as served:
        token, text = served.tokens.create("predict")

        def requests():
            yield infer_request()
            until(lambda: len(engine.answered_in) == 1)
            served.tokens.revoke(token.id)
            yield infer_request()

        with Caller(*served.targets(), f"Bearer {text}") as call:
            answers = call.stream(requests())
            assert not next(answers).error_message
            with refused(Code.UNAUTHENTICATED):
                next(answers)
    assert len(engine.answered_in) == 1


def test_who_loads_a_model_is_written_down(engine, tmp_path):
    with Served(engine, TCP, state=tmp_path) as served:
        token, text = served.tokens.create("admin", label="night")
        with Caller(*served.targets(), f"Bearer {text}") as call:
            call("RepositoryModelUnload", model_name="task-2")
    assert engine.asked_by == f"token {token.id} (night)"


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mutual(tmp_path):
    """(settings, the authority's certificate, the client's certificate and key)."""
    authority, clients = Authority(tmp_path), Authority(tmp_path, "clients")
    server, client = authority.issue("localhost"), clients.issue("client")
    settings = ServerTlsSettings(certificate=server.certificate, key=server.key, client_ca=clients.certificate)
    return settings, authority.certificate.read_bytes(), (client.key.read_bytes(), client.certificate.read_bytes())


def test_mutual_tls_takes_a_certificate_and_a_token(engine, mutual, tmp_path):
    settings, authority, (key, certificate) = mutual
    with Served(engine, TCP, state=tmp_path / "state", tls=settings) as served:
        secret = served.tokens.create("predict")[1]
        (target,) = served.targets()
        known = grpc.ssl_channel_credentials(authority, key, certificate)
        with Caller(target, f"Bearer {secret}", channel=grpc.secure_channel(target, known)) as call:
            assert call("ModelReady", name="supsup").ready
        with Caller(target, channel=grpc.secure_channel(target, known)) as call, refused(Code.UNAUTHENTICATED):
            call("ModelReady", name="supsup")
        stranger = grpc.ssl_channel_credentials(authority)
        for channel in (grpc.secure_channel(target, stranger), grpc.insecure_channel(target)):
            with Caller(target, f"Bearer {secret}", channel=channel) as call, refused(Code.UNAVAILABLE):
                call.raw("ModelReady", wait_for_ready=False)


# -- where it listens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_socket_is_its_owners_alone(umask, engine, tmp_path):
    before = os.umask(umask)
    try:
        with Served(engine, tmp_path / "grpc.sock"):
            assert stat.S_IMODE((tmp_path / "grpc.sock").stat().st_mode) == 0o600
            assert [path.name for path in tmp_path.iterdir()] == ["grpc.sock"]
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []


def test_a_groups_members_come_in_with_its_role(engine, tmp_path):
    group = grp.getgrgid(os.getgid()).gr_name
    with Served(engine, tmp_path / "grpc.sock", socket_group=group, socket_group_role="predict") as served:
        status = (tmp_path / "grpc.sock").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, os.getgid())
        with Caller(*served.targets()) as call:
            assert call("ModelInfer", infer_request()).outputs
            with refused(Code.PERMISSION_DENIED, "forbidden"):
                call("RepositoryModelUnload", model_name="task-1")


def test_the_socket_of_a_dead_server_is_replaced(engine, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "grpc.sock"))
    with Served(engine, tmp_path / "grpc.sock") as served, Caller(*served.targets()) as call:
        assert call("ServerLive").live


def test_the_socket_of_a_live_server_is_left_alone(engine, tmp_path):
    with Served(engine, tmp_path / "grpc.sock") as served:
        with (
            pytest.raises(SocketInUse, match=r"grpc\.sock is the socket of another server"),
            Served(engine, tmp_path / "grpc.sock"),
        ):
            pass
        with Caller(*served.targets()) as call:
            assert call("ServerLive").live


def test_a_file_that_is_no_socket_is_left_alone(engine, tmp_path):
    (tmp_path / "grpc.sock").write_text("mine")
    with pytest.raises(SocketRefused, match="not a socket"), Served(engine, tmp_path / "grpc.sock"):
        pass
    assert (tmp_path / "grpc.sock").read_text() == "mine"


def test_a_folder_too_deep_for_a_socket_is_refused(engine, tmp_path):
    folder = tmp_path / ("d" * (MAX_SOCKET_PATH - len(str(tmp_path)) - len("//g")))
    with pytest.raises(SocketRefused, match="needs a shorter path"), Served(engine, folder / "g"):
        pass
    assert list(folder.iterdir()) == []


def test_a_socket_that_became_anothers_is_left_at_the_end(engine, tmp_path):
    path = tmp_path / "grpc.sock"
    with Served(engine, path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_port_that_is_taken_is_said_in_one_line(engine, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path, said = tmp_path / "grpc.sock", f"127.0.0.1:{port} can't be listened on: Address already in use"
        with pytest.raises(SocketInUse, match=said), Served(engine, path, f"127.0.0.1:{port}"):
            pass
    assert not path.exists()


def test_two_servers_do_not_share_a_port(engine):
    with Served(engine, TCP) as served, pytest.raises(SocketInUse), Served(engine, *served.targets()):
        pass


def test_without_the_extra_it_says_how_to_install_it():
    program = (
        "import sys; sys.modules['grpc'] = None\n"
        "from supsupd.serving.grpc.extra import grpc_service\n"
        "grpc_service(None, None, None, [], None)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert result.stderr.splitlines()[-1].endswith("grpc needs supsupd[grpc]: pip install 'supsupd[grpc]'")
