"""The tunnel's programs, packet by packet: what each does with one is what the packet path's twin in Python says.

    Ethernet header + packet --BPF_PROG_TEST_RUN--> verdict, packet, counters

Nothing is sent here; ``test_bpf_tunnel_kernel.py`` does that.
"""

from __future__ import annotations

import os
import random
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import ip_address, ip_network

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from kernelstate.linux import netns
from kernelstate.linux import tunnel_maps as codec
from kernelstate.linux.bpf_tunnel import DECAP, ENCAP, GUARD, LinuxTunnel
from kernelstate.linux.tun import make_tun
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import SourceGuard, TunnelPeer, UdpTunnel
from kernelstate.reconcile_tunnel import Observed
from kernelstate.tunnel_tables import arguments_of, tables_of
from nodeplane.host_kernel import FORWARDER
from packetpath import reference

pytestmark = pytest.mark.kernel

PORT = 8285
LOCAL = {4: "192.168.1.1", 6: "fd00:1::1"}
PEERS = {
    "10.244.2.0/24": "192.168.1.2",
    "10.244.2.128/25": "192.168.1.3",
    "10.244.3.0/24": "192.168.1.3",
    "fd00:244:0:2::/64": "fd00:1::2",
    "fd00:244:0:3::/64": "fd00:1::3",
}
TABLE = {ip_network(network): (ip_address(node), PORT) for network, node in PEERS.items()}
TUNNEL = UdpTunnel(
    "flannel0",
    "eth0",
    PORT,
    tuple(ip_address(one) for one in LOCAL.values()),
    tuple(TunnelPeer(Prefix.parse(network), ip_address(node)) for network, node in PEERS.items()),
)
WATCHED = SourceGuard(
    "eth0",
    (Prefix.parse("10.244.1.0/24"), Prefix.parse("fd00:244:0:1::/64")),
    (Prefix.parse("10.244.0.0/16"), Prefix.parse("fd00:244::/48")),
    ((8472, 1), (4789, 7)),
    TUNNEL.peers,
)
NEXT, SHOT, REDIRECT = 0xFFFFFFFF, 2, 7
FRAME = {4: bytes(12) + b"\x08\x00", 6: bytes(12) + b"\x86\xdd"}
TUNNEL_HEADER = 51
"""Byte of the settings: whether the tunnel's packets start with an Ethernet header, as those of a test run do."""


@pytest.fixture(scope="module")
def installed() -> Iterator[LinuxTunnel]:
    """Both kinds of programs, attached to links that carry nothing, in a namespace in which the tests run."""
    name = f"np-t-{os.getpid()}-{secrets.token_hex(3)}"
    with ExitStack() as undo:
        netns.create(name)
        undo.callback(netns.delete, name)
        undo.enter_context(netns.inside(name))
        links = """link add eth0 type veth peer name far
        addr add 192.168.1.1/24 dev eth0
        addr add fd00:1::1/64 dev eth0 nodad
        link set eth0 up
        link set far up"""
        netns.run(name, ["ip", "-batch", "-"], stdin=links)
        assert not make_tun("flannel0")
        port = undo.enter_context(closing(LinuxTunnel(FORWARDER.parent)))
        for kind, part in (("udp", TUNNEL), ("guard", WATCHED)):
            port.install(kind, Observed(arguments_of(part), tables_of(part)))
        settings = port._held["udp"].maps["settings"]
        settings[bytes(4)] = settings[bytes(4)][:TUNNEL_HEADER] + b"\1" + settings[bytes(4)][TUNNEL_HEADER + 1 :]
        yield port


@pytest.fixture
def programs(installed: LinuxTunnel) -> LinuxTunnel:
    """Let the programs remember nothing of any peer."""
    remember(installed, codec.NODE)
    return installed


def remember(port: LinuxTunnel, value: bytes) -> None:
    """Let the programs remember the same of every peer."""
    nodes = port._held["udp"].maps["nodes"]
    nodes.update(dict.fromkeys(nodes.dump(), value))


def counted(port: LinuxTunnel, kind: str, before: dict) -> dict:
    """Return the counters that moved."""
    return {name: value - before[name] for name, value in port.counters(kind).items() if value != before[name]}


def packets(rng: random.Random, count: int, version: int) -> Iterator[bytes]:
    """Make packets between pods, some of them wrong: addresses of anybody, TTL over, cut off, bytes changed."""
    pods = (
        ["10.244.2.7", "10.244.2.200", "10.244.3.9", "10.244.1.5", "10.244.9.9", "8.8.8.8"]
        if version == 4
        else ["fd00:244:0:2::7", "fd00:244:0:3::9", "fd00:244:0:1::5", "fd00:244:0:9::9", "2001:db8::1"]
    )
    for _ in range(count):
        source, destination, hops = rng.choice(pods), rng.choice(pods), rng.choice([0, 1, 2, 63, 64, 255])
        ip = (
            IP(src=source, dst=destination, ttl=hops, tos=rng.choice([0, 3]), id=rng.randrange(1 << 16))
            if version == 4
            else IPv6(src=source, dst=destination, hlim=hops)
        )
        payload = Raw(rng.randbytes(rng.choice([0, 1, 17, 64, 900, 1300])))
        layer = rng.choice([UDP(sport=1, dport=2), TCP(sport=1, dport=2, flags="A"), ICMP() if version == 4 else Raw(b"x")])
        data = bytearray(bytes(ip / layer / payload))
        deed = rng.random()
        if deed < 0.2:
            data[rng.choice([0, 2, 3, 4, 5, 6, 8, rng.randrange(len(data))])] = rng.randrange(256)
        elif deed < 0.3:
            del data[rng.randrange(len(data)) :]
        yield bytes(data)


def test_encap_is_the_twins(programs: LinuxTunnel) -> None:
    """A packet leaves wrapped for the peer, one hop further, exactly if the twin sends it; any other is passed on unchanged."""
    encap, rng, sent = programs._held["udp"].programs[ENCAP], random.Random(1), 0
    before = programs.counters("udp")
    for version in (4, 6):
        for packet in packets(rng, 400, version):
            if len(packet) < (20 if version == 4 else 40):
                continue  # the kernel runs no program over less
            remember(programs, struct.pack("=QQ", time.monotonic_ns() - 10**8, 0))  # all unwrap in their kernel
            ran = encap.run(FRAME[version] + packet)
            fate, wanted, peer = reference.leave(TABLE, packet)
            if packet[0] >> 4 != version:
                fate = "malformed"  # the link says another family than the packet
            if fate != "goes":
                assert (ran.verdict, ran.packet) == (NEXT, FRAME[version] + packet), (fate, packet.hex())
                continue
            sent += 1
            outer = (IP if version == 4 else IPv6)(ran.packet[14:])
            assert (ran.verdict, bytes(outer[UDP].payload)) == (REDIRECT, wanted), packet.hex()
            assert (outer.src, outer.dst, outer[UDP].dport) == (LOCAL[version], str(peer[0]), PORT)
            assert outer[UDP].sport >= 0xC000
            length = len(wanted) + 8
            assert (outer[UDP].len, outer.len if version == 4 else outer.plen + 20) == (length, length + 20)
            assert outer[UDP].chksum == 0
            if version == 4:
                assert reference._folded(reference._sum(bytes(outer)[:20])) == 0xFFFF
    assert sent > 150
    moved = counted(programs, "udp", before)
    assert (moved["sent_packets"], moved.keys()) == (sent, {"sent_packets", "sent_bytes", "passed_out"})


def test_too_big_is_passed_on(programs: LinuxTunnel) -> None:
    """A packet that does not fit through the uplink once wrapped goes to the forwarder, which answers; one byte less is sent."""
    encap = programs._held["udp"].programs[ENCAP]
    for version, room in ((4, 28), (6, 48)):
        ends = {"dst": "10.244.2.7" if version == 4 else "fd00:244:0:2::7"}
        header = IP(**ends) if version == 4 else IPv6(**ends)
        fill = 1500 - room - len(header / UDP())
        assert encap.run(FRAME[version] + bytes(header / UDP() / Raw(bytes(fill)))).verdict == REDIRECT
        assert encap.run(FRAME[version] + bytes(header / UDP() / Raw(bytes(fill + 1)))).verdict == NEXT


def unfinished(version: int, layer: UDP | TCP, payload: bytes) -> tuple[bytes, bytes]:
    """Return a packet whose checksum field holds the pseudo-header's sum only, as a kernel leaves it to the card, and it finished."""
    ends = ("10.244.1.5", "10.244.2.7") if version == 4 else ("fd00:244:0:1::5", "fd00:244:0:2::7")
    ip = IP(src=ends[0], dst=ends[1]) if version == 4 else IPv6(src=ends[0], dst=ends[1])
    whole = bytes(ip / layer / Raw(payload))
    start, protocol = (20, whole[9]) if version == 4 else (40, whole[6])
    field = start + (16 if protocol == 6 else 6)
    pseudo = reference._pseudo(whole, version, protocol, len(whole) - start)
    return whole[:field] + struct.pack("!H", reference._folded(reference._sum(pseudo))) + whole[field + 2 :], whole


@pytest.mark.parametrize("version", [4, 6])
def test_checksums_are_finished(programs: LinuxTunnel, version: int) -> None:
    """To a peer that may unwrap in user space UDP, and TCP without payload, leave with whole checksums; other TCP is not sent."""
    encap, rng = programs._held["udp"].programs[ENCAP], random.Random(3)
    for size in (0, 1, 7, 8, 19, 64, 255, 256, 257, 511, 1000, 1400):
        packet, whole = unfinished(version, UDP(sport=5, dport=6), rng.randbytes(size))
        ran = encap.run(FRAME[version] + packet)
        inner = (IP if version == 4 else IPv6)(ran.packet[14:])[UDP].payload
        assert (ran.verdict, bytes(inner)) == (REDIRECT, reference.leave(TABLE, whole)[1]), size
    for flags, options in (("S", [("MSS", 1400)]), ("A", [("Timestamp", (1, 2))]), ("SA", []), ("A", [])):
        packet, whole = unfinished(version, TCP(flags=flags, options=options), b"")
        ran = encap.run(FRAME[version] + packet)
        inner = (IP if version == 4 else IPv6)(ran.packet[14:])[UDP].payload
        assert (ran.verdict, bytes(inner)) == (REDIRECT, reference.leave(TABLE, whole)[1]), flags
    before = programs.counters("udp")
    for flags, payload in (("PA", b"x" * 100), ("FA", b""), ("R", b"")):
        packet, _ = unfinished(version, TCP(flags=flags), payload)
        assert encap.run(FRAME[version] + packet).verdict == NEXT
    assert counted(programs, "udp", before) == {"unfinished": 3, "passed_out": 3}


def test_a_peer_without_outer_checksums_is_trusted(programs: LinuxTunnel) -> None:
    """Once a peer has sent without an outer checksum, it gets packets as they are; one that never did, does not."""
    encap, decap = (programs._held["udp"].programs[name] for name in (ENCAP, DECAP))
    packet, _ = unfinished(4, TCP(flags="PA"), b"x" * 100)
    inner = bytes(IP(src="10.244.2.7", dst="10.244.1.5") / ICMP())
    for checksum, verdict in ((1, NEXT), (0, REDIRECT)):
        outer = IP(src="192.168.1.2", dst=LOCAL[4]) / UDP(sport=1, dport=PORT, chksum=checksum) / Raw(inner)
        assert decap.run(FRAME[4] + bytes(outer)).verdict == REDIRECT
        ran = encap.run(FRAME[4] + packet)
        assert ran.verdict == verdict
    assert bytes(IP(ran.packet[14:])[UDP].payload)[20:] == packet[20:]


def wrapped(packet: bytes, node: str, **outer: int) -> bytes:
    """Return a datagram as a peer sends it."""
    version = ip_address(node).version
    ip = IP(src=node, dst=LOCAL[4]) if version == 4 else IPv6(src=node, dst=LOCAL[6])
    return FRAME[version] + bytes(ip / UDP(sport=50000, dport=PORT, **outer) / Raw(packet))


DROPS = {"unknown_peer", "wrong_source", "malformed"}


def test_decap_is_the_twins(programs: LinuxTunnel) -> None:
    """A datagram comes in unwrapped, one hop further, exactly if the twin lets it in; else it is counted for the twin's reason."""
    decap, rng, came = programs._held["udp"].programs[DECAP], random.Random(2), 0
    for version in (4, 6):
        nodes = ["192.168.1.2", "192.168.1.3", "192.168.1.9"] if version == 4 else ["fd00:1::2", "fd00:1::3", "fd00:1::9"]
        for packet in packets(rng, 500, version):
            node = rng.choice(nodes)
            before = programs.counters("udp")
            outer = rng.choice([{}, {"chksum": 0}])
            ran = decap.run(wrapped(packet, node, **outer))
            fate, wanted = reference.arrive(TABLE, packet, ip_address(node))
            if packet and packet[0] >> 4 != version and fate == "wrong_source":
                fate = "malformed"  # a packet of the other family: the twin looks for its source, the program does not
            moved = counted(programs, "udp", before)
            if fate == "goes" and not outer and len(packet) < (28 if version == 4 else 48):
                fate = "ttl_exceeded"  # too short to unwrap with an outer checksum: the forwarder's as well
            if fate == "goes":
                came += 1
                assert (ran.verdict, ran.packet) == (REDIRECT, FRAME[version] + wanted), packet.hex()
                assert moved == {"received_packets": 1, "received_bytes": len(wanted)}
            elif fate in DROPS:
                assert (ran.verdict, moved) == (SHOT, {fate: 1}), (fate, packet.hex())
            else:
                assert (ran.verdict, ran.packet, moved) == (NEXT, wrapped(packet, node, **outer), {"passed_in": 1})
    assert came > 60


INNER = bytes(IP(src="10.244.2.7", dst="10.244.1.5") / ICMP() / Raw(bytes(40)))
LEFT_ALONE = {
    "another port": FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4]) / UDP(dport=8286) / Raw(INNER)),
    "another protocol": FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4]) / TCP(dport=PORT) / Raw(INNER)),
    "another destination": FRAME[4] + bytes(IP(src="192.168.1.2", dst="192.168.1.7") / UDP(dport=PORT) / Raw(INNER)),
    "a first fragment": FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4], flags="MF") / UDP(dport=PORT) / Raw(INNER)),
    "a later fragment": FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4], frag=9, proto=17) / Raw(INNER)),
    "outer options": FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4], options=[b"\x01"]) / UDP(dport=PORT) / Raw(INNER)),
    "ARP": bytes(Ether(dst="00:00:00:00:00:00") / ARP()),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_decap_leaves_alone(programs: LinuxTunnel, name: str) -> None:
    """What is not a whole datagram to the tunnel's port and address goes on to the kernel as it came."""
    ran = programs._held["udp"].programs[DECAP].run(LEFT_ALONE[name])
    assert (ran.verdict, ran.packet) == (NEXT, LEFT_ALONE[name])


def test_wrong_lengths_are_malformed(programs: LinuxTunnel) -> None:
    """An outer packet shorter than it says, or a UDP length that is not its own, is dropped, and counted as malformed."""
    decap = programs._held["udp"].programs[DECAP]
    right = wrapped(INNER, "192.168.1.2")
    for bad in (right[:-1], right[:38] + b"\0\x09" + right[40:], right[:38] + b"\xff\xff" + right[40:], right[:50]):
        before = programs.counters("udp")
        assert (decap.run(bad).verdict, counted(programs, "udp", before)) == (SHOT, {"malformed": 1}), bad.hex()


def test_padding_is_no_part_of_it(programs: LinuxTunnel) -> None:
    """Padding behind an outer packet, as Ethernet has for short ones, is no part of what comes in."""
    ran = programs._held["udp"].programs[DECAP].run(wrapped(INNER, "192.168.1.2") + bytes(9))
    assert ran.verdict == REDIRECT
    assert IP(ran.packet[14:]).len == len(INNER)


# -- the guard ---------------------------------------------------------------------------------------------------------


def vxlan(inner: object, node: str = "192.168.1.2", port: int = 8472, vni: int = 1, to: str = "") -> bytes:
    """Return a VXLAN packet to us."""
    version = ip_address(node).version
    outer = IP(src=node, dst=to or LOCAL[4]) if version == 4 else IPv6(src=node, dst=to or LOCAL[6])
    return FRAME[version] + bytes(outer / UDP(sport=1, dport=port) / VXLAN(vni=vni, flags=8) / inner)


def framed(source: str, **fields: int) -> Ether:
    """Return an inner frame."""
    version = ip_address(source).version
    ip = IP(src=source, dst="10.244.1.5", **fields) if version == 4 else IPv6(src=source, dst="fd00:244:0:1::5")
    return Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02") / ip / UDP()


def plain(source: str, **fields: int) -> bytes:
    """Return a packet without a tunnel."""
    version = ip_address(source).version
    ip = IP(src=source, dst="10.244.1.5", **fields) if version == 4 else IPv6(src=source, dst="fd00:244:0:1::5")
    return FRAME[version] + bytes(ip / UDP(sport=1, dport=2))


HIDDEN = FRAME[6] + bytes(
    IPv6(src="fd00:1::2", dst=LOCAL[6])
    / IPv6ExtHdrDestOpt()
    / UDP(dport=8472)
    / VXLAN(vni=1, flags=8)
    / framed("fd00:244:0:3::9")
)
FIRST = FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4], flags="MF") / UDP(dport=8472) / VXLAN(vni=1, flags=8))
FIRST6 = FRAME[6] + bytes(
    IPv6(src="fd00:1::2", dst=LOCAL[6]) / IPv6ExtHdrFragment(nh=17, m=1) / UDP(dport=8472) / VXLAN(vni=1, flags=8)
)
LATER = FRAME[4] + bytes(IP(src="192.168.1.2", dst=LOCAL[4], frag=9, proto=17) / Raw(bytes(64)))
ENDLESS = FRAME[6] + bytes(IPv6(src="fd00:1::2", dst=LOCAL[6], nh=60)) + b"\x3c\0\1\4\0\0\0\0" * 12
GUARDED: dict[str, tuple[bytes, str]] = {
    "a peer's pod through its tunnel": (vxlan(framed("10.244.2.7")), "checked"),
    "a peer's pod, IPv6": (vxlan(framed("fd00:244:0:2::7"), "fd00:1::2"), "checked"),
    "a peer's own address through its tunnel": (vxlan(framed("192.168.1.2")), "checked"),
    "the second tunnel": (vxlan(framed("10.244.3.7"), "192.168.1.3", 4789, 7), "checked"),
    "another peer's pod": (vxlan(framed("10.244.3.9")), "!vxlan_wrong_source"),
    "the longer prefix is another peer's": (vxlan(framed("10.244.2.200")), "!vxlan_wrong_source"),
    "our own pod through a tunnel": (vxlan(framed("10.244.1.9")), "!vxlan_wrong_source"),
    "the world through a tunnel": (vxlan(framed("8.8.8.8")), "!vxlan_wrong_source"),
    "another peer's pod, IPv6": (vxlan(framed("fd00:244:0:3::7"), "fd00:1::2"), "!vxlan_wrong_source"),
    "somebody who is no peer": (vxlan(framed("10.244.2.7"), "192.168.1.9"), "!vxlan_unknown_peer"),
    "ARP through a tunnel": (vxlan(Ether() / ARP()), "!vxlan_malformed"),
    "no frame in a tunnel's packet": (vxlan(Raw(b"short")), "!vxlan_malformed"),
    "half an IP header in a frame": (vxlan(Raw(bytes(framed("10.244.2.7"))[:26])), "!vxlan_malformed"),
    "a first fragment without the inner header": (FIRST, "!vxlan_malformed"),
    "a first fragment without it, IPv6": (FIRST6, "!vxlan_malformed"),
    "an extension header before UDP": (HIDDEN, "!vxlan_wrong_source"),
    "extension headers without end": (ENDLESS, "!plain_malformed"),
    "a later fragment": (LATER, ""),
    "another VNI": (vxlan(framed("8.8.8.8"), vni=2), ""),
    "another port": (vxlan(framed("8.8.8.8"), port=8473), ""),
    "a peer's pod, plain": (plain("10.244.2.7"), "checked"),
    "a peer's pod, plain, IPv6": (plain("fd00:244:0:2::7"), "checked"),
    "our own pod, from outside": (plain("10.244.1.9"), "!plain_own_source"),
    "our own pod, from outside, IPv6": (plain("fd00:244:0:1::9"), "!plain_own_source"),
    "our own pod in a fragment": (plain("10.244.1.9", frag=9), "!plain_own_source"),
    "nobody's pod": (plain("10.244.77.9"), "!plain_unknown_source"),
    "the world": (plain("8.8.8.8"), ""),
    "a node": (plain("192.168.1.2"), ""),
    "ARP": (bytes(Ether() / ARP()), ""),
}
"""What is counted; with a ``!`` dropped as well."""


@pytest.mark.parametrize("name", GUARDED)
def test_guard(programs: LinuxTunnel, name: str) -> None:
    """The guard drops what comes from where its source is not, says why, and lets everything else go on unchanged."""
    packet, word = GUARDED[name]
    before = programs.counters("guard")
    ran = programs._held["guard"].programs[GUARD].run(packet)
    assert (ran.verdict, ran.packet) == (SHOT if word.startswith("!") else NEXT, packet)
    assert counted(programs, "guard", before) == ({word.lstrip("!"): 1} if word else {})


def test_counter_names_are_the_programs() -> None:
    """There are as many names of counters as the programs have."""
    for kind, file in (("udp", "udp.h"), ("guard", "guard.bpf.c")):
        source = (FORWARDER.parent.parent / "bpf" / file).read_text()
        body = source.partition("enum counter {")[2].partition("COUNTERS")[0]
        assert tuple(word.strip().lower() for word in body.split(",") if word.strip()) == codec.COUNTERS[kind]
