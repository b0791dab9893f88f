"""The peer table as flannel's VXLAN layout: one link a family, and for each peer a neighbour, a forwarding entry and a route.

    pod 10.244.1.5 (node A)                                                 pod 10.244.2.7 (node B)
        |                                                                       ^
        | route 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink               | route on B
        v                                                                       |
    flannel.1   10.244.1.0/32   MAC a                                   flannel.1   10.244.2.0/32   MAC b
        |  neigh 10.244.2.0 -> MAC b;  fdb MAC b -> 192.168.1.2                 ^
        v                                                                       |
    eth0 192.168.1.1 ==[ IP | UDP 8472 | VXLAN | Ethernet a->b | IP 10.244.1.5->10.244.2.7 ]==> eth0 192.168.1.2

The link's own address is the subnet's first (.0), without a network around it: packets that the node itself sends to pods carry
it, and are answered to it. Peers that are reached directly get one plain route, and nothing on the link.
"""

from __future__ import annotations

from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, FdbEntry, Link, LinkObject, LinkState, Neigh, Route, Vxlan
from overlay.mtu import tunnel_mtu
from overlay.netconf import VxlanBackend
from overlay.render.hostgw import direct_route
from overlay.table import PeerTable, Reach, Way


def render_vxlan(table: PeerTable) -> LinkState:
    """Return links, addresses, neighbours, forwarding entries and routes for a table whose backend is vxlan."""
    backend = table.net_conf.backend
    assert isinstance(backend, VxlanBackend)
    objects: list[LinkObject] = []
    for end in table.own:
        assert end.vtep is not None
        name = backend.link_name(end.family)
        objects.append(
            Link(
                name=name,
                mtu=tunnel_mtu(backend.mtu or table.uplink.mtu, end.family),
                mac=end.vtep.mac,
                kind=Vxlan(
                    vni=backend.vni,
                    local=end.public_ip,
                    underlay=table.uplink.name,
                    port=backend.port,
                    learning=backend.learning,
                    gbp=backend.gbp,
                ),
            )
        )
        objects.append(Address(name, end.pod_cidr.network_address, end.pod_cidr.max_prefixlen))
        for way in table.ways(end.family):
            objects += _tunnel(way, name) if way.reach is Reach.VXLAN else [direct_route(way, table.uplink.name)]
    return LinkState.of(objects)


def _tunnel(way: Way, link: str) -> list[LinkObject]:
    assert way.vtep is not None
    gateway = way.pod_cidr.network_address
    return [
        Neigh(link, gateway, way.vtep.mac),
        FdbEntry(link, way.vtep.mac, way.public_ip),
        Route(Prefix.of(way.pod_cidr), gateway, link, onlink=True),
    ]
