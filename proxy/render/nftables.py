"""The fixed part of the nftables table, and the chains that all frontends of one shape share.

    filter prerouting, output  -110   firewall-check            source ranges: dropped before anything is translated
    nat    prerouting, output  -100   services                  daddr . proto . dport vmap @services ------------.
                                      node-ports                own address: proto . dport vmap @node-ports -----|
                                                                                                                 v
                                      cluster-ip-3      mark outsiders;          dnat to KEY . (0, 1 or 2) map @endpoints
                                      external-3        mark;                    dnat ...
                                      external-local-3-1  pods, node: dnat map @endpoints; others: dnat map @local-endpoints
                                      node-port-3, node-port-local-3-1           the same, found by port alone
    filter input                  0   service-endpoints-check   KEY vmap @no-endpoints: reject or drop
                                      node-port-endpoints-check
    filter forward, output        0   service-endpoints-check
                                      cluster-ips-check         @cluster-ips: reject; rest of the ServiceCIDRs: drop
    nat    postrouting          100   masquerading              what is marked, and @hairpin

Everything of one Service is an element of a shared set or map, so that ten thousand of them load in a moment and a change is
a few elements. A chain says only how many endpoints there are to choose from: all Services with three share ``cluster-ip-3``.
``nftables_entry.py`` writes the elements; this file decides the rules.

Source: hooks and priorities are those that kube-proxy's nftables mode documents for others to hook around; nft(8).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.nftables import (
    AddressIs,
    Chain,
    CtState,
    CtStatus,
    DnatByMap,
    DropPacket,
    FibLocal,
    Field,
    Hook,
    InSet,
    InterfaceIs,
    JumpChain,
    Key,
    MarkIs,
    MasqueradeFully,
    Match,
    NamedSet,
    OrMark,
    Random,
    Refuse,
    Rule,
    SourceHash,
    Statement,
    VerdictMap,
    XorMark,
)
from proxy.settings import LocalDetector, NodeFacts, NodePortScope, ProxySettings, local_detector, node_port_scope

TABLE = "nodeplane"
SADDR, DADDR, PROTO, DPORT = Field("saddr"), Field("daddr"), Field("l4proto"), Field("dport")
FRONTEND: Key = (DADDR, PROTO, DPORT)
NODE_PORT: Key = (PROTO, DPORT)
REJECT_CHAIN = "reject-chain"
HASH_SEED = 0x6E706C
"""Of the hash over the client: any number, the same on every node."""
LOOPBACK: dict[int, Prefix] = {4: Prefix.parse("127.0.0.0/8"), 6: Prefix.parse("::1/128")}


class FamilyContext(msgspec.Struct, frozen=True):
    """What settings and node mean for the table of one family."""

    family: Family
    mark: int
    masquerade_all: bool
    random_fully: bool
    detector: LocalDetector | None
    node_ports: NodePortScope
    guard_node_ports: bool
    node_addresses: tuple[IPAddress, ...]
    """The node's own addresses: a load balancer that allows one of them allows its own VIP as source."""
    service_cidrs: tuple[Prefix, ...]

    @classmethod
    def of(cls, settings: ProxySettings, node: NodeFacts, family: Family) -> FamilyContext:
        """Resolve what is set for one family. NodePorts never answer on loopback: packets from there cannot be translated."""
        scope = node_port_scope(settings, node, family)
        loopback = [a for a in scope.addresses if _covers(LOOPBACK[family], a)]
        if loopback:
            problem = f"nodePortAddresses: NodePorts cannot answer on {loopback[0].address_text} in mode nftables"
            scope = NodePortScope(addresses=tuple(a for a in scope.addresses if a not in loopback), problem=problem)
        return cls(
            family,
            settings.mark,
            settings.masquerade_all,
            settings.random_fully,
            local_detector(settings, node, family),
            scope,
            settings.guard_node_ports,
            node.addresses,
            _disjoint([c for c in node.service_cidrs if c.family == family]),
        )


# -- sets and maps -----------------------------------------------------------------------------------------------------


def fixed_sets(context: FamilyContext) -> dict[str, NamedSet]:
    """Return every set and map that is there whatever the Services."""
    one_of = (Random(2),)  # any number: a declaration takes nothing but the type from it
    sets = [
        NamedSet("services", FRONTEND, "verdict", comment="frontends: the chain that balances each"),
        NamedSet("node-ports", NODE_PORT, "verdict", comment="NodePorts: the chain that balances each"),
        NamedSet("endpoints", FRONTEND + one_of, "endpoint", comment="who stands behind a frontend, numbered"),
        NamedSet("local-endpoints", FRONTEND + one_of, "endpoint", comment="the same on this node, for policy Local"),
        NamedSet("node-port-endpoints", NODE_PORT + one_of, "endpoint", comment="who stands behind a NodePort, numbered"),
        NamedSet("node-port-local-endpoints", NODE_PORT + one_of, "endpoint", comment="the same on this node"),
        NamedSet("cluster-ips", (DADDR,), comment="every ClusterIP"),
        NamedSet("no-endpoints", FRONTEND, "verdict", comment="frontends with nobody behind them"),
        NamedSet("no-endpoint-node-ports", NODE_PORT, "verdict", comment="NodePorts with nobody behind them"),
        NamedSet("hairpin", (SADDR, DADDR, PROTO, DPORT), comment="endpoints on this node, to themselves"),
        NamedSet("firewalled", FRONTEND, comment="frontends with loadBalancerSourceRanges"),
        NamedSet("source-ranges", (*FRONTEND, SADDR), intervals=True, comment="who may use them"),
    ]
    if context.guard_node_ports:
        sets += [
            NamedSet("firewalled-node-ports", NODE_PORT, comment="NodePorts with loadBalancerSourceRanges"),
            NamedSet("node-port-source-ranges", (*NODE_PORT, SADDR), intervals=True, comment="who may use them"),
        ]
    if not context.node_ports.everywhere:
        sets.append(NamedSet("node-port-ips", (DADDR,), comment="where NodePorts answer"))
    return {s.name: s for s in sets}


# -- chains that are always there --------------------------------------------------------------------------------------


def fixed_chains(context: FamilyContext) -> dict[str, Chain]:
    """Return the base chains, and the chains they jump to."""
    return _base_chains() | {
        "services": Chain((Rule((), (VerdictMap(FRONTEND, "services"),), "one look-up for any number of Services"),)),
        "node-ports": Chain((Rule(_on_node(context), (VerdictMap(NODE_PORT, "node-ports"),)),)),
        "firewall-check": Chain(_firewall(context)),
        "service-endpoints-check": Chain((Rule((), (VerdictMap(FRONTEND, "no-endpoints"),)),)),
        "node-port-endpoints-check": Chain((Rule(_on_node(context), (VerdictMap(NODE_PORT, "no-endpoint-node-ports"),)),)),
        "cluster-ips-check": Chain(_unknown(context)),
        "masquerading": Chain(_masquerading(context)),
        REJECT_CHAIN: Chain((Rule((), (Refuse(),), "a verdict map can lead here, not say reject"),)),
    }


def _base_chains() -> dict[str, Chain]:
    new = (CtState(("new",)),)

    def base(kind: Literal["filter", "nat"], hook: _HookName, priority: int, *jumps: str) -> Chain:
        matches = new if kind == "filter" else ()  # a nat chain meets first packets only
        return Chain(tuple(Rule(matches, (JumpChain(c),)) for c in jumps), Hook(kind, hook, priority))

    return {
        "filter-prerouting-pre-dnat": base("filter", "prerouting", -110, "firewall-check"),
        "filter-output-pre-dnat": base("filter", "output", -110, "firewall-check"),
        "nat-prerouting": base("nat", "prerouting", -100, "services", "node-ports"),
        "nat-output": base("nat", "output", -100, "services", "node-ports"),
        "filter-input": base("filter", "input", 0, "service-endpoints-check", "node-port-endpoints-check"),
        "filter-forward": base("filter", "forward", 0, "service-endpoints-check", "cluster-ips-check"),
        "filter-output": base("filter", "output", 0, "service-endpoints-check", "cluster-ips-check"),
        "nat-postrouting": base("nat", "postrouting", 100, "masquerading"),
    }


_HookName: TypeAlias = Literal["prerouting", "input", "forward", "output", "postrouting"]


def _on_node(context: FamilyContext) -> tuple[Match, ...]:
    """Return what makes a packet one to the node itself, where NodePorts answer."""
    if context.node_ports.everywhere:
        return AddressIs("daddr", (LOOPBACK[context.family],), negated=True), FibLocal("daddr")
    return (InSet((DADDR,), "node-port-ips"),)


def _firewall(context: FamilyContext) -> tuple[Rule, ...]:
    drop = (DropPacket(),)
    outside = (InSet(FRONTEND, "firewalled"), InSet((*FRONTEND, SADDR), "source-ranges", negated=True))
    rules = [Rule(outside, drop, "not in loadBalancerSourceRanges")]
    if context.guard_node_ports:
        guarded = InSet(NODE_PORT, "firewalled-node-ports")
        denied = InSet((*NODE_PORT, SADDR), "node-port-source-ranges", negated=True)
        rules.append(Rule((*_on_node(context), guarded, denied), drop, "not in loadBalancerSourceRanges"))
    return tuple(rules)


def _unknown(context: FamilyContext) -> tuple[Rule, ...]:
    rules = [Rule((InSet((DADDR,), "cluster-ips"),), (Refuse(),), "a ClusterIP, but no port of its Service")]
    if context.service_cidrs:
        drop = Rule((AddressIs("daddr", context.service_cidrs),), (DropPacket(),), "a ClusterIP that no Service has")
        rules.append(drop)
    return tuple(rules)


def _masquerading(context: FamilyContext) -> tuple[Rule, ...]:
    masquerade = MasqueradeFully(context.random_fully)
    hairpin = (CtStatus("dnat"), InSet((SADDR, DADDR, PROTO, DPORT), "hairpin"))
    return (
        # The mark is cleared before a packet may enter a tunnel and meet postrouting again inside its outer header.
        Rule((MarkIs(context.mark),), (XorMark(context.mark), masquerade), "replies must come back this way"),
        Rule(hairpin, (masquerade,), "a pod that meets itself must not see its own address as source"),
    )


# -- chains that frontends share ---------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """How one endpoint of a pool is chosen: one of ``size`` by chance, or by the client's hash from so many slots."""

    size: int
    hashed: bool = False

    def __str__(self) -> str:
        """Print as in the names of chains: ``3`` or ``hash-1021``."""
        return f"hash-{self.size}" if self.hashed else str(self.size)


class Door(NamedTuple):
    """What frontends must have in common to share a chain. ``local`` None: policy Cluster."""

    kind: Literal["cluster-ip", "external", "node-port"]
    cluster: Shape
    local: Shape | None = None

    @property
    def chain(self) -> str:
        """The chain's name."""
        return f"{self.kind}-{self.cluster}" if self.local is None else f"{self.kind}-local-{self.cluster}-{self.local}"

    def render(self, context: FamilyContext) -> Chain:
        """Write the chain."""
        by_port = self.kind == "node-port"
        key = NODE_PORT if by_port else FRONTEND
        to_cluster = balance(self.cluster, key, "node-port-endpoints" if by_port else "endpoints")
        if self.kind == "cluster-ip":
            return Chain(internal_rules(context, to_cluster))
        if self.local is None:
            return Chain(external_rules(context, to_cluster))
        to_local = balance(self.local, key, "node-port-local-endpoints" if by_port else "local-endpoints")
        return Chain(external_local_rules(context, to_cluster, to_local))


def balance(shape: Shape, key: Key, endpoints: str) -> tuple[Statement, ...]:
    """Return the ways to an endpoint, to be tried in order; none for an empty pool.

    The second is for a moment only: a packet may find its chain by the map of before a change, and the endpoints after it. Then
    its number may be one too high. The first endpoint is always there.
    """
    if not shape.size:
        return ()
    part = SourceHash(shape.size, HASH_SEED) if shape.hashed else Random(shape.size)
    ways = (DnatByMap((*key, part), endpoints),)
    return ways if shape == (1, False) else (*ways, DnatByMap((*key, Random(1)), endpoints))


def internal_rules(context: FamilyContext, to_pool: tuple[Statement, ...]) -> tuple[Rule, ...]:
    """Write the rules of a ClusterIP: mark who is no pod, as replies would not come back by themselves, then balance."""
    mark = (OrMark(context.mark),)
    marking = []
    if context.masquerade_all:
        marking.append(Rule((), mark, "masqueradeAll"))
    elif context.detector is not None:
        marking.append(Rule((_from_pod(context.detector, negated=True),), mark, "not from a pod: replace the source"))
    return (*marking, *_try((), to_pool))


def external_rules(context: FamilyContext, to_pool: tuple[Statement, ...]) -> tuple[Rule, ...]:
    """Write the rules of an address open to the outside, policy Cluster: the source is replaced, every endpoint may answer."""
    return tuple(_try((), to_pool, "policy Cluster: replace the source", context.mark))


def external_local_rules(
    context: FamilyContext, to_cluster: tuple[Statement, ...], to_local: tuple[Statement, ...]
) -> tuple[Rule, ...]:
    """Write the rules of policy Local: it binds neither pods nor the node itself; others keep their source."""
    rules: list[Rule] = []
    if context.detector is not None:
        rules += _try((_from_pod(context.detector),), to_cluster, "a pod: every endpoint")
    rules += _try((FibLocal("saddr"),), to_cluster, "the node itself: every endpoint, replace the source", context.mark)
    rules += _try((), to_local, "policy Local: endpoints on this node")
    return tuple(rules)


def _try(matches: tuple[Match, ...], ways: tuple[Statement, ...], comment: str = "", mark: int = 0) -> list[Rule]:
    """Write a rule for each way; the mark that asks for masquerade is set on the first and stays."""
    first: tuple[Statement, ...] = (OrMark(mark),) if mark else ()
    later = "where there were more a moment ago"
    return [Rule(matches, (way,) if i else (*first, way), later if i else comment) for i, way in enumerate(ways)]


def _from_pod(detector: LocalDetector, *, negated: bool = False) -> Match:
    if detector.prefix is not None:
        return AddressIs("saddr", (detector.prefix,), negated)
    name = detector.interface
    return InterfaceIs(name[:-1] + "*" if name.endswith("+") else name, negated)


def _covers(outer: Prefix, inner: Prefix) -> bool:
    shift = (32 if outer.family == 4 else 128) - outer.length
    return inner.length >= outer.length and inner.network >> shift == outer.network >> shift


def _disjoint(prefixes: list[Prefix]) -> tuple[Prefix, ...]:
    """Leave out what lies inside another: an anonymous set of nft refuses overlaps."""
    return tuple(sorted({p for p in prefixes if not any(_covers(q, p) for q in prefixes if q != p)}))
