"""Telling both ends that a connection is over, when all that is known of it is its entry in the tracking table.

A client whose entry is merely deleted may wait for a quarter of an hour: what it sends next is a new flow in the middle of a
connection, a rule's ICMP refusal does not end an established socket, and an address without any rule is silent. A reset from
us would have to carry sequence numbers, which the kernel does not tell. So somebody who knows them is made to speak:

    1  the flow's entry is replaced:   client -> service becomes   client -> this node's own address, port 0
    2  an octet with numbers by chance is sent, which all but surely are none it waits for:
                                                                    this node:0 -> client, seen there as from the service
    3  the client throws it away and says what it waits for         client -> service, now this node:0
    4  nobody can listen on port 0: the node resets, with the numbers it was told; the client's socket is closed

Whatever the mode's rules say of the service, they are not asked: the entry is there before the packet. Where the client does
not answer (2) it is told when it next sends, as long as the entry lasts (LINGER). A packet of the old backend finds no entry,
reaches the client from an address it never talked to, and is reset by it.

SCTP has tags instead of numbers, and the tracking table tells them: (2) is an ABORT, and no more is needed. The backend is not
told; its own path supervision ends the association.

Source: net/netfilter/nf_conntrack_netlink.c (ctnetlink_create_conntrack), net/ipv4/tcp_input.c (tcp_validate_incoming), RFC
9293 3.10.7.4, RFC 9260 3.3.7.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
from collections.abc import Sequence

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import conntrack_codec as codec
from kernelstate.linux.nfnetlink import NLM_F_CREATE, NLM_F_EXCL, NfNetlink, attribute, nested
from kernelstate.objects.address import Family, address_text
from kernelstate.ports import ConntrackEntry

LINGER = 120
"""Seconds for which a client that did not answer is still told when it speaks."""
TRIES = 3
"""A packet of the client between deletion and replacement makes an entry of its own; how often that is deleted again."""

PORT = 0
SEEN_REPLY, ASSURED, CONFIRMED = 1 << 1, 1 << 2, 1 << 3
TCP_ESTABLISHED, SCTP_ESTABLISHED = 3, 4
BE_LIBERAL = 0x08
"""IP_CT_TCP_FLAG_BE_LIBERAL: this entry knows no window, any number is in it."""
TCP_FLAGS_ORIG, TCP_FLAGS_REPLY = 4, 5
NAT_MIN_IP: dict[int, int] = {4: 1, 6: 4}
NAT_PROTO = 3
ACK = 0x10
OCTET = b"\0"
"""A segment without data is answered twice a second at most (tcp_oow_rate_limited), and the client may just have been asked."""
ABORT_CHUNK = struct.pack(">BBH", 6, 0, 4)


def refuse(entries: Sequence[ConntrackEntry], refuser: int) -> None:
    """Replace flows whose entries were just deleted, and provoke their clients. Raises KernelRefusedError."""
    with NfNetlink() as netlink:
        for start in range(0, len(entries), codec.BATCH):
            _replace(netlink, entries[start : start + codec.BATCH], refuser)
    with contextlib.ExitStack() as undo:
        sockets: dict[tuple[Family, str, int], socket.socket] = {}
        for entry in entries:
            own = _refuser(entry, refuser)
            kind = (entry.family, entry.protocol, own)
            if kind not in sockets:
                sockets[kind] = undo.enter_context(_raw_socket(*kind))
            # Best effort: a firewall's refusal here, or a full queue, leaves the client to be told when it next speaks.
            with contextlib.suppress(OSError):
                sockets[kind].sendto(_provocation(entry, own), (address_text(entry.family, entry.source), 0))


def _replace(netlink: NfNetlink, entries: Sequence[ConntrackEntry], refuser: int) -> None:
    """Create the entries that lead to port 0; where another has come up meanwhile, that one goes first."""
    left = list(entries)
    for _ in range(TRIES):
        requests = [(codec.ADDRESS_FAMILY[e.family], _replacement(e, _refuser(e, refuser))) for e in left]
        codes = netlink.execute(codec.CT_NEW, requests, NLM_F_CREATE | NLM_F_EXCL)
        for entry, code in zip(left, codes, strict=True):
            if code not in {0, errno.EEXIST}:
                raise KernelRefusedError("replace conntrack entry", str(entry), os.strerror(code))
        left = [entry for entry, code in zip(left, codes, strict=True) if code == errno.EEXIST]
        if not left:
            return
        netlink.execute(codec.CT_DELETE, [(codec.ADDRESS_FAMILY[e.family], codec.key(e)) for e in left])


def _refuser(entry: ConntrackEntry, refuser: int) -> int:
    """Return where to send a flow: one to 127.0.0.0/8 or ::1 has to stay on loopback."""
    loopback = entry.destination >> 24 == 127 if entry.family == 4 else entry.destination == 1
    return entry.destination if loopback else refuser


def _replacement(entry: ConntrackEntry, own: int) -> bytes:
    """Encode an entry of the same flow, established, with its destination translated to ``own`` port 0."""
    family, protocol = entry.family, codec.PROTOCOLS[entry.protocol]
    size = 4 if family == 4 else 16
    reverse = (entry.destination, entry.source, entry.destination_port, entry.source_port)
    address, port = own.to_bytes(size, "big"), PORT.to_bytes(2, "big")
    first = NAT_MIN_IP[family]
    return b"".join(
        (
            codec.key(entry),
            codec.write_tuple(codec.TUPLE_REPLY, family, protocol, reverse),
            attribute(codec.STATUS, struct.pack(">I", SEEN_REPLY | ASSURED | CONFIRMED)),
            attribute(codec.TIMEOUT, struct.pack(">I", LINGER)),
            nested(codec.PROTOINFO, nested(codec.PROTOINFO_OF[entry.protocol], *_protocol_state(entry))),
            nested(
                codec.NAT_DST,
                attribute(first, address),
                attribute(first + 1, address),
                nested(NAT_PROTO, attribute(1, port), attribute(2, port)),
            ),
        )
    )


def _protocol_state(entry: ConntrackEntry) -> list[bytes]:
    if entry.protocol == "tcp":
        liberal = bytes([BE_LIBERAL, BE_LIBERAL])  # flags and the mask of flags that are set
        return [
            attribute(codec.PROTOINFO_STATE, bytes([TCP_ESTABLISHED])),
            attribute(TCP_FLAGS_ORIG, liberal),
            attribute(TCP_FLAGS_REPLY, liberal),
        ]
    return [
        attribute(codec.PROTOINFO_STATE, bytes([SCTP_ESTABLISHED])),
        attribute(codec.SCTP_TAG_ORIG, entry.tags[0].to_bytes(4, "big")),
        attribute(codec.SCTP_TAG_REPLY, entry.tags[1].to_bytes(4, "big")),
    ]


def _raw_socket(family: Family, protocol: str, own: int) -> socket.socket:
    raw = socket.socket(codec.ADDRESS_FAMILY[family], socket.SOCK_RAW | socket.SOCK_CLOEXEC, codec.PROTOCOLS[protocol])
    raw.setblocking(False)
    raw.bind((address_text(family, own), 0))
    return raw


def _provocation(entry: ConntrackEntry, own: int) -> bytes:
    """Return the segment that makes a client speak (TCP) or ends its association (SCTP); the node's IP header comes before it."""
    if entry.protocol == "sctp":
        # No checksum: translating the port of this packet writes it anew (sctp_manip_pkt).
        return struct.pack(">HHII", PORT, entry.source_port, entry.tags[1], 0) + ABORT_CHUNK
    numbers = (secrets.randbits(32), secrets.randbits(32))
    segment = struct.pack(">HHIIBBHHH", PORT, entry.source_port, *numbers, 5 << 4, ACK, 0, 0, 0) + OCTET
    size = 4 if entry.family == 4 else 16
    pseudo = (
        own.to_bytes(size, "big") + entry.source.to_bytes(size, "big") + struct.pack(">II", len(segment), socket.IPPROTO_TCP)
    )
    return segment[:16] + _checksum(pseudo + segment).to_bytes(2, "big") + segment[18:]


def _checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071); the pseudo headers of both families sum up alike."""
    data += b"\0" * (len(data) % 2)
    words: tuple[int, ...] = struct.unpack(f">{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
