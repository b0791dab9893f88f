"""The packet path's C does to packets what its twin in Python does, byte for byte; and nothing it should not, under sanitizers."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packetpath import reference

ROOT = Path(__file__).parents[2] / "packetpath"
PEERS = {
    "10.244.1.0/24": "192.168.1.1",
    "10.244.2.0/24": "192.168.1.2",
    "10.244.2.128/25": "192.168.1.3",
    "10.244.4.0/30": "192.168.1.2",
    "fd00:244:0:1::/64": "192.168.1.1",
    "fd00:244:0:2::/64": "fd00:1::2",
    "fd00:244::/48": "fd00:1::3",
}
TABLE = {ip_network(prefix): (ip_address(address), 8285) for prefix, address in PEERS.items()}
INNER4 = [
    IPv4Address(a) for a in ("10.244.1.5", "10.244.2.5", "10.244.2.200", "10.244.4.1", "10.244.4.5", "224.0.0.1", "0.0.0.0")
]
INNER6 = [IPv6Address(a) for a in ("fd00:244:0:1::5", "fd00:244:0:2::5", "fd00:244:0:9::5", "fd01::1", "ff02::1", "::")]
OUTER = [
    ip_address(a) for a in ("192.168.1.1", "192.168.1.2", "192.168.1.3", "192.168.1.9", "fd00:1::2", "fd00:1::3", "fd00:1::9")
]

FLAGS = st.sampled_from([0x10, 0x18, 0x02, 0x11, 0x90])


class Peer(ctypes.Structure):
    """``struct np_peer``."""

    _fields_ = (
        ("prefix", ctypes.c_uint8 * 16),
        ("family", ctypes.c_uint8),
        ("length", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("address", ctypes.c_uint8 * 16),
        ("address_family", ctypes.c_uint8),
    )


@pytest.fixture(scope="module")
def api():
    subprocess.run(["make", "-s", "-C", ROOT, "built/libnp-api.so"], check=True, timeout=120)
    library = ctypes.CDLL(str(ROOT / "built/libnp-api.so"))
    library.api_table.restype = ctypes.c_void_p
    return library


@pytest.fixture(scope="module")
def table(api):
    made = (Peer * len(TABLE))()
    for one, (network, (address, port)) in zip(made, TABLE.items(), strict=True):
        one.prefix[: network.max_prefixlen // 8] = network.network_address.packed
        one.family, one.length, one.port, one.address_family = network.version, network.prefixlen, port, address.version
        one.address[: len(address.packed)] = address.packed
    return ctypes.c_void_p(api.api_table(made, len(made)))


@st.composite
def packets(draw, protocols=(6, 17, 1, 58, 44), inner4=INNER4, inner6=INNER6, flags=FLAGS):
    """Draw a packet, mostly right; some have a few bytes changed, some are cut or have something behind their end."""
    protocol = draw(st.sampled_from(protocols))
    payload = draw(st.binary(max_size=60))
    match protocol:
        case 6:
            options = draw(st.sampled_from([b"", b"\1\1\1\1", b"\1\1\x08\x0a12345678"]))
            head = struct.pack(
                "!HHIIBBHHH", 1000, 80, draw(st.integers(0, 2**32 - 1)), 7, (20 + len(options)) // 4 << 4, draw(flags), 99, 0, 0
            )
            data = head + options + payload
        case 17:
            data = struct.pack("!HHHH", 1000, 53, 8 + len(payload), 0) + payload
        case _:
            data = bytes([draw(st.sampled_from([0, 3, 8, 128, 1])), 0, 0, 0, 0, 0, 0, 0]) + payload
    packet = bytearray(with_header(protocol, data, draw(st.sampled_from(inner4 + inner6)), draw, {4: inner4, 6: inner6}))
    if protocol in (6, 17) and draw(st.booleans()):
        packet = bytearray(reference._completed(bytes(packet), 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4, protocol))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([None, None, None, draw(st.integers(0, len(packet)))]))
    return bytes(packet[:cut]) + draw(st.sampled_from([b"", b"", b"xyz"]))


def with_header(protocol, data, source, draw, inner):
    hops = draw(st.sampled_from([64, 64, 2, 1, 0]))
    if source.version == 6:
        destination = draw(st.sampled_from(inner[6]))
        return struct.pack("!IHBB", 0x60000000, len(data), protocol, hops) + source.packed + destination.packed + data
    options = draw(st.sampled_from([b"", b"", b"\1\1\1\1"]))
    size, offset = 20 + len(options), draw(st.sampled_from([0x4000, 0x4000, 0, 0x2000, 0x2001, 5]))
    destination = draw(st.sampled_from(inner[4]))
    ends = source.packed + destination.packed
    head = struct.pack("!BBHHHBBH", 0x40 | size // 4, 0, size + len(data), 77, offset, hops, protocol, 0) + ends + options
    return head[:10] + reference._checksum(head) + head[12:] + data


def buffer(data: bytes, room: int = 0):
    return (ctypes.c_uint8 * max(len(data) + room, 1)).from_buffer_copy(data + bytes(max(room, 1 - len(data))))


@settings(max_examples=400, deadline=None)
@given(packet=packets())
def test_leaving(api, table, packet):
    """A packet from a pod fares, and is changed, as the twin says, and is for the same peer."""
    raw, address, port = buffer(packet), (ctypes.c_uint8 * 16)(), ctypes.c_uint16()
    fate = reference.FATES[api.api_leave(table, raw, ctypes.c_size_t(len(packet)), address, ctypes.byref(port))]
    wanted, after, peer = reference.leave(TABLE, packet)
    assert fate == wanted
    if fate == "goes":
        assert bytes(raw)[: len(packet)] == after
        assert (bytes(address)[: len(peer[0].packed)], port.value) == (peer[0].packed, peer[1])


@settings(max_examples=400, deadline=None)
@given(packet=packets(), outer=st.sampled_from(OUTER))
def test_arriving(api, table, packet, outer):
    """A datagram from a node is let in, or refused for the same reason, as the twin says."""
    raw = buffer(packet)
    fate = reference.FATES[api.api_arrive(table, raw, ctypes.c_size_t(len(packet)), outer.packed, outer.version)]
    wanted, after = reference.arrive(TABLE, packet, outer)
    assert fate == wanted
    if fate == "goes":
        assert bytes(raw)[: len(packet)] == after


@settings(max_examples=200, deadline=None)
@given(packet=packets(protocols=(6, 17)), size=st.integers(1, 40))
def test_cutting(api, packet, size):
    """A superpacket is cut into the twin's packets."""
    ip = reference.parse(packet)
    if ip is None or ip.protocol not in (6, 17):
        return
    start = ip.header + ((packet[ip.header + 12] >> 4) * 4 if ip.protocol == 6 and ip.total >= ip.header + 20 else 8)
    usable = ip.total >= ip.header + (20 if ip.protocol == 6 else 8) and ip.header + (20 if ip.protocol == 6 else 8) <= start
    out, lengths = (ctypes.c_uint8 * 200_000)(), (ctypes.c_uint32 * 2048)()
    n = api.api_segment(buffer(packet), ctypes.c_size_t(len(packet)), ip.header, ip.protocol, size, out, lengths)
    if not usable or start >= ip.total or start > 128:
        assert n == -1
        return
    assert pieces(out, lengths, n) == reference.segments(packet, ip.protocol, size)


@st.composite
def trains(draw):
    """Draw packets that mostly follow one another in a flow: a superpacket's segments, with some exchanged, spoilt or strange."""
    ends = {"inner4": INNER4[:2], "inner6": INNER6[:2]}
    found = []
    for _ in range(draw(st.integers(1, 3))):
        one = draw(packets(protocols=(6, 17), flags=st.just(0x10), **ends))
        ip = reference.parse(one)
        usable = ip is not None and ip.total > ip.header + 40 and ip.protocol in (6, 17)
        if usable and (ip.protocol == 17 or 20 <= (one[ip.header + 12] >> 4) * 4 < ip.total - ip.header):
            found += reference.segments(one, ip.protocol, draw(st.integers(5, 30)))
        else:
            found.append(one)
    if draw(st.booleans()) and len(found) > 1:
        at = draw(st.integers(0, len(found) - 1))
        spoilt = bytearray(found[at])
        if spoilt:
            spoilt[draw(st.integers(0, len(spoilt) - 1))] ^= draw(st.integers(1, 255))
        found[at] = bytes(spoilt)
    return found


@settings(max_examples=300, deadline=None)
@given(train=trains(), udp=st.booleans())
def test_joining(api, train, udp):
    """Packets are joined to the twin's superpackets, and what may not be joined is not."""
    data, n = b"".join(train), len(train)
    lengths = (ctypes.c_uint32 * max(n, 1))(*map(len, train))
    out, out_lengths, sizes = (ctypes.c_uint8 * (len(data) + 1))(), (ctypes.c_uint32 * (n + 1))(), (ctypes.c_uint32 * (n + 1))()
    written = api.api_merge(buffer(data), lengths, n, int(udp), out, out_lengths, sizes)
    got = [reference.Written(p, sizes[i]) for i, p in enumerate(pieces(out, out_lengths, written))]
    assert got == reference.merged(train, udp=udp)


@settings(max_examples=300, deadline=None)
@given(packet=packets(), what=st.sampled_from(reference.COMPLAINTS))
def test_complaining(api, packet, what):
    """The ICMP error about a packet is the twin's, and there is none where there must be none."""
    own = IPv6Address("fd00:244:0:1::").packed if packet and packet[0] >> 4 == 6 else IPv4Address("10.244.1.0").packed
    out = (ctypes.c_uint8 * 1280)()
    code = reference.COMPLAINTS.index(what)
    length = api.api_complain(buffer(packet), ctypes.c_size_t(len(packet)), own, code, 1472, out)
    assert bytes(out)[:length] == reference.complaint(packet, own, what, 1472)


def test_nothing_is_read_or_written_beyond_a_packet():
    """Packets that nobody should send find no fault in the C under AddressSanitizer and UBSan."""
    subprocess.run(["make", "-s", "-C", ROOT, "built/fuzz"], check=True, timeout=120)
    done = subprocess.run([ROOT / "built/fuzz", "5"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]


def pieces(out, lengths, n):
    found, at = [], 0
    for i in range(n):
        found.append(bytes(out[at : at + lengths[i]]))
        at += lengths[i]
    return found
