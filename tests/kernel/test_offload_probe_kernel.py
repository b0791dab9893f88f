"""Checksums that hardware promises to finish and does not: found out by asking a peer, and set right."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from ipaddress import ip_address
from pathlib import Path

import pytest
from false_hardware import FalseHardware
from overlay_nets import batch, overlay_nodes
from overlay_worlds import NETWORK
from patience import Patience
from udp_nodes import Load, UdpNode, udp_nodes

from kernelstate.linux import ethtool, netns
from kernelstate.linux.offload_probe import End, Verdict, probe
from overlay.netconf import NetConf
from overlay.render.checksums import set_checksums

pytestmark = pytest.mark.kernel

VXLAN = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
MACS = {"a": "02:00:00:00:00:0a", "b": "02:00:00:00:00:0b"}
ENDS = {
    4: {"a": End(MACS["a"], ip_address("10.244.1.0")), "b": End(MACS["b"], ip_address("10.244.2.0"))},
    6: {"a": End(MACS["a"], ip_address("fd00:244:0:1::")), "b": End(MACS["b"], ip_address("fd00:244:0:2::"))},
}


def make_end(space: str, own: str, other: str) -> None:
    """Make one end of a vxlan tunnel over eth0, with the other end known."""
    mine, theirs = (1, 2) if own == "a" else (2, 1)
    batch(
        space,
        f"""addr add 192.168.1.{mine}/24 dev eth0
        link set eth0 up
        link add flannel.1 address {MACS[own]} type vxlan id 1 dev eth0 local 192.168.1.{mine} dstport 8472 nolearning
        link set flannel.1 up
        addr add 10.244.{mine}.0/32 dev flannel.1
        addr add fd00:244:0:{mine}::/128 dev flannel.1 nodad
        neigh add 10.244.{theirs}.0 lladdr {MACS[other]} dev flannel.1 nud permanent
        neigh add fd00:244:0:{theirs}:: lladdr {MACS[other]} dev flannel.1 nud permanent
        route add 10.244.{theirs}.0/24 via 10.244.{theirs}.0 dev flannel.1 onlink
        route add fd00:244:0:{theirs}::/64 via fd00:244:0:{theirs}:: dev flannel.1 onlink""",
    )
    batch(space, f"fdb add {MACS[other]} dev flannel.1 dst 192.168.1.{theirs} self permanent", "bridge")


@pytest.fixture
def tunnel(make_netns: Callable[[], str]) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Return two ends of a tunnel over a wire that is right, and what puts the false hardware onto it."""
    a, b, wire = make_netns(), make_netns(), make_netns()
    for space, port in ((a, "pa"), (b, "pb")):
        batch(space, f"link add eth0 type veth peer name {port} netns {wire}")
        batch(wire, f"link set {port} up")
    batch(wire, "link add br0 type bridge\nlink set br0 up\nlink set pa master br0\nlink set pb master br0")
    make_end(a, "a", "b")
    make_end(b, "b", "a")
    with ExitStack() as undo:

        def spoil() -> None:
            batch(wire, "link set pa nomaster\nlink set pb nomaster")
            undo.callback(FalseHardware(wire, ("pa", "pb")).close)

        yield a, b, spoil


def verdict(space: str, family: int) -> Verdict:
    return netns.call(space, probe, "flannel.1", ENDS[family]["a"], ENDS[family]["b"])


def connects(a: str, b: str) -> bool:
    """Whether the first packets of a connection get through the tunnel within two seconds."""
    with netns.inside(b):
        listener = socket.create_server(("10.244.2.0", 0))
    with listener, netns.inside(a):
        try:
            socket.create_connection(listener.getsockname(), timeout=2).close()
        except TimeoutError:
            return False
    return True


def test_right_hardware_is_good(tunnel) -> None:
    """On a wire that finishes or carries checksums as promised the verdict is good, in both families."""
    a, b, _ = tunnel
    assert connects(a, b)
    assert [verdict(a, family) for family in (4, 6)] == ["good", "good"]


def test_false_hardware_is_found_and_worked_around(tunnel) -> None:
    """Where connections hang the verdict is bad; with tx-checksum off on the tunnel's ends they do not, and it is good."""
    a, b, spoil = tunnel
    spoil()
    assert not connects(a, b)
    assert [verdict(a, family) for family in (4, 6)] == ["bad", "bad"]
    for space in (a, b):
        netns.call(space, ethtool.switch, "flannel.1", ethtool.SET_TX_CHECKSUM, on=False)
        assert netns.call(space, ethtool.tx_checksum, "flannel.1") is False
    assert connects(a, b)
    assert verdict(a, 4) == "good"


def test_silence_is_no_verdict(tunnel) -> None:
    """A peer that refuses nothing, because it drops or is away, proves nothing about checksums."""
    a, b, _ = tunnel
    netns.run(b, ["ip", "link", "set", "flannel.1", "down"])
    assert verdict(a, 4) == "unknown"


def test_agents_find_it_and_set_it_right(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """On false hardware pods of two nodes cannot connect, until the agents have found out why; then they can."""
    with udp_nodes(make_netns, tmp_path, tmp_path / "none", 2, VXLAN) as nodes, ExitStack() as undo:
        a, b = nodes
        batch(a.bridge, "link set p1 nomaster\nlink set p2 nomaster")
        undo.callback(FalseHardware(a.bridge, ("p1", "p2")).close)
        for node in nodes:
            netns.call(node.space, ethtool.switch, "eth0", ethtool.SET_TX_CHECKSUM, on=True)
            node.agent.start()
        assert all(found_out(node) for node in nodes)
        with closing(Load(a, b)) as load:
            load.run(0.2)
            assert load.received > 0


def found_out(node: UdpNode) -> bool:
    """Wait until a node's agent says that it finishes the tunnel's checksums."""
    limit = Patience(20)
    while not limit.over:
        status = node.agent.read()
        if status is not None and status.finished:
            return status.finished == ("flannel.1",) and netns.call(node.space, ethtool.tx_checksum, "flannel.1") is False
        select.select([], [], [], 0.05)
    return False


def test_off_is_kept_off(make_netns: Callable[[], str]) -> None:
    """A tunnel's checksums that somebody leaves to the hardware again, or whose link is made anew, are off within seconds."""
    with overlay_nodes(make_netns, (1, 1)) as nodes:
        one = nodes[0]
        one.reconciler.set_desired(set_checksums(one.desire([n.node for n in nodes], NetConf(NETWORK)), "off", []))
        assert one.sync().ok
        for damage in ("switch", "ip link del flannel.1"):
            assert netns.call(one.space, ethtool.tx_checksum, "flannel.1") is False
            one.drifted()  # takes in what came of our own changes
            assert one.sync().changed == 0
            assert not one.drifted()
            if damage == "switch":
                netns.call(one.space, ethtool.switch, "flannel.1", ethtool.SET_TX_CHECKSUM, on=True)
            else:
                netns.run(one.space, damage.split())
            assert one.repair(damage) < 5
        assert netns.call(one.space, ethtool.tx_checksum, "flannel.1") is False
