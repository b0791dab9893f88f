"""Mode ebpf over real sockets: what processes of a node and its pods meet, while agents come, go, and change their mode."""

import errno
import json
import os
import select
import socket
import time

import pytest
from asking import ask, enter_cgroup, own_cgroup
from forked_agent import ForkedAgent
from object_files import Objects
from service_node import ServiceNode, eventually, pod_ip

from kernelstate.linux import netns as namespaces
from kernelstate.linux.cgroups import Cgroup
from kernelstate.linux.ebpf_services import HOOKS, LinuxServiceMaps
from kernelstate.objects.ebpf import Pool, SocketChange, SocketFrontend, SocketService, SocketTables, Who
from kernelstate.reconcile_ebpf import SocketReconciler
from kernelstate.service_layout import FEWEST
from nodeplane.host_kernel import BUILT

pytestmark = pytest.mark.kernel

EVERYBODY = Who.NODE | Who.PODS
VIP = {4: "10.96.0.1", 6: "fd00:96::1"}


@pytest.fixture
def node(make_netns):
    rig = ServiceNode(make_netns, pods=3)
    yield rig
    rig.close()


@pytest.fixture
def cgroup():
    with own_cgroup() as path:
        yield path


@pytest.fixture
def programs(node, cgroup):
    with namespaces.inside(node.node):
        port = LinuxServiceMaps(BUILT, cgroup)
    yield port
    port.close()


def number(address):
    return int.from_bytes(socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address), "big")


def tables(pods, *, protocol="tcp", affinity=0, who=EVERYBODY, families=(4, 6)):
    """Return the tables of one Service, port 80, whose endpoints are pods' port 8080."""
    found = SocketTables({}, {}, {})
    for family in families:
        frontend = SocketFrontend(family, protocol, number(VIP[family]), 80)
        found.frontends[frontend] = SocketService(family if pods else 0, who, refuses=True, affinity=affinity)
        if pods:
            endpoints = tuple((number(pod_ip(pod, family)), 8080) for pod in pods)
            found.pools[family] = Pool(family, protocol, endpoints, protocol == "udp" or affinity > 0)
    return found


def put(reconciler, wanted):
    reconciler.set_desired(wanted)
    report = reconciler.sync()
    assert report.ok, report.errors


def connect(family, times=1):
    """Connect so many times; return whom the kernel connected us to, as answered, and whom it says."""
    found = set()
    for _ in range(times):
        with socket.create_connection((VIP[family], 80), timeout=3) as client:
            found.add((client.recv(64), client.getpeername()[0]))
    return found


def exchange(family, datagrams, pause=None):
    """Send datagrams from one unconnected socket; return who answered each, and from which address the answers seem to come."""
    found = []
    with socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        for i in range(datagrams):
            if pause is not None and i == datagrams // 2:
                os.write(pause[0], b"x")
                os.read(pause[1], 1)
            client.sendto(b"?", (VIP[family], 80))
            answer, source = client.recvfrom(64)
            found.append((answer, source[0]))
    return found


def refused_by(family, kind):
    with socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, kind) as client:
        client.settimeout(3)
        try:
            if kind == socket.SOCK_STREAM:
                client.connect((VIP[family], 80))
            else:
                client.sendto(b"?", (VIP[family], 80))
        except OSError as error:
            return error.errno
    return 0


class Answering:
    """Servers in pods that say which pod they are, in a process of their own, for TCP and UDP in both families."""

    def __init__(self, node, pods):
        self.pid = os.fork()
        if not self.pid:
            try:
                self._serve(node, pods)
            finally:
                os._exit(1)
        eventually(lambda: not ask_free(node, pods))

    def _serve(self, node, pods):
        servers = {}
        for pod in pods:
            for family in (4, 6):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    one = node.socket(node.pods[pod], family, kind)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind((pod_ip(pod, family), 8080))
                    if kind == socket.SOCK_STREAM:
                        one.listen(256)
                    servers[one] = b"%d" % pod
        while True:
            for one in select.select(list(servers), [], [])[0]:
                if one.type == socket.SOCK_STREAM:
                    accepted, _ = one.accept()
                    accepted.sendall(servers[one])
                    accepted.close()
                else:
                    _, source = one.recvfrom(64)
                    one.sendto(servers[one], source)

    def end(self):
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


def ask_free(node, pods):
    """Whether some pod does not answer yet."""
    for pod in pods:
        with namespaces.inside(node.pods[pod]), socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((pod_ip(pod), 8080)):
                return True
    return False


@pytest.fixture
def answering(node):
    servers = Answering(node, (1, 2, 3))
    yield servers
    servers.end()


@pytest.mark.parametrize("family", [4, 6])
def test_connections_are_spread_and_named(node, cgroup, programs, answering, family):
    """Pods and the node reach every endpoint by TCP, a pod itself too, and believe to speak to the Service."""
    put(SocketReconciler(programs, time.monotonic), tables((1, 2)))
    for space in (node.node, node.pods[1], node.pods[3]):
        assert ask(cgroup, space, connect, family, 40) == {(b"1", VIP[family]), (b"2", VIP[family])}


@pytest.mark.parametrize("family", [4, 6])
def test_datagrams_keep_their_endpoint(node, cgroup, programs, answering, family):
    """One socket's datagrams go to one endpoint, answers come from the Service; when the endpoint goes, so does the socket."""
    reconciler = SocketReconciler(programs, time.monotonic)
    put(reconciler, tables((1,), protocol="udp"))
    (here, there), (back, forth) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.read(here, 1)
        put(reconciler, tables((2, 3), protocol="udp"))
        os.write(forth, b"x")
        os._exit(0)
    found = ask(cgroup, node.pods[3], exchange, family, 20, (there, back))
    os.waitpid(pid, 0)
    assert found[:10] == [(b"1", VIP[family])] * 10
    assert len(set(found[10:])) == 1
    assert found[10] in {(b"2", VIP[family]), (b"3", VIP[family])}
    for one in (here, there, back, forth):
        os.close(one)


def test_a_client_comes_back(node, cgroup, programs, answering):
    """With affinity all sockets of one pod reach one endpoint, as long as it is one, whatever process asks."""
    reconciler = SocketReconciler(programs, time.monotonic)
    put(reconciler, tables((1, 2, 3), affinity=600))
    first = ask(cgroup, node.pods[3], connect, 4, 20)
    assert len(first) == 1
    assert ask(cgroup, node.pods[3], connect, 4, 20) == first
    left = [pod for pod in (1, 2, 3) if b"%d" % pod != next(iter(first))[0]]
    put(reconciler, tables(left, affinity=600))
    assert ask(cgroup, node.pods[3], connect, 4, 20).isdisjoint(first)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_nobody_there_refuses(node, cgroup, programs, family, protocol):
    """A Service without endpoints refuses at once."""
    put(SocketReconciler(programs, time.monotonic), tables((), protocol=protocol))
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    assert ask(cgroup, node.pods[1], refused_by, family, kind) == errno.ECONNREFUSED


def test_who_is_not_meant_is_left(node, cgroup, programs, answering):
    """What is for the node alone, and whoever is in no cgroup of the node's, goes on as if there were no programs."""
    put(SocketReconciler(programs, time.monotonic), tables((1,), who=Who.NODE))
    assert ask(cgroup, node.node, connect, 4) == {(b"1", VIP[4])}
    assert programs.counters()["translated"] == 1
    namespaces.run(node.node, ["ip", "route", "add", "unreachable", "10.96.0.0/16"])
    assert ask(cgroup, node.pods[2], refused_by, 4, socket.SOCK_STREAM) == errno.EHOSTUNREACH
    assert programs.counters()["left"] == 1
    assert namespaces.call(node.node, refused_by, 4, socket.SOCK_STREAM) == errno.EHOSTUNREACH


def test_a_second_agent_adopts(node, cgroup, programs, answering):
    """An agent that starts finds programs and maps, and writes exactly what differs."""
    put(SocketReconciler(programs, time.monotonic), tables((1,)))
    held = programs.observe()
    with namespaces.inside(node.node):
        second = LinuxServiceMaps(BUILT, cgroup)
    reconciler = SocketReconciler(second, time.monotonic)
    reconciler.set_desired(tables((1,)))
    assert reconciler.sync().changed == 0
    assert second.observe() == held
    put(reconciler, tables((2,)))
    assert ask(cgroup, node.pods[3], connect, 4, 5) == {(b"2", VIP[4])}
    second.close()


def test_another_nodes_programs_are_left_alone(node, cgroup, programs):
    """A cgroup belongs to one node: another's agent is told so, and takes nothing off."""
    put(SocketReconciler(programs, time.monotonic), tables((1,)))
    with namespaces.inside(node.outside):
        other = LinuxServiceMaps(BUILT, cgroup)
    reconciler = SocketReconciler(other, time.monotonic)
    reconciler.set_desired(tables((2,)))
    assert "another node" in reconciler.sync().errors[0]
    assert reconciler.cleanup().changed == 0
    assert programs.is_intact()
    assert SocketReconciler(programs, time.monotonic).cleanup().changed == 1
    with Cgroup(cgroup) as found:
        assert [name for name, kind in HOOKS.items() if found.find(kind, name) is not None] == []


def test_programs_taken_off_come_back(node, cgroup, programs, answering):
    """Somebody takes a program off: it is noticed and repaired."""
    reconciler = SocketReconciler(programs, time.monotonic)
    put(reconciler, tables((1,)))
    with Cgroup(cgroup) as found, found.find(HOOKS["np_connect4"], "np_connect4") as program:
        found.detach(HOOKS["np_connect4"], program)
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert ask(cgroup, node.pods[3], connect, 4) == {(b"1", VIP[4])}


def test_reloads_under_load_lose_nothing(node, cgroup, programs, answering):
    """Five exchanges of all programs, to larger maps and back, and pools that change all the time: every connection is answered."""
    reconciler = SocketReconciler(programs, time.monotonic)
    put(reconciler, tables((1, 2, 3), affinity=600))
    kept = ask(cgroup, node.pods[2], connect, 4, 3)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            enter_cgroup(cgroup)
            with namespaces.inside(node.pods[1]):
                end, found = time.monotonic() + 2.5, []
                while time.monotonic() < end:
                    try:
                        found += [answer.decode() for answer, peer in connect(4) if peer == VIP[4]]
                    except OSError as error:
                        found.append(str(error))
            os.write(writing, json.dumps([len(found), sorted(set(found))]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    wanted = tables((1, 2, 3), affinity=600)
    for step in range(60):
        if step % 12 == 5:
            assert reconciler._install(wanted)
        pods = ((1, 2, 3), (2, 3), (1, 3))[step % 3]
        wanted = tables(pods, affinity=600)
        reconciler.set_desired(wanted, SocketChange(frozenset(wanted.frontends), frozenset(wanted.pools)))
        assert reconciler.sync().ok
        select.select([], [], [], 0.02)
    with os.fdopen(reading) as told:
        count, answers = json.loads(told.read())
    os.waitpid(pid, 0)
    assert set(answers) <= {"1", "2", "3"}
    assert count > 100
    put(reconciler, tables((1, 2, 3), affinity=600))
    assert ask(cgroup, node.pods[2], connect, 4, 3) == kept


def test_maps_grow(node, cgroup, programs, answering):
    """More Services than the maps have room for: they are replaced by larger ones, and an open memory of clients goes on."""
    reconciler = SocketReconciler(programs, time.monotonic)
    put(reconciler, tables((1, 2, 3), affinity=600))
    kept = ask(cgroup, node.pods[3], connect, 4, 5)
    wanted = tables((1, 2, 3), affinity=600)
    for i in range(FEWEST):
        wanted.frontends[SocketFrontend(4, "tcp", number("10.97.0.0") + i, 80)] = SocketService(4, EVERYBODY)
    put(reconciler, wanted)
    sizes, contents = programs.observe()
    assert sizes.frontends == 4 * FEWEST
    assert len(contents.frontends) == len(wanted.frontends)
    assert ask(cgroup, node.pods[3], connect, 4, 5) == kept


NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    "spec": {"podCIDRs": ["10.244.0.0/16"]},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.1"}]},
}


def service(pods):
    spec = {"type": "NodePort", "clusterIP": VIP[4], "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}]}
    meta = {"name": "s", "namespace": "default"}
    slices = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "s-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [pod_ip(p)], "nodeName": "n1", "conditions": {"ready": True}} for p in pods],
        "ports": [{"protocol": "TCP", "port": 8080}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}, slices


def localhost():
    with socket.create_connection(("127.0.0.1", 30080), timeout=3) as client:
        return client.recv(64), client.getpeername()


def test_agents_come_go_and_change_their_mode(node, cgroup, tmp_path, answering):
    """The real agent: killed, it is missed by nobody; back, it goes on; without a cgroup, or in another mode, rules do it all."""
    objects = Objects(tmp_path / "objects")
    objects.put(NODE, *service((1,)))
    agent = ForkedAgent(node.node, objects.folder, tmp_path / "status.json", {"mode": "ebpf"}, options={"cgroup": str(cgroup)})
    other = ForkedAgent(node.node, objects.folder, tmp_path / "status.json", {"mode": "nftables"})
    try:
        agent.start()
        assert agent.wait(objects.generation).frontends == 2
        assert ask(cgroup, node.node, localhost) == (b"1", ("127.0.0.1", 30080))
        agent.kill()
        assert ask(cgroup, node.pods[2], connect, 4) == {(b"1", VIP[4])}
        objects.put(*service((2,)))
        agent.start()
        agent.wait(objects.generation)
        assert ask(cgroup, node.pods[3], connect, 4, 5) == {(b"2", VIP[4])}
        assert ask(cgroup, node.outside, connect, 4) == {(b"2", VIP[4])}
        agent.kill()
        other.start()
        other.wait(objects.generation)
        with Cgroup(cgroup) as found:
            assert [name for name, kind in HOOKS.items() if found.find(kind, name) is not None] == []
        assert ask(cgroup, node.pods[3], connect, 4, 5) == {(b"2", VIP[4])}
    finally:
        agent.kill()
        other.kill()
