"""A UDP tunnel to other nodes, and the guard at the uplink: what both engines of the tunnel are told, and nothing of how.

    pod 10.244.1.5 --> flannel0 --> which peer has 10.244.2.0/24? --> [IP 192.168.1.1->.2 | UDP 8285 | the packet itself] --> eth0

    peers, own pods, the pod network --> places: the longest prefix that holds an address tells whose it is
                                     --> nodes: the outer addresses of peers

Who keeps a process or the kernel's programs at this is for ``reconcile_forwarder.py`` and ``reconcile_tunnel.py``.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from kernelstate.objects.address import IPAddress, Prefix


class TunnelPeer(msgspec.Struct, frozen=True, order=True):
    """One other node in one family: the network of its pods, and where it is."""

    prefix: Prefix
    address: IPAddress

    def __str__(self) -> str:
        return f"{self.prefix} {self.address}"


class UdpTunnel(msgspec.Struct, frozen=True):
    """One node's end of the tunnel; packets to a peer are sent to ``port`` there, from one of the ``local`` addresses here."""

    link: str
    uplink: str
    port: int
    local: tuple[IPAddress, ...]
    """At most one of each family, IPv4 first."""
    peers: tuple[TunnelPeer, ...]
    """Sorted; no two of one prefix."""


class SourceGuard(msgspec.Struct, frozen=True):
    """Whose packets may come in through the uplink: pods' packets only from the node that has these pods."""

    uplink: str
    own: tuple[Prefix, ...]
    """The node's own pods: nobody else sends with these."""
    network: tuple[Prefix, ...]
    """The pods of all nodes."""
    vxlan: tuple[tuple[int, int], ...]
    """UDP port and VNI of tunnels whose packets are looked into."""
    peers: tuple[TunnelPeer, ...]


class TunnelState(msgspec.Struct, frozen=True):
    """What programs of the kernel should do at flannel0 and at the uplink; None: nothing of it."""

    udp: UdpTunnel | None = None
    guard: SourceGuard | None = None


class Whose(IntEnum):
    """Whose pods have a prefix; the numbers are those of packetpath/bpf/places.h."""

    PEER = 1
    OWN = 2
    NETWORK = 3
    """Nobody's that is known: part of the pod network."""


class Place(msgspec.Struct, frozen=True):
    """A prefix in the programs' table; ``node`` is the peer's outer address."""

    prefix: Prefix
    whose: Whose
    node: IPAddress | None = None

    def __str__(self) -> str:
        return f"{self.prefix} {self.node or self.whose.name.lower()}"
