"""Services at the socket: which of them a process's connect or sendmsg leads straight to an endpoint, and which are left to rules.

    ClusterIP, externalIP, load balancer, NodePort --> an endpoint of the pool, the source kept

The rules beneath are those of mode nftables, whole: whatever is left to them happens as it does there. Left to them is

    SCTP                                       the kernel has no such hook
    UDP with affinity                          connected sockets meet the rules, which would remember another endpoint
    consistent hashing                         of the client's address, which a socket has not chosen yet
    loadBalancerSourceRanges                   ask for that address as well
    masqueradeAll, for pods                    the source is to be replaced, whoever asks
    policy Local outside, for pods             where nobody said how pods are told from others: they are held to it
    TCP, if removed endpoints end flows        what ends them finds them in the connection table
    an address that is both a Service's and the node's own, or claimed twice

Pods are all who ask from another network namespace than the node's. Nobody's source is replaced: a process on the node has an
address that answers reach, and so has a pod. ``ebpf_program.py`` puts together what this file says of one Service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from ipaddress import ip_address
from typing import NamedTuple

import msgspec

from kernelstate.objects.address import BITS, Family, Prefix
from kernelstate.objects.ebpf import NODE_PORT, Pool, SocketFrontend, SocketProtocol, SocketService, Who
from proxy.settings import NodeFacts, ProxySettings, local_detector, node_port_scope
from proxy.table import Backend, Frontend, Kind, OnEmpty, ServiceEntry

PROTOCOLS: dict[str, SocketProtocol] = {"TCP": "tcp", "UDP": "udp"}
EVERYBODY = Who.NODE | Who.PODS
LEFT = SocketService(0, Who.NOBODY)
"""A frontend that is known, so that no NodePort is taken in its place, and left to rules."""
LOOPBACK: dict[Family, Prefix] = {4: Prefix.parse("127.0.0.1/32"), 6: Prefix.parse("::1/128")}


class SocketContext(NamedTuple):
    """What settings and node mean for sockets."""

    pods: Who
    """PODS unless their source has to be replaced."""
    held_pods: frozenset[Family]
    """Families in which pods are held to external policy Local."""
    guards_node_ports: bool
    protocols: frozenset[str]
    own: frozenset[tuple[Family, int]]
    """The node's addresses, and those on which NodePorts answer."""
    pod_networks: Mapping[Family, tuple[tuple[int, int], ...]]
    """Network and mask of what pods have addresses from: what a pod sends there keeps its source."""

    @classmethod
    def of(cls, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> SocketContext:
        """Resolve it."""
        families = tuple(families)
        networks = node.pod_networks or settings.cluster_cidrs
        return cls(
            Who.NOBODY if settings.masquerade_all else Who.PODS,
            frozenset(f for f in families if local_detector(settings, node, f) is None),
            settings.guard_node_ports,
            frozenset(PROTOCOLS if settings.flows_to_removed == "keep" else {"UDP"}),
            frozenset({(p.family, p.network) for p in node.local_addresses} | own_addresses(settings, node, families).keys()),
            {f: tuple(_masked(p) for p in networks if p.family == f) for f in families},
        )


class SocketContribution(msgspec.Struct, frozen=True):
    """One Service's part."""

    frontends: dict[SocketFrontend, SocketService]
    pools: dict[int, Pool]


NOTHING = SocketContribution({}, {})


def own_addresses(settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> dict[tuple[Family, int], Who]:
    """Return where NodePorts answer, and to whom. Loopback is the node's own processes' alone: a pod has another.

    A link-local address means nothing without its link, so NodePorts there are left to rules.
    """
    found: dict[tuple[Family, int], Who] = {}
    for family in families:
        scope = node_port_scope(settings, node, family)
        candidates = node.local_addresses if scope.everywhere else scope.addresses
        for address in candidates:
            ip = ip_address(address.address_text)
            if address.family == family and not ip.is_loopback and not ip.is_link_local:
                found[family, address.network] = EVERYBODY
        if settings.localhost_node_ports and _covers_loopback(settings, family):
            found[family, LOOPBACK[family].network] = Who.NODE
    return found


def _covers_loopback(settings: ProxySettings, family: Family) -> bool:
    """Whether NodePorts answer on loopback: unless nodePortAddresses lists others."""
    wanted = settings.node_port_addresses
    if wanted == "primary":
        return True
    of_family = [p for p in wanted if p.family == family]
    return not of_family or any(p.contains(ip_address(LOOPBACK[family].address_text)) for p in of_family)


def render_entries(context: SocketContext, entries: Iterable[ServiceEntry]) -> SocketContribution:
    """Render all entries of one Service."""
    frontends: dict[SocketFrontend, SocketService] = {}
    pools: dict[int, Pool] = {}
    for entry in entries:
        protocol = PROTOCOLS.get(entry.name.protocol)
        if protocol is None:
            continue
        for frontend in entry.frontends:
            key = SocketFrontend(
                entry.family, protocol, NODE_PORT if frontend.address is None else int(frontend.address), frontend.port
            )
            is_own = frontend.address is not None and (entry.family, key.address) in context.own
            if is_own or key in frontends or _is_left(context, entry, frontend):
                frontends[key] = LEFT
            else:
                frontends[key] = _service(context, entry, frontend, pools)
    used = {service.pool for service in frontends.values()}
    return SocketContribution(frontends, {number: pool for number, pool in pools.items() if number in used})


def _is_left(context: SocketContext, entry: ServiceEntry, frontend: Frontend) -> bool:
    guarded = frontend.kind is Kind.LOAD_BALANCER or (frontend.kind is Kind.NODE_PORT and context.guards_node_ports)
    return (
        entry.consistent
        or entry.name.protocol not in context.protocols
        or (entry.name.protocol == "UDP" and entry.affinity_seconds > 0)
        or (guarded and bool(entry.source_ranges))
    )


def _service(context: SocketContext, entry: ServiceEntry, frontend: Frontend, pools: dict[int, Pool]) -> SocketService:
    """Say who is led where. Policy Local outside binds neither pods nor the node: they reach every endpoint."""
    inside = frontend.kind is Kind.CLUSTER_IP
    is_local = inside and entry.internal_local
    backends = entry.local if is_local else entry.cluster
    who = Who.NODE | context.pods
    if not inside and entry.external_local and entry.family in context.held_pods:
        who = Who.NODE
    if not backends:
        refuses = not entry.pool(frontend.kind) and entry.on_empty is OnEmpty.REJECT
        return SocketService(0, who, refuses)
    number = pool_number(entry, is_local=is_local)
    if number not in pools:
        pools[number] = _pool(context, entry, backends)
    return SocketService(number, who, affinity=entry.affinity_seconds)


def _pool(context: SocketContext, entry: ServiceEntry, backends: tuple[Backend, ...]) -> Pool:
    protocol = PROTOCOLS[entry.name.protocol]
    endpoints = tuple([(int(b.address), b.port) for b in backends])
    networks = context.pod_networks.get(entry.family, ())
    pods_only = all(any(address & mask == network for network, mask in networks) for address, _ in endpoints)
    return Pool(entry.family, protocol, endpoints, protocol == "udp" or entry.affinity_seconds > 0, pods_only)


def _masked(prefix: Prefix) -> tuple[int, int]:
    bits = BITS[prefix.family]
    return prefix.network, (1 << bits) - (1 << (bits - prefix.length))


def pool_number(entry: ServiceEntry, *, is_local: bool) -> int:
    """Return the number of a pool, which stays whatever its endpoints: clients are remembered by it, over any restart."""
    text = f"{entry.name}|{entry.name.protocol}|{entry.family}|{'local' if is_local else 'cluster'}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1
