"""The UDP tunnel and the source guard in the kernel: pods of real namespaces talk through them, whatever happens to the agent."""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from bpf_nodes import (
    OBJECTS,
    PORT,
    Numbered,
    Programs,
    echo_datagrams,
    echo_stream,
    guard_of,
    is_silent,
    make_flannel0,
    peer_entries,
    ping,
    set_gro,
    set_offloads,
    tunnel_of,
)
from overlay_nets import batch
from scapy.layers.inet import ICMP, IP
from scapy.packet import Raw
from udp_nodes import UdpNode, built_program, udp_nodes, write_program

from kernelstate.linux import merge_pair, netns
from kernelstate.linux.bpf_attach import Attacher, Clsact, Hook, Tcx, attacher
from kernelstate.linux.bpf_tunnel import DECAP, ENCAP, _possible_hooks
from kernelstate.objects.tunnel import TunnelPeer
from kernelstate.reconcile_forwarder import ForwarderReconciler

pytestmark = pytest.mark.kernel

WAYS: dict[str, Callable[[], Attacher]] = {"tcx": Tcx, "clsact": Clsact}
SIZES = [1, 2, 17, 64, 255, 256, 513, 1000, 1400]


@pytest.fixture
def nodes(make_netns: Callable[[], str], tmp_path: Path) -> Iterator[list[UdpNode]]:
    """Three nodes with flannel0, and no programs yet."""
    with udp_nodes(make_netns, tmp_path, write_program(tmp_path / "forwarder"), 3) as made:
        for node in made:
            make_flannel0(node)
        yield made


@pytest.fixture
def programmed(nodes: list[UdpNode]) -> Iterator[list[Programs]]:
    """Yield two of them with the programs."""
    with ExitStack() as undo:
        yield [put_on(undo, node) for node in nodes[:2]]


def put_on(undo: ExitStack, node: UdpNode, attach: Attacher | None = None) -> Programs:
    """Put the programs on a node of two."""
    programs = Programs(node, attach)
    undo.callback(programs.port.close)
    programs.want(tunnel_of(node, [3 - node.number]))
    return programs


def talk(a: UdpNode, b: UdpNode, family: int, size: int = 3 << 20) -> None:
    """Assert that pods ping each other, and that a stream and datagrams come back as they were sent."""
    rng = random.Random(4)
    assert ping(a, b, family)
    assert ping(b, a, family)
    data = rng.randbytes(size)
    assert echo_stream(a, b, data, family) == data
    payloads = [rng.randbytes(n) for n in SIZES]
    assert echo_datagrams(b, a, payloads, family) == payloads


@pytest.mark.parametrize("underlay", ["finishes", "passes on", "passes on, to links without"])
@pytest.mark.parametrize("family", [4, 6])
def test_pods_talk(programmed: list[Programs], underlay: str, family: int) -> None:
    """TCP, UDP and ping pass both ways, whether links finish checksums and cut packets or pass them on, without a forwarder."""
    for one in programmed:
        set_offloads(one.node.space, "eth0", on=underlay != "finishes")
        set_gro(one.node.space, "eth0")
        if underlay.endswith("without"):
            set_offloads(one.node.space, "pod", on=False)  # what came in whole is cut behind the tunnel
        one.sync()
    a, b = programmed
    talk(a.node, b.node, family)
    for one in programmed:
        counters = one.counters()
        assert counters.keys() <= {"sent_packets", "sent_bytes", "received_packets", "received_bytes", "passed_out"}
        assert counters["sent_bytes"] > 3 << 20
        assert counters["received_bytes"] > 3 << 20
    merged = netns.run(b.node.space, ["cat", "/proc/net/dev"]).split("flannel0-in:")[1].split()[1]
    assert (int(merged) > 1000) == (underlay == "finishes")  # where packets pass whole there is nothing to merge


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_to_attach(nodes: list[UdpNode], way: str) -> None:
    """The programs work by either way to attach them, next to somebody else's, and cleanup leaves nothing of ours."""
    if way == "tcx" and not isinstance(attacher(), Tcx):
        pytest.skip("the kernel has no tcx")
    with ExitStack() as undo:
        programmed = [put_on(undo, node, WAYS[way]()) for node in nodes[:2]]
        for one in programmed:
            one.want(tunnel_of(one.node, [3 - one.node.number]), guard_of(one.node, [3 - one.node.number]))
        talk(nodes[0], nodes[1], 4, 1 << 19)
        netns.run(nodes[0].space, ["tc", "qdisc", "replace", "dev", "eth0", "clsact"])
        theirs = ["tc", "filter", "add", "dev", "eth0", "egress", "prio", "9", "matchall", "action", "gact", "ok"]
        has_actions = "RTNETLINK" not in netns.run(nodes[0].space, theirs, check=False)
        for one in programmed:
            with netns.inside(one.node.space):
                assert one.reconciler.cleanup().ok
                for kind in ("udp", "guard"):
                    assert not [hook for hook in _possible_hooks(kind) if WAYS[way]().find(hook)]
                assert merge_pair.find("flannel0") == (0, 0)
        assert "clsact" not in netns.run(nodes[1].space, ["tc", "qdisc", "show"])
        if way == "clsact" and not has_actions:
            assert "clsact" not in netns.run(nodes[0].space, ["tc", "qdisc", "show"])
        assert is_silent(nodes[0], nodes[1])


@pytest.mark.parametrize("program", [write_program, built_program])
@pytest.mark.parametrize("family", [4, 6])
def test_peers_in_user_space(nodes: list[UdpNode], tmp_path: Path, program: Callable[[Path], Path], family: int) -> None:
    """Pods behind a forwarder, flannel's kind or ours, talk to pods behind the programs, over links that finish no checksum.

    What the programs cannot finish, or cannot unwrap, goes through the forwarder on their node.
    """
    program(tmp_path / "forwarder")
    ours, plain = nodes[:2]
    with ExitStack() as undo:
        for node in (ours, plain):
            set_offloads(node.space, "eth0", on=True)
        programs = put_on(undo, ours)
        for node in (ours, plain):
            forwarder = ForwarderReconciler(node.forwarder)
            forwarder.set_desired(tunnel_of(node, [3 - node.number]))
            with netns.inside(node.space):
                assert forwarder.sync().ok
        talk(ours, plain, family, 1 << 19)
        talk(plain, ours, family, 1 << 19)
        counters = programs.counters()
    assert counters["unfinished"] > 20
    assert counters["sent_packets"] > 4 * len(SIZES)
    assert counters["received_packets"] > 4 * len(SIZES)
    assert not counters.keys() & {"malformed", "wrong_source", "unknown_peer", "send_errors"}


def test_next_hop(programmed: list[Programs]) -> None:
    """A peer whose outer address is behind a router is reached by way of it."""
    a, b = programmed
    far = ip_address("172.16.0.2")
    batch(b.node.space, f"addr add {far}/32 dev eth0")
    batch(a.node.space, f"route add {far} via 192.168.1.2")
    a.want(msgspec.structs.replace(tunnel_of(a.node, [2]), peers=(TunnelPeer(peer_entries(2)[0].prefix, far),)))
    b.want(msgspec.structs.replace(tunnel_of(b.node, [1]), local=(far,)))
    assert ping(a.node, b.node)


def send(node: UdpNode, data: bytes, to: UdpNode) -> None:
    """Send one datagram to a node's end of the tunnel, from a port of no importance."""
    with netns.inside(node.space), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, (f"192.168.1.{to.number}", PORT))


def test_spoofing(programmed: list[Programs], nodes: list[UdpNode]) -> None:
    """Strangers, inner sources of other nodes, rubbish and looping packets are counted and do not come in; peers still do."""
    a, b = programmed
    right = bytes(IP(src=b.node.pods[4], dst=a.node.pods[4]) / ICMP() / Raw(bytes(30)))
    lies = bytes(IP(src="10.244.3.7", dst=a.node.pods[4]) / ICMP())
    own = bytes(IP(src="10.244.1.9", dst=a.node.pods[4]) / ICMP())
    looping = bytes(IP(src=b.node.pods[4], dst=a.node.pods[4], ttl=1) / ICMP())
    send(nodes[2], right, a.node)
    for data in (lies, own, right[:-1], right[:15], b"", looping, random.Random(5).randbytes(600), right):
        send(b.node, data, a.node)
    assert a.counters() == {
        "unknown_peer": 1,
        "wrong_source": 2,
        "malformed": 4,
        "passed_in": 1,
        "received_packets": 1,
        "received_bytes": len(right),
        **{name: value for name, value in a.counters().items() if name.startswith(("sent_", "passed_out"))},
    }
    assert ping(a.node, b.node)


def test_guard_lets_peers_in(nodes: list[UdpNode]) -> None:
    """With the guard on, pods talk through VXLAN between peers; an inner source of a third node is dropped and counted."""
    with ExitStack() as undo:
        guards = []
        for node in nodes[:2]:
            other = 3 - node.number
            batch(
                node.space,
                f"""link del flannel0
                link add flannel.1 address 02:00:00:00:00:0{node.number} type vxlan id 1 dstport 8472 dev eth0 nolearning
                addr add 10.244.{node.number}.0/32 dev flannel.1
                link set flannel.1 up mtu 1450
                neigh add 10.244.{other}.0 lladdr 02:00:00:00:00:0{other} dev flannel.1 nud permanent
                route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink""",
            )
            batch(
                node.space, f"fdb add 02:00:00:00:00:0{other} dev flannel.1 dst 192.168.1.{other} self permanent", tool="bridge"
            )
            guard = Programs(node)
            undo.callback(guard.port.close)
            guard.want(None, guard_of(node, [other]))
            guards.append(guard)
        a, b = guards
        assert ping(a.node, b.node)
        data = random.Random(6).randbytes(1 << 20)
        assert echo_stream(a.node, b.node, data) == data
        assert a.counters("guard").keys() == {"checked"}
        batch(b.node.space, "addr add 10.244.3.1/32 dev lo")
        netns.run(b.node.space, ["ping", "-c", "1", "-W", "1", "-I", "10.244.3.1", a.node.pods[4]], check=False)
        assert a.counters("guard")["vxlan_wrong_source"] == 1
        batch(b.node.space, "addr add 10.244.1.99/32 dev lo")
        netns.run(b.node.space, ["ping", "-c", "1", "-W", "1", "-I", "10.244.1.99", "192.168.1.1"], check=False)
        assert a.counters("guard")["plain_own_source"] == 1


# -- what happens to agents, and what others do ------------------------------------------------------------------------


def test_restart_and_upgrade_lose_nothing(programmed: list[Programs], tmp_path: Path) -> None:
    """While agents end, start again, and bring another build of the programs, not one packet is lost."""
    a, b = programmed
    other_build = tmp_path / "another"
    shutil.copytree(OBJECTS, other_build)
    for file in other_build.glob("*.o"):
        file.write_bytes(file.read_bytes() + b"another")
    with Numbered(a.node, b.node) as traffic, ExitStack() as undo:
        for _ in range(3):
            for objects, changed in ((OBJECTS, 0), (other_build, 1), (other_build, 0), (OBJECTS, 1)):
                for one in programmed:
                    one.port.close()
                    later = Programs(one.node, objects=objects)
                    undo.callback(later.port.close)
                    assert later.want(tunnel_of(one.node, [3 - one.node.number])) == changed
                    later.port.close()
    assert traffic.sent > 1000
    assert traffic.missing() == 0


def test_peers_come_and_go(programmed: list[Programs], nodes: list[UdpNode]) -> None:
    """A peer that leaves is cut off, one that comes back is reached; each is an entry or two, and the other peers' stay."""
    a, b = programmed
    assert ping(a.node, b.node)
    before = a.port._held["udp"].programs[ENCAP].number
    assert a.want(tunnel_of(a.node, [3])) == 8
    assert is_silent(a.node, b.node)
    assert a.want(tunnel_of(a.node, [2, 3])) == 4
    assert ping(a.node, b.node)
    assert a.port._held["udp"].programs[ENCAP].number == before
    assert not a.drifted()


def off_the_link(one: Programs) -> None:
    with netns.inside(one.node.space):
        assert one.port._attach.detach(Hook(DECAP, socket.if_nametoindex("eth0"), "ingress"))


def into_places(one: Programs) -> None:
    places = one.port._held["udp"].maps["places"]
    places.remove(places.dump())


def into_nodes(one: Programs) -> None:
    nodes = one.port._held["udp"].maps["nodes"]
    nodes.remove(nodes.dump())


def into_settings(one: Programs) -> None:
    settings = one.port._held["udp"].maps["settings"]
    settings[bytes(4)] = bytes(settings.value_size)


def the_pair(one: Programs) -> None:
    batch(one.node.space, "link del flannel0-in")


def the_tun(one: Programs) -> None:
    batch(one.node.space, "link del flannel0")
    assert one.drifted()
    with netns.inside(one.node.space):
        report = one.reconciler.sync()
    assert "find link flannel0" in report.errors[0]
    make_flannel0(one.node)


@pytest.mark.parametrize("deed", [off_the_link, into_places, into_nodes, into_settings, the_pair, the_tun])
def test_repairs(programmed: list[Programs], deed: Callable[[Programs], None]) -> None:
    """Programs, entries and links that somebody else removes are noticed, and the next sync repairs them."""
    a, b = programmed
    assert ping(a.node, b.node)
    assert not a.drifted()
    deed(a)
    assert a.drifted()
    assert a.sync() > 0
    assert not a.drifted()
    talk(a.node, b.node, 4, 1 << 18)
    assert a.sync() == 0


def test_uplink_moves(programmed: list[Programs]) -> None:
    """When the uplink is another link, the programs are there, and not at the old one any more."""
    a, _ = programmed
    batch(a.node.space, "link add eth1 type veth peer name eth1-far\nlink set eth1 up")
    a.want(msgspec.structs.replace(tunnel_of(a.node, [2]), uplink="eth1"))
    with netns.inside(a.node.space):
        at = {link: a.port._attach.find(Hook(DECAP, socket.if_nametoindex(link), "ingress")) for link in ("eth0", "eth1")}
    assert [link for link, program in at.items() if program is not None] == ["eth1"]
    at["eth1"].close()
