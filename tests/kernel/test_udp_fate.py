"""UDP clients that never stop sending, while their Service loses its endpoints, goes and comes back.

Every client sends numbered datagrams at a steady rate from one port, so its flow never expires. Each datagram names the round
in which it was sent: one that arrives at a pod names a round in which this pod was an endpoint, or it was misled.
"""

import contextlib
import select
import socket
import threading

import pytest
from programmed_node import ProgrammedNode, service
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from service_node import NODE_IPS, OUTSIDE_IPS, TIMEOUT, ServiceNode, eventually, pod_ip

from kernelstate.linux import netns

pytestmark = pytest.mark.kernel

VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
PORT, NODE_PORT = 53, 30053
PODS = (1, 2, 3)
INTERVAL = 0.002
ETH_P_ALL = 3


class Senders:
    """Clients made with scapy: frames that a pod, and a host outside, put on their links again and again.

    ``round`` is what the datagrams carry; ``sent`` counts them.
    """

    def __init__(self, rig, family):
        self.round = 0
        self.sent = 0
        self._sending = -1
        self._stop = threading.Event()
        self._sockets = []
        self._frames = [
            self._client(rig.pods[4], mac(rig.node, "pod4"), pod_ip(4, family), (VIP[family], PORT)),
            self._client(rig.outside, mac(rig.node, "eth0"), OUTSIDE_IPS[family], (VIP[family], PORT)),
            self._client(rig.outside, mac(rig.node, "eth0"), OUTSIDE_IPS[family], (NODE_IPS[family], NODE_PORT)),
        ]
        self._thread = threading.Thread(target=self._run)

    def _client(self, space, gateway, source, target):
        """Return (socket, frame up to its payload)."""
        with netns.inside(space):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            wire.bind(("eth0", 0))
        self._sockets.append(wire)
        layer = IPv6 if ":" in source else IP
        port = 40000 + len(self._sockets)
        frame = Ether(src=mac(space, "eth0"), dst=gateway) / layer(src=source, dst=target[0])
        return wire, frame / UDP(sport=port, dport=target[1])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        for one in self._sockets:
            one.close()

    def begin(self, number, seconds):
        """Send datagrams of this round from now on; returns once the last of the round before is on its wire."""
        self.round = number
        eventually(lambda: self._sending == number, seconds)

    def _run(self):
        made = {}
        while not self._stop.wait(INTERVAL):
            number = self._sending = self.round
            if number not in made:
                payload = Raw(b"round %06d" % number)
                made[number] = [(wire, bytes(frame / payload)) for wire, frame in self._frames]
            for wire, frame in made[number]:
                with contextlib.suppress(OSError):
                    wire.send(frame)
                    self.sent += 1


def mac(space, link):
    """Return the hardware address of a link."""
    with netns.inside(space), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as probe:
        probe.bind((link, 0))
        return ":".join(f"{octet:02x}" for octet in probe.getsockname()[4])


class Pods:
    """What arrives at each pod, on the wire: a pod needs no socket to be sent to."""

    def __init__(self, rig):
        self.heard = {pod: {} for pod in PODS}
        self._wires = {}
        for pod in PODS:
            with netns.inside(rig.pods[pod]):
                wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
                wire.bind(("eth0", 0))
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            wire.setblocking(False)
            self._wires[wire] = pod

    def close(self):
        """Close every socket."""
        for wire in self._wires:
            wire.close()

    def take(self):
        """Take in what has arrived: {pod: {round: datagrams}}."""
        for wire in select.select(list(self._wires), [], [], 0.02)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = wire.recv(2000)
                    start = frame.find(b"round ")
                    if start >= 0:
                        number = int(frame[start + 6 : start + 12])
                        rounds = self.heard[self._wires[wire]]
                        rounds[number] = rounds.get(number, 0) + 1
        return self.heard


@pytest.fixture
def rig(make_netns):
    """Yield a node with three pods behind the Service and one that asks."""
    made = ServiceNode(make_netns, pods=4)
    yield made
    made.close()


DNS = {family: service(VIP[family], {"UDP": PORT}, name="dns", node_port=NODE_PORT) for family in (4, 6)}

STORIES = {
    "3 -> 0 -> 2 endpoints": [(1, 2, 3), (), (2, 3)],
    "deleted and created again": [(1, 2, 3), None, (1, 2)],
    "one after the other": [(1,), (2,), (3,), (1,)],
    "down to nothing, twice": [(1, 2), (1,), (), (3,), (), (2,)],
}


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_no_datagram_to_a_removed_pod(rig, mode, family, story):
    """Of what clients send to ClusterIP and NodePort after a sync nothing reaches a pod that is no endpoint, and some an endpoint."""
    tell(rig, mode, family, story)


@pytest.mark.ipvs
@pytest.mark.parametrize("story", list(STORIES.values())[:2], ids=list(STORIES)[:2])
def test_no_datagram_to_a_removed_pod_in_ipvs(rig, story):
    """The same where IPVS has a table of flows of its own."""
    tell(rig, "ipvs", 4, story, seconds=60.0)


def tell(rig, mode, family, story, seconds=TIMEOUT):
    """Program the chapters of a story, one after the other, while clients send; then see who heard what."""
    node = ProgrammedNode(rig, mode)
    pods = Pods(rig)
    addresses = {pod: pod_ip(pod, family) for pod in PODS}
    expected = {}
    with contextlib.closing(node), contextlib.closing(pods), Senders(rig, family) as clients:
        for number, members in enumerate(story, 1):
            present = [] if members is None else [(DNS[family], [addresses[pod] for pod in members])]
            clients.begin(0, seconds)  # while the node changes, either state may answer
            node.program(*present)
            clients.begin(number, seconds)  # what is sent from here on was sent after the sync
            before = clients.sent
            expected[number] = set(members or ())
            eventually(lambda before=before: pods.take() and clients.sent >= before + 90, seconds)
            if members:
                eventually(
                    lambda number=number: pods.take() and sum(r.get(number, 0) for r in pods.heard.values()) > 60, seconds
                )
        pods.take()
    for pod, rounds in pods.heard.items():
        for number in rounds.keys() - {0}:
            assert pod in expected[number], f"pod {pod} got {rounds[number]} datagrams of round {number}"
