"""Where a packet to an address goes, said slowly and obviously from the table; every renderer is tested against it.

Nothing here knows routes, neighbours or forwarding entries. ``nodeplane explain`` shows the answer to people.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from clusterstate.objects import IPAddress, IPNetwork
from overlay.table import PeerTable

PathKind: TypeAlias = Literal["local", "vxlan", "host-gw", "udp", "node", "external"]


class Path(msgspec.Struct, frozen=True):
    """``local``: a pod here; ``vxlan``, ``host-gw``, ``udp``: a pod on ``peer``; ``node``: a node itself (``peer`` None: this one)."""

    kind: PathKind
    peer: str | None = None
    why: str = ""


def path_of(table: PeerTable, destination: IPAddress) -> Path:
    """Return where a packet from this node to ``destination`` goes.

    Pods of a node that was left out are ``external``: packets to them leave as packets to any stranger do.
    """
    own = [way.public_ip for way in table.own] + [interface.ip for interface in table.uplink.addresses]
    if destination in own:
        return Path("node", None, "an address of this node")
    for peer in table.peers:
        if destination in peer.public_ips:
            return Path("node", peer.node, f"the address of Node {peer.node}")
    for way in table.own:
        if _inside(destination, way.pod_cidr):
            return Path("local", None, f"inside this node's pod network {way.pod_cidr}")
    for peer in table.peers:
        for way in peer.ways:
            if _inside(destination, way.pod_cidr):
                return Path(way.reach.value, peer.node, f"inside {way.pod_cidr} of Node {peer.node}; {way.why}")
    for family in table.net_conf.families:
        network = table.net_conf.network_of(family)
        if network is not None and _inside(destination, network):
            return Path("external", None, f"inside the pod network {network}, but no node that can be reached has it")
    return Path("external", None, "outside the pod network")


def _inside(address: IPAddress, network: IPNetwork) -> bool:
    return address.version == network.version and address in network
