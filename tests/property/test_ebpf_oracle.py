"""What sockets and packets meet in mode ebpf is what the oracle says: rendered tables, laid out in maps, read as programs do."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, asked_by_sockets, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.fake_ebpf import FakeServiceMaps
from kernelstate.reconcile_ebpf import SocketReconciler
from kernelstate.simulate_ebpf import EbpfSimulator
from nodeplane.explain import outcome_of, packet_of
from proxy.compile import compile_table
from proxy.modes import TRAITS
from proxy.oracle import Oracle
from proxy.render.ebpf_program import render_ebpf
from proxy.render.nftables_program import render_nftables
from proxy.table import ServiceTable


@st.composite
def configs(draw):
    """Draw settings with every option that decides what sockets may be told."""
    fate = draw(st.sampled_from(["keep", "keep", "drain", "reset"]))
    return msgspec.structs.replace(draw(proxy_settings()), guard_node_ports=draw(st.booleans()), flows_to_removed=fate)


@st.composite
def worlds(draw, family=4):
    """Draw a cluster with two Services or more, settings, and what is asked for."""
    snapshot = draw(snapshots(families=(4,) if family == 4 else (4, 6), least=2))
    return snapshot, draw(configs()), draw(st.lists(asked_by_sockets(snapshot, family), min_size=8, max_size=16))


def judge_both(table, config, asked):
    """Return (flow, oracle's outcomes, simulated outcomes, paths) for each flow, the maps written by the reconciler."""
    oracle = Oracle(table, config, NODE, LOCAL_ADDRESSES, TRAITS["ebpf"])
    maps = FakeServiceMaps()
    reconciler = SocketReconciler(maps, lambda: 0.0)
    reconciler.set_desired(render_ebpf(table, config, NODE))
    assert reconciler.sync().ok
    simulator = EbpfSimulator(maps.contents, render_nftables(table, config, NODE), LOCAL_ADDRESSES)
    for flow in asked:
        paths = simulator.walk(packet_of(flow))
        yield flow, oracle.judge(flow).outcomes, {outcome_of(p) for p in paths}, paths


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_ipv4_meets_oracle(world):
    """IPv4: for any cluster, settings and flow, whoever asks, oracle and maps agree."""
    snapshot, config, asked = world
    for flow, expected, simulated, _ in judge_both(compile_table(snapshot, NODE), config, asked):
        assert simulated == expected, flow


@settings(max_examples=50, deadline=None)
@given(worlds(family=6))
def test_ipv6_meets_oracle(world):
    """IPv6 in a dual-stack cluster: the same."""
    snapshot, config, asked = world
    for flow, expected, simulated, _ in judge_both(compile_table(snapshot, NODE), config, asked):
        assert simulated == expected, flow


@settings(max_examples=20, deadline=None)
@given(worlds())
def test_hashed_services_are_left_to_rules(world):
    """With consistent hashing exactly one thing happens to a flow, as the rules hash the client, and the oracle knows it."""
    snapshot, config, asked = world
    table = compile_table(snapshot, NODE)
    hashed = {n: tuple(msgspec.structs.replace(e, consistent=True) for e in entries) for n, entries in table.entries.items()}
    for flow, expected, simulated, _ in judge_both(ServiceTable(hashed), config, asked):
        assert len(simulated) == 1, flow
        assert simulated <= expected, flow


@settings(max_examples=20, deadline=None)
@given(worlds())
def test_balancing_is_even(world):
    """Every endpoint a socket may be led to is as likely as the others, and all that may happen sums to 1."""
    snapshot, config, asked = world
    for _, _, _, paths in judge_both(compile_table(snapshot, NODE), config, asked):
        total = {}
        for path in paths:
            if path.dnat is not None:
                total[path.dnat] = total.get(path.dnat, 0.0) + path.probability
        assert all(abs(p - 1 / len(total)) < 1e-6 for p in total.values())
        assert abs(sum(p.probability for p in paths) - 1) < 1e-6
