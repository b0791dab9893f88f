"""The ways between two nodes that are measured, and how each is programmed: ours by nodeplane's own parts, as its agent has them.

    routing            routes typed in by hand: what Linux does without an overlay
    host-gw, vxlan     peer table -> overlay.render -> links and routes
    udp userspace      likewise, and the forwarder behind the TUN                       (overlay_udp.py, like the next two)
    udp kernel         likewise, and programs of the kernel before it
    plain loop         flannel's kind of forwarder: one packet a system call
    fou                Linux' own IP in UDP, the same on the wire as udp; few kernels have it

Each has its own MTU, as pods would be told it. Ours have the source guard at the uplink, where the kernel can run it.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Sequence

from bench.overlay_nodes import Programmed, Way, bring_links, bring_programs, peer_table
from bench.overlay_rig import UNDERLAY_MTU, UPLINK, Rig, batch
from bench.overlay_udp import PORT, UDP_WAYS
from kernelstate.linux import netns
from kernelstate.objects.links import LinkState
from kernelstate.objects.tunnel import TunnelState
from overlay.mtu import UDP_OVERHEAD
from overlay.netconf import Backend, HostGwBackend, VxlanBackend
from overlay.render.guard import render_guard
from overlay.render.hostgw import render_hostgw
from overlay.render.vxlan import render_vxlan
from overlay.table import PeerTable

ROUTING, HOST_GW, VXLAN, FOU = "routing", "host-gw", "vxlan", "fou"


def _routing(_undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    for end, other in (rig.ends, rig.ends[::-1]):
        batch(end.node, f"route add {other.pod_cidr} via {other.node_ip} dev {UPLINK}")
    return Programmed(UNDERLAY_MTU)


def _host_gw(undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    return _by_links(undo, rig, HostGwBackend(), render_hostgw)


def _vxlan(undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    return _by_links(undo, rig, VxlanBackend(), render_vxlan)


def _by_links(undo: contextlib.ExitStack, rig: Rig, backend: Backend, render: Callable[[PeerTable], LinkState]) -> Programmed:
    tables = [peer_table(end, rig, backend) for end in rig.ends]
    for end, table in zip(rig.ends, tables, strict=True):
        bring_links(end, render(table))
        bring_programs(undo, end, TunnelState(guard=render_guard(table)))
    return Programmed(tables[0].mtu)


def _fou(_undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    mtu = UNDERLAY_MTU - UDP_OVERHEAD[4]
    for end, other in (rig.ends, rig.ends[::-1]):
        ends = f"local {end.node_ip} remote {other.node_ip}"
        batch(
            end.node,
            f"fou add port {PORT} ipproto 4",
            f"link add flannel.fou mtu {mtu} type ipip {ends} encap fou encap-sport auto encap-dport {PORT}",
            "link set flannel.fou up",
            f"route add {other.pod_cidr} dev flannel.fou",
        )
    return Programmed(mtu)


def _lacking_fou() -> str:
    """Ask in a namespace of its own for what ``_fou`` needs."""

    def ask() -> str:
        subprocess.run(["modprobe", "-q", "fou"], check=False, timeout=10)  # of which the kernel does not think by itself
        lines = f"fou add port {PORT} ipproto 4\nlink add flannel.fou type ipip local 192.168.1.1 remote 192.168.1.2\n"
        done = subprocess.run(["ip", "-batch", "-"], input=lines, text=True, capture_output=True, timeout=10, check=False)
        return done.stderr.strip().splitlines()[0] if done.returncode else ""

    words = netns.call_apart(ask)
    return f"ip fou, ip link type ipip: {words}" if words else ""


WAYS: Sequence[Way] = (
    Way(ROUTING, _routing),
    Way(HOST_GW, _host_gw),
    Way(VXLAN, _vxlan),
    *UDP_WAYS,
    Way(FOU, _fou, _lacking_fou),
)


def way_named(name: str) -> Way:
    """Return the way of that name."""
    return next(way for way in WAYS if way.name == name)
