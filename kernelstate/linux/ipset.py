"""ipset over netlink: sets and their members to and from its attributes, and doing it.

    ADD, DEL   PROTOCOL | SETNAME | LINENO | ADT { DATA { IP PORT PROTO IP2 CIDR2 } DATA { ... } ... }
                                              one message, hundreds of members; what follows a refused one is not tried

Implements ``reconcile_sets.IpsetPort``; decides nothing. Numbers are in network order and flagged so. Entries have a fixed size
for each type and family, and are packed in one go.

Source: include/uapi/linux/netfilter/ipset/ip_set.h, net/netfilter/ipset/ip_set_core.c (ip_set_ad, call_ad).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

from kernelstate.diff_sets import (
    BITMAP_PORTS,
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    SetChange,
    SetHeader,
    SwapSets,
)
from kernelstate.errors import KernelRefusedError, KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux.nfnetlink import NfNetlink, attribute, attributes, nested
from kernelstate.objects.sets import Member, SetSpec, SetType

SUBSYSTEM = 6 << 8
CREATE, DESTROY, SWAP, LIST, ADD, DEL, TYPE = (SUBSYSTEM | number for number in (2, 3, 6, 7, 9, 10, 13))
PROTOCOL_VERSION = 6
"""Understood by every kernel that has hash types with ports; 7 adds only commands that are not used here."""
PROTOCOL, SETNAME, TYPENAME, REVISION, SET_FAMILY, FLAGS, DATA, ADT, LINENO = range(1, 10)
IP, CIDR, PORT, PORT_TO, PROTO, IP2, CIDR2 = 1, 3, 4, 5, 7, 20, 21
CADT_FLAGS, HASHSIZE, MAXELEM, ELEMENTS, REFERENCES = 8, 18, 19, 24, 25
MEMBER_BYTES, MEMBER_PACKETS = 24, 25
WITH_COUNTERS = 1 << 3
LIST_HEADER = 4
NET_ORDER, NESTED = 0x4000, 0x8000
HASH_SIZE = 1024
"""Buckets at the start; the kernel doubles them as they fill."""
MESSAGE = 60_000
"""Bytes of members in one message: an attribute's length has 16 bits."""

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_PROTOCOL_NAMES: dict[int, str] = {number: name for name, number in PROTOCOLS.items()}
AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_WORDS = {
    4097: "the kernel speaks another protocol of ipset",
    4098: "no such set type in this kernel",
    4099: "too many sets",
    4100: "in use by a rule or another set",
    4102: "type or family differ",
    4103: "exists already",
    4104: "bad prefix length",
    4352: "set is full",
    4353: "an address of zeros cannot be a member",
}


class LinuxIpset:
    """The ipsets of the network namespace of the calling thread; to be used by threads in that namespace only."""

    def __init__(self) -> None:
        self._revisions: dict[tuple[SetType, int], int] = {}

    def headers(self) -> dict[str, SetHeader]:
        """Return every set, whoever made it, without its members; those of types that are never ours are left out."""
        found: dict[str, SetHeader] = {}
        flags = attribute(FLAGS | NET_ORDER, LIST_HEADER.to_bytes(4, "big"))
        with NfNetlink() as netlink:
            for data, start, end in netlink.dump("list ipsets", LIST, socket.AF_INET, _VERSION + flags):
                header = _header(data, attributes(data, start, end))
                if header is not None:
                    found[header.spec.name] = header
        return found

    def members(self, spec: SetSpec) -> frozenset[Member]:
        """Return a set's members. Raises KernelRefusedError, also if there is no such set."""
        found: list[Member] = []
        read = _reader(spec)
        with NfNetlink() as netlink:
            for data, start, end in netlink.dump("list ipset", LIST, socket.AF_INET, _VERSION + _name(SETNAME, spec.name)):
                span = attributes(data, start, end).get(ADT)
                if span is not None:
                    found += (read(data, attributes(data, *entry)) for entry in _entries(data, *span))
        return frozenset(found)

    def counts(self, spec: SetSpec) -> dict[Member, int]:
        """Return how many packets each member of a set with counters has counted. Raises KernelRefusedError."""
        found: dict[Member, int] = {}
        read = _reader(spec)
        with NfNetlink() as netlink:
            for data, start, end in netlink.dump("list ipset", LIST, socket.AF_INET, _VERSION + _name(SETNAME, spec.name)):
                span = attributes(data, start, end).get(ADT)
                for entry in _entries(data, *span) if span is not None else ():
                    parts = attributes(data, *entry)
                    found[read(data, parts)] = _number(data, parts[MEMBER_PACKETS]) if MEMBER_PACKETS in parts else 0
        return found

    def apply(self, changes: Sequence[SetChange]) -> str:
        """Do each, in order, until one is refused; return that one and the kernel's words, empty if all are done."""
        with NfNetlink() as netlink:
            for change in changes:
                words = self._apply(netlink, change)
                if words:
                    return f"{change}: {words}"
        return ""

    def _apply(self, netlink: NfNetlink, change: SetChange) -> str:
        match change:
            case CreateSet(spec, room):
                return _words(self._execute(netlink, CREATE, AF[spec.family], self._create(netlink, spec, room)))
            case AddMembers(spec, members):
                return _change_members(netlink, ADD, spec, members)
            case DeleteMembers(spec, members):
                return _change_members(netlink, DEL, spec, members)
            case SwapSets(first, second):
                payload = _VERSION + _name(SETNAME, first) + _name(TYPENAME, second)
                return _words(self._execute(netlink, SWAP, socket.AF_INET, payload))
            case DestroySet(name):
                assert name  # without one, the kernel destroys every set there is
                code = self._execute(netlink, DESTROY, socket.AF_INET, _VERSION + _name(SETNAME, name))
                return "" if code == errno.ENOENT else _words(code)

    def _execute(self, netlink: NfNetlink, message: int, family: int, payload: bytes) -> int:
        return netlink.execute(message, [(family, payload)])[0]

    def _create(self, netlink: NfNetlink, spec: SetSpec, room: int) -> bytes:
        if spec.type == "bitmap:port":
            data = _u16(PORT, 0) + _u16(PORT_TO, BITMAP_PORTS - 1)
        else:
            data = _u32(HASHSIZE, HASH_SIZE) + _u32(MAXELEM, room)
        if spec.counters:
            data += _u32(CADT_FLAGS, WITH_COUNTERS)
        family = socket.AF_UNSPEC if spec.type == "bitmap:port" else AF[spec.family]
        return (
            _VERSION
            + _name(SETNAME, spec.name)
            + _name(TYPENAME, spec.type)
            + attribute(REVISION, bytes([self._revision(netlink, spec.type, family)]))
            + attribute(SET_FAMILY, bytes([family]))
            + nested(DATA, data)
        )

    def _revision(self, netlink: NfNetlink, kind: SetType, family: int) -> int:
        """Return the newest revision of a type that this kernel has; asking loads its module."""
        known = self._revisions.get((kind, family))
        if known is None:
            payload = _VERSION + _name(TYPENAME, kind) + attribute(SET_FAMILY, bytes([family]))
            try:
                data, start, end = netlink.get("ask for ipset type", TYPE, family, payload)
            except KernelRefusedError as error:
                raise MissingFeatureError(Feature.IPSET, f"type {kind}: {error}") from error
            known = self._revisions[kind, family] = data[attributes(data, start, end)[REVISION][0]]
        return known


def has_ipset() -> bool:
    """Whether this kernel has ipset, or a module of it that can be loaded."""
    try:
        LinuxIpset().headers()
    except KernelStateError:
        return False
    return True


# -- members ---------------------------------------------------------------------------------------------------------


def _change_members(netlink: NfNetlink, message: int, spec: SetSpec, members: Collection[Member]) -> str:
    """Add or delete members, some hundreds to one message; stops at the first that is refused."""
    pack = member_packer(spec)
    head = _VERSION + _name(SETNAME, spec.name) + attribute(LINENO, b"\0\0\0\0")
    left = iter(members)
    first = next(left, None)
    if first is None:
        return ""
    size = len(pack(first))
    batch = [pack(first), *map(pack, islice(left, MESSAGE // size - 1))]
    while batch:
        code = netlink.execute(message, [(AF[spec.family], head + nested(ADT, *batch))])[0]
        if code:
            return _words(code)
        batch = list(map(pack, islice(left, MESSAGE // size)))
    return ""


def member_packer(spec: SetSpec) -> Callable[[Member], bytes]:
    """Return what encodes a member of such a set as one DATA attribute: all of one size."""
    size = 4 if spec.family == 4 else 16
    ip = f"HHHH{size}s"
    form = {
        "bitmap:port": "HH2s2x",
        "hash:ip": ip,
        "hash:net": ip + "HHB3x",
        "hash:ip,port": ip + "HH2s2x" + "HHB3x",
        "hash:net,port": ip + "HHB3x" + "HH2s2x" + "HHB3x",
        "hash:ip,port,ip": ip + "HH2s2x" + "HHB3x" + ip,
        "hash:ip,port,net": ip + "HH2s2x" + "HHB3x" + ip + "HHB3x",
    }[spec.type]
    struct_ = struct.Struct("=HH" + form)
    pack, head = struct_.pack, (struct_.size, DATA | NESTED)
    number = 1 if spec.family == 4 else 2  # IPSET_ATTR_IPADDR_IPV4, _IPV6
    at = (8 + size, IP | NESTED, 4 + size, number | NET_ORDER)
    at2 = (8 + size, IP2 | NESTED, 4 + size, number | NET_ORDER)
    port = (6, PORT | NET_ORDER)
    return {
        "bitmap:port": lambda m: pack(*head, *port, m[0].to_bytes(2, "big")),
        "hash:ip": lambda m: pack(*head, *at, m[0].to_bytes(size, "big")),
        "hash:net": lambda m: pack(*head, *at, m[0][0].to_bytes(size, "big"), 5, CIDR, m[0][1]),
        "hash:ip,port": lambda m: pack(
            *head, *at, m[0].to_bytes(size, "big"), *port, m[2].to_bytes(2, "big"), 5, PROTO, PROTOCOLS[m[1]]
        ),
        "hash:net,port": lambda m: pack(
            *head, *at, m[0][0].to_bytes(size, "big"), 5, CIDR, m[0][1], *port, m[2].to_bytes(2, "big"), 5, PROTO, PROTOCOLS[m[1]]
        ),
        "hash:ip,port,ip": lambda m: pack(
            *head, *at, m[0].to_bytes(size, "big"), *port, m[2].to_bytes(2, "big"), 5, PROTO, PROTOCOLS[m[1]],
            *at2, m[3].to_bytes(size, "big"),
        ),
        "hash:ip,port,net": lambda m: pack(
            *head, *at, m[0].to_bytes(size, "big"), *port, m[2].to_bytes(2, "big"), 5, PROTO, PROTOCOLS[m[1]],
            *at2, m[3][0].to_bytes(size, "big"), 5, CIDR2, m[3][1],
        ),
    }[spec.type]  # fmt: skip


_Found = dict[int, tuple[int, int]]


def _reader(spec: SetSpec) -> Callable[[bytes, _Found], Member]:
    """Return what decodes one entry of such a set."""
    full = 32 if spec.family == 4 else 128

    def address(data: bytes, span: tuple[int, int]) -> int:
        return int.from_bytes(data[span[0] + 4 : span[1]], "big")  # within the attribute that tells IPv4 from IPv6

    def network(data: bytes, span: tuple[int, int], length: tuple[int, int] | None) -> tuple[int, int]:
        return address(data, span), data[length[0]] if length else full

    def read(data: bytes, found: _Found) -> Member:
        match spec.type:
            case "bitmap:port":
                return (_number(data, found[PORT]),)
            case "hash:ip":
                return (address(data, found[IP]),)
            case "hash:net":
                return (network(data, found[IP], found.get(CIDR)),)
            case _:
                protocol = data[found[PROTO][0]]
                port = _PROTOCOL_NAMES.get(protocol, str(protocol)), _number(data, found[PORT])
                if spec.type == "hash:net,port":
                    return (network(data, found[IP], found.get(CIDR)), *port)
                service = address(data, found[IP]), *port
        if spec.type == "hash:ip,port,ip":
            return (*service, address(data, found[IP2]))
        if spec.type == "hash:ip,port,net":
            return (*service, network(data, found[IP2], found.get(CIDR2)))
        return service

    return read


def _entries(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where each entry's attributes begin and end: they all have one type."""
    while start + 4 <= end:
        length = int.from_bytes(data[start : start + 2], "little" if _LITTLE else "big")
        if length < 4:
            return
        yield start + 4, start + length
        start += (length + 3) & ~3


def _header(data: bytes, found: _Found) -> SetHeader | None:
    kind = _text(data, found[TYPENAME])
    if kind not in _TYPES or DATA not in found:
        return None
    detail = attributes(data, *found[DATA])
    family = 6 if data[found[SET_FAMILY][0]] == socket.AF_INET6 else 4
    room = _number(data, detail[MAXELEM]) if MAXELEM in detail else BITMAP_PORTS
    if kind == "bitmap:port":
        room = _number(data, detail[PORT_TO]) - _number(data, detail[PORT]) + 1
    counters = CADT_FLAGS in detail and bool(_number(data, detail[CADT_FLAGS]) & WITH_COUNTERS)
    spec = SetSpec(_text(data, found[SETNAME]), _TYPES[kind], 6 if family == 6 else 4, counters)
    elements = _number(data, detail[ELEMENTS]) if ELEMENTS in detail else -1
    return SetHeader(spec, room, elements, _number(data, detail[REFERENCES]))


_TYPES: dict[str, SetType] = {
    "hash:ip": "hash:ip",
    "hash:net": "hash:net",
    "hash:ip,port": "hash:ip,port",
    "hash:net,port": "hash:net,port",
    "hash:ip,port,ip": "hash:ip,port,ip",
    "hash:ip,port,net": "hash:ip,port,net",
    "bitmap:port": "bitmap:port",
}
_LITTLE = struct.pack("=H", 1)[0] == 1


def _u16(kind: int, value: int) -> bytes:
    return attribute(kind | NET_ORDER, value.to_bytes(2, "big"))


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind | NET_ORDER, value.to_bytes(4, "big"))


def _name(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _number(data: bytes, span: tuple[int, int]) -> int:
    return int.from_bytes(data[span[0] : span[1]], "big")


def _text(data: bytes, span: tuple[int, int]) -> str:
    return data[span[0] : span[1]].rstrip(b"\0").decode()


def _words(code: int) -> str:
    if code == 0:
        return ""
    return _WORDS.get(code) or (os.strerror(code) if code < 4096 else f"ipset error {code}")


_VERSION = attribute(PROTOCOL, bytes([PROTOCOL_VERSION]))
