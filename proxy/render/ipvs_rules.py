"""The iptables rules around IPVS: they mark what must be masqueraded, and keep out what must not reach a virtual server.

    nat PREROUTING, OUTPUT -- KUBE-SERVICES         marks, by the set that holds address and port
                                |-- KUBE-LOAD-BALANCER
                                '-- KUBE-NODE-PORT
    mangle OUTPUT  -- KUBE-IPVS-OUT-FILTER --.      sources out of range, policy Local with nobody here: dropped
    filter INPUT   -- KUBE-PROXY-FIREWALL ---+-- KUBE-SOURCE-RANGES-FIREWALL
                                |
    filter INPUT   -- KUBE-IPVS-FILTER              a port of a held address that no Service has: rejected
    filter INPUT   -- KUBE-NODE-PORT                health check ports: let in
                         ( IPVS )
    nat POSTROUTING -- KUBE-POSTROUTING             hairpins, and what was marked: masqueraded

Their number does not depend on that of Services; sets do the work. A rule that asks an empty set is left out, so is the set.

Two places differ from kube-proxy's. IPVS takes the node's own packets behind nat OUTPUT and before filter OUTPUT (priorities -98
and 0, net/netfilter/ipvs/ip_vs_core.c), where kube-proxy looks at what IPVS has sent on already, rule by rule; KUBE-IPVS-OUT-FILTER
here stands in mangle, before IPVS, and asks the same sets as for everybody else. And ACCEPT for a Service's own address comes
before KUBE-NODE-PORT: else a Service port that is also somebody's NodePort would be masqueraded as one.

Source of names and order: kube-proxy 1.36, facts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import (
    AddrType,
    Anchor,
    ChainKey,
    Comment,
    ConnState,
    FromBridgePort,
    Jump,
    Mark,
    Masquerade,
    Match,
    Protocol,
    Reject,
    Rule,
    SetMatch,
    SetXmark,
    Table,
    Target,
    Verdict,
)
from proxy.render.ipvs import (
    CLUSTER_IP,
    EXTERNAL_IP,
    EXTERNAL_IP_LOCAL,
    GUARDED,
    HEALTH_CHECK,
    HELD,
    LOAD_BALANCER,
    LOAD_BALANCER_LOCAL,
    LOOP_BACK,
    NO_LOCAL,
    NODE_PORT,
    NODE_PORT_LOCAL,
    SET_TYPES,
    SOURCE_CIDR,
    SOURCE_IP,
    set_name,
)
from proxy.settings import NodeFacts, ProxySettings, local_detector, node_port_scope

SERVICES = "KUBE-SERVICES"
POSTROUTING = "KUBE-POSTROUTING"
MARK_MASQ = "KUBE-MARK-MASQ"
NODE_PORTS = "KUBE-NODE-PORT"
LOAD_BALANCERS = "KUBE-LOAD-BALANCER"
FORWARD = "KUBE-FORWARD"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"
SOURCE_RANGES = "KUBE-SOURCE-RANGES-FIREWALL"
IPVS_FILTER = "KUBE-IPVS-FILTER"
OUT_FILTER = "KUBE-IPVS-OUT-FILTER"

CHAIN_NAMES = (
    SERVICES,
    POSTROUTING,
    MARK_MASQ,
    NODE_PORTS,
    LOAD_BALANCERS,
    FORWARD,
    PROXY_FIREWALL,
    SOURCE_RANGES,
    IPVS_FILTER,
    OUT_FILTER,
)
"""Chains of ours; in this mode none has a name of its own for a Service."""

_TO_MARK_MASQ = Jump(MARK_MASQ)
_LOOPBACK: dict[int, Prefix] = {4: Prefix.parse("127.0.0.0/8"), 6: Prefix.parse("::1/128")}
_ICMP: dict[int, Protocol] = {4: "icmp", 6: "ipv6-icmp"}
_NEW = ConnState.of("NEW")


def ipvs_anchors(family: Family) -> tuple[Anchor, ...]:
    """Return the jumps out of the kernel's own chains, top to bottom as they end up on a clean host."""
    portals = Rule(Jump(SERVICES), (Comment("kubernetes service portals"),))
    firewall = Rule(Jump(PROXY_FIREWALL), (_NEW, Comment("kube-proxy firewall rules")))
    access = Rule(Jump(IPVS_FILTER), (Comment("kubernetes ipvs access filter"),))
    health = Rule(Jump(NODE_PORTS), (Comment("kubernetes health check rules"),))
    out = Rule(Jump(OUT_FILTER), (_NEW, Comment("kubernetes ipvs access filter")))
    forward = Rule(Jump(FORWARD), (Comment("kubernetes forwarding rules"),))
    postrouting = Rule(Jump(POSTROUTING), (Comment("kubernetes postrouting rules"),))
    places: list[tuple[Table, str, tuple[Rule, ...]]] = [
        ("mangle", "OUTPUT", (out,)),
        ("filter", "INPUT", (access, firewall, health)),
        ("filter", "FORWARD", (firewall, forward)),
        ("nat", "PREROUTING", (portals,)),
        ("nat", "OUTPUT", (portals,)),
        ("nat", "POSTROUTING", (postrouting,)),
    ]
    return tuple(Anchor(ChainKey(family, t, c), rule) for t, c, rules in places for rule in rules)


def ipvs_chains(
    settings: ProxySettings, node: NodeFacts, family: Family, filled: Collection[str]
) -> dict[ChainKey, tuple[Rule, ...]]:
    """Write every chain of a family, given which sets (by their IPv4 names) have members."""
    return _ChainWriter(settings, node, family, filled).write()


class _ChainWriter:
    """What all chains of one family share."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, family: Family, filled: Collection[str]) -> None:
        self.settings, self.node, self.family = settings, node, family
        self.filled = frozenset(filled)

    def write(self) -> dict[ChainKey, tuple[Rule, ...]]:
        """Write every chain, empty ones included."""
        mark = self.settings.mark
        guard = [
            *self._if(NO_LOCAL, Verdict.DROP, "no endpoint here, policy Local"),
            *self._if(GUARDED, Jump(SOURCE_RANGES), "Services with source ranges"),
        ]
        tables: dict[Table, dict[str, list[Rule]]] = {
            "mangle": {OUT_FILTER: guard, SOURCE_RANGES: self._source_ranges()},
            "filter": {
                IPVS_FILTER: self._access(),
                PROXY_FIREWALL: guard,
                SOURCE_RANGES: self._source_ranges(),
                NODE_PORTS: self._if(HEALTH_CHECK, Verdict.ACCEPT, "health check ports", protocol="tcp"),
                FORWARD: self._forward(),
            },
            "nat": {
                SERVICES: self._services(),
                LOAD_BALANCERS: self._load_balancers(),
                NODE_PORTS: self._node_ports(),
                POSTROUTING: self._postrouting(),
                MARK_MASQ: [Rule(SetXmark(mark, mark))],
            },
        }
        return {
            ChainKey(self.family, table, name): tuple(rules)
            for table, chains in tables.items()
            for name, rules in chains.items()
        }

    # -- nat: who is masqueraded -------------------------------------------------------------------------------------

    def _services(self) -> list[Rule]:
        here = AddrType(dst="LOCAL")
        routed = (FromBridgePort(negated=True), AddrType(src="LOCAL", src_negated=True))
        external = "external addresses"
        rules = [Rule(Verdict.RETURN, source=_LOOPBACK[self.family])]
        rules += self._if(LOAD_BALANCER, Jump(LOAD_BALANCERS), "load balancers")
        rules += self._masquerade_outsiders()
        rules += self._if(EXTERNAL_IP, _TO_MARK_MASQ, f"{external}: source replaced")
        for name in (EXTERNAL_IP, EXTERNAL_IP_LOCAL):
            rules += self._if(name, Verdict.ACCEPT, external, *routed)
            rules += self._if(name, Verdict.ACCEPT, external, here)
        rules += self._if(CLUSTER_IP, Verdict.ACCEPT)
        rules += self._if(LOAD_BALANCER, Verdict.ACCEPT)
        return rules + self._node_port_jumps()

    def _masquerade_outsiders(self) -> list[Rule]:
        """Return the rule that marks traffic to ClusterIPs whose replies would not come back by themselves."""
        text = "cluster IPs, from elsewhere"
        detector = local_detector(self.settings, self.node, self.family)
        if self.settings.masquerade_all:
            return self._if(CLUSTER_IP, _TO_MARK_MASQ, text)
        if detector is None:  # then only a process of this node, whose source is the ClusterIP it asked for
            return self._if(CLUSTER_IP, _TO_MARK_MASQ, text, dimensions=("src", "dst"))
        return [
            Rule(
                _TO_MARK_MASQ,
                rule.matches,
                source=detector.prefix,
                source_negated=detector.prefix is not None,
                in_interface=detector.interface,
                in_interface_negated=detector.prefix is None,
            )
            for rule in self._if(CLUSTER_IP, _TO_MARK_MASQ, text)
        ]

    def _node_port_jumps(self) -> list[Rule]:
        """Return the jumps by which what is not a Service's own address may be a NodePort."""
        if not self.filled.intersection(NODE_PORT.values()):
            return []
        comment = Comment("kubernetes service nodeports")
        scope = node_port_scope(self.settings, self.node, self.family)
        if scope.everywhere:
            return [Rule(Jump(NODE_PORTS), (comment, AddrType(dst="LOCAL")))]
        return [Rule(Jump(NODE_PORTS), (comment,), destination=address) for address in scope.addresses]

    def _node_ports(self) -> list[Rule]:
        rules: list[Rule] = []
        protocols: tuple[Literal["tcp", "udp", "sctp"], ...] = ("tcp", "udp", "sctp")
        for protocol in protocols:
            text = f"node ports of {protocol}"
            rules += self._if(NODE_PORT_LOCAL[protocol], Verdict.RETURN, f"{text}, policy Local", protocol=protocol)
            rules += self._if(NODE_PORT[protocol], _TO_MARK_MASQ, f"{text}: source replaced", protocol=protocol)
        return rules

    def _load_balancers(self) -> list[Rule]:
        return [*self._if(LOAD_BALANCER_LOCAL, Verdict.RETURN, "load balancers, policy Local"), Rule(_TO_MARK_MASQ)]

    def _postrouting(self) -> list[Rule]:
        mark, snat = self.settings.mark, Masquerade(self.settings.random_fully)
        return [
            *self._if(LOOP_BACK, snat, "endpoints that meet themselves"),
            Rule(Verdict.RETURN, (Mark(mark, mark, negated=True),)),
            # Cleared before the packet may enter a tunnel and meet this chain again inside its outer header.
            Rule(SetXmark(mark, 0)),
            Rule(snat, (Comment("kubernetes service traffic requiring SNAT"),)),
        ]

    # -- filter and mangle: who is kept out --------------------------------------------------------------------------

    def _access(self) -> list[Rule]:
        """Return the rules for addresses held for Services: what no Service has there is refused, ping is answered."""
        known = (LOAD_BALANCER, CLUSTER_IP, EXTERNAL_IP, EXTERNAL_IP_LOCAL)
        if HELD not in self.filled:
            return []
        return [
            *(rule for name in known for rule in self._if(name, Verdict.RETURN)),
            *self._if(HEALTH_CHECK, Verdict.RETURN, protocol="tcp"),
            Rule(Verdict.RETURN, protocol=_ICMP[self.family]),
            Rule(Reject(), (_NEW, self._asks(HELD))),
        ]

    def _source_ranges(self) -> list[Rule]:
        if GUARDED not in self.filled:
            return []
        return [
            *self._if(SOURCE_CIDR, Verdict.RETURN, dimensions=("dst", "dst", "src")),
            *self._if(SOURCE_IP, Verdict.RETURN, dimensions=("dst", "dst", "src")),
            Rule(Verdict.DROP),
        ]

    def _forward(self) -> list[Rule]:
        mark = self.settings.mark
        established = ConnState.of("RELATED", "ESTABLISHED")
        return [
            Rule(Verdict.ACCEPT, (Comment("kubernetes forwarding rules"), Mark(mark, mark))),
            Rule(Verdict.ACCEPT, (Comment("kubernetes forwarding conntrack rule"), established)),
        ]

    # -- small change ------------------------------------------------------------------------------------------------

    def _if(
        self,
        name: str,
        target: Target,
        text: str = "",
        *more: Match,
        dimensions: tuple[Literal["src", "dst"], ...] = (),
        protocol: Protocol = "",
    ) -> list[Rule]:
        """Return the rule for what is in a set, or none where the set has no members."""
        if name not in self.filled:
            return []
        comment = (Comment(text),) if text else ()
        return [Rule(target, (*comment, self._asks(name, dimensions), *more), protocol)]

    def _asks(self, name: str, dimensions: tuple[Literal["src", "dst"], ...] = ()) -> SetMatch:
        if not dimensions:
            dimensions = _DIMENSIONS[SET_TYPES[name]]
        return SetMatch(set_name(name, self.family), dimensions)


_DIMENSIONS: dict[str, tuple[Literal["src", "dst"], ...]] = {
    "hash:ip": ("dst",),
    "bitmap:port": ("dst",),
    "hash:ip,port": ("dst", "dst"),
    "hash:ip,port,ip": ("dst", "dst", "src"),
    "hash:ip,port,net": ("dst", "dst", "src"),
}
"""What a rule asks of a set of a type, unless it says otherwise."""
