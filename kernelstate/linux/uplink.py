"""Finds the node's link to the other nodes: the one that is named, else the one with the node's address, else the default route's.

The order is flannel's, with the Node object's addresses in the place of ``--public-ip``. Source: rtnetlink(7).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Interface, IPv6Interface

from kernelstate.linux import link_codec as codec
from kernelstate.linux.rtnetlink import Message, RouteSocket, attributes, number, to_int
from kernelstate.objects.address import IPAddress
from kernelstate.objects.links import MAIN_TABLE, Uplink

Interface = IPv4Interface | IPv6Interface

_UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40
"""IFA_F_TEMPORARY, DADFAILED, DEPRECATED, TENTATIVE: not an address that others should be told."""


def uplink_facts(iface: str, node_addresses: Iterable[IPAddress] = ()) -> Uplink | None:
    """Return the uplink in the current network namespace; None if nothing fits. Link-local addresses are left out.

    ``iface`` is a name or one of its addresses; empty: look for ``node_addresses``, in their order.
    """
    sock = RouteSocket()
    try:
        request = codec.IFINFO.pack(0, 0, 0, 0, 0) + number(codec.IFLA_EXT_MASK, codec.RTEXT_FILTER_SKIP_STATS)
        messages = sock.dump(codec.RTM_GETLINK, request, "links")
        links = {codec.link_index(m): codec.read_link(m, str) for m in messages}
        addresses = _addresses(sock)
        if iface:
            index = next((i for i, link in links.items() if link.name == iface), 0) or _holder(addresses, [_as_address(iface)])
        else:
            index = _holder(addresses, list(node_addresses)) or default_link(sock)
    finally:
        sock.close()
    if index not in links:
        return None
    return Uplink(links[index].name, tuple(addresses.get(index, ())), links[index].mtu)


def _addresses(sock: RouteSocket) -> dict[int, list[Interface]]:
    """Return the global addresses by link: in the kernel's order, IPv4 before IPv6, usable ones first."""
    found: dict[int, list[tuple[bool, Interface]]] = {}
    for family in codec.AF.values():
        for message in sock.dump(codec.RTM_GETADDR, codec.IFADDR.pack(family, 0, 0, 0, 0), "addresses"):
            address = codec.read_address(message, str)
            if address is None:
                continue
            interface = ipaddress.ip_interface(f"{address.address}/{address.length}")
            found.setdefault(int(address.link), []).append((_is_unusable(message), interface))
    return {i: [a for bad, a in sorted(own, key=lambda o: (o[1].version, o[0]))] for i, own in found.items()}


def _is_unusable(message: Message) -> bool:
    flags = attributes(message.body, codec.IFADDR.size).get(codec.IFA_FLAGS, b"")
    return bool(to_int(flags) & _UNUSABLE)


def _holder(addresses: dict[int, list[Interface]], wanted: Sequence[IPAddress | None]) -> int:
    for one in wanted:
        for index, own in addresses.items():
            if any(a.ip == one for a in own):
                return index
    return 0


def default_link(sock: RouteSocket) -> int:
    """Return the link of the default route with the lowest metric, of IPv4 if it has one."""
    for family in codec.AF.values():
        header = codec.RTMSG.pack(family, 0, 0, 0, MAIN_TABLE, 0, 0, 0, 0)
        routes = []
        for message in sock.dump(codec.RTM_GETROUTE, header, "routes"):
            route = codec.read_route(message, str)
            if route is not None and route.destination.length == 0 and int(route.link):
                routes.append((route.metric, int(route.link)))
        if routes:
            return min(routes)[1]
    return 0


def _as_address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
