"""Objects as Kubernetes' own JSON again: what ``parse`` made, printed so that ``parse`` makes the same of it.

Holds only what the objects hold, so what nobody here reads is left out, and every default is stated. Decides nothing. A slice
that an Endpoints object became has no manifest of its own and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clusterstate.objects import (
    ClusterNetworkPolicy,
    ClusterPolicyRule,
    Endpoint,
    EndpointSlice,
    KubernetesObject,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Service,
    ServiceCIDR,
)
from clusterstate.parse_cluster_policy import MOST
from clusterstate.parse_policy import NOBODY
from clusterstate.parse_slice import CHANGED_AT

Manifest = dict[str, Any]
_FAMILY = {4: "IPv4", 6: "IPv6"}
_GONE = "1970-01-01T00:00:00Z"
"""Stands for a deletion time of which only is known that there is one."""


def print_object(one: KubernetesObject) -> Manifest:
    """Return the object as a manifest."""
    version, make = _KINDS[type(one)]
    return {"apiVersion": version, "kind": type(one).__name__, **make(one)}


def _metadata(one: Any) -> Manifest:
    found: Manifest = {"name": one.name}
    if namespace := getattr(one, "namespace", ""):
        found["namespace"] = namespace
    for field in ("labels", "annotations"):
        if held := getattr(one, field, None):
            found[field] = dict(held)
    if getattr(one, "deleting", False):
        found["deletionTimestamp"] = _GONE
    return found


# -- Service ---------------------------------------------------------------------------------------------------------


def _service(one: Service) -> Manifest:
    spec: Manifest = {
        "type": one.type,
        "externalTrafficPolicy": one.external_policy,
        "internalTrafficPolicy": one.internal_policy,
        "ports": [
            {"name": p.name, "protocol": p.protocol, "port": p.port, "targetPort": p.target_port, "nodePort": p.node_port}
            for p in one.ports
        ],
    }
    addresses = ["None"] if one.headless else list(map(str, one.cluster_ips))
    if addresses:
        spec |= {"clusterIP": addresses[0], "clusterIPs": addresses}
    if one.ip_families:
        spec["ipFamilies"] = [_FAMILY[family] for family in one.ip_families]
    if one.selector is not None:
        spec["selector"] = dict(one.selector)
    if one.affinity_seconds:
        seconds = {"clientIP": {"timeoutSeconds": one.affinity_seconds}}
        spec |= {"sessionAffinity": "ClientIP", "sessionAffinityConfig": seconds}
    rare = (
        ("externalIPs", list(map(str, one.external_ips))),
        ("loadBalancerSourceRanges", list(map(str, one.source_ranges))),
        ("healthCheckNodePort", one.health_check_node_port),
        ("publishNotReadyAddresses", one.publish_not_ready),
    )
    spec |= {field: value for field, value in rare if value}
    ingress = [{"ip": str(i.ip), "ipMode": i.ip_mode} for i in one.load_balancer]
    return {"metadata": _metadata(one), "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}}


# -- EndpointSlice ---------------------------------------------------------------------------------------------------


def _slice(one: EndpointSlice) -> Manifest:
    if one.mirrored:
        raise ValueError(f"{one.ref}: was made from an Endpoints object, and is no object itself")
    metadata = _metadata(one)
    if one.changed_at:
        metadata["annotations"] = {CHANGED_AT: one.changed_at}
    return {
        "metadata": metadata,
        "addressType": _FAMILY[one.family],
        "endpoints": [_endpoint(e) for e in one.endpoints],
        "ports": [{"name": p.name, "protocol": p.protocol, "port": p.port} for p in one.ports],
    }


def _endpoint(one: Endpoint) -> Manifest:
    conditions = {"ready": one.ready, "serving": one.serving, "terminating": one.terminating}
    found: Manifest = {"addresses": [str(one.address)], "conditions": conditions}
    if one.node:
        found["nodeName"] = one.node
    if one.zone:
        found["zone"] = one.zone
    hints = {"forZones": one.zone_hints, "forNodes": one.node_hints}
    stated = {field: [{"name": name} for name in sorted(names)] for field, names in hints.items() if names}
    if stated:
        found["hints"] = stated
    if one.pod:
        namespace, _, name = one.pod.partition("/")
        found["targetRef"] = {"kind": "Pod", "namespace": namespace, "name": name}
    return found


# -- Node, Namespace, Pod, ServiceCIDR -------------------------------------------------------------------------------


def _node(one: Node) -> Manifest:
    addresses = [{"type": a.type, "address": str(a.ip)} for a in one.addresses]
    spec = {"podCIDRs": list(map(str, one.pod_cidrs)), "taints": [{"key": key} for key in one.taints]}
    return {"metadata": _metadata(one), "spec": spec, "status": {"addresses": addresses}}


def _namespace(one: Namespace) -> Manifest:
    return {"metadata": _metadata(one)}


def _pod(one: Pod) -> Manifest:
    ports = [{"name": p.name, "protocol": p.protocol, "containerPort": p.port} for p in one.ports]
    spec: Manifest = {"containers": [{"command": list(one.command), "ports": ports}], "hostNetwork": one.host_network}
    if one.node:
        spec["nodeName"] = one.node
    status = {
        "phase": one.phase,
        "podIPs": [{"ip": str(ip)} for ip in one.ips],
        "conditions": [{"type": "Ready", "status": str(one.ready)}],
    }
    return {"metadata": _metadata(one), "spec": spec, "status": status}


def _service_cidr(one: ServiceCIDR) -> Manifest:
    return {"metadata": _metadata(one), "spec": {"cidrs": list(map(str, one.cidrs))}}


# -- NetworkPolicy ---------------------------------------------------------------------------------------------------


def _policy(one: NetworkPolicy) -> Manifest:
    types = [name for name, holds in (("Ingress", one.isolates_ingress), ("Egress", one.isolates_egress)) if holds]
    spec = {
        "podSelector": _selector(one.pod_selector),
        "policyTypes": types,
        "ingress": [_rule(rule, "from") for rule in one.ingress],
        "egress": [_rule(rule, "to") for rule in one.egress],
    }
    return {"metadata": _metadata(one), "spec": spec}


def _rule(rule: PolicyRule, side: str) -> Manifest:
    ports = []
    for p in rule.ports:
        port = {"protocol": p.protocol, "port": p.port, "endPort": p.end_port}
        ports.append({field: value for field, value in port.items() if value is not None})
    return {side: [_peer(peer) for peer in rule.peers], "ports": ports}


def _peer(peer: PolicyPeer) -> Manifest:
    found: Manifest = {}
    if peer.ip_block is not None:
        found["ipBlock"] = {"cidr": str(peer.ip_block.cidr), "except": list(map(str, peer.ip_block.excepts))}
    if peer.pod_selector is not None:
        found["podSelector"] = _selector(peer.pod_selector)
    if peer.namespace_selector is not None:
        found["namespaceSelector"] = _selector(peer.namespace_selector)
    return found


def _selector(selector: LabelSelector) -> Manifest:
    stated = [{"key": r.key, "operator": r.operator, "values": list(r.values)} for r in selector.requirements]
    return {"matchExpressions": stated} if stated else {}


def _cluster_policy(one: ClusterNetworkPolicy) -> Manifest:
    spec = {
        "tier": one.tier,
        "priority": one.priority,
        "subject": _pods(one.subject),
        "ingress": [_cluster_rule(rule, "from") for rule in one.ingress],
        "egress": [_cluster_rule(rule, "to") for rule in one.egress],
    }
    return {"metadata": {"name": one.name}, "spec": spec}


def _cluster_rule(rule: ClusterPolicyRule, side: str) -> Manifest:
    """Print a rule. One without peers has a fault, and closes: what stands for it is a rule with that very fault."""
    if not rule.peers or rule.peers == (NOBODY,):
        return {"action": rule.action}
    networks = [str(peer.ip_block.cidr) for peer in rule.peers if peer.ip_block is not None]
    peers = [_pods(peer) for peer in rule.peers if peer.ip_block is None]
    peers += [{"networks": networks[i : i + MOST]} for i in range(0, len(networks), MOST)]
    found = {"action": rule.action, side: peers, "protocols": [_protocol(p) for p in rule.ports if _is_first(p)]}
    return {**found, "name": rule.name} if rule.name else found


def _is_first(port: PolicyPort) -> bool:
    """Whether it is printed: a name stands in a rule once for each protocol."""
    return not isinstance(port.port, str) or port.protocol == "TCP"


def _protocol(port: PolicyPort) -> Manifest:
    if isinstance(port.port, str):
        return {"destinationNamedPort": port.port}
    if port.port is None:
        return {port.protocol.lower(): {}}
    where = {"number": port.port} if port.end_port is None else {"range": {"start": port.port, "end": port.end_port}}
    return {port.protocol.lower(): {"destinationPort": where}}


def _pods(peer: PolicyPeer) -> Manifest:
    namespaces = _selector(peer.namespace_selector) if peer.namespace_selector is not None else {}
    if peer.pod_selector is None:
        return {"namespaces": namespaces}
    return {"pods": {"namespaceSelector": namespaces, "podSelector": _selector(peer.pod_selector)}}


_KINDS: dict[type[KubernetesObject], tuple[str, Callable[[Any], Manifest]]] = {
    Service: ("v1", _service),
    EndpointSlice: ("discovery.k8s.io/v1", _slice),
    Node: ("v1", _node),
    Namespace: ("v1", _namespace),
    Pod: ("v1", _pod),
    ServiceCIDR: ("networking.k8s.io/v1", _service_cidr),
    NetworkPolicy: ("networking.k8s.io/v1", _policy),
    ClusterNetworkPolicy: ("policy.networking.k8s.io/v1alpha2", _cluster_policy),
}
