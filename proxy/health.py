"""What a load balancer hears that asks this node whether to send a Service's traffic here.

    load balancer --HTTP--> node: healthCheckNodePort        200  endpoints of the Service on this node are ready
                                                             503  none is, or Services are not kept up to date here

Only Services of type LoadBalancer with externalTrafficPolicy Local have such a port. Each family answers for itself, with its
own endpoints: an IPv6 load balancer is not told of IPv4 pods. Decides who answers where, what, and how it is written; sockets
are ``nodeplane/http_ports.py``. Source: kube-proxy 1.36's answers, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import TypeAlias

import msgspec

from clusterstate.objects import EndpointSlice, Service
from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from proxy.compile import SERVICE_PROXY_NAME
from proxy.settings import NodeFacts, ProxySettings, node_port_scope

Places: TypeAlias = Mapping[Family, tuple[str, ...]]
"""The addresses on which health check ports of a family are open."""

EVERYWHERE: dict[int, str] = {4: "0.0.0.0", 6: "::"}


class HealthEndpoint(msgspec.Struct, frozen=True, gc=False):
    """One Service's health check port in one family. ``local_ready`` counts addresses, over all ports of the Service."""

    service: Name
    family: Family
    port: int
    local_ready: int


def service_health(service: Service, slices: Iterable[EndpointSlice], node: str) -> tuple[HealthEndpoint, ...]:
    """Return the health endpoints of one Service, one a family; none where it asks for none.

    A terminating endpoint does not count, even where traffic falls back to it: the load balancer should go elsewhere.
    """
    asks = service.type == "LoadBalancer" and service.external_policy == "Local" and service.health_check_node_port
    if not asks or SERVICE_PROXY_NAME in service.labels:
        return ()
    ready: dict[int, set[int]] = {}
    for one in slices:
        found = ready.setdefault(one.family, set())
        if one.ports:
            found |= {int(e.address) for e in one.endpoints if e.ready and e.node == node != ""}
    families: list[Family] = sorted({a.version for a in service.cluster_ips})
    name, port = (service.namespace, service.name), service.health_check_node_port
    return tuple([HealthEndpoint(name, family, port, len(ready.get(family, ()))) for family in families])


def health_places(settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> dict[Family, tuple[str, ...]]:
    """Return where health check ports are open: where NodePorts answer, on the wildcard address if that is everywhere."""
    found: dict[Family, tuple[str, ...]] = {}
    for family in families:
        scope = node_port_scope(settings, node, family)
        found[family] = (EVERYWHERE[family],) if scope.everywhere else tuple(a.address_text for a in scope.addresses)
    return found


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer: status, headers in order, body."""

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...]
    body: bytes


def answer(endpoint: HealthEndpoint, *, healthy: bool) -> Answer:
    """Return what is said on a health check port. ``healthy``: whether Services are kept up to date on this node."""
    namespace, name = (json.dumps(part) for part in endpoint.service)
    lines = (
        "{",
        '\t"service": {',
        f'\t\t"namespace": {namespace},',
        f'\t\t"name": {name}',
        "\t},",
        f'\t"localEndpoints": {endpoint.local_ready},',
        f'\t"serviceProxyHealthy": {"true" if healthy else "false"}',
        "}",
    )
    headers = (
        ("Content-Type", "application/json"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Load-Balancing-Endpoint-Weight", str(endpoint.local_ready)),
    )
    status = HTTPStatus.OK if endpoint.local_ready and healthy else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, headers, "\n".join(lines).encode())
