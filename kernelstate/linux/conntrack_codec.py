"""How a tracked flow is written as netlink attributes: reading one entry, naming one.

    CTA_TUPLE_ORIG   client -> service      CTA_TUPLE_REPLY   backend -> client, after DNAT
    CTA_PROTOINFO    the state of a TCP connection or an SCTP association, and the latter's verification tags

Decides what a state means for the three stages of ``ConntrackEntry``; sends nothing.
Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_tcp.h, nf_conntrack_sctp.h.
"""

from __future__ import annotations

import socket
import struct
from typing import Literal, TypeAlias

from kernelstate.linux.nfnetlink import attribute, attributes, nested
from kernelstate.objects.address import Family
from kernelstate.ports import ConntrackEntry

CT_NEW, CT_GET, CT_DELETE = 1 << 8, 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK is 1
TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, TIMEOUT, MARK, NAT_DST, ZONE, FILTER = 1, 2, 3, 4, 7, 8, 13, 18, 25
TUPLE_IP, TUPLE_PROTO = 1, 2
PROTO_NUM, PROTO_SRC_PORT, PROTO_DST_PORT = 1, 2, 3
FILTER_ORIG_FLAGS, FILTER_PROTO_NUM = 1, 1 << 3
IP_SRC: dict[int, int] = {4: 1, 6: 3}
"""CTA_IP_V4_SRC, CTA_IP_V6_SRC; the destination is the next number."""
PROTOINFO_OF: dict[str, int] = {"tcp": 1, "sctp": 3}
PROTOINFO_STATE, SCTP_TAG_ORIG, SCTP_TAG_REPLY = 1, 2, 3

PROTOCOLS: dict[str, int] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}
ADDRESS_FAMILY: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
BATCH = 64
"""Requests to one datagram."""

Stage: TypeAlias = Literal["", "opening", "open", "over"]

_OPENING = {"tcp": {1, 9}, "sctp": {2}}  # SYN_SENT, SYN_SENT2; COOKIE_WAIT
_OVER = {"tcp": {0, 7, 8}, "sctp": {0, 1, 7}}  # NONE, TIME_WAIT, CLOSE; NONE, CLOSED, SHUTDOWN_ACK_SENT


def protocol_query(protocol: str) -> bytes:
    """Return the attributes that ask for the flows of one protocol alone."""
    wanted = nested(TUPLE_ORIG, nested(TUPLE_PROTO, attribute(PROTO_NUM, bytes([PROTOCOLS[protocol]]))))
    return wanted + nested(FILTER, attribute(FILTER_ORIG_FLAGS, struct.pack("=I", FILTER_PROTO_NUM)))


def read_entry(family: Family, protocol: str, message: tuple[bytes, int, int]) -> ConntrackEntry | None:
    """Read one message; None when it is of another protocol."""
    data, start, end = message
    found = attributes(data, start, end)
    original = _read_tuple(family, data, *found[TUPLE_ORIG])
    reply = _read_tuple(family, data, *found[TUPLE_REPLY])
    if original[4] != PROTOCOLS[protocol]:
        return None
    stage, tags = _progress(protocol, data, found.get(PROTOINFO))
    return ConntrackEntry(
        family,
        protocol,
        source=original[0],
        destination=original[1],
        source_port=original[2],
        destination_port=original[3],
        reply_source=reply[0],
        reply_source_port=reply[2],
        zone=_number(data, found.get(ZONE)),
        mark=_number(data, found.get(MARK)),
        stage=stage,
        tags=tags,
    )


def key(entry: ConntrackEntry) -> bytes:
    """Encode what identifies a flow: its original tuple and its zone."""
    ends = (entry.source, entry.destination, entry.source_port, entry.destination_port)
    found = write_tuple(TUPLE_ORIG, entry.family, PROTOCOLS[entry.protocol], ends)
    return found + attribute(ZONE, entry.zone.to_bytes(2, "big")) if entry.zone else found


def write_tuple(kind: int, family: Family, protocol: int, ends: tuple[int, int, int, int]) -> bytes:
    """Encode one direction of a flow; ``ends`` are source, destination and their ports."""
    source, destination, port, to_port = ends
    size = 4 if family == 4 else 16
    first = IP_SRC[family]
    return nested(
        kind,
        nested(
            TUPLE_IP,
            attribute(first, source.to_bytes(size, "big")),
            attribute(first + 1, destination.to_bytes(size, "big")),
        ),
        nested(
            TUPLE_PROTO,
            attribute(PROTO_NUM, bytes([protocol])),
            attribute(PROTO_SRC_PORT, port.to_bytes(2, "big")),
            attribute(PROTO_DST_PORT, to_port.to_bytes(2, "big")),
        ),
    )


def _progress(protocol: str, data: bytes, span: tuple[int, int] | None) -> tuple[Stage, tuple[int, int]]:
    """Return where a flow stands, and its verification tags."""
    if span is None or protocol not in PROTOINFO_OF:
        return "", (0, 0)
    inner = attributes(data, *span).get(PROTOINFO_OF[protocol])
    parts = attributes(data, *inner) if inner else {}
    state = _number(data, parts.get(PROTOINFO_STATE))
    tags = (0, 0)
    if protocol == "sctp":
        tags = (_number(data, parts.get(SCTP_TAG_ORIG)), _number(data, parts.get(SCTP_TAG_REPLY)))
    if state in _OPENING[protocol]:
        return "opening", tags
    return ("over" if state in _OVER[protocol] else "open"), tags


def _read_tuple(family: Family, data: bytes, start: int, end: int) -> tuple[int, int, int, int, int]:
    """Read (source, destination, source port, destination port, protocol)."""
    parts = attributes(data, start, end)
    addresses = attributes(data, *parts[TUPLE_IP])
    ports = attributes(data, *parts[TUPLE_PROTO])
    first = IP_SRC[family]
    return (
        _number(data, addresses.get(first)),
        _number(data, addresses.get(first + 1)),
        _number(data, ports.get(PROTO_SRC_PORT)),
        _number(data, ports.get(PROTO_DST_PORT)),
        _number(data, ports.get(PROTO_NUM)),
    )


def _number(data: bytes, span: tuple[int, int] | None) -> int:
    """Read a number in network order; absent is 0."""
    return int.from_bytes(data[span[0] : span[1]], "big") if span else 0
