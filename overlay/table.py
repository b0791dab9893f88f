"""The overlay's table of meaning: which node's pods are reached how, seen from one node.

Holds addresses and intent: a peer's pod network, where its node is, and whether packets go there as they are or through a
tunnel, with the reason. No link index, no route: those are for ``render/``.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from clusterstate.objects import IPAddress, IPNetwork
from kernelstate.objects.links import Uplink
from overlay.lease import Vtep
from overlay.netconf import NetConf

__all__ = ["Peer", "PeerProblem", "PeerTable", "Reach", "Uplink", "Way"]


class Reach(Enum):
    """How packets travel to a peer."""

    DIRECT = "host-gw"
    """As they are, with the peer as next hop."""
    VXLAN = "vxlan"
    """As frames in UDP, through a vxlan link."""
    UDP = "udp"
    """As they are in UDP, through a TUN or programs of the kernel."""


class Way(msgspec.Struct, frozen=True):
    """The way to a node's pods in one family; for the own node, its own end."""

    family: int
    pod_cidr: IPNetwork
    public_ip: IPAddress
    reach: Reach
    why: str
    vtep: Vtep | None = None
    """Backend data; None unless encapsulated packets can be meant for it."""


class Peer(msgspec.Struct, frozen=True):
    """Another node, with one or two ways to it, IPv4 first."""

    node: str
    ways: tuple[Way, ...]

    @property
    def pod_cidrs(self) -> tuple[IPNetwork, ...]:
        """Its pods' networks."""
        return tuple(way.pod_cidr for way in self.ways)

    @property
    def public_ips(self) -> tuple[IPAddress, ...]:
        """Where its node is."""
        return tuple(way.public_ip for way in self.ways)

    @property
    def reach(self) -> Reach:
        """How it is reached; through the tunnel if one family is."""
        return next((way.reach for way in self.ways if way.reach is not Reach.DIRECT), Reach.DIRECT)


class PeerProblem(msgspec.Struct, frozen=True):
    """Why a node, or one family of it, is left out: which field of which node holds which value, and what is wrong with it."""

    node: str
    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"Node {self.node}: {self.field}: {self.value or 'nothing'}: {self.reason}"


class PeerTable(msgspec.Struct, frozen=True):
    """The overlay seen from ``node``. Peers are sorted by name, problems by node."""

    node: str
    net_conf: NetConf
    uplink: Uplink
    mtu: int
    """For pods, in bytes."""
    own: tuple[Way, ...] = ()
    """The node's own end, by family; a family that is missing here has no overlay."""
    peers: tuple[Peer, ...] = ()
    problems: tuple[PeerProblem, ...] = ()

    def own_way(self, family: int) -> Way | None:
        """Return the own end in a family."""
        return next((way for way in self.own if way.family == family), None)

    def ways(self, family: int) -> list[Way]:
        """Return the ways to all peers in a family."""
        return [way for peer in self.peers for way in peer.ways if way.family == family]
