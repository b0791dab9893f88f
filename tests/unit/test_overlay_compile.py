"""The peer table: who is a peer, how each is reached, and how bad input is told and contained."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

import pytest
from overlay_worlds import DIRECT, DUAL, FAR, HOST_GW, N1, N2, UPLINK, VXLAN, compile_nodes, node, snapshot

from clusterstate.objects import Node
from kernelstate.objects.links import Uplink
from overlay.lease import Vtep, derived_mac
from overlay.netconf import NetConf
from overlay.oracle import path_of
from overlay.table import PeerTable, Reach

A = "flannel.alpha.coreos.com/"
RUN = {A + "kube-subnet-manager": "true"}


def compiled(*nodes: Node, conf: NetConf = VXLAN, uplink: Uplink = UPLINK) -> PeerTable:
    return compile_nodes(snapshot(N1, *nodes), "n1", conf, uplink)


def problems(table: PeerTable) -> list[str]:
    return [str(p) for p in table.problems]


@pytest.mark.parametrize(
    ("conf", "near", "far"),
    [
        (VXLAN, Reach.VXLAN, Reach.VXLAN),
        (DIRECT, Reach.DIRECT, Reach.VXLAN),
        (HOST_GW, Reach.DIRECT, None),
    ],
)
def test_reach(conf: NetConf, near: Reach, far: Reach | None) -> None:
    """A peer inside the uplink's subnet can be reached directly, one outside only through a tunnel."""
    table = compiled(N2, FAR, conf=conf)
    reached = {peer.node: peer.reach for peer in table.peers}
    assert reached == ({"n2": near} if far is None else {"n2": near, "n3": far})


def test_host_gw_without_a_shared_segment() -> None:
    """host-gw says of a peer on another segment who it is, where, why it cannot work and what to use instead."""
    assert problems(compiled(N2, FAR, conf=HOST_GW)) == [
        (
            "Node n3: status.addresses: 192.168.2.3: is outside eth0's subnets 192.168.1.0/24; "
            "host-gw needs every node on one L2 segment; use vxlan, or vxlan with DirectRouting"
        )
    ]


def test_dual_stack() -> None:
    """A peer has one way for each family that is on, each with its own tunnel end."""
    (peer,) = compiled(N2, conf=DUAL).peers
    assert peer.pod_cidrs == (ip_network("10.244.2.0/24"), ip_network("fd00:244:0:2::/64"))
    assert peer.public_ips == (ip_address("192.168.1.2"), ip_address("fd00:1::2"))
    assert [way.vtep for way in peer.ways] == [Vtep(1, derived_mac("n2", 1, 4)), Vtep(1, derived_mac("n2", 1, 6))]


def test_annotations_count() -> None:
    """Flannel's annotations say MAC and address: overwrite before public-ip before node-public-ip before InternalIP."""
    asked = node("n2", "10.244.2.0/24", "192.168.1.2", {A + "node-public-ip": "198.51.100.9"})
    assert compiled(asked).peers[0].public_ips == (ip_address("198.51.100.9"),)
    data = {
        **RUN,
        A + "node-public-ip": "198.51.100.9",
        A + "backend-type": "vxlan",
        A + "backend-data": '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}',
        A + "public-ip": "198.51.100.2",
    }
    (peer,) = compiled(node("n2", "10.244.2.0/24", "192.168.1.2", data)).peers
    assert (peer.public_ips, peer.ways[0].vtep) == ((ip_address("198.51.100.2"),), Vtep(1, "12:c6:65:89:b4:e3"))
    data[A + "public-ip-overwrite"] = "203.0.113.2"
    (peer,) = compiled(node("n2", "10.244.2.0/24", "192.168.1.2", data)).peers
    assert peer.public_ips == (ip_address("203.0.113.2"),)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (node("n2", "10.244.1.128/25", "192.168.1.2"), "spec.podCIDRs: 10.244.1.128/25: overlaps the pod network of Node n1"),
        (node("n2", "10.244.0.0/20", "192.168.1.2"), "spec.podCIDRs: 10.244.0.0/20: overlaps the pod network of Node n1"),
        (node("n2", "10.9.0.0/24", "192.168.1.2"), "spec.podCIDRs: 10.9.0.0/24: is not inside Network 10.244.0.0/16"),
        (node("n2", "10.244.2.0/24", "192.168.1.1"), "status.addresses: 192.168.1.1: is the address of Node n1 as well"),
        (node("n2", "10.244.2.0/24", "10.244.9.9"), "status.addresses: 10.244.9.9: lies inside the pod network 10.244.0.0/16"),
        (node("n2", "10.244.2.0/24", "127.0.0.1"), "status.addresses: 127.0.0.1: is not the address of one node"),
        (node("n2", "", "192.168.1.2"), "spec.podCIDRs: nothing: has no IPv4 pod network"),
        (node("n2", "10.244.2.0/24"), "status.addresses: nothing: has no IPv4 InternalIP"),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "public-ip": "fd00::1"}),
            f"annotation {A}public-ip: fd00::1: is not an IPv4 address",
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "public-ip": "eth0"}),
            f"annotation {A}public-ip: eth0: is not an IPv4 address",
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "backend-type": "wireguard"}),
            f"annotation {A}backend-type: wireguard: the backend here is vxlan",
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "backend-type": ""}),
            f"annotation {A}backend-type: nothing: the backend here is vxlan",
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {A + "public-ip": "192.168.1.2"}),
            f"annotation {A}kube-subnet-manager: nothing: flannel has annotated the node but does not run it",
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {A + "kube-subnet-manager": "false"}),
            f"annotation {A}kube-subnet-manager: false: flannel has annotated the node but does not run it",
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "backend-data": '{"VNI":2,"VtepMAC":"12:c6:65:89:b4:e3"}'}),
            f'annotation {A}backend-data: {{"VNI":2,"VtepMAC":"12:c6:65:89:b4:e3"}}: the VNI here is 1',
        ),
        (
            node("n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "backend-data": "x"}),
            f"annotation {A}backend-data: x: is not JSON",
        ),
        (
            node(
                "n2", "10.244.2.0/24", "192.168.1.2", {**RUN, A + "backend-data": f'{{"VtepMAC":"{derived_mac("n1", 1, 4)}"}}'}
            ),
            f"VtepMAC: {derived_mac('n1', 1, 4)}: is the MAC of Node n1 as well",
        ),
    ],
)
def test_bad_node(bad: Node, words: str) -> None:
    """A bad node is left out with node, field and value told, and the others stay."""
    table = compiled(bad, FAR)
    assert [peer.node for peer in table.peers] == ["n3"]
    (problem,) = problems(table)
    assert problem.startswith(f"Node n2: {words}")


def test_conflict_has_one_winner() -> None:
    """Of two nodes with one claim the first by name wins; the own node wins against all."""
    a, b = node("a", "10.244.7.0/24", "192.168.1.7"), node("b", "10.244.7.0/24", "192.168.1.8")
    assert [p.node for p in compiled(b, a).peers] == ["a"]
    thief = node("a", "10.244.1.0/24", "192.168.1.7")
    table = compiled(thief)
    assert (table.peers, table.own_way(4).pod_cidr) == ((), ip_network("10.244.1.0/24"))  # type: ignore[union-attr]


def test_own_end() -> None:
    """The own end takes its MAC from its name, its address from the uplink when the node is told by another (NAT)."""
    own = node("n1", "10.244.1.0/24", "192.168.1.1", {A + "public-ip-overwrite": "203.0.113.1", A + "backend-type": "udp"})
    table = compile_nodes(snapshot(own), "n1", VXLAN, UPLINK)
    (way,) = table.own
    assert (way.public_ip, way.vtep) == (ip_address("192.168.1.1"), Vtep(1, derived_mac("n1", 1, 4)))


def test_without_an_end_no_peers() -> None:
    """A family in which this node lacks a pod network or the uplink an address has no ways, and that is told."""
    uplink = Uplink("eth0", (ip_interface("192.168.1.1/24"),))
    table = compiled(N2, conf=DUAL, uplink=uplink)
    assert [len(peer.ways) for peer in table.peers] == [1]
    assert problems(table) == ["Node n1: status.addresses: fd00:1::1: the uplink eth0 has no IPv6 address"]
    assert compile_nodes(snapshot(N2), "n1", VXLAN, UPLINK).peers == ()


@pytest.mark.parametrize(
    ("destination", "kind", "peer"),
    [
        ("10.244.1.9", "local", None),
        ("10.244.2.9", "host-gw", "n2"),
        ("10.244.3.9", "vxlan", "n3"),
        ("10.244.9.9", "external", None),
        ("192.168.1.1", "node", None),
        ("192.168.2.3", "node", "n3"),
        ("8.8.8.8", "external", None),
        ("fd00:244:0:2::1", "external", None),
    ],
)
def test_paths(destination: str, kind: str, peer: str | None) -> None:
    """The oracle tells a pod here, a pod there and by which way, a node, and everybody else apart."""
    path = path_of(compiled(N2, FAR, conf=DIRECT), ip_address(destination))
    assert (path.kind, path.peer) == (kind, peer)
