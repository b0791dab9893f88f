"""Node, Namespace, Pod and ServiceCIDR: from the wire to checked values.

Decides what a pod listens on and whether it is ready; which pod belongs to which Service is not asked here.
Source: Kubernetes API reference v1.36, core/v1 and networking.k8s.io/v1.
"""

from __future__ import annotations

from clusterstate import fields, wire
from clusterstate.faults import Fault, shown
from clusterstate.fields import Subject
from clusterstate.objects import (
    ContainerPort,
    IPAddress,
    IPNetwork,
    Namespace,
    Node,
    NodeAddress,
    Pod,
    ServiceCIDR,
)

NAMESPACE_NAME = "kubernetes.io/metadata.name"
_NO_METADATA = wire.Metadata()


def parse_node(w: wire.Node, at: Subject) -> tuple[Node, ...]:
    """Return the Node: of its addresses those of type InternalIP and ExternalIP."""
    meta, spec = w.metadata or _NO_METADATA, w.spec or wire.NodeSpec()
    addresses: list[NodeAddress] = []
    for i, a in enumerate((w.status and w.status.addresses) or ()):
        path = f"status.addresses[{i}].address"
        if a.type == "InternalIP":
            addresses.append(NodeAddress("InternalIP", fields.ip(path, a.address)))
        elif a.type == "ExternalIP":
            addresses.append(NodeAddress("ExternalIP", fields.ip(path, a.address)))
    return (
        Node(
            name=at.name,
            addresses=tuple(addresses),
            pod_cidrs=_pod_cidrs(spec),
            labels=fields.labels(meta.labels),
            annotations=fields.notes(meta.annotations),
            taints=tuple([taint.key for taint in spec.taints or () if taint.key]),
            deleting=meta.deletion_timestamp is not None,
        ),
    )


def _pod_cidrs(spec: wire.NodeSpec) -> tuple[IPNetwork, ...]:
    """Return the pod CIDRs; ``podCIDR`` alone where there are no ``podCIDRs``."""
    if not spec.pod_cidrs:
        return (fields.cidr("spec.podCIDR", spec.pod_cidr),) if spec.pod_cidr else ()
    found = tuple([fields.cidr(f"spec.podCIDRs[{i}]", text) for i, text in enumerate(spec.pod_cidrs)])
    if spec.pod_cidr and spec.pod_cidr != spec.pod_cidrs[0]:
        raise Fault("spec.podCIDRs[0]", f"must be spec.podCIDR {shown(spec.pod_cidr)}, is {shown(spec.pod_cidrs[0])}")
    fields.one_per_family("spec.podCIDRs", found)
    return found


def parse_namespace(w: wire.Namespace, at: Subject) -> tuple[Namespace, ...]:
    """Return the Namespace; the label with its name is always there, as the API server sees to it."""
    stated = (w.metadata and w.metadata.labels) or {}
    return (Namespace(at.name, fields.labels({**stated, NAMESPACE_NAME: at.name})),)


def parse_service_cidr(w: wire.ServiceCIDR, at: Subject) -> tuple[ServiceCIDR, ...]:
    """Return the ServiceCIDR."""
    stated = (w.spec and w.spec.cidrs) or []
    found = tuple([fields.cidr(f"spec.cidrs[{i}]", text) for i, text in enumerate(stated)])
    fields.one_per_family("spec.cidrs", found)
    return (ServiceCIDR(at.name, found),)


# -- Pod -------------------------------------------------------------------------------------------------------------


def parse_pod(w: wire.Pod, at: Subject) -> tuple[Pod, ...]:
    """Return the Pod. Without a status it counts as running and ready: it was written by hand."""
    meta, spec, status = w.metadata or _NO_METADATA, w.spec or wire.PodSpec(), w.status or wire.PodStatus()
    first = spec.containers[0] if spec.containers else wire.Container()
    phase = status.phase or "Running"
    return (
        Pod(
            namespace=at.namespace,
            name=at.name,
            node=fields.node_name("spec.nodeName", spec.node_name) if spec.node_name else "",
            ips=_pod_ips(status),
            host_network=spec.host_network or False,
            phase=phase,
            ready=_ready(status, phase),
            deleting=meta.deletion_timestamp is not None,
            ports=_container_ports(spec),
            command=(*first.command, *(first.args or ())) if first.command else (),
            labels=fields.labels(meta.labels),
            annotations=fields.notes(meta.annotations),
        ),
    )


def _pod_ips(status: wire.PodStatus) -> tuple[IPAddress, ...]:
    """Return the pod's addresses; ``podIP`` alone where there are no ``podIPs``."""
    if not status.pod_ips:
        return (fields.routable_ip("status.podIP", status.pod_ip),) if status.pod_ip else ()
    found = tuple([fields.routable_ip(f"status.podIPs[{i}].ip", entry.ip) for i, entry in enumerate(status.pod_ips)])
    fields.one_per_family("status.podIPs", found)
    return found


def _ready(status: wire.PodStatus, phase: str) -> bool:
    for condition in status.conditions or ():
        if condition.type == "Ready":
            return condition.status == "True"
    return phase == "Running"


def _container_ports(spec: wire.PodSpec) -> tuple[ContainerPort, ...]:
    """Return the ports of all containers that run along with the pod: init containers only where they are sidecars."""
    found: list[ContainerPort] = []
    for group, containers in (("containers", spec.containers or ()), ("initContainers", spec.init_containers or ())):
        for i, container in enumerate(containers):
            if group == "initContainers" and container.restart_policy != "Always":
                continue
            for j, p in enumerate(container.ports or ()):
                path = f"spec.{group}[{i}].ports[{j}]"
                name = fields.label_name(f"{path}.name", p.name) if p.name else ""
                protocol = fields.protocol(f"{path}.protocol", p.protocol)
                found.append(ContainerPort(name, protocol, fields.required_port(f"{path}.containerPort", p.container_port)))
    return tuple(found)
