"""Small clusters for the overlay's tests: nodes, snapshots, uplinks, and generated ones for properties."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_interface, ip_network

from hypothesis import strategies as st
from immutables import Map

from clusterstate.objects import Node, NodeAddress
from clusterstate.snapshot import Snapshot
from kernelstate.objects.links import Uplink
from overlay.compile import compile_peers
from overlay.netconf import HostGwBackend, NetConf, UdpBackend, VxlanBackend
from overlay.registry.nodes import read_nodes
from overlay.table import PeerTable

NETWORK = ip_network("10.244.0.0/16")
NETWORK6 = ip_network("fd00:244::/48")
VXLAN = NetConf(NETWORK)
DIRECT = NetConf(NETWORK, backend=VxlanBackend(direct_routing=True))
HOST_GW = NetConf(NETWORK, backend=HostGwBackend())
UDP = NetConf(NETWORK, backend=UdpBackend())
DUAL = NetConf(NETWORK, NETWORK6)
UPLINK = Uplink("eth0", (ip_interface("192.168.1.1/24"), ip_interface("fd00:1::1/64")), 1500)


def node(name: str, cidrs: str = "", ips: str = "", annotations: Mapping[str, str] | None = None) -> Node:
    """Return a Node with space-separated pod networks and InternalIPs."""
    return Node(
        name,
        addresses=tuple(NodeAddress("InternalIP", ip_address(ip)) for ip in ips.split()),
        pod_cidrs=tuple(ip_network(c) for c in cidrs.split()),
        annotations=Map(annotations or {}),
    )


def snapshot(*nodes: Node) -> Snapshot:
    """Return a snapshot of these nodes."""
    return Snapshot(nodes=Map({n.name: n for n in nodes}))


def compile_nodes(seen: Snapshot, name: str, conf: NetConf, uplink: Uplink) -> PeerTable:
    """Return the overlay as one node sees it, by the Node objects."""
    return compile_peers(read_nodes(seen.nodes, name, conf), name, conf, uplink)


N1 = node("n1", "10.244.1.0/24 fd00:244:0:1::/64", "192.168.1.1 fd00:1::1")
N2 = node("n2", "10.244.2.0/24 fd00:244:0:2::/64", "192.168.1.2 fd00:1::2")
FAR = node("n3", "10.244.3.0/24 fd00:244:0:3::/64", "192.168.2.3 fd00:2::3")


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Snapshot, NetConf]:
    """Draw up to eight nodes, n0 first, on two segments, whose claims now and then collide, and a configuration."""
    nodes = []
    for i in range(draw(st.integers(1, 8))):
        segment, host, pods = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(0, 11))
        length = draw(st.sampled_from((24, 24, 24, 23)))
        nodes.append(
            node(
                f"n{i}",
                f"{ip_network(f'10.244.{pods}.0/{length}', strict=False)} fd00:244:0:{pods:x}::/64",
                f"192.168.{segment}.{host} fd00:{segment}::{host}",
            )
        )
    backend = draw(st.sampled_from((VxlanBackend(), VxlanBackend(direct_routing=True), HostGwBackend(), UdpBackend())))
    networks = draw(st.sampled_from(((NETWORK, None), (NETWORK, NETWORK6), (None, NETWORK6))))
    return snapshot(*nodes), NetConf(*networks, backend=backend)
