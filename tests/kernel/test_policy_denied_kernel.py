"""Denied packets are counted for the pod and direction, and logged with both pods' names, as often as was asked for and no more."""

from __future__ import annotations

import logging
import socket
from ipaddress import ip_address

import pytest
from immutables import Map
from patience import eventually
from policy_kernels import KERNELS
from service_node import ServiceNode, pod_ip

from clusterstate.objects import LabelSelector, NetworkPolicy, Pod, PolicyPeer, PolicyPort, PolicyRule, Requirement
from clusterstate.snapshot import Snapshot
from kernelstate.linux import netns
from netpolicy.compile import PolicyCompiler
from netpolicy.render.denied import DeniedLog
from nodeplane.denied import Denied, DeniedLogger, names_of, read_denied

pytestmark = pytest.mark.kernel

PODS = {
    ("ns", f"p{i}"): Pod("ns", f"p{i}", "n1", (ip_address(pod_ip(i)), ip_address(pod_ip(i, 6))), labels=Map({"pod": f"p{i}"}))
    for i in (1, 2, 3)
}
LOG = DeniedLog(per_second=5, burst=10)


def cluster(*ports: int) -> Snapshot:
    """Return one in which p2 reaches p1 on these UDP ports, p3 reaches nobody, and p2 may send everything."""
    of = {name: LabelSelector((Requirement("pod", "In", (name,)),)) for name in ("p1", "p2", "p3")}
    rule = PolicyRule((PolicyPeer(of["p2"]),), tuple(PolicyPort("UDP", port) for port in ports))
    held = [
        NetworkPolicy("ns", "in", of["p1"], ingress=(rule,)),
        NetworkPolicy("ns", "out", of["p3"], isolates_ingress=False, isolates_egress=True),
    ]
    return Snapshot(pods=Map(PODS), policies=Map({("ns", one.name): one for one in held}))


class Enforcer:
    """Policies in the kernel of a node, counted and logged."""

    def __init__(self, node: str, kernel: str) -> None:
        self.node, self.compiler = node, PolicyCompiler("n1")
        self.mode = kernel.partition("-")[0]
        with netns.inside(node):
            self.kernel, self.logger = KERNELS[kernel](node, LOG), DeniedLogger()
        self.logger.start()

    def take(self, snapshot: Snapshot) -> None:
        self.logger.learn(snapshot)
        with netns.inside(self.node):
            self.kernel.bring(self.compiler.table, self.compiler.update(snapshot, None))

    def counts(self, snapshot: Snapshot) -> list[Denied]:
        with netns.inside(self.node):
            return read_denied(self.mode, names_of(snapshot))


@pytest.fixture
def rig(make_netns):
    made = ServiceNode(make_netns, 3)
    yield made
    made.close()


@pytest.fixture(params=KERNELS)
def enforcer(rig, request):
    made = Enforcer(rig.node, request.param)
    yield made
    made.logger.stop()
    made.kernel.close()


def send(rig, source: int, destination: int, port: int, *, family: int = 4, number: int = 1) -> None:
    """Send UDP packets, each of a connection of its own."""
    for _ in range(number):
        with rig.socket(rig.pods[source], family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (pod_ip(destination, family), port))


@pytest.mark.parametrize("family", [4, 6])
def test_counted_and_logged(rig, enforcer, caplog, family):
    """Exactly what is denied is counted, whatever policies become meanwhile; a line names both pods and the direction."""
    caplog.set_level(logging.INFO, "nodeplane.policy")
    before, after = cluster(80), cluster(80, 82)
    enforcer.take(before)
    send(rig, 2, 1, 80, family=family, number=5)
    assert enforcer.counts(before) == []
    send(rig, 2, 1, 81, family=family, number=4)
    send(rig, 3, 2, 81, family=family, number=3)
    wanted = [Denied("ns/p1", "ingress", 4), Denied("ns/p3", "egress", 3)]
    assert enforcer.counts(before) == wanted
    enforcer.take(after)
    assert enforcer.counts(after) == wanted
    send(rig, 2, 1, 82, family=family, number=2)
    send(rig, 2, 1, 81, family=family)
    assert enforcer.counts(after) == [Denied("ns/p1", "ingress", 5), Denied("ns/p3", "egress", 3)]
    eventually(lambda: len(caplog.messages) >= 8, 10.0)
    starts = {words.partition(" (")[0] + words.partition("->")[2].partition(" (")[0] for words in caplog.messages}
    assert starts == {"denied ingress ns/p2 ns/p1", "denied egress ns/p3 ns/p2"}
    host = pod_ip(1, family)
    assert caplog.messages[0].endswith(f"-> ns/p1 ({f'[{host}]' if family == 6 else host}:81) UDP")


def test_flood_is_not_logged_whole(rig, enforcer, caplog):
    """Of three thousand denied packets all are counted, and some tens logged."""
    caplog.set_level(logging.INFO, "nodeplane.policy")
    found = cluster(80)
    enforcer.take(found)
    send(rig, 2, 1, 81, number=3000)
    assert enforcer.counts(found) == [Denied("ns/p1", "ingress", 3000)]
    eventually(lambda: len(caplog.messages) >= LOG.burst, 10.0)
    assert len(caplog.messages) < 1000
