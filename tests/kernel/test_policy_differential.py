"""Packets through policies in the real kernel fare as the oracle says, for random clusters, one after the other on one node."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from policy_kernels import KERNELS
from policy_worlds import NODE_ADDRESS, clusters, flows
from wire import Wire

from clusterstate.objects import IPAddress
from clusterstate.snapshot import Snapshot
from kernelstate.linux import netns as namespaces
from netpolicy.compile import PolicyCompiler
from netpolicy.oracle import Flow, Oracle

pytestmark = pytest.mark.kernel

EXAMPLES = 50 if os.environ.get("EXPLORE") else 24


class Sent(NamedTuple):
    """A flow as the wire wants it: pods' packets come from their link, strangers' from the uplink."""

    source: IPAddress
    destination: IPAddress
    protocol: str
    port: int
    from_node: bool
    interface: str


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_meets_oracle(make_netns, kernel, family):
    """Each packet comes out exactly where policies allow it, and the kernel holds what was rendered, after every change."""
    node = make_netns()
    wire = Wire(node, make_netns())
    with namespaces.inside(node):
        enforced = KERNELS[kernel](node)
    compiler = PolicyCompiler("n1")
    identities = iter(range(1 << 30))
    stages = [Snapshot()]

    @seed(5)
    @hypothesis_settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking would go through the kernel for minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(clusters(), st.randoms(use_true_random=False))
    def check(cluster, random):
        refs = frozenset(o.ref for o in {*stages[-1].objects()} ^ {*cluster.objects()})
        change = compiler.update(cluster, refs)
        enforced.bring(compiler.table, change)
        stages.append(cluster)
        asked = [flow for flow in flows(cluster) if flow.source.version == family and may_be_sent(flow)]
        oracle = Oracle(compiler.table)
        # Most packets meet no policy or no rule: those that one lets through are sent as well.
        passed = [flow for flow in asked if "allow" in (oracle.judge(flow).egress, oracle.judge(flow).ingress)]
        chosen = {*random.sample(asked, min(60, len(asked))), *random.sample(passed, min(60, len(passed)))}
        sent = {}
        for flow in sorted(chosen, key=repr):
            identity = next(identities)
            sent[identity] = flow
            wire.send(as_sent(flow), identity)
        allowed = {identity for identity, flow in sent.items() if oracle.judge(flow).allowed}
        found = wire.collect(allowed)
        wrong = [(flow, found.get(i), oracle.judge(flow)) for i, flow in sent.items() if (i in found) != (i in allowed)]
        assert wrong == []

    try:
        check()
    finally:
        enforced.close()
        wire.close()


def may_be_sent(flow: Flow) -> bool:
    """Whether the rig can send a flow: the node's own address is sent from by the node, and nothing is sent to itself by it."""
    return (flow.source == NODE_ADDRESS) == flow.from_node and not flow.source == flow.destination == NODE_ADDRESS


def as_sent(flow: Flow) -> Sent:
    is_pod = str(flow.source).startswith(("10.244.1.", "fd00:244::"))
    return Sent(flow.source, flow.destination, flow.protocol, flow.port, flow.from_node, "veth1" if is_pod else "eth0")
