"""The whole iptables program of a node's Services: entries put together, fixed rules added, changes followed.

``IptablesProgram`` holds the rendered rules of each Service. An update renders only the Services that changed, so the text that
reaches the kernel is as large as the change; a full render is an update of everything. Whatever the order of updates, the
chains equal those of rendering the last table afresh (tests/property).

Source of the fixed rules and of the order of jumps: kube-proxy 1.36, facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clusterstate.snapshot import Name
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import (
    AddrType,
    Anchor,
    ChainKey,
    Comment,
    ConnState,
    Jump,
    Mark,
    Masquerade,
    Rule,
    Ruleset,
    SetXmark,
    Table,
    Verdict,
)
from proxy.render.iptables import (
    EXTERNAL_SERVICES,
    NODE_PORTS,
    PROXY_FIREWALL,
    SERVICES,
    SHARED_FILTER,
    SHARED_NAT,
    EntryContext,
    EntryRules,
    render_entry,
)
from proxy.render.iptables_shared import HEADS, SharedChain
from proxy.settings import NodeFacts, ProxySettings, local_detector, node_port_scope
from proxy.table import ServiceEntry, ServiceTable

LOOPBACK: dict[int, Prefix] = {4: Prefix.parse("127.0.0.0/8"), 6: Prefix.parse("::1/128")}
CANARY = "KUBE-PROXY-CANARY"

CHAIN_NAMES = (
    SERVICES,
    EXTERNAL_SERVICES,
    NODE_PORTS,
    PROXY_FIREWALL,
    "KUBE-FORWARD",
    "KUBE-FIREWALL",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    CANARY,
)
"""Chains of ours with a fixed name."""

CHAIN_PREFIXES = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", *HEADS.values())
"""A chain whose name starts like this is ours."""


class IptablesProgram:
    """Rules of every Service in the given families; ``chains`` is updated in place."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        self.settings = settings
        self.node = node
        self.families: tuple[Family, ...] = tuple(sorted(families))
        self.chains: dict[ChainKey, tuple[Rule, ...]] = {}
        self._entries: dict[Name, tuple[ServiceEntry, ...]] = {}
        self._rendered: dict[Name, tuple[EntryRules, ...]] = {}
        self._shared: dict[ChainKey, SharedChain] = {}
        self.endpoints = 0
        """Endpoints reachable through any Service, counted once a ServicePort."""
        self._contexts: dict[Family, EntryContext] = {}
        self._make_contexts()
        for family in self.families:
            self.chains.update(_fixed_chains(settings, family))
            for key in _shared_keys(family):
                self._shared[key] = SharedChain(key, settings.dispatch_above)
                self._settle(key)

    @property
    def ruleset(self) -> Ruleset:
        """Everything, with the jumps from the kernel's own chains. Shares ``chains``."""
        return Ruleset(self.chains, tuple(a for f in self.families for a in _anchors(f)))

    @property
    def problems(self) -> tuple[str, ...]:
        """What the settings ask for and this node's facts do not allow."""
        return tuple(c.node_ports.problem for c in self._contexts.values() if c.node_ports.problem)

    def update(self, entries: Mapping[Name, tuple[ServiceEntry, ...]], names: Iterable[Name] | None) -> set[ChainKey]:
        """Render the Services in ``names`` again (None: all) from ``entries``; return the chains that differ now."""
        todo = dict.fromkeys((*self._entries, *entries) if names is None else names)
        for name in todo:
            before, after = self._entries.pop(name, ()), entries.get(name, ())
            for entry in before:
                self.endpoints -= len(entry.reachable)
            for entry in after:
                self.endpoints += len(entry.reachable)
            if after:
                self._entries[name] = after
        if self._make_contexts():
            todo |= dict.fromkeys(self._entries)
        changed: set[ChainKey] = set()
        touched: set[ChainKey] = set()
        for name in sorted(todo):
            self._render(name, changed, touched)
        for key in sorted(touched):
            changed |= self._settle(key)
        return changed

    def _make_contexts(self) -> bool:
        """Derive what all entries depend on; return whether that changed."""
        before = self._contexts
        self._contexts = {f: self._context(f) for f in self.families}
        return before not in ({}, self._contexts)

    def _context(self, family: Family) -> EntryContext:
        settings, node = self.settings, self.node
        return EntryContext(
            family,
            settings.masquerade_all,
            local_detector(settings, node, family),
            node_port_scope(settings, node, family),
            tuple(a for a in node.addresses if a.version == family),
            settings.localhost_node_ports,
            self.endpoints <= settings.large_cluster_endpoints,
            settings.guard_node_ports,
        )

    def _render(self, name: Name, changed: set[ChainKey], touched: set[ChainKey]) -> None:
        before = self._rendered.pop(name, ())
        contexts = self._contexts
        after = tuple([render_entry(e, contexts[e.family]) for e in self._entries.get(name, ()) if e.family in contexts])
        if after:
            self._rendered[name] = after
        if not before:
            self._add(name, after, changed, touched)
            return
        old_chains, new_chains = _chains_of(before), _chains_of(after)
        for key in old_chains.keys() - new_chains.keys():
            del self.chains[key]
            changed.add(key)
        for key, rules in new_chains.items():
            if old_chains.get(key) != rules:
                self.chains[key] = rules
                changed.add(key)
        old_shared, new_shared = _shared_of(before), _shared_of(after)
        for key in old_shared.keys() | new_shared.keys():
            if old_shared.get(key) != new_shared.get(key):
                self._shared[key].put(name, new_shared.get(key))
                touched.add(key)

    def _add(self, name: Name, rendered: tuple[EntryRules, ...], changed: set[ChainKey], touched: set[ChainKey]) -> None:
        """Take in a Service that was not there: nothing to compare with."""
        chains = _chains_of(rendered)
        self.chains.update(chains)
        changed.update(chains)
        for key, rules in _shared_of(rendered).items():
            self._shared[key].put(name, rules)
            touched.add(key)

    def _settle(self, key: ChainKey) -> set[ChainKey]:
        """Write a chain of several Services and what is below it; returns the chains that differ now."""
        own, below = self._shared[key].settle()
        if key.table == "nat" and key.name == SERVICES:
            own += self._node_port_jumps(key.family)
        changed = set()
        for written, rules in {key: own, **below}.items():
            if rules == self.chains.get(written):
                continue
            changed.add(written)
            if rules is None:
                del self.chains[written]
            else:
                self.chains[written] = rules
        return changed

    def _node_port_jumps(self, family: Family) -> tuple[Rule, ...]:
        """Return the tail of KUBE-SERVICES: what is not a Service's own address may be a NodePort."""
        comment = Comment("kubernetes service nodeports; NOTE: this must be the last rule in this chain")
        scope = self._contexts[family].node_ports
        if not scope.everywhere:
            return tuple(Rule(Jump(NODE_PORTS), (comment,), destination=address) for address in scope.addresses)
        keep_off_loopback = family == 6 or not self.settings.localhost_node_ports
        return (
            Rule(
                Jump(NODE_PORTS),
                (comment, AddrType(dst="LOCAL")),
                destination=LOOPBACK[family] if keep_off_loopback else None,
                destination_negated=keep_off_loopback,
            ),
        )


def render_iptables(
    table: ServiceTable, settings: ProxySettings, node: NodeFacts, families: Iterable[Family] = (4, 6)
) -> Ruleset:
    """Render a whole table: every chain, and the jumps into them."""
    program = IptablesProgram(settings, node, families)
    program.update(table.entries, None)
    return program.ruleset


def _chains_of(rendered: tuple[EntryRules, ...]) -> dict[ChainKey, tuple[Rule, ...]]:
    if len(rendered) == 1:
        return rendered[0].chains
    return {key: rules for one in rendered for key, rules in one.chains.items()}


def _shared_of(rendered: tuple[EntryRules, ...]) -> dict[ChainKey, tuple[Rule, ...]]:
    if len(rendered) == 1:
        return rendered[0].shared
    merged: dict[ChainKey, tuple[Rule, ...]] = {}
    for one in rendered:
        for key, rules in one.shared.items():
            merged[key] = merged.get(key, ()) + rules
    return merged


def _shared_keys(family: Family) -> list[ChainKey]:
    return [ChainKey(family, "filter", c) for c in SHARED_FILTER] + [ChainKey(family, "nat", c) for c in SHARED_NAT]


def _fixed_chains(settings: ProxySettings, family: Family) -> dict[ChainKey, tuple[Rule, ...]]:
    """Return the chains that do not depend on any Service."""
    mark = settings.mark
    unmarked = Rule(Verdict.RETURN, (Mark(mark, mark, negated=True),))
    clear = Rule(SetXmark(mark, 0))
    snat = Rule(Masquerade(settings.random_fully), (Comment("kubernetes service traffic requiring SNAT"),))
    established = ConnState.of("RELATED", "ESTABLISHED")
    forward = [
        Rule(Verdict.ACCEPT, (Comment("kubernetes forwarding rules"), Mark(mark, mark))),
        Rule(Verdict.ACCEPT, (Comment("kubernetes forwarding conntrack rule"), established)),
    ]
    if not settings.tcp_be_liberal:
        forward.insert(0, Rule(Verdict.DROP, (ConnState.of("INVALID"),)))
    return {
        ChainKey(family, "filter", "KUBE-FORWARD"): tuple(forward),
        ChainKey(family, "filter", "KUBE-FIREWALL"): _localnet_guard(family) if settings.localhost_node_ports else (),
        # The mark is cleared before a packet may enter a tunnel and meet POSTROUTING again inside its outer header.
        ChainKey(family, "nat", "KUBE-POSTROUTING"): (unmarked, clear, snat),
        ChainKey(family, "nat", "KUBE-MARK-MASQ"): (Rule(SetXmark(mark, mark)),),
        **{ChainKey(family, table, CANARY): () for table in _CANARY_TABLES},
    }


_CANARY_TABLES: tuple[Table, ...] = ("mangle", "filter", "nat")


def _localnet_guard(family: Family) -> tuple[Rule, ...]:
    """Return the rule that keeps 127.0.0.0/8 closed to others while route_localnet is on (CVE-2020-8558). IPv4 only."""
    if family == 6:
        return ()
    return (
        Rule(
            Verdict.DROP,
            (
                Comment("block incoming localnet connections"),
                ConnState.of("RELATED", "ESTABLISHED", "DNAT", negated=True),
            ),
            source=LOOPBACK[4],
            source_negated=True,
            destination=LOOPBACK[4],
        ),
    )


def _anchors(family: Family) -> tuple[Anchor, ...]:
    """Return the jumps out of the kernel's own chains, top to bottom as they end up on a clean host."""
    new = ConnState.of("NEW")
    firewall = Rule(Jump("KUBE-FIREWALL"))
    lb_firewall = Rule(Jump(PROXY_FIREWALL), (new, Comment("kubernetes load balancer firewall")))
    health = Rule(Jump(NODE_PORTS), (Comment("kubernetes health check service ports"),))
    outside = Rule(Jump(EXTERNAL_SERVICES), (new, Comment("kubernetes externally-visible service portals")))
    portals = Rule(Jump(SERVICES), (new, Comment("kubernetes service portals")))
    forward = Rule(Jump("KUBE-FORWARD"), (Comment("kubernetes forwarding rules"),))
    nat_portals = Rule(Jump(SERVICES), (Comment("kubernetes service portals"),))
    postrouting = Rule(Jump("KUBE-POSTROUTING"), (Comment("kubernetes postrouting rules"),))
    places: list[tuple[Table, str, tuple[Rule, ...]]] = [
        ("filter", "INPUT", (firewall, lb_firewall, health, outside)),
        ("filter", "FORWARD", (lb_firewall, forward, portals, outside)),
        ("filter", "OUTPUT", (firewall, lb_firewall, portals)),
        ("nat", "PREROUTING", (nat_portals,)),
        ("nat", "OUTPUT", (nat_portals,)),
        ("nat", "POSTROUTING", (postrouting,)),
    ]
    return tuple(Anchor(ChainKey(family, t, c), rule) for t, c, rules in places for rule in rules)
