"""Links, addresses, routes, neighbours and forwarding entries as Linux holds them, and the marks by which ours are known.

What a tunnel to one other node consists of (flannel's layout; A is this node, B the other):

    to 10.244.2.7 --Route--> via 10.244.2.0 dev flannel.1 onlink
                                 |
                  Neigh: 10.244.2.0 is at MAC of B        (permanent: nobody answers ARP on this link)
                                 |
                  FdbEntry: MAC of B is behind 192.168.1.2   (permanent, on the link itself)
                                 |
    Link flannel.1 (vxlan, VNI 1) --UDP 8472--> 192.168.1.2

A link is ours by its alias, a route by its protocol number; addresses, neighbours and forwarding entries by lying on a link of
ours. Each record prints as the words that ``ip`` or ``bridge`` takes for it. MACs are lower-case text with colons.

Which of them should exist is for the caller; which do, for ``linux/links.py``.
"""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Interface
from typing import TypeAlias

import msgspec

from kernelstate.objects.address import IPAddress, Prefix

ALIAS = "nodeplane"
"""``ip link show`` prints it: the ownership mark of links."""
ROUTE_PROTOCOL = 157
"""``proto 157`` in ``ip route``: the ownership mark of routes. Free in the kernel's rtnetlink.h and in iproute2's rt_protos."""
MAIN_TABLE = 254
VXLAN_PORT = 8472
"""What the Linux kernel uses where no port is stated (vxlan.c), and flannel with it; IANA's is 4789."""


class Vxlan(msgspec.Struct, frozen=True):
    """What makes a vxlan link; none of it can be changed, another value is another link.

    ``local`` is the outer source, ``underlay`` the name of the link that carries the packets.
    """

    vni: int
    local: IPAddress | None
    underlay: str
    port: int = VXLAN_PORT
    learning: bool = False
    gbp: bool = False

    def __str__(self) -> str:
        words = [f"vxlan id {self.vni}"]
        words += [f"dev {self.underlay}"] if self.underlay else []
        words += [f"local {self.local}"] if self.local else []
        words += [f"dstport {self.port}", "learning" if self.learning else "nolearning", *(["gbp"] if self.gbp else [])]
        return " ".join(words)


class Tun(msgspec.Struct, frozen=True):
    """A TUN of which each queue is read by a process, and that stays when they end. Packets without a frame: it has no MAC.

    Packets carry virtio headers, and may be larger than the MTU (TSO) if the reader has said that it can take them.
    """

    def __str__(self) -> str:
        return "tun"


LinkKind: TypeAlias = Vxlan | Tun


class Link(msgspec.Struct, frozen=True):
    """A link of ours. ``kind`` None is an observed link of another kind; such a one is never desired."""

    name: str
    mtu: int
    mac: str
    kind: LinkKind | None
    alias: str = ALIAS
    up: bool = True
    accept_ra: bool = False
    """Whether router advertisements are believed: whoever can send one through a tunnel could set routes here."""
    tx_checksum: bool | None = None
    """Whether checksums are left to what carries the packets, or (False) finished before; None: as it is."""

    def __str__(self) -> str:
        address = f" address {self.mac}" if self.mac else ""
        return f"{self.name}{address} mtu {self.mtu} type {self.kind or 'other'}"

    @property
    def underlay(self) -> str:
        """The name of the link that carries its packets; empty if none does."""
        return self.kind.underlay if isinstance(self.kind, Vxlan) else ""


class Address(msgspec.Struct, frozen=True):
    """An address on a link of ours; the kernel's own link-local ones are not counted."""

    link: str
    address: IPAddress
    length: int

    def __str__(self) -> str:
        return f"{self.address}/{self.length} dev {self.link}"


class Route(msgspec.Struct, frozen=True):
    """A unicast route. ``onlink``: the gateway counts as reachable through ``link`` without an address that covers it.

    ``metric`` 0 is the kernel's default, which for IPv6 is shown as 1024.
    """

    destination: Prefix
    via: IPAddress | None
    link: str
    onlink: bool = False
    metric: int = 0
    table: int = MAIN_TABLE
    protocol: int = ROUTE_PROTOCOL

    def __str__(self) -> str:
        words = [str(self.destination)]
        words += [f"via {self.via}"] if self.via else []
        words += [f"dev {self.link}", *(["onlink"] if self.onlink else []), f"proto {self.protocol}"]
        words += [f"metric {self.metric}"] if self.metric else []
        words += [f"table {self.table}"] if self.table != MAIN_TABLE else []
        return " ".join(words)


class Neigh(msgspec.Struct, frozen=True):
    """A permanent neighbour. Observed with an empty ``mac`` it is one that is not permanent: not as anybody wants it."""

    link: str
    address: IPAddress
    mac: str

    def __str__(self) -> str:
        return f"{self.address} lladdr {self.mac} dev {self.link} nud permanent"


class FdbEntry(msgspec.Struct, frozen=True):
    """A forwarding entry of a vxlan link: frames for ``mac`` go to ``destination``, the outer address."""

    link: str
    mac: str
    destination: IPAddress

    def __str__(self) -> str:
        return f"{self.mac} dev {self.link} dst {self.destination} self permanent"


LinkObject: TypeAlias = Link | Address | Neigh | FdbEntry | Route

WORDS: dict[type[LinkObject], str] = {
    Link: "link",
    Address: "address",
    Neigh: "neigh",
    FdbEntry: "fdb",
    Route: "route",
}
"""What ``ip`` and ``bridge`` call each kind."""


class LinkState(msgspec.Struct, frozen=True):
    """Everything of ours of this kind: what should exist, or what does. Made by ``of`` it is in one order, and comparable."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    neighbours: tuple[Neigh, ...] = ()
    fdb: tuple[FdbEntry, ...] = ()
    routes: tuple[Route, ...] = ()

    @classmethod
    def of(cls, objects: list[LinkObject]) -> LinkState:
        """Sort objects of any kind into place."""
        return cls(
            links=tuple(sorted((o for o in objects if isinstance(o, Link)), key=lambda o: o.name)),
            addresses=tuple(sorted((o for o in objects if isinstance(o, Address)), key=_by_address)),
            neighbours=tuple(sorted((o for o in objects if isinstance(o, Neigh)), key=_by_address)),
            fdb=tuple(sorted((o for o in objects if isinstance(o, FdbEntry)), key=_by_mac)),
            routes=tuple(sorted((o for o in objects if isinstance(o, Route)), key=_by_destination)),
        )

    def objects(self) -> list[LinkObject]:
        """Return everything: links first, routes last, which is the order in which they can be made."""
        return [*self.links, *self.addresses, *self.neighbours, *self.fdb, *self.routes]

    @property
    def own_links(self) -> frozenset[str]:
        """Names of its links."""
        return frozenset(link.name for link in self.links)

    @property
    def used_links(self) -> frozenset[str]:
        """Names of links that are somebody else's, but that it relies on."""
        underlays = {link.underlay for link in self.links}
        return frozenset(underlays | {route.link for route in self.routes}) - self.own_links - {""}


class Uplink(msgspec.Struct, frozen=True):
    """The node's link to the other nodes: addresses with the lengths of their subnets, without link-local ones; MTU in bytes."""

    name: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()
    mtu: int = 1500

    def holds_subnet_of(self, address: IPAddress) -> bool:
        """Whether an address is a neighbour on this link: inside a subnet of one of its addresses."""
        return any(address.version == own.version and address in own.network for own in self.addresses)

    def address(self, family: int) -> IPAddress | None:
        """Return its first address of a family."""
        return next((own.ip for own in self.addresses if own.version == family), None)

    def subnets(self, family: int) -> str:
        """Print its subnets of a family, for people."""
        return ", ".join(str(own.network) for own in self.addresses if own.version == family) or "none"


def _by_address(o: Address | Neigh) -> tuple[str, int, int]:
    return (o.link, o.address.version, int(o.address))


def _by_mac(o: FdbEntry) -> tuple[str, str, int, int]:
    return (o.link, o.mac, o.destination.version, int(o.destination))


def _by_destination(o: Route) -> tuple[Prefix, int, int]:
    return (o.destination, o.table, o.metric)
