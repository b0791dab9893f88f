"""What a lab's control plane has dealt out, and the dealing: pod addresses, ClusterIPs and NodePorts that stay the same.

A real cluster keeps these in etcd, inside the objects. A lab keeps the objects as they were given and these beside them.

    pod address   the next of the node's podCIDR after the last dealt out, from .2 (a CNI host-local does the same: an address
                  that was just let go of is not handed to somebody else while packets to it are still on their way)
    ClusterIP     the first free of the upper band of the Service CIDR; the lower is left to those that are stated (KEP-3070)
    NodePort      the first free of the upper band of 30000-32767, likewise (KEP-3668)

Pure: every function takes the memory and returns what it found; nothing here reads an object.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_network

import msgspec

from netnslab.errors import LabInputError

NODE_PORTS = range(30000, 32768)


class PodPlace(msgspec.Struct):
    """Where a pod is: its node, and its addresses (none of its own in the host's network)."""

    node: str
    ips: list[str]


class ServicePlace(msgspec.Struct):
    """What a Service got: ClusterIPs, NodePorts by ``PROTOCOL/port``, and its health check's port (0: none)."""

    cluster_ips: list[str]
    node_ports: dict[str, int]
    health_port: int = 0


class Memory(msgspec.Struct):
    """Everything dealt out. Keys are ``namespace/name``; ``last`` is the last host number by podCIDR."""

    pods: dict[str, PodPlace] = {}
    services: dict[str, ServicePlace] = {}
    last: dict[str, int] = {}
    removed_nodes: list[str] = []
    """Nodes of the topology whose Node object was deleted."""


def next_pod_ip(memory: Memory, cidr: str, taken: Collection[str]) -> str:
    """Return the next free address of a podCIDR. Raises LabInputError when there is none."""
    network = ip_network(cidr)
    first, count = 2, min(network.num_addresses, 1 << 16) - 3  # .0 is the tunnel's, .1 a bridge's, the last for broadcast
    start = memory.last.get(cidr, first - 1) - first + 1
    for i in range(count):
        host = first + (start + i) % count
        if str(network[host]) not in taken:
            memory.last[cidr] = host
            return str(network[host])
    raise LabInputError(f"podCIDR {cidr}: has no free address for another pod")


def free_cluster_ip(cidr: str, taken: Collection[str]) -> str:
    """Return the first free ClusterIP. Raises LabInputError when there is none."""
    network = ip_network(cidr)
    size = min(network.num_addresses, 1 << 16)
    band = min(max(16, size // 16), 256)
    for host in (*range(band + 1, size - 1), *range(1, band + 1)):
        if host < size - 1 and str(network[host]) not in taken:
            return str(network[host])
    raise LabInputError(f"service CIDR {cidr}: has no free address for another Service")


def free_node_port(taken: Collection[int]) -> int:
    """Return the first free NodePort. Raises LabInputError when there is none."""
    band = min(max(16, len(NODE_PORTS) // 32), 128)
    ports: list[int] = [*NODE_PORTS[band:], *NODE_PORTS[:band]]
    for port in ports:
        if port not in taken:
            return port
    raise LabInputError(f"NodePorts {NODE_PORTS[0]}-{NODE_PORTS[-1]}: none is free for another Service")
