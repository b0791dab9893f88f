"""The connection tracking table: dumping the flows of a protocol, deleting exact flows.

    original   client:sport  -> service:dport     as sent                 CTA_TUPLE_ORIG
    reply      backend:port  -> client:sport      as answered, after DNAT CTA_TUPLE_REPLY

Decides nothing: which flows are stale is a feature's question. The kernel filters by protocol where it can (since 5.8); what
an older one sends besides is dropped here. Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from kernelstate.errors import KernelRefusedError
from kernelstate.linux.nfnetlink import NfNetlink, attribute, attributes, nested
from kernelstate.objects.address import Family
from kernelstate.ports import ConntrackEntry

CT_GET, CT_DELETE = 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK is 1
TUPLE_ORIG, TUPLE_REPLY, MARK, ZONE, FILTER = 1, 2, 8, 18, 25
TUPLE_IP, TUPLE_PROTO = 1, 2
PROTO_NUM, PROTO_SRC_PORT, PROTO_DST_PORT = 1, 2, 3
FILTER_ORIG_FLAGS, FILTER_PROTO_NUM = 1, 1 << 3
IP_SRC: dict[int, int] = {4: 1, 6: 3}  # CTA_IP_V4_SRC, CTA_IP_V6_SRC; the destination is the next number

PROTOCOLS: dict[str, int] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}
ADDRESS_FAMILY: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
BATCH = 64
"""Deletions to one datagram."""


class Conntrack:
    """Implements ``ports.ConntrackPort`` for the network namespace of the calling thread."""

    def entries(self, family: Family, protocol: str) -> list[ConntrackEntry]:
        """Dump the flows of one protocol. Raises KernelRefusedError."""
        query = nested(TUPLE_ORIG, nested(TUPLE_PROTO, attribute(PROTO_NUM, bytes([PROTOCOLS[protocol]]))))
        query += nested(FILTER, attribute(FILTER_ORIG_FLAGS, struct.pack("=I", FILTER_PROTO_NUM)))
        with NfNetlink() as netlink:
            dump = netlink.dump(f"dump {protocol} conntrack entries", CT_GET, ADDRESS_FAMILY[family], query)
            found = (_entry(family, protocol, message) for message in dump)
            return [entry for entry in found if entry is not None]

    def delete(self, entries: Sequence[ConntrackEntry]) -> int:
        """Delete exactly these; those already gone do not count. Raises KernelRefusedError at the first that is refused."""
        deleted = 0
        with NfNetlink() as netlink:
            for start in range(0, len(entries), BATCH):
                batch = entries[start : start + BATCH]
                codes = netlink.execute(CT_DELETE, [(ADDRESS_FAMILY[entry.family], _key(entry)) for entry in batch])
                for entry, code in zip(batch, codes, strict=True):
                    if code not in {0, errno.ENOENT}:
                        raise KernelRefusedError("delete conntrack entry", str(entry), os.strerror(code))
                    deleted += code == 0
        return deleted


def _entry(family: Family, protocol: str, message: tuple[bytes, int, int]) -> ConntrackEntry | None:
    """Read one message; None when it is of another protocol."""
    data, start, end = message
    found = attributes(data, start, end)
    original = _tuple(family, data, *found[TUPLE_ORIG])
    reply = _tuple(family, data, *found[TUPLE_REPLY])
    if original[4] != PROTOCOLS[protocol]:
        return None
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
    )


def _tuple(family: Family, data: bytes, start: int, end: int) -> tuple[int, int, int, int, int]:
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


def _key(entry: ConntrackEntry) -> bytes:
    """Encode what identifies a flow: its original tuple and its zone."""
    size = 4 if entry.family == 4 else 16
    first = IP_SRC[entry.family]
    key = nested(
        TUPLE_ORIG,
        nested(
            TUPLE_IP,
            attribute(first, entry.source.to_bytes(size, "big")),
            attribute(first + 1, entry.destination.to_bytes(size, "big")),
        ),
        nested(
            TUPLE_PROTO,
            attribute(PROTO_NUM, bytes([PROTOCOLS[entry.protocol]])),
            attribute(PROTO_SRC_PORT, entry.source_port.to_bytes(2, "big")),
            attribute(PROTO_DST_PORT, entry.destination_port.to_bytes(2, "big")),
        ),
    )
    return key + attribute(ZONE, entry.zone.to_bytes(2, "big")) if entry.zone else key
