"""Links and what lies on them as text, and as bytes of rtnetlink."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_interface

import pytest

from kernelstate.linux import link_codec as codec
from kernelstate.linux.rtnetlink import HEADER, Message, attribute, attributes, frames_of
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, FdbEntry, Link, LinkObject, LinkState, Neigh, Route, Uplink, Vxlan
from kernelstate.simulate_links import Leaving, simulate_links
from kernelstate.text.ip_batch import print_links

TUNNEL = Link("flannel.1", 1450, "02:00:00:00:00:01", Vxlan(1, ip_address("192.168.1.1"), "eth0", gbp=True))
TUNNEL6 = Link("flannel-v6.1", 1430, "02:00:00:00:00:06", Vxlan(1, ip_address("fd00:1::1"), "eth0", 4789, learning=True))
NEIGH = Neigh("flannel.1", ip_address("10.244.2.0"), "02:00:00:00:00:02")
NEIGH6 = Neigh("flannel-v6.1", ip_address("fd00:244:2::"), "02:00:00:00:00:02")
FDB = FdbEntry("flannel.1", "02:00:00:00:00:02", ip_address("192.168.1.2"))
ROUTE = Route(Prefix.parse("10.244.2.0/24"), ip_address("10.244.2.0"), "flannel.1", onlink=True)
ROUTE6 = Route(Prefix.parse("fd00:244:2::/64"), ip_address("fd00:1::2"), "eth0", metric=7)
STATE = LinkState.of(
    [
        TUNNEL,
        TUNNEL6,
        Address("flannel.1", ip_address("10.244.1.0"), 32),
        Address("flannel-v6.1", ip_address("fd00:244:1::"), 128),
        NEIGH,
        FDB,
        ROUTE,
        ROUTE6,
    ]
)


def test_text() -> None:
    """The text has one section for each tool and names every attribute."""
    assert print_links(STATE) == (
        "# ip -batch -\n"
        "# sysctl -w net/ipv6/conf/flannel-v6.1/accept_ra=0\n"
        "link add name flannel-v6.1 address 02:00:00:00:00:06 mtu 1430 type vxlan id 1 dev eth0 local fd00:1::1 dstport 4789 learning\n"
        "link set dev flannel-v6.1 alias nodeplane up\n"
        "# sysctl -w net/ipv6/conf/flannel.1/accept_ra=0\n"
        "link add name flannel.1 address 02:00:00:00:00:01 mtu 1450 type vxlan id 1 dev eth0 local 192.168.1.1 "
        "dstport 8472 nolearning gbp\n"
        "link set dev flannel.1 alias nodeplane up\n"
        "address replace fd00:244:1::/128 dev flannel-v6.1 nodad\n"
        "address replace 10.244.1.0/32 dev flannel.1\n"
        "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev flannel.1 nud permanent\n"
        "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto 157\n"
        "route replace fd00:244:2::/64 via fd00:1::2 dev eth0 proto 157 metric 7\n"
        "# bridge -batch -\n"
        "fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.168.1.2 self permanent\n"
    )
    assert print_links(LinkState()) == ""


@pytest.mark.parametrize("obj", [ROUTE, ROUTE6, NEIGH, NEIGH6, FDB, *STATE.addresses, TUNNEL, TUNNEL6], ids=str)
def test_codec_round_trip(obj: LinkObject) -> None:
    """What is written is what would be read, were the kernel to repeat it."""
    name = obj.name if isinstance(obj, Link) else obj.link

    def name_of(index: int) -> str:
        return {5: name, 2: "eth0"}[index]

    read: object
    match obj:
        case Route():
            read = codec.read_route(Message(24, codec.route_request(obj, 5, delete=False).body), name_of)
        case Neigh():
            read = codec.read_neigh(Message(28, codec.neigh_request(obj, 5, delete=False).body), name_of)
        case FdbEntry():
            read = codec.read_neigh(Message(28, codec.fdb_request(obj, 5, delete=False).body), name_of)
        case Address():
            read = codec.read_address(Message(20, codec.address_request(obj, 5, delete=False).body), name_of)
        case Link():
            made = codec.new_link(obj, 2).body
            setting = codec.set_link(obj, Link(obj.name, 0, "", None, alias=""), 5).body
            read = codec.read_link(Message(16, setting + made[codec.IFINFO.size :]), name_of)
    assert read == obj


def test_frames() -> None:
    """Datagrams are cut into messages at their padded lengths, attributes likewise; a broken length ends the reading."""
    bodies = [b"abcd", b"abcdefgh"]
    data = b"".join(HEADER.pack(HEADER.size + len(b), 24, 0, 7, 0) + b for b in bodies)
    assert [body for _, _, _, body in frames_of(data)] == bodies
    assert list(frames_of(HEADER.pack(0, 24, 0, 7, 0))) == []
    assert attributes(b"xxxx" + attribute(1, b"abc") + attribute(2, b""), 4) == {1: b"abc", 2: b""}
    assert attributes(struct.pack("=HH", 0, 1), 0) == {}


def test_simulator_names_the_missing_step() -> None:
    """A packet is lost where a neighbour or a forwarding entry is missing, and the step is named."""
    destination = ip_address("10.244.2.7")
    complete = LinkState.of([TUNNEL, NEIGH, FDB, ROUTE])
    assert simulate_links(complete, destination) == Leaving("flannel.1", ip_address("192.168.1.2"), tunnel=True)
    assert simulate_links(LinkState.of([TUNNEL, NEIGH, ROUTE]), destination).lost == "forwarding entry"  # type: ignore[union-attr]
    assert simulate_links(LinkState.of([TUNNEL, FDB, ROUTE]), destination).lost == "neighbour"  # type: ignore[union-attr]
    assert simulate_links(LinkState.of([TUNNEL, NEIGH, FDB]), destination) is None


def test_simulator_takes_the_longest_prefix() -> None:
    """Of two routes the longer prefix counts, of two equal ones the lower metric."""
    wide = Route(Prefix.parse("10.244.0.0/16"), ip_address("192.168.1.9"), "eth0")
    worse = Route(Prefix.parse("10.244.2.0/24"), ip_address("192.168.1.8"), "eth0", metric=9)
    better = Route(Prefix.parse("10.244.2.0/24"), ip_address("192.168.1.7"), "eth0", metric=3)
    hop = simulate_links(LinkState.of([wide, worse, better]), ip_address("10.244.2.1"))
    assert hop == Leaving("eth0", ip_address("192.168.1.7"), tunnel=False)


def test_uplink() -> None:
    """An uplink knows who is on its segment, in each family by itself."""
    uplink = Uplink("eth0", (ip_interface("192.168.1.1/24"), ip_interface("fd00:1::1/64")))
    on = [uplink.holds_subnet_of(ip_address(a)) for a in ("192.168.1.200", "192.168.2.1", "fd00:1::9", "fd00:2::9")]
    assert on == [True, False, True, False]
    assert (uplink.address(6), uplink.subnets(4)) == (ip_address("fd00:1::1"), "192.168.1.0/24")
    assert Uplink("eth1").subnets(4) == "none"
