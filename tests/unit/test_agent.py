"""The agent's rounds, with everything around it in memory."""

import os
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from immutables import Map

from clusterstate.objects import Endpoint, EndpointPort, EndpointSlice, Node, NodeAddress, ObjectRef, Service, ServicePort
from clusterstate.snapshot import Snapshot, Update
from kernelstate.errors import KernelRefusedError
from kernelstate.fake import FakeNetfilter
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Uplink
from kernelstate.ports import ConntrackEntry, SyncReport
from kernelstate.reconcile import NetfilterReconciler
from nodeplane.agent import Agent
from nodeplane.config import parse_config
from nodeplane.flows import FlowKeeper
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import OWNERSHIP, HostFacts, Pipeline
from nodeplane.status import Status

CONFIG = parse_config(
    {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": "n1",
        "services": {"clusterCIDR": "10.244.0.0/16", "iptables": {"minSyncPeriod": "0.001s"}},
    }
)


OVERLAY = parse_config(
    {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": "n1",
        "services": {"nodePortAddresses": ["192.168.0.0/16"]},
        "overlay": {"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}, "iface": "eth0"},
    }
)
UPLINK = Uplink("eth0", (ip_interface("192.168.1.1/24"),), 1500)


def cluster(revision, *pods, protocol="TCP", name="web"):
    """Return a snapshot of one Service with these pods."""
    service = Service("default", name, cluster_ips=(ip_address("10.96.0.10"),), ports=(ServicePort("p", protocol, 80, 80),))
    one = EndpointSlice(
        "default", name, name, 4, tuple(Endpoint(ip_address(p), node="n1") for p in pods), (EndpointPort("p", protocol, 80),)
    )
    node = Node("n1", (NodeAddress("InternalIP", ip_address("192.168.1.1")),), (ip_network("10.244.1.0/24"),))
    return Snapshot(
        revision,
        Map({("default", name): service}),
        Map({("default", name): Map({one.ref: one})}),
        Map({"n1": node}),
    )


def changed(snapshot, name="web"):
    """Return the update that a source reports for a change of the Service's slice."""
    return Update(snapshot, frozenset({ObjectRef("EndpointSlice", "default", name)}), (), frozenset({("default", name)}))


class Source:
    """Hands out updates one by one; readable while there are some."""

    def __init__(self, first, *later):
        self.first, self.later = first, list(later)
        self.read, self.write = os.pipe()
        for _ in later:
            os.write(self.write, b"x")

    def load(self):
        return Update(self.first, None)

    def fileno(self):
        return self.read

    def poll(self):
        if not self.later:
            return None
        os.read(self.read, 1)
        return self.later.pop(0)

    def close(self):
        os.close(self.read)
        os.close(self.write)


class Host:
    """A machine with one address and no events."""

    def __init__(self):
        self.read, self.write = os.pipe()
        self.addresses = (Prefix.parse("192.168.1.1/32"),)
        self.uplink = None
        self.prepared = []
        self.errors = ()

    def facts(self, node):
        return HostFacts(self.addresses, self.uplink)

    def prepare(self, desired):
        self.prepared.append(desired)
        return self.errors

    def fileno(self):
        return self.read

    def changed(self):
        os.read(self.read, 1)
        return True

    def close(self):
        os.close(self.read)
        os.close(self.write)


class Flows:
    """A connection tracking table in memory."""

    def __init__(self, *entries):
        self.held = list(entries)
        self.fail = False

    def entries(self, family, protocol):
        if self.fail:
            raise KernelRefusedError("dump", "conntrack", "Device or resource busy")
        return [e for e in self.held if e.family == family]

    def delete(self, entries):
        self.held = [e for e in self.held if e not in entries]
        return len(entries)


@pytest.fixture
def make():
    """Make agents around a fake packet filter; everything is closed afterwards."""
    made = []

    def build(source, flows=None, netfilter=None, config=CONFIG):
        netfilter = netfilter or FakeNetfilter()
        host = Host()
        published = []
        agent = Agent(
            pipeline=Pipeline(config),
            source=source,
            host=host,
            kernel=NodeKernel(NetfilterReconciler(netfilter, OWNERSHIP)),
            flows=FlowKeeper(flows, config.services) if flows else None,
            publish=published.append,
            status=Status(pid=1, node="n1", mode="iptables"),
        )
        made.extend([source, host])
        return agent, netfilter, published

    yield build
    for one in made:
        one.close()


def run_until(agent, condition, seconds=5.0):
    """Run the agent's loop until a condition holds."""
    import time  # noqa: PLC0415

    read, write = os.pipe()
    end = time.monotonic() + seconds
    agent.run(lambda: condition() or time.monotonic() > end, read)
    os.close(read)
    os.close(write)
    assert condition()


def test_first_snapshot_is_programmed(make):
    """Start loads the first snapshot, writes it, and says so."""
    agent, netfilter, published = make(Source(cluster(1, "10.244.1.5")))
    assert netfilter.applied == []
    agent.start(agent.source.load())
    assert len(netfilter.applied) == 1
    assert published[-1].synced
    assert (published[-1].services, published[-1].endpoints) == (1, 1)


def test_burst_is_one_write(make):
    """Changes that come together are written together, the newest only."""
    later = [changed(cluster(n, f"10.244.1.{n}")) for n in range(2, 12)]
    agent, netfilter, published = make(Source(cluster(1, "10.244.1.5"), *later))
    agent.start(agent.source.load())
    run_until(agent, lambda: published[-1].revision == 11)
    assert len(netfilter.applied) == 2
    assert "10.244.1.11:80" in netfilter.applied[-1][1]


def test_refused_write_is_retried(make, monkeypatch):
    """What the kernel refuses is reported, and tried again until it is in."""
    monkeypatch.setattr("nodeplane.agent.RETRY", 0.01)
    netfilter = FakeNetfilter()
    netfilter.fail_next = 1000
    agent, _, published = make(Source(cluster(1, "10.244.1.5")), netfilter=netfilter)
    agent.start(agent.source.load())
    assert not published[-1].synced
    assert published[-1].errors
    netfilter.fail_next = 0
    run_until(agent, lambda: published[-1].synced)
    assert published[-1].errors == ()


def test_foreign_flush_is_repaired(make, monkeypatch):
    """Somebody else's flush is noticed by the loop itself."""
    monkeypatch.setattr("nodeplane.agent.DRIFT_CHECK", 0.01)
    agent, netfilter, _ = make(Source(cluster(1, "10.244.1.5")))
    agent.start(agent.source.load())
    before = netfilter.observe(4)
    netfilter.flush(4, "nat")
    assert netfilter.observe(4) != before
    run_until(agent, lambda: netfilter.observe(4) == before)


def test_stale_udp_flow_survives_a_failed_flush(make, monkeypatch):
    """A flow that could not be deleted is deleted at the next try, and a living one never."""
    monkeypatch.setattr("nodeplane.agent.RETRY", 0.01)
    dead = ConntrackEntry(4, "udp", 1, int(ip_address("10.96.0.10")), 9, 80, int(ip_address("10.244.1.5")), 80)
    alive = ConntrackEntry(4, "udp", 1, int(ip_address("10.96.0.10")), 8, 80, int(ip_address("10.244.1.6")), 80)
    flows = Flows(dead, alive)
    first, second = cluster(1, "10.244.1.5", "10.244.1.6", protocol="UDP"), cluster(2, "10.244.1.6", protocol="UDP")
    agent, _, published = make(Source(first), flows)
    agent.start(agent.source.load())
    assert flows.held == [dead, alive]
    flows.fail = True
    agent.take(changed(second))
    assert not agent.sync()
    flows.fail = False
    run_until(agent, lambda: flows.held == [alive])
    assert published[-1].synced


def test_change_writes_only_what_it_touches(make):
    """One endpoint more: its chain and the pool's chain are written, nothing else."""
    agent, netfilter, _ = make(Source(cluster(1, "10.244.1.5")))
    agent.start(agent.source.load())
    agent.take(changed(cluster(2, "10.244.1.5", "10.244.1.6")))
    agent.sync()
    text = netfilter.applied[-1][1]
    assert sum(line.startswith(":KUBE-SEP-") for line in text.splitlines()) == 1
    assert sum(line.startswith(":KUBE-SVC-") for line in text.splitlines()) == 1
    assert sum(line.startswith(":") for line in text.splitlines()) == 2


class Lane:
    """A short lane that only notes what the packet filter held when each generation began."""

    part, dirty, links = "lane", False, 2

    def __init__(self, netfilter):
        self.netfilter, self.begun, self.refusal = netfilter, [], ""

    def sync(self):
        return SyncReport(self.part)

    def drifted(self):
        return False

    def forget(self):
        pass

    def set_judged(self, addresses):
        assert not list(addresses)

    def renew(self):
        self.begun.append(len(self.netfilter.applied))
        return self.refusal


def test_what_is_written_begins_a_generation(make):
    """Behind every write, and only then, the short lane forgets; if it cannot, that is an error like any other."""
    source = Source(cluster(1, "10.244.1.5"))
    agent, netfilter, published = make(source)
    lane = agent.kernel.lane = Lane(netfilter)
    agent.start(source.load())
    assert (lane.begun, published[-1].lane) == ([1], 2)
    agent.sync()
    assert lane.begun == [1], "nothing was written"
    lane.refusal = "write map settings: Operation not permitted"
    agent.take(changed(cluster(2, "10.244.1.6")))
    agent.sync()
    assert lane.begun == [1, 2]
    assert lane.refusal in published[-1].errors


def test_vanished_node_keeps_services(make):
    """Without its Node object the agent goes on with Services and says what it misses."""
    agent, netfilter, published = make(Source(cluster(1, "10.244.1.5")))
    agent.start(agent.source.load())
    snapshot = cluster(2, "10.244.1.5")
    agent.take(Update(Snapshot(2, snapshot.services, snapshot.slices), None))
    agent.sync()
    assert any("Node n1 is not among the objects" in p for p in published[-1].problems)
    assert any(k.name.startswith("KUBE-SEP-") for k in netfilter.observe(4).chains)


def test_leftovers_of_an_unused_family_go(make):
    """IPv6 chains that an earlier agent left are removed when nothing speaks IPv6 any more."""
    netfilter = FakeNetfilter()
    netfilter.run(6, "*nat\n:KUBE-SVC-LEFTOVER0000000A - [0:0]\nCOMMIT\n")
    agent, _, _ = make(Source(cluster(1, "10.244.1.5")), netfilter=netfilter)
    agent.start(agent.source.load())
    assert netfilter.observe(6).chains == {}


def test_address_that_comes_later(make):
    """An address the node gets while the agent runs is a NodePort address from then on."""
    agent, netfilter, published = make(Source(cluster(1, "10.244.1.5")), config=OVERLAY)
    agent.host.uplink = UPLINK
    agent.start(agent.source.load())
    agent.host.addresses += (Prefix.parse("192.168.1.77/32"),)
    os.write(agent.host.write, b"x")
    run_until(agent, lambda: "-d 192.168.1.77 -j KUBE-NODEPORTS" in netfilter.applied[-1][1])
    assert published[-1].synced


def test_uplink_that_is_not_there(make):
    """Without a link to the other nodes the overlay is left as it is, and the status says which link is missing."""
    agent, _, published = make(Source(cluster(1, "10.244.1.5")), config=OVERLAY)
    agent.start(agent.source.load())
    assert "overlay.iface: no link eth0: the overlay is left as it is" in published[-1].problems
    agent.host.uplink = UPLINK
    os.write(agent.host.write, b"x")
    run_until(agent, lambda: not any("overlay.iface" in p for p in published[-1].problems))
    assert agent.desired.peers is not None


def test_pod_network_that_comes_later(make):
    """subnet.env and sysctls are seen to again when the node's own pod network changes, though no route does."""
    agent, _, _ = make(Source(cluster(1, "10.244.1.5")), config=OVERLAY)
    agent.host.uplink = UPLINK
    agent.start(agent.source.load())
    before = len(agent.host.prepared)
    snapshot = cluster(2, "10.244.1.5")
    node = Node("n1", (NodeAddress("InternalIP", ip_address("192.168.1.1")),), (ip_network("10.244.9.0/24"),))
    agent.take(Update(Snapshot(2, snapshot.services, snapshot.slices, Map({"n1": node})), None))
    assert len(agent.host.prepared) == before + 1
    assert [str(way.pod_cidr) for way in agent.host.prepared[-1].peers.own] == ["10.244.9.0/24"]


def test_host_error_is_retried(make, monkeypatch):
    """A sysctl that could not be set is tried again, and its error goes when it could."""
    monkeypatch.setattr("nodeplane.agent.RETRY", 0.01)
    agent, _, published = make(Source(cluster(1, "10.244.1.5")))
    agent.host.errors = ("write sysctl net/ipv4/ip_forward = 1: Read-only file system",)
    agent.start(agent.source.load())
    assert published[-1].errors == agent.host.errors
    agent.host.errors = ()
    run_until(agent, lambda: published[-1].synced)
    assert published[-1].errors == ()


class Gate:
    """Somebody asks once, at the first round."""

    def __init__(self):
        self.event = os.eventfd(1)
        self.has_asked = False

    def fileno(self):
        return self.event

    def take(self):
        asked, self.has_asked = not self.has_asked, True
        return asked

    def amend(self, update):
        return update

    def settle(self, snapshot):
        """Nobody waits here."""


def test_a_pod_that_starts_waits_for_no_period(make):
    """What waits for the minimum period between writes is taken in at once when a pod that starts asks: its object may be there."""
    slow = parse_config(
        {
            "apiVersion": "nodeplane.dev/v1alpha1",
            "kind": "NodeConfiguration",
            "nodeName": "n1",
            "services": {"clusterCIDR": "10.244.0.0/16", "iptables": {"minSyncPeriod": "10m", "syncPeriod": "20m"}},
        }
    )
    source = Source(cluster(1, "10.244.1.2"), changed(cluster(2, "10.244.1.3")))
    agent, _, _ = make(source, config=slow)
    agent.gate = Gate()
    agent.start(source.load())
    try:
        run_until(agent, lambda: agent.status.revision == 2)
    finally:
        os.close(agent.gate.event)


@pytest.mark.parametrize(
    ("stated", "took", "rest"),
    [
        ("", 0.01, 0.04),
        ("", 5.0, 1.0),
        ("3s", 0.01, 3.0),
        ("0s", 5.0, 0.0),
    ],
)
def test_rest_between_writes(make, stated, took, rest):
    """After a write the agent rests for the stated period; without one four times as long as the write took, a second at most."""
    stated_period = {"iptables": {"minSyncPeriod": stated}} if stated else {}
    config = parse_config(
        {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "services": stated_period}
    )
    agent, _, _ = make(Source(cluster(1, "10.244.1.2")), config=config)
    agent._last_end, agent._took = 100.0, took
    assert agent._rested_at() == pytest.approx(100.0 + rest)
