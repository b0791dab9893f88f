"""Service: from the wire to a checked value.

Decides what a Service must look like to be programmed at all, as the API server's validation does, and what is merely left out
of it, as kube-proxy does it with a log line: single external IPs, load balancer addresses and source ranges that cannot be read.
Source ranges restrict, so leaving one out must never open the Service: where a family had ranges and none can be read, the
Service is rejected.

Which Services are proxied (headless, ExternalName, another proxy's label) is for ``proxy``.
Source: Kubernetes pkg/apis/core/validation, pkg/proxy/serviceport.go.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NoReturn

from clusterstate import fields, wire
from clusterstate.faults import Fault, shown
from clusterstate.fields import Subject
from clusterstate.objects import NO_LABELS, IPAddress, IPNetwork, LoadBalancerIngress, Service, ServicePort

Policy = Literal["Cluster", "Local"]
ServiceType = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]
_TYPES: dict[str | None, ServiceType] = {
    None: "ClusterIP",
    "": "ClusterIP",
    "ClusterIP": "ClusterIP",
    "NodePort": "NodePort",
    "LoadBalancer": "LoadBalancer",
    "ExternalName": "ExternalName",
}
_POLICIES: dict[str | None, Policy] = {None: "Cluster", "": "Cluster", "Cluster": "Cluster", "Local": "Local"}
_FAMILY_ORDERS = {("IPv4",): (4,), ("IPv6",): (6,), ("IPv4", "IPv6"): (4, 6), ("IPv6", "IPv4"): (6, 4)}
_PLAIN_FAMILIES = ((4,), ())
"""What ``spec.ipFamilies`` may say of a Service with one IPv4 address."""
_NO_AFFINITY = (None, "", "None")
AFFINITY_SECONDS = 10800
"""The API server's default for ``sessionAffinityConfig.clientIP.timeoutSeconds``."""
LONGEST_AFFINITY = 86400
_NOTHING = wire.ServiceSpec()
_NO_METADATA = wire.Metadata()


def parse_service(w: wire.Service, at: Subject) -> tuple[Service, ...]:
    """Return the Service. Raises Fault where it cannot stand; notes in ``at.skipped`` what it stands without."""
    spec = w.spec or _NOTHING
    kind = _TYPES.get(spec.type) or _unknown("spec.type", spec.type, _TYPES)
    headless = spec.cluster_ip == "None" or spec.cluster_ips == ["None"]
    families = _families(spec.ip_families)
    metadata, status = w.metadata or _NO_METADATA, w.status and w.status.load_balancer
    outside, inside, labels = spec.external_traffic_policy, spec.internal_traffic_policy, fields.labels(metadata.labels)
    service = Service(  # by position: so many keywords would take six times as long
        at.namespace,
        at.name,
        kind,
        () if headless or kind == "ExternalName" else _cluster_ips(spec, families),
        headless,
        _ports(spec.ports, needed=not headless and kind != "ExternalName"),
        (labels if spec.selector == metadata.labels else fields.labels(spec.selector)) if spec.selector else None,
        _external_ips(spec.external_ips, at.skipped) if spec.external_ips else (),
        _ingress(status.ingress, at.skipped) if status and status.ingress else (),
        _source_ranges(spec.load_balancer_source_ranges, at.skipped) if spec.load_balancer_source_ranges else (),
        _POLICIES.get(outside) or _unknown("spec.externalTrafficPolicy", outside, _POLICIES),
        _POLICIES.get(inside) or _unknown("spec.internalTrafficPolicy", inside, _POLICIES),
        0 if spec.session_affinity in _NO_AFFINITY else _affinity(spec),
        _health_port(spec.health_check_node_port) if spec.health_check_node_port else 0,
        spec.publish_not_ready_addresses or False,
        families,
        labels,
        fields.notes(metadata.annotations) if metadata.annotations else NO_LABELS,
    )
    return (service,)


def _unknown(path: str, value: str | None, words: dict[str | None, Any]) -> NoReturn:
    """Refuse a word that is not in its table, where absent and empty have their default."""
    fields.one_of(path, value or "", [word for word in words if word])
    raise AssertionError(path)


def _families(stated: list[str] | None) -> tuple[int, ...]:
    """Return 4 and 6 for ``ipFamilies``."""
    if not stated:
        return ()
    found = _FAMILY_ORDERS.get(tuple(stated))
    if found is not None:
        return found
    for i, family in enumerate(stated):
        fields.one_of(f"spec.ipFamilies[{i}]", family, ("IPv4", "IPv6"))
    raise Fault("spec.ipFamilies", f"must state a family once, is {shown(stated)}")


def _cluster_ips(spec: wire.ServiceSpec, families: tuple[int, ...]) -> tuple[IPAddress, ...]:
    """Return the cluster IPs; ``clusterIP`` alone where an old object has no ``clusterIPs``."""
    stated = spec.cluster_ips
    if stated and len(stated) == 1 and stated[0] == spec.cluster_ip and families in _PLAIN_FAMILIES:
        plain = fields.plain_ipv4(stated[0])
        if plain is not None:
            return (plain,)  # nearly every Service
    if not stated:
        found: tuple[IPAddress, ...] = (fields.routable_ip("spec.clusterIP", spec.cluster_ip),) if spec.cluster_ip else ()
    else:
        found = tuple([fields.routable_ip(f"spec.clusterIPs[{i}]", text) for i, text in enumerate(stated)])
        fields.one_per_family("spec.clusterIPs", found)
    if stated and spec.cluster_ip and spec.cluster_ip != stated[0]:
        raise Fault("spec.clusterIPs[0]", f"must be spec.clusterIP {shown(spec.cluster_ip)}, is {shown(stated[0])}")
    for i, (address, family) in enumerate(zip(found, families, strict=False)):
        if address.version != family:
            path = f"spec.clusterIPs[{i}]" if stated else "spec.clusterIP"
            raise Fault(path, f"must be of IPv{family} as spec.ipFamilies says, is {shown(str(address))}")
    return found


def _ports(stated: list[wire.ServicePort] | None, needed: bool) -> tuple[ServicePort, ...]:
    """Return the ports; several need names, and no name, port or node port comes twice."""
    if not stated:
        if needed:
            raise Fault("spec.ports", "must state at least one port")
        return ()
    ports: tuple[ServicePort, ...] = ()
    for i, w in enumerate(stated):
        try:
            one = _port(w.name, w.protocol, w.port, w.target_port, w.node_port)
        except Fault as fault:
            raise fault.under(f"spec.ports[{i}]") from None
        ports = ports + one if ports else one
    if len(ports) > 1:
        _unique_ports(ports)
    return ports


@lru_cache(maxsize=4096)
def _port(
    name: str | None, protocol: str | None, port: int | None, target: int | str | None, node_port: int | None
) -> tuple[ServicePort]:
    """Return one port, as the ports of a Service without any other; its target is itself where nothing else is stated.

    Most Services have one of a few, so these are one object.
    """
    number = fields.required_port("port", port)
    if isinstance(target, str) and target:
        fields.label_name("targetPort", target)
    elif isinstance(target, int) and target:
        fields.number("targetPort", target, 1, 65535)
    one = ServicePort(
        name=fields.label_name("name", name) if name else "",
        protocol=fields.protocol("protocol", protocol),
        port=number,
        target_port=target or number,
        node_port=fields.number("nodePort", node_port or 0, 0, 65535),
    )
    return (one,)


def _unique_ports(ports: tuple[ServicePort, ...]) -> None:
    names: set[str] = set()
    numbers: set[tuple[str, str, int]] = set()
    for i, p in enumerate(ports):
        path = f"spec.ports[{i}]"
        if not p.name:
            raise Fault(f"{path}.name", "must be given where there are several ports")
        if p.name in names:
            raise Fault(f"{path}.name", f"must not be used twice, is {shown(p.name)}")
        names.add(p.name)
        for field, value in (("port", p.port), ("nodePort", p.node_port)):
            if (field, p.protocol, value) in numbers:
                raise Fault(f"{path}.{field}", f"must not be used twice with {p.protocol}, is {value}")
            if value:
                numbers.add((field, p.protocol, value))


def _external_ips(stated: list[str], skipped: list[Fault]) -> tuple[IPAddress, ...]:
    found: list[IPAddress] = []
    for i, text in enumerate(stated):
        try:
            found.append(fields.routable_ip(f"spec.externalIPs[{i}]", text))
        except Fault as fault:
            skipped.append(fault)
    return tuple(dict.fromkeys(found))


def _ingress(stated: list[wire.Ingress], skipped: list[Fault]) -> tuple[LoadBalancerIngress, ...]:
    """Return the load balancer's addresses; an entry with a hostname alone is none."""
    found: list[LoadBalancerIngress] = []
    for i, w in enumerate(stated):
        if not w.ip:
            continue
        path = f"status.loadBalancer.ingress[{i}]"
        try:
            mode = _IP_MODES.get(w.ip_mode) or _unknown(f"{path}.ipMode", w.ip_mode, _IP_MODES)
            found.append(LoadBalancerIngress(fields.routable_ip(f"{path}.ip", w.ip), mode))
        except Fault as fault:
            skipped.append(fault)
    return tuple(found)


_IP_MODES: dict[str | None, Literal["VIP", "Proxy"]] = {None: "VIP", "VIP": "VIP", "Proxy": "Proxy"}


def _source_ranges(stated: list[str], skipped: list[Fault]) -> tuple[IPNetwork, ...]:
    """Return the ranges; a family with a range of every address has none, as in kube-proxy.

    Fails closed: a family of which ranges are stated but none can be read must not look like one without ranges.
    """
    found: list[IPNetwork] = []
    unread: dict[int, Fault] = {}
    for i, text in enumerate(stated):
        try:
            found.append(fields.cidr(f"spec.loadBalancerSourceRanges[{i}]", text.strip()))
        except Fault as fault:
            skipped.append(fault)
            unread.setdefault(6 if ":" in text else 4, fault)
    closed = {r.version for r in found}
    for family, first in unread.items():
        if family not in closed:
            raise Fault(first.path, f"{first.reason}; it is the only one of IPv{family}, and without it all would be let in")
    everyone = {r.version for r in found if r.prefixlen == 0}
    return tuple(dict.fromkeys([r for r in found if r.version not in everyone]))


def _health_port(value: int) -> int:
    return fields.number("spec.healthCheckNodePort", value, 0, 65535)


def _affinity(spec: wire.ServiceSpec) -> int:
    """Return the timeout of ``ClientIP`` affinity, the only other than none, in seconds."""
    fields.one_of("spec.sessionAffinity", spec.session_affinity or "", ("None", "ClientIP"))
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return AFFINITY_SECONDS
    return fields.number("spec.sessionAffinityConfig.clientIP.timeoutSeconds", seconds, 1, LONGEST_AFFINITY)
