"""Generic netlink, as far as IPVS needs it: finding a family by its name, many requests in one datagram, dumps.

    struct nlmsghdr | struct genlmsghdr (command, version) | struct nlattr + payload, padded to 4 | ...

The kernel does the requests of a datagram one after the other while it is being sent. Only the last one asks to be acknowledged:
the others answer if they fail, with their sequence number, so that ten thousand requests that go well cost a few dozen answers.

What the attributes mean is for the caller. Source: include/uapi/linux/{netlink,genetlink}.h, net/netlink/af_netlink.c
(netlink_rcv_skb: an answer is sent for an error, or where NLM_F_ACK asks for one).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.linux.rtnetlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    RECEIVE,
    attribute,
    attributes,
    frames_of,
)

NETLINK_GENERIC = 16
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10
SO_RCVBUFFORCE = 33
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 0x10, 3, 1, 2
BATCH = 400
"""Requests in one datagram: below the usual send buffer (212,992 bytes) at up to 200 bytes each."""
BUFFER = 4 << 20
"""Bytes to receive. A batch of which every request fails is 400 answers of less than a kilobyte as the kernel counts them."""

_GENERIC = struct.Struct("=BBxx")  # command, version
_START = struct.Struct("=IHHIIBBxx")  # both headers
_ERRNO = struct.Struct("=i")


def open_generic_socket(timeout: float = 10.0) -> socket.socket:
    """Open a generic netlink socket in the current network namespace; ``timeout`` in seconds."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
    sock.settimeout(timeout)
    sock.bind((0, 0))
    return sock


class GenericSocket:
    """A connection to one family (``IPVS``), good for the network namespace in which it is made.

    Raises MissingFeatureError if the kernel has no such family; asking makes the kernel load the module if there is one.
    ``connect`` opens the socket (or, in a test, something that behaves as one).
    """

    def __init__(self, family: str, version: int, connect: Callable[[], socket.socket] = open_generic_socket) -> None:
        self._sock = connect()
        self._sequence = 0
        self._family, self._version = family, version
        try:
            self.id = self._find(family)
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    def execute(self, requests: Sequence[tuple[int, bytes]]) -> list[int]:
        """Do each (command, attributes) in order, going on after failures; return the errno of each, 0 for done.

        Raises KernelRefusedError if the kernel does not answer.
        """
        codes: list[int] = []
        for first in range(0, len(requests), BATCH):
            codes += self._execute_batch(requests[first : first + BATCH])
        return codes

    def get(self, requests: Sequence[tuple[int, bytes]]) -> list[bytes | int]:
        """Ask for one object by each request; return its attributes, or the errno."""
        found: list[bytes | int] = []
        for first in range(0, len(requests), BATCH):
            found += self._get_batch(requests[first : first + BATCH])
        return found

    def dump(self, command: int, payload: bytes, name: str) -> list[bytes]:
        """Return the attributes of all objects of a kind; ``name`` is for the error. Raises KernelRefusedError."""
        self._sequence += 1
        mine = self._sequence
        self._send(self._frame(command, NLM_F_DUMP, mine, payload), f"dump {name}")
        found: list[bytes] = []
        while True:
            for kind, _, sequence, body in self._receive(f"dump {name}"):
                if sequence != mine:
                    continue
                code = -_ERRNO.unpack_from(body)[0] if kind in {NLMSG_ERROR, NLMSG_DONE} and len(body) >= 4 else 0
                if code > 0:
                    raise KernelRefusedError("dump", name, os.strerror(code))
                if kind in {NLMSG_DONE, NLMSG_ERROR}:
                    return found
                found.append(body[_GENERIC.size :])

    # -- wire --------------------------------------------------------------------------------------------------------

    def _execute_batch(self, requests: Sequence[tuple[int, bytes]]) -> list[int]:
        first = self._sequence + 1
        last = self._sequence = self._sequence + len(requests)
        pack, family, version = _START.pack, self.id, self._version
        frames: list[bytes] = []
        sequence = first
        for command, payload in requests:
            flags = NLM_F_REQUEST | (NLM_F_ACK if sequence == last else 0)
            frames += (pack(_START.size + len(payload), family, flags, sequence, 0, command, version), payload)
            sequence += 1
        self._send(b"".join(frames), "change")
        codes = [0] * len(requests)
        while True:
            for kind, _, sequence, body in self._receive("change"):
                if kind == NLMSG_ERROR and first <= sequence <= last:
                    codes[sequence - first] = -_ERRNO.unpack_from(body)[0]
                    if sequence == last:
                        return codes

    def _get_batch(self, requests: Sequence[tuple[int, bytes]]) -> list[bytes | int]:
        first = self._sequence + 1
        self._sequence += len(requests)
        frames = (self._frame(command, 0, first + i, payload) for i, (command, payload) in enumerate(requests))
        self._send(b"".join(frames), "look up")
        found: list[bytes | int] = [0] * len(requests)
        waiting = len(requests)
        while waiting:
            for kind, _, sequence, body in self._receive("look up"):
                if 0 <= sequence - first < len(requests):
                    is_error = kind == NLMSG_ERROR
                    found[sequence - first] = -_ERRNO.unpack_from(body)[0] if is_error else body[_GENERIC.size :]
                    waiting -= 1
        return found

    def _find(self, family: str) -> int:
        self.id, version, self._version = GENL_ID_CTRL, self._version, 1
        answer = self.get([(CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, family.encode() + b"\0"))])[0]
        self._version = version
        if isinstance(answer, int):
            raise MissingFeatureError(family.lower(), f"generic netlink family {family}: {os.strerror(answer)}")
        return int(struct.unpack("=H", attributes(answer, 0)[CTRL_ATTR_FAMILY_ID])[0])

    def _frame(self, command: int, flags: int, sequence: int, payload: bytes) -> bytes:
        size = HEADER.size + _GENERIC.size + len(payload)
        return _START.pack(size, self.id, NLM_F_REQUEST | flags, sequence, 0, command, self._version) + payload

    def _send(self, data: bytes, operation: str) -> None:
        try:
            self._sock.send(data)
        except OSError as error:
            raise KernelRefusedError(operation, self._family, str(error.strerror or error)) from error

    def _receive(self, operation: str) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            return frames_of(self._sock.recv(RECEIVE))
        except OSError as error:
            raise KernelRefusedError(operation, self._family, str(error.strerror or error)) from error
