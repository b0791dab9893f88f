"""What the peer table becomes: flannel's links and entries, routes, masquerade rules and subnet.env."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from overlay_worlds import DIRECT, DUAL, FAR, HOST_GW, N1, N2, UPLINK, VXLAN, compile_nodes, snapshot

from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, FdbEntry, Link, LinkState, Neigh, Route, Vxlan
from kernelstate.objects.netfilter import ChainKey, Masquerade
from kernelstate.text.iptables_save import print_ruleset
from overlay.lease import derived_mac
from overlay.netconf import NetConf, VxlanBackend
from overlay.render.hostgw import render_hostgw
from overlay.render.masquerade import render_masquerade
from overlay.render.vxlan import render_vxlan
from overlay.subnet_env import print_subnet_env
from overlay.table import PeerTable

M1, M2, M3 = (derived_mac(n, 1, 4) for n in ("n1", "n2", "n3"))


def table(conf: NetConf) -> PeerTable:
    return compile_nodes(snapshot(N1, N2, FAR), "n1", conf, UPLINK)


def test_vxlan_layout() -> None:
    """A peer is a permanent neighbour, a forwarding entry and an onlink route; the link's address is the subnet's .0/32."""
    assert render_vxlan(table(VXLAN)) == LinkState(
        links=(Link("flannel.1", 1450, M1, Vxlan(1, ip_address("192.168.1.1"), "eth0", 8472)),),
        addresses=(Address("flannel.1", ip_address("10.244.1.0"), 32),),
        neighbours=(
            Neigh("flannel.1", ip_address("10.244.2.0"), M2),
            Neigh("flannel.1", ip_address("10.244.3.0"), M3),
        ),
        fdb=tuple(
            sorted((FdbEntry("flannel.1", m, ip_address(ip)) for m, ip in ((M2, "192.168.1.2"), (M3, "192.168.2.3"))), key=str)
        ),
        routes=tuple(
            Route(Prefix.parse(f"10.244.{i}.0/24"), ip_address(f"10.244.{i}.0"), "flannel.1", onlink=True) for i in (2, 3)
        ),
    )


def test_dual_stack_layout() -> None:
    """IPv6 has a link of its own with 20 bytes less, the same VNI and port, and its own MAC."""
    state = render_vxlan(table(DUAL))
    assert state.links[1] == Link("flannel.1", 1450, M1, Vxlan(1, ip_address("192.168.1.1"), "eth0"))
    assert state.links[0] == Link("flannel-v6.1", 1430, derived_mac("n1", 1, 6), Vxlan(1, ip_address("fd00:1::1"), "eth0"))
    assert state.addresses[0] == Address("flannel-v6.1", ip_address("fd00:244:0:1::"), 128)
    assert {r.link for r in state.routes if r.destination.family == 6} == {"flannel-v6.1"}


def test_backend_options_reach_the_link() -> None:
    """VNI, port, learning, GBP and the stated MTU are the link's."""
    conf = NetConf(VXLAN.network, backend=VxlanBackend(vni=7, port=4789, mtu=9000, gbp=True, learning=True))
    (link,) = render_vxlan(table(conf)).links
    assert (link.name, link.mtu, link.kind) == (
        "flannel.7",
        8950,
        Vxlan(7, ip_address("192.168.1.1"), "eth0", 4789, True, True),
    )


def test_direct_routing_mixes() -> None:
    """With DirectRouting a near peer is one plain route and nothing on the tunnel; a far one is as ever."""
    state = render_vxlan(table(DIRECT))
    assert state.routes == (
        Route(Prefix.parse("10.244.2.0/24"), ip_address("192.168.1.2"), "eth0"),
        Route(Prefix.parse("10.244.3.0/24"), ip_address("10.244.3.0"), "flannel.1", onlink=True),
    )
    assert [n.mac for n in state.neighbours] == [e.mac for e in state.fdb] == [M3]


def test_host_gw_layout() -> None:
    """host-gw is one route a peer, and none to a peer on another segment."""
    assert render_hostgw(table(HOST_GW)) == LinkState(
        routes=(Route(Prefix.parse("10.244.2.0/24"), ip_address("192.168.1.2"), "eth0"),)
    )


def test_masquerade_order() -> None:
    """Rules stand in flannel's order; networks never to masquerade return right before the first masquerade."""
    rules = render_masquerade(
        table(VXLAN), ip_masq=True, never_masquerade=[Prefix.parse("172.16.0.0/12"), Prefix.parse("fd09::/16")]
    )
    text = print_ruleset(rules, 4)
    told = [line for line in text.splitlines() if line.startswith("-A FLANNEL-POSTRTG")]
    shape = [
        (line.split()[-2:] if "RETURN" in line else line.split("-j ")[1].split(), "! -s" in line, "172.16" in line)
        for line in told
    ]
    returns, masquerade = ["-j", "RETURN"], ["MASQUERADE", "--random-fully"]
    assert shape == [
        (returns, False, False),
        (returns, False, False),
        (returns, False, False),
        (returns, True, False),
        (returns, False, True),
        (masquerade, False, False),
        (masquerade, True, False),
    ]
    assert [(a.chain.name, a.first) for a in rules.anchors] == [("POSTROUTING", False), ("FORWARD", False)]


@pytest.mark.parametrize(
    ("masq", "forward", "chains"), [(False, True, {"FLANNEL-FWD"}), (True, False, {"FLANNEL-POSTRTG"}), (False, False, set())]
)
def test_masquerade_options(masq: bool, forward: bool, chains: set[str]) -> None:
    """Each of the two chains is there only if it was asked for."""
    rules = render_masquerade(table(VXLAN), ip_masq=masq, forward_rules=forward)
    assert {key.name for key in rules.chains} == {a.rule.target.chain for a in rules.anchors} == chains  # type: ignore[union-attr]


def test_masquerade_families() -> None:
    """Both families have the same rules, IPv6 with its own multicast network; ports are random only where asked."""
    rules = render_masquerade(table(DUAL), ip_masq=True, random_fully=False)
    four, six = (rules.chains[ChainKey(f, "nat", "FLANNEL-POSTRTG")] for f in (4, 6))  # type: ignore[arg-type]
    assert [r.target for r in four] == [r.target for r in six]
    assert six[4].destination == Prefix.parse("ff00::/8")
    assert six[4].target == Masquerade(random_fully=False)


@pytest.mark.parametrize(
    ("conf", "masq", "text"),
    [
        (VXLAN, True, "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"),
        (
            DUAL,
            False,
            (
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n"
                "FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\n"
                "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
            ),
        ),
        (HOST_GW, True, "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=true\n"),
    ],
)
def test_subnet_env(conf: NetConf, masq: bool, text: str) -> None:
    """subnet.env has flannel's lines in flannel's order."""
    assert print_subnet_env(table(conf), ip_masq=masq) == text
