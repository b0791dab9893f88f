"""EndpointSlice, and Endpoints, which becomes what Kubernetes' own mirroring would make of it.

    Endpoints web                          EndpointSlices, mirrored
      subsets[0] 10.0.0.1  port 80    ->   web/ipv4     10.0.0.1, 10.0.0.2 (not ready)   port 80
                 10.0.0.2 not ready        web/ipv4-2   10.0.0.3                         port 8080
      subsets[1] 10.0.0.3  port 8080       web/ipv6     fd00::1                          port 80
      subsets[2] fd00::1   port 80

Subsets with the same ports are one group. The names carry a ``/``, which no object's own name can.

Decides defaults of conditions and which ports count; how slices of one Service are joined, and which endpoints are used, is for
``proxy``. Source: pkg/proxy/endpointslicecache.go, pkg/controller/endpointslicemirroring.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from sys import intern
from typing import Literal

from clusterstate import fields, wire
from clusterstate.faults import Fault, shown
from clusterstate.fields import Subject
from clusterstate.objects import Endpoint, EndpointPort, EndpointSlice, IPAddress

SERVICE_NAME = "kubernetes.io/service-name"
CHANGED_AT = "endpoints.kubernetes.io/last-change-trigger-time"
SKIP_MIRROR = "endpointslice.kubernetes.io/skip-mirror"
LEADER = "control-plane.alpha.kubernetes.io/leader"
_FAMILIES: dict[str | None, Literal[4, 6]] = {"IPv4": 4, "IPv6": 6}
_NO_HINTS: frozenset[str] = frozenset()
_NO_NOTES: dict[str, str] = {}
_NO_CONDITIONS = wire.Conditions()


def parse_slice(w: wire.EndpointSlice, at: Subject) -> tuple[EndpointSlice, ...]:
    """Return the slice; nothing where it holds host names (``FQDN``), which no packet can be sent to."""
    family = _FAMILIES.get(w.address_type)
    if family is None:
        fields.one_of("addressType", w.address_type or "", ("IPv4", "IPv6", "FQDN"))
        return ()
    labels = (w.metadata and w.metadata.labels) or {}
    service, endpoints, ports = intern(labels.get(SERVICE_NAME, "")), _endpoints(w.endpoints or (), family, at), _ports(w.ports)
    changed_at = ((w.metadata and w.metadata.annotations) or _NO_NOTES).get(CHANGED_AT, "")
    made = EndpointSlice(
        at.namespace, at.name, service, family, endpoints, ports, labels=fields.labels(labels), changed_at=changed_at
    )
    return (made,)


def _endpoints(stated: Sequence[wire.Endpoint], family: int, at: Subject) -> tuple[Endpoint, ...]:
    """Return the endpoints; one without an address is left out, any other fault fails them all."""
    found: list[Endpoint] = []
    for i, e in enumerate(stated):
        if not e.addresses:
            at.skipped.append(Fault(f"endpoints[{i}].addresses", "must hold an address"))
            continue
        try:
            found.append(_endpoint(e, e.addresses[0], family, at.namespace))
        except Fault as fault:
            raise fault.under(f"endpoints[{i}]") from None
    return tuple(found)


def _endpoint(w: wire.Endpoint, text: str, family: int, namespace: str) -> Endpoint:
    """Return one endpoint, of which only the first address, ``text``, counts."""
    address: IPAddress | None = fields.plain_ipv4(text) if family == 4 else None
    if address is None:
        address = fields.routable_ip("addresses[0]", text)
        if address.version != family:
            raise Fault("addresses[0]", f"must be of IPv{family} as addressType says, is {shown(text)}")
    conditions, hints = w.conditions or _NO_CONDITIONS, w.hints
    return Endpoint(
        address,
        conditions.ready is not False,
        conditions.serving is not False,
        conditions.terminating is True,
        _node(w.node_name) if w.node_name else "",
        intern(w.zone) if w.zone else "",
        _names(hints.for_zones) if hints else _NO_HINTS,
        _names(hints.for_nodes) if hints else _NO_HINTS,
        _pod(w.target_ref, namespace) if w.target_ref else "",
    )


def _pod(ref: wire.TargetRef, namespace: str) -> str:
    return f"{ref.namespace or namespace}/{ref.name}" if ref.kind == "Pod" and ref.name else ""


def _names(stated: list[wire.Named] | None) -> frozenset[str]:
    return _hints(tuple([hint.name for hint in stated if hint.name])) if stated else _NO_HINTS


# -- what many endpoints have in common is one object ----------------------------------------------------------------


@lru_cache(maxsize=4096)
def _hints(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


@lru_cache(maxsize=16384)
def _node(name: str) -> str:
    """Return the name of a node; there are few beside what names them."""
    return fields.node_name("nodeName", name)


@lru_cache(maxsize=4096)
def _port(name: str | None, protocol: str | None, port: int | None) -> tuple[EndpointPort, ...]:
    """Return one port as the ports of a slice that has no other, which is most of them; nothing where it has no number."""
    title, kind = fields.label_name("name", name) if name else "", fields.protocol("protocol", protocol)
    return (EndpointPort(title, kind, fields.number("port", port, 1, 65535)),) if port else ()


def _ports(stated: list[wire.EndpointPort] | None) -> tuple[EndpointPort, ...]:
    """Return the ports that have a number; a name comes once."""
    found: tuple[EndpointPort, ...] = ()
    for i, w in enumerate(stated or ()):
        try:
            one = _port(w.name, w.protocol, w.port)
        except Fault as fault:
            raise fault.under(f"ports[{i}]") from None
        if found and one and any(p.name == one[0].name and p.protocol == one[0].protocol for p in found):
            raise Fault(f"ports[{i}].name", f"must not be used twice with {one[0].protocol}, is {shown(one[0].name)}")
        found = found + one if found else one
    return found


# -- Endpoints -------------------------------------------------------------------------------------------------------


def parse_endpoints(w: wire.Endpoints, at: Subject) -> tuple[EndpointSlice, ...]:
    """Return one slice for each family and set of ports, sorted by family; nothing where mirroring is declined."""
    labels = fields.labels(w.metadata.labels if w.metadata else None)
    annotations = (w.metadata and w.metadata.annotations) or {}
    if labels.get(SKIP_MIRROR) == "true" or LEADER in annotations:
        return ()
    groups: dict[tuple[int, tuple[EndpointPort, ...]], list[Endpoint]] = {}
    for i, subset in enumerate(w.subsets or ()):
        try:
            ports = tuple(sorted(_ports(subset.ports), key=lambda p: (p.name, p.protocol, p.port)))
            endpoints = _addresses(subset, at.namespace)
        except Fault as fault:
            raise fault.under(f"subsets[{i}]") from None
        for endpoint in endpoints:
            groups.setdefault((endpoint.address.version, ports), []).append(endpoint)
    made: list[EndpointSlice] = []
    numbers = {4: 0, 6: 0}
    for (family, ports), members in sorted(groups.items(), key=lambda group: group[0][0]):
        numbers[family] += 1
        title = f"{at.name}/ipv{family}" + (f"-{numbers[family]}" if numbers[family] > 1 else "")
        made.append(
            EndpointSlice(
                at.namespace, title, at.name, 4 if family == 4 else 6, tuple(members), ports, mirrored=True, labels=labels
            )
        )
    return tuple(made)


def _addresses(subset: wire.Subset, namespace: str) -> list[Endpoint]:
    """Return the endpoints of one subset, those that are not ready behind the others."""
    found: list[Endpoint] = []
    for field, ready, stated in (
        ("addresses", True, subset.addresses or ()),
        ("notReadyAddresses", False, subset.not_ready_addresses or ()),
    ):
        for i, w in enumerate(stated):
            address = fields.routable_ip(f"{field}[{i}].ip", w.ip)
            node = fields.node_name(f"{field}[{i}].nodeName", w.node_name) if w.node_name else ""
            pod = _pod(w.target_ref, namespace) if w.target_ref else ""
            found.append(Endpoint(address, ready=ready, node=node, pod=pod))
    return found
