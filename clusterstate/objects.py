"""The Kubernetes objects a node's dataplane needs, as frozen values.

Each class holds the fields that decide where packets go, already checked and typed: an address here is an ``ipaddress``
object, a set of labels an immutable mapping. ``parse.py`` is the only maker; nothing past it looks at JSON again.

None of them can be part of a reference cycle, so none is tracked by the garbage collector (``gc=False``): a cluster of 100,000
objects must not make every collection slower.

Source: Kubernetes API reference v1.36 (core/v1, discovery.k8s.io/v1, networking.k8s.io/v1).
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from immutables import Map

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network
Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
Labels: TypeAlias = Map[str, str]
NO_LABELS: Labels = Map()


class ObjectRef(NamedTuple):
    """Which object: kind, namespace (empty for Node, Namespace, ServiceCIDR) and name."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """Print as ``Service default/web`` or ``Node worker-1``."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


# -- Service ---------------------------------------------------------------------------------------------------------


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """``spec.ports[]``; ``node_port`` 0 is none; ``target_port`` is a number or the name of a container port."""

    name: str
    protocol: Protocol
    port: int
    target_port: int | str
    node_port: int = 0


class LoadBalancerIngress(msgspec.Struct, frozen=True, gc=False):
    """``status.loadBalancer.ingress[]`` with an IP; ``ip_mode`` absent means VIP (KEP-1860)."""

    ip: IPAddress
    ip_mode: Literal["VIP", "Proxy"] = "VIP"


class Service(msgspec.Struct, frozen=True, gc=False):
    """A Service. ``cluster_ips`` is empty for headless and ExternalName Services.

    ``cluster_ip`` keeps the stated text (``None``, an address, or empty) for those who fill it in.
    """

    namespace: str
    name: str
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ips: tuple[IPAddress, ...] = ()
    headless: bool = False
    ports: tuple[ServicePort, ...] = ()
    selector: Labels | None = None
    external_ips: tuple[IPAddress, ...] = ()
    load_balancer: tuple[LoadBalancerIngress, ...] = ()
    source_ranges: tuple[IPNetwork, ...] = ()
    external_policy: Literal["Cluster", "Local"] = "Cluster"
    internal_policy: Literal["Cluster", "Local"] = "Cluster"
    affinity_seconds: int = 0
    """``sessionAffinity: ClientIP`` with its timeout in seconds; 0 is no affinity."""
    health_check_node_port: int = 0
    publish_not_ready: bool = False
    ip_families: tuple[int, ...] = ()
    """4 and 6 in the order of ``spec.ipFamilies``; empty where the object leaves it out."""
    labels: Labels = NO_LABELS
    annotations: Labels = NO_LABELS

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("Service", self.namespace, self.name)


# -- EndpointSlice ---------------------------------------------------------------------------------------------------


class EndpointPort(msgspec.Struct, frozen=True, gc=False):
    """``ports[]`` of a slice: matched to a Service port by ``name`` and ``protocol``."""

    name: str
    protocol: Protocol
    port: int


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """``endpoints[]`` of a slice: one address (only ``addresses[0]`` counts) and its conditions, defaults filled in."""

    address: IPAddress
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zone: str = ""
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()
    pod: str = ""
    """``namespace/name`` of ``targetRef`` when that is a Pod."""


class EndpointSlice(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice; also what an Endpoints object becomes (``mirrored``), as Kubernetes' own mirroring does it."""

    namespace: str
    name: str
    service: str
    """The label ``kubernetes.io/service-name``; empty is nobody's."""
    family: Literal[4, 6]
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    mirrored: bool = False
    labels: Labels = NO_LABELS
    changed_at: str = ""
    """When a pod or the Service changed and this with it, as RFC 3339 has it (``last-change-trigger-time``); may be anything."""

    @property
    def ref(self) -> ObjectRef:
        """Its reference; a mirrored Endpoints object is named as such."""
        return ObjectRef("Endpoints" if self.mirrored else "EndpointSlice", self.namespace, self.name)


# -- Node, Namespace, Pod --------------------------------------------------------------------------------------------


class NodeAddress(msgspec.Struct, frozen=True, gc=False):
    """``status.addresses[]`` of type InternalIP or ExternalIP."""

    type: Literal["InternalIP", "ExternalIP"]
    ip: IPAddress


class Node(msgspec.Struct, frozen=True, gc=False):
    """A Node. ``addresses`` in stated order: the first InternalIP of a family is the node's own in that family."""

    name: str
    addresses: tuple[NodeAddress, ...] = ()
    pod_cidrs: tuple[IPNetwork, ...] = ()
    labels: Labels = NO_LABELS
    annotations: Labels = NO_LABELS
    taints: tuple[str, ...] = ()
    """Keys of ``spec.taints``."""
    deleting: bool = False

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("Node", "", self.name)

    @property
    def zone(self) -> str:
        """The label ``topology.kubernetes.io/zone``, or empty."""
        return self.labels.get("topology.kubernetes.io/zone", "")

    def internal_ip(self, family: int) -> IPAddress | None:
        """Return its first InternalIP of a family (else ExternalIP), or None."""
        for kind in ("InternalIP", "ExternalIP"):
            for address in self.addresses:
                if address.type == kind and address.ip.version == family:
                    return address.ip
        return None


class Namespace(msgspec.Struct, frozen=True, gc=False):
    """A Namespace and its labels (``kubernetes.io/metadata.name`` is always among them)."""

    name: str
    labels: Labels = NO_LABELS

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("Namespace", "", self.name)


class ContainerPort(msgspec.Struct, frozen=True, gc=False):
    """``containers[].ports[]``; ``name`` may be empty."""

    name: str
    protocol: Protocol
    port: int


class Pod(msgspec.Struct, frozen=True, gc=False):
    """A Pod. ``ips`` empty: not started or not yet known."""

    namespace: str
    name: str
    node: str = ""
    ips: tuple[IPAddress, ...] = ()
    host_network: bool = False
    phase: str = "Running"
    ready: bool = True
    deleting: bool = False
    ports: tuple[ContainerPort, ...] = ()
    command: tuple[str, ...] = ()
    """``command`` and ``args`` of the first container, joined; empty where it states no command."""
    labels: Labels = NO_LABELS
    annotations: Labels = NO_LABELS

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("Pod", self.namespace, self.name)


class ServiceCIDR(msgspec.Struct, frozen=True, gc=False):
    """A ServiceCIDR: ranges from which ClusterIPs are taken (KEP-1880)."""

    name: str
    cidrs: tuple[IPNetwork, ...] = ()

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("ServiceCIDR", "", self.name)


# -- NetworkPolicy ---------------------------------------------------------------------------------------------------


class Requirement(msgspec.Struct, frozen=True, gc=False):
    """``matchExpressions[]``: key, operator, values."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()


class LabelSelector(msgspec.Struct, frozen=True, gc=False):
    """A label selector; with no requirement it selects everything. ``matchLabels`` are held as ``In`` requirements."""

    requirements: tuple[Requirement, ...] = ()


class PolicyPort(msgspec.Struct, frozen=True, gc=False):
    """``ports[]``: a protocol with no port (all), a number, a name, or a range to ``end_port``."""

    protocol: Protocol
    port: int | str | None = None
    end_port: int | None = None


class IPBlock(msgspec.Struct, frozen=True, gc=False):
    """``ipBlock``: a CIDR without its exceptions."""

    cidr: IPNetwork
    excepts: tuple[IPNetwork, ...] = ()


class PolicyPeer(msgspec.Struct, frozen=True, gc=False):
    """``from[]`` or ``to[]``: either ``ip_block``, or selectors (None where the object leaves one out)."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class PolicyRule(msgspec.Struct, frozen=True, gc=False):
    """``ingress[]`` or ``egress[]``: empty ``peers`` is everybody, empty ``ports`` every port."""

    peers: tuple[PolicyPeer, ...] = ()
    ports: tuple[PolicyPort, ...] = ()


class NetworkPolicy(msgspec.Struct, frozen=True, gc=False):
    """A NetworkPolicy with ``policyTypes`` defaulted as the API server does it."""

    namespace: str
    name: str
    pod_selector: LabelSelector = LabelSelector()
    isolates_ingress: bool = True
    isolates_egress: bool = False
    ingress: tuple[PolicyRule, ...] = ()
    egress: tuple[PolicyRule, ...] = ()

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("NetworkPolicy", self.namespace, self.name)


# -- ClusterNetworkPolicy --------------------------------------------------------------------------------------------

Action: TypeAlias = Literal["Accept", "Deny", "Pass"]
Tier: TypeAlias = Literal["Admin", "Baseline"]


class ClusterPolicyRule(PolicyRule, frozen=True, gc=False):
    """``ingress[]`` or ``egress[]`` of a ClusterNetworkPolicy; ports stated by name are there once for each protocol."""

    action: Action = "Accept"
    name: str = ""


class ClusterNetworkPolicy(msgspec.Struct, frozen=True, gc=False):
    """A ClusterNetworkPolicy. ``subject`` is whom it is about: pods by their labels and those of their namespaces."""

    name: str
    tier: Tier
    priority: int
    """0 to 1000; lower comes first."""
    subject: PolicyPeer
    ingress: tuple[ClusterPolicyRule, ...] = ()
    egress: tuple[ClusterPolicyRule, ...] = ()

    @property
    def ref(self) -> ObjectRef:
        """Its reference."""
        return ObjectRef("ClusterNetworkPolicy", "", self.name)


KubernetesObject: TypeAlias = (
    Service | EndpointSlice | Node | Namespace | Pod | ServiceCIDR | NetworkPolicy | ClusterNetworkPolicy
)
