"""A lab's topology: which nodes on which segments, and the pods to begin with. TOML in, checked values out.

    description = "three nodes on one segment"
    objects     = ["hostnames.yaml"]            # Kubernetes objects, beside this file

    [cluster]                                   # each with one CIDR, or one of IPv4 and one of IPv6
    pod_cidrs     = ["10.244.0.0/16"]
    service_cidrs = ["10.96.0.0/16"]

    [services]                                  # KubeProxyConfiguration fields, for every node
    mode = "iptables"

    [overlay]
    backend = "vxlan"                           # or "host-gw", "udp"; options = {...} are further fields of flannel's Backend

    [[segments]]                                # one L2 domain each; a router joins them
    name    = "lan"
    subnets = ["192.168.50.0/24"]

    [[nodes]]                                   # addresses and podCIDRs are dealt out where they are not stated
    name = "node-1"
    zone = "zone-a"

    [[pods]]                                    # with replicas: hostnames-1, hostnames-2, ...
    name = "hostnames"
    replicas = 9
    ports = [{ containerPort = 9376 }]

Decides what a topology file may say and deals out the addresses it leaves out. What stands in the objects is for
``controlplane``; building it for ``wiring``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from clusterstate.faults import type_fault
from netnslab.errors import LabInputError
from netnslab.names import EXTERNAL, NODE_NAME, ROUTER

Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address

BUNDLED = Path(__file__).resolve().parent.parent / "topologies"
DEFAULT = "three-nodes"
ROUTER_HOST, FIRST_NODE_HOST, EXTERNAL_HOST = 1, 11, 250
"""Host parts within a segment's subnet; in IPv6 they look alike (::11 is node 1), though they are hexadecimal there."""
NODE_PREFIX = {4: 24, 6: 64}
"""How much of the pod network one node gets."""


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    """A table of the file; a key that is not listed is an error."""


class Cluster(_Table):
    """``[cluster]``: the ranges of pods and Services."""

    pod_cidrs: list[str] = msgspec.field(default_factory=lambda: ["10.244.0.0/16"])
    service_cidrs: list[str] = msgspec.field(default_factory=lambda: ["10.96.0.0/16"])


class Overlay(_Table):
    """``[overlay]``: flannel's backend type, and the backend's further fields as net-conf.json has them."""

    backend: str = "vxlan"
    options: dict[str, Any] = {}


class Segment(_Table):
    """``[[segments]]``: one L2 domain."""

    name: str
    subnets: list[str] = []
    mtu: int = 1500


class LabNode(_Table):
    """``[[nodes]]``. ``ips`` and ``pod_cidrs`` hold one entry per family once parsed."""

    name: str
    segment: str = ""
    ips: list[str] = []
    pod_cidrs: list[str] = []
    zone: str = ""
    labels: dict[str, str] = {}


class PodPort(_Table, rename="camel"):
    """``ports`` of ``[[pods]]``, as in a Pod."""

    container_port: int
    name: str = ""
    protocol: str = "TCP"


class PodGroup(_Table):
    """``[[pods]]``: one pod of that name, or with ``replicas`` pods NAME-1 to NAME-n, by default labelled ``app: NAME``."""

    name: str
    namespace: str = "default"
    replicas: int | None = None
    labels: dict[str, str] = {}
    ports: list[PodPort] = []
    command: list[str] = []
    node: str = ""
    host_network: bool = False


class Topology(_Table):
    """A whole file. After ``parse_topology`` every segment has subnets and every node a segment, addresses and podCIDRs."""

    description: str = ""
    objects: list[str] = []
    cluster: Cluster = msgspec.field(default_factory=Cluster)
    services: dict[str, Any] = {}
    policy: dict[str, Any] = {}
    overlay: Overlay = msgspec.field(default_factory=Overlay)
    segments: list[Segment] = []
    nodes: list[LabNode] = []
    pods: list[PodGroup] = []

    def segment(self, name: str) -> Segment:
        """Return a segment by name."""
        return next(s for s in self.segments if s.name == name)

    def node(self, name: str) -> LabNode | None:
        """Return a node by name, or None."""
        return next((n for n in self.nodes if n.name == name), None)

    @property
    def families(self) -> list[int]:
        """Return 4, 6 or both, the pod network's order."""
        return [ip_network(c).version for c in self.cluster.pod_cidrs]


def find_topology(stated: str) -> Path:
    """Return the file: a path, or the name of one that comes with the program. Raises LabInputError."""
    path = Path(stated)
    if path.is_file():
        return path
    bundled = BUNDLED / f"{stated}.toml"
    if "/" not in stated and bundled.is_file():
        return bundled
    names = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.toml")))
    raise LabInputError(f"--topology: must be a TOML file or one of {names}, is {stated!r}")


def load_topology(path: Path) -> Topology:
    """Read a topology file; the paths in ``objects`` become absolute. Raises LabInputError naming file, key and value."""
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise LabInputError(f"{path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise LabInputError(f"{path}: is not TOML: {error}") from error
    topology = parse_topology(raw, str(path))
    topology.objects = [str(path.parent / o) for o in topology.objects]
    return topology


def parse_topology(raw: Mapping[str, Any], source: str) -> Topology:
    """Check a decoded topology and deal out what it leaves out. Raises LabInputError."""
    try:
        topology = msgspec.convert(raw, Topology)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", str(error))
        if unknown:
            key = f"{unknown[2]}.{unknown[1]}" if unknown[2] else unknown[1]
            raise LabInputError(f"{source}: {key}: is not a key that topologies have") from error
        fault = type_fault(str(error), raw)
        raise LabInputError(": ".join(part for part in (source, fault.path, fault.reason) if part)) from error
    try:
        return deal_out(topology)
    except _KeyedError as error:
        raise LabInputError(f"{source}: {error}") from error


class _KeyedError(Exception):
    """A wrong value: ``key: what is wrong``."""


def deal_out(topology: Topology) -> Topology:
    """Check a topology's values and fill in segments, addresses and podCIDRs; stated ones are kept."""
    _cidrs("cluster.pod_cidrs", topology.cluster.pod_cidrs)
    _cidrs("cluster.service_cidrs", topology.cluster.service_cidrs)
    if not topology.segments:
        topology.segments = [Segment("lan")]
    if not topology.nodes:
        raise _KeyedError("nodes: must name at least one node")
    _unique("segments", [s.name for s in topology.segments])
    _unique("nodes", [n.name for n in topology.nodes])
    for i, segment in enumerate(topology.segments):
        _segment(f"segments[{i}]", segment, i, topology.families)
    for i, node in enumerate(topology.nodes):
        _node(f"nodes[{i}]", node, topology)
    _deal_addresses(topology)
    _deal_pod_cidrs(topology)
    _pods(topology)
    return topology


def _segment(key: str, segment: Segment, index: int, families: list[int]) -> None:
    _name(f"{key}.name", segment.name)
    segment.subnets = segment.subnets or [_default_subnet(f, index) for f in families]
    for network in _cidrs(f"{key}.subnets", segment.subnets):
        if network.max_prefixlen - network.prefixlen < 8:
            raise _KeyedError(f"{key}.subnets: must hold at least 256 addresses, is {str(network)!r}")
    if not 1280 <= segment.mtu <= 65535:
        raise _KeyedError(f"{key}.mtu: must be between 1280 and 65535, is {segment.mtu}")


def _default_subnet(family: int, index: int) -> str:
    return f"192.168.{50 + index}.0/24" if family == 4 else f"fd00:192:168:{50 + index}::/64"


def _node(key: str, node: LabNode, topology: Topology) -> None:
    _name(f"{key}.name", node.name)
    if node.name in {ROUTER, EXTERNAL} or node.name.startswith("segment-"):
        raise _KeyedError(f"{key}.name: {node.name!r} is the name of a part of every lab")
    node.segment = node.segment or topology.segments[0].name
    names = [s.name for s in topology.segments]
    if node.segment not in names:
        raise _KeyedError(f"{key}.segment: must be one of {', '.join(names)}, is {node.segment!r}")
    subnets = [ip_network(s, strict=False) for s in topology.segment(node.segment).subnets]
    for i, text in enumerate(node.ips):
        address = _address(f"{key}.ips[{i}]", text)
        if not any(address in s for s in subnets):
            raise _KeyedError(f"{key}.ips[{i}]: must lie in its segment ({', '.join(map(str, subnets))}), is {text!r}")
    _cidrs(f"{key}.pod_cidrs", node.pod_cidrs, may_be_empty=True)


def host_address(subnet: str, host: int) -> str:
    """Return an address of a subnet by its host part, written alike in both families: 11 is .11 and ::11."""
    network = ip_network(subnet, strict=False)
    return str(network[host if network.version == 4 else int(str(host), 16)])


def _deal_addresses(topology: Topology) -> None:
    """Give each node an address in each subnet of its segment, .11 upward."""
    taken = {ip_address(ip) for n in topology.nodes for ip in n.ips}
    for segment in topology.segments:
        taken |= {ip_address(host_address(s, h)) for s in segment.subnets for h in (ROUTER_HOST, EXTERNAL_HOST)}
    for i, node in enumerate(topology.nodes):
        have = {ip_address(ip).version for ip in node.ips}
        for subnet in topology.segment(node.segment).subnets:
            if ip_network(subnet, strict=False).version in have:
                continue
            free = (host_address(subnet, h) for h in range(FIRST_NODE_HOST + i, EXTERNAL_HOST))
            found = next((a for a in free if ip_address(a) not in taken), None)
            if found is None:
                raise _KeyedError(f"nodes[{i}].ips: there is no free address left in {subnet}")
            taken.add(ip_address(found))
            node.ips.append(found)
    _unique("nodes.ips", [ip for n in topology.nodes for ip in n.ips])


def _deal_pod_cidrs(topology: Topology) -> None:
    """Give each node its part of each pod network, beginning with the second: 10.244.1.0/24 is node 1's."""
    taken = [ip_network(c, strict=False) for n in topology.nodes for c in n.pod_cidrs]
    for i, one in enumerate(taken):
        if any(one.version == other.version and one.overlaps(other) for other in taken[:i]):
            raise _KeyedError(f"nodes.pod_cidrs: {one} overlaps with that of another node")
    for i, node in enumerate(topology.nodes):
        have = {ip_network(c, strict=False).version for c in node.pod_cidrs}
        for pod_network in map(ip_network, topology.cluster.pod_cidrs):
            if pod_network.version in have:
                continue
            found = _free_part(pod_network, taken)
            if found is None:
                raise _KeyedError(f"nodes[{i}].pod_cidrs: there is no room left in {pod_network}")
            taken.append(found)
            node.pod_cidrs.append(str(found))


def _free_part(network: Network, taken: Iterable[Network]) -> Network | None:
    prefix = max(NODE_PREFIX[network.version], network.prefixlen)
    size, same = 1 << (network.max_prefixlen - prefix), [t for t in taken if t.version == network.version]
    first = int(network.network_address) + (size if prefix > network.prefixlen else 0)
    for base in range(first, min(int(network.broadcast_address), first + 4096 * size), size):
        part = ip_network((base, prefix) if network.version == 4 else (IPv6Address(base), prefix))
        if not any(part.overlaps(t) for t in same):
            return part
    return None


def _pods(topology: Topology) -> None:
    names = [n.name for n in topology.nodes]
    for i, group in enumerate(topology.pods):
        if group.node and group.node not in names:
            raise _KeyedError(f"pods[{i}].node: must be one of {', '.join(names)}, is {group.node!r}")
        if group.replicas is not None and not 0 <= group.replicas <= 1000:
            raise _KeyedError(f"pods[{i}].replicas: must be between 0 and 1000, is {group.replicas}")


# -- single values ---------------------------------------------------------------------------------------------------


def _name(key: str, name: str) -> None:
    if not NODE_NAME.fullmatch(name):
        raise _KeyedError(f"{key}: must be lower case letters, digits and hyphens, at most 40, is {name!r}")


def _unique(key: str, values: list[str]) -> None:
    twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if twice is not None:
        raise _KeyedError(f"{key}: {twice!r} is there twice")


def _address(key: str, text: str) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise _KeyedError(f"{key}: must be an IP address, is {text!r}") from None


def _cidrs(key: str, texts: list[str], *, may_be_empty: bool = False) -> list[Network]:
    """Check a list of one CIDR, or one of each family."""
    found: list[Network] = []
    for i, text in enumerate(texts):
        try:
            found.append(ip_network(text))
        except ValueError as error:
            raise _KeyedError(f"{key}[{i}]: must be a CIDR such as 10.244.0.0/16, is {text!r} ({error})") from None
    if (not found and not may_be_empty) or len({n.version for n in found}) != len(found):
        raise _KeyedError(f"{key}: must be one CIDR, or one of IPv4 and one of IPv6, is {texts!r}")
    return found
