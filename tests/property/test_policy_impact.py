"""What `nodeplane policy impact` says of a change is what the oracle says of every connection before and after, no more and no less."""

from __future__ import annotations

import os
from ipaddress import ip_address

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from immutables import Map
from policy_worlds import OUTSIDE, clusters, labels

from clusterstate.snapshot import Snapshot
from netpolicy.compile import compile_policies, live
from netpolicy.impact import Effect, Ends
from netpolicy.oracle import Flow, Oracle
from nodeplane.policy_command import effects_of

EXAMPLES = 1000 if os.environ.get("EXPLORE") else 40
PORTS = (1, 79, 80, 81, 82, 90, 91, 443, 65535)


@st.composite
def changes(draw) -> tuple[Snapshot, Snapshot]:
    """Draw a cluster, and the same with other policies of a kind, or with other labels of its pods or namespaces."""
    before, other = draw(clusters()), draw(clusters())
    part = draw(st.sampled_from(["policies", "policies", "cluster_policies", "namespaces", "pods"]))
    if part == "pods":
        fresh = Map({name: msgspec.structs.replace(pod, labels=draw(labels)) for name, pod in before.pods.items()})
    else:
        fresh = getattr(other, part)
    return before, msgspec.structs.replace(before, **{part: fresh})


@settings(max_examples=EXAMPLES, deadline=None)
@given(changes())
def test_exactly_what_differs(change):
    """Each connection between pods, and with strangers, is reported if and only if both tables decide it differently."""
    before, after = change
    oracles = [Oracle(compile_policies(one, None)) for one in change]
    effects = effects_of(before, after)
    pods = {ip: name for name, pod in before.pods.items() if live(pod) for ip in pod.ips}
    strangers = [ip for ip in map(ip_address, OUTSIDE) if ip not in pods]
    for source in (*pods, *strangers):
        for destination in (*pods, *strangers):
            if (
                source == destination
                or source.version != destination.version
                or (source in strangers and destination in strangers)
            ):
                continue
            for protocol in ("TCP", "UDP", "SCTP"):
                for port in PORTS:
                    flow = Flow(source, destination, protocol, port)
                    was, now = (oracle.judge(flow).allowed for oracle in oracles)
                    wanted = {"opens"} if now and not was else {"closes"} if was and not now else set()
                    assert {one.kind for one in effects if is_told(one, flow, pods)} == wanted, flow


def is_told(effect: Effect, flow: Flow, pods) -> bool:
    """Whether an effect speaks of a connection."""
    return (
        flow.source.version in effect.families
        and is_end(effect.source, flow.source, pods)
        and is_end(effect.destination, flow.destination, pods)
        and any(p.protocol == flow.protocol and p.first <= flow.port <= p.last for p in effect.ports)
    )


def is_end(ends: Ends, address, pods) -> bool:
    if address in pods:
        return pods[address] in ends.pods
    pieces = [piece for one in ends.outside for piece in one.pieces if piece[0].version == address.version]
    return any(first <= address <= last for first, last in pieces)
