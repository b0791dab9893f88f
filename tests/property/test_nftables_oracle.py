"""The rendered nftables tables, simulated, do exactly what the oracle says: no outcome more, none less."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.objects.address import Prefix
from kernelstate.simulate_nftables import NftablesSimulator
from nodeplane.explain import outcome_of, packet_of
from proxy.compile import compile_table
from proxy.modes import TRAITS
from proxy.oracle import Oracle
from proxy.render.nftables_program import render_nftables
from proxy.table import ServiceTable

SERVICE_CIDRS = (Prefix.parse("10.96.0.0/16"), Prefix.parse("10.96.0.0/24"), Prefix.parse("fd00:96::/64"))


@st.composite
def nodes(draw):
    """Draw the node with or without ServiceCIDRs, which may overlap."""
    return msgspec.structs.replace(NODE, service_cidrs=draw(st.sampled_from([(), SERVICE_CIDRS])))


@st.composite
def configs(draw):
    """Draw settings, NodePorts guarded by source ranges or not."""
    return msgspec.structs.replace(draw(proxy_settings()), guard_node_ports=draw(st.booleans()))


def hashing(table):
    """Return the same Services, all asking for consistent hashing."""
    return ServiceTable(
        {name: tuple(msgspec.structs.replace(e, consistent=True) for e in entries) for name, entries in table.entries.items()}
    )


def judge_both(table, config, node, asked):
    """Return (flow, oracle's outcomes, simulated outcomes, paths) for each flow."""
    oracle = Oracle(table, config, node, LOCAL_ADDRESSES, TRAITS["nftables"])
    simulator = NftablesSimulator(render_nftables(table, config, node), LOCAL_ADDRESSES)
    for flow in asked:
        paths = simulator.walk(packet_of(flow))
        yield flow, oracle.judge(flow).outcomes, {outcome_of(p) for p in paths}, paths


@settings(max_examples=400, deadline=None)
@given(snapshots(), configs(), nodes(), st.lists(flows(), min_size=5, max_size=12))
def test_ip_table_meets_oracle(snapshot, config, node, asked):
    """IPv4: for any cluster, settings and flow, oracle and table agree."""
    for flow, expected, simulated, _ in judge_both(compile_table(snapshot, node), config, node, asked):
        assert simulated == expected, flow


@settings(max_examples=150, deadline=None)
@given(snapshots(families=(4, 6)), configs(), nodes(), st.lists(flows(family=6), min_size=5, max_size=12))
def test_ip6_table_meets_oracle(snapshot, config, node, asked):
    """IPv6 in a dual-stack cluster: the same."""
    for flow, expected, simulated, _ in judge_both(compile_table(snapshot, node), config, node, asked):
        assert simulated == expected, flow


@settings(max_examples=150, deadline=None)
@given(snapshots(), configs(), nodes(), st.lists(flows(), min_size=5, max_size=12))
def test_balancing_is_even(snapshot, config, node, asked):
    """Every backend a flow may reach is reached with the same probability, and all probabilities sum to 1."""
    for _, expected, _, paths in judge_both(compile_table(snapshot, node), config, node, asked):
        total = {}
        for path in paths:
            if path.dnat is not None:
                total[path.dnat] = total.get(path.dnat, 0.0) + path.probability
        backends = {o.backend for o in expected if o.backend}
        assert all(abs(p - 1 / len(backends)) < 1e-6 for p in total.values())
        assert abs(sum(p.probability for p in paths) - 1) < 1e-6


@settings(max_examples=100, deadline=None)
@given(snapshots(), configs(), nodes(), st.lists(flows(), min_size=5, max_size=12))
def test_a_hashed_client_has_one_outcome(snapshot, config, node, asked):
    """With consistent hashing exactly one thing happens to a flow, and it is one that the oracle knows."""
    for flow, expected, simulated, _ in judge_both(hashing(compile_table(snapshot, node)), config, node, asked):
        assert len(simulated) == 1, flow
        assert simulated <= expected, flow


@settings(max_examples=100, deadline=None)
@given(snapshots(), configs(), nodes(), st.lists(flows(), min_size=5, max_size=12))
def test_a_remembered_client_comes_back(snapshot, config, node, asked):
    """A client that stands in one endpoint's set goes there, and nowhere else, wherever the oracle lets it."""
    tables = render_nftables(compile_table(snapshot, node), config, node)
    simulator = NftablesSimulator(tables, LOCAL_ADDRESSES)
    for flow in asked:
        first = simulator.walk(packet_of(flow))
        for path in first:
            into = [
                s.happened.partition("remembered in ")[2].partition(",")[0] for s in path.steps if "remembered" in s.happened
            ]
            if into:
                (name,) = into
                again = simulator.walk(msgspec.structs.replace(packet_of(flow), remembered=frozenset({name})))
                assert {p.dnat for p in again} == {path.dnat}, flow
