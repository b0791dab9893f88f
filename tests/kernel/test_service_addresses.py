"""Service addresses on a link of our own: answered for, kept, and gone again, in real namespaces."""

import select
import socket
import struct
from ipaddress import ip_address

import pytest
from patience import Patience
from pyroute2 import IPRoute

from kernelstate.errors import MissingFeatureError
from kernelstate.linux import netns as namespaces
from kernelstate.linux.links import LinuxLinks
from kernelstate.linux.service_addresses import KINDS, LinuxServiceAddresses
from kernelstate.objects.address import Prefix
from kernelstate.reconcile_addresses import AddressReconciler
from kernelstate.reconcile_links import LinkReconciler

pytestmark = pytest.mark.kernel

V4 = frozenset(Prefix(4, (10 << 24) + (96 << 16) + n, 32) for n in range(1, 41))
V6 = frozenset(Prefix(6, (0xFD96 << 112) + n, 128) for n in range(1, 11))
ALL = V4 | V6


@pytest.fixture
def port(netns):
    """Open the door in a fresh namespace; the test itself stays outside."""
    made = namespaces.call(netns, LinuxServiceAddresses)
    yield made
    made.close()


@pytest.fixture
def neighbour(netns, make_netns):
    """Put a neighbour beside the namespace, whose routes to all service addresses lead there."""
    other = make_netns()
    batch = f"""link add eth0 type veth peer name eth0 netns {other}
        addr add 192.168.1.1/24 dev eth0
        addr add fd00:99::1/64 dev eth0 nodad
        link set eth0 up"""
    namespaces.run(netns, ["ip", "-batch", "-"], stdin=batch)
    batch = """addr add 192.168.1.2/24 dev eth0
        addr add fd00:99::2/64 dev eth0 nodad
        link set eth0 up
        route add 10.96.0.0/16 via 192.168.1.1
        route add fd96::/64 via fd00:99::1"""
    namespaces.run(other, ["ip", "-batch", "-"], stdin=batch)
    return other


def ping(addresses, seconds=5.0):
    """Send an echo request to each address; return those that answered."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as four,
        socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as six,
    ):
        waiting = {a.address_text for a in addresses}
        for text in sorted(waiting):
            v4 = ip_address(text).version == 4
            body = struct.pack("!HH", 77, 1)
            total = (8 << 8) + 77 + 1 if v4 else 0
            echo = struct.pack("!BBH", 8 if v4 else 128, 0, ~total & 0xFFFF) + body
            (four if v4 else six).sendto(echo, (text, 0))
        answered = set()
        limit = Patience(seconds)
        while answered != waiting and not limit.over:
            for sock in select.select([four, six], [], [], 0.2)[0]:
                data, sender = sock.recvfrom(2048)
                if (data[20] == 0) if sock is four else (data[0] == 129):
                    answered.add(sender[0])
        return answered


def carried(netns):
    """Return what pyroute2 sees on the link, as (address, length), link-local ones left out."""

    def look():
        with IPRoute() as ip:
            index = ip.link_lookup(ifname="kube-ipvs0")
            found = [m for f in (socket.AF_INET, socket.AF_INET6) for m in ip.get_addr(family=f, index=index[0])]
            return {(m.get("address"), m["prefixlen"]) for m in found if m["scope"] != 253}

    return namespaces.call(netns, look)


def texts(addresses):
    return {(a.address_text, a.length) for a in addresses}


@pytest.mark.parametrize("kind", KINDS)
def test_each_address_answers(netns, neighbour, kind):
    """Every service address answers a neighbour's ping, on each kind of link that this kernel has, and none after cleanup."""
    port = namespaces.call(netns, LinuxServiceAddresses, kinds=[kind])
    try:
        if not port.has_kind(kind):
            pytest.skip(f"no {kind} links in this kernel")
        reconciler = AddressReconciler(port)
        reconciler.set_desired(ALL)
        assert namespaces.call(netns, reconciler.sync).errors == ()
        assert namespaces.call(neighbour, ping, ALL) == {a.address_text for a in ALL}
        assert carried(netns) == texts(ALL)
        assert namespaces.call(netns, reconciler.cleanup).changed == 1 + len(ALL)
        assert namespaces.call(neighbour, ping, sorted(ALL)[:2], 0.4) == set()
    finally:
        port.close()


def test_no_kind_is_a_missing_feature(netns):
    """Where the kernel has no kind of link that would do, the error names what is missing."""
    port = namespaces.call(netns, LinuxServiceAddresses, kinds=["np-none"])
    try:
        with pytest.raises(MissingFeatureError, match="dummy link is not available here: np-none:"):
            port.create()
    finally:
        port.close()


def test_restart_writes_nothing(netns, port):
    """A second reconciler finds everything as it should be and writes nothing; nor does the first."""
    first = AddressReconciler(port)
    first.set_desired(ALL)
    assert namespaces.call(netns, first.sync).changed == 1 + len(ALL)
    assert not first.drifted()
    second_port = namespaces.call(netns, LinuxServiceAddresses)
    try:
        second = AddressReconciler(second_port)
        second.set_desired(ALL)
        assert namespaces.call(netns, second.sync).changed == 0
        assert not second.dirty
        assert second_port.events() == []
    finally:
        second_port.close()


def test_only_the_change_is_written(netns, port):
    """One address more and one less are two changes, and their own events are no drift."""
    reconciler = AddressReconciler(port)
    reconciler.set_desired(V4)
    namespaces.call(netns, reconciler.sync)
    new, old = Prefix.parse("10.96.1.1"), min(V4)
    reconciler.adjust([new], [old])
    assert namespaces.call(netns, reconciler.sync).changed == 2
    assert not reconciler.drifted()
    assert carried(netns) == texts(V4 - {old} | {new})


@pytest.mark.parametrize(
    ("damage", "changes"),
    [
        (["addr del 10.96.0.7/32 dev kube-ipvs0"], 1),
        (["addr add 10.96.7.7/32 dev kube-ipvs0"], 1),
        (["addr add 10.96.7.7/24 dev kube-ipvs0"], 1),
        (["addr flush dev kube-ipvs0"], len(ALL)),
        (["link del kube-ipvs0"], 1 + len(ALL)),
        (["link set kube-ipvs0 name other0"], 1 + len(ALL)),
        (["link set kube-ipvs0 up", "link set kube-ipvs0 down"], len(V6)),
    ],
)
def test_damage_is_noticed_and_repaired(netns, neighbour, port, damage, changes):
    """What somebody else does to the link is told by events and undone."""
    reconciler = AddressReconciler(port)
    reconciler.set_desired(ALL)
    namespaces.call(netns, reconciler.sync)
    assert not reconciler.drifted()
    for command in damage:
        namespaces.run(netns, ["ip", *command.split()])
    assert reconciler.drifted()
    report = namespaces.call(netns, reconciler.sync)
    assert (report.errors, report.changed) == ((), changes)
    assert carried(netns) == texts(ALL)
    assert namespaces.call(neighbour, ping, ALL) == {a.address_text for a in ALL}
    if reconciler.drifted():  # events of the repair itself
        assert namespaces.call(netns, reconciler.sync).changed == 0
    assert not reconciler.drifted()


def test_link_left_by_kube_proxy_is_adopted(netns, port):
    """A link of that name without our mark keeps its addresses and gets the mark; what is not wanted goes."""
    kind = next(kind for kind in KINDS if port.has_kind(kind))
    batch = f"link add kube-ipvs0 type {kind}\naddr add 10.96.0.1/32 dev kube-ipvs0\naddr add 10.96.9.9/32 dev kube-ipvs0"
    namespaces.run(netns, ["ip", "-batch", "-"], stdin=batch)
    reconciler = AddressReconciler(port)
    assert reconciler.addresses() == {Prefix.parse("10.96.0.1"), Prefix.parse("10.96.9.9")}
    reconciler.set_desired(frozenset({Prefix.parse("10.96.0.1"), Prefix.parse("10.96.0.2")}))
    assert namespaces.call(netns, reconciler.sync).changed == 3  # the mark, one more, one less
    assert carried(netns) == {("10.96.0.1", 32), ("10.96.0.2", 32)}
    assert "alias nodeplane: service addresses" in namespaces.run(netns, ["ip", "link", "show", "kube-ipvs0"])


def test_overlay_leaves_it_alone(netns, port):
    """Whoever looks after overlay links does not take the link for one of its own, nor does its cleanup."""
    reconciler = AddressReconciler(port)
    reconciler.set_desired(V4)
    namespaces.call(netns, reconciler.sync)
    links = namespaces.call(netns, LinuxLinks)
    try:
        assert namespaces.call(netns, LinkReconciler(links).cleanup).changed == 0
    finally:
        links.close()
    assert not reconciler.drifted()
    assert carried(netns) == texts(V4)
