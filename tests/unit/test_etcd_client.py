"""The client of etcd's JSON gateway against a server that says what it is told to: garbage, slowly, half, or no."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import pytest
from patience import Patience

from nodeplane.config_overlay import EtcdOptions
from nodeplane.etcd_client import CompactedError, EtcdClient, EtcdError
from nodeplane.etcd_wire import Event, HttpAnswer, KeyValue, RangeAnswer, WireError, decode

Handler = Callable[[socket.socket], None]


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Server:
    """Hands each connection to the next handler of its script; ``requests`` are (path, fields, body) in order."""

    def __init__(self, *script: Handler) -> None:
        self.script = list(script)
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, suppress(OSError):
                    connection.settimeout(5)
                    self._read(connection)
                    (self.script.pop(0) if self.script else close)(connection)

    def _read(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        while len(body) < int(fields["Content-Length"]):
            body += connection.recv(65536)
        self.requests.append((first.split()[1], fields, json.loads(body)))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


def close(connection: socket.socket) -> None:
    """Say nothing."""


def raw(data: bytes) -> Handler:
    """Say just this."""
    return lambda connection: connection.sendall(data)


def text(body: str, status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def answer(body: object, status: int = 200) -> Handler:
    return raw(text(json.dumps(body), status))


def chunks(*lines: object) -> bytes:
    """Return the beginning of a stream; it has no end."""
    found = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for line in lines:
        data = json.dumps(line).encode() + b"\n"
        found += f"{len(data):x}\r\n".encode() + data + b"\r\n"
    return found


def drip(data: bytes, pause: float) -> Handler:
    """Say it byte by byte."""

    def handle(connection: socket.socket) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return handle


def keep_open(data: bytes) -> Handler:
    """Say it, then wait until the client has closed."""

    def handle(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.recv(1)

    return handle


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Make servers; they are closed afterwards."""
    made: list[Server] = []

    def make(*script: Handler) -> Server:
        made.append(Server(*script))
        return made[-1]

    yield make
    for one in made:
        one.close()


def client(*servers: Server, call_seconds: float = 3.0, **options: str) -> EtcdClient:
    urls = tuple(server.url for server in servers)
    return EtcdClient(msgspec.structs.replace(EtcdOptions(endpoints=urls), **options), call_seconds=call_seconds)


KEY = {"key": b64("/net/subnets/a"), "value": b64("v"), "mod_revision": "7", "lease": "8632", "version": "1"}
LISTING = {"header": {"revision": "9", "raft_term": "2"}, "kvs": [KEY], "count": "1"}
EXPECTED = RangeAnswer(RangeAnswer().header, (KeyValue(b"/net/subnets/a", b"v", 7, 8632),))


# -- calls ---------------------------------------------------------------------------------------------------------------


def test_list(serve) -> None:
    """A listing asks for the range of a prefix, and is read with numbers that are text; what is zero may be missing."""
    server = serve(answer(LISTING), answer({"header": {}}))
    etcd = client(server)
    found = etcd.list("/net/")
    assert (found.header.revision, found.kvs) == (9, EXPECTED.kvs)
    assert etcd.list("/net/") == RangeAnswer()
    path, fields, body = server.requests[0]
    assert (path, body) == ("/v3/kv/range", {"key": b64("/net/"), "range_end": b64("/net0")})
    assert "Authorization" not in fields


def test_conditional_write(serve) -> None:
    """A write says what every key must still be, a new one by its version, and deletes in the same step."""
    server = serve(answer({"header": {"revision": "12"}, "succeeded": True}), answer({"header": {"revision": "12"}}))
    etcd = client(server)
    done = etcd.write("/n/a", "v", lease=5, expect={"/n/a": 0, "/n/b": 3}, delete=["/n/b"])
    assert (done.succeeded, done.header.revision) == (True, 12)
    assert not etcd.write("/n/a", "v", lease=0, expect={"/n/a": 4}).succeeded
    assert server.requests[0][2] == {
        "compare": [
            {"key": b64("/n/a"), "target": "VERSION", "result": "EQUAL", "version": "0"},
            {"key": b64("/n/b"), "target": "MOD", "result": "EQUAL", "mod_revision": "3"},
        ],
        "success": [
            {"request_delete_range": {"key": b64("/n/b")}},
            {"request_put": {"key": b64("/n/a"), "value": b64("v"), "lease": "5"}},
        ],
    }


def test_leases(serve) -> None:
    """Leases are numbers of 64 bits; one that has ended has -1 seconds left, and cannot be renewed."""
    big = 7587862072907233285
    server = serve(
        answer({"ID": str(big), "TTL": "86400"}),
        answer({"ID": str(big), "TTL": "86399", "grantedTTL": "86400"}),
        answer({"ID": str(big), "TTL": "-1"}),
        keep_open(chunks({"result": {"ID": str(big), "TTL": "86400"}})),
        keep_open(chunks({"result": {"ID": str(big)}})),
    )
    etcd = client(server)
    assert etcd.grant(86400) == big
    assert (etcd.time_to_live(big), etcd.time_to_live(big)) == (86399, -1)
    assert (etcd.keep_alive(big), etcd.keep_alive(big)) == (86400, 0)
    assert server.requests[3][2] == {"ID": str(big)}


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (close, "the answer ends in the middle"),
        (raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "not HTTP: 'SSH-2.0-OpenSSH_9.2'"),
        (raw(text("{}")[:-1]), "the answer ends in the middle"),
        (raw(text('{"kvs": 7}')), "Expected `array`, got `int` - at `$.kvs`"),
        (raw(text("<html>")), "JSON is malformed"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), "Content-Length: 'x'"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "not a chunk's length: b'zz'"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}xx"), "a chunk longer than its length"),
        (raw(b"x" * 70000), "a header of more than 65536 bytes"),
        (answer({"error": "etcdserver: no leader", "code": 14}, 503), "etcdserver: no leader"),
        (raw(text("404 page not found", 404)), "HTTP 404: 404 page not found"),
    ],
)
def test_the_next_endpoint_answers(serve, handler: Handler, words: str) -> None:
    """An endpoint that says nothing useful is passed over for the next, which is asked first from then on; alone it is an error."""
    bad, good = serve(handler, handler), serve(answer(LISTING), answer(LISTING))
    etcd = client(bad, good)
    assert etcd.list("/net/").kvs == EXPECTED.kvs
    assert etcd.endpoint == good.url
    assert etcd.list("/net/").kvs == EXPECTED.kvs
    assert (len(bad.requests), len(good.requests)) == (1, 2)
    with pytest.raises(EtcdError) as caught:
        client(bad).list("/net/")
    assert str(caught.value).startswith(f"{bad.url}: kv/range: ")
    assert words in str(caught.value)


def test_nobody_listens(serve) -> None:
    """If no endpoint can be reached, the error says of each what the kernel says."""
    gone = serve()
    gone.close()
    gone.close = lambda: None
    with pytest.raises(EtcdError) as caught:
        client(gone, gone).list("/net/")
    assert str(caught.value) == "; ".join([f"{gone.url}: kv/range: Connection refused"] * 2)


@pytest.mark.parametrize("data", [text(json.dumps(LISTING)), b"", chunks({"result": {}})[:-3]])
def test_slowness_has_an_end(serve, data: bytes) -> None:
    """An answer that comes byte by byte, or not at all, costs as long as one call may take and no longer."""
    server = serve(drip(data, 0.02) if data else keep_open(b""))
    started = time.monotonic()
    with pytest.raises(EtcdError, match="timed out"):
        client(server, call_seconds=0.3).list("/net/")
    assert time.monotonic() - started < 1


def test_refusal_is_final(serve) -> None:
    """What etcd refuses for a reason of its own is not asked of the next endpoint, and told in etcd's words."""
    first, second = serve(answer({"error": "etcdserver: permission denied", "code": 7}, 403)), serve(answer(LISTING))
    with pytest.raises(EtcdError, match="kv/range: etcdserver: permission denied"):
        client(first, second).list("/net/")
    assert second.requests == []


# -- who we are ----------------------------------------------------------------------------------------------------------

OLD = {"error": "etcdserver: invalid auth token", "message": "etcdserver: invalid auth token", "code": 16}


def test_token_is_renewed(serve, tmp_path: Path) -> None:
    """The token is had once with name and password, sent with each call, and had anew when etcd has forgotten it."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    server = serve(
        answer({"token": "one.1"}),
        answer(LISTING),
        answer(OLD, 401),
        answer({"token": "two.2"}),
        answer(LISTING),
        answer(LISTING),
    )
    etcd = client(server, username="nodes", password_file=str(password))
    for _ in range(3):
        assert etcd.list("/net/").kvs == EXPECTED.kvs
    sent = [(path, fields.get("Authorization")) for path, fields, _ in server.requests]
    ask, range_ = "/v3/auth/authenticate", "/v3/kv/range"
    assert sent == [(ask, None), (range_, "one.1"), (range_, "one.1"), (ask, None), (range_, "two.2"), (range_, "two.2")]
    assert server.requests[0][2] == {"name": "nodes", "password": "secret"}


def test_token_that_is_never_taken(serve, tmp_path: Path) -> None:
    """A token that is refused as soon as it was given is an error, and does not go on for ever; so is a wrong password."""
    password = tmp_path / "password"
    password.write_text("secret")
    server = serve(answer({"token": "a"}), answer(OLD, 401), answer({"token": "b"}), answer(OLD, 401))
    with pytest.raises(EtcdError, match="invalid auth token"):
        client(server, username="nodes", password_file=str(password)).list("/net/")
    assert len(server.requests) == 4
    wrong = serve(answer({"error": "etcdserver: authentication failed, invalid user ID or password", "code": 3}, 400))
    with pytest.raises(EtcdError, match="auth/authenticate: etcdserver: authentication failed"):
        client(wrong, username="nodes", password_file=str(password)).list("/net/")
    assert len(wrong.requests) == 1


def test_missing_files_are_named(serve, tmp_path: Path) -> None:
    """A certificate or password that is not there is an error that names the file, and becomes none when it is."""
    server = serve(answer({"token": "a"}), answer(LISTING))
    password = tmp_path / "password"
    etcd = client(server, username="nodes", password_file=str(password))
    with pytest.raises(EtcdError, match="password: No such file or directory"):
        etcd.list("/net/")
    password.write_text("secret")
    assert etcd.list("/net/").kvs == EXPECTED.kvs
    tls = EtcdClient(EtcdOptions(endpoints=("https://127.0.0.1:1",), ca_file="/nonexistent/ca.crt"))
    with pytest.raises(EtcdError, match=r"/nonexistent/ca\.crt: No such file or directory"):
        tls.list("/net/")


# -- watching ------------------------------------------------------------------------------------------------------------

CREATED = {"result": {"header": {"revision": "9"}, "created": True}}
PUT = {"result": {"header": {"revision": "10"}, "events": [{"kv": KEY}]}}
DELETE = {
    "result": {"header": {"revision": "11"}, "events": [{"type": "DELETE", "kv": {"key": KEY["key"], "mod_revision": "11"}}]}
}
EVENTS = [Event(EXPECTED.kvs[0]), Event(KeyValue(b"/net/subnets/a", mod_revision=11), "DELETE")]


def read_events(stream, count: int, seconds: float = 3.0) -> list[Event]:
    """Read until there are so many events."""
    found: list[Event] = []
    limit = Patience(seconds)
    while len(found) < count and not limit.over:
        found += stream.read()
    return found


@pytest.mark.parametrize("pause", [0.0, 0.0005])
def test_watch(serve, pause: float) -> None:
    """A watch tells changes as they come, cut however the network likes, from the revision that was asked for."""
    data = chunks(CREATED, PUT, DELETE)
    server = serve(lambda connection: (drip(data, pause) if pause else raw(data))(connection) or connection.recv(1))
    with closing(client(server).watch("/net/", 10)) as stream:
        assert read_events(stream, 2) == EVENTS
        assert stream.read() == []
    path, fields, body = server.requests[0]
    assert (path, fields["Grpc-Metadata-hasleader"]) == ("/v3/watch", "true")
    assert body == {"create_request": {"key": b64("/net/"), "range_end": b64("/net0"), "start_revision": "10"}}


@pytest.mark.parametrize(
    ("end", "kind", "words"),
    [
        (chunks(CREATED, {"result": {"canceled": True, "compact_revision": "77"}}), CompactedError, "up to revision 77"),
        (chunks(CREATED, {"result": {"canceled": True, "cancel_reason": "no leader"}}), EtcdError, "watch: no leader"),
        (chunks(CREATED, {"error": {"grpc_code": 14, "message": "transport is closing"}}), EtcdError, "transport is closing"),
        (chunks(CREATED, PUT)[:-9], EtcdError, "ends in the middle"),
        (chunks(CREATED) + b"0\r\n\r\n", EtcdError, "ended by etcd"),
        (chunks(CREATED, 7), EtcdError, "Expected `object`, got `int`"),
        (chunks(CREATED) + b"zz\r\n", EtcdError, "not a chunk's length"),
    ],
)
def test_watch_ends(serve, end: bytes, kind: type[EtcdError], words: str) -> None:
    """However a watch ends, whoever reads it is told, and told apart when etcd has dropped the changes it asked for."""
    with pytest.raises(kind, match=words), closing(client(serve(raw(end))).watch("/net/", 10)) as stream:
        read_events(stream, 2)


@pytest.mark.parametrize(
    ("handler", "kind", "words"),
    [
        (keep_open(b""), EtcdError, "timed out"),
        (close, EtcdError, "ends in the middle"),
        (raw(chunks({"result": {"created": True, "canceled": True, "compact_revision": "5"}})), CompactedError, "revision 5"),
        (answer(OLD, 401), EtcdError, "invalid auth token"),
    ],
)
def test_watch_that_does_not_begin(serve, handler: Handler, kind: type[EtcdError], words: str) -> None:
    """A watch that etcd does not confirm in time is an error, and the next endpoint is the one to be asked."""
    first, second = serve(handler), serve()
    etcd = client(first, second, call_seconds=0.3)
    with pytest.raises(kind, match=words):
        etcd.watch("/net/", 10)
    assert etcd.endpoint == second.url


# -- the wire ------------------------------------------------------------------------------------------------------------


def whole(data: bytes, step: int) -> tuple[int, bool, list[bytes]]:
    """Feed an answer in pieces, then the end of the connection."""
    found, lines = HttpAnswer(), list[bytes]()
    for at in range(0, len(data), step):
        found.feed(data[at : at + step])
        lines += found.take_lines()
    if not found.complete:
        found.feed(b"")
    return found.status, found.complete, [*lines, found.body]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (text('{"a":1}'), [b'{"a":1}']),
        (b"HTTP/1.0 200 OK\r\n\r\n{}", [b"{}"]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", [b""]),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\n{}\n\r\n2\r\n[\n\r\n2\r\n]\n\r\n0\r\n\r\n",
            [b"{}", b"[", b"]", b""],
        ),
    ],
)
def test_pieces(data: bytes, lines: list[bytes]) -> None:
    """An answer is the same whatever pieces it comes in."""
    for step in (1, 2, 3, 7, len(data)):
        assert whole(data, step) == (200, True, lines)


def test_what_is_not_a_message() -> None:
    """Text that is no message is an error that shows its beginning."""
    with pytest.raises(WireError, match=r"malformed.*b'\{x'"):
        decode(b"{x", RangeAnswer)
