"""What a registry says of the nodes in the overlay, one node at a time: the common ground of all registries.

Node objects ---- registry/nodes.py --.
+--> Member ... --> compile.py: claims held against each other --> PeerTable
leases in etcd -- registry/etcd.py ---'
"""

from __future__ import annotations

import msgspec

from clusterstate.objects import IPAddress, IPNetwork
from overlay.lease import Vtep
from overlay.table import PeerProblem


class Registration(msgspec.Struct, frozen=True):
    """What one node states for one family. ``pod_field`` and ``ip_field`` say where its pod network and address were found."""

    node: str
    family: int
    pod_cidr: IPNetwork
    public_ip: IPAddress
    ip_field: str
    vtep: Vtep | None
    pod_field: str = "spec.podCIDRs"


def why_no_node_address(address: IPAddress, network: IPNetwork | None) -> str:
    """Return why packets to a node cannot be sent to this address, with the pod network of its family; empty: they can."""
    if network is not None and address in network:
        return f"lies inside the pod network {network}: packets to the node would go into the tunnel"
    if address.is_multicast or address.is_unspecified or address.is_loopback:
        return "is not the address of one node"
    return ""


class Member(msgspec.Struct, frozen=True):
    """One node as its registry has it: registrations by family, IPv4 first, and what keeps others out."""

    node: str
    registrations: tuple[Registration, ...] = ()
    problems: tuple[PeerProblem, ...] = ()
