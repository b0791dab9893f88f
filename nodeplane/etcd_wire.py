"""What etcd's v3 JSON gateway says, off the wire: an HTTP/1.1 answer read piece by piece, and the messages in it.

    recv() --> HttpAnswer: status, body by Content-Length, chunks or until the end --> lines --> records below

Pure: whoever reads the socket feeds what came, so waiting, timeouts and TLS are theirs, and a message cut anywhere is the same
message. The gateway writes bytes as base64, 64-bit numbers as text, leaves out what is zero, and streams one message a line.

Source: RFC 9112; etcd api_grpc_gateway; etcd api/etcdserverpb/rpc.proto.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

MAX_HEADER, MAX_BODY = 64 << 10, 256 << 20
"""Bytes. Ten thousand leases are about 4 MB."""


class WireError(Exception):
    """What came is not what etcd says."""


class HttpAnswer:
    """One answer, as far as it has come. ``feed`` it; ``status`` is 0 until the header is complete."""

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self._pending = bytearray()
        self._body = bytearray()
        self._size = 0
        self._chunked = False
        self._left: int | None = None
        """Bytes left of the body or of the chunk; None: until the end, or a chunk's length comes next."""

    def feed(self, data: bytes) -> None:
        """Take in what came; empty: the other side has closed. Raises WireError."""
        if not data:
            self._end()
            return
        self._pending += data
        if not self.status and not self._read_header():
            return
        if self._chunked:
            self._read_chunks()
        else:
            self._read_plain()
        if self._size > MAX_BODY:
            raise WireError(f"an answer of more than {MAX_BODY} bytes")

    def take_lines(self) -> list[bytes]:
        """Return the body's lines that are complete and were not taken yet."""
        cut = self._body.rfind(b"\n") + 1
        lines = bytes(self._body[:cut]).split(b"\n")
        del self._body[:cut]
        self._size = len(self._body)
        return [line for line in lines if line.strip()]

    @property
    def body(self) -> bytes:
        """The body as far as it has come, without lines taken."""
        return bytes(self._body)

    def _end(self) -> None:
        # Without a length the end of the connection is the end of the body; with one it comes too soon.
        if not self.status or self._chunked or self._left:
            raise WireError("the answer ends in the middle")
        self.complete = True

    def _read_header(self) -> bool:
        end = self._pending.find(b"\r\n\r\n")
        if end < 0:
            if len(self._pending) > MAX_HEADER:
                raise WireError(f"a header of more than {MAX_HEADER} bytes")
            return False
        first, *rest = bytes(self._pending[:end]).decode("latin-1").split("\r\n")
        del self._pending[: end + 4]
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise WireError(f"not HTTP: {first[:80]!r}")
        fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in rest)}
        self.status = int(words[1])
        self._chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        length = fields.get("content-length", "")
        if not self._chunked and length:
            if not length.isdigit():
                raise WireError(f"Content-Length: {length[:80]!r}")
            self._left = int(length)
        return True

    def _read_plain(self) -> None:
        taken = len(self._pending) if self._left is None else min(self._left, len(self._pending))
        self._take(taken)
        if self._left is not None:
            self._left -= taken
            self.complete = not self._left

    def _read_chunks(self) -> None:
        while not self.complete:
            if self._left is None:
                end = self._pending.find(b"\r\n")
                if end < 0:
                    if len(self._pending) > MAX_HEADER:
                        raise WireError("a chunk without a length")
                    return
                self._left = _chunk_length(bytes(self._pending[:end]))
                del self._pending[: end + 2]
                if not self._left:
                    self.complete = True
                    return
            taken = min(self._left, len(self._pending))
            self._take(taken)
            self._left -= taken
            if self._left or len(self._pending) < 2:
                return
            if self._pending[:2] != b"\r\n":
                raise WireError("a chunk longer than its length")
            del self._pending[:2]
            self._left = None

    def _take(self, count: int) -> None:
        self._body += self._pending[:count]
        self._size += count
        del self._pending[:count]


def _chunk_length(line: bytes) -> int:
    digits = line.split(b";")[0].strip()
    if not digits or any(byte not in b"0123456789abcdefABCDEF" for byte in digits):
        raise WireError(f"not a chunk's length: {line[:80]!r}")
    return int(digits, 16)


# -- messages ------------------------------------------------------------------------------------------------------------


class KeyValue(msgspec.Struct, frozen=True):
    """A key as etcd holds it; of a deleted one there are only the key and the revision of its deletion."""

    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0
    lease: int = 0


class Header(msgspec.Struct, frozen=True):
    """On every answer: the store's revision."""

    revision: int = 0


class RangeAnswer(msgspec.Struct, frozen=True):
    """``kv/range``."""

    header: Header = Header()
    kvs: tuple[KeyValue, ...] = ()


class TxnAnswer(msgspec.Struct, frozen=True):
    """``kv/txn``: whether the comparisons held."""

    header: Header = Header()
    succeeded: bool = False


class LeaseAnswer(msgspec.Struct, frozen=True):
    """``lease/grant``, ``lease/timetolive``; TTL in seconds, -1 where there is no such lease."""

    ID: int = 0
    TTL: int = 0


class TokenAnswer(msgspec.Struct, frozen=True):
    """``auth/authenticate``."""

    token: str = ""


class Event(msgspec.Struct, frozen=True):
    """One change of a key."""

    kv: KeyValue = KeyValue()
    type: Literal["PUT", "DELETE"] = "PUT"


class WatchResult(msgspec.Struct, frozen=True):
    """What a watch tells in one go."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: tuple[Event, ...] = ()


class Failure(msgspec.Struct, frozen=True):
    """etcd's words for what it refused; ``code`` is gRPC's."""

    code: int = 0
    message: str = ""
    error: str = ""
    grpc_code: int = 0

    def __str__(self) -> str:
        return self.message or self.error or f"code {self.code or self.grpc_code}"


class WatchLine(msgspec.Struct, frozen=True):
    """One line of a watch."""

    result: WatchResult | None = None
    error: Failure | None = None


class KeepAlive(msgspec.Struct, frozen=True):
    """One line of ``lease/keepalive``; TTL 0: there is no such lease any more."""

    result: LeaseAnswer | None = None
    error: Failure | None = None


M = TypeVar("M", bound=msgspec.Struct)


def decode(data: bytes, kind: type[M]) -> M:
    """Read a message; numbers may be text. Raises WireError."""
    try:
        return msgspec.json.decode(data, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"{error}: {data[:80]!r}") from error
