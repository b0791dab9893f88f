"""Connections that begin in the short lane: which do, that tracking knows them, and that whatever is odd about them is the kernel's.

    pod 1 -- pod 2 -- pod 3        no rule translates anything, but for who asks for its own Service
      '--- outside: has 10.244.9.2, as if it were another node's pod

So what answers in a Service's name was led there by the programs. The chain ``seen`` counts SYNs that went the long way.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest
from lane_node import PORT, Echo, LaneNode, heard, mac, talk, warm, wire
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from service_node import NODE_IPS, OUTSIDE_IPS, eventually, pod_ip

from bench.injection import open_injector
from bench.packet_cost import lanes_of, to_services
from kernelstate.linux import netns, sysctl
from kernelstate.linux.bpf_lane import LinuxLane, unloadable
from kernelstate.linux.packet_tables import PacketTables
from kernelstate.objects.address import Family
from kernelstate.objects.ebpf import NODE_PORT, Pool, SocketFrontend, SocketService, SocketTables, Who
from kernelstate.reconcile_ebpf import SocketReconciler
from nodeplane.host_kernel import BUILT

pytestmark = pytest.mark.kernel

EVERYBODY = Who.NODE | Who.PODS
VIP = {4: "10.96.0.1", 6: "fd00:96::1"}
FAR = "10.244.9.2"
RULES = """
table inet world {
  chain before { type nat hook prerouting priority dstnat;
    ip daddr 10.96.0.9 ip saddr 10.244.2.2 tcp dport 80 meta mark set 1 dnat ip to 10.244.2.2:8080
    ip daddr 10.96.0.8 tcp dport 80 dnat ip to 10.244.2.2:8080
  }
  chain behind { type nat hook postrouting priority srcnat; meta mark 1 masquerade; }
  chain seen { type filter hook forward priority filter - 1; tcp flags & (syn | ack) == syn counter; meta l4proto udp counter; }
  chain judge { type filter hook forward priority filter; ct state invalid drop; ct state established accept; jump closed; }
  chain closed { }
}
"""


def number(text: str) -> int:
    return int.from_bytes(socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text), "big")


def family_of(text: str) -> Family:
    return 6 if ":" in text else 4


class Services:
    """Tables of Services as a test wants them, programmed by the reconciler into the lane."""

    def __init__(self, rig):
        self.rig, self.tables = rig, SocketTables({}, {}, {(4, number(NODE_IPS[4])): EVERYBODY})
        self.reconciler = SocketReconciler(PacketTables(rig.port), time.monotonic)

    def put(self, address, port, *endpoints, protocol="tcp", affinity=0, who=EVERYBODY, pods_only=True):
        """State a frontend (address None: a NodePort) and its endpoints, (address, port) each."""
        family = family_of(endpoints[0][0]) if endpoints else family_of(address)
        pool = len(self.tables.pools) + 1 if endpoints else 0
        key = SocketFrontend(family, protocol, NODE_PORT if address is None else number(address), port)
        if pool:
            ends = tuple((number(ip), there) for ip, there in endpoints)
            remembers = affinity > 0 or protocol == "udp"
            self.tables.pools[pool] = Pool(family, protocol, ends, remembers, pods_only)
        self.tables.frontends[key] = SocketService(pool, who, refuses=not pool, affinity=affinity)

    def sync(self):
        """Program all of it."""
        self.reconciler.set_desired(self.tables)
        with netns.inside(self.rig.node):
            report = self.reconciler.sync()
        assert report.ok, report.errors


@pytest.fixture
def rig(make_netns):
    assert not unloadable(BUILT), "this kernel has all that the lane needs"
    found = LaneNode(make_netns, RULES, pods=3)
    netns.run(found.outside, ["ip", "addr", "add", f"{FAR}/32", "dev", "eth0"])
    netns.run(found.node, ["ip", "route", "add", FAR, "via", OUTSIDE_IPS[4]])
    for pod in (1, 2, 3):  # as the outside node would
        netns.run(found.outside, ["ip", "route", "add", f"10.244.{pod}.0/24", "via", NODE_IPS[4]])
    for space in (*found.pods.values(), found.outside):
        found.ping(space)
    yield found
    found.close()


@pytest.fixture
def services(rig):
    made = Services(rig)
    made.put(VIP[4], 80, (pod_ip(2), PORT))
    made.put(VIP[4], 80, (pod_ip(2), PORT), protocol="udp")
    made.put(VIP[6], 80, (pod_ip(2, 6), PORT))
    made.put(VIP[6], 80, (pod_ip(2, 6), PORT), protocol="udp")
    made.sync()
    rig.sync()
    return made


def long_way(rig):
    """Return how many first packets of TCP, and how many packets of UDP, rules have seen."""
    listed = json.loads(netns.run(rig.node, ["nft", "-j", "list", "chain", "inet", "world", "seen"]))["nftables"]
    rules = [one["rule"]["expr"] for one in listed if "rule" in one]
    return tuple(next(e["counter"]["packets"] for e in rule if "counter" in e) for rule in rules)


def tracked(rig, *selectors):
    """Return the lines that tracking has of matching connections."""
    return netns.run(rig.node, ["conntrack", "-L", *selectors]).splitlines()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("sums", ["offload", "no offload"])
def test_a_connection_begins_there(rig, services, family, sums):
    """A pod's SYN to a Service and the answer take the lane; every byte after them is right, and tracking knows the connection."""
    if sums == "no offload":
        rig.without_offload()
    Echo(rig, 2, family)
    before = rig.counters()
    client = rig.connect(rig.pods[1], VIP[family], 80)
    after = rig.counters()
    assert (after["opened"] - before["opened"], after["taken"] - before["taken"], long_way(rig)[0]) == (1, 2, 0)
    warm(client)
    talk(client, 50)
    assert rig.taken() - after["taken"] > 60, "and so does what follows"
    (line,) = tracked(rig, "-f", f"ipv{family}", "-p", "tcp", "--orig-dst", VIP[family])
    assert "ESTABLISHED" in line
    assert "ASSURED" in line
    assert f"src={pod_ip(2, family)} dst={pod_ip(1, family)} sport={PORT}" in line


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("no_sum", [False, True], ids=["sums", "without sums"])
def test_a_question_and_its_answer(rig, services, family, no_sum):
    """A datagram to a Service takes the lane, its answer comes in the Service's name, and so do those that follow."""
    server = rig.socket(rig.pods[2], family, socket.SOCK_DGRAM)
    server.bind((pod_ip(2, family), PORT))
    client = rig.socket(rig.pods[1], family, socket.SOCK_DGRAM)
    if no_sum and family == 4:
        client.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
    before = rig.counters()
    for round_ in range(5):
        client.sendto(b"question", (VIP[family], 80))
        data, source = server.recvfrom(100)
        assert (data, source[0]) == (b"question", pod_ip(1, family))
        server.sendto(b"answer", source)
        data, source = client.recvfrom(100)
        assert (data, source[:2]) == (b"answer", (VIP[family], 80))
        if not round_:
            assert rig.counters()["opened"] - before["opened"] == 1
            assert long_way(rig)[1] == 1, "only the answer: tracking has to see that there is one"
    assert rig.counters()["opened"] - before["opened"] == 1


def test_straight_to_a_pod(rig, services):
    """A connection to a pod of this node, without a Service, begins there as well; one to somewhere else does not."""
    Echo(rig, 2)
    warm(rig.connect(rig.pods[1], pod_ip(2), PORT))
    assert (rig.counters()["opened"], long_way(rig)[0]) == (1, 0)
    server = rig.socket(rig.outside)
    server.bind((OUTSIDE_IPS[4], 9000))
    server.listen()
    rig.connect(rig.pods[1], OUTSIDE_IPS[4], 9000)
    assert (rig.counters()["opened"], rig.counters()["led"], long_way(rig)[0]) == (1, 0, 1)


def test_a_node_port(rig, services):
    """Pods are led to a NodePort's endpoints on the node's own addresses."""
    services.put(None, 30080, (pod_ip(2), PORT))
    services.sync()
    echo = Echo(rig, 2)
    warm(rig.connect(rig.pods[1], NODE_IPS[4], 30080))
    assert (rig.counters()["opened"], echo.peers) == (1, [pod_ip(1)])


@pytest.mark.parametrize("family", [4, 6])
def test_nobody_listens(rig, services, family):
    """A refusal comes back in the Service's name at once, and leaves nothing that the next attempt from that port would meet."""
    for _ in range(2):
        client = rig.socket(rig.pods[1], family)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((pod_ip(1, family), 33333))
        started = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            client.connect((VIP[family], 80))
        assert time.monotonic() - started < 0.9, "before anything was sent again"
        client.close()
    Echo(rig, 2, family)
    client = rig.socket(rig.pods[1], family)
    client.bind((pod_ip(1, family), 33333))
    client.connect((VIP[family], 80))
    warm(client)


@pytest.mark.parametrize("family", [4, 6])
def test_no_such_port(rig, services, family):
    """That no socket has the port is told to who sent a datagram, in the Service's name: errors are the kernel's."""
    client = rig.socket(rig.pods[1], family, socket.SOCK_DGRAM)
    client.connect((VIP[family], 80))
    client.send(b"anybody?")
    with pytest.raises(ConnectionRefusedError):
        client.recv(100)


def test_a_syn_that_is_sent_again(rig, services):
    """If the first SYN is lost behind the node, the second goes to the same endpoint by the kernel, and the connection is a good one."""
    netns.run(rig.pods[2], ["nft", "add table ip lossy"])
    netns.run(rig.pods[2], ["nft", "add chain ip lossy in { type filter hook input priority filter; }"])
    netns.run(
        rig.pods[2],
        ["nft", "add rule ip lossy in tcp flags & (syn | ack) == syn limit rate over 1/hour burst 1 packets accept"],
    )
    netns.run(rig.pods[2], ["nft", "add rule ip lossy in tcp flags & (syn | ack) == syn drop"])
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    talk(client, 10)
    assert (rig.counters()["opened"], long_way(rig)[0]) == (1, 1)


def test_a_lost_answer(rig, services):
    """If the answer to a SYN is lost, both ends repeat themselves until it works."""
    netns.run(rig.pods[1], ["nft", "add table ip lossy"])
    netns.run(rig.pods[1], ["nft", "add chain ip lossy in { type filter hook input priority filter; }"])
    netns.run(
        rig.pods[1],
        ["nft", "add rule ip lossy in tcp flags & (syn | ack) == syn | ack limit rate over 1/hour burst 1 packets accept"],
    )
    netns.run(rig.pods[1], ["nft", "add rule ip lossy in tcp flags & (syn | ack) == syn | ack drop"])
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    talk(client, 10)


def crafted(rig, flags, source=None, options=(), **fields):
    """Return a frame of pod 1 to the Service."""
    head = Ether(src=mac(rig.pods[1], "eth0"), dst=mac(rig.node, "pod1"))
    return (
        head / IP(src=source or pod_ip(1), dst=VIP[4], options=list(options)) / TCP(sport=4000, dport=80, flags=flags, **fields)
    )


def test_a_syn_that_is_taken_back(rig, services):
    """A client that answers the answer with a reset, as scanners do, is understood by the endpoint."""
    rig.listen(2, PORT)
    netns.run(rig.pods[1], ["nft", "add table ip mute"])
    netns.run(rig.pods[1], ["nft", "add chain ip mute out { type filter hook output priority filter; }"])
    netns.run(
        rig.pods[1], ["nft", "add rule ip mute out tcp flags rst drop"]
    )  # what the kernel says of a socket it does not have
    with wire(rig.pods[1]) as here, wire(rig.pods[2]) as there:
        here.send(bytes(crafted(rig, "S", seq=100)))
        answer = heard(here, lambda p: TCP in p and p[TCP].flags == "SA")
        assert answer is not None
        assert (answer[IP].src, answer[TCP].sport, answer[TCP].ack) == (VIP[4], 80, 101)
        here.send(bytes(crafted(rig, "R", seq=101)))
        reset = heard(there, lambda p: TCP in p and p[TCP].flags == "R")
        assert reset is not None
        assert (reset[IP].src, reset[IP].dst, reset[TCP].dport) == (pod_ip(1), pod_ip(2), PORT)


@pytest.mark.parametrize("odd", ["options", "last hop", "fragment", "another's address"])
def test_odd_first_packets_are_the_kernels(rig, services, odd):
    """With options, at the last hop, in pieces, or with another pod's address no packet begins a connection here."""
    packet = crafted(rig, "S")
    if odd == "options":
        packet = crafted(rig, "S", options=[IPOption_NOP()] * 4)
    elif odd == "last hop":
        packet[IP].ttl = 1
    elif odd == "fragment":
        packet[IP].flags = "MF"
    else:
        packet = crafted(rig, "S", source=pod_ip(3))
    with wire(rig.pods[1]) as here, wire(rig.pods[2]) as there:
        here.send(bytes(packet / Raw(b"odd")))
        here.send(bytes(Ether(src=packet.src, dst=packet.dst) / IP(src=pod_ip(1), dst=pod_ip(2)) / UDP(dport=7) / Raw(b"last")))
        assert heard(there, lambda p: Raw in p and bytes(p[Raw]) in {b"odd", b"last"})[Raw].load == b"last"
    counters = rig.counters()
    assert (counters["opened"], counters["led"]) == (1, 0), "the one that was sent last"
    assert [line for line in tracked(rig, "-p", "tcp") if pod_ip(2) in line] == []


def test_a_policy_is_about_an_end(rig, services):
    """Where a policy is about either end rules see the SYN; the endpoint is chosen here nevertheless, and what is denied is denied."""
    echo = Echo(rig, 2)
    for pod, port in ((1, 0), (2, 1)):
        rig.lane.set_judged([(4, number(pod_ip(pod)))])
        rig.sync()
        before = long_way(rig)[0]
        warm(rig.connect(rig.pods[1], VIP[4], 80))
        assert (rig.counters()["opened"], rig.counters()["led"], long_way(rig)[0]) == (0, port + 1, before + 1)
    netns.run(rig.node, ["nft", "add rule inet world closed tcp dport 8080 drop"])
    client = rig.socket(rig.pods[1])
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.connect((VIP[4], 80))
    client.close()
    assert len(echo.peers) == 2
    rig.lane.set_judged([])
    rig.sync()
    warm(rig.connect(rig.pods[1], VIP[4], 80))
    assert rig.counters()["opened"] == 1


def test_an_endpoint_on_another_node(rig, services):
    """The endpoint is chosen here, and the packet goes the long way, translated by what was entered; the source stays."""
    services.put("10.96.0.2", 80, (FAR, PORT))
    services.sync()
    server = rig.socket(rig.outside)
    server.bind((FAR, PORT))
    server.listen()
    client = rig.connect(rig.pods[1], "10.96.0.2", 80)
    far = rig.accept(server)
    assert far.getpeername()[0] == pod_ip(1)
    assert (rig.counters()["led"], long_way(rig)[0]) == (1, 1)
    before = rig.taken()
    for _ in range(50):
        client.sendall(b"there")
        assert far.recv(100) == b"there"
        far.sendall(b"back")
        assert client.recv(100) == b"back"
    assert rig.taken() - before > 50, "once it is open it takes the lane"


def test_to_itself(rig, services):
    """A pod that is led to itself needs another source: that is left to rules."""
    services.put("10.96.0.9", 80, (pod_ip(2), PORT))
    services.sync()
    echo = Echo(rig, 2)
    warm(rig.connect(rig.pods[2], "10.96.0.9", 80))
    assert (echo.peers, rig.counters()["opened"], rig.counters()["led"]) == ([NODE_IPS[4]], 0, 0) or (
        echo.peers == ["10.244.2.1"] and rig.counters()["opened"] == 0
    )


@pytest.mark.parametrize(
    "fields", [{"who": Who.NODE}, {"who": Who.NOBODY}, {"pods_only": False}], ids=["the node's", "left", "not all are pods"]
)
def test_what_is_left_to_rules(rig, services, fields):
    """What tables say is not for pods, or may need another source, is translated by rules alone."""
    services.put("10.96.0.8", 80, (pod_ip(3), PORT), **fields)
    services.sync()
    echo = Echo(rig, 2)
    warm(rig.connect(rig.pods[1], "10.96.0.8", 80))
    assert (len(echo.peers), rig.counters()["opened"], rig.counters()["led"]) == (1, 0, 0)


def test_balance_and_affinity(rig, services):
    """Endpoints are alike; where a Service has affinity a client comes back to its own, and to another when that is gone."""
    services.put("10.96.0.3", 80, (pod_ip(2), PORT), (pod_ip(3), PORT))
    services.put("10.96.0.4", 80, (pod_ip(2), PORT), (pod_ip(3), PORT), affinity=60)
    services.sync()
    echoes = {2: Echo(rig, 2), 3: Echo(rig, 3)}

    def ask(address, times):
        before = {pod: len(echo.peers) for pod, echo in echoes.items()}
        for _ in range(times):
            rig.connect(rig.pods[1], address, 80).close()
        eventually(lambda: sum(len(e.peers) for e in echoes.values()) == sum(before.values()) + times)
        return {pod: len(echo.peers) - before[pod] for pod, echo in echoes.items()}

    assert all(count > 50 for count in ask("10.96.0.3", 200).values())  # fewer: one in 10^12
    (home,) = [pod for pod, count in ask("10.96.0.4", 20).items() if count == 20]
    (key,) = [key for key in services.tables.frontends if key.address == number("10.96.0.4")]
    pool = services.tables.frontends[key].pool
    other = 5 - home
    services.tables.pools[pool] = Pool(4, "tcp", ((number(pod_ip(other)), PORT),), remembers=True, pods_only=True)
    services.sync()
    assert ask("10.96.0.4", 5)[other] == 5


def test_tables_are_exchanged_under_way(rig, services):
    """Tables grow beyond their room five times, with another program each time, while connections begin and go on: none fails."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    failed, over = [], threading.Event()
    opened = [0]

    def run():
        try:
            while not over.is_set():
                talk(client, 2, 4000)
                talk(rig.connect(rig.pods[1], VIP[4], 80), 1, 400)
                opened[0] += 1
        except (AssertionError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for step in range(5):
            before, made = opened[0], 13_000 << step
            for i in range(made // 2 if step else 0, made):
                services.tables.frontends[SocketFrontend(4, "tcp", number("10.97.0.0") + i, 80)] = SocketService(0, EVERYBODY)
            services.sync()
            eventually(lambda before=before: opened[0] > before + 5 or failed, 20)
    finally:
        over.set()
        thread.join(30)
    assert failed == []
    assert rig.counters()["opened"] >= opened[0]


def test_an_agent_that_comes_back(rig, services):
    """Whoever finds the program again finds its tables, and writes nothing; where nothing shall begin there, nothing does."""
    rig.port.close()
    with netns.inside(rig.node):
        again = LinuxLane(BUILT)
        other = SocketReconciler(PacketTables(again), time.monotonic)
        other.set_desired(services.tables)
        assert other.sync().changed == 0
        again.close()
        rig.port = LinuxLane(BUILT, opens=False)
        rig.lane._port = rig.port
        rig.lane.forget()
    rig.sync()
    Echo(rig, 2)
    client = rig.socket(rig.pods[1])
    client.settimeout(0.5)
    with pytest.raises((TimeoutError, OSError)):
        client.connect((VIP[4], 80))
    warm(rig.connect(rig.pods[1], pod_ip(2), PORT))
    assert rig.counters()["opened"] == 0


def test_no_room_to_track(rig, services):
    """Where a connection cannot be entered, as one that another already is, the packet is the kernel's: nothing goes untracked."""
    netns.run(
        rig.node,
        f"conntrack -I -p tcp -s {pod_ip(1)} -d {VIP[4]} --sport 4000 --dport 80 --state SYN_SENT -t 60 "
        f"--dst-nat {pod_ip(3)}:{PORT}".split(),
    )
    with wire(rig.pods[1]) as here, wire(rig.pods[3]) as there:
        here.send(bytes(crafted(rig, "S")))
        packet = heard(there, lambda p: TCP in p and p[TCP].sport == 4000)
    assert packet is not None, "it goes where tracking says"
    assert packet[IP].dst == pod_ip(3)
    assert (rig.counters()["opened"], rig.counters()["led"]) == (0, 0)


def test_too_long_for_the_next_link(rig, services):
    """A first datagram that the endpoint's link does not take is the kernel's, which says what would fit."""
    netns.run(rig.node, ["ip", "link", "set", "pod2", "mtu", "1280"])
    client = rig.socket(rig.pods[1], kind=socket.SOCK_DGRAM)
    client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
    client.connect((VIP[4], 80))
    client.send(b"x" * 1400)

    def size():
        with contextlib.suppress(OSError):  # EMSGSIZE
            client.send(b"x" * 1400)
        return client.getsockopt(socket.IPPROTO_IP, 14)  # IP_MTU

    eventually(lambda: size() == 1280)
    assert rig.counters()["opened"] == 0


def test_a_flood_that_fills_the_table():
    """More SYNs than tracking has room for: not one arrives where it should not, and the connections that there are go on."""
    with open_injector() as injector, contextlib.ExitStack() as undo:
        (lane,) = lanes_of(undo, injector, ["ebpf"], 10)
        open_ = to_services([3])
        flow = injector.establish(lane.road, open_)
        assert injector.established(lane.road, open_, flow, 100).lost == 0
        with netns.inside(lane.road.node):
            room = int(sysctl.read("net.netfilter.nf_conntrack_max"))
        flood = injector.new_flows(lane.road, to_services(range(10)), room + 40_000)
        assert flood.elsewhere == 0
        assert flood.arrived > room - 1000
        with netns.inside(lane.road.node):
            assert int(sysctl.read("net.netfilter.nf_conntrack_count")) > room - 1000
        after = injector.established(lane.road, open_, flow, 10_000)
        assert (after.lost, after.elsewhere) == (0, 0)
