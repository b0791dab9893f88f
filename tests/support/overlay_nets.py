"""Real nodes for the overlay's kernel tests: namespaces on one or two segments, each with a pod address and a reconciler.

    node n1  eth0 --veth-- p1 \
    node n2  eth0 --veth-- p2 -- bridge br1 -- 192.168.1.254, fd00:1::fe \
                                                                            router namespace (forwards)
    node n3  eth0 --veth-- p3 -- bridge br2 -- 192.168.2.254, fd00:2::fe /

A pod is an address of the node's pod network on its loopback: 10.244.N.7 and fd00:244:0:N::7.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from overlay_worlds import compile_nodes, node, snapshot
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from clusterstate.objects import Node
from kernelstate.linux import netns
from kernelstate.linux.links import LinuxLinks, uplink_facts
from kernelstate.objects.links import LinkState
from kernelstate.ports import SyncReport
from kernelstate.reconcile_links import LinkReconciler
from overlay.netconf import NetConf
from overlay.render.hostgw import render_hostgw
from overlay.render.vxlan import render_vxlan
from overlay.table import PeerTable

REPAIR = 5.0
"""Seconds within which somebody else's change must be undone."""


def batch(space: str, lines: str, tool: str = "ip") -> None:
    """Run lines of ``ip`` (or ``bridge``) in a namespace."""
    netns.run(space, [tool, "-batch", "-"], stdin=lines)


def make_router(space: str) -> None:
    """Turn a namespace into the two bridges and the router between them."""
    for i in (1, 2):
        batch(
            space,
            f"""link add br{i} type bridge
            addr add 192.168.{i}.254/24 dev br{i}
            addr add fd00:{i}::fe/64 dev br{i} nodad
            link set br{i} up""",
        )
    netns.run(space, ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])


class OverlayNode:
    """One node: its namespace, what Kubernetes says of it, and the reconciler of its links."""

    def __init__(self, space: str, router: str, number: int, segment: int) -> None:
        self.space, self.number = space, number
        self.ips = {4: f"192.168.{segment}.{number}", 6: f"fd00:{segment}::{number}"}
        self.pods = {4: f"10.244.{number}.7", 6: f"fd00:244:0:{number}::7"}
        self.node: Node = node(f"n{number}", f"10.244.{number}.0/24 fd00:244:0:{number}::/64", " ".join(self.ips.values()))
        batch(
            space,
            f"""link add eth0 type veth peer name p{number} netns {router}
            addr add {self.ips[4]}/24 dev eth0
            addr add {self.ips[6]}/64 dev eth0 nodad
            addr add {self.pods[4]}/32 dev lo
            addr add {self.pods[6]}/128 dev lo nodad
            link set eth0 up
            route add default via 192.168.{segment}.254
            route add default via fd00:{segment}::fe""",
        )
        batch(router, f"link set p{number} master br{segment} up")
        with netns.inside(space):
            self.links = LinuxLinks()
        self.reconciler = LinkReconciler(self.links)

    def compile(self, nodes: list[Node], conf: NetConf) -> PeerTable:
        """Compile what the node would, from the uplink that it finds by its own address."""
        uplink = netns.call(self.space, uplink_facts, "", [ip_address(self.ips[4])])
        assert uplink is not None
        return compile_nodes(snapshot(*nodes), self.node.name, conf, uplink)

    def desire(self, nodes: list[Node], conf: NetConf) -> LinkState:
        """Compile, render, and hand it to the reconciler."""
        table = self.compile(nodes, conf)
        state = render_vxlan(table) if conf.backend.type == "vxlan" else render_hostgw(table)
        self.reconciler.set_desired(state)
        return state

    def sync(self) -> SyncReport:
        """Sync in the node's namespace."""
        with netns.inside(self.space):
            return self.reconciler.sync()

    def observe(self, state: LinkState) -> LinkState:
        """Return what a fresh look at the kernel gives."""
        with netns.inside(self.space):
            fresh = LinuxLinks()
            try:
                return fresh.observe(state.own_links, state.used_links)
            finally:
                fresh.close()

    def drifted(self) -> bool:
        """Ask the reconciler in the node's namespace."""
        with netns.inside(self.space):
            return self.reconciler.drifted()

    def repair(self, damage: str) -> float:
        """Wait until damage is noticed as drift, sync, and return the seconds it took. Fails after ``REPAIR`` seconds."""
        started = time.monotonic()
        while not self.drifted():
            left = started + REPAIR - time.monotonic()
            assert left > 0, f"{damage}: nothing was noticed"
            select.select([self.links], [], [], left)
        report = self.sync()
        assert report.ok, report
        return time.monotonic() - started

    def close(self) -> None:
        """Close the reconciler's sockets."""
        self.links.close()


@contextmanager
def overlay_nodes(make_netns: Callable[[], str], segments: tuple[int, ...]) -> Iterator[list[OverlayNode]]:
    """Make nodes n1, n2, ... on the given segments; their sockets are closed at the end, namespaces are the maker's."""
    router = make_netns()
    make_router(router)
    nodes: list[OverlayNode] = []
    try:
        for number, segment in enumerate(segments, 1):
            nodes.append(OverlayNode(make_netns(), router, number, segment))
        yield nodes
    finally:
        for one in nodes:
            one.close()


def crossing(a: OverlayNode, b: OverlayNode, family: int = 4, attempts: int = 20) -> str:
    """Send UDP from a pod of ``a`` to one of ``b`` and back: ``vxlan`` or ``plain`` as seen on the wire, or ``lost``."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with netns.inside(a.space):
        client = socket.socket(kind, socket.SOCK_DGRAM)
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    with netns.inside(b.space):
        server = socket.socket(kind, socket.SOCK_DGRAM)
    with client, server, wire:
        wire.bind(("eth0", 3))
        wire.settimeout(1.0)
        client.bind((a.pods[family], 0))
        server.bind((b.pods[family], 4000))
        client.settimeout(0.25)
        server.settimeout(0.25)
        for attempt in range(attempts):
            try:
                client.sendto(f"nodeplane {attempt}".encode(), (b.pods[family], 4000))
                data, source = server.recvfrom(100)
                assert source[0] == a.pods[family]
                server.sendto(data, source)
                # Perhaps the answer to an earlier one, that waited for the underlay's neighbours to be found.
                return _seen(wire, client.recv(100))
            except TimeoutError:
                continue
    return "lost"


def _seen(wire: socket.socket, payload: bytes) -> str:
    """Return how the first packet with that payload left."""
    for _ in range(1000):
        frame = wire.recv(65535)
        if payload in frame:
            return "vxlan" if Ether(frame).haslayer(VXLAN) else "plain"
    return "lost"
