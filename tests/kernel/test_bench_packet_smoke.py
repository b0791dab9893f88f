"""The generator's packets go through a node and arrive where they should; what is counted is checked here, never what it costs."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address

import pytest

from bench import packet_cost
from bench.injection import Target, open_injector, open_road
from bench.packet_cost import TRAFFIC, to_services
from bench.result import Options, value_of
from kernelstate.linux import netns
from kernelstate.linux.iptables import IptablesPort

pytestmark = pytest.mark.kernel

POD = int(IPv4Address("10.130.0.1"))
TO_POD = Target((POD,), 8080, POD, POD, 8080)
TO_SERVICE = Target((int(IPv4Address("10.96.0.1")),), 80, POD, POD, 8080)
RULES = """\
*nat
-A PREROUTING -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.130.0.1:8080
COMMIT
*filter
-A FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"""


@pytest.fixture
def injector():
    with open_injector() as one:
        yield one


@pytest.fixture
def road(injector):
    with open_road(injector, "192.168.60.1/32") as one:
        yield one


def test_every_packet_of_every_flow_arrives(injector, road):
    """A thousand new connections are a thousand flows to conntrack, all of them arrive, and none has a wrong checksum."""
    with netns.inside(road.node):
        IptablesPort("legacy").apply(4, RULES)
    sent = injector.new_flows(road, TO_SERVICE, 1000)
    assert (sent.packets, sent.arrived, sent.elsewhere, sent.lost) == (1000, 1000, 0, 0)
    assert sent.cpu > 0
    assert int(netns.run(road.node, ["conntrack", "-C"])) == 1000
    listed = netns.run(road.node, ["conntrack", "-L"])
    assert len(set(re.findall(r" src=(10\.240\.\S+)", listed))) == 256


def test_a_handshake_leaves_an_established_flow(injector, road):
    """Conntrack calls the flow ESTABLISHED after the handshake, and further packets belong to it."""
    with netns.inside(road.node):
        IptablesPort("legacy").apply(4, RULES)
    number = injector.establish(road, TO_SERVICE)
    assert injector.established(road, TO_SERVICE, number, 500).lost == 0
    (line,) = netns.run(road.node, ["conntrack", "-L", "-p", "tcp"]).splitlines()
    assert "ESTABLISHED" in line
    assert "[ASSURED]" in line


def test_packets_that_are_dropped_are_lost(injector, road):
    """A rule that drops every packet is seen as packets lost, so a datapath that loses them cannot look cheap."""
    with netns.inside(road.node):
        IptablesPort("legacy").apply(4, "*filter\n-A FORWARD -j DROP\nCOMMIT\n")
    sent = injector.new_flows(road, TO_POD, 64)
    assert (sent.arrived, sent.lost) == (0, 64)


def test_packets_to_the_wrong_place_are_not_counted_as_arrived(injector, road):
    """A packet that leaves the node towards another address is counted apart."""
    elsewhere = Target((POD,), 8080, POD + 1, POD + 1, 8080)
    sent = injector.new_flows(road, elsewhere, 64)
    assert (sent.arrived, sent.elsewhere) == (0, 64)


def test_benchmark_counts(monkeypatch):
    """With few Services and packets every traffic of every datapath is measured, and its ratio is to forwarding."""
    monkeypatch.setattr(packet_cost, "MOST", 512)
    before = set(netns.names())
    rows = packet_cost.measure(Options(modes=("iptables", "nftables")), rounds=1, budget=1.0, sizes=(10,))
    costs = [row for row in rows if row.metric == "CPU per packet"]
    datapaths = ["forwarding", "conntrack", "iptables flat", "iptables", "nftables"]
    assert [(row.name, row.params["datapath"]) for row in costs] == [(t, d) for t in TRAFFIC for d in datapaths]
    assert {row.mode for row in costs} == {"none", "iptables", "nftables"}
    for row in costs:
        bare = value_of(costs, row.name, row.metric, datapath="forwarding")
        assert row.baseline_ratio == (None if row.params["datapath"] == "forwarding" else row.value / bare)
    assert not {n for n in set(netns.names()) - before if n.startswith(f"np-bench-{os.getpid()}-")}


def test_target_of_services():
    """Packets to Services of the made-up cluster should arrive in the range of their endpoints."""
    target = to_services([42, 7])
    assert [str(IPv4Address(a)) for a in target.addresses] == ["10.96.0.43", "10.96.0.8"]
    assert [str(IPv4Address(a)) for a in (target.first, target.last)] == ["10.128.0.57", "10.128.1.83"]
    assert (target.port, target.arrival_port) == (80, 8080)
