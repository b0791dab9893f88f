"""What may happen to the first packet of a connection under a service table: slow, obvious, one for all modes.

Where a mode deviates from the common meaning, its traits say so (``modes.py``).

The oracle walks meaning, not rules. It is the judge of every renderer, of the rule simulator and of the real kernel, so it
shares no code with them beyond the table.

    which frontends does the packet meet?      its exact address first, then, on one of the node's own, a NodePort
    may this source use it?                     load balancer source ranges
    which pool answers?                         traffic policy; pods and the node itself are never held to Local from outside
    is the source replaced?                     masqueradeAll, from outside to a ClusterIP, policy Cluster, hairpin

"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from ipaddress import ip_address

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.address import Family, Prefix
from proxy.modes import TRAITS, ModeTraits
from proxy.settings import NodeFacts, ProxySettings, local_detector, node_port_scope
from proxy.table import Backend, Frontend, Kind, OnEmpty, ServiceEntry, ServiceTable


class Verdict(Enum):
    """What becomes of the packet."""

    DNAT = "dnat"
    """Sent to a backend."""
    REJECT = "reject"
    DROP = "drop"
    ACCEPT = "accept"
    """Not translated, and let in by name: a health check port."""
    PASS = "pass"  # noqa: S105
    """No Service: nothing is done."""


class Flow(msgspec.Struct, frozen=True):
    """The first packet of a new connection, as this node meets it."""

    source: IPAddress
    destination: IPAddress
    protocol: str
    """TCP, UDP or SCTP."""
    port: int
    from_node: bool = False
    """Sent by a process in the node's own network namespace."""
    interface: str = ""
    """The link it comes in through; empty if sent by the node or unknown."""
    by_socket: bool = False
    """A process of the node (``from_node``) or of one of its pods asks: by connect with TCP, else by a datagram's own address."""


class Outcome(msgspec.Struct, frozen=True, order=True):
    """One thing that may happen. ``backend`` is ``ip:port`` for DNAT, else empty."""

    verdict: str
    backend: str = ""
    masquerade: bool = False


class Judgement(msgspec.Struct, frozen=True):
    """Everything that may happen, and why, in sentences."""

    outcomes: frozenset[Outcome]
    because: tuple[str, ...]


class Oracle:
    """A service table with the settings and the node it is judged for."""

    def __init__(
        self,
        table: ServiceTable,
        settings: ProxySettings,
        node: NodeFacts,
        local_addresses: Iterable[IPAddress],
        traits: ModeTraits = TRAITS["iptables"],
    ) -> None:
        self.settings, self.node, self.traits = settings, node, traits
        self.local = frozenset(local_addresses)
        self.cluster_ips: set[IPAddress] = set()
        self.service_addresses: set[IPAddress] = set()
        self._by_address: dict[tuple[IPAddress | None, str, int], list[tuple[ServiceEntry, Frontend]]] = {}
        self._health_ports: dict[tuple[int, int], ServiceEntry] = {}
        for entry in table:
            for frontend in entry.frontends:
                if frontend.address is not None and self._is_excluded(frontend.address):
                    continue
                key = (frontend.address, entry.name.protocol, frontend.port)
                self._by_address.setdefault(key, []).append((entry, frontend))
                if frontend.address is not None:
                    self.service_addresses.add(frontend.address)
                    if frontend.kind is Kind.CLUSTER_IP:
                        self.cluster_ips.add(frontend.address)
            if entry.health_check_node_port:
                self._health_ports[entry.family, entry.health_check_node_port] = entry

    def judge(self, flow: Flow) -> Judgement:
        """Say everything that may happen to a flow."""
        because: list[str] = []
        if flow.by_socket and self.traits.asks_sockets:
            asked = self._ask_socket(flow, because)
            if asked is not None:
                return Judgement(asked, tuple(because))
        answering = self._met(flow, self._node_port_answers(flow))
        if self.traits.firewall_first and any(not self._source_allowed(e, f, flow) for e, f in answering):
            because.append(f"{flow.source} is outside loadBalancerSourceRanges: dropped")
            return Judgement(frozenset({Outcome(Verdict.DROP.value)}), tuple(because))
        for entry, frontend in self._first(answering):
            outcomes = self._translate(entry, frontend, flow, because)
            if outcomes:
                return Judgement(outcomes, tuple(because))
        for entry, frontend in self._first(self._met(flow, self._node_port_refuses(flow))):
            refusal = self._refusal(entry, frontend, flow, because)
            if refusal:
                return Judgement(frozenset({refusal}), tuple(because))
        return Judgement(frozenset({self._untranslated(flow, because)}), tuple(because))

    # -- at the socket -----------------------------------------------------------------------------------------------

    def _ask_socket(self, flow: Flow, because: list[str]) -> frozenset[Outcome] | None:
        """Say what a socket is told that asks for this flow; None: what it sends is left to be a packet like any other."""
        exact = self._by_address.get((flow.destination, flow.protocol, flow.port), ())
        met = self._met(flow, node_ports=not exact and self._socket_node_port_answers(flow))
        if len(met) != 1 or (exact and (self._is_local(flow.destination) or self._node_port_answers(flow))):
            return None
        entry, frontend = met[0]
        if not self._socket_may(entry, frontend, flow):
            return None
        pool = entry.pool(frontend.kind) if frontend.kind is Kind.CLUSTER_IP else entry.cluster
        where = f"{print_backend(flow.destination, flow.port)}/{flow.protocol} is a {frontend.kind.value} of {entry.name}"
        if pool:
            because.append(f"{where}: the socket is led to an endpoint")
            return frozenset(Outcome(Verdict.DNAT.value, b.name) for b in pool)
        if entry.pool(frontend.kind) or entry.on_empty is not OnEmpty.REJECT:
            return None
        because.append(f"{where}, which has no endpoint anywhere: the socket is refused")
        return frozenset({Outcome(Verdict.REJECT.value)})

    def _socket_may(self, entry: ServiceEntry, frontend: Frontend, flow: Flow) -> bool:
        """Whether a socket can be told at all: everything that depends on the packet's source cannot, nor what follows flows."""
        if flow.protocol == "TCP":
            can = self.settings.flows_to_removed == "keep"
        else:
            can = flow.protocol == "UDP" and not entry.affinity_seconds
        if not can or entry.consistent or self._is_guarded(entry, frontend):
            return False
        if flow.from_node:
            return True
        bound = frontend.kind is not Kind.CLUSTER_IP and entry.external_local
        told = local_detector(self.settings, self.node, flow.destination.version) is not None
        return not self.settings.masquerade_all and (told or not bound)

    def _socket_node_port_answers(self, flow: Flow) -> bool:
        """Whether NodePorts answer a socket: as they answer packets, and the node's own on loopback."""
        destination = flow.destination
        if destination.is_link_local:
            return False
        if not destination.is_loopback:
            return self._node_port_answers(flow)
        listed = self.settings.node_port_addresses
        same = [p for p in listed if isinstance(p, Prefix) and p.family == destination.version]
        anywhere = not same or any(p.contains(ip_address("127.0.0.1" if destination.version == 4 else "::1")) for p in same)
        return flow.from_node and self.settings.localhost_node_ports and anywhere

    # -- which frontends ---------------------------------------------------------------------------------------------

    def _met(self, flow: Flow, node_ports: bool) -> list[tuple[ServiceEntry, Frontend]]:
        """Return the frontends of the flow's exact address, then, if they are to count, the NodePorts of its port."""
        found = list(self._by_address.get((flow.destination, flow.protocol, flow.port), ()))
        if node_ports and not (found and self.traits.one_server):
            by_port = self._by_address.get((None, flow.protocol, flow.port), ())
            found += [(e, f) for e, f in by_port if e.family == flow.destination.version]
        return found

    def _first(self, met: list[tuple[ServiceEntry, Frontend]]) -> list[tuple[ServiceEntry, Frontend]]:
        """Return those that may decide: all in turn, or with one virtual server for each address and port the first."""
        return met[:1] if self.traits.one_server else met

    def _is_excluded(self, address: IPAddress) -> bool:
        return self.traits.excludes_cidrs and any(c.contains(address) for c in self.settings.exclude_cidrs)

    def _node_port_answers(self, flow: Flow) -> bool:
        destination = flow.destination
        if self._is_excluded(destination) or (self.traits.node_ports_off_link_local and destination.is_link_local):
            return False
        if destination.is_loopback and (destination.version == 6 or not self._opens_localhost):
            return False
        scope = node_port_scope(self.settings, self.node, destination.version)
        return scope.includes(destination, self._is_local(destination))

    def _node_port_refuses(self, flow: Flow) -> bool:
        """Whether an unanswered NodePort is refused here.

        With iptables on every own address, once NodePorts are open on any of them.
        """
        if self.traits.refuses_node_ports_in_scope:
            return self._node_port_answers(flow)
        scope = node_port_scope(self.settings, self.node, flow.destination.version)
        return self._is_local(flow.destination) and (scope.everywhere or bool(scope.addresses))

    @property
    def _opens_localhost(self) -> bool:
        return self.traits.localhost_node_ports and self.settings.localhost_node_ports

    def _is_local(self, address: IPAddress) -> bool:
        return address in self.local or address.is_loopback

    # -- translation -------------------------------------------------------------------------------------------------

    def _translate(self, entry: ServiceEntry, frontend: Frontend, flow: Flow, because: list[str]) -> frozenset[Outcome]:
        """Return the backends this frontend may send the flow to; empty if it sends it nowhere."""
        because.append(
            f"{print_backend(flow.destination, flow.port)}/{flow.protocol} is a {frontend.kind.value} of {entry.name}"
        )
        if frontend.kind is Kind.CLUSTER_IP:
            return self._to_cluster_ip(entry, flow, because)
        if not self._source_allowed(entry, frontend, flow):
            because.append(f"{flow.source} is outside loadBalancerSourceRanges")
            return frozenset()
        if not entry.external_local:
            because.append("externalTrafficPolicy Cluster: every endpoint, source replaced by the node's")
            return self._balance(entry, entry.cluster, flow, masquerade=True)
        if self.traits.local_binds_all:
            because.append("externalTrafficPolicy Local: endpoints on this node, whoever asks; source kept")
            return self._balance(entry, entry.local, flow, masquerade=False)
        if self._is_pod(flow):
            because.append("externalTrafficPolicy Local does not bind pods: every endpoint")
            return self._balance(entry, entry.cluster, flow, masquerade=False)
        if self._is_local(flow.source):
            because.append("externalTrafficPolicy Local does not bind the node itself: every endpoint, source replaced")
            return self._balance(entry, entry.cluster, flow, masquerade=True)
        because.append("externalTrafficPolicy Local: endpoints on this node, source kept")
        return self._balance(entry, entry.local, flow, masquerade=False)

    def _to_cluster_ip(self, entry: ServiceEntry, flow: Flow, because: list[str]) -> frozenset[Outcome]:
        detector = local_detector(self.settings, self.node, flow.destination.version)
        outsider = detector is not None and not self._is_pod(flow)
        if self.settings.masquerade_all:
            because.append("masqueradeAll: source replaced")
        elif outsider:
            because.append("the source is not a pod: replaced, so that replies come back this way")
        elif detector is None and self._from_cluster_ip(flow):
            outsider = True
            because.append("the node itself asks, from the ClusterIP it asks for: replaced")
        pool = entry.pool(Kind.CLUSTER_IP)
        because.append("internalTrafficPolicy Local: endpoints on this node" if entry.internal_local else "every endpoint")
        return self._balance(entry, pool, flow, masquerade=self.settings.masquerade_all or outsider)

    def _from_cluster_ip(self, flow: Flow) -> bool:
        """Whether the source is a ClusterIP that has the port: where the node holds ClusterIPs, it asks them from themselves."""
        same = self._by_address.get((flow.source, flow.protocol, flow.port), ())
        return self.traits.addresses_are_local and any(f.kind is Kind.CLUSTER_IP for _, f in same[:1])

    def _balance(self, entry: ServiceEntry, pool: tuple[Backend, ...], flow: Flow, *, masquerade: bool) -> frozenset[Outcome]:
        """One of the pool; a pod that meets itself is masqueraded, else it would see a packet from its own address."""
        everywhere = self.traits.hairpin_everywhere
        return frozenset(
            Outcome(Verdict.DNAT.value, b.name, masquerade or (b.address == flow.source and (everywhere or b.local)))
            for b in pool
        )

    def _is_pod(self, flow: Flow) -> bool:
        detector = local_detector(self.settings, self.node, flow.destination.version)
        return detector is not None and detector.is_local(flow.source, flow.interface)

    def _source_allowed(self, entry: ServiceEntry, frontend: Frontend, flow: Flow) -> bool:
        """Apply the source ranges: they guard the load balancer's address, and NodePorts if so set.

        The VIP itself is allowed where the node is.
        """
        if not self._is_guarded(entry, frontend):
            return True
        if any(flow.source in r for r in entry.source_ranges):
            return True
        vips = [f.address for f in entry.frontends if f.kind is Kind.LOAD_BALANCER]
        return flow.source in vips and any(a in r for a in self.node.addresses for r in entry.source_ranges)

    def _is_guarded(self, entry: ServiceEntry, frontend: Frontend) -> bool:
        guards_port = frontend.kind is Kind.NODE_PORT and self.settings.guard_node_ports
        return bool(entry.source_ranges) and (frontend.kind is Kind.LOAD_BALANCER or guards_port)

    # -- nobody answers ----------------------------------------------------------------------------------------------

    def _refusal(self, entry: ServiceEntry, frontend: Frontend, flow: Flow, because: list[str]) -> Outcome | None:
        """Say what happens to a packet that met this frontend and was not translated; None: nothing here."""
        if self._is_guarded(entry, frontend) and entry.reachable and not self.traits.firewall_first:
            because.append("dropped: not from an allowed source range")
            return Outcome(Verdict.DROP.value)
        if entry.pool(frontend.kind):
            return None
        if not self.traits.refuses_everywhere:
            if frontend.kind is not Kind.CLUSTER_IP and flow.from_node and not self._is_local(flow.destination):
                because.append("sent by the node to an address elsewhere: refusals are for what arrives here")
                return None
            if frontend.kind is Kind.CLUSTER_IP and self._is_local(flow.destination) and not flow.from_node:
                return None
        if entry.on_empty is OnEmpty.REJECT:
            because.append("no endpoint anywhere: rejected")
            return Outcome(Verdict.REJECT.value)
        because.append("endpoints exist, none on this node, and the policy is Local: dropped")
        return Outcome(Verdict.DROP.value)

    def _untranslated(self, flow: Flow, because: list[str]) -> Outcome:
        family: Family = flow.destination.version
        localnet = Prefix.parse("127.0.0.0/8")
        if self._opens_localhost and localnet.contains(flow.destination) and not localnet.contains(flow.source):
            because.append("127.0.0.0/8 is closed to everything but loopback")
            return Outcome(Verdict.DROP.value)
        health = self._health_ports.get((family, flow.port)) if self.traits.opens_health_check_ports else None
        held = self.traits.addresses_are_local and flow.destination in self.service_addresses
        refused = None if health is not None and held and flow.protocol == "TCP" else self._unknown_port(flow, because)
        if refused is not None:
            return refused
        if health is not None and flow.protocol == "TCP" and (held or self._is_local(flow.destination)):
            because.append(f"health check port of {health.name}: let in")
            return Outcome(Verdict.ACCEPT.value)
        if not because:
            because.append(f"no Service has {print_backend(flow.destination, flow.port)}/{flow.protocol}")
        return Outcome(Verdict.PASS.value)

    def _unknown_port(self, flow: Flow, because: list[str]) -> Outcome | None:
        """Say what happens to a packet for an address of the Services that none of them answers; None: nothing special."""
        destination = flow.destination
        if self.traits.addresses_are_local:
            if destination not in self.service_addresses or destination in self.local:
                return None
            because.append(f"{destination} is a Service's, held by this node, and no Service has the port: rejected")
            return Outcome(Verdict.REJECT.value)
        if self._is_local(destination) and not flow.from_node:
            return None
        if self.traits.refuses_unknown_ports and destination in self.cluster_ips:
            because.append(f"{destination} is a ClusterIP, and no Service has the port: rejected")
            return Outcome(Verdict.REJECT.value)
        if self.traits.drops_unallocated and any(c.contains(destination) for c in self.node.service_cidrs):
            because.append(f"{destination} is a ClusterIP that no Service has: dropped")
            return Outcome(Verdict.DROP.value)
        return None


def print_backend(address: IPAddress, port: int) -> str:
    """Print an address and port as backends are named: ``10.0.0.1:80`` or ``[fd00::1]:80``."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def parse_backend(name: str) -> tuple[IPAddress, int]:
    """Split a backend's printed name into address and port."""
    address, _, port = name.rpartition(":")
    return ip_address(address.strip("[]")), int(port)
