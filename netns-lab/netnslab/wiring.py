"""The cables of a lab: segments, router and nodes, laid through netlink, in namespaces only.

    .-- np-L-segment-lan --.      .-- np-L-node-1 ---------------------------.     .-- np-L-default.web-1 --.
    |  br0 --- node-1 -----|------|- eth0 192.168.50.11      veth5e1f... ----|-----|- eth0 10.244.1.2/32    |
    |      --- node-2      |      |  default via .1     10.244.1.2 dev veth  |     |  default via 169.254.1.1
    |      --- external    |      '------------------------------------------'     '------------------------'
    |      --- router      |
    '----------|-----------'      .-- np-L-router --.
               '------------------|- lan  .1        |   one leg in each segment; forwards between them,
                                  '-----------------'   and knows no pod: what crosses it must be the overlay's

Decides what is connected to what. Pods are hung on their nodes by the CNI plugin (``attaching``); routes and tunnels between nodes are
the agents' work; addresses were dealt out before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns
from netnslab import names
from netnslab.errors import LabError
from netnslab.state import LabState
from netnslab.topology import EXTERNAL_HOST, ROUTER_HOST, Segment, host_address

DEFAULT_ROUTE = {4: "0.0.0.0/0", 6: "::/0"}
IFA_F_NODAD = 0x02


def _in(namespace: str, function: Callable[[Any], None]) -> None:
    """Call a function with a netlink socket of a namespace; what the kernel refuses becomes a LabError that names it."""

    def body() -> None:
        with IPRoute() as ip:
            function(ip)

    try:
        netns.call(namespace, body)
    except KernelRefusedError:
        raise
    except Exception as error:  # pyroute2 has many, from several layers
        raise LabError(f"cannot wire {namespace}: {error}") from error


def _index(ip: Any, name: str) -> int:
    found = ip.link_lookup(ifname=name)
    if not found:
        raise LabError(f"link {name} is missing")
    return int(found[0])


def _sysctls(namespace: str, *, forward: bool) -> None:
    """Forward, or not; no duplicate address detection, which would keep each IPv6 address waiting for a second."""
    values = {"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0"}
    if forward:
        values |= {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}

    def write() -> None:
        for key, value in values.items():
            path = Path("/proc/sys/net") / key
            if path.exists():  # a kernel without IPv6 has half of them
                path.write_text(value)

    netns.call(namespace, write)


# -- segments and what hangs on them ---------------------------------------------------------------------------------


def make_fixed(state: LabState) -> None:
    """Make everything but pods."""
    for name in state.fixed_netns():
        netns.create(name)
    router = state.node_netns(names.ROUTER)
    _sysctls(router, forward=True)
    _sysctls(state.node_netns(names.EXTERNAL), forward=False)
    for segment in state.topology.segments:
        _in(names.segment_netns(state.name, segment.name), _bridge(segment))
        addresses = [_with_length(host_address(s, ROUTER_HOST), s) for s in segment.subnets]
        plug_in(state, segment, router, names.port_link(segment.name), addresses, routed=False)
    first = state.topology.segments[0]
    plug_in(state, first, state.node_netns(names.EXTERNAL), "eth0", external_addresses(state), routed=True)
    for node in state.topology.nodes:
        _sysctls(state.node_netns(node.name), forward=True)
        segment = state.topology.segment(node.segment)
        addresses = [_with_length(ip, s) for ip in node.ips for s in segment.subnets if ip_address(ip) in ip_network(s)]
        plug_in(state, segment, state.node_netns(node.name), "eth0", addresses, routed=True)


def external_addresses(state: LabState) -> list[str]:
    """Return the external client's addresses, with their lengths."""
    return [_with_length(host_address(s, EXTERNAL_HOST), s) for s in state.topology.segments[0].subnets]


def _with_length(address: str, subnet: str) -> str:
    return f"{address}/{ip_network(subnet).prefixlen}"


def _bridge(segment: Segment) -> Callable[[Any], None]:
    def make(ip: Any) -> None:
        ip.link("add", ifname="br0", kind="bridge", mtu=segment.mtu, br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0)
        ip.link("set", index=_index(ip, "br0"), state="up")

    return make


def plug_in(state: LabState, segment: Segment, namespace: str, link: str, addresses: Sequence[str], *, routed: bool) -> None:
    """Lay a cable from a segment's bridge to ``link`` in a namespace, and give that its addresses."""
    port = names.port_link(namespace.removeprefix(f"np-{state.name}-"))

    def bridge_side(ip: Any) -> None:
        _veth(ip, port, segment.mtu, namespace, link)
        ip.link("set", index=_index(ip, port), master=_index(ip, "br0"), state="up")

    def far_side(ip: Any) -> None:
        index = _index(ip, link)
        ip.link("set", index=index, state="up")
        for address in addresses:
            _add_address(ip, index, *address.split("/"))
        if routed:
            for subnet in segment.subnets:
                gateway = host_address(subnet, ROUTER_HOST)
                ip.route("add", dst=DEFAULT_ROUTE[ip_address(gateway).version], gateway=gateway, oif=index)

    _in(names.segment_netns(state.name, segment.name), bridge_side)
    _in(namespace, far_side)


def _veth(ip: Any, near: str, mtu: int, namespace: str, far: str) -> None:
    """Make a pair, its far end born inside another namespace: it never exists in a third."""
    descriptor = os.open(netns.path(namespace), os.O_RDONLY | os.O_CLOEXEC)
    try:
        ip.link("add", ifname=near, kind="veth", mtu=mtu, peer={"ifname": far, "net_ns_fd": descriptor, "mtu": mtu})
    finally:
        os.close(descriptor)


def _add_address(ip: Any, index: int, address: str, length: str | int) -> None:
    flags = {"flags": IFA_F_NODAD} if ":" in address else {}
    ip.addr("add", index=index, address=address, prefixlen=int(length), **flags)
