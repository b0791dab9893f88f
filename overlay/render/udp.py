"""The peer table as flannel's UDP layout: one TUN for both families, the pod network routed into it, and who is behind it.

    pod 10.244.1.5 (node A)                                                 pod 10.244.2.7 (node B)
        |                                                                       ^
        | route 10.244.0.0/16 dev flannel0                                      | route on B
        v                                                                       |
    flannel0   10.244.1.0/32                                            flannel0   10.244.2.0/32
        |  10.244.2.0/24 is at 192.168.1.2                                      ^
        v                                                                       |
    eth0 192.168.1.1 ======[ IP | UDP 8285 | IP 10.244.1.5->10.244.2.7 ]======> eth0 192.168.1.2

One route leads the whole pod network to the TUN; the node's own pods have longer ones. What belongs to no peer ends at the
forwarder behind the TUN, which answers that the network is unreachable. A peer is no kernel object here but a line of the
tunnel's table, so one that joins or leaves changes no route.
"""

from __future__ import annotations

from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, Link, LinkObject, LinkState, Route, Tun
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from overlay.netconf import UdpBackend
from overlay.table import PeerTable, Reach

LINK = "flannel0"
"""What flannel's ``flannel%d`` becomes; one for both families."""


def render_udp(table: PeerTable) -> LinkState:
    """Return the TUN, its addresses, and a route a family; nothing where the node has no end of its own."""
    if not table.own:
        return LinkState()
    objects: list[LinkObject] = [Link(LINK, table.mtu, "", Tun())]
    for end in table.own:
        objects.append(Address(LINK, end.pod_cidr.network_address, end.pod_cidr.max_prefixlen))
        network = table.net_conf.network_of(end.family)
        assert network is not None
        objects.append(Route(Prefix.of(network), None, LINK))
    return LinkState.of(objects)


def render_udp_tunnel(table: PeerTable) -> UdpTunnel | None:
    """Return the tunnel behind the TUN; None for another backend, or where the node has no end of its own."""
    backend = table.net_conf.backend
    if not isinstance(backend, UdpBackend) or not table.own:
        return None
    ways = [way for peer in table.peers for way in peer.ways if way.reach is Reach.UDP]
    return UdpTunnel(
        link=LINK,
        uplink=table.uplink.name,
        port=backend.port,
        local=tuple(end.public_ip for end in table.own),
        peers=tuple(sorted(TunnelPeer(Prefix.of(way.pod_cidr), way.public_ip) for way in ways)),
    )
