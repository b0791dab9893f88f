"""The service table as IPVS virtual servers and ipset members: what one entry contributes.

    Frontend --.                                 .--> VirtualServer  address, protocol, port; scheduler; real servers
               |--> Claim on one ServerKey ------+
    Backends --'                                 '--> members of the sets that the rules ask about this address and port

    entry -----> members no single address owns: hairpin endpoints, NodePorts by number, health check ports

An address, protocol and port is one virtual server, so whoever claims it has it alone: a Service's own address before a NodePort
that happens to be on the same address (the trait ``one_server``). A NodePort is a virtual server on every address of the node
where NodePorts answer. A frontend with nobody behind it is a virtual server without real servers, which the kernel answers with
port unreachable; where policy Local must stay silent instead, its address is in KUBE-NO-LOCAL, whose packets are dropped before
IPVS sees them.

``ipvs_program.py`` settles claims and counts members; ``ipvs_rules.py`` writes the rules that ask the sets.
Source: kube-proxy 1.36's set names and types are the contract; ipset(8), ipvsadm(8).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.address import BITS, Family, Prefix
from kernelstate.objects.ipvs import IpvsProtocol, RealServer, ServerKey, VirtualServer
from kernelstate.objects.sets import Member, SetSpec, SetType
from proxy.settings import NodeFacts, ProxySettings, node_port_scope
from proxy.table import Backend, Frontend, Kind, OnEmpty, ServiceEntry

LOOP_BACK = "KUBE-LOOP-BACK"
CLUSTER_IP = "KUBE-CLUSTER-IP"
EXTERNAL_IP = "KUBE-EXTERNAL-IP"
EXTERNAL_IP_LOCAL = "KUBE-EXTERNAL-IP-LOCAL"
LOAD_BALANCER = "KUBE-LOAD-BALANCER"
LOAD_BALANCER_LOCAL = "KUBE-LOAD-BALANCER-LOCAL"
GUARDED = "KUBE-LOAD-BALANCER-FW"
SOURCE_IP = "KUBE-LOAD-BALANCER-SOURCE-IP"
SOURCE_CIDR = "KUBE-LOAD-BALANCER-SOURCE-CIDR"
NODE_PORT = {"tcp": "KUBE-NODE-PORT-TCP", "udp": "KUBE-NODE-PORT-UDP", "sctp": "KUBE-NODE-PORT-SCTP-HASH"}
NODE_PORT_LOCAL = {
    "tcp": "KUBE-NODE-PORT-LOCAL-TCP",
    "udp": "KUBE-NODE-PORT-LOCAL-UDP",
    "sctp": "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
}
HEALTH_CHECK = "KUBE-HEALTH-CHECK-NODE-PORT"
HELD = "KUBE-IPVS-IPS"
NO_LOCAL = "KUBE-NO-LOCAL"

SET_TYPES: dict[str, SetType] = {
    LOOP_BACK: "hash:ip,port,ip",
    CLUSTER_IP: "hash:ip,port",
    EXTERNAL_IP: "hash:ip,port",
    EXTERNAL_IP_LOCAL: "hash:ip,port",
    LOAD_BALANCER: "hash:ip,port",
    LOAD_BALANCER_LOCAL: "hash:ip,port",
    GUARDED: "hash:ip,port",
    SOURCE_IP: "hash:ip,port,ip",
    SOURCE_CIDR: "hash:ip,port,net",
    NODE_PORT["tcp"]: "bitmap:port",
    NODE_PORT_LOCAL["tcp"]: "bitmap:port",
    NODE_PORT["udp"]: "bitmap:port",
    NODE_PORT_LOCAL["udp"]: "bitmap:port",
    NODE_PORT["sctp"]: "hash:ip,port",
    NODE_PORT_LOCAL["sctp"]: "hash:ip,port",
    HEALTH_CHECK: "bitmap:port",
    HELD: "hash:ip",
    NO_LOCAL: "hash:ip,port",
}
"""Every set there may be, by its IPv4 name. All but KUBE-NO-LOCAL are kube-proxy's."""

SET_PREFIX = "KUBE-"
"""A set whose name starts like this is ours."""

SetMember = tuple[str, Member]
"""A member with the IPv4 name of its set."""


def set_name(name: str, family: Family) -> str:
    """Return a set's name in a family: ``KUBE-CLUSTER-IP``, ``KUBE-6-CLUSTER-IP``; the kernel allows 31 characters."""
    return name if family == 4 else ("KUBE-6-" + name.removeprefix(SET_PREFIX))[:31]


def set_spec(name: str, family: Family) -> SetSpec:
    """Return the set of this IPv4 name in a family."""
    kind = SET_TYPES[name]
    return SetSpec(set_name(name, family), kind, 4 if kind == "bitmap:port" else family)


class IpvsContext(msgspec.Struct, frozen=True):
    """What an entry's part depends on besides the entry: one value for a family."""

    family: Family
    scheduler: str
    by_port: bool
    node_ports: tuple[int, ...]
    """The addresses on which NodePorts answer."""
    own: frozenset[int]
    """Addresses on the node's other links: a Service that has one of them does not need it on ``kube-ipvs0``."""
    excluded: tuple[Prefix, ...]
    guard_node_ports: bool
    node_addresses: tuple[IPAddress, ...]
    """The Node's addresses: source ranges that hold one of them allow the load balancer's address itself as source."""
    problem: str = ""

    @classmethod
    def of(cls, settings: ProxySettings, node: NodeFacts, family: Family) -> IpvsContext:
        """Derive it for one family."""
        own = [p for p in node.local_addresses if p.family == family]
        scope = node_port_scope(settings, node, family)
        answering = [p for p in (own if scope.everywhere else scope.addresses) if _can_answer(p)]
        return cls(
            family,
            settings.scheduler,
            settings.scheduler_by_port and settings.scheduler in _HASHING,
            tuple(p.network for p in answering),
            frozenset(p.network for p in own),
            tuple(p for p in settings.exclude_cidrs if p.family == family),
            settings.guard_node_ports,
            tuple(a for a in node.addresses if a.version == family),
            scope.problem,
        )


CONSISTENT = "mh"
"""The scheduler of Services with consistent hashing: Maglev, the same on every node."""
_HASHING = frozenset({"sh", "mh"})
_NEVER = [Prefix.parse("127.0.0.0/8"), Prefix.parse("::1/128"), Prefix.parse("fe80::/10")]


def _can_answer(address: Prefix) -> bool:
    """Whether IPVS can have a NodePort there: it neither sends on from loopback nor tells links with fe80:: apart."""
    return not any(_inside(address.network, p) for p in _NEVER if p.family == address.family)


def _inside(address: int, prefix: Prefix) -> bool:
    return (address ^ prefix.network) >> (BITS[prefix.family] - prefix.length) == 0


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What an address, protocol and port shall be: a virtual server, and the members its address and port give to sets."""

    server: VirtualServer
    members: tuple[SetMember, ...]


class EntryPart(msgspec.Struct, frozen=True):
    """One entry's part in a node's IPVS."""

    family: Family
    claims: dict[ServerKey, Claim]
    """On the Service's own addresses."""
    node_ports: dict[ServerKey, Claim]
    """On the node's."""
    members: tuple[SetMember, ...]
    excluded: tuple[str, ...] = ()
    """Addresses left to somebody else (excludeCIDRs), as printed."""


def render_entry(entry: ServiceEntry, context: IpvsContext) -> EntryPart:
    """Write one entry's part."""
    frontends = entry.frontends
    if len(frontends) == 1 and frontends[0].kind is Kind.CLUSTER_IP and entry.cluster and not context.excluded:
        return _render_plain(entry, context)
    return EntryWriter(entry, context).write()


def _render_plain(entry: ServiceEntry, context: IpvsContext) -> EntryPart:
    """Write the part of a ClusterIP with somebody behind it, as most are: what ``EntryWriter`` writes, in a third of its time."""
    frontend, protocol = entry.frontends[0], PROTOCOLS[entry.name.protocol]
    pool = entry.local if entry.internal_local else entry.cluster
    if not pool or entry.health_check_node_port:
        return EntryWriter(entry, context).write()
    address, port = int(frontend.address), frontend.port  # type: ignore[arg-type]  # a ClusterIP has one
    members: tuple[SetMember, ...] = ((CLUSTER_IP, (address, protocol, port)),)
    if address not in context.own:
        members += ((HELD, (address,)),)
    claim = Claim(_server(entry, context, _reals(pool)), members)
    return EntryPart(
        context.family, {ServerKey(context.family, protocol, address, port): claim}, {}, tuple(_hairpins(entry, protocol))
    )


class EntryWriter:
    """What all frontends of one entry share."""

    def __init__(self, entry: ServiceEntry, context: IpvsContext) -> None:
        self.entry, self.context = entry, context
        self.protocol: IpvsProtocol = PROTOCOLS[entry.name.protocol]
        self.servers = {pool: _server(entry, context, _reals(entry.local if pool else entry.cluster)) for pool in (False, True)}

    def write(self) -> EntryPart:
        """Write every frontend, then what belongs to none of them."""
        claims: dict[ServerKey, Claim] = {}
        node_ports: dict[ServerKey, Claim] = {}
        shared: list[SetMember] = []
        excluded: list[str] = []
        for frontend in self.entry.frontends:
            if frontend.address is None:
                node_ports |= {self._key(a, frontend): self._claim(frontend, a) for a in self._node_addresses()}
                shared += self._by_number(frontend) if node_ports else ()
            elif self._is_excluded(int(frontend.address)):
                excluded.append(str(frontend.address))
            else:
                key = self._key(int(frontend.address), frontend)
                claims[key] = self._joined(claims.get(key), frontend, key.address)
        if claims or node_ports:
            shared += _hairpins(self.entry, self.protocol)
        if self.entry.health_check_node_port:
            shared.append((HEALTH_CHECK, (self.entry.health_check_node_port,)))
        return EntryPart(self.context.family, claims, node_ports, tuple(shared), tuple(excluded))

    def _key(self, address: int, frontend: Frontend) -> ServerKey:
        return ServerKey(self.context.family, self.protocol, address, frontend.port)

    def _node_addresses(self) -> list[int]:
        return [a for a in self.context.node_ports if not self._is_excluded(a)]

    def _is_excluded(self, address: int) -> bool:
        return any(_inside(address, p) for p in self.context.excluded)

    def _joined(self, before: Claim | None, frontend: Frontend, address: int) -> Claim:
        """Return the claim of a frontend; one that repeats another's address adds its guard to it, and nothing else."""
        if before is None:
            return self._claim(frontend, address)
        return Claim(before.server, (*before.members, *self._guard(frontend, address)))

    def _claim(self, frontend: Frontend, address: int) -> Claim:
        kind, member = frontend.kind, (address, self.protocol, frontend.port)
        server = self.servers[self.entry.internal_local if kind is Kind.CLUSTER_IP else self.entry.external_local]
        members: list[SetMember] = [(name, member) for name in self._sets(kind)]
        if not server.real_servers and self.entry.on_empty is OnEmpty.DROP:
            members.append((NO_LOCAL, member))
        if kind is not Kind.NODE_PORT and address not in self.context.own:
            members.append((HELD, (address,)))
        members += self._guard(frontend, address)
        return Claim(server, tuple(members))

    def _sets(self, kind: Kind) -> tuple[str, ...]:
        """Return the sets that hold the address and port of a kind of frontend."""
        local = self.entry.external_local
        match kind:
            case Kind.CLUSTER_IP:
                return (CLUSTER_IP,)
            case Kind.EXTERNAL_IP:
                return (EXTERNAL_IP_LOCAL if local else EXTERNAL_IP,)
            case Kind.LOAD_BALANCER:
                return (LOAD_BALANCER, LOAD_BALANCER_LOCAL) if local else (LOAD_BALANCER,)
            case Kind.NODE_PORT if self.protocol == "sctp":
                return (NODE_PORT["sctp"], NODE_PORT_LOCAL["sctp"]) if local else (NODE_PORT["sctp"],)
            case Kind.NODE_PORT:
                return ()  # in sets of bare port numbers, which no single address owns

    def _by_number(self, frontend: Frontend) -> list[SetMember]:
        """Return the members of a TCP or UDP NodePort: its number alone."""
        if self.protocol == "sctp":
            return []
        names = [NODE_PORT[self.protocol]]
        if self.entry.external_local:
            names.append(NODE_PORT_LOCAL[self.protocol])
        return [(name, (frontend.port,)) for name in names]

    def _guard(self, frontend: Frontend, address: int) -> Iterator[SetMember]:
        """Yield the members that let in the allowed sources only."""
        ranges, kind = self.entry.source_ranges, frontend.kind
        if not ranges or not (kind is Kind.LOAD_BALANCER or (kind is Kind.NODE_PORT and self.context.guard_node_ports)):
            return
        member = (address, self.protocol, frontend.port)
        yield GUARDED, member
        for one in ranges:
            yield SOURCE_CIDR, (*member, (int(one.network_address), one.prefixlen))
        if any(a in one for a in self.context.node_addresses for one in ranges):
            for other in self.entry.frontends:
                if other.kind is Kind.LOAD_BALANCER and other.address is not None:
                    yield SOURCE_IP, (*member, int(other.address))


def _server(entry: ServiceEntry, context: IpvsContext, reals: tuple[RealServer, ...]) -> VirtualServer:
    if entry.consistent:  # by the client's address alone: whatever port it comes from, it meets the same endpoint
        return VirtualServer(CONSISTENT, reals, entry.affinity_seconds)
    return VirtualServer(context.scheduler, reals, entry.affinity_seconds, context.by_port)


def _reals(pool: tuple[Backend, ...]) -> tuple[RealServer, ...]:
    return tuple(sorted([RealServer(int(b.address), b.port) for b in pool]))


def _hairpins(entry: ServiceEntry, protocol: IpvsProtocol) -> list[SetMember]:
    """Return a member for each endpoint on this node: the packet it sends to itself through the Service."""
    return [(LOOP_BACK, (number, protocol, b.port, number)) for b in entry.reachable if b.local for number in (int(b.address),)]


PROTOCOLS: dict[str, IpvsProtocol] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
