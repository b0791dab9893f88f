"""The UDP backend, pure: its TUN and routes, the table behind them, the guard, the engine, and what people are shown."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

import pytest
from overlay_worlds import DIRECT, DUAL, FAR, HOST_GW, N1, N2, NETWORK, NETWORK6, UDP, UPLINK, VXLAN, compile_nodes, snapshot

from clusterstate.snapshot import Update
from kernelstate.errors import MissingFeatureError
from kernelstate.fake_tunnel import FakeTunnel
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, Link, LinkState, Route, Tun, Uplink
from kernelstate.objects.tunnel import SourceGuard, TunnelPeer, TunnelState, UdpTunnel
from kernelstate.reconcile_tunnel import TunnelReconciler
from kernelstate.simulate_links import Leaving, simulate_links
from kernelstate.text.udp_tunnel import print_tunnel
from nodeplane.config import parse_config
from nodeplane.kernel import TunnelParts
from nodeplane.pipeline import HostFacts, Pipeline
from nodeplane.status import PeerStatus, Status, status_lines
from nodeplane.tunnel_engine import choose_engine
from overlay.netconf import NetConf, UdpBackend
from overlay.render.guard import render_guard
from overlay.render.udp import render_udp, render_udp_tunnel
from overlay.table import PeerTable

UDP_DUAL = NetConf(NETWORK, NETWORK6, backend=UdpBackend(port=9000))


def table(conf: NetConf) -> PeerTable:
    return compile_nodes(snapshot(N1, N2, FAR), "n1", conf, UPLINK)


def peer(prefix: str, address: str) -> TunnelPeer:
    return TunnelPeer(Prefix.parse(prefix), ip_address(address))


V4 = (peer("10.244.2.0/24", "192.168.1.2"), peer("10.244.3.0/24", "192.168.2.3"))
V6 = (peer("fd00:244:0:2::/64", "fd00:1::2"), peer("fd00:244:0:3::/64", "fd00:2::3"))


def test_layout() -> None:
    """One TUN of the underlay's MTU less 28, the subnet's .0/32 on it, and the whole pod network routed into it."""
    assert render_udp(table(UDP)) == LinkState(
        links=(Link("flannel0", 1472, "", Tun()),),
        addresses=(Address("flannel0", ip_address("10.244.1.0"), 32),),
        routes=(Route(Prefix.parse("10.244.0.0/16"), None, "flannel0"),),
    )
    assert render_udp_tunnel(table(UDP)) == UdpTunnel("flannel0", "eth0", 8285, (ip_address("192.168.1.1"),), V4)


def test_dual_stack_shares_the_tun() -> None:
    """Both families go through one TUN, with the smaller MTU; each has its own outer address, and peers of its own family."""
    state = render_udp(table(UDP_DUAL))
    assert [(link.name, link.mtu) for link in state.links] == [("flannel0", 1452)]
    assert {str(r.destination) for r in state.routes} == {"10.244.0.0/16", "fd00:244::/48"}
    own = (ip_address("192.168.1.1"), ip_address("fd00:1::1"))
    assert render_udp_tunnel(table(UDP_DUAL)) == UdpTunnel("flannel0", "eth0", 9000, own, (*V4, *V6))


def test_a_node_without_an_end_has_no_tunnel() -> None:
    """Where the node has no pod network or no address there is neither link nor forwarder nor guard."""
    lone = compile_nodes(snapshot(N2), "n1", UDP, UPLINK)
    assert (render_udp(lone), render_udp_tunnel(lone), render_guard(lone)) == (LinkState(), None, None)
    unaddressed = compile_nodes(snapshot(N1, N2), "n1", UDP, Uplink("eth0", (ip_interface("fd00:1::1/64"),)))
    assert (render_udp(unaddressed), render_udp_tunnel(unaddressed)) == (LinkState(), None)


def test_other_backends_have_no_udp_tunnel() -> None:
    """A forwarder is wanted by backend udp alone."""
    assert [render_udp_tunnel(table(conf)) for conf in (VXLAN, DIRECT, HOST_GW, DUAL)] == [None] * 4


def test_simulated_steps() -> None:
    """A packet is led to the TUN, and there to the peer with the longest prefix; without one it is lost at that step."""
    state, tunnel = render_udp(table(UDP)), render_udp_tunnel(table(UDP))
    assert tunnel is not None
    assert simulate_links(state, ip_address("10.244.3.9"), tunnel) == Leaving(
        "flannel0", ip_address("192.168.2.3"), tunnel=True
    )
    assert simulate_links(state, ip_address("10.244.9.9"), tunnel) == Leaving("flannel0", None, tunnel=True, lost="peer")
    assert simulate_links(state, ip_address("10.244.3.9")) == Leaving("flannel0", None, tunnel=True, lost="peer")
    assert simulate_links(state, ip_address("10.244.1.0"), tunnel) is None
    assert simulate_links(state, ip_address("192.168.2.3"), tunnel) is None


@pytest.mark.parametrize(
    ("conf", "vxlan", "peers"),
    [(VXLAN, ((8472, 1),), V4), (DUAL, ((8472, 1),), (*V4, *V6)), (UDP, (), V4), (HOST_GW, (), V4[:1])],
)
def test_guard(conf: NetConf, vxlan: tuple[tuple[int, int], ...], peers: tuple[TunnelPeer, ...]) -> None:
    """The guard knows whose pods are whose for every backend, and which UDP packets to look into for vxlan."""
    families = {p.prefix.family for p in peers}
    assert render_guard(table(conf)) == SourceGuard(
        uplink="eth0",
        own=tuple(Prefix.parse(c) for c, f in (("10.244.1.0/24", 4), ("fd00:244:0:1::/64", 6)) if f in families),
        network=tuple(Prefix.parse(c) for c, f in (("10.244.0.0/16", 4), ("fd00:244::/48", 6)) if f in families),
        vxlan=vxlan,
        peers=peers,
    )


def test_pipeline_renders_tunnel_and_guard() -> None:
    """What the agent desires holds the tunnel and, unless sourceCheck is false, the guard; a new peer changes no link."""

    def desired(source_check: bool, *nodes) -> tuple[TunnelState | None, LinkState | None]:
        overlay = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}, "sourceCheck": source_check}
        config = parse_config(
            {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "overlay": overlay}
        )
        found = Pipeline(config).update(Update(snapshot(*nodes), None), HostFacts(uplink=UPLINK))
        return found.tunnel, found.links

    both, links = desired(True, N1, N2, FAR)
    assert both == TunnelState(render_udp_tunnel(table(UDP)), render_guard(table(UDP)))
    assert desired(False, N1, N2, FAR) == (TunnelState(render_udp_tunnel(table(UDP)), None), links)
    assert desired(False, N1)[1] == links


def test_print() -> None:
    """A tunnel prints as the command that forwards for it and a line a peer."""
    tunnel = render_udp_tunnel(table(UDP))
    assert tunnel is not None
    assert print_tunnel(tunnel) == (
        "# nodeplane-udp --tun flannel0 --port 8285 --local 192.168.1.1\n"
        "peer 10.244.2.0/24 192.168.1.2 8285\n"
        "peer 10.244.3.0/24 192.168.2.3 8285\n"
    )


def test_engine() -> None:
    """The kernel wraps packets where it can, unless told otherwise; asked for where it cannot, that is an error, not a choice."""
    assert [choose_engine(stated, "")[0] for stated in ("auto", "kernel", "userspace")] == ["kernel", "kernel", "userspace"]
    assert choose_engine("auto", "no BPF") == ("userspace", "no BPF")
    assert choose_engine("userspace", "no BPF") == ("userspace", "Backend.Engine in the configuration")
    with pytest.raises(MissingFeatureError, match="udp tunnel in the kernel is not available here: no BPF"):
        choose_engine("kernel", "no BPF")


def test_status_says_which_engine_and_why() -> None:
    """People see who wraps packets, and why it is not the other."""
    peers = (PeerStatus("n2", ("10.244.2.0/24",), "192.168.1.2", "udp", "udp"),)
    status = Status(1, "n1", "iptables", overlay="udp", engine="userspace", engine_reason="no BPF", peers=peers)
    assert "overlay   udp, userspace engine (no BPF), 1 peers" in status_lines(status, running=True)
    unguarded = status_lines(Status(1, "n1", "iptables", overlay="vxlan", unguarded="no BPF"), running=True)
    assert "          sources of packets from other nodes are NOT checked: no BPF" in unguarded


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("guards", [False, True])
def test_programs_are_told_what_is_wanted_and_can_be_had(wraps: bool, guards: bool) -> None:
    """Another engine, or a kernel that cannot, takes off what an earlier agent left in the kernel."""
    port = FakeTunnel()
    earlier = TunnelReconciler(port)
    state = TunnelState(render_udp_tunnel(table(UDP)), render_guard(table(UDP)))
    earlier.set_desired(state)
    assert earlier.sync().ok
    programs = TunnelReconciler(port)
    TunnelParts(programs, wraps, guards).set_desired(state)
    assert programs.sync().ok
    assert [port.observe(kind) is not None for kind in ("udp", "guard")] == [wraps, guards]
