"""The packet path's twin in Python is right by what others know of packets: scapy makes the same ones."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.packet import Packet

from packetpath import reference
from packetpath.reference import Written

PEERS = {
    "10.244.2.0/24": "192.168.1.2",
    "10.244.2.128/25": "192.168.1.3",
    "10.244.3.0/24": "192.168.1.3",
    "fd00:244:0:2::/64": "fd00:1::2",
}
TABLE = {ip_network(prefix): (ip_address(address), 8285) for prefix, address in PEERS.items()}
TWO, THREE, STRANGER = (IPv4Address(f"192.168.1.{n}") for n in (2, 3, 9))
OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]


def four(source: str = "10.244.1.7", destination: str = "10.244.2.7", ttl: int = 64) -> Packet:
    return IP(src=source, dst=destination, ttl=ttl, flags="DF", id=7)


def six(source: str = "fd00:244:0:1::7", destination: str = "fd00:244:0:2::7", hlim: int = 64) -> Packet:
    return IPv6(src=source, dst=destination, hlim=hlim)


@pytest.mark.parametrize(
    ("packet", "fate", "peer"),
    [
        (four() / UDP(), "goes", TWO),
        (four(destination="10.244.2.200") / UDP(), "goes", THREE),
        (four(destination="10.244.9.7") / UDP(), "no_route", None),
        (four(ttl=1) / UDP(), "ttl_exceeded", None),
        (six() / UDP(), "goes", IPv6Address("fd00:1::2")),
        (six(destination="fd00:244:0:9::7") / UDP(), "no_route", None),
        (six(hlim=1) / UDP(), "ttl_exceeded", None),
    ],
)
def test_a_packet_leaves_for_the_node_with_the_longest_prefix(packet: Packet, fate: str, peer: object) -> None:
    """It goes to the node of the longest prefix, with one hop less and a header that is right; else nowhere."""
    got, after, found = reference.leave(TABLE, bytes(packet))
    assert (got, found and found[0]) == (fate, peer)
    if fate == "goes":
        shorter = packet.copy()
        setattr(shorter, "ttl" if IP in packet else "hlim", 63)
        assert after == bytes(shorter)


@pytest.mark.parametrize(
    ("packet", "outer", "fate"),
    [
        (four("10.244.2.7", "10.244.1.7"), TWO, "goes"),
        (four("10.244.2.7", "10.244.1.7"), THREE, "wrong_source"),
        (four("10.244.2.200", "10.244.1.7"), TWO, "wrong_source"),
        (four("8.8.8.8", "10.244.1.7"), TWO, "wrong_source"),
        (four("10.244.2.7", "10.244.1.7"), STRANGER, "unknown_peer"),
        (four("10.244.2.7", "10.244.1.7", ttl=1), TWO, "ttl_exceeded"),
        (six("fd00:244:0:2::7", "fd00:244:0:1::7"), IPv6Address("fd00:1::2"), "goes"),
        (six("fd00:244:0:2::7", "fd00:244:0:1::7"), TWO, "wrong_source"),
    ],
)
def test_a_packet_comes_in_from_the_node_that_has_its_source(packet: Packet, outer: object, fate: str) -> None:
    """Only a known node sends, and only with the addresses of its own pods: those whose longest prefix leads to it."""
    assert reference.arrive(TABLE, bytes(packet / UDP() / b"x"), outer)[0] == fate


@pytest.mark.parametrize("data", [b"", b"\x45" * 19, b"\x60" * 39, b"GET / HTTP/1.0\r\n\r\n" * 3, bytes(four() / UDP())[:-1]])
def test_what_is_no_packet_is_malformed(data: bytes) -> None:
    """What is shorter than a header, or than it says, or of another version, goes neither way."""
    assert (reference.leave(TABLE, data)[0], reference.arrive(TABLE, data, TWO)[0]) == ("malformed", "malformed")


@pytest.mark.parametrize("ip", [four(), six()])
def test_a_superpacket_becomes_the_packets_that_the_kernel_would_send(ip: Packet) -> None:
    """Sequence numbers and identifications count up; FIN and PSH are the last one's, CWR the first one's; checksums are right."""
    payload = bytes(range(250)) * 10
    made = bytes(ip / TCP(sport=1, dport=2, seq=2**32 - 500, ack=9, flags="APFC", options=OPTIONS) / payload)
    wanted = []
    for number, flags in enumerate(("AC", "A", "APF")):
        head = ip.copy()
        if IP in head:
            head.id = 7 + number
        tcp = TCP(sport=1, dport=2, seq=(2**32 - 500 + 1000 * number) % 2**32, ack=9, flags=flags, options=OPTIONS)
        wanted.append(bytes(head / tcp / payload[1000 * number : 1000 * number + 1000]))
    assert reference.segments(made, reference.TCP, 1000) == wanted


@pytest.mark.parametrize("ip", [four(), six()])
def test_packets_of_a_flow_are_joined(ip: Packet) -> None:
    """What follows in a flow becomes one superpacket with its payload; PSH ends it; another flow and a wrong checksum stay out."""

    def tcp(seq: int, data: bytes, flags: str = "A", **more: int) -> bytes:
        return bytes(ip / TCP(sport=1, dport=2, seq=seq, ack=9, flags=flags, **more) / data)

    a, b, c, d = tcp(0, b"a" * 100), tcp(100, b"b" * 100), tcp(200, b"c" * 50, "AP"), tcp(250, b"d" * 100)
    wrong = tcp(350, b"e" * 100, chksum=1)
    joined, *rest = reference.merged([a, b, c, d, wrong], udp=True)
    assert (joined.size, joined.packet[-250:]) == (100, b"a" * 100 + b"b" * 100 + b"c" * 50)
    whole = (IP if IP in ip else IPv6)(joined.packet)
    assert (len(joined.packet), whole[TCP].flags, whole[TCP].seq) == (len(a) + 150, "PA", 0)
    assert rest == [Written(d), Written(wrong)]
    assert reference.segments(joined.packet, reference.TCP, 100)[2] == (c if IP not in ip else with_id(c, 9))


def with_id(packet: bytes, number: int) -> bytes:
    changed = IP(packet)
    changed.id, changed.chksum = number, None
    return bytes(changed)


ABOUT = {
    "net-unreachable": (ICMP(type=3, code=0), ICMPv6DestUnreach(code=0)),
    "time-exceeded": (ICMP(type=11, code=0), ICMPv6TimeExceeded(code=0)),
    "too-big": (ICMP(type=3, code=4, nexthopmtu=1472), ICMPv6PacketTooBig(mtu=1472)),
}


@pytest.mark.parametrize("what", ABOUT)
def test_a_complaint_is_a_right_icmp_error(what: str) -> None:
    """It goes from the node to the packet's sender, says what is wrong, and quotes as much as its protocol wants."""
    packet, packet6 = bytes(four() / UDP() / bytes(500)), bytes(six() / UDP() / bytes(1400))
    about, about6 = ABOUT[what]
    wanted = IP(src="10.244.1.0", dst="10.244.1.7", id=0) / about / packet[:28]
    wanted6 = IPv6(src="fd00:244:0:1::", dst="fd00:244:0:1::7", hlim=64) / about6 / packet6[:1232]
    assert reference.complaint(packet, IPv4Address("10.244.1.0").packed, what, 1472) == bytes(wanted)
    assert reference.complaint(packet6, IPv6Address("fd00:244:0:1::").packed, what, 1472) == bytes(wanted6)


@pytest.mark.parametrize(
    "packet",
    [
        four() / ICMP(type=3) / bytes(28),
        four("0.0.0.0"),
        four("224.0.0.1") / UDP(),
        four(destination="224.0.0.1") / UDP(),
        fragment(IP(src="10.244.1.7", dst="10.244.9.7") / UDP() / bytes(200), fragsize=64)[1],
        six() / ICMPv6DestUnreach() / bytes(40),
        six("::") / UDP(),
        six(destination="ff02::1") / UDP(),
    ],
)
def test_nobody_complains_about_these(packet: Packet) -> None:
    """There is no ICMP error about an ICMP error, a later fragment, or what comes from or goes to no single host (RFC 1122, 4443)."""
    own = (IPv4Address("10.244.1.0") if IP in packet else IPv6Address("fd00::1")).packed
    assert reference.complaint(bytes(packet), own, "net-unreachable", 1472) == b""
    assert reference.complaint(bytes(four() / ICMP()), IPv4Address("10.244.1.0").packed, "net-unreachable", 0)
    assert reference.complaint(bytes(six() / ICMPv6EchoRequest()), own.rjust(16, b"\0"), "net-unreachable", 0)
