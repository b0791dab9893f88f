"""The Kubernetes objects as they travel: only the fields we read, with their JSON types, everything optional.

msgspec decodes into these at the speed of C and checks types on the way; fields that are not listed are skipped unread. Every
field accepts null, because Go writes an empty list as ``null`` and reads null as absent. What the values mean and which are
allowed is for the ``parse_*`` modules.

Source: Kubernetes API reference v1.36; a name in ``field(name=...)`` is one that camel case alone would spell wrong.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
from msgspec import field

StringMap: TypeAlias = dict[str, str]


class Wire(msgspec.Struct, gc=False, rename="camel"):
    """What all of them are: camel case, not tracked by the garbage collector, alive for microseconds."""


class Metadata(Wire):
    """``metadata`` of every kind."""

    name: str | None = None
    namespace: str | None = None
    labels: StringMap | None = None
    annotations: StringMap | None = None
    deletion_timestamp: str | None = None


class Object(Wire):
    """What every kind has."""

    api_version: str | None = None
    metadata: Metadata | None = None


class Named(Wire):
    """A reference by name alone: ``hints.forZones[]``, ``hints.forNodes[]``."""

    name: str | None = None


# -- Service ---------------------------------------------------------------------------------------------------------


class ServicePort(Wire):
    """``spec.ports[]``."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    target_port: int | str | None = None
    node_port: int | None = None


class ClientIP(Wire):
    """``spec.sessionAffinityConfig.clientIP``."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(Wire):
    """``spec.sessionAffinityConfig``."""

    client_ip: ClientIP | None = field(name="clientIP", default=None)


class ServiceSpec(Wire):
    """``spec`` of a Service."""

    type: str | None = None
    cluster_ip: str | None = field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = field(name="clusterIPs", default=None)
    ip_families: list[str] | None = None
    ports: list[ServicePort] | None = None
    selector: StringMap | None = None
    external_ips: list[str] | None = field(name="externalIPs", default=None)
    load_balancer_source_ranges: list[str] | None = None
    external_traffic_policy: str | None = None
    internal_traffic_policy: str | None = None
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    health_check_node_port: int | None = None
    publish_not_ready_addresses: bool | None = None


class Ingress(Wire):
    """``status.loadBalancer.ingress[]``."""

    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(Wire):
    """``status.loadBalancer``."""

    ingress: list[Ingress] | None = None


class ServiceStatus(Wire):
    """``status`` of a Service."""

    load_balancer: LoadBalancerStatus | None = None


class Service(Object, tag_field="kind", tag="Service"):
    """core/v1."""

    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


# -- EndpointSlice and Endpoints -------------------------------------------------------------------------------------


class TargetRef(Wire):
    """``targetRef``: an ObjectReference."""

    kind: str | None = None
    namespace: str | None = None
    name: str | None = None


class Conditions(Wire):
    """``endpoints[].conditions``."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hints(Wire):
    """``endpoints[].hints``."""

    for_zones: list[Named] | None = None
    for_nodes: list[Named] | None = None


class Endpoint(Wire):
    """``endpoints[]`` of a slice."""

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: Hints | None = None
    target_ref: TargetRef | None = None


class EndpointPort(Wire):
    """``ports[]`` of a slice, and of a subset of an Endpoints object."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(Object, tag_field="kind", tag="EndpointSlice"):
    """discovery.k8s.io/v1."""

    address_type: str | None = None
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None


class EndpointAddress(Wire):
    """``subsets[].addresses[]``."""

    ip: str | None = None
    node_name: str | None = None
    target_ref: TargetRef | None = None


class Subset(Wire):
    """``subsets[]``."""

    addresses: list[EndpointAddress] | None = None
    not_ready_addresses: list[EndpointAddress] | None = None
    ports: list[EndpointPort] | None = None


class Endpoints(Object, tag_field="kind", tag="Endpoints"):
    """core/v1."""

    subsets: list[Subset] | None = None


# -- Node, Namespace, Pod, ServiceCIDR -------------------------------------------------------------------------------


class Taint(Wire):
    """``spec.taints[]``."""

    key: str | None = None


class NodeSpec(Wire):
    """``spec`` of a Node."""

    pod_cidr: str | None = field(name="podCIDR", default=None)
    pod_cidrs: list[str] | None = field(name="podCIDRs", default=None)
    taints: list[Taint] | None = None


class NodeAddress(Wire):
    """``status.addresses[]``."""

    type: str | None = None
    address: str | None = None


class NodeStatus(Wire):
    """``status`` of a Node."""

    addresses: list[NodeAddress] | None = None


class Node(Object, tag_field="kind", tag="Node"):
    """core/v1."""

    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class Namespace(Object, tag_field="kind", tag="Namespace"):
    """core/v1."""


class ContainerPort(Wire):
    """``containers[].ports[]``."""

    name: str | None = None
    protocol: str | None = None
    container_port: int | None = None


class Container(Wire):
    """``spec.containers[]`` and ``spec.initContainers[]``."""

    command: list[str] | None = None
    args: list[str] | None = None
    ports: list[ContainerPort] | None = None
    restart_policy: str | None = None


class PodSpec(Wire):
    """``spec`` of a Pod."""

    node_name: str | None = None
    host_network: bool | None = None
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None


class PodIP(Wire):
    """``status.podIPs[]``."""

    ip: str | None = None


class Condition(Wire):
    """``status.conditions[]``."""

    type: str | None = None
    status: str | None = None


class PodStatus(Wire):
    """``status`` of a Pod."""

    phase: str | None = None
    pod_ip: str | None = field(name="podIP", default=None)
    pod_ips: list[PodIP] | None = field(name="podIPs", default=None)
    conditions: list[Condition] | None = None


class Pod(Object, tag_field="kind", tag="Pod"):
    """core/v1."""

    spec: PodSpec | None = None
    status: PodStatus | None = None


class ServiceCIDRSpec(Wire):
    """``spec`` of a ServiceCIDR."""

    cidrs: list[str] | None = None


class ServiceCIDR(Object, tag_field="kind", tag="ServiceCIDR"):
    """networking.k8s.io/v1 and v1beta1."""

    spec: ServiceCIDRSpec | None = None


# -- NetworkPolicy ---------------------------------------------------------------------------------------------------


class Requirement(Wire):
    """``matchExpressions[]``."""

    key: str | None = None
    operator: str | None = None
    values: list[str] | None = None


class Selector(Wire):
    """A LabelSelector."""

    match_labels: StringMap | None = None
    match_expressions: list[Requirement] | None = None


class IPBlock(Wire):
    """``ipBlock``."""

    cidr: str | None = None
    excepts: list[str] | None = field(name="except", default=None)


class Peer(Wire):
    """``from[]`` and ``to[]``."""

    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None
    ip_block: IPBlock | None = None


class PolicyPort(Wire):
    """``ports[]`` of a policy rule."""

    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class IngressRule(Wire):
    """``spec.ingress[]``."""

    peers: list[Peer] | None = field(name="from", default=None)
    ports: list[PolicyPort] | None = None


class EgressRule(Wire):
    """``spec.egress[]``."""

    peers: list[Peer] | None = field(name="to", default=None)
    ports: list[PolicyPort] | None = None


class PolicySpec(Wire):
    """``spec`` of a NetworkPolicy."""

    pod_selector: Selector | None = None
    policy_types: list[str] | None = None
    ingress: list[IngressRule] | None = None
    egress: list[EgressRule] | None = None


class NetworkPolicy(Object, tag_field="kind", tag="NetworkPolicy"):
    """networking.k8s.io/v1."""

    spec: PolicySpec | None = None


# -- ClusterNetworkPolicy --------------------------------------------------------------------------------------------


class Whole(msgspec.Struct, gc=False, rename="camel", forbid_unknown_fields=True):
    """What may hold nothing but what we know: a field passed over could open what it was meant to close."""


class WholeSelector(Selector, forbid_unknown_fields=True):
    """A LabelSelector; one with a misspelt field would select everything."""


class PodsOfNamespaces(Whole):
    """``pods``: both selectors must hold."""

    namespace_selector: WholeSelector | None = None
    pod_selector: WholeSelector | None = None


class PolicySubject(Whole):
    """``spec.subject`` and ``from[]``: one of them."""

    namespaces: WholeSelector | None = None
    pods: PodsOfNamespaces | None = None


class EgressPeer(PolicySubject):
    """``to[]``: one of them."""

    networks: list[str] | None = None
    nodes: WholeSelector | None = None
    domain_names: list[str] | None = None


class NumberRange(Whole):
    """``range``."""

    start: int | None = None
    end: int | None = None


class DestinationPort(Whole):
    """``destinationPort``: a number or a range."""

    number: int | None = None
    range: NumberRange | None = None


class Transport(Whole):
    """``tcp``, ``udp`` and ``sctp``."""

    destination_port: DestinationPort | None = None


class ClusterProtocol(Whole):
    """``protocols[]``: one of them."""

    tcp: Transport | None = None
    udp: Transport | None = None
    sctp: Transport | None = None
    destination_named_port: str | None = None


class ClusterIngressRule(Whole):
    """``spec.ingress[]``."""

    name: str | None = None
    action: str | None = None
    peers: list[PolicySubject] | None = field(name="from", default=None)
    protocols: list[ClusterProtocol] | None = None


class ClusterEgressRule(Whole):
    """``spec.egress[]``."""

    name: str | None = None
    action: str | None = None
    peers: list[EgressPeer] | None = field(name="to", default=None)
    protocols: list[ClusterProtocol] | None = None


class ClusterNetworkPolicy(Object, tag_field="kind", tag="ClusterNetworkPolicy"):
    """policy.networking.k8s.io/v1alpha2. Its parts are decoded one by one, so that each rule may be wrong for itself."""

    spec: Any = None


AnyKind: TypeAlias = (
    Service | EndpointSlice | Endpoints | Node | Namespace | Pod | ServiceCIDR | NetworkPolicy | ClusterNetworkPolicy
)
