"""Copies of packets that rules hand to an NFLOG group: a socket that listens to it, and what a packet is.

    -j NFLOG --nflog-group G, log group G  -->  nfnetlink_log  -->  this socket: PREFIX, PAYLOAD (the IP header and what follows)

Bound to the network namespace of the thread that makes it. More packets than the socket's buffer holds are lost, which the kernel says;
a reader counts that and goes on. Source: include/uapi/linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from types import TracebackType
from typing import Self

import msgspec

from kernelstate.errors import KernelRefusedError
from kernelstate.linux.nfnetlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, attribute, attributes

SUBSYSTEM = 4 << 8
PACKET, CONFIG = SUBSYSTEM | 0, SUBSYSTEM | 1
CONFIG_CMD, CONFIG_MODE = 1, 2
BIND, COPY_PACKET = 1, 2
PAYLOAD, PREFIX = 9, 10
BYTES = 128
"""Of each packet."""
BUFFER = 1 << 18
_HEADER = struct.Struct("=IHHII")
_RESULT = struct.Struct("=i")
_MODE = struct.Struct("!IBx")
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
PORTED = {6, 17, 132}


class Logged(msgspec.Struct, frozen=True):
    """A packet as it was logged. Ports are 0 where its protocol has none."""

    prefix: str
    protocol: str
    source: str
    destination: str
    source_port: int = 0
    destination_port: int = 0


class PacketLog:
    """Listens to one group; a context manager."""

    def __init__(self, group: int, timeout: float) -> None:
        """``timeout``: seconds that ``read`` waits. Raises KernelRefusedError, also where somebody else listens to the group."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._socket.settimeout(timeout)
        try:
            for part in (attribute(CONFIG_CMD, bytes([BIND])), attribute(CONFIG_MODE, _MODE.pack(BYTES, COPY_PACKET))):
                self._ask(group, part)
        except KernelRefusedError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def _ask(self, group: int, part: bytes) -> None:
        body = struct.pack("!BBH", 0, 0, group) + part
        self._socket.send(_HEADER.pack(16 + len(body), CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        data = self._socket.recv(1 << 16)
        code = -_RESULT.unpack_from(data, 16)[0] if _HEADER.unpack_from(data)[1] == NLMSG_ERROR else 0
        if code:
            words = "somebody else listens to it" if code == errno.EBUSY else errno.errorcode.get(code, str(code))
            raise KernelRefusedError("listen to NFLOG group", str(group), words)

    def read(self) -> list[Logged] | None:
        """Return the next packets; none if none came in time, None if some were lost."""
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return None
        found = []
        at = 0
        while at + 16 <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if length < 16:
                break
            if kind == PACKET:
                parts = attributes(data, at + 20, at + length)
                prefix = data[slice(*parts[PREFIX])].rstrip(b"\0").decode(errors="replace") if PREFIX in parts else ""
                packet = packet_of(prefix, data[slice(*parts[PAYLOAD])]) if PAYLOAD in parts else None
                found += [packet] if packet is not None else []
            at += (length + 3) & ~3
        return found


def packet_of(prefix: str, data: bytes) -> Logged | None:
    """Read the head of an IP packet; None for anything else. Ports only where they come right behind the IP header."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        start, protocol, ends = 4 * (data[0] & 15), data[9], (data[12:16], data[16:20])
        first = not int.from_bytes(data[6:8], "big") & 0x1FFF
    elif version == 6 and len(data) >= 40:
        start, protocol, ends, first = 40, data[6], (data[8:24], data[24:40]), True
    else:
        return None
    ports = struct.unpack_from("!HH", data, start) if protocol in PORTED and first and len(data) >= start + 4 else (0, 0)
    source, destination = (str(ipaddress.ip_address(end)) for end in ends)
    return Logged(prefix, PROTOCOLS.get(protocol, str(protocol)), source, destination, *ports)
