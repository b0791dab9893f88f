"""Rules, sets and virtual servers, simulated together, do exactly what the oracle says of IPVS: no outcome more, none less."""

from ipaddress import ip_address

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.objects.address import Prefix
from kernelstate.simulate_ipvs import IpvsSimulator
from nodeplane.explain import outcome_of, packet_of
from proxy.compile import compile_table
from proxy.modes import TRAITS
from proxy.oracle import Oracle
from proxy.render.ipvs_program import render_ipvs

LINK_LOCAL = ip_address("fe80::1")
OWN = LOCAL_ADDRESSES | {LINK_LOCAL, ip_address("10.97.0.2"), ip_address("fd00:97::2")}
"""The node's own addresses: a Service's external IP is among them."""
HOST = msgspec.structs.replace(NODE, local_addresses=tuple(sorted(Prefix.host(a) for a in OWN)))


@st.composite
def ipvs_settings(draw):
    """Draw settings with those that only IPVS knows."""
    return msgspec.structs.replace(
        draw(proxy_settings()),
        guard_node_ports=draw(st.booleans()),
        exclude_cidrs=draw(st.sampled_from([(), (), (Prefix.parse("10.96.0.0/31"), Prefix.parse("fd00:98::/64"))])),
    )


@st.composite
def asked(draw, table, family):
    """Draw a flow: half of them to a frontend there is, and some as only a node that holds the Services' addresses sends them."""
    flow = draw(flows(family=family))
    there = [(e.name.protocol, f) for e in table if e.family == family for f in e.frontends]
    if there and draw(st.integers(0, 9)) < 8:
        protocol, frontend = draw(st.sampled_from(there))
        own = draw(st.sampled_from(sorted(a for a in OWN if a.version == family)))
        port = draw(st.sampled_from([frontend.port, frontend.port, frontend.port, 32000]))
        flow = msgspec.structs.replace(flow, destination=frontend.address or own, protocol=protocol, port=port)
    if draw(st.integers(0, 4)) == 0 and not flow.destination.is_loopback:
        return msgspec.structs.replace(flow, source=flow.destination, from_node=True, interface="")
    return flow


@st.composite
def worlds(draw, families, family):
    """Draw a compiled cluster, settings, and flows of one family."""
    table = compile_table(draw(snapshots(families=families)), HOST)
    return table, draw(ipvs_settings()), draw(st.lists(asked(table, family), min_size=5, max_size=12))


def disagreements(table, config, flows_asked):
    """Return every flow for which oracle and simulation differ, with both answers."""
    oracle = Oracle(table, config, HOST, OWN, TRAITS["ipvs"])
    program = render_ipvs(table, config, HOST)
    simulator = IpvsSimulator(program.ruleset, program.sets, program.servers, program.addresses, OWN)
    judged = [(f, oracle.judge(f).outcomes, frozenset(map(outcome_of, simulator.walk(packet_of(f))))) for f in flows_asked]
    return [one for one in judged if one[1] != one[2]]


@settings(max_examples=400, deadline=None)
@given(worlds((4,), 4))
def test_ipvs_meets_oracle(world):
    """IPv4: for any cluster, settings and flow, oracle and kernel state agree."""
    assert disagreements(*world) == []


@settings(max_examples=150, deadline=None)
@given(worlds((4, 6), 6))
def test_ipvs_meets_oracle_in_ipv6(world):
    """IPv6 in a dual-stack cluster: the same."""
    assert disagreements(*world) == []
