"""The third leg: packets through the real kernel meet the oracle, for random clusters, settings and flows."""

import random

import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings
from wire import Wire

from kernelstate.linux import netns as namespaces
from kernelstate.linux.iptables import IptablesPort
from kernelstate.reconcile import NetfilterReconciler
from nodeplane.pipeline import OWNERSHIP
from proxy.compile import compile_table
from proxy.oracle import Oracle, Outcome
from proxy.render.iptables_program import render_iptables

pytestmark = pytest.mark.kernel

TRIES = 3
"""How often each flow is sent: balancing draws lots, and each result must be one the oracle knows."""


def outcome_of(flow, event):
    """Bring what was seen on the wires into the oracle's words; a set where the wire cannot tell two apart."""
    local = flow.destination in LOCAL_ADDRESSES or flow.destination.is_loopback
    if event is None:
        return {"drop"}
    what, destination, port, _source = event
    if what == "refused":
        # The node itself refuses a port on which nobody listens, just as a rule would.
        return {"reject", "pass", "accept"} if local else {"reject"}
    if (destination, port) == (flow.destination, flow.port):
        return {"drop", "reject", "pass", "accept"} if local else {"pass"}
    return {f"[{destination}]:{port}" if destination.version == 6 else f"{destination}:{port}"}


def agrees(flow, event, expected: frozenset[Outcome]):
    """Whether what was seen is among the oracle's outcomes, source address included."""
    seen = outcome_of(flow, event)
    for outcome in expected:
        if (outcome.backend or outcome.verdict) not in seen:
            continue
        if not outcome.backend or flow.source in LOCAL_ADDRESSES:
            return True
        replaced = event[3] != flow.source
        if replaced == outcome.masquerade:
            return True
    return False


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("family", [4, 6])
def test_kernel_meets_oracle(make_netns, variant, family):
    """Each packet sent through the programmed kernel ends as the oracle says, in both iptables variants and families."""
    node, world = make_netns(), make_netns()
    wire = Wire(node, world)
    identities = iter(range(random.randrange(1 << 20), 1 << 30))
    families = (4,) if family == 4 else (4, 6)

    with namespaces.inside(node):
        reconciler = NetfilterReconciler(IptablesPort(variant), OWNERSHIP)

    @seed(20)
    @hypothesis_settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking would go through the kernel for minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(snapshots(families=families), proxy_settings(), st.lists(flows(family=family), min_size=30, max_size=40))
    def check(snapshot, config, asked):
        table = compile_table(snapshot, NODE)
        oracle = Oracle(table, config, NODE, LOCAL_ADDRESSES)
        with namespaces.inside(node):
            reconciler.set_desired(render_iptables(table, config, NODE), None, (4, 6))
            report = reconciler.sync()
        assert report.ok, report.errors
        sent = {}
        for flow in asked:
            for _ in range(TRIES):
                identity = next(identities)
                sent[identity] = flow
                wire.send(flow, identity)
        found = wire.collect(sent)
        for identity, flow in sent.items():
            expected = oracle.judge(flow).outcomes
            assert agrees(flow, found.get(identity), expected), (flow, found.get(identity), expected)

    try:
        check()
    finally:
        wire.close()
