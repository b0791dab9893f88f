"""What the ways between two nodes have in common: the peer table of each node, and having nodeplane's own parts write for it.

    Node objects --> compile_peers --> peer table --> overlay.render --> reconcilers --sync, once--> the node's namespace

That is what the agent does. Nothing of an agent runs while traffic does: no loop, no timer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Network, ip_address, ip_network

import msgspec
from immutables import Map

from bench.overlay_rig import NETWORK, End, Rig
from clusterstate.objects import Node, NodeAddress
from kernelstate.errors import KernelStateError
from kernelstate.linux import bpf_tunnel, netns
from kernelstate.linux.bpf_tunnel import LinuxTunnel
from kernelstate.linux.links import LinuxLinks, uplink_facts
from kernelstate.objects.links import LinkState
from kernelstate.objects.tunnel import TunnelState
from kernelstate.ports import SyncReport
from kernelstate.reconcile_links import LinkReconciler
from kernelstate.reconcile_tunnel import TunnelReconciler
from nodeplane.commands import Failed
from nodeplane.host_kernel import FORWARDER
from overlay.compile import compile_peers
from overlay.netconf import Backend, NetConf
from overlay.registry.nodes import read_nodes
from overlay.table import PeerTable


class Programmed(msgspec.Struct, frozen=True):
    """A way that is there: the MTU for pods, the processes that forward, and counters by name, if it keeps any."""

    mtu: int
    forwarders: tuple[int, ...] = ()
    counters: Callable[[], Mapping[str, int]] = dict


class Way(msgspec.Struct, frozen=True):
    """A way that could be there. ``program`` undoes at the end of the stack what does not end with the namespaces.

    ``lacking`` says what this machine does not have for it; empty: nothing.
    """

    name: str
    program: Callable[[contextlib.ExitStack, Rig], Programmed]
    lacking: Callable[[], str] = str


def peer_table(end: End, rig: Rig, backend: Backend) -> PeerTable:
    """Return the overlay as one node sees it, by two Node objects."""
    conf = NetConf(IPv4Network(NETWORK), backend=backend)
    nodes = Map({one.name: _node(one) for one in rig.ends})
    uplink = netns.call(end.node, uplink_facts, "", [ip_address(end.node_ip)])
    if uplink is None:
        raise Failed(f"{end.node}: no link has the address {end.node_ip}")
    return compile_peers(read_nodes(nodes, end.name, conf), end.name, conf, uplink)


def _node(end: End) -> Node:
    address = NodeAddress("InternalIP", ip_address(end.node_ip))
    return Node(end.name, addresses=(address,), pod_cidrs=(ip_network(end.pod_cidr),))


def bring(end: End, sync: Callable[[], SyncReport]) -> None:
    """Have a part written in a node's namespace. Raises Failed with what was refused."""
    with netns.inside(end.node):
        report = sync()
    if not report.ok:
        raise Failed(f"{end.name}, {report.part}: {report.errors[0]}")


def bring_links(end: End, state: LinkState) -> None:
    """Have links, routes and what else lies on links written. Raises Failed."""
    with links_of(end) as reconciler:
        reconciler.set_desired(state)
        bring(end, reconciler.sync)


PROGRAMS = FORWARDER.parent
"""Where the programs for the kernel were built to."""


def missing_programs() -> str:
    """Say why programs of ours cannot be in this kernel; empty if they can."""
    try:
        return bpf_tunnel.missing(PROGRAMS)
    except KernelStateError as error:
        return str(error)


def bring_programs(undo: contextlib.ExitStack, end: End, state: TunnelState) -> LinuxTunnel | None:
    """Have programs put at the node's links, taken off at the end; None, and nothing done, where the kernel cannot have them.

    Raises Failed.
    """
    if missing_programs():
        return None
    with netns.inside(end.node):
        programs = LinuxTunnel(PROGRAMS)
    undo.callback(programs.close)
    reconciler = TunnelReconciler(programs)
    undo.callback(bring, end, reconciler.cleanup)
    reconciler.set_desired(state)
    bring(end, reconciler.sync)
    return programs


@contextlib.contextmanager
def links_of(end: End) -> Iterator[LinkReconciler]:
    """Make a reconciler for the node's links; its sockets are closed afterwards."""
    with netns.inside(end.node):
        links = LinuxLinks()
    with contextlib.closing(links):
        yield LinkReconciler(links)
