"""What one Service contributes to the nftables table: its elements, the chains they lead to, and the memory of its clients.

    10.96.0.1 . tcp . 80                  services:  goto cluster-ip-3           (shared by all with three endpoints)
    10.96.0.1 . tcp . 80 . 0              endpoints: 10.244.0.5 . 8080           1, 2: the others
    10.96.0.1                             cluster-ips
    10.244.0.5 . 10.244.0.5 . tcp . 8080  hairpin                                (endpoints on this node)

Session affinity needs chains of the Service's own, for whom to remember is an endpoint's business: a set of clients for each
endpoint, filled by the kernel, forgotten T seconds after the client's last new connection.

    affinity-cluster-ip-H, affinity-external-H      as the shared ones, then goto
    affinity-H, affinity-local-H                    ip saddr @affinity-T-H-E: remember again, dnat to E     for each E
                                                    one in n: remember, dnat to E                           for each E

One dynamic map from client to endpoint would be flat too, but nft 1.0.6 aborts on recording an IPv6 address with a port, and its
elements would outlive the endpoint they lead to; a set goes with its endpoint, in the same transaction.
With consistent hashing the client's hash decides, which remembers every client for ever: affinity adds nothing and is left out.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.nftables import (
    Chain,
    Chance,
    Data,
    DnatTo,
    ElementKey,
    Goto,
    GotoChain,
    InSet,
    Interval,
    Match,
    NamedSet,
    ProtocolIs,
    Remember,
    Rule,
)
from proxy.maglev import slots, table_size
from proxy.names import port_hash
from proxy.render.nftables import (
    REJECT_CHAIN,
    SADDR,
    Door,
    FamilyContext,
    Shape,
    external_local_rules,
    external_rules,
    internal_rules,
)
from proxy.table import Backend, Frontend, Kind, OnEmpty, ServiceEntry

REMEMBERED_CLIENTS = 65535
"""Most clients remembered for one endpoint; a flood of made-up sources must not fill the kernel's memory."""

_PROTOCOLS = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
_DOORS: dict[Kind, Literal["cluster-ip", "external", "node-port"]] = {
    Kind.CLUSTER_IP: "cluster-ip",
    Kind.EXTERNAL_IP: "external",
    Kind.LOAD_BALANCER: "external",
    Kind.NODE_PORT: "node-port",
}
_TO_REJECT = Goto(REJECT_CHAIN)
_CLUSTER_IP = Kind.CLUSTER_IP


class Contribution(msgspec.Struct, frozen=True):
    """One Service's part of a table."""

    elements: dict[str, dict[ElementKey, Data]]
    """Of its own, by set."""
    shared: tuple[tuple[str, ElementKey], ...] = ()
    """(set, element) that other Services may contribute as well; each once."""
    chains: dict[str, Chain] = {}
    """Chains its elements lead to; others may lead to the same."""
    sets: dict[str, NamedSet] = {}


NOTHING = Contribution({})


class EntryRenderer:
    """Writes the entries of one family, and keeps the chains that many share."""

    def __init__(self, context: FamilyContext) -> None:
        self.context = context
        self._plain: dict[int, tuple[Goto, dict[str, Chain]]] = {}
        self._doors: dict[Door, Chain] = {}

    def render(self, entries: list[ServiceEntry]) -> Contribution:
        """Write all entries of one Service."""
        if not entries:
            return NOTHING
        if len(entries) == 1 and is_plain(entries[0]):
            return self.render_plain(entries[0])
        return self.render_general(entries)

    def render_plain(self, entry: ServiceEntry) -> Contribution:
        """Write an entry that ``is_plain``: what ``render_general`` writes, in a fraction of its time."""
        frontend, pool = entry.frontends[0], entry.cluster
        address, protocol, port = int(frontend.address), _PROTOCOLS[entry.name.protocol], frontend.port  # type: ignore[arg-type]
        count = len(pool)
        found = self._plain.get(count)
        if found is None:
            door = Door("cluster-ip", Shape(count))
            found = self._plain[count] = (Goto(door.chain), {door.chain: self.door(door)})
        endpoints: dict[ElementKey, Data] = {}
        shared: tuple[tuple[str, ElementKey], ...] = (("cluster-ips", (address,)),)
        number = 0
        for backend in pool:
            to = int(backend.address)
            endpoints[address, protocol, port, number] = (to, backend.port)
            number += 1  # noqa: SIM113  enumerate costs more than it saves here
            if backend.local:
                shared += (("hairpin", (to, to, protocol, backend.port)),)
        return Contribution({"services": {(address, protocol, port): found[0]}, "endpoints": endpoints}, shared, found[1])

    def render_general(self, entries: list[ServiceEntry]) -> Contribution:
        """Write any entries."""
        writer = _Writer(self)
        for entry in entries:
            writer.write(entry)
        return Contribution(writer.elements, tuple(writer.shared), writer.chains, writer.sets)

    def door(self, door: Door) -> Chain:
        """Return the chain that frontends of a shape share."""
        chain = self._doors.get(door)
        if chain is None:
            chain = self._doors[door] = door.render(self.context)
        return chain


def is_plain(entry: ServiceEntry) -> bool:
    """Whether an entry is what most of a large cluster consists of: a ClusterIP and somebody behind it, nothing else."""
    return (
        len(entry.frontends) == 1
        and entry.frontends[0].kind is _CLUSTER_IP
        and entry.cluster != ()
        and not (entry.local or entry.internal_local or entry.affinity_seconds or entry.consistent)
    )


class _Writer:
    """Collects what the entries of one Service contribute."""

    def __init__(self, renderer: EntryRenderer) -> None:
        self.renderer = renderer
        self.context = renderer.context
        self.elements: dict[str, dict[ElementKey, Data]] = {}
        self.shared: dict[tuple[str, ElementKey], None] = {}
        self.chains: dict[str, Chain] = {}
        self.sets: dict[str, NamedSet] = {}

    def write(self, entry: ServiceEntry) -> None:
        """Write one entry."""
        protocol = _PROTOCOLS[entry.name.protocol]
        remembers = bool(entry.affinity_seconds and not entry.consistent and entry.frontends and entry.reachable)
        affinity = _Affinity(self, entry, protocol) if remembers else None
        for frontend in entry.frontends:
            self._frontend(entry, frontend, protocol, affinity)
        if entry.frontends:
            for backend in entry.reachable:
                if backend.local:
                    to = int(backend.address)
                    self.shared["hairpin", (to, to, protocol, backend.port)] = None

    def _frontend(self, entry: ServiceEntry, frontend: Frontend, protocol: str, affinity: _Affinity | None) -> None:
        by_port = frontend.address is None
        key: ElementKey = (protocol, frontend.port) if frontend.address is None else _key(frontend.address, protocol, frontend)
        if frontend.kind is Kind.CLUSTER_IP:
            self.shared["cluster-ips", key[:1]] = None
        self._source_ranges(entry, frontend, key)
        if not entry.pool(frontend.kind):
            refusal: Data = _TO_REJECT if entry.on_empty is OnEmpty.REJECT else "drop"
            self._put("no-endpoint-node-ports" if by_port else "no-endpoints", key, refusal)
        pools = _pools(entry, frontend.kind)
        found = self.elements.setdefault("node-ports" if by_port else "services", {})
        if not any(pools) or key in found:  # the first of two that an entry has on one address and port
            return
        if affinity is not None:
            found[key] = Goto(affinity.door(frontend.kind))
            return
        cluster, local = pools
        self._pool("node-port-endpoints" if by_port else "endpoints", key, cluster, entry.consistent)
        shape = _shape(cluster, entry.consistent)
        if frontend.kind is not Kind.CLUSTER_IP and entry.external_local:
            self._pool("node-port-local-endpoints" if by_port else "local-endpoints", key, local, entry.consistent)
            door = Door(_DOORS[frontend.kind], shape, _shape(local, entry.consistent))
        else:
            door = Door(_DOORS[frontend.kind], shape)
        self.chains[door.chain] = self.renderer.door(door)
        found[key] = Goto(door.chain)

    def _pool(self, name: str, key: ElementKey, pool: tuple[Backend, ...], consistent: bool) -> None:
        if not pool:
            return
        found = self.elements.setdefault(name, {})
        targets = [(int(b.address), b.port) for b in pool]
        order = slots(tuple(b.name for b in pool)) if consistent else range(len(targets))
        for number, backend in enumerate(order):
            found[(*key, number)] = targets[backend]

    def _source_ranges(self, entry: ServiceEntry, frontend: Frontend, key: ElementKey) -> None:
        """Write who may use a load balancer's address, and a NodePort if so set; the VIP may use itself where the node may."""
        by_port = frontend.kind is Kind.NODE_PORT
        guards = frontend.kind is Kind.LOAD_BALANCER or (by_port and self.context.guard_node_ports)
        if not entry.source_ranges or not guards:
            return
        prefix = "node-port-" if by_port else ""
        self._put("firewalled-node-ports" if by_port else "firewalled", key, None)
        ranges = [(int(r.network_address), int(r.broadcast_address)) for r in entry.source_ranges]
        if any(a in r for a in self.context.node_addresses for r in entry.source_ranges):
            vips = [int(f.address) for f in entry.frontends if f.kind is Kind.LOAD_BALANCER and f.address is not None]
            ranges += [(vip, vip) for vip in vips]
        for interval in _merged(ranges):
            self._put(f"{prefix}source-ranges", (*key, interval), None)

    def _put(self, name: str, key: ElementKey, data: Data) -> None:
        self.elements.setdefault(name, {})[key] = data


class _Affinity:
    """The chains and sets by which one entry's clients come back to the same endpoint."""

    def __init__(self, writer: _Writer, entry: ServiceEntry, protocol: str) -> None:
        self.writer, self.entry = writer, entry
        self.protocol = ProtocolIs((protocol,))
        self.title = str(entry.name)
        self.hash = port_hash(self.title, protocol)
        self.names = {b.name: self._remember(b) for b in entry.reachable}
        self.cluster = self._pool("affinity-", entry.cluster)
        self.local = self._pool("affinity-local-", entry.local)

    def door(self, kind: Kind) -> str:
        """Return the chain for a frontend of a kind, written when first asked for."""
        context, entry = self.writer.context, self.entry
        if kind is Kind.CLUSTER_IP:
            name = f"affinity-cluster-ip-{self.hash}"
            rules = internal_rules(context, self._to(self.local if entry.internal_local else self.cluster))
        else:
            name = f"affinity-external-{self.hash}"
            if entry.external_local:
                rules = external_local_rules(context, self._to(self.cluster), self._to(self.local))
            else:
                rules = external_rules(context, self._to(self.cluster))
        self.writer.chains[name] = Chain(rules)
        return name

    def _to(self, chain: str) -> tuple[GotoChain, ...]:
        return (GotoChain(chain),) if chain else ()

    def _remember(self, backend: Backend) -> str:
        """Declare the set of clients that one endpoint has; the timeout is in the name, as a set cannot change it."""
        endpoint = backend.name.replace("[", "").replace("]", "").replace(":", ".")
        seconds = self.entry.affinity_seconds
        name = f"affinity-{seconds}-{self.hash}-{endpoint}"
        comment = _comment(f"{self.title} clients of {backend.name}")
        self.writer.sets[name] = NamedSet(
            name, (SADDR,), dynamic=True, timeout=seconds, size=REMEMBERED_CLIENTS, comment=comment
        )
        return name

    def _pool(self, prefix: str, pool: tuple[Backend, ...]) -> str:
        """Write the chain that balances one pool: known clients first, then one endpoint of n."""
        if not pool:
            return ""
        rules = [self._rule(b, InSet((SADDR,), self.names[b.name])) for b in pool]
        left = len(pool)
        rules += [self._rule(b, *((Chance(left - i),) if left - i > 1 else ())) for i, b in enumerate(pool)]
        last = DnatTo(int(pool[-1].address), pool[-1].port)
        rules.append(Rule((self.protocol,), (last,), "nothing more can be remembered"))
        rules[0] = msgspec.structs.replace(rules[0], comment=_comment(self.title))
        self.writer.chains[prefix + self.hash] = Chain(tuple(rules))
        return prefix + self.hash

    def _rule(self, backend: Backend, *matches: Match) -> Rule:
        remember = Remember((SADDR,), self.names[backend.name])
        return Rule((self.protocol, *matches), (remember, DnatTo(int(backend.address), backend.port)))


def _pools(entry: ServiceEntry, kind: Kind) -> tuple[tuple[Backend, ...], tuple[Backend, ...]]:
    """Return who may answer a kind of frontend: in general, and to those whom external policy Local binds."""
    if kind is Kind.CLUSTER_IP:
        return entry.pool(kind), ()
    return entry.cluster, entry.local if entry.external_local else ()


def _shape(pool: tuple[Backend, ...], consistent: bool) -> Shape:
    if consistent and pool:
        return Shape(table_size(len(pool)), hashed=True)
    return Shape(len(pool))


def _key(address: IPAddress, protocol: str, frontend: Frontend) -> ElementKey:
    return int(address), protocol, frontend.port


def _merged(ranges: list[tuple[int, int]]) -> list[Interval]:
    """Join ranges that overlap or touch: the kernel refuses an element that overlaps another."""
    merged: list[Interval] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1].last + 1:
            merged[-1] = Interval(merged[-1].first, max(merged[-1].last, last))
        else:
            merged.append(Interval(first, last))
    return merged


def _comment(text: str) -> str:
    """Make a text fit for a comment: nft takes 128 bytes, and no quotes."""
    return "".join(c for c in text if c.isascii() and c.isprintable() and c not in '"\\')[:120]
