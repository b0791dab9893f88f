"""What should not come in at the UDP port: counted, dropped, and the forwarder goes on.

stranger 192.168.1.9, peer 192.168.1.2 --veth--> 192.168.1.1:8285 forwarder ==> TUN np-tun 10.244.1.0
"""

from __future__ import annotations

import random
import socket
import struct
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from service_node import eventually

from kernelstate.linux import netns
from kernelstate.linux.forwarder import LinuxForwarder
from kernelstate.linux.tun import make_tun
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from nodeplane.host_kernel import FORWARDER
from packetpath import reference

pytestmark = pytest.mark.kernel

OWN, PEER, STRANGER, PORT, TUN = "192.168.1.1", "192.168.1.2", "192.168.1.9", 8285, "np-tun"
PEERS = (
    TunnelPeer(Prefix.parse("10.244.2.0/24"), ip_address(PEER)),
    TunnelPeer(Prefix.parse("10.244.3.0/24"), ip_address("192.168.1.3")),
)


class Rig:
    """A forwarder, and a hand that sends to it from several addresses."""

    def __init__(self, make_netns, directory: Path) -> None:
        self.node, self.far = make_netns(), make_netns()
        with netns.inside(self.node):
            assert make_tun(TUN) == ""
        netns.run(
            self.node,
            ["ip", "-batch", "-"],
            stdin=f"""link add eth0 type veth peer name eth0 netns {self.far}
            addr add {OWN}/24 dev eth0
            link set eth0 up
            addr add 10.244.1.0/32 dev {TUN}
            link set {TUN} up mtu 1472
            route add 10.244.0.0/16 dev {TUN}""",
        )
        far = [f"addr add {a}/24 dev eth0" for a in (PEER, STRANGER)]
        netns.run(self.far, ["ip", "-batch", "-"], stdin="\n".join([*far, "link set eth0 up"]))
        self.forwarder = LinuxForwarder(FORWARDER, directory)
        with netns.inside(self.node):
            self.forwarder.ensure(UdpTunnel(TUN, "eth0", PORT, (ip_address(OWN),), PEERS))
            self.forwarder.replace(PEERS)

    def send(self, source: str, packets: list[bytes]) -> None:
        with netns.inside(self.far), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            for packet in packets:
                sock.sendto(packet, (OWN, PORT))

    def counters(self) -> dict[str, int]:
        with netns.inside(self.node):
            return self.forwarder.counters()

    def close(self) -> None:
        with netns.inside(self.node):
            self.forwarder.stop()
        self.forwarder.close()


@pytest.fixture
def rig(make_netns, tmp_path):
    made = Rig(make_netns, tmp_path)
    yield made
    made.close()


def inner(source="10.244.2.7", destination="10.244.1.7", *, hops=64, offset=0x4000, payload=b"x" * 30) -> bytes:
    """Return a UDP packet between pods."""
    data = struct.pack("!HHHH", 1, 2, 8 + len(payload), 0) + payload
    ends = ip_address(source).packed + ip_address(destination).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 7, offset, hops, 17, 0) + ends
    return reference._completed(head + data, 20, 17)


CASES = {
    "a stranger's packet": (STRANGER, inner(), "unknown_peer"),
    "a peer's packet with the source of another node's pod": (PEER, inner("10.244.3.7"), "wrong_source"),
    "with a source of this node's own": (PEER, inner("10.244.1.9"), "wrong_source"),
    "with a source outside the pod network": (PEER, inner("8.8.8.8"), "wrong_source"),
    "nothing": (PEER, b"", "malformed"),
    "a packet shorter than it says": (PEER, inner()[:-5], "malformed"),
    "a header that is cut": (PEER, inner()[:19], "malformed"),
    "no IP packet": (PEER, b"GET / HTTP/1.0\r\n\r\n" * 4, "malformed"),
    "a header of 12 bytes": (PEER, b"\x43" + inner()[1:], "malformed"),
    "one whose TTL is over, as in a loop": (PEER, inner(hops=1), "ttl_exceeded"),
    "a fragment, which goes on as it is": (PEER, inner(offset=0x2000), "received_packets"),
    "64 kB in one packet": (PEER, inner(payload=b"y" * 60000), "received_packets"),
    "bytes behind its end": (PEER, inner() + b"junk", "received_packets"),
}


@pytest.mark.parametrize(("source", "packet", "counter"), CASES.values(), ids=list(CASES))
def test_each_is_counted(rig, source, packet, counter):
    """Each packet is counted once, as what it is, and nothing else is."""
    before = rig.counters()
    rig.send(source, [packet])
    eventually(lambda: rig.counters()[counter] == before[counter] + 1)
    fates = ("unknown_peer", "wrong_source", "malformed", "ttl_exceeded", "received_packets")
    after = rig.counters()
    assert {name for name in fates if after[name] != before[name]} == {counter}


def test_goes_on_after_noise(rig):
    """After ten thousand random and spoilt packets, from a peer and a stranger, the forwarder is the same process and forwards."""
    noise = random.Random(8285)
    packets = []
    for _ in range(5000):
        packet = bytearray(inner(payload=noise.randbytes(noise.randrange(200))))
        for _ in range(noise.randrange(6)):
            packet[noise.randrange(len(packet))] = noise.randrange(256)
        packets.append(
            noise.choice([bytes(packet), bytes(packet)[: noise.randrange(len(packet))], noise.randbytes(noise.randrange(100))])
        )
    rig.send(PEER, packets)
    rig.send(STRANGER, packets)
    before = rig.counters()["received_packets"]
    rig.send(PEER, [inner()])
    eventually(lambda: rig.counters()["received_packets"] > before)
    assert rig.forwarder.is_alive()
    expected = {
        reference.arrive({ip_network("10.244.2.0/24"): (ip_address(PEER), PORT)}, p, ip_address(PEER))[0] for p in packets
    }
    assert expected >= {"goes", "malformed", "wrong_source"}, "the noise is of every kind"
