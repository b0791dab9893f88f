"""Services in the bytes of the kernel's maps: the twin of packetpath/include/np_services.h. Meets no kernel.

an end       address (16 bytes, IPv4 as ::ffff:a.b.c.d), port (network order), protocol
a service    pool, first slot, how many, seconds of affinity, for whom, refuses
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec

from kernelstate.objects.address import Family
from kernelstate.objects.ebpf import NODE_PORT, Pool, SocketFrontend, SocketProtocol, SocketService, Who

BUILD = 8
COUNTERS = ("translated", "refused", "left")
"""The program's enum, in its order."""
REFUSES, PODS_ONLY = 1, 2
_MAPPED = bytes(10) + b"\xff\xff"
_PROTOCOLS: dict[SocketProtocol, int] = {"tcp": 6, "udp": 17}
_PROTOCOL_NAMES: dict[int, SocketProtocol] = {number: name for name, number in _PROTOCOLS.items()}
_END, _END4 = struct.Struct("!16sHBx"), struct.Struct("!QIIHBx")
"""The second: one of IPv4, by numbers alone."""
_SERVICE = struct.Struct("=QIIIBBxx")
_MEMBER = struct.Struct("=Q20sxxxx")
_SETTINGS = struct.Struct("=8sQ")
_WORD = struct.Struct("=I")

END, SERVICE, MEMBER, SETTINGS, ADDRESS = _END.size, _SERVICE.size, _MEMBER.size, _SETTINGS.size, 16
"""Sizes in bytes."""


class Placed(NamedTuple):
    """A service as a map holds it: where the endpoints of its pool lie."""

    service: SocketService
    first: int
    size: int
    pods_only: bool = False


class Settings(msgspec.Struct, frozen=True):
    """Of which build the programs are, and the cookie of the node's network namespace."""

    build: bytes
    node: int


def pack_address(family: Family, address: int) -> bytes:
    """Pack an address."""
    return _MAPPED + address.to_bytes(4, "big") if family == 4 else address.to_bytes(16, "big")


def read_address(data: bytes) -> tuple[Family, int]:
    """Read an address."""
    return (4, int.from_bytes(data[12:16], "big")) if data[:12] == _MAPPED else (6, int.from_bytes(data[:16], "big"))


def pack_end(family: Family, protocol: SocketProtocol, address: int, port: int) -> bytes:
    """Pack a frontend or an endpoint."""
    return _END.pack(pack_address(family, address), port, _PROTOCOLS[protocol])


def pack_frontend(frontend: SocketFrontend) -> bytes:
    """Pack the key of a frontend. The address of NodePorts is 0 in both families."""
    assert NODE_PORT == 0
    if frontend.family == 4:
        return _END4.pack(0, 0xFFFF, frontend.address, frontend.port, _PROTOCOLS[frontend.protocol])
    return pack_end(frontend.family, frontend.protocol, frontend.address, frontend.port)


def read_frontend(data: bytes) -> SocketFrontend:
    """Read a frontend or an endpoint. Raises KeyError for a protocol that nobody of ours wrote."""
    address, port, protocol = _END.unpack(data[:END])
    family, number = read_address(address)
    return SocketFrontend(family, _PROTOCOL_NAMES[protocol], number, port)


def pack_service(placed: Placed) -> bytes:
    """Pack the value of a frontend."""
    service, first, size, pods_only = placed
    how = (REFUSES if service.refuses else 0) | (PODS_ONLY if pods_only else 0)
    return _SERVICE.pack(service.pool, first, size, service.affinity, service.who, how)


def read_service(data: bytes) -> Placed:
    """Read the value of a frontend."""
    pool, first, count, affinity, who, how = _SERVICE.unpack(data)
    service = SocketService(pool, Who(who & (Who.NODE | Who.PODS)), bool(how & REFUSES), affinity)
    return Placed(service, first, count, bool(how & PODS_ONLY))


def pack_member(pool: int, end: bytes) -> bytes:
    """Pack the key that says: this packed endpoint is one of this pool."""
    return _MEMBER.pack(pool, end)


def pack_who(who: Who) -> bytes:
    """Pack who may use an address of the node."""
    return _WORD.pack(who)


def read_who(data: bytes) -> Who:
    """Read who may use an address of the node."""
    return Who(_WORD.unpack(data)[0] & (Who.NODE | Who.PODS))


def pack_index(slot: int) -> bytes:
    """Pack the key of a slot."""
    return _WORD.pack(slot)


def pack_pool(pool: Pool) -> list[bytes]:
    """Pack what the slots of a pool hold."""
    number = _PROTOCOLS[pool.protocol]
    if pool.family == 4:
        pack = _END4.pack
        return [pack(0, 0xFFFF, address, port, number) for address, port in pool.endpoints]
    return [_END.pack(address.to_bytes(16, "big"), port, number) for address, port in pool.endpoints]


def pack_settings(settings: Settings) -> bytes:
    """Pack the settings."""
    return _SETTINGS.pack(settings.build, settings.node)


def read_settings(data: bytes) -> Settings:
    """Read the settings."""
    return Settings(*_SETTINGS.unpack(data))
