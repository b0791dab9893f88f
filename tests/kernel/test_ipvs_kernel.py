"""IPVS mode in a kernel that has IPVS: what is written is there, packets meet the oracle, connections end in their own time."""

import re
import socket

import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from programmed_node import ProgrammedNode, service
from service_node import ServiceNode, eventually, pod_ip
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings
from wire import Wire
from wire_judge import Judge

from kernelstate.linux import netns as namespaces
from kernelstate.linux import sysctl
from kernelstate.linux.ipset import LinuxIpset
from kernelstate.linux.iptables import IptablesPort
from kernelstate.linux.ipvs import LinuxIpvs, load_scheduler
from kernelstate.linux.service_addresses import LinuxServiceAddresses
from kernelstate.objects.address import Prefix
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.ownership import Ownership
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_addresses import AddressReconciler
from kernelstate.reconcile_ipvs import IpvsReconciler
from kernelstate.reconcile_sets import IpsetReconciler
from kernelstate.text.ipset_save import print_sets
from kernelstate.text.ipvsadm import parse_servers
from nodeplane.kernel import IpvsParts
from nodeplane.pipeline import OWNERSHIP
from proxy.compile import compile_table
from proxy.modes import TRAITS
from proxy.oracle import Oracle
from proxy.render.ipvs_program import LINK, render_ipvs

pytestmark = pytest.mark.kernel


class IpvsNode:
    """Everything mode ``ipvs`` writes, in one namespace."""

    def __init__(self, space):
        self.space = space
        with namespaces.inside(space):
            self._ports = (LinuxServiceAddresses(LINK), LinuxIpvs())
            addresses = AddressReconciler(self._ports[0])
            sets = IpsetReconciler(LinuxIpset(), Ownership(prefixes=("KUBE-",)))
            self.parts = IpvsParts(sets, IpvsReconciler(self._ports[1], addresses.addresses), addresses)
            self.rules = NetfilterReconciler(IptablesPort("nft"), OWNERSHIP)

    def close(self):
        """Close its sockets."""
        for port in self._ports:
            port.close()

    def program(self, rendered):
        """Write a rendered program; return how many changes that took."""
        with namespaces.inside(self.space):
            for name, value in rendered.sysctls:
                sysctl.write(name, value)
            self.parts.sets.set_desired(rendered.sets)
            self.parts.servers.set_desired(rendered.servers)
            self.parts.addresses.set_desired(rendered.addresses)
            self.rules.set_desired(rendered.ruleset, None, (4, 6))
            reports = [part.sync() for part in (*self.parts, self.rules, self.parts.sets)]
        assert all(report.ok for report in reports), reports
        return sum(report.changed for report in reports)


@pytest.mark.parametrize("family", [4, 6])
def test_ipvs_kernel_meets_oracle(make_netns, family):
    """Each packet sent through IPVS ends as the oracle says; the kernel's own tools show what was rendered, and nothing else."""
    node = make_netns()
    wire = Wire(node, make_netns())
    judge, kernel = Judge(wire), IpvsNode(node)
    families = (4,) if family == 4 else (4, 6)

    @seed(20)
    @hypothesis_settings(
        max_examples=10,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking would go through the kernel for minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(snapshots(families=families), proxy_settings(), st.lists(flows(family=family), min_size=20, max_size=25))
    def check(snapshot, config, asked):
        table = compile_table(snapshot, NODE)
        rendered = render_ipvs(table, config, NODE)
        kernel.program(rendered)
        quiet = {key: without_quiet(server) for key, server in held_servers(node).items()}
        assert quiet == rendered.servers
        saved = re.sub(r" (initval|bucketsize) \S+", "", namespaces.run(node, ["ipset", "save"]))
        assert sorted(line for line in saved.splitlines() if line.startswith("add")) == sorted(
            line for line in print_sets(rendered.sets).splitlines() if line.startswith("add")
        )
        assert judge.disagreements(asked, Oracle(table, config, NODE, LOCAL_ADDRESSES, TRAITS["ipvs"])) == []

    try:
        check()
    finally:
        kernel.close()
        wire.close()


def without_quiet(server):
    """Leave out real servers that only wait for their connections to end."""
    kept = tuple(real for real in server.real_servers if real.weight)
    return VirtualServer(server.scheduler, kept, server.timeout, server.by_port)


@pytest.fixture
def ipvs(in_netns):
    """Yield IPVS of a namespace, in which the test runs."""
    port = LinuxIpvs()
    yield port
    port.close()


def held_servers(space):
    """Return what the kernel holds, as ipvsadm tells it."""
    return parse_servers(namespaces.run(space, ["ipvsadm", "-S", "-n"]))


def test_only_what_changed_is_written(ipvs, in_netns):
    """A second sync writes nothing, one more endpoint is one message, and a restarted agent finds everything in order."""
    keys = [ServerKey(4, "tcp", 0x0A600000 + n, 80) for n in range(20)]
    state = {key: VirtualServer("rr", (RealServer(0x0AF40102, 8080), RealServer(0x0AF40103, 8080))) for key in keys}
    held = {Prefix(4, key.address, 32) for key in keys}
    first = IpvsReconciler(ipvs, lambda: held)
    first.set_desired(state)
    assert (first.sync().changed, first.sync().changed) == (60, 0)
    state[keys[3]] = VirtualServer("rr", (*state[keys[3]].real_servers, RealServer(0x0AF40104, 8080)))
    first.set_desired(state, {keys[3]})
    assert first.sync().changed == 1
    second = IpvsReconciler(ipvs, lambda: held)
    second.set_desired(state)
    assert second.sync().changed == 0
    namespaces.run(in_netns, ["ipvsadm", "-C"])
    assert second.drifted()
    assert second.sync().changed == 61
    assert second.cleanup().changed == 20
    assert held_servers(in_netns) == {}


@pytest.mark.parametrize("scheduler", ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh"])
def test_any_scheduler(ipvs, in_netns, scheduler):
    """Whatever scheduler this kernel has can be asked for; hashing ones take the port along where that is asked too."""
    key = ServerKey(4, "udp", 0x0A600001, 53)
    by_port = scheduler in {"sh", "mh"}
    load_scheduler(scheduler)
    state = {key: VirtualServer(scheduler, (RealServer(0x0AF40102, 53),), by_port=by_port)}
    reconciler = IpvsReconciler(ipvs)
    reconciler.set_desired(state)
    assert reconciler.sync().ok
    assert held_servers(in_netns) == state


def test_unknown_scheduler_is_named(ipvs, in_netns):
    """A scheduler that the kernel does not have is an error that names it, and does not keep the others from being written."""
    good, bad = (ServerKey(4, "tcp", 0x0A600001, port) for port in (80, 81))
    reconciler = IpvsReconciler(ipvs)
    reconciler.set_desired({good: VirtualServer("rr", ()), bad: VirtualServer("best", ())})
    errors = reconciler.sync().errors
    assert len(errors) == 1
    assert "best" in errors[0]
    assert list(held_servers(in_netns)) == [good]


def test_connections_end_in_their_own_time(make_netns):
    """A connection to an endpoint that goes stays open, new ones go elsewhere, and with the last byte its real server goes."""
    rig = ServiceNode(make_netns, pods=3)
    node = ProgrammedNode(rig, "ipvs")
    web = service("10.96.0.10", {"TCP": 80})
    try:
        servers = {pod: rig.listen(pod, 8080) for pod in (1, 2)}
        node.program((web, [pod_ip(1)]))
        client = rig.socket(rig.pods[3])
        client.connect(("10.96.0.10", 80))
        accepted, _ = servers[1].accept()
        node.program((web, [pod_ip(2)]))
        assert weights(rig.node) == {pod_ip(1): 0, pod_ip(2): 1}
        other = rig.socket(rig.pods[3])
        other.connect(("10.96.0.10", 80))
        servers[2].accept()[0].close()
        client.sendall(b"still there")
        assert accepted.recv(100) == b"still there"
        for one in (client, accepted, other):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset: nothing lingers in TIME_WAIT
            one.close()
        eventually(lambda: node.look() and weights(rig.node) == {pod_ip(2): 1}, 60)
    finally:
        node.close()
        rig.close()


def weights(space):
    """Return the weight of each real server, by its address."""
    return {
        pod: real.weight
        for server in held_servers(space).values()
        for real in server.real_servers
        for pod in [".".join(str(real.address >> s & 255) for s in (24, 16, 8, 0))]
    }
