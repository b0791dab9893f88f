"""For generated clusters the rendered state sends packets where the oracle says, and conflicts have one outcome."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

from hypothesis import given, settings
from hypothesis import strategies as st
from immutables import Map
from overlay_worlds import clusters, compile_nodes

from clusterstate.snapshot import Snapshot
from kernelstate.diff_links import diff_links, index, key_of
from kernelstate.objects.links import LinkState, Uplink
from kernelstate.simulate_links import Leaving, simulate_links
from overlay.netconf import NetConf, UdpBackend, VxlanBackend
from overlay.oracle import Path, path_of
from overlay.render.guard import render_guard
from overlay.render.hostgw import render_hostgw
from overlay.render.udp import LINK, render_udp, render_udp_tunnel
from overlay.render.vxlan import render_vxlan
from overlay.table import PeerTable

Cluster = tuple[Snapshot, NetConf]
ADDRESSES = st.one_of(
    st.builds(lambda a, b: ip_address(f"10.244.{a}.{b}"), st.integers(0, 13), st.integers(0, 255)),
    st.builds(lambda a, b: ip_address(f"fd00:244:0:{a:x}::{b:x}"), st.integers(0, 13), st.integers(0, 255)),
    st.builds(lambda a, b: ip_address(f"192.168.{a}.{b}"), st.integers(1, 3), st.integers(1, 9)),
    st.ip_addresses(),
)


def seen_from(cluster: Cluster, name: str) -> PeerTable:
    snapshot, conf = cluster
    addresses = tuple(ip_interface(f"{a.ip}/{24 if a.ip.version == 4 else 64}") for a in snapshot.nodes[name].addresses)
    return compile_nodes(snapshot, name, conf, Uplink("eth0", addresses))


RENDER = {"vxlan": render_vxlan, "host-gw": render_hostgw, "udp": render_udp}


def rendered(table: PeerTable) -> LinkState:
    return RENDER[table.net_conf.backend.type](table)


def expected(table: PeerTable, path: Path) -> Leaving | None:
    """Translate the oracle's answer: which next hop, and through which link."""
    if path.kind not in {"vxlan", "host-gw", "udp"}:
        return None
    (peer,) = [p for p in table.peers if p.node == path.peer]
    (way,) = [w for w in peer.ways if path.why.startswith(f"inside {w.pod_cidr} ")]
    backend = table.net_conf.backend
    link = backend.link_name(way.family) if isinstance(backend, VxlanBackend) and path.kind == "vxlan" else "eth0"
    return Leaving(LINK if path.kind == "udp" else link, way.public_ip, tunnel=path.kind != "host-gw")


def refused_at_the_tun(table: PeerTable, destination) -> bool:
    """Whether the route of the whole pod network leads a packet to the TUN though no peer has it."""
    network, own = table.net_conf.network_of(destination.version), table.own_way(destination.version)
    inside = network is not None and own is not None and destination in network
    return isinstance(table.net_conf.backend, UdpBackend) and inside and destination != own.pod_cidr.network_address


@given(clusters(), st.lists(ADDRESSES, min_size=1, max_size=30))
def test_render_meets_oracle(cluster: Cluster, destinations: list) -> None:
    """Routes and what they lead to send each packet to the node that the oracle names, by the way it names."""
    table = seen_from(cluster, "n0")
    state, tunnel = rendered(table), render_udp_tunnel(table)
    for destination in destinations:
        wanted = expected(table, path_of(table, destination))
        if wanted is None and refused_at_the_tun(table, destination):
            wanted = Leaving(LINK, None, tunnel=True, lost="peer")
        assert simulate_links(state, destination, tunnel) == wanted


@settings(deadline=None)
@given(clusters())
def test_guard_knows_every_peer(cluster: Cluster) -> None:
    """The guard lets each peer speak for exactly its own pods, and nobody for this node's."""
    table = seen_from(cluster, "n0")
    guard = render_guard(table)
    if guard is None:
        assert not table.own
        return
    held = {(str(p.prefix), p.address) for p in guard.peers}
    assert held == {(str(w.pod_cidr), w.public_ip) for p in table.peers for w in p.ways}
    assert {str(p) for p in guard.own} == {str(end.pod_cidr) for end in table.own}
    assert not {p.prefix for p in guard.peers} & set(guard.own)


@given(clusters(), st.randoms(use_true_random=False))
def test_order_of_nodes_is_irrelevant(cluster: Cluster, random) -> None:
    """The table is the same whatever the order in which nodes came."""
    snapshot, conf = cluster
    nodes = list(snapshot.nodes.items())
    random.shuffle(nodes)
    assert seen_from((Snapshot(nodes=Map(nodes)), conf), "n0") == seen_from(cluster, "n0")


@given(clusters())
def test_every_node_is_peer_or_problem(cluster: Cluster) -> None:
    """Nobody is left out in silence: in each family a node is a way or a problem, unless this node has no end of its own."""
    table = seen_from(cluster, "n0")
    for name in sorted(cluster[0].nodes):
        for family in table.net_conf.families:
            ways = [w for p in table.peers if p.node == name for w in p.ways if w.family == family]
            own = name == "n0" and table.own_way(family) is not None
            told = [p for p in table.problems if p.node == name]
            assert ways or own or told or table.own_way(family) is None


@given(clusters())
def test_both_ends_agree(cluster: Cluster) -> None:
    """What one end takes for a peer's address and MAC is what the peer gives its own end, where neither is left out."""
    table = seen_from(cluster, "n0")
    for peer in table.peers:
        theirs = seen_from(cluster, peer.node)
        for way in peer.ways:
            end = theirs.own_way(way.family)
            assert end is not None
            assert (end.public_ip, end.pod_cidr) == (way.public_ip, way.pod_cidr)
            assert way.vtep is None or end.vtep == way.vtep


@given(clusters(), clusters())
def test_changes_lead_from_one_state_to_the_other(before: Cluster, after: Cluster) -> None:
    """Doing the difference, in order and with links taking along what lies on them, gives the desired state and no more."""
    have, want = rendered(seen_from(before, "n0")), rendered(seen_from(after, "n0"))
    kernel = index(have)
    for change in diff_links(want, have):
        obj = change.obj
        if change.verb == "delete":
            kernel.pop(key_of(obj))
            if hasattr(obj, "name"):
                kernel = {k: o for k, o in kernel.items() if getattr(o, "link", None) != obj.name}
        else:
            if hasattr(obj, "link") and obj.link != "eth0":
                assert ("link", obj.link) in kernel
            kernel[key_of(obj)] = obj
    assert LinkState.of(list(kernel.values())) == want
    assert diff_links(want, want) == ()
