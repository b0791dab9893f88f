"""Services and EndpointSlices become the service table. Decides meaning; knows no mode.

``compile_service`` is a pure function of one Service, its slices and the node's facts. ``ServiceCompiler`` keeps its results,
so that a change compiles only the Services it touches, and settles between Services what no single one can know: the same
address and port claimed twice. The Service first in order of (namespace, name) wins; the others lose that frontend, and it
is reported.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from clusterstate.objects import EndpointSlice, ObjectRef, Service, ServicePort
from clusterstate.snapshot import Name, Snapshot
from kernelstate.objects.address import Family, address_text
from proxy.eligibility import Candidate, eligible_backends
from proxy.settings import NodeFacts
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry, ServiceTable

SERVICE_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
"""A Service with this label belongs to another proxy."""

FrontendKey = tuple[int, int, str, int]
"""(family, address as a number or -1 for a NodePort, protocol, port)."""


BALANCE = "nodeplane.dev/balance"
"""Annotation on a Service: ``consistent-hash`` sends one client to the same endpoint from every node."""

UDP_ONLY = frozenset({"UDP"})


def compile_service(
    service: Service, slices: Iterable[EndpointSlice], node: NodeFacts, tracked: frozenset[str] = UDP_ONLY
) -> tuple[ServiceEntry, ...]:
    """Compile one Service: an entry for each family and port, in that order; none where it is not this proxy's.

    Headless and ExternalName Services have no address to answer on; a Service with the label service-proxy-name is
    somebody else's. ``tracked`` are the protocols whose flows are followed: their entries tell who still serves.
    """
    if not service.cluster_ips or service.type == "ExternalName" or SERVICE_PROXY_NAME in service.labels:
        return ()
    slices = tuple(slices)
    ports = service.ports
    if len(ports) > 1:
        ports = tuple(sorted(ports, key=lambda p: (p.name, p.protocol)))
    entries = []
    for family in _families(service):
        of_family = [s for s in slices if s.family == family]
        entries += [_compile_port(service, port, family, of_family, node, tracked=tracked) for port in ports]
    return tuple(entries)


def _families(service: Service) -> list[Family]:
    if len(service.cluster_ips) == 1:
        return [service.cluster_ips[0].version]
    return sorted({a.version for a in service.cluster_ips})


def _compile_port(
    service: Service,
    port: ServicePort,
    family: Family,
    slices: list[EndpointSlice],
    node: NodeFacts,
    *,
    tracked: frozenset[str],
) -> ServiceEntry:
    frontends = _frontends(service, port, family)
    external = len(frontends) > 1  # the first is the ClusterIP
    internal_local = service.internal_policy == "Local"
    external_local = service.external_policy == "Local" and external
    candidates = _candidates(slices, port, node.name)
    chosen = eligible_backends(
        candidates,
        node=node.name,
        zone=node.zone,
        uses_cluster=not internal_local or external,
        uses_local=internal_local or external_local,
    )
    has_health_check = service.type == "LoadBalancer" and service.external_policy == "Local"
    return ServiceEntry(
        name=PortName(service.namespace, service.name, port.name, port.protocol),
        family=family,
        frontends=frontends,
        cluster=chosen.cluster,
        local=chosen.local,
        internal_local=internal_local,
        external_local=external_local,
        has_any=chosen.has_any,
        affinity_seconds=service.affinity_seconds,
        source_ranges=tuple([r for r in service.source_ranges if r.version == family]) if service.source_ranges else (),
        health_check_node_port=service.health_check_node_port if has_health_check else 0,
        serving=tuple([c.backend for c in candidates if c.endpoint.serving]) if port.protocol in tracked else (),
        consistent=service.annotations.get(BALANCE) == "consistent-hash",
    )


def _frontends(service: Service, port: ServicePort, family: Family) -> tuple[Frontend, ...]:
    found = [Frontend(Kind.CLUSTER_IP, a, port.port) for a in service.cluster_ips if a.version == family][:1]
    if service.external_ips:
        found += [Frontend(Kind.EXTERNAL_IP, a, port.port) for a in service.external_ips if a.version == family]
    if service.type == "LoadBalancer":
        found += [
            Frontend(Kind.LOAD_BALANCER, ingress.ip, port.port)
            for ingress in service.load_balancer
            if ingress.ip.version == family and ingress.ip_mode == "VIP"
        ]
    if port.node_port and service.type in {"NodePort", "LoadBalancer"}:
        found.append(Frontend(Kind.NODE_PORT, None, port.node_port))
    return tuple(found)


def _candidates(slices: list[EndpointSlice], port: ServicePort, node: str) -> list[Candidate]:
    """Collect the endpoints of one ServicePort, each address and port once, in the order of their printed names."""
    found: dict[str, Candidate] = {}
    for one in slices:
        family = one.family
        for number in [p.port for p in one.ports if p.name == port.name and p.protocol == port.protocol]:
            for endpoint in one.endpoints:
                address = address_text(family, int(endpoint.address))
                name = f"{address}:{number}" if family == 4 else f"[{address}]:{number}"
                if endpoint.terminating and name in found:
                    continue  # while slices are rewritten an endpoint may be in two: the living entry counts
                local = endpoint.node == node != ""
                found[name] = Candidate(Backend(name, endpoint.address, number, local), endpoint)
    return [found[name] for name in sorted(found)] if len(found) > 1 else list(found.values())


class ServiceCompiler:
    """The compiled Services of one node, kept up to date change by change.

    ``entries`` maps each Service to its entries after conflicts are settled. Whatever the order of changes, the result is
    that of compiling the last snapshot afresh.
    """

    def __init__(self, node: NodeFacts, tracked: frozenset[str] = UDP_ONLY) -> None:
        self.node = node
        self.tracked = tracked
        self.entries: dict[Name, tuple[ServiceEntry, ...]] = {}
        self._compiled: dict[Name, tuple[ServiceEntry, ...]] = {}
        self._claims: dict[FrontendKey, tuple[Name, ...]] = {}
        self._contested: set[FrontendKey] = set()
        self._problems: dict[Name, tuple[str, ...]] = {}

    def update(self, snapshot: Snapshot, names: Iterable[Name] | None) -> dict[Name, tuple[ServiceEntry, ...]]:
        """Compile the Services in ``names`` again (None: all) and return those whose entries changed, as they were before."""
        todo = set(self._compiled) | set(snapshot.services) if names is None else set(names)
        unsettled: dict[Name, None] = {}
        for name in sorted(todo):  # in order, so that what is used together later lies together in memory
            service = snapshot.services.get(name)
            compiled = compile_service(service, snapshot.slices_of(name), self.node, self.tracked) if service else ()
            before = self._compiled.get(name, ())
            if compiled == before:
                continue
            if compiled:
                self._compiled[name] = compiled
            else:
                del self._compiled[name]
            unsettled[name] = None
            lost, won = _claimed(before) if before else [], _claimed(compiled)
            if lost != won:
                unsettled |= dict.fromkeys(self._move_claims(name, lost, won))
        changed = {}
        for name in unsettled:
            before = self.entries.get(name, ())
            if self._settle(name):
                changed[name] = before
        return changed

    @property
    def problems(self) -> tuple[str, ...]:
        """Frontends that lost against another Service, one line each, sorted by Service."""
        return tuple(line for name in sorted(self._problems) for line in self._problems[name])

    @property
    def table(self) -> ServiceTable:
        """The table as a value: a copy, so that it stays as it is."""
        return ServiceTable(dict(self.entries), self.problems)

    def _move_claims(self, name: Name, before: list[FrontendKey], after: list[FrontendKey]) -> set[Name]:
        """Replace a Service's claims and return the others that win or lose a frontend by it."""
        touched: set[Name] = set()
        for key in before:
            left = tuple([n for n in self._claims.pop(key) if n != name])
            if left:
                touched.update(left)
                self._claims[key] = left
            if len(left) < 2:
                self._contested.discard(key)
        for key in after:
            held = self._claims.get(key)
            if held is None:
                self._claims[key] = (name,)
            else:
                touched.update(held)
                self._claims[key] = tuple(sorted((*held, name)))
                self._contested.add(key)
        return touched

    def _settle(self, name: Name) -> bool:
        """Take from a Service's entries the frontends it lost; return whether its entries differ from before."""
        entries = self._compiled.get(name, ())
        self._problems.pop(name, None)
        if self._contested:
            entries = self._without_lost(name, entries)
        before = self.entries.pop(name, ())
        if entries:
            self.entries[name] = entries
        return before != entries

    def _without_lost(self, name: Name, entries: tuple[ServiceEntry, ...]) -> tuple[ServiceEntry, ...]:
        kept, problems = [], []
        for entry in entries:
            lost = [f for f in entry.frontends if self._claims[_key(entry, f)][0] != name]
            problems += [_problem(entry, f, self._claims[_key(entry, f)][0]) for f in lost]
            left = tuple([f for f in entry.frontends if f not in lost])
            kept.append(msgspec.structs.replace(entry, frontends=left) if lost else entry)
        if problems:
            self._problems[name] = tuple(problems)
        return tuple(kept)


def compile_table(snapshot: Snapshot, node: NodeFacts) -> ServiceTable:
    """Compile a whole snapshot."""
    compiler = ServiceCompiler(node)
    compiler.update(snapshot, None)
    return compiler.table


def _key(entry: ServiceEntry, frontend: Frontend) -> FrontendKey:
    address = -1 if frontend.address is None else int(frontend.address)
    return entry.family, address, entry.name.protocol, frontend.port


def _claimed(entries: tuple[ServiceEntry, ...]) -> list[FrontendKey]:
    """Return the frontends claimed by a Service, each once (a Service may repeat an address as ClusterIP and externalIP)."""
    return list(dict.fromkeys([_key(e, f) for e in entries for f in e.frontends]))


_FIELDS = {
    Kind.CLUSTER_IP: "spec.clusterIP",
    Kind.EXTERNAL_IP: "spec.externalIPs",
    Kind.LOAD_BALANCER: "status.loadBalancer.ingress",
    Kind.NODE_PORT: "spec.ports[].nodePort",
}


def _problem(entry: ServiceEntry, frontend: Frontend, winner: Name) -> str:
    loser = ObjectRef("Service", entry.name.namespace, entry.name.service)
    value = frontend.port if frontend.address is None else f"{frontend.address} port {frontend.port}"
    return f"{loser}: {_FIELDS[frontend.kind]}: {value}/{entry.name.protocol} is taken by {ObjectRef('Service', *winner)}"
