"""What both ways of attaching a pod share: sysctls inside and outside, and routes as results say them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from kernelstate.linux.pod_codec import PodRoute
from kernelstate.linux.pod_link import write_sysctl
from nodeplane.cni.protocol import Json


class Ends(NamedTuple):
    """A veth pair: the name of the node's end, and both MACs."""

    near: str
    near_mac: str
    far_mac: str


def prepare_pod(ifname: str, families: Collection[int]) -> None:
    """Set what must be set before the pod's end comes up: told the neighbours of its address, and no wait for duplicates of it."""
    write_sysctl(f"ipv4/conf/{ifname}/arp_notify", "1")
    if 6 in families:
        write_sysctl(f"ipv6/conf/{ifname}/disable_ipv6", "0")  # container runtimes turn IPv6 off in new namespaces
        write_sysctl(f"ipv6/conf/{ifname}/accept_dad", "0")


def enable_forwarding(families: Collection[int]) -> None:
    """Let the node forward for its pods; the agent does as well, but a pod may come first."""
    if 4 in families:
        write_sysctl("ipv4/ip_forward", "1")
    if 6 in families:
        write_sysctl("ipv6/conf/all/forwarding", "1")


def routes_of(routes: Sequence[Json]) -> list[PodRoute]:
    """Return the routes of a result as the kernel takes them; a gateway without an address of its subnet is on the link."""
    return [
        PodRoute(
            destination=ip_network(one["dst"], strict=False),
            gateway=ip_address(one["gw"]) if one.get("gw") else None,
            mtu=one.get("mtu") or 0,
            advmss=one.get("advmss") or 0,
            priority=one.get("priority") or 0,
            table=one.get("table") or 0,
            scope=-1 if one.get("scope") is None else one["scope"],
        )
        for one in routes
    ]
