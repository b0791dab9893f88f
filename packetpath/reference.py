"""The packet path said slowly: what the forwarder does to packets, in plain Python. The C is tested against it, byte for byte.

    leave      a packet from a pod: which node is it for?            segments   a superpacket, as it goes over the wire
    arrive     a datagram from a node: may it come in?               merged     packets of a flow, as they are given to the TUN
    complaint  the ICMP error a pod is sent

Imports nothing of ours. Sources: RFC 791, 8200, 1071, 792, 4443, 1122; flannel's udp backend for the wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, NamedTuple, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Fate: TypeAlias = Literal["goes", "no_route", "ttl_exceeded", "unknown_peer", "wrong_source", "malformed"]
Table: TypeAlias = Mapping[Network, tuple[Address, int]]
"""Inner prefix to outer address and port."""
FATES: tuple[Fate, ...] = ("goes", "no_route", "ttl_exceeded", "unknown_peer", "wrong_source", "malformed")
COMPLAINTS = ("net-unreachable", "time-exceeded", "too-big")
ICMP, TCP, UDP, ICMPV6, FRAGMENT = 1, 6, 17, 58, 44
MERGE_MOST = 128
_ICMP_ERROR_ROOM = 1280


class Ip(NamedTuple):
    """What a packet's IP header says. ``header`` and ``total`` in bytes."""

    version: int
    header: int
    total: int
    protocol: int
    hops: int
    source: Address
    destination: Address
    fragment: bool
    first: bool


def parse(packet: bytes) -> Ip | None:
    """Read a packet's header; None if it is no IP packet, or shorter than it says."""
    if len(packet) < 20:
        return None
    if packet[0] >> 4 == 4:
        header, total, offset = (packet[0] & 15) * 4, _get16(packet, 2), _get16(packet, 6)
        if header < 20 or total < header or total > len(packet):
            return None
        ends = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
        return Ip(4, header, total, packet[9], packet[8], *ends, bool(offset & 0x3FFF), not offset & 0x1FFF)
    if packet[0] >> 4 != 6 or len(packet) < 40:
        return None
    total = 40 + _get16(packet, 4)
    if total > len(packet):
        return None
    fragment = packet[6] == FRAGMENT
    first = not fragment or (total >= 48 and not _get16(packet, 42) & 0xFFF8)
    return Ip(6, 40, total, packet[6], packet[7], IPv6Address(packet[8:24]), IPv6Address(packet[24:40]), fragment, first)


def peer_of(table: Table, inner: Address) -> tuple[Address, int] | None:
    """Return the node that an inner address belongs to: that of the longest prefix."""
    fitting = [network for network in table if network.version == inner.version and inner in network]
    return table[max(fitting, key=lambda n: n.prefixlen)] if fitting else None


def leave(table: Table, packet: bytes) -> tuple[Fate, bytes, tuple[Address, int] | None]:
    """Judge a packet from a pod; return its fate, the packet as it is afterwards, and where it is sent."""
    ip = parse(packet)
    if ip is None:
        return "malformed", packet, None
    peer = peer_of(table, ip.destination)
    if peer is None:
        return "no_route", packet, None
    if ip.hops <= 1:
        return "ttl_exceeded", packet, None
    return "goes", one_hop_further(packet, ip), peer


def arrive(table: Table, packet: bytes, outer: Address) -> tuple[Fate, bytes]:
    """Judge a datagram's packet that came from the node at ``outer``."""
    if all(address != outer for address, _ in table.values()):
        return "unknown_peer", packet
    ip = parse(packet)
    if ip is None:
        return "malformed", packet
    owner = peer_of(table, ip.source)
    if owner is None or owner[0] != outer:
        return "wrong_source", packet
    if ip.hops <= 1:
        return "ttl_exceeded", packet
    return "goes", one_hop_further(packet, ip)


def one_hop_further(packet: bytes, ip: Ip) -> bytes:
    """Take one from TTL or hop limit. A wrong IPv4 checksum stays as wrong as it was: it is patched by the difference."""
    changed = bytearray(packet)
    if ip.version == 6:
        changed[7] -= 1
        return bytes(changed)
    before = _get16(packet, 8)
    changed[8] -= 1
    patched = ~_folded((~_get16(packet, 10) & 0xFFFF) + (~before & 0xFFFF) + _get16(changed, 8)) & 0xFFFF
    changed[10:12] = struct.pack("!H", patched)
    return bytes(changed)


def segments(packet: bytes, protocol: int, size: int) -> list[bytes]:
    """Cut a TCP or UDP superpacket into packets with at most ``size`` bytes of payload each, every checksum complete."""
    ip = parse(packet)
    assert ip is not None
    start = ip.header + ((packet[ip.header + 12] >> 4) * 4 if protocol == TCP else 8)
    pieces = [packet[at : min(at + size, ip.total)] for at in range(start, ip.total, size)]
    found = []
    for number, piece in enumerate(pieces):
        head = bytearray(packet[:start])
        if protocol == TCP:
            head[ip.header + 4 : ip.header + 8] = struct.pack(
                "!I", (_get32(packet, ip.header + 4) + number * size) & 0xFFFFFFFF
            )
            if number < len(pieces) - 1:
                head[ip.header + 13] &= ~0x09 & 0xFF  # FIN and PSH are the last one's
            if number:
                head[ip.header + 13] &= ~0x80 & 0xFF  # CWR the first one's
        if ip.version == 4:
            head[4:6] = struct.pack("!H", (_get16(packet, 4) + number) & 0xFFFF)
        found.append(_completed(bytes(head) + piece, ip.header, protocol))
    return found


class Written(NamedTuple):
    """What is written to the TUN: a packet, or with ``size`` a superpacket whose segments have that much payload."""

    packet: bytes
    size: int = 0


def merged(packets: Iterable[bytes], *, udp: bool) -> list[Written]:
    """Join packets that follow one another in a flow. A superpacket's transport checksum is the pseudo header's alone."""
    found: list[Written] = []
    waiting: list[bytes] = []
    for packet in packets:
        ip = parse(packet)
        if ip is None:
            continue
        packet = packet[: ip.total]  # noqa: PLW2901  what is behind its end is nothing
        if waiting and _may_follow(waiting, packet, udp=udp):
            waiting.append(packet)
            continue
        found += [_joined(waiting)] if waiting else []
        waiting = [packet]
    return found + ([_joined(waiting)] if waiting else [])


def complaint(packet: bytes, own: bytes, what: str, mtu: int) -> bytes:
    """Return the ICMP error that a packet's sender is sent from ``own``; empty where there must be none."""
    ip = parse(packet)
    if ip is None or not ip.first or ip.total <= ip.header:
        return b""
    kind = packet[ip.header]
    if ip.version == 4:
        to_host = 0 < packet[12] < 224 and packet[16] < 224
        if not to_host or (ip.protocol == ICMP and kind not in (8, 13)):
            return b""
        kinds = {"net-unreachable": (3, 0), "time-exceeded": (11, 0), "too-big": (3, 4)}
        quote = packet[: min(ip.total, ip.header + 8)]
        body = bytes(kinds[what]) + b"\0\0" + struct.pack("!HH", 0, mtu if what == "too-big" else 0) + quote
        body = body[:2] + _checksum(body) + body[4:]
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, ICMP, 0, own[:4], packet[12:16])
        return head[:10] + _checksum(head) + head[12:] + body
    if packet[8] == 0xFF or not any(packet[8:24]) or packet[24] == 0xFF or (ip.protocol == ICMPV6 and kind < 128):
        return b""
    kinds = {"net-unreachable": (1, 0), "time-exceeded": (3, 0), "too-big": (2, 0)}
    quote = packet[: min(ip.total, _ICMP_ERROR_ROOM - 48)]
    body = bytes(kinds[what]) + b"\0\0" + struct.pack("!I", mtu if what == "too-big" else 0) + quote
    head = struct.pack("!IHBB16s16s", 0x60000000, len(body), ICMPV6, 64, own, packet[8:24])
    body = body[:2] + _checksum(_pseudo(head, 6, ICMPV6, len(body)) + body) + body[4:]
    return head + body


# -- joining -----------------------------------------------------------------------------------------------------------


def _payload(packet: bytes, ip: Ip, *, udp: bool) -> int:
    """Return where a packet's payload begins if it is one that may be joined, else 0."""
    if ip.fragment or (ip.version == 4 and ip.header != 20):
        return 0
    if ip.protocol == UDP and udp and ip.total > ip.header + 8:
        whole = _get16(packet, ip.header + 4) == ip.total - ip.header
        return ip.header + 8 if whole and _get16(packet, ip.header + 6) else 0
    if ip.protocol != TCP or ip.total <= ip.header + 20:
        return 0
    at = ip.header + (packet[ip.header + 12] >> 4) * 4
    return at if packet[ip.header + 13] & ~0x08 == 0x10 and ip.header + 20 <= at < ip.total and at <= 120 else 0


def _may_follow(waiting: Sequence[bytes], packet: bytes, *, udp: bool) -> bool:
    first, last = waiting[0], waiting[-1]
    ip, other = parse(first), parse(packet)
    assert ip is not None
    assert other is not None
    start = _payload(first, ip, udp=udp)
    if not start or (other.version, other.protocol) != (ip.version, ip.protocol) or _payload(packet, other, udp=True) != start:
        return False
    size = len(first) - start
    ended = len(last) - start < size or (ip.protocol == TCP and any(one[ip.header + 13] & 0x08 for one in waiting))
    total = sum(len(one) - start for one in waiting) + start + len(packet) - start
    if ended or len(packet) > len(first) or total > 65535 or len(waiting) == MERGE_MOST:
        return False
    if not _same_flow(first, packet, ip, start) or not all(_is_right(one) for one in (first, packet)):
        return False
    if ip.protocol == UDP:
        return True
    return _get32(packet, ip.header + 4) == (_get32(last, ip.header + 4) + len(last) - start) & 0xFFFFFFFF


def _same_flow(a: bytes, b: bytes, ip: Ip, start: int) -> bool:
    """Whether headers differ in nothing but lengths, identification, sequence number, PSH and checksums."""

    def kept(packet: bytes) -> bytes:
        head = packet[0:2] + packet[6:10] + packet[12:20] if ip.version == 4 else packet[0:4] + packet[6:40]
        transport = packet[ip.header : start]
        if ip.protocol == UDP:
            return head + transport[:4]
        return head + transport[:4] + transport[8:13] + bytes([transport[13] & ~0x08]) + transport[14:16] + transport[18:]

    return kept(a) == kept(b)


def _joined(waiting: Sequence[bytes]) -> Written:
    if len(waiting) == 1:
        return Written(waiting[0])
    ip = parse(waiting[0])
    assert ip is not None
    start = _payload(waiting[0], ip, udp=True)
    head = bytearray(waiting[0][:start])
    if ip.protocol == TCP:
        head[ip.header + 13] |= waiting[-1][ip.header + 13] & 0x08
    packet = bytearray(bytes(head) + b"".join(one[start:] for one in waiting))
    _set_lengths(packet, ip.header, ip.protocol)
    at = ip.header + (16 if ip.protocol == TCP else 6)
    packet[at : at + 2] = struct.pack("!H", _folded(_sum(_pseudo(packet, ip.version, ip.protocol, len(packet) - ip.header))))
    return Written(bytes(packet), len(waiting[0]) - start)


def _is_right(packet: bytes) -> bool:
    """Whether the transport checksum is right."""
    ip = parse(packet)
    assert ip is not None
    return (
        _folded(_sum(_pseudo(packet, ip.version, ip.protocol, ip.total - ip.header) + packet[ip.header : ip.total])) == 0xFFFF
    )


# -- lengths and checksums ---------------------------------------------------------------------------------------------


def _completed(packet: bytes, header: int, protocol: int) -> bytes:
    """Return a packet with lengths and checksums as they must be."""
    changed = bytearray(packet)
    _set_lengths(changed, header, protocol)
    at = header + (16 if protocol == TCP else 6)
    changed[at : at + 2] = b"\0\0"
    check = _checksum(_pseudo(changed, changed[0] >> 4, protocol, len(changed) - header) + bytes(changed[header:]))
    changed[at : at + 2] = b"\xff\xff" if protocol == UDP and check == b"\0\0" else check
    return bytes(changed)


def _set_lengths(packet: bytearray, header: int, protocol: int) -> None:
    if packet[0] >> 4 == 4:
        packet[2:4] = struct.pack("!H", len(packet))
        packet[10:12] = b"\0\0"
        packet[10:12] = _checksum(bytes(packet[:header]))
    else:
        packet[4:6] = struct.pack("!H", len(packet) - 40)
    if protocol == UDP:
        packet[header + 4 : header + 6] = struct.pack("!H", len(packet) - header)


def _pseudo(packet: bytes | bytearray, version: int, protocol: int, length: int) -> bytes:
    ends = packet[12:20] if version == 4 else packet[8:40]
    return bytes(ends) + struct.pack("!II", length, protocol)


def _checksum(data: bytes) -> bytes:
    return struct.pack("!H", ~_folded(_sum(data)) & 0xFFFF)


def _sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    return sum(struct.unpack(f"!{len(data) // 2}H", data))


def _folded(total: int) -> int:
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _get16(data: bytes | bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def _get32(data: bytes | bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
