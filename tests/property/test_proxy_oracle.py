"""The rendered rules, simulated, do exactly what the oracle says: no outcome more, none less."""

from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.simulate import Simulator
from nodeplane.explain import outcome_of, packet_of
from proxy.compile import compile_table
from proxy.oracle import Oracle
from proxy.render.iptables_program import render_iptables


def judge_both(snapshot, config, asked):
    """Return (flow, oracle's outcomes, simulated outcomes, probabilities by backend) for each flow."""
    table = compile_table(snapshot, NODE)
    oracle = Oracle(table, config, NODE, LOCAL_ADDRESSES)
    simulator = Simulator(render_iptables(table, config, NODE), LOCAL_ADDRESSES)
    for flow in asked:
        paths = simulator.walk(packet_of(flow))
        yield flow, oracle.judge(flow).outcomes, {outcome_of(p) for p in paths}, paths


@settings(max_examples=400, deadline=None)
@given(snapshots(), proxy_settings(), st.lists(flows(), min_size=5, max_size=12))
def test_iptables_meets_oracle(snapshot, config, asked):
    """IPv4: for any cluster, settings and flow, oracle and rules agree."""
    for flow, expected, simulated, _ in judge_both(snapshot, config, asked):
        assert simulated == expected, flow


@settings(max_examples=150, deadline=None)
@given(snapshots(families=(4, 6)), proxy_settings(), st.lists(flows(family=6), min_size=5, max_size=12))
def test_ip6tables_meets_oracle(snapshot, config, asked):
    """IPv6 in a dual-stack cluster: the same."""
    for flow, expected, simulated, _ in judge_both(snapshot, config, asked):
        assert simulated == expected, flow


@settings(max_examples=150, deadline=None)
@given(snapshots(), proxy_settings(), st.lists(flows(), min_size=5, max_size=12))
def test_balancing_is_even(snapshot, config, asked):
    """Every backend a flow may reach is reached with the same probability."""
    for _, expected, _, paths in judge_both(snapshot, config, asked):
        total = {}
        for path in paths:
            if path.dnat is not None:
                total[path.dnat] = total.get(path.dnat, 0.0) + path.probability
        backends = {o.backend for o in expected if o.backend}
        assert all(abs(p - 1 / len(backends)) < 1e-6 for p in total.values())
