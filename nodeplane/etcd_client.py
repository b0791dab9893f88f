"""A client of etcd's v3 JSON gateway: what leases need of it, with a limit of time on everything.

    call     endpoint 1 --refused, silent, garbage--> endpoint 2 --> ... --> EtcdError with what each of them said
    watch    stays with the endpoint that answered last; whoever reads it waits on its descriptor

A call takes a connection of its own: there are few of them a day, and none outlives the machine it goes to. Certificates and the
password are read from their files each time, so they may be replaced. A call may be carried out although its answer was lost,
and is then asked of the next endpoint; callers compare revisions before they write, so doing it twice changes nothing.

What leases are and when to ask is for ``lease_keeper.py``. Source: etcd "gRPC gateway", "Authentication"; api/etcdserverpb/rpc.proto.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from nodeplane.config_overlay import EtcdOptions
from nodeplane.etcd_wire import (
    Event,
    Failure,
    HttpAnswer,
    KeepAlive,
    LeaseAnswer,
    RangeAnswer,
    TokenAnswer,
    TxnAnswer,
    WatchLine,
    WireError,
    decode,
)

CALL_SECONDS = 5.0
"""From connecting to the last byte, at one endpoint."""
RECEIVE = 1 << 18
UNAUTHENTICATED = 16
"""gRPC's code: etcd does not know the token (any more)."""
_OLD_TOKEN = ("invalid auth token", "auth token is not provided", "revision of auth store is old", "user name is empty")


class EtcdError(Exception):
    """etcd cannot be reached, or refuses; the text says which endpoint and what."""


class CompactedError(EtcdError):
    """The watch asked for changes that etcd no longer keeps: list again."""


class _RefusedError(EtcdError):
    """An endpoint answered and said no: no other one would say anything else."""

    def __init__(self, where: str, status: int, failure: Failure) -> None:
        self.status, self.failure = status, failure
        super().__init__(f"{where}: {failure}")

    @property
    def is_about_the_token(self) -> bool:
        """Whether a new token may help."""
        return UNAUTHENTICATED in {self.failure.code, self.failure.grpc_code} or any(w in str(self) for w in _OLD_TOKEN)

    @property
    def is_about_the_endpoint(self) -> bool:
        """Whether another endpoint may answer: this one has no leader, or is not etcd."""
        return self.status in {404, 429, 502, 503, 504}


M = TypeVar("M", bound=msgspec.Struct)
Call = tuple[str, Mapping[str, object]]


class EtcdClient:
    """One etcd cluster, for one thread. Nothing is sent before the first call."""

    def __init__(self, options: EtcdOptions, *, call_seconds: float = CALL_SECONDS) -> None:
        self.options = options
        self.call_seconds = call_seconds
        self._endpoints = list(options.endpoints)
        self._token = ""

    @property
    def endpoint(self) -> str:
        """The endpoint that answered last, or is asked next."""
        return self._endpoints[0]

    def turn(self) -> None:
        """Ask another endpoint first from now on."""
        self._endpoints.append(self._endpoints.pop(0))

    # -- keys and leases ---------------------------------------------------------------------------------------------

    def list(self, prefix: str) -> RangeAnswer:
        """Return all keys below a prefix, and the revision of that view. Raises EtcdError, as all of these."""
        return self._ask("kv/range", _below(prefix), RangeAnswer)

    def get(self, key: str) -> RangeAnswer:
        """Return one key."""
        return self._ask("kv/range", {"key": _b64(key)}, RangeAnswer)

    def put(self, key: str, value: str, lease: int = 0) -> None:
        """Write a key, whatever it was."""
        self._ask("kv/put", _put(key, value, lease), RangeAnswer)

    def delete(self, key: str) -> None:
        """Delete a key; that it is gone already is success."""
        self._ask("kv/deleterange", {"key": _b64(key)}, RangeAnswer)

    def write(self, key: str, value: str, *, lease: int, expect: Mapping[str, int], delete: Sequence[str] = ()) -> TxnAnswer:
        """Write a key and delete others in one step, if every key in ``expect`` was last changed at its revision (0: is not there)."""
        compare = [
            {"key": _b64(k), "target": "MOD", "result": "EQUAL", "mod_revision": str(r)}
            if r
            else {"key": _b64(k), "target": "VERSION", "result": "EQUAL", "version": "0"}
            for k, r in sorted(expect.items())
        ]
        deletions: list[dict[str, object]] = [{"request_delete_range": {"key": _b64(k)}} for k in delete]
        success = [*deletions, {"request_put": _put(key, value, lease)}]
        return self._ask("kv/txn", {"compare": compare, "success": success}, TxnAnswer)

    def grant(self, seconds: int) -> int:
        """Make a lease; return its number."""
        return self._ask("lease/grant", {"TTL": str(seconds)}, LeaseAnswer).ID

    def revoke(self, lease: int) -> None:
        """End a lease, and with it the keys it bears."""
        self._ask("lease/revoke", {"ID": str(lease)}, LeaseAnswer)

    def time_to_live(self, lease: int) -> int:
        """Return the seconds a lease has left; 0 or less: it has ended."""
        return self._ask("lease/timetolive", {"ID": str(lease)}, LeaseAnswer).TTL

    def keep_alive(self, lease: int) -> int:
        """Let a lease begin anew; return its seconds, 0 if it has ended."""
        line = self._ask("lease/keepalive", {"ID": str(lease)}, KeepAlive, stream=True)
        if line.result is None:
            raise EtcdError(f"{self.endpoint}: lease/keepalive: {line.error or 'no answer'}")
        return max(0, line.result.TTL)

    def watch(self, prefix: str, revision: int) -> WatchStream:
        """Follow all keys below a prefix from a revision on. Raises EtcdError; CompactedError comes from reading."""
        request = {"create_request": {**_below(prefix), "start_revision": str(revision)}}
        where = self.endpoint
        try:
            sock = self._send(where, ("watch", request), time.monotonic() + self.call_seconds)
        except (OSError, http.client.HTTPException) as error:
            self.turn()
            raise EtcdError(f"{where}: watch: {_words(error)}") from error
        stream = WatchStream(sock, where)
        try:
            stream.wait_created(time.monotonic() + self.call_seconds)
        except BaseException:
            stream.close()
            self.turn()
            self._token = ""
            raise
        return stream

    # -- calls -------------------------------------------------------------------------------------------------------

    def _ask(self, path: str, request: Mapping[str, object], kind: type[M], *, stream: bool = False) -> M:
        """Ask one endpoint after the other; a token that is refused is renewed once."""
        try:
            return self._ask_all((path, request), kind, stream=stream)
        except _RefusedError as error:
            if not self.options.username or not error.is_about_the_token:
                raise
            self._token = ""
            return self._ask_all((path, request), kind, stream=stream)

    def _ask_all(self, call: Call, kind: type[M], *, stream: bool) -> M:
        said = []
        for _ in range(len(self._endpoints)):
            where = self.endpoint
            try:
                return self._ask_one(where, call, kind, stream=stream)
            except _RefusedError as error:
                if not error.is_about_the_endpoint:
                    raise
                said.append(str(error))
            except (OSError, http.client.HTTPException, WireError) as error:
                said.append(f"{where}: {call[0]}: {_words(error)}")
            self.turn()
        raise EtcdError("; ".join(said))

    def _ask_one(self, where: str, call: Call, kind: type[M], *, stream: bool) -> M:
        deadline = time.monotonic() + self.call_seconds
        if self.options.username and not self._token:
            self._token = self._authenticate(where, deadline)
        return decode(self._exchange(where, call, deadline, stream=stream), kind)

    def _authenticate(self, where: str, deadline: float) -> str:
        password = _read(self.options.password_file).strip()
        request = {"name": self.options.username, "password": password}
        return decode(self._exchange(where, ("auth/authenticate", request), deadline), TokenAnswer).token

    def _exchange(self, where: str, call: Call, deadline: float, *, stream: bool = False) -> bytes:
        """Send a call and return the answer's body, or of a stream the first line."""
        answer = HttpAnswer()
        sock = self._send(where, call, deadline)
        with sock:
            while not answer.complete:
                _limit(sock, deadline)
                answer.feed(sock.recv(RECEIVE))
                lines = answer.take_lines() if stream and answer.status == 200 else []
                if lines:
                    return lines[0]
        if answer.status != 200:
            raise _RefusedError(f"{where}: {call[0]}", answer.status, _failure(answer))
        return answer.body

    def _send(self, where: str, call: Call, deadline: float) -> socket.socket:
        """Connect and send a call; the answer is to be read from the socket that is returned."""
        url = urlsplit(where)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._token and call[0] != "auth/authenticate":
            headers["Authorization"] = self._token
        if call[0] == "watch":
            # A member cut off from the others would stay silent: with this it says that there is no leader.
            headers["Grpc-Metadata-hasleader"] = "true"
        left = max(0.01, deadline - time.monotonic())
        connection = http.client.HTTPConnection(
            url.hostname or "", url.port or (443 if url.scheme == "https" else 80), timeout=left
        )
        if url.scheme == "https":
            host, port = url.hostname or "", url.port or 443
            connection = http.client.HTTPSConnection(host, port, timeout=left, context=self._tls())
        try:
            connection.request("POST", f"/v3/{call[0]}", json.dumps(call[1]), headers)
            sock: socket.socket = connection.sock
        except BaseException:
            connection.close()
            raise
        connection.sock = None
        return sock

    def _tls(self) -> ssl.SSLContext:
        options = self.options
        for file in (options.ca_file, options.cert_file, options.key_file):
            if file:
                _read(file)  # ssl's own error does not say which file it is about
        context = ssl.create_default_context(cafile=options.ca_file or None)
        if options.cert_file:
            context.load_cert_chain(options.cert_file, options.key_file)
        return context


class WatchStream:
    """Changes as they come. Select on ``fileno``, unless ``pending`` says that something is waiting already."""

    def __init__(self, sock: socket.socket, where: str) -> None:
        self.where = where
        self._sock = sock
        self._answer = HttpAnswer()
        self._created = False
        self._early: list[Event] = []
        # A machine that vanishes says nothing: after half a minute without an answer to TCP's own probes it counts as gone.
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    @property
    def pending(self) -> bool:
        """Whether ``read`` has something that no descriptor tells of."""
        return bool(self._early) or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0)

    def wait_created(self, deadline: float) -> None:
        """Wait until etcd follows, so that nothing from now on is missed. Raises EtcdError."""
        while not self._created:
            try:
                _limit(self._sock, deadline)
                self._take(self._sock.recv(RECEIVE))
            except OSError as error:
                raise EtcdError(f"{self.where}: watch: {_words(error)}") from error
        self._sock.setblocking(False)

    def read(self) -> list[Event]:
        """Return what has come; never blocks. Raises CompactedError, and EtcdError when the watch has ended."""
        while True:
            try:
                data = self._sock.recv(RECEIVE)
            except (BlockingIOError, ssl.SSLWantReadError):
                break
            except OSError as error:
                raise EtcdError(f"{self.where}: watch: {_words(error)}") from error
            self._take(data)
        found, self._early = self._early, []
        return found

    def _take(self, data: bytes) -> None:
        try:
            self._answer.feed(data)
            if self._answer.status not in {0, 200}:
                if self._answer.complete:
                    raise EtcdError(f"{self.where}: watch: {_failure(self._answer)}")
                return
            for line in self._answer.take_lines():
                self._early += self._read_line(decode(line, WatchLine))
        except WireError as error:
            raise EtcdError(f"{self.where}: watch: {error}") from error
        if self._answer.complete:
            raise EtcdError(f"{self.where}: watch: ended by etcd")

    def _read_line(self, line: WatchLine) -> Sequence[Event]:
        result = line.result
        if result is None:
            raise EtcdError(f"{self.where}: watch: {line.error or 'an empty message'}")
        if result.compact_revision:
            raise CompactedError(f"{self.where}: watch: compacted up to revision {result.compact_revision}")
        if result.canceled:
            raise EtcdError(f"{self.where}: watch: {result.cancel_reason or 'canceled'}")
        self._created = self._created or result.created
        return result.events


def _limit(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    sock.settimeout(left)


def _failure(answer: HttpAnswer) -> Failure:
    try:
        return decode(answer.body, Failure)
    except WireError:
        return Failure(message=f"HTTP {answer.status}: {answer.body[:80].decode(errors='replace').strip()}")


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


def _read(file: str) -> str:
    """Return a file's text; its absence is an error that names it."""
    try:
        return Path(file).read_text()
    except OSError as error:
        raise EtcdError(f"{file}: {error.strerror}") from error


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _below(prefix: str) -> dict[str, object]:
    """Return a range of all keys that begin with ``prefix``: it ends before the first text that does not any more."""
    return {"key": _b64(prefix), "range_end": _b64(prefix[:-1] + chr(ord(prefix[-1]) + 1))}


def _put(key: str, value: str, lease: int) -> dict[str, object]:
    return {"key": _b64(key), "value": _b64(value), "lease": str(lease)}
