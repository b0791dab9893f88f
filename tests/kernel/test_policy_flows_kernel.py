"""A policy changes under open connections: those that it forbids are cut in both directions, those that it allows go on."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec
import pytest
from immutables import Map
from policy_kernels import KERNELS
from service_node import ServiceNode, end_of, pod_ip

from clusterstate.objects import (
    ClusterNetworkPolicy,
    ClusterPolicyRule,
    LabelSelector,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Requirement,
)
from clusterstate.snapshot import Snapshot
from kernelstate.linux import netns
from kernelstate.linux.conntrack import Conntrack
from netpolicy.compile import PolicyCompiler
from nodeplane.policy_flows import PolicyFlows

pytestmark = pytest.mark.kernel

PODS = {
    ("ns", f"p{i}"): Pod("ns", f"p{i}", "n1", (ip_address(pod_ip(i)), ip_address(pod_ip(i, 6))), labels=Map({"pod": f"p{i}"}))
    for i in (1, 2, 3)
}


def let_in(*names: str) -> Snapshot:
    """Return a cluster in which only these reach p1, on TCP and UDP port 80."""
    peer = PolicyPeer(LabelSelector((Requirement("pod", "In", names),)))
    rule = PolicyRule((peer,), (PolicyPort("TCP", 80), PolicyPort("UDP", 80)))
    subject = LabelSelector((Requirement("pod", "In", ("p1",)),))
    policy = NetworkPolicy("ns", "np", subject, ingress=(rule,))
    return Snapshot(pods=Map(PODS), policies=Map({("ns", "np"): policy}))


def denied(name: str, cluster: Snapshot) -> Snapshot:
    """Return the cluster with a ClusterNetworkPolicy that denies all that this pod sends to others."""
    peer = PolicyPeer(LabelSelector((Requirement("pod", "In", (name,)),)), LabelSelector())
    rule = ClusterPolicyRule((peer,), action="Deny")
    policy = ClusterNetworkPolicy("cnp", "Admin", 0, PolicyPeer(LabelSelector(), LabelSelector()), ingress=(rule,))
    return msgspec.structs.replace(cluster, cluster_policies=Map({"cnp": policy}))


class Enforcer:
    """What an agent does with policies, one cluster after the other, inside the node."""

    def __init__(self, node: str, kernel: str) -> None:
        self.node = node
        self.compiler = PolicyCompiler("n1")
        with netns.inside(node):
            self.kernel, self.flows = KERNELS[kernel](node), PolicyFlows(Conntrack())

    def take(self, snapshot: Snapshot) -> int:
        change = self.compiler.update(snapshot, None)
        self.kernel.bring(self.compiler.table, change)
        self.flows.take(self.compiler.table, change)
        with netns.inside(self.node):
            report = self.flows.sync(frozenset())
        assert report.errors == ()
        return report.changed


@pytest.fixture
def rig(make_netns):
    made = ServiceNode(make_netns, 3)
    yield made
    made.close()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cut_and_kept(rig, kernel, family):
    """Of two open connections the one that is no longer allowed is silent from then on, whoever speaks; the other goes on."""
    enforcer = Enforcer(rig.node, kernel)
    try:
        enforcer.take(let_in("p2", "p3"))
        server = rig.listen(1, 80, family)
        pairs = {}
        for number in (2, 3):
            client = rig.connect(rig.pods[number], pod_ip(1, family), 80)
            pairs[number] = client, rig.accept(server)
            client.sendall(b"hello")
            assert pairs[number][1].recv(100) == b"hello"
        assert enforcer.take(let_in("p3")) == 1, "one flow is cut, and the other not touched"
        kept, cut = pairs[3], pairs[2]
        cut[1].sendall(b"from the server")
        cut[0].sendall(b"from the client")
        assert end_of(cut[0], 0.4) == "silence"
        assert end_of(cut[1], 0.4) == "silence"
        kept[1].sendall(b"still here")
        assert kept[0].recv(100) == b"still here"
        fresh = rig.socket(rig.pods[2], family)
        fresh.settimeout(0.4)
        with pytest.raises(TimeoutError):
            fresh.connect((pod_ip(1, family), 80))
        assert enforcer.take(let_in("p2", "p3")) == 0
        cut[0].sendall(b"again")
        assert enforcer.take(denied("p3", let_in("p2", "p3"))) == 1, "a tier before the policy denies what it lets in"
        kept[0].sendall(b"from the client")
        assert end_of(kept[1], 0.4) == "silence"
    finally:
        enforcer.kernel.close()
