"""What an operator can set about Services, and the facts of the node they apply to. Values only.

Field names follow KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1); ``nodeplane/config.py`` reads the file.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.address import Family, Prefix

DetectLocalMode: TypeAlias = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]


FlowFate: TypeAlias = Literal["keep", "drain", "reset"]


class LocalDetector(msgspec.Struct, frozen=True):
    """How traffic from this node's (or this cluster's) pods is recognised: by source prefix or by incoming interface.

    Exactly one of the two is set. ``interface`` ends in ``+`` for a name prefix, as iptables writes it.
    """

    prefix: Prefix | None = None
    interface: str = ""

    def is_local(self, source: IPAddress, interface: str) -> bool:
        """Whether a packet from ``source`` that came in through ``interface`` ("" if made here) is pod traffic."""
        if self.prefix is not None:
            return self.prefix.contains(source)
        if self.interface.endswith("+"):
            return interface.startswith(self.interface[:-1]) and interface != ""
        return interface == self.interface


class ProxySettings(msgspec.Struct, frozen=True):
    """The settings that decide what Services mean or how they are written."""

    masquerade_all: bool = False
    masquerade_bit: int = 14
    localhost_node_ports: bool = True
    detect_local_mode: DetectLocalMode = "ClusterCIDR"
    cluster_cidrs: tuple[Prefix, ...] = ()
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    node_port_addresses: tuple[Prefix, ...] | Literal["primary"] = ()
    """Addresses on which NodePorts answer: empty is every local address; "primary" the Node's own."""
    tcp_be_liberal: bool = False
    random_fully: bool = True
    large_cluster_endpoints: int = 1000
    """Above so many endpoints in the cluster, rules carry no per-endpoint comment."""
    dispatch_above: int = 500
    """iptables: a shared chain with more rules than this is searched as a tree; 0: never."""
    scheduler: str = "rr"
    """IPVS: how a virtual server chooses; any scheduler the kernel has."""
    scheduler_by_port: bool = False
    """IPVS: schedulers that hash (``sh``, ``mh``) take the source port too."""
    ipvs_timeouts: tuple[int, int, int] = (0, 0, 0)
    """IPVS: seconds after which an idle TCP connection, one after FIN, and a UDP flow are forgotten; 0 leaves the kernel's."""
    strict_arp: bool = False
    """IPVS: answer ARP only for addresses of the link that is asked."""
    exclude_cidrs: tuple[Prefix, ...] = ()
    """IPVS: virtual servers inside these are somebody else's."""
    guard_node_ports: bool = False
    """loadBalancerSourceRanges also say who may use the Service's NodePorts."""
    flows_to_removed: FlowFate = "keep"
    """What becomes of TCP and SCTP flows to an endpoint that no longer serves; UDP flows are always deleted."""
    drain_seconds: int = 30
    """With ``drain``: how long such flows may go on."""

    @property
    def mark(self) -> int:
        """The packet mark that asks for masquerade: ``1 << masquerade_bit``."""
        return 1 << self.masquerade_bit


class NodeFacts(msgspec.Struct, frozen=True):
    """What is known of this node: from its Node object and from its links."""

    name: str
    zone: str = ""
    addresses: tuple[IPAddress, ...] = ()
    """InternalIPs of the Node object, first of each family is the primary one."""
    pod_cidrs: tuple[Prefix, ...] = ()
    local_addresses: tuple[Prefix, ...] = ()
    """Host prefixes on the node's links, without loopback and without the Services' own (``kube-ipvs0``)."""
    service_cidrs: tuple[Prefix, ...] = ()
    """What the cluster gives ClusterIPs from, as its ServiceCIDR objects say."""
    pod_networks: tuple[Prefix, ...] = ()
    """What pods of the whole cluster have addresses from, as the overlay says; empty: it is somebody else's."""

    def primary(self, family: Family) -> IPAddress | None:
        """Return the node's own address of a family, or None when the Node object does not tell."""
        return next((a for a in self.addresses if a.version == family), None)


def local_detector(settings: ProxySettings, node: NodeFacts, family: Family) -> LocalDetector | None:
    """Return how pod traffic is recognised, or None where the setting gives nothing for this family.

    As in kube-proxy only the first CIDR of a family counts, and without one traffic to ClusterIPs from outside is not
    masqueraded and externalTrafficPolicy Local has no short-cut for pods.
    """
    match settings.detect_local_mode:
        case "ClusterCIDR":
            cidrs = settings.cluster_cidrs
        case "NodeCIDR":
            cidrs = node.pod_cidrs
        case "BridgeInterface":
            return LocalDetector(interface=settings.bridge_interface)
        case "InterfaceNamePrefix":
            return LocalDetector(interface=settings.interface_name_prefix + "+")
    return next((LocalDetector(prefix=c) for c in cidrs if c.family == family), None)


class NodePortScope(msgspec.Struct, frozen=True):
    """Where NodePorts of one family answer."""

    everywhere: bool = False
    """On every local address (``-m addrtype --dst-type LOCAL``)."""
    addresses: tuple[Prefix, ...] = ()
    """Otherwise exactly on these host prefixes; empty: nowhere."""
    problem: str = ""
    """Why nowhere, where the setting asked for something that is not known."""

    def includes(self, address: IPAddress, is_local: bool) -> bool:
        """Whether a NodePort answers on ``address``, given whether that is one of the node's own."""
        return is_local if self.everywhere else any(p.contains(address) for p in self.addresses)


def node_port_scope(settings: ProxySettings, node: NodeFacts, family: Family) -> NodePortScope:
    """Resolve nodePortAddresses for one family.

    ``primary`` with a node address that is not known answers nowhere. kube-proxy turns it into "everywhere" (docs/adr/0004).
    A list without any CIDR of this family is everywhere for this family, as in kube-proxy.
    """
    wanted = settings.node_port_addresses
    if wanted == "primary":
        own = node.primary(family)
        if own is None or own.is_loopback or own.is_unspecified:
            found = "no address" if own is None else str(own)
            return NodePortScope(
                problem=f"nodePortAddresses is [primary], and Node {node.name} has {found} for IPv{family}: NodePorts closed"
            )
        return NodePortScope(addresses=(Prefix.host(own),))
    of_family = [p for p in wanted if p.family == family]
    if not of_family or any(p.length == 0 for p in of_family):
        return NodePortScope(everywhere=True)
    addresses = sorted(a for a in node.local_addresses if a.family == family and any(_inside(a, p) for p in of_family))
    loopback = Prefix.parse("127.0.0.1/32")
    if family == 4 and settings.localhost_node_ports and any(_inside(loopback, p) for p in of_family):
        addresses.insert(0, loopback)
    return NodePortScope(addresses=tuple(dict.fromkeys(addresses)))


def _inside(host: Prefix, prefix: Prefix) -> bool:
    shift = (32 if host.family == 4 else 128) - prefix.length
    return host.family == prefix.family and host.network >> shift == prefix.network >> shift
