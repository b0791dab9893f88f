"""The tunnel's settings and tables as the programs' C structs hold them. Meets no kernel.

    an address    16 bytes, IPv4 as ::ffff:a.b.c.d           a prefix    its length (IPv4: 96 more), then an address
    a place       outer address, whose                       a node      what the programs remember of it: zeros from us

Ports and VNIs are in network order, everything else in the machine's. Source: packetpath/bpf/{places.h,udp.h,guard.bpf.c}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from ipaddress import IPv6Address

import msgspec

from kernelstate.objects.address import IPAddress, Prefix
from kernelstate.objects.tunnel import Place, SourceGuard, UdpTunnel, Whose
from kernelstate.tunnel_tables import Tables

BUILD = 8
NODE = bytes(16)
COUNTERS: Mapping[str, tuple[str, ...]] = {
    "udp": (
        "sent_packets",
        "sent_bytes",
        "received_packets",
        "received_bytes",
        "passed_out",
        "passed_in",
        "unfinished",
        "unknown_peer",
        "wrong_source",
        "malformed",
        "send_errors",
    ),
    "guard": (
        "checked",
        "vxlan_unknown_peer",
        "vxlan_wrong_source",
        "vxlan_malformed",
        "plain_own_source",
        "plain_unknown_source",
        "plain_malformed",
    ),
}
"""The programs' enums, in their order."""
TUNNELS = 4
"""VXLAN tunnels that the guard has room for."""
_MAPPED = bytes(10) + b"\xff\xff"
_LENGTH, _WHOSE = struct.Struct("=I"), struct.Struct("=I")
_UDP = struct.Struct("=8s16s16sII2sBBB3xI")
_TUNNEL = struct.Struct("=2s2x4s")
_GUARD = struct.Struct("=8s32sIIB3x")


class Uplink(msgspec.Struct, frozen=True):
    """What the programs have to know of the uplink: its index, and whether packets there start with an Ethernet header."""

    index: int
    has_frames: bool


class UdpLinks(msgspec.Struct, frozen=True):
    """The links of a tunnel by their index; ``merge`` 0: there is no way that merges segments.

    ``finishes``: the kernel completes every checksum before the uplink, so none leaves unfinished.
    """

    uplink: Uplink
    tunnel: int
    merge: int
    finishes: bool


def pack_address(address: IPAddress) -> bytes:
    """Pack an address."""
    return address.packed if address.version == 6 else _MAPPED + address.packed


def read_address(data: bytes) -> IPAddress:
    """Read an address."""
    address = IPv6Address(data)
    return address.ipv4_mapped or address


def pack_prefix(prefix: Prefix) -> bytes:
    """Pack a key of the table of places."""
    if prefix.family == 4:
        return _LENGTH.pack(96 + prefix.length) + _MAPPED + prefix.network.to_bytes(4, "big")
    return _LENGTH.pack(prefix.length) + prefix.network.to_bytes(16, "big")


def read_prefix(data: bytes) -> Prefix:
    """Read a key of the table of places."""
    length = _LENGTH.unpack_from(data)[0]
    if data[4:16] == _MAPPED and length >= 96:
        return Prefix(4, int.from_bytes(data[16:], "big"), length - 96)
    return Prefix(6, int.from_bytes(data[4:], "big"), length)


def pack_place(place: Place) -> bytes:
    """Pack a value of the table of places."""
    return (pack_address(place.node) if place.node is not None else bytes(16)) + _WHOSE.pack(place.whose)


def pack_places(places: Iterable[Place]) -> dict[bytes, bytes]:
    """Pack many."""
    return {pack_prefix(place.prefix): pack_place(place) for place in places}


def read_tables(places: Mapping[bytes, bytes], nodes: Iterable[bytes]) -> Tables:
    """Read both tables; what is no place (nobody of ours wrote it) is taken for nobody's."""
    found = {}
    for key, value in places.items():
        prefix, number = read_prefix(key), _WHOSE.unpack_from(value, 16)[0]
        whose = Whose(number) if number in set(Whose) else Whose.NETWORK
        node = read_address(value[:16])
        found[prefix] = Place(prefix, whose, node if whose is Whose.PEER else None)
    return Tables(found, frozenset(read_address(node) for node in nodes))


def pack_udp(build: bytes, tunnel: UdpTunnel, links: UdpLinks) -> bytes:
    """Pack the settings of the UDP tunnel's programs."""
    by_family = {address.version: pack_address(address) for address in tunnel.local}
    return _UDP.pack(
        build,
        by_family.get(4, bytes(16)),
        by_family.get(6, bytes(16)),
        links.uplink.index,
        links.tunnel,
        tunnel.port.to_bytes(2, "big"),
        links.uplink.has_frames,
        0,  # a TUN's packets start with their IP header
        links.finishes,
        links.merge,
    )


def read_udp(data: bytes) -> tuple[int, int, int, tuple[IPAddress, ...]]:
    """Read what identifies a tunnel: the indices of uplink and link, the port, and our outer addresses."""
    _, local4, local6, uplink, tunnel, port, *_ = _UDP.unpack(data)
    local = tuple(read_address(one) for one in (local4, local6) if any(one))
    return uplink, tunnel, int.from_bytes(port, "big"), local


def read_guard(data: bytes) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Read what identifies a guard: the index of its uplink, and port and VNI of the tunnels."""
    _, tunnels, count, uplink, _ = _GUARD.unpack(data)
    found = list(_TUNNEL.iter_unpack(tunnels))[:count]
    return uplink, tuple((int.from_bytes(port, "big"), int.from_bytes(vni, "big") >> 8) for port, vni in found)


def read_build(data: bytes) -> bytes:
    """Read for which build of the programs settings were written."""
    return data[:BUILD]


def pack_guard(build: bytes, guard: SourceGuard, uplink: Uplink) -> bytes:
    """Pack the settings of the source guard. Raises ValueError for more tunnels than it has room for."""
    if len(guard.vxlan) > TUNNELS:
        raise ValueError(f"{len(guard.vxlan)} VXLAN tunnels; the guard looks into {TUNNELS}")
    tunnels = b"".join(_TUNNEL.pack(port.to_bytes(2, "big"), (vni << 8).to_bytes(4, "big")) for port, vni in guard.vxlan)
    return _GUARD.pack(build, tunnels, len(guard.vxlan), uplink.index, uplink.has_frames)
