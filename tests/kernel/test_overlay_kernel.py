"""Pods of several real nodes reach each other: through VXLAN, directly, and mixed, over one segment and over two."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from overlay_nets import OverlayNode, crossing, overlay_nodes
from overlay_worlds import NETWORK, NETWORK6

from kernelstate.linux import netns
from kernelstate.objects.links import LinkState
from overlay.netconf import HostGwBackend, NetConf, VxlanBackend

pytestmark = pytest.mark.kernel

VXLAN = NetConf(NETWORK, NETWORK6)
DIRECT = NetConf(NETWORK, NETWORK6, backend=VxlanBackend(direct_routing=True))
HOST_GW = NetConf(NETWORK, NETWORK6, backend=HostGwBackend())


def bring_up(nodes: list[OverlayNode], conf: NetConf) -> list[LinkState]:
    """Bring every node to its desired state; each is then read back equal, and a second sync does nothing."""
    objects = [one.node for one in nodes]
    states = [one.desire(objects, conf) for one in nodes]
    for one, state in zip(nodes, states, strict=True):
        report = one.sync()
        assert report.ok, report
        assert one.observe(state) == state
        assert one.sync().changed == 0
    return states


@pytest.mark.parametrize(("conf", "way"), [(VXLAN, "vxlan"), (HOST_GW, "plain"), (DIRECT, "plain")])
def test_one_segment(make_netns: Callable[[], str], conf: NetConf, way: str) -> None:
    """On one segment pods of any two nodes reach each other in both families, encapsulated or not as the backend says."""
    with overlay_nodes(make_netns, (1, 1, 1)) as nodes:
        bring_up(nodes, conf)
        assert [crossing(nodes[a], nodes[b], family) for a, b in ((0, 1), (1, 2)) for family in (4, 6)] == [way] * 4


def test_two_segments(make_netns: Callable[[], str]) -> None:
    """Over a router VXLAN works, DirectRouting mixes both ways, and host-gw says whom it cannot reach and makes no route."""
    with overlay_nodes(make_netns, (1, 1, 2)) as nodes:
        bring_up(nodes, VXLAN)
        assert (crossing(nodes[0], nodes[2]), crossing(nodes[0], nodes[2], 6)) == ("vxlan", "vxlan")
        bring_up(nodes, DIRECT)
        assert [crossing(nodes[0], other, family) for other in nodes[1:] for family in (4, 6)] == ["plain"] * 2 + ["vxlan"] * 2
        states = bring_up(nodes, HOST_GW)
        table = nodes[0].compile([one.node for one in nodes], HOST_GW)
        assert [(p.node, p.value) for p in table.problems] == [("n3", "192.168.2.3"), ("n3", "fd00:2::3")]
        assert all("host-gw needs every node on one L2 segment" in str(p) for p in table.problems)
        assert {r.destination.address_text for r in states[0].routes} == {"10.244.2.0", "fd00:244:0:2::"}
        assert (crossing(nodes[0], nodes[1]), crossing(nodes[0], nodes[2], attempts=2)) == ("plain", "lost")
        assert "flannel" not in netns.run(nodes[0].space, ["ip", "link"])


DAMAGE = [
    ("ip", "route del 10.244.2.0/24"),
    ("ip", "route replace 10.244.2.0/24 via 192.168.1.254"),
    ("ip", "route add 10.244.66.0/24 via 192.168.1.254 proto 157"),
    ("ip", "-6 route del fd00:244:0:2::/64"),
    ("ip", "neigh del 10.244.2.0 dev flannel.1"),
    ("ip", "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent"),
    ("ip", "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud reachable"),
    ("bridge", "fdb del {mac} dev flannel.1 dst 192.168.1.2"),
    ("bridge", "fdb replace {mac} dev flannel.1 dst 192.168.1.77 self permanent"),
    ("bridge", "fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.168.1.77 self permanent"),
    ("ip", "addr flush dev flannel.1"),
    ("ip", "addr add 10.244.1.1/24 dev flannel.1"),
    ("ip", "link set flannel.1 down"),
    ("ip", "link set flannel.1 mtu 1400"),
    ("ip", "link set flannel.1 address 02:00:00:00:00:99"),
    ("ip", "link set flannel.1 alias somebody"),
    ("ip", "link del flannel.1"),
    ("ip", "link del flannel-v6.1"),
]


def test_damage_is_repaired(make_netns: Callable[[], str]) -> None:
    """Whatever somebody deletes, changes or adds on our side is noticed and undone within seconds, under the same MAC."""
    with overlay_nodes(make_netns, (1, 1)) as nodes:
        (state, _) = bring_up(nodes, VXLAN)
        mac = next(entry.mac for entry in state.fdb if entry.link == "flannel.1")
        for tool, words in DAMAGE:
            nodes[0].reconciler.drifted()
            netns.run(nodes[0].space, [tool, *words.format(mac=mac).split()])
            assert nodes[0].repair(words) < 5
            assert nodes[0].observe(state) == state, words
        assert [crossing(nodes[0], nodes[1], family) for family in (4, 6)] == ["vxlan", "vxlan"]


def test_uplink_outage(make_netns: Callable[[], str]) -> None:
    """Routes that went with the uplink, which no event tells of, are back once it is."""
    with overlay_nodes(make_netns, (1, 1)) as nodes:
        (state, _) = bring_up(nodes, HOST_GW)
        space = nodes[0].space
        netns.run(space, ["ip", "link", "set", "eth0", "down"])
        assert nodes[0].reconciler.drifted()
        report = nodes[0].sync()
        assert report.errors[0].startswith("replace route 10.244.2.0/24 via 192.168.1.2 dev eth0 proto 157: ")
        assert nodes[0].reconciler.dirty
        netns.run(space, ["ip", "link", "set", "eth0", "up"])
        netns.run(space, ["ip", "addr", "replace", f"{nodes[0].ips[6]}/64", "dev", "eth0", "nodad"])
        assert nodes[0].sync().ok
        assert nodes[0].observe(state) == state


def test_peer_that_leaves_and_restart(make_netns: Callable[[], str]) -> None:
    """A peer that left while nobody looked is removed at the next start; everybody else's objects stay as they were."""
    with overlay_nodes(make_netns, (1, 1, 1)) as nodes:
        bring_up(nodes, VXLAN)
        first = nodes[0]
        foreign = ["172.20.0.0/16", "via", "192.168.1.254", "dev", "eth0"]
        netns.run(first.space, ["ip", "route", "add", *foreign])
        index = netns.call(first.space, socket.if_nametoindex, "flannel.1")
        with netns.inside(first.space):
            first.reconciler = type(first.reconciler)(first.links)
        state = first.desire([nodes[0].node, nodes[1].node], VXLAN)
        report = first.sync()
        assert (report.ok, report.changed) == (True, 6)
        assert first.observe(state) == state
        assert crossing(nodes[0], nodes[1]) == "vxlan"
        assert netns.call(first.space, socket.if_nametoindex, "flannel.1") == index
        with netns.inside(first.space):
            assert first.reconciler.cleanup().ok
        assert first.observe(state) == LinkState()
        assert "172.20.0.0/16 via 192.168.1.254" in netns.run(first.space, ["ip", "route"])
