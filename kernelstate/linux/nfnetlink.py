"""A socket to the kernel's netfilter subsystems, for the two places where a general netlink library is too slow.

    request:  nlmsghdr | nfgenmsg(family) | attributes            reply: the same, many to one datagram, or an error number

Decides framing and errors; what the attributes mean is the caller's business. A generation number is asked for at every
sync, and a conntrack dump has tens of thousands of entries: pyroute2 needs several times as long for each (docs/adr/0012).

Source: include/uapi/linux/netlink.h, netfilter/nfnetlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from kernelstate.errors import KernelRefusedError

NETLINK_NETFILTER = 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x200, 0x400, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF

_BATCH_BEGIN, _BATCH_END, _SO_SNDBUFFORCE = 16, 17, 32

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")
_BODY = _HEADER.size + 4  # behind nfgenmsg


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, *children: bytes) -> bytes:
    """Encode an attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(children))


def attributes(data: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Return where each attribute's payload begins and ends, by type."""
    found: dict[int, tuple[int, int]] = {}
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            break
        found[kind & NLA_TYPE_MASK] = (start + 4, start + length)
        start += (length + 3) & ~3
    return found


class NfNetlink:
    """One socket in the network namespace of the thread that makes it; a context manager. ``timeout`` in seconds."""

    def __init__(self, timeout: float = 10.0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.settimeout(timeout)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def dump(self, operation: str, message: int, family: int, payload: bytes = b"") -> Iterator[tuple[bytes, int, int]]:
        """Ask for all objects; yields (datagram, start, end of its attributes). Raises KernelRefusedError."""
        self._send([self._frame(message, NLM_F_REQUEST | NLM_F_DUMP, family, payload)])
        while True:
            for data, kind, start, end in self._receive():
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise KernelRefusedError(operation, "", os.strerror(-_ERROR.unpack_from(data, start)[0]))
                yield data, start + 4, end

    def get(self, operation: str, message: int, family: int, payload: bytes = b"") -> tuple[bytes, int, int]:
        """Ask for one object; returns (datagram, start, end of its attributes). Raises KernelRefusedError."""
        self._send([self._frame(message, NLM_F_REQUEST, family, payload)])
        data, kind, start, end = next(self._receive())
        if kind == NLMSG_ERROR:
            raise KernelRefusedError(operation, "", os.strerror(-_ERROR.unpack_from(data, start)[0]))
        return data, start + 4, end

    def execute(self, message: int, requests: Sequence[tuple[int, bytes]], flags: int = 0) -> list[int]:
        """Send requests (family, payload) in one datagram; returns the error number of each, 0 for done."""
        first = self._sequence + 1
        flags |= NLM_F_REQUEST | NLM_F_ACK
        self._send([self._frame(message, flags, family, payload) for family, payload in requests])
        results: dict[int, int] = {}
        while len(results) < len(requests):
            for data, kind, start, _ in self._receive():
                if kind == NLMSG_ERROR:
                    sequence = _HEADER.unpack_from(data, start - _HEADER.size)[3]
                    results[sequence] = -_ERROR.unpack_from(data, start)[0]
        return [results[first + index] for index in range(len(requests))]

    def commit(self, operation: str, subsystem: int, family: int, messages: Sequence[tuple[int, int, bytes]]) -> None:
        """Send messages (type, flags, payload) as one transaction: all are done or none. Raises KernelRefusedError."""
        frames = [self._frame(_BATCH_BEGIN, NLM_F_REQUEST, 0, b"", subsystem)]
        first = self._sequence
        frames += [self._frame(kind, NLM_F_REQUEST | NLM_F_ACK | flags, family, body) for kind, flags, body in messages]
        last = self._sequence
        frames.append(self._frame(_BATCH_END, NLM_F_REQUEST, 0, b"", subsystem))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * sum(map(len, frames)) + (1 << 16))
        self._send(frames)
        done = first
        while done < last:
            for data, kind, start, _ in self._receive():
                sequence = _HEADER.unpack_from(data, start - _HEADER.size)[3]
                if kind != NLMSG_ERROR or sequence < first:  # an answer to an earlier batch that failed half way
                    continue
                if code := -_ERROR.unpack_from(data, start)[0]:
                    raise KernelRefusedError(operation, "", os.strerror(code))
                done = sequence

    def _frame(self, message: int, flags: int, family: int, payload: bytes, resource: int = 0) -> bytes:
        self._sequence += 1
        header = _HEADER.pack(_BODY + len(payload), message, flags, self._sequence, 0)
        return header + struct.pack("!BBH", family, 0, resource) + payload

    def _send(self, frames: Sequence[bytes]) -> None:
        self._socket.send(b"".join(frames))

    def _receive(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yield (datagram, type, start of payload, end) for each message of one datagram."""
        try:
            data = self._socket.recv(1 << 18)
        except OSError as error:
            raise KernelRefusedError("receive netlink", "netfilter", str(error)) from error
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, offset)
            yield data, kind, offset + _HEADER.size, offset + length
            offset += (length + 3) & ~3
