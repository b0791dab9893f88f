"""The rtnetlink messages that hang a pod on its node: veth pairs, the bridge, addresses, routes, neighbours. Meets no socket.

Beside ``link_codec.py``, which is about the records of ``kernelstate/objects``: here everything is plain values, so that a program
executed for each pod starts without the libraries those records take. Links are named by index where they exist.

    RTM_NEWLINK  ifinfomsg | IFLA_IFNAME, MTU, ADDRESS, LINKINFO{KIND veth, DATA{PEER{ifinfomsg | IFNAME, MTU, ADDRESS, NET_NS_FD}}}

Source: include/uapi/linux/{if_link,if_addr,neighbour,rtnetlink,veth}.h.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import NamedTuple, TypeAlias

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

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPInterface: TypeAlias = IPv4Interface | IPv6Interface
IPNetwork: TypeAlias = IPv4Network | IPv6Network
NameAndMac: TypeAlias = tuple[str, str]

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
AF = {4: 2, 6: 10}
FAMILY = {2: 4, 10: 6}

IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDR = struct.Struct("=BBBBi")  # family, length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type

IFF_UP = 0x1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 5, 10, 18, 20
IFLA_NET_NS_FD, IFLA_EXT_MASK = 28, 29
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
VETH_INFO_PEER = 1
IFLA_BRPORT_MODE = 4
"""The hairpin flag of a bridge's port."""
RTEXT_FILTER_SKIP_STATS = 8

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD = 0x2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_METRICS, RTA_TABLE = 1, 4, 5, 6, 8, 15
RTAX_MTU, RTAX_ADVMSS = 2, 8
RTN_UNICAST, RTNH_F_ONLINK, RTPROT_BOOT = 1, 4, 3
SCOPE_UNIVERSE, SCOPE_LINK, MAIN_TABLE = 0, 253, 254
NDA_DST, NDA_LLADDR = 1, 2
NUD_PERMANENT = 0x80


class LinkFacts(NamedTuple):
    """What a link looks like from outside. ``peer`` is the index of a veth's other end, ``master`` of its bridge, 0 for none."""

    ifindex: int
    name: str
    mac: str
    mtu: int
    up: bool
    kind: str
    alias: str
    peer: int
    master: int
    hairpin: bool


class PodRoute(NamedTuple):
    """One route. Numbers that are 0 are left to the kernel; ``scope`` -1 too, which takes it from whether there is a gateway."""

    destination: IPNetwork
    gateway: IPAddress | None
    onlink: bool = False
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int = 0
    scope: int = -1


# -- to the kernel ---------------------------------------------------------------------------------------------------


def new_veth(near: NameAndMac, far: NameAndMac, far_netns: int, mtu: int) -> Request:
    """Make a pair, both ends down, the far one born in the namespace of descriptor ``far_netns``: it is never seen in a third.

    Both MACs are stated, so that nobody has to ask for them afterwards, and nobody else (udev) sets others.
    """
    peer = _outside(*far, mtu) + number(IFLA_NET_NS_FD, far_netns)
    data = attribute(VETH_INFO_PEER, IFINFO.pack(0, 0, 0, 0, 0) + peer)
    info = attribute(IFLA_INFO_KIND, b"veth") + attribute(IFLA_INFO_DATA, data)
    body = IFINFO.pack(0, 0, 0, 0, 0) + _outside(*near, mtu) + attribute(IFLA_LINKINFO, info)
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def new_bridge(name: str, mac: str, mtu: int) -> Request:
    """Make a bridge, up. A stated MAC stays; else a bridge takes the lowest of its ports', and changes it with them."""
    body = IFINFO.pack(0, 0, 0, IFF_UP, IFF_UP) + _outside(name, mac, mtu)
    body += attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"bridge"))
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def set_up(name: str, alias: str = "") -> Request:
    """Set a link up, by its name; with an alias if one is given."""
    body = IFINFO.pack(0, 0, 0, IFF_UP, IFF_UP) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    return Request(RTM_NEWLINK, 0, body + (attribute(IFLA_IFALIAS, alias.encode()) if alias else b""))


def set_master(name: str, master: int) -> Request:
    """Make a link a port of a bridge."""
    return Request(
        RTM_NEWLINK, 0, IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0") + number(IFLA_MASTER, master)
    )


def set_hairpin(name: str) -> Request:
    """Let a bridge's port send a frame back where it came from: a pod that reaches itself through a Service needs it."""
    slave = attribute(IFLA_INFO_SLAVE_KIND, b"bridge") + attribute(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, b"\x01"))
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0") + attribute(IFLA_LINKINFO, slave)
    return Request(RTM_NEWLINK, 0, body)


def del_link(name: str) -> Request:
    """Delete a link; a veth's other end goes with it."""
    return Request(RTM_DELLINK, 0, IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0"))


def address_message(address: IPInterface, index: int, *, delete: bool = False) -> Request:
    """Add or delete an address; without duplicate detection, which would keep an IPv6 address waiting for a second."""
    body = IFADDR.pack(AF[address.version], address.network.prefixlen, 0, SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)
    if delete:
        return Request(RTM_DELADDR, 0, body)
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body + number(IFA_FLAGS, IFA_F_NODAD))


def route_message(route: PodRoute, index: int, *, replace: bool = False) -> Request:
    """Add a route through a link; ``replace`` takes the place of one to the same destination."""
    version = route.destination.version
    scope = route.scope
    if scope < 0:
        scope = SCOPE_LINK if route.gateway is None and version == 4 else SCOPE_UNIVERSE
    table = route.table or MAIN_TABLE
    flags = RTNH_F_ONLINK if route.onlink else 0
    body = RTMSG.pack(
        AF[version], route.destination.prefixlen, 0, 0, table if table < 256 else 0, RTPROT_BOOT, scope, RTN_UNICAST, flags
    )
    body += attribute(RTA_DST, route.destination.network_address.packed) + number(RTA_OIF, index) + number(RTA_TABLE, table)
    body += attribute(RTA_GATEWAY, route.gateway.packed) if route.gateway is not None else b""
    body += number(RTA_PRIORITY, route.priority) if route.priority else b""
    metrics = b"".join(number(k, v) for k, v in ((RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)) if v)
    body += attribute(RTA_METRICS, metrics) if metrics else b""
    return Request(RTM_NEWROUTE, NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL), body)


def neigh_message(address: IPAddress, mac: str, index: int) -> Request:
    """Say for good which MAC an address has on a link: nobody asks for it, and no answer has to be waited for."""
    body = NDMSG.pack(AF[address.version], index, NUD_PERMANENT, 0, RTN_UNICAST)
    body += attribute(NDA_DST, address.packed) + attribute(NDA_LLADDR, mac_bytes(mac))
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


def links_question() -> bytes:
    """Return the body that asks for all links, without their counters."""
    return IFINFO.pack(0, 0, 0, 0, 0) + number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)


def mac_bytes(text: str) -> bytes:
    """Return the six bytes of a MAC."""
    return bytes.fromhex(text.replace(":", ""))


def _outside(name: str, mac: str, mtu: int) -> bytes:
    named = attribute(IFLA_IFNAME, name.encode() + b"\0") + attribute(IFLA_ADDRESS, mac_bytes(mac))
    return named + (number(IFLA_MTU, mtu) if mtu else b"")


# -- from the kernel -------------------------------------------------------------------------------------------------


def read_link(message: Message) -> LinkFacts:
    """Read a link."""
    _, _, index, flags, _ = IFINFO.unpack_from(message.body)
    found = attributes(message.body, IFINFO.size)
    info = attributes(found.get(IFLA_LINKINFO, b""), 0)
    slave = attributes(info.get(IFLA_INFO_SLAVE_DATA, b""), 0)
    return LinkFacts(
        ifindex=index,
        name=_text(found.get(IFLA_IFNAME, b"")),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=to_int(found.get(IFLA_MTU, b"")),
        up=bool(flags & IFF_UP),
        kind=_text(info.get(IFLA_INFO_KIND, b"")),
        alias=_text(found.get(IFLA_IFALIAS, b"")),
        peer=to_int(found.get(IFLA_LINK, b"")),
        master=to_int(found.get(IFLA_MASTER, b"")),
        hairpin=bool(to_int(slave.get(IFLA_BRPORT_MODE, b""))),
    )


def read_address(message: Message) -> tuple[int, IPInterface]:
    """Read an address, with the index of its link."""
    family, length, _, _, index = IFADDR.unpack_from(message.body)
    found = attributes(message.body, IFADDR.size)
    packed = found.get(IFA_LOCAL) or found[IFA_ADDRESS]
    if FAMILY[family] == 4:
        return index, IPv4Interface((packed, length))
    return index, IPv6Interface((packed, length))


def read_route(message: Message) -> tuple[int, PodRoute] | None:
    """Read a unicast route through one link, with its index; None for any other."""
    family, length, _, _, _, _, scope, kind, flags = RTMSG.unpack_from(message.body)
    found = attributes(message.body, RTMSG.size)
    if family not in FAMILY or kind != RTN_UNICAST or RTA_OIF not in found:
        return None
    width = 4 if FAMILY[family] == 4 else 16
    metrics = attributes(found.get(RTA_METRICS, b""), 0)
    gateway = found.get(RTA_GATEWAY)
    return to_int(found[RTA_OIF]), PodRoute(
        destination=_network(found.get(RTA_DST, bytes(width)), length),
        gateway=_address(gateway) if gateway else None,
        onlink=bool(flags & RTNH_F_ONLINK),
        mtu=to_int(metrics.get(RTAX_MTU, b"")),
        advmss=to_int(metrics.get(RTAX_ADVMSS, b"")),
        priority=to_int(found.get(RTA_PRIORITY, b"")),
        table=to_int(found.get(RTA_TABLE, b"")),
        scope=scope,
    )


def read_neigh(message: Message) -> tuple[int, IPAddress, str] | None:
    """Read a permanent neighbour: index of its link, address, MAC; None for any other."""
    family, index, state, _, _ = NDMSG.unpack_from(message.body)
    found = attributes(message.body, NDMSG.size)
    if family not in FAMILY or NDA_DST not in found or not state & NUD_PERMANENT:
        return None
    return index, _address(found[NDA_DST]), found.get(NDA_LLADDR, b"").hex(":")


def _address(packed: bytes) -> IPAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _network(packed: bytes, length: int) -> IPNetwork:
    return IPv4Network((packed, length)) if len(packed) == 4 else IPv6Network((packed, length))


def _text(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode(errors="replace")
