"""The whole IPVS program of a node's Services: entries put together, claims settled, members counted, changes followed.

    entries --> EntryPart --.        settled: a Service's own address before a NodePort
                            |--> claims ------> servers
                            '--> members -----> sets (a member is there as long as somebody counts on it)
                                                  |-- which of them have members --> chains
                                                  '-- KUBE-IPVS-IPS --------------> addresses of kube-ipvs0

A change costs as much as the Services it touches. Whatever the order of updates, servers, sets, addresses and chains equal those
of rendering the last table afresh (tests/property).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from clusterstate.objects import ObjectRef
from clusterstate.snapshot import Name
from kernelstate.objects.address import BITS, Family, Prefix
from kernelstate.objects.ipvs import IpvsState, ServerKey, VirtualServer
from kernelstate.objects.netfilter import Anchor, ChainKey, Rule, Ruleset
from kernelstate.objects.sets import IpSet, IpSets, Member
from proxy.render.ipvs import HELD, SET_TYPES, Claim, EntryPart, IpvsContext, SetMember, render_entry, set_name, set_spec
from proxy.render.ipvs_rules import ipvs_anchors, ipvs_chains
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import ServiceEntry, ServiceTable

LINK = "kube-ipvs0"
"""The link that holds the Services' addresses."""


class SetChange(NamedTuple):
    """Members that one set gained and lost."""

    added: frozenset[Member] = frozenset()
    removed: frozenset[Member] = frozenset()


class IpvsChange(msgspec.Struct, frozen=True):
    """What differs from before: exactly, and nothing that does not."""

    chains: frozenset[ChainKey]
    servers: frozenset[ServerKey]
    sets: dict[str, SetChange]
    """By set name. A set comes with its first member and goes with its last."""
    added_addresses: frozenset[Prefix]
    removed_addresses: frozenset[Prefix]


class IpvsProgram:
    """IPVS of every Service in the given families; ``chains`` and ``servers`` are updated in place."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        self.settings, self.node = settings, node
        self.families: tuple[Family, ...] = tuple(sorted(families))
        self.chains: dict[ChainKey, tuple[Rule, ...]] = {}
        self.servers: IpvsState = {}
        self.endpoints = 0
        """Endpoints reachable through any Service, counted once a ServicePort."""
        self._contexts = {f: IpvsContext.of(settings, node, f) for f in self.families}
        self._entries: dict[Name, tuple[ServiceEntry, ...]] = {}
        self._parts: dict[Name, tuple[EntryPart, ...]] = {}
        self._excluded: dict[Name, tuple[str, ...]] = {}
        self._claims: dict[ServerKey, Claim] = {}
        self._node_ports: dict[ServerKey, Claim] = {}
        self._members: dict[Family, dict[str, dict[Member, int]]] = {f: {s: {} for s in SET_TYPES} for f in self.families}
        self._filled: dict[Family, frozenset[str]] = {}
        for family in self.families:
            self._write_chains(family, set())

    # -- what should exist -------------------------------------------------------------------------------------------

    @property
    def ruleset(self) -> Ruleset:
        """The rules, with the jumps from the kernel's own chains. Shares ``chains``."""
        return Ruleset(self.chains, self.anchors)

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """The jumps from the kernel's own chains."""
        return tuple(a for f in self.families for a in ipvs_anchors(f))

    @property
    def sets(self) -> IpSets:
        """Every set that has members: a copy, as large as they are together."""
        specs = [(set_spec(name, f), held) for f in self.families for name, held in self._members[f].items() if held]
        return {spec.name: IpSet(spec, frozenset(held)) for spec, held in specs}

    @property
    def addresses(self) -> frozenset[Prefix]:
        """What ``kube-ipvs0`` holds, as host prefixes: a copy."""
        return frozenset(p for f in self.families for p in _prefixes(f, self._members[f][HELD]))

    @property
    def sysctls(self) -> tuple[tuple[str, str], ...]:
        """Kernel parameters this mode relies on: flows tracked through IPVS, and nobody held to an endpoint that is gone."""
        wanted = [("conntrack", "1"), ("expire_nodest_conn", "1"), ("expire_quiescent_template", "1")]
        found = [(f"net/ipv4/vs/{name}", value) for name, value in wanted]
        if self.settings.strict_arp:  # or every link would answer ARP for the addresses of kube-ipvs0
            found += [("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")]
        return tuple(found)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is asked for and cannot be had, one line each."""
        found = [c.problem for c in self._contexts.values() if c.problem]
        for name in sorted(self._excluded):
            found += [
                f"{ObjectRef('Service', *name)}: {address} lies in ipvs.excludeCIDRs: its virtual server is left to others"
                for address in self._excluded[name]
            ]
        return tuple(found)

    # -- following changes -------------------------------------------------------------------------------------------

    def update(self, entries: Mapping[Name, tuple[ServiceEntry, ...]], names: Iterable[Name] | None) -> IpvsChange:
        """Render the Services in ``names`` again (None: all) from ``entries``; return what differs now."""
        todo = dict.fromkeys((*self._entries, *entries) if names is None else names)
        diff = _Diff()
        arriving: list[tuple[Name, tuple[EntryPart, ...]]] = []
        for name in sorted(todo):
            before = self._parts.get(name, ())
            after = self._render(name, entries.get(name, ()))
            if before != after:
                arriving.append((name, after))
                for part in before:
                    self._withdraw(part, diff)
        # All leave before any arrives: an address that goes from one Service to another is claimed by one at a time.
        for name, parts in arriving:
            if parts:
                self._parts[name] = parts
            else:
                self._parts.pop(name, None)
            for part in parts:
                self._add(part, diff)
        return self._result(diff)

    def _render(self, name: Name, entries: tuple[ServiceEntry, ...]) -> tuple[EntryPart, ...]:
        for entry in self._entries.pop(name, ()):
            self.endpoints -= len(entry.reachable)
        for entry in entries:
            self.endpoints += len(entry.reachable)
        if entries:
            self._entries[name] = entries
        contexts = self._contexts
        parts = tuple([render_entry(e, contexts[e.family]) for e in entries if e.family in contexts])
        self._excluded.pop(name, None)
        if any(part.excluded for part in parts):
            self._excluded[name] = tuple(dict.fromkeys(a for part in parts for a in part.excluded))
        return parts

    def _add(self, part: EntryPart, diff: _Diff) -> None:
        for key, claim in part.claims.items():
            hidden = self._node_ports.get(key)
            if hidden is not None:
                self._unsettle(key, hidden, diff)
            self._claims[key] = claim
            self._settle(key, claim, diff)
        for key, claim in part.node_ports.items():
            self._node_ports[key] = claim
            if key not in self._claims:
                self._settle(key, claim, diff)
        self._count(part.family, part.members, diff)

    def _withdraw(self, part: EntryPart, diff: _Diff) -> None:
        for key in part.claims:
            self._unsettle(key, self._claims.pop(key), diff)
            hidden = self._node_ports.get(key)
            if hidden is not None:
                self._settle(key, hidden, diff)
        for key in part.node_ports:
            claim = self._node_ports.pop(key)
            if key not in self._claims:
                self._unsettle(key, claim, diff)
        self._discount(part.family, part.members, diff)

    def _settle(self, key: ServerKey, claim: Claim, diff: _Diff) -> None:
        """Let a claim count."""
        diff.servers.setdefault(key, None)
        self.servers[key] = claim.server
        self._count(key.family, claim.members, diff)

    def _unsettle(self, key: ServerKey, claim: Claim, diff: _Diff) -> None:
        """Let a claim count no more: it is withdrawn, or hidden behind another."""
        diff.servers.setdefault(key, self.servers.pop(key))
        self._discount(key.family, claim.members, diff)

    def _count(self, family: Family, members: tuple[SetMember, ...], diff: _Diff) -> None:
        of_family = self._members[family]
        for name, member in members:
            held = of_family[name]
            count = held.get(member, 0)
            if not count:
                diff.of_set(family, name).setdefault(member, False)
            held[member] = count + 1

    def _discount(self, family: Family, members: tuple[SetMember, ...], diff: _Diff) -> None:
        of_family = self._members[family]
        for name, member in members:
            held = of_family[name]
            if held[member] > 1:
                held[member] -= 1
            else:
                del held[member]
                diff.of_set(family, name).setdefault(member, True)

    def _result(self, diff: _Diff) -> IpvsChange:
        """Reduce what was touched to what differs, and write the rules again where another set has members now."""
        chains: set[ChainKey] = set()
        for family in self.families:
            self._write_chains(family, chains)
        sets: dict[str, SetChange] = {}
        addresses: dict[bool, set[Prefix]] = {True: set(), False: set()}
        for (family, name), touched in diff.members.items():
            held = self._members[family][name]
            added = frozenset([m for m, was in touched.items() if not was and m in held])
            removed = frozenset([m for m, was in touched.items() if was and m not in held])
            if added or removed:
                sets[set_name(name, family)] = SetChange(added, removed)
            if name == HELD:
                addresses[True] |= _prefixes(family, added)
                addresses[False] |= _prefixes(family, removed)
        servers = frozenset([key for key, before in diff.servers.items() if self.servers.get(key) != before])
        return IpvsChange(frozenset(chains), servers, sets, frozenset(addresses[True]), frozenset(addresses[False]))

    def _write_chains(self, family: Family, changed: set[ChainKey]) -> None:
        filled = frozenset([name for name, held in self._members[family].items() if held])
        if self._filled.get(family) == filled:
            return
        self._filled[family] = filled
        for key, rules in ipvs_chains(self.settings, self.node, family, filled).items():
            if self.chains.get(key) != rules:
                self.chains[key] = rules
                changed.add(key)


class _Diff:
    """What an update touched, as it was before: servers by key, and for members of each set whether they were there."""

    def __init__(self) -> None:
        self.servers: dict[ServerKey, VirtualServer | None] = {}
        self.members: dict[tuple[Family, str], dict[Member, bool]] = {}

    def of_set(self, family: Family, name: str) -> dict[Member, bool]:
        """Return the touched members of one set, to be added to."""
        return self.members.setdefault((family, name), {})


def render_ipvs(
    table: ServiceTable, settings: ProxySettings, node: NodeFacts, families: Iterable[Family] = (4, 6)
) -> IpvsProgram:
    """Render a whole table."""
    program = IpvsProgram(settings, node, families)
    program.update(table.entries, None)
    return program


def _prefixes(family: Family, members: Iterable[Member]) -> set[Prefix]:
    return {Prefix(family, member[0], BITS[family]) for member in members}  # type: ignore[arg-type]  # hash:ip
