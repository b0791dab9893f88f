"""Links, addresses, routes, neighbours and forwarding entries, to and from the attributes of rtnetlink. Meets no socket.

Addresses are in network order, everything else in the machine's, except the vxlan port (vxlan.c reads it as big-endian).
A link index means something only while the link lives, so names come from and go to the caller.

Source: include/uapi/linux/{if_link,if_addr,neighbour,rtnetlink}.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address

from kernelstate.linux.rtnetlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Request,
    attribute,
    attributes,
    number,
    to_int,
)
from kernelstate.objects.address import IPAddress, Prefix
from kernelstate.objects.links import MAIN_TABLE, Address, FdbEntry, Link, LinkKind, Neigh, Route, Tun, Vxlan

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

AF_INET, AF_INET6, AF_BRIDGE = 2, 10, 7
AF: Mapping[int, int] = {4: AF_INET, 6: AF_INET6}

IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDR = struct.Struct("=BBBBi")  # family, length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type

IFF_UP = 0x1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK = 1, 3, 4, 18, 20, 29
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
RTEXT_FILTER_SKIP_STATS = 8
TUN_VNET_HDR, TUN_PERSIST, TUN_MULTI_QUEUE = 5, 6, 7
VXLAN_ID, VXLAN_LINK, VXLAN_LOCAL, VXLAN_LEARNING, VXLAN_PORT, VXLAN_LOCAL6, VXLAN_GBP = 1, 3, 4, 7, 15, 17, 23

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD = 0x2
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE = 1, 4, 5, 6, 15
RTN_UNICAST, RTNH_F_ONLINK = 1, 4
DEFAULT_METRIC6 = 1024
"""What the kernel makes of metric 0 for IPv6 (IP6_RT_PRIO_USER)."""

NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_PERMANENT, NTF_SELF = 0x80, 0x02

NameOf = Callable[[int], str]


# -- to the kernel ---------------------------------------------------------------------------------------------------


def new_link(link: Link, underlay: int) -> Request:
    """Make a vxlan link, still down; ``underlay`` is the index of the link below, 0 for none."""
    v = link.kind
    assert isinstance(v, Vxlan)
    data = number(VXLAN_ID, v.vni)
    data += number(VXLAN_LINK, underlay) if underlay else b""
    if v.local is not None:
        data += attribute(VXLAN_LOCAL if v.local.version == 4 else VXLAN_LOCAL6, v.local.packed)
    data += attribute(VXLAN_PORT, v.port.to_bytes(2, "big"))
    data += attribute(VXLAN_LEARNING, bytes([v.learning]))
    data += attribute(VXLAN_GBP, b"") if v.gbp else b""
    info = attribute(IFLA_INFO_KIND, b"vxlan\0") + attribute(IFLA_INFO_DATA, data)
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, link.name.encode() + b"\0")
    body += number(IFLA_MTU, link.mtu) + attribute(IFLA_ADDRESS, mac_bytes(link.mac)) + attribute(IFLA_LINKINFO, info)
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def set_link(link: Link, before: Link, index: int) -> Request:
    """Set what differs of what can be set in place: MTU, MAC, alias, up or down. A MAC that is set anew costs all neighbours."""
    body = IFINFO.pack(0, 0, index, IFF_UP if link.up else 0, IFF_UP)
    body += number(IFLA_MTU, link.mtu) if link.mtu != before.mtu else b""
    body += attribute(IFLA_ADDRESS, mac_bytes(link.mac)) if link.mac and link.mac != before.mac else b""
    body += attribute(IFLA_IFALIAS, link.alias.encode() + b"\0") if link.alias != before.alias else b""
    return Request(RTM_NEWLINK, 0, body)


def delete_link(index: int) -> Request:
    """Delete a link."""
    return Request(RTM_DELLINK, 0, IFINFO.pack(0, 0, index, 0, 0))


def address_request(address: Address, index: int, *, delete: bool) -> Request:
    """Add or delete an address. Without duplicate detection: for IPv6 it would leave the address unusable for a second."""
    packed = address.address.packed
    body = IFADDR.pack(AF[address.address.version], address.length, 0, RT_SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    if delete:
        return Request(RTM_DELADDR, 0, body)
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body + number(IFA_FLAGS, IFA_F_NODAD))


def route_request(route: Route, index: int, *, delete: bool) -> Request:
    """Replace or delete a route; a deletion names protocol and gateway, so it can only hit the one that is meant."""
    family = route.destination.family
    scope = RT_SCOPE_UNIVERSE if route.via is not None or family == 6 else RT_SCOPE_LINK
    flags = RTNH_F_ONLINK if route.onlink else 0
    table = route.table if route.table < 256 else 0
    body = RTMSG.pack(AF[family], route.destination.length, 0, 0, table, route.protocol, scope, RTN_UNICAST, flags)
    body += attribute(RTA_DST, route.destination.network.to_bytes(4 if family == 4 else 16, "big"))
    body += number(RTA_OIF, index) + number(RTA_TABLE, route.table)
    body += attribute(RTA_GATEWAY, route.via.packed) if route.via is not None else b""
    metric = route.metric or (DEFAULT_METRIC6 if family == 6 else 0)
    body += number(RTA_PRIORITY, metric) if metric else b""
    if delete:
        return Request(RTM_DELROUTE, 0, body)
    return Request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body)


def neigh_request(neigh: Neigh, index: int, *, delete: bool) -> Request:
    """Replace or delete a permanent neighbour."""
    body = NDMSG.pack(AF[neigh.address.version], index, NUD_PERMANENT, 0, RTN_UNICAST) + attribute(
        NDA_DST, neigh.address.packed
    )
    if delete:
        return Request(RTM_DELNEIGH, 0, body)
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body + attribute(NDA_LLADDR, mac_bytes(neigh.mac)))


def fdb_request(entry: FdbEntry, index: int, *, delete: bool) -> Request:
    """Replace or delete a forwarding entry of the link itself."""
    body = NDMSG.pack(AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, 0)
    body += attribute(NDA_LLADDR, mac_bytes(entry.mac)) + attribute(NDA_DST, entry.destination.packed)
    if delete:
        return Request(RTM_DELNEIGH, 0, body)
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


# -- from the kernel -------------------------------------------------------------------------------------------------


def link_index(message: Message) -> int:
    """Return the index in a link message."""
    return int(IFINFO.unpack_from(message.body)[2])


def link_name(message: Message) -> str:
    """Return the name in a link message."""
    return _text(attributes(message.body, IFINFO.size).get(IFLA_IFNAME, b""))


def read_link(message: Message, name_of: NameOf) -> Link:
    """Read a link; of a kind that we do not make only the outside."""
    flags = IFINFO.unpack_from(message.body)[3]
    found = attributes(message.body, IFINFO.size)
    info = attributes(found.get(IFLA_LINKINFO, b""), 0)
    data = attributes(info.get(IFLA_INFO_DATA, b""), 0)
    kind: LinkKind | None = None
    match _text(info.get(IFLA_INFO_KIND, b"")):
        case "vxlan":
            kind = _read_vxlan(data, name_of)
        case "tun" if all(to_int(data.get(part, b"")) for part in (TUN_VNET_HDR, TUN_PERSIST, TUN_MULTI_QUEUE)):
            kind = Tun()
    return Link(
        name=_text(found.get(IFLA_IFNAME, b"")),
        mtu=to_int(found.get(IFLA_MTU, b"")),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        kind=kind,
        alias=_text(found.get(IFLA_IFALIAS, b"")),
        up=bool(flags & IFF_UP),
    )


def _read_vxlan(data: Mapping[int, bytes], name_of: NameOf) -> Vxlan:
    local = data.get(VXLAN_LOCAL) or data.get(VXLAN_LOCAL6)
    underlay = to_int(data.get(VXLAN_LINK, b""))
    return Vxlan(
        vni=to_int(data.get(VXLAN_ID, b"")),
        local=_address(local) if local and any(local) else None,
        underlay=name_of(underlay) if underlay else "",
        port=int.from_bytes(data.get(VXLAN_PORT, b""), "big"),
        learning=bool(to_int(data.get(VXLAN_LEARNING, b""))),
        gbp=VXLAN_GBP in data,
    )


def read_address(message: Message, name_of: NameOf) -> Address | None:
    """Read an address; None for a link-local one."""
    _, length, _, scope, index = IFADDR.unpack_from(message.body)
    found = attributes(message.body, IFADDR.size)
    packed = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
    if scope == RT_SCOPE_LINK or packed is None:
        return None
    return Address(name_of(index), _address(packed), length)


def read_route(message: Message, name_of: NameOf) -> Route | None:
    """Read a unicast route of the main table through one link; None for any other."""
    family, length, _, _, _, protocol, _, kind, flags = RTMSG.unpack_from(message.body)
    found = attributes(message.body, RTMSG.size)
    if family not in AF.values() or kind != RTN_UNICAST or to_int(found.get(RTA_TABLE, b"")) != MAIN_TABLE:
        return None
    version = 4 if family == AF_INET else 6
    gateway = found.get(RTA_GATEWAY)
    metric = to_int(found.get(RTA_PRIORITY, b""))
    return Route(
        destination=Prefix(version, int.from_bytes(found.get(RTA_DST, b""), "big"), length),  # type: ignore[arg-type]
        via=_address(gateway) if gateway else None,
        link=name_of(to_int(found.get(RTA_OIF, b""))),
        onlink=bool(flags & RTNH_F_ONLINK),
        metric=0 if version == 6 and metric == DEFAULT_METRIC6 else metric,
        protocol=protocol,
    )


def read_neigh(message: Message, name_of: NameOf) -> Neigh | FdbEntry | None:
    """Read a neighbour, or in the bridge family a forwarding entry with an outer address; None for any other."""
    family, index, state, _, _ = NDMSG.unpack_from(message.body)
    found = attributes(message.body, NDMSG.size)
    if NDA_DST not in found:
        return None
    address, mac = _address(found[NDA_DST]), found.get(NDA_LLADDR, b"").hex(":")
    if family == AF_BRIDGE:
        return FdbEntry(name_of(index), mac, address)
    return Neigh(name_of(index), address, mac if state & NUD_PERMANENT else "")


def neigh_index(message: Message) -> int:
    """Return the link index in a neighbour message: most are about links that are not ours, and need not be read further."""
    return int(NDMSG.unpack_from(message.body)[1])


def mac_bytes(text: str) -> bytes:
    """Return the six bytes of a MAC."""
    return bytes.fromhex(text.replace(":", ""))


def _address(packed: bytes) -> IPAddress:
    if len(packed) == 4:
        return IPv4Address(packed)
    return IPv6Address(packed) if len(packed) == 16 else ip_address(0)


def _text(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode(errors="replace")
