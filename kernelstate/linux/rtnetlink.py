"""The rtnetlink protocol, as far as links, addresses, routes and neighbours need it: framing, attributes, answers.

Written out here rather than taken from pyroute2, which the kernel tests use to check it: many requests go in one datagram and
are answered one by one, and the agent is spared an import of its size (docs/adr/0012).

    struct nlmsghdr | family header (ifinfomsg, rtmsg, ...) | struct rtattr + payload, padded to 4 | ...

What the attributes mean is for ``link_codec.py``. Source: netlink(7), rtnetlink(7), include/uapi/linux/{netlink,rtnetlink}.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kernelstate.errors import KernelRefusedError

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 10, 11, 12

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
NLA_TYPE_MASK = 0x3FFF
RECEIVE = 1 << 18
BATCH = 100
"""Requests in one datagram; their answers must fit the receive buffer."""
DUMP_ATTEMPTS = 8
"""How often a dump is taken again because something changed while it ran."""


class Message(NamedTuple):
    """One message: its type, and everything behind the header."""

    type: int
    body: bytes


class Answer(NamedTuple):
    """How one request went: errno (0 for done) and the kernel's words, ``text of errno: its own message``."""

    code: int
    words: str


class Request(NamedTuple):
    """One request to change something; ``flags`` beside those that every request has."""

    type: int
    flags: int
    body: bytes


def open_socket(timeout: float | None, buffer: int) -> socket.socket:
    """Open an rtnetlink socket in the current network namespace; ``buffer`` is in bytes, beyond the system's limit if need be."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        so_rcvbufforce = 33
        sock.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, buffer)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(timeout)
    return sock


class RouteSocket:
    """A connection to the kernel for requests; opened where it is made, and good for that network namespace only."""

    def __init__(self) -> None:
        self._sock = open_socket(timeout=10.0, buffer=1 << 20)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            self._sock.setsockopt(SOL_NETLINK, option, 1)
        self._sock.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    def dump(self, what: int, body: bytes, name: str) -> list[Message]:
        """Return all objects of a kind (``what`` is RTM_GET...); ``name`` is for the error. Raises KernelRefusedError."""
        for _ in range(DUMP_ATTEMPTS):
            found, interrupted = self._dump_once(what, body, name)
            if not interrupted:
                return found
        raise KernelRefusedError("dump", name, f"changed during each of {DUMP_ATTEMPTS} attempts")

    def execute(self, requests: Sequence[Request]) -> list[Answer]:
        """Send each request in order, going on after failures; return the answer to each. Raises KernelRefusedError for silence."""
        answers: list[Answer] = []
        for first in range(0, len(requests), BATCH):
            answers += self._execute_batch(requests[first : first + BATCH])
        return answers

    def _execute_batch(self, requests: Sequence[Request]) -> list[Answer]:
        start = self._sequence + 1
        self._send(b"".join(self._frame(r.type, NLM_F_ACK | r.flags, r.body) for r in requests), "change")
        answers = [Answer(0, "")] * len(requests)
        waiting = len(requests)
        while waiting:
            for kind, flags, sequence, body in self._receive("change"):
                if kind == NLMSG_ERROR and 0 <= sequence - start < len(requests):
                    answers[sequence - start] = _answer(flags, body)
                    waiting -= 1
        return answers

    def _dump_once(self, what: int, body: bytes, name: str) -> tuple[list[Message], bool]:
        frame = self._frame(what, NLM_F_DUMP, body)
        mine = self._sequence
        self._send(frame, f"dump {name}")
        found: list[Message] = []
        interrupted = False
        while True:
            for kind, flags, sequence, content in self._receive(f"dump {name}"):
                if sequence != mine:
                    continue
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if kind == NLMSG_ERROR or (kind == NLMSG_DONE and _errno(content)):
                    raise KernelRefusedError("dump", name, _answer(flags, content).words)
                if kind == NLMSG_DONE:
                    return found, interrupted
                found.append(Message(kind, content))

    def _frame(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0) + body

    def _send(self, data: bytes, operation: str) -> None:
        try:
            self._sock.send(data)
        except OSError as error:
            raise KernelRefusedError(operation, "over rtnetlink", str(error.strerror or error)) from error

    def _receive(self, operation: str) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._sock.recv(RECEIVE)
        except OSError as error:
            raise KernelRefusedError(operation, "over rtnetlink", str(error.strerror or error)) from error
        return frames_of(data)


def frames_of(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Cut a datagram into (type, flags, sequence, body); every body is a multiple of 4 bytes long."""
    position = 0
    while position + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, position)
        if length < HEADER.size:
            return
        yield kind, flags, sequence, data[position + HEADER.size : position + length]
        position += (length + 3) & ~3


def attribute(kind: int, payload: bytes) -> bytes:
    """Pack one attribute."""
    return ATTRIBUTE.pack(len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def number(kind: int, value: int) -> bytes:
    """Pack an attribute of 32 bits in the machine's order."""
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes, position: int) -> dict[int, bytes]:
    """Unpack the attributes that follow ``position``; of several of one type the last counts."""
    found = {}
    end = len(data)
    while position + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, position)
        if length < 4:
            break
        found[kind & NLA_TYPE_MASK] = data[position + 4 : position + length]
        position += (length + 3) & ~3
    return found


def to_int(payload: bytes) -> int:
    """Read a number in the machine's order, of whatever length it is."""
    return int.from_bytes(payload, "little" if struct.pack("=H", 1)[0] else "big")


def _errno(body: bytes) -> int:
    return int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else 0


def _answer(flags: int, body: bytes) -> Answer:
    """Read a struct nlmsgerr, with the message that newer kernels add."""
    code = -_errno(body)
    if code == 0:
        return Answer(0, "")
    words = os.strerror(code)
    if flags & NLM_F_ACK_TLVS:
        extra = attributes(body, 4 + HEADER.size).get(NLMSGERR_ATTR_MSG, b"")
        text = extra.rstrip(b"\0").decode(errors="replace")
        words += f": {text}" if text else ""
    return Answer(code, words)
