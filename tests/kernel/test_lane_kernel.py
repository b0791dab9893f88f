"""The short lane in a real node: what takes it arrives as if it had not, and what must not take it does not."""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time

import pytest
from lane_node import PORT, SET_TX_CHECKSUM, Echo, LaneNode, heard, mac, talk, warm, wire
from scapy.layers.inet import ICMP, IP, TCP, IPOption_NOP
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from service_node import NODE_IPS, OUTSIDE_IPS, eventually, pod_ip

from kernelstate.linux import ethtool, netns
from kernelstate.linux.bpf_lane import LIBERAL, PROGRAM, LinuxLane, _hook, unloadable
from kernelstate.linux.pod_link import ALIAS
from kernelstate.objects.lane import LinkKind
from kernelstate.reconcile_lane import LaneReconciler
from nodeplane.host_kernel import BUILT

pytestmark = pytest.mark.kernel

VIP = {4: "10.96.0.1", 6: "fd00:96::1"}
RULES = """
table inet world {{
  chain before {{ type nat hook prerouting priority dstnat;
    ip daddr 10.96.0.1 tcp dport 80 dnat ip to {four}:8080
    ip daddr 10.96.0.1 udp dport 80 dnat ip to {four}:8080
    ip6 daddr fd00:96::1 tcp dport 80 dnat ip6 to [{six}]:8080
    ip6 daddr fd00:96::1 udp dport 80 dnat ip6 to [{six}]:8080
    iifname eth0 ip daddr 192.168.1.1 tcp dport 30080 dnat ip to {four}:8080
  }}
  chain behind {{ type nat hook postrouting priority srcnat; oifname eth0 masquerade; iifname eth0 tcp dport 8080 masquerade; }}
  chain judge {{ type filter hook forward priority filter; ct state invalid drop; jump closed; }}
  chain closed {{ }}
}}
"""


@pytest.fixture
def rig(make_netns):
    assert not unloadable(BUILT), "this kernel has all that the lane needs"
    found = LaneNode(make_netns, RULES.format(four=pod_ip(2), six=pod_ip(2, 6)))
    found.sync()
    yield found
    found.close()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("sums", ["offload", "no offload"])
def test_a_connection_through_a_service(rig, family, sums):
    """A pod's connection to a Service takes the lane, both ways, and every byte is right; with sums left to the card, and without."""
    if sums == "no offload":
        rig.without_offload()
    Echo(rig, 2, family)
    client = rig.connect(rig.pods[1], VIP[family], 80)
    warm(client)
    before = rig.taken()
    talk(client, 200)
    assert rig.taken() - before > 300, "most of it went the short way"
    assert client.getpeername()[0] == VIP[family]


@pytest.mark.parametrize("sums", ["offload", "no offload"])
def test_a_connection_from_outside(rig, sums):
    """A client outside that comes by a NodePort, masqueraded there and back, takes it as well; and so does a pod that goes out.

    Also where the uplink has no card to finish the sums that a pod has begun.
    """
    if sums == "no offload":
        with netns.inside(rig.node):
            ethtool.switch("eth0", SET_TX_CHECKSUM, on=False)
    Echo(rig, 2)
    client = rig.connect(rig.outside, NODE_IPS[4], 30080)
    warm(client)
    before = rig.taken()
    talk(client, 100)
    assert rig.taken() - before > 150
    server = rig.socket(rig.outside)
    server.bind((OUTSIDE_IPS[4], 9000))
    server.listen()
    out = rig.connect(rig.pods[1], OUTSIDE_IPS[4], 9000)
    far = rig.accept(server)
    assert far.getpeername()[0] == NODE_IPS[4]
    before = rig.taken()
    for _ in range(200):
        out.sendall(b"x" * 1000)
        assert far.recv(4000)
        far.sendall(b"y" * 1000)
        assert out.recv(4000)
    assert rig.taken() - before > 300


@pytest.mark.parametrize("no_sum", [False, True], ids=["sums", "without sums"])
def test_datagrams(rig, no_sum):
    """A flow of datagrams takes it once it is a stream; a sum that is left out stays out."""
    server = rig.socket(rig.pods[2], kind=socket.SOCK_DGRAM)
    server.bind((pod_ip(2), PORT))
    client = rig.socket(rig.pods[1], kind=socket.SOCK_DGRAM)
    if no_sum:
        client.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
    client.connect((VIP[4], 80))
    started = rig.taken()
    deadline = time.monotonic() + 20
    while rig.taken() - started < 200:  # a stream is what has gone both ways for two seconds
        assert time.monotonic() < deadline, rig.counters()
        client.send(b"question")
        data, source = server.recvfrom(100)
        assert (data, source[0]) == (b"question", pod_ip(1))
        server.sendto(b"answer", source)
        assert client.recv(100) == b"answer"


def test_datagrams_without_an_answer(rig):
    """A flow that nobody answers is none that tracking knows well: all of it goes the long way, and arrives."""
    server = rig.socket(rig.pods[2], kind=socket.SOCK_DGRAM)
    server.bind((pod_ip(2), PORT))
    client = rig.socket(rig.pods[1], kind=socket.SOCK_DGRAM)
    client.connect((VIP[4], 80))
    before = rig.counters()
    for number in range(50):
        client.send(bytes([number]))
        assert server.recv(10) == bytes([number])
    after = rig.counters()
    assert (after["taken"], after["learned"]) == (before["taken"], before["learned"])


def test_it_is_one_hop(rig):
    """A packet that takes the lane has one hop less to live, as one that does not, and a sum that is right."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    with wire(rig.pods[2]) as raw:
        before = rig.taken()
        talk(client, 5, 400)
        assert rig.taken() > before
        packet = heard(raw, lambda p: TCP in p and p[TCP].dport == PORT and Raw in p)
    assert packet is not None
    assert (packet[IP].ttl, packet[IP].src, packet[IP].dst) == (63, pod_ip(1), pod_ip(2))
    sums = packet[IP].chksum
    del packet[IP].chksum
    assert IP(bytes(packet[IP])).chksum == sums


def test_what_opens_or_ends_goes_the_long_way(rig):
    """Tracking sees a connection's end, and lets go of it in ten seconds; a new one from the same port is a new one."""
    Echo(rig, 2)
    for _ in range(2):
        client = rig.socket(rig.pods[1])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.bind((pod_ip(1), 33333))
        client.connect((VIP[4], 80))
        warm(client)
        talk(client, 5)
        client.close()

        def left():
            lines = netns.run(rig.node, ["conntrack", "-L", "-p", "tcp", "--sport", "33333"]).splitlines()
            return max((int(line.split()[2]) for line in lines), default=0)

        eventually(lambda: left() <= 10)


def crafted(rig, client, **fields):
    """Return a packet of an open connection, as the pod's kernel would send it, with other fields of its IP header."""
    with netns.inside(rig.pods[1]):
        own = mac(rig.pods[1], "eth0")
    head = Ether(src=own, dst=mac(rig.node, "pod1"))
    return (
        head / IP(src=pod_ip(1), dst=VIP[4], **fields) / TCP(sport=client.getsockname()[1], dport=80, flags="A", seq=1, ack=1)
    )


@pytest.mark.parametrize(
    ("fields", "arrives"),
    [
        ({}, True),
        ({"options": [IPOption_NOP()] * 4}, True),
        ({"ttl": 1}, False),
        ({"flags": "MF"}, False),
        ({"frag": 100}, False),
    ],
    ids=["plain", "options", "last hop", "first fragment", "later fragment"],
)
def test_odd_packets_go_the_long_way(rig, fields, arrives):
    """Options, fragments and the last hop are the kernel's: no such packet takes the lane, and each fares as it would without one."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    with wire(rig.pods[2]) as there, wire(rig.pods[1]) as here:
        rig.port.renew()
        known = rig.counters()["learned"]
        client.sendall(b"learn")
        eventually(lambda: rig.counters()["learned"] >= known + 2)  # there, and back
        here.send(bytes(crafted(rig, client, **fields) / Raw(b"odd packet")))
        packet = heard(there, lambda p: TCP in p and bytes(p[TCP].payload).startswith(b"odd packet"), 0.5)
        assert (packet is not None) == arrives
        if packet is not None:  # one that took the lane has the MACs it was sent with
            assert (packet.dst != mac(rig.pods[2], "eth0")) == (fields == {})
        if fields.get("ttl") == 1:
            error = heard(here, lambda p: ICMP in p and p[ICMP].type == 11)
            assert error is not None
            assert error[IP].dst == pod_ip(1)


def test_too_long_for_the_next_link(rig):
    """What the next link does not take is answered by the kernel with the link's size, though the way is known."""
    server = rig.socket(rig.outside, kind=socket.SOCK_DGRAM)
    server.bind((OUTSIDE_IPS[4], 9000))
    client = rig.socket(rig.pods[1], kind=socket.SOCK_DGRAM)
    client.connect((OUTSIDE_IPS[4], 9000))
    deadline = time.monotonic() + 20
    while rig.taken() < 50:
        assert time.monotonic() < deadline, rig.counters()
        client.send(b"question")
        data, source = server.recvfrom(100)
        server.sendto(data, source)
        client.recv(100)
    netns.run(rig.node, ["ip", "link", "set", "eth0", "mtu", "1280"])
    rig.port.renew()
    for _ in range(3):
        client.send(b"question")
        data, source = server.recvfrom(100)
        server.sendto(data, source)
        client.recv(100)
    client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
    client.send(b"x" * 1400)

    def is_refused():
        try:
            client.send(b"x")
            client.send(b"x" * 1400)
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        return False

    eventually(is_refused, 0.5)  # before the way would have been forgotten anyway
    assert client.getsockopt(socket.IPPROTO_IP, 14) == 1280  # IP_MTU


def test_what_is_cut_is_cut_at_once(rig):
    """With a new generation, a connection that tracking has forgotten and rules would deny does not go on for a packet."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    talk(client, 20)
    netns.run(rig.node, ["nft", "add rule inet world closed ct state new drop"])
    netns.run(rig.node, ["conntrack", "-D", "-p", "tcp", "--dport", "80"])
    assert rig.lane.renew() == ""
    before = rig.taken()
    client.settimeout(0.5)
    client.sendall(b"x" * 100)
    with pytest.raises(TimeoutError):
        client.recv(100)
    assert rig.taken() == before


def test_what_is_not_cut_by_us_is_cut_in_a_second(rig):
    """If somebody else lets tracking forget a connection, the lane does so within a second."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    netns.run(rig.node, ["nft", "add rule inet world closed ct state new drop"])
    netns.run(rig.node, ["conntrack", "-D", "-p", "tcp", "--dport", "80"])
    started = time.monotonic()
    client.settimeout(1.5)
    while time.monotonic() < started + 10:
        try:
            talk(client, 1, 400)
        except TimeoutError:
            break
    assert time.monotonic() < started + 4


def test_another_sender_does_not_take_it(rig):
    """A pod that sends with another's address does not ride on that one's connection."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    talk(client, 5)
    for space, link, there in ((rig.pods[2], "eth0", "pod2"), (rig.outside, "eth0", "eth0")):
        before = rig.counters()
        packet = crafted(rig, client)
        packet.src, packet.dst = mac(space, link), mac(rig.node, there)
        with wire(space) as liar:
            for _ in range(3):  # the second would go by what the first has learned
                liar.send(bytes(packet / Raw(b"lie")))
        eventually(lambda: rig.counters()["left"] >= before["left"] + 3)  # noqa: B023 (called in here)
        assert rig.counters()["learned"] == before["learned"]


def test_links_come_and_go(rig, make_netns):
    """A pod's new link takes part with the next look, one that is gone does not; a queue of its own, or a bridge, leave a link out."""
    with netns.inside(rig.node):
        assert [(link.name, link.kind) for link in rig.port.observe()] == [
            ("eth0", LinkKind.EXIT),
            ("pod1", LinkKind.POD),
            ("pod2", LinkKind.POD),
        ]
        assert not rig.lane.drifted()
    third = make_netns()
    netns.run(rig.node, ["ip", "link", "add", "pod3", "type", "veth", "peer", "name", "eth0", "netns", third])
    netns.run(rig.node, ["ip", "link", "set", "pod3", "up", "alias", f"{ALIAS}/t/3/eth0"])
    netns.run(
        rig.node, ["tc", "qdisc", "add", "dev", "pod2", "root", "tbf", "rate", "1gbit", "burst", "100k", "latency", "5ms"]
    )
    with netns.inside(rig.node):
        assert rig.lane.drifted()
    assert rig.sync() == 2
    with netns.inside(rig.node):
        assert [link.name for link in rig.port.observe()] == ["eth0", "pod1", "pod3"]


def test_taken_off_by_somebody_else_and_for_good(rig):
    """A program that somebody took off comes back; `cleanup` leaves none, and says whether there was any."""
    netns.run(rig.node, ["nft", "list", "ruleset"])
    with netns.inside(rig.node):
        rig.port._attach.detach(_hook(socket.if_nametoindex("pod1")))
        assert rig.lane.drifted()
    assert rig.sync() == 3
    with netns.inside(rig.node):
        assert rig.lane.cleanup().changed == 1
        assert rig.lane.cleanup().changed == 0
        assert PROGRAM not in netns.run(rig.node, ["bpftool", "net", "show"])


def test_an_agent_that_comes_back_changes_nothing(rig):
    """Programs go on while nobody holds them, and whoever finds them again writes nothing."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    rig.port.close()
    talk(client, 50)
    with netns.inside(rig.node):
        again = LinuxLane(BUILT)
        other = LaneReconciler(again)
        assert other.sync().changed == 0
        assert again.counters()["taken"] > 50
        again.close()


def test_programs_are_exchanged_under_way(rig, tmp_path):
    """Five upgrades to other builds, while connections go on: no byte is lost or wrong, and the last program is the one that counts."""
    Echo(rig, 2)
    client = rig.connect(rig.pods[1], VIP[4], 80)
    warm(client)
    failed, over = [], threading.Event()

    def run():
        try:
            while not over.is_set():
                talk(client, 5, 4000)
        except (AssertionError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for number in range(5):
            folder = tmp_path / str(number)
            folder.mkdir()
            data = (BUILT / "lane.bpf.o").read_bytes()
            (folder / "lane.bpf.o").write_bytes(data + bytes([number]))  # behind the sections: another build, the same program
            with netns.inside(rig.node):
                port = LinuxLane(folder)
                assert LaneReconciler(port).sync().changed == 3
                eventually(lambda port=port: port.counters()["taken"] > 20)
                port.close()
    finally:
        over.set()
        thread.join(30)
    assert failed == []


def test_tracking_puts_up_with_it(rig):
    """What tracking did not see does not make it take the rest for a stranger's, and the setting is looked after."""
    assert netns.run(rig.node, ["sysctl", "-n", LIBERAL]).strip() == "1"
    netns.run(rig.node, ["sysctl", "-qw", f"{LIBERAL}=0"])
    with netns.inside(rig.node):
        assert rig.lane.drifted()
    rig.sync()
    assert netns.run(rig.node, ["sysctl", "-n", LIBERAL]).strip() == "1"
