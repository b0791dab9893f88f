"""Links and what lies on them in a real kernel: written, read back by us and by pyroute2, adopted, refused, told of."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from pyroute2.iproute.linux import IPRoute

from kernelstate.diff_links import LinkChange
from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns as namespaces
from kernelstate.linux.link_events import LinkEvents
from kernelstate.linux.links import LinuxLinks, uplink_facts
from kernelstate.linux.rtnetlink import RouteSocket
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, FdbEntry, Link, LinkObject, LinkState, Neigh, Route, Vxlan
from kernelstate.reconcile_links import LinkReconciler
from kernelstate.text.ip_batch import BRIDGE_HEADER, print_links

pytestmark = pytest.mark.kernel

TUNNEL = Link("flannel.1", 1450, "02:00:00:00:00:01", Vxlan(1, ip_address("192.168.1.1"), "eth0"))
TUNNEL6 = Link(
    "flannel-v6.1", 1430, "02:00:00:00:00:06", Vxlan(1, ip_address("fd00:1::1"), "eth0", 4789, learning=True, gbp=True)
)
# Without a link-local address of its own the link is quiet once it is up: no duplicate detection that ends a second later.
UNDERLAY = """link add eth0 type veth peer name p0
link set eth0 addrgenmode none
link set p0 addrgenmode none
addr add 192.168.1.1/24 dev eth0
addr add fd00:1::1/64 dev eth0 nodad
link set p0 up
link set eth0 up
"""


def peers(count: int) -> list[LinkObject]:
    found: list[LinkObject] = []
    for i in range(1, count + 1):
        gateway, mac = ip_address("10.0.0.0") + 256 * i, f"02:00:00:01:{i >> 8:02x}:{i & 255:02x}"
        outer = ip_address("192.168.1.0") + i % 250 + 2
        found += [Neigh("flannel.1", gateway, mac), FdbEntry("flannel.1", mac, outer)]
        found.append(Route(Prefix.parse(f"{gateway}/24"), gateway, "flannel.1", onlink=True))
    return found


STATE = LinkState.of(
    [
        TUNNEL,
        TUNNEL6,
        Address("flannel.1", ip_address("10.0.0.0"), 32),
        Address("flannel-v6.1", ip_address("fd00:244::"), 128),
        *peers(2),
        Neigh("flannel-v6.1", ip_address("fd00:244:2::"), "02:00:00:00:06:02"),
        FdbEntry("flannel-v6.1", "02:00:00:00:06:02", ip_address("fd00:1::2")),
        Route(Prefix.parse("fd00:244:2::/64"), ip_address("fd00:244:2::"), "flannel-v6.1", onlink=True),
        Route(Prefix.parse("fd00:244:3::/64"), ip_address("fd00:1::3"), "eth0", metric=7),
        Route(Prefix.parse("10.9.0.0/24"), ip_address("192.168.1.9"), "eth0", metric=5),
    ]
)


@pytest.fixture
def links(in_netns: str) -> Iterator[LinuxLinks]:
    """Run the test inside a namespace with an underlay ``eth0``."""
    namespaces.run(in_netns, ["ip", "-batch", "-"], stdin=UNDERLAY)
    with closing(LinuxLinks()) as found:
        yield found


def test_written_and_read_back(links: LinuxLinks) -> None:
    """What was made is read back equal by a fresh look, and its removal leaves nothing of ours."""
    reconciler = LinkReconciler(links)
    reconciler.set_desired(STATE)
    assert reconciler.sync().errors == ()
    assert links.observe(STATE.own_links, STATE.used_links) == STATE
    assert reconciler.cleanup().ok
    assert links.observe(STATE.own_links, STATE.used_links) == LinkState()


def test_pyroute2_reads_the_same(links: LinuxLinks) -> None:
    """pyroute2, which decodes rtnetlink by itself, sees the links, entries and routes that we mean."""
    assert links.apply([LinkChange("create" if isinstance(o, Link) else "replace", o) for o in STATE.objects()]) == [""] * len(
        STATE.objects()
    )
    with IPRoute() as ipr:
        seen = {m.get("ifname"): m for m in ipr.get_links()}
        routes = [m for f in (socket.AF_INET, socket.AF_INET6) for m in ipr.get_routes(family=f, proto=157)]
        index = seen["flannel.1"]["index"]
        neighbours = list(ipr.get_neighbours(family=socket.AF_INET, ifindex=index))
        entries = list(ipr.get_neighbours(family=socket.AF_BRIDGE, ifindex=index))
    tunnel = seen["flannel.1"]
    data = tunnel.get_nested("linkinfo", "data")
    assert (tunnel.get("mtu"), tunnel.get("address"), tunnel.get("IFLA_IFALIAS")) == (1450, TUNNEL.mac, "nodeplane")
    assert (data.get("vxlan_id"), data.get("vxlan_port"), data.get("vxlan_local"), data.get("vxlan_learning")) == (
        1,
        8472,
        "192.168.1.1",
        0,
    )
    assert data.get("vxlan_link") == seen["eth0"]["index"]
    assert sorted((m.get("dst"), m["dst_len"], m.get("gateway"), m.get("oif"), m.get("priority")) for m in routes) == sorted(
        (
            r.destination.address_text,
            r.destination.length,
            str(r.via),
            seen[r.link]["index"],
            r.metric or (1024 if r.destination.family == 6 else None),
        )
        for r in STATE.routes
    )
    assert {(m.get("dst"), m.get("lladdr"), m["state"]) for m in neighbours} == {
        (str(n.address), n.mac, 128) for n in STATE.neighbours if n.link == "flannel.1"
    }
    assert {(m.get("lladdr"), m.get("dst"), m["state"], m["flags"]) for m in entries} == {
        (e.mac, str(e.destination), 128, 2) for e in STATE.fdb if e.link == "flannel.1"
    }


def test_text_makes_the_same(in_netns: str, links: LinuxLinks) -> None:
    """The printed batch, given to ip and bridge, makes exactly the state it was printed from."""
    ip, _, bridge = print_links(STATE).partition(BRIDGE_HEADER)
    for line in ip.splitlines():
        if line.startswith("# sysctl"):  # after the link is there
            continue
        namespaces.run(in_netns, ["ip", "-batch", "-"], stdin=line)
    for name in STATE.own_links:
        namespaces.run(in_netns, ["sysctl", "-qw", f"net/ipv6/conf/{name}/accept_ra=0"])
    namespaces.run(in_netns, ["bridge", "-batch", "-"], stdin=bridge)
    assert links.observe(STATE.own_links, STATE.used_links) == STATE


def test_adopts_what_flanneld_left(in_netns: str, links: LinuxLinks) -> None:
    """Flanneld's link and routes become ours in place: same link, no moment without a route."""
    wanted = LinkState.of([TUNNEL, Address("flannel.1", ip_address("10.0.0.0"), 32), *peers(1)])
    namespaces.run(
        in_netns,
        ["ip", "-batch", "-"],
        stdin="""link add flannel.1 address 02:00:00:00:00:01 mtu 1450 type vxlan id 1 dev eth0 local 192.168.1.1 dstport 8472 nolearning
        addr add 10.0.0.0/32 dev flannel.1
        link set flannel.1 up
        neigh replace 10.0.1.0 lladdr 02:00:00:01:00:01 dev flannel.1 nud permanent
        route replace 10.0.1.0/24 via 10.0.1.0 dev flannel.1 onlink
        """,
    )
    namespaces.run(in_netns, ["bridge", "-batch", "-"], stdin="fdb add 02:00:00:01:00:01 dev flannel.1 dst 192.168.1.3\n")
    before = socket.if_nametoindex("flannel.1")
    reconciler = LinkReconciler(links)
    reconciler.set_desired(wanted)
    report = reconciler.sync()
    assert (report.errors, report.changed) == ((), 2)  # the link's marks, the route's protocol
    assert links.observe(wanted.own_links, wanted.used_links) == wanted
    assert socket.if_nametoindex("flannel.1") == before


@pytest.mark.parametrize(
    "kind",
    [
        "type vxlan id 2 dev eth0 dstport 8472",
        "type vxlan id 1 dev eth0 local 192.168.1.1 dstport 4789 nolearning",
        "type bridge",
    ],
)
def test_other_link_of_the_name(in_netns: str, links: LinuxLinks, kind: str) -> None:
    """A link of our name that is made otherwise is replaced."""
    namespaces.run(in_netns, ["ip", "link", "add", "flannel.1", *kind.split()])
    wanted = LinkState.of([TUNNEL])
    reconciler = LinkReconciler(links)
    reconciler.set_desired(wanted)
    assert reconciler.sync().errors == ()
    assert links.observe(wanted.own_links, wanted.used_links) == wanted


def test_refusals_name_object_and_words(links: LinuxLinks) -> None:
    """The kernel's own words come with each refusal, and everything else is done."""
    unreachable = Route(Prefix.parse("10.77.0.0/24"), ip_address("203.0.113.1"), "eth0")
    nowhere = msgspec.structs.replace(TUNNEL, name="flannel.2", kind=Vxlan(2, None, "eth9"))
    wanted = LinkState.of([*STATE.objects(), unreachable, nowhere])
    reconciler = LinkReconciler(links)
    reconciler.set_desired(wanted)
    report = reconciler.sync()
    assert report.errors == (
        f"create link {nowhere}: no link eth9 to carry it",
        "replace route 10.77.0.0/24 via 203.0.113.1 dev eth0 proto 157: Network is unreachable: Nexthop has invalid gateway",
    )
    assert links.observe(STATE.own_links, STATE.used_links) == STATE
    assert reconciler.dirty


def test_deleting_what_is_gone_is_success(links: LinuxLinks) -> None:
    """Deleting is idempotent for each kind, with and without its link; a link that exists cannot be made again."""
    reconciler = LinkReconciler(links)
    reconciler.set_desired(STATE)
    assert reconciler.sync().ok
    deletions = [LinkChange("delete", o) for o in reversed(STATE.objects())]
    assert links.apply(deletions) == [""] * len(deletions)
    assert links.apply(deletions) == [""] * len(deletions)
    assert links.apply([LinkChange("create", TUNNEL)]) == [""]
    assert links.apply([LinkChange("delete", o) for o in peers(2)]) == [""] * 6
    assert links.apply([LinkChange("create", TUNNEL)])[0].startswith("File exists")


def test_foreign_route_of_the_same_network_stays(in_netns: str, links: LinuxLinks) -> None:
    """A route of somebody else to the same network with another metric is neither taken over nor deleted with ours."""
    namespaces.run(in_netns, ["ip", "route", "add", "10.9.0.0/24", "via", "192.168.1.99", "metric", "50"])
    ours = STATE.routes[-1] if STATE.routes[-1].metric == 5 else next(r for r in STATE.routes if r.metric == 5)
    assert links.apply([LinkChange("replace", ours), LinkChange("delete", ours)]) == ["", ""]
    assert "10.9.0.0/24 via 192.168.1.99 dev eth0 metric 50" in namespaces.run(in_netns, ["ip", "route"])


def test_accept_ra_is_off(links: LinuxLinks) -> None:
    """The link does not believe router advertisements from the tunnel, and that is part of what is observed."""
    reconciler = LinkReconciler(links)
    reconciler.set_desired(LinkState.of([TUNNEL]))
    assert reconciler.sync().ok
    file = Path("/proc/sys/net/ipv6/conf/flannel.1/accept_ra")
    assert file.read_text().strip() == "0"
    file.write_text("1")
    assert links.observe(["flannel.1"], []).links == (msgspec.structs.replace(TUNNEL, accept_ra=True),)


def test_own_changes_are_no_drift(links: LinuxLinks) -> None:
    """After a sync our own events settle: at most one look again, then nothing."""
    reconciler = LinkReconciler(links)
    reconciler.set_desired(STATE)
    assert reconciler.sync().ok
    reconciler.drifted()
    assert reconciler.sync().changed == 0
    assert not reconciler.drifted()
    reconciler.set_desired(LinkState.of([o for o in STATE.objects() if o not in peers(1)]))
    assert reconciler.sync().changed == 3
    assert not reconciler.drifted()


def test_others_changes_are_no_drift(in_netns: str, links: LinuxLinks) -> None:
    """Links, addresses, neighbours and routes of others come and go without a look at ours."""
    reconciler = LinkReconciler(links)
    reconciler.set_desired(STATE)
    assert reconciler.sync().ok
    reconciler.drifted()
    assert reconciler.sync().ok
    namespaces.run(
        in_netns,
        ["ip", "-batch", "-"],
        stdin="""link add v0 type veth peer name v1
        addr add 10.9.9.9/24 dev v0
        link set v0 up
        neigh add 10.9.9.10 lladdr 02:00:00:00:00:77 dev v0 nud permanent
        neigh add 192.168.1.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent
        addr add 192.168.1.200/24 dev eth0
        route add 10.66.0.0/16 via 192.168.1.66
        route del 10.66.0.0/16
        link del v0
        """,
    )
    assert select.select([links], [], [], 0)[0]
    assert not reconciler.drifted()


def test_overflow_is_told(in_netns: str, links: LinuxLinks) -> None:
    """When events were lost the answer is that they were, once; afterwards events come as ever."""
    links.observe(["flannel.1"], ["eth0"])
    links._events._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    lines = "".join(f"route add 10.{i >> 8}.{i & 255}.0/24 via 192.168.1.9\n" for i in range(300))
    namespaces.run(in_netns, ["ip", "-batch", "-"], stdin=lines)
    assert links.events() is None
    assert links.events() == []
    namespaces.run(in_netns, ["ip", "route", "del", "10.0.0.0/24"])
    assert [(e.gone, e.obj.destination) for e in links.events() or [] if isinstance(e.obj, Route)] == [
        (True, Prefix.parse("10.0.0.0/24"))
    ]


def test_host_events(in_netns: str, links: LinuxLinks) -> None:
    """The node's own changes of addresses and links wake whoever waits; routes and neighbours do not."""
    with closing(LinkEvents()) as events:

        def woken_by_a_route(number: int) -> bool:
            namespaces.run(in_netns, ["ip", "route", "add", f"10.66.{number}.0/24", "via", "192.168.1.66"])
            mac = f"02:00:00:00:00:{number:02x}"
            namespaces.run(in_netns, ["ip", "neigh", "add", f"192.168.1.{number}", "lladdr", mac, "dev", "eth0"])
            return events.drain()

        # The kernel tells at its leisure of a link that has come up, which may fall into one of these rounds; never into all.
        assert not all(woken_by_a_route(number) for number in range(70, 75))
        events.drain()
        namespaces.run(in_netns, ["ip", "addr", "add", "192.168.1.200/24", "dev", "eth0"])
        assert select.select([events], [], [], 5)[0]
        assert events.drain()
        assert not events.drain()


def test_uplink(in_netns: str, links: LinuxLinks) -> None:
    """The uplink is the named one, else the one with the node's address, else the default route's, else none."""
    namespaces.run(
        in_netns,
        ["ip", "-batch", "-"],
        stdin="link add eth1 mtu 9000 type veth peer name p1\naddr add 10.5.0.1/16 dev eth1\nlink set eth1 up\nlink set p1 up\n",
    )
    told = uplink_facts("eth0")
    assert told is not None
    assert ([str(a) for a in told.addresses], told.mtu) == (["192.168.1.1/24", "fd00:1::1/64"], 1500)
    assert uplink_facts("10.5.0.1") == uplink_facts("eth1")
    assert uplink_facts("", [ip_address("172.16.0.1"), ip_address("fd00:1::1")]) == told
    assert (uplink_facts("eth7"), uplink_facts("", [ip_address("172.16.0.1")])) == (None, None)
    namespaces.run(in_netns, ["ip", "route", "add", "default", "via", "10.5.0.254"])
    found = uplink_facts("")
    assert found is not None
    assert (found.name, found.mtu) == ("eth1", 9000)


def test_thousand_peers(links: LinuxLinks) -> None:
    """A thousand peers are made in batches, read back equal, and found as they should be after a restart."""
    wanted = LinkState.of([TUNNEL, Address("flannel.1", ip_address("10.0.0.0"), 32), *peers(1000)])
    reconciler = LinkReconciler(links)
    reconciler.set_desired(wanted)
    assert reconciler.sync().changed == 3002
    assert links.observe(wanted.own_links, wanted.used_links) == wanted
    again = LinkReconciler(links)
    again.set_desired(wanted)
    assert again.sync().changed == 0


def test_dump_errors_are_told(in_netns: str) -> None:
    """A dump that the kernel refuses is an error with operation, object and the kernel's words."""
    with (
        closing(RouteSocket()) as sock,
        pytest.raises(KernelRefusedError, match=r"dump things: Operation not supported|dump things: "),
    ):
        sock.dump(98, b"\0" * 16, "things")
