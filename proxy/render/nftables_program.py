"""The whole nftables table of a node's Services: what each contributes put together, fixed parts added, changes followed.

    entries of one Service --EntryRenderer--> Contribution before, after --difference--> elements, chains, sets that change

A contribution is a pure function of the entries, so what a Service contributed before is computed again rather than kept: only
the table itself is in memory. A shared chain is there while anything leads to it. Whatever the order of updates, the tables equal
those of rendering the last cluster afresh (tests/property).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from kernelstate.objects.nftables import Chain, Data, ElementKey, NamedSet, Table, TableChange
from proxy.render.nftables import FamilyContext, fixed_chains, fixed_sets
from proxy.render.nftables_entry import NOTHING, Contribution, EntryRenderer
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import ServiceEntry, ServiceTable


class NftablesProgram:
    """The tables of every Service in the given families; ``tables`` are updated in place."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        self.settings = settings
        self.node = node
        self.families: tuple[Family, ...] = tuple(sorted(families))
        self._programs = {f: _FamilyProgram(FamilyContext.of(settings, node, f)) for f in self.families}
        self.tables: dict[Family, Table] = {f: p.table for f, p in self._programs.items()}
        self._entries: dict[Name, tuple[ServiceEntry, ...]] = {}
        self.endpoints = 0
        """Endpoints reachable through any Service, counted once a ServicePort."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What the settings ask for and this node's facts, or nftables, do not allow."""
        return tuple(p.context.node_ports.problem for p in self._programs.values() if p.context.node_ports.problem)

    def update(
        self, entries: Mapping[Name, tuple[ServiceEntry, ...]], names: Iterable[Name] | None
    ) -> dict[Family, TableChange]:
        """Render the Services in ``names`` again (None: all) from ``entries``; return what differs now, family by family."""
        moved: list[tuple[tuple[ServiceEntry, ...], tuple[ServiceEntry, ...]]] = []
        for name in dict.fromkeys((*self._entries, *entries) if names is None else names):
            before, after = self._entries.pop(name, ()), entries.get(name, ())
            if after:
                self._entries[name] = after
            if before != after:
                moved.append((before, after))
                self.endpoints += _count(after) - _count(before)
        return {family: program.replace(moved) for family, program in self._programs.items()}


def render_nftables(
    table: ServiceTable, settings: ProxySettings, node: NodeFacts, families: Iterable[Family] = (4, 6)
) -> dict[Family, Table]:
    """Render a whole table of Services."""
    program = NftablesProgram(settings, node, families)
    program.update(table.entries, None)
    return program.tables


class _FamilyProgram:
    """The table of one family."""

    def __init__(self, context: FamilyContext) -> None:
        self.context = context
        self._renderer = EntryRenderer(context)
        sets = fixed_sets(context)
        self.table = Table(fixed_chains(context), sets, {name: {} for name, one in sets.items() if not one.dynamic})
        for address in context.node_ports.addresses:
            self.table.elements["node-port-ips"][(address.network,)] = None
        self._chain_uses: dict[str, int] = {}
        self._shared_uses: dict[tuple[str, ElementKey], int] = {}

    def replace(self, moved: list[tuple[tuple[ServiceEntry, ...], tuple[ServiceEntry, ...]]]) -> TableChange:
        """Put what Services contribute now in the place of what they contributed before."""
        family, render = self.context.family, self._renderer.render
        change = _Change(self.table)
        pairs: list[tuple[Contribution, Contribution]] = []
        for before, after in moved:
            old = render([e for e in before if e.family == family]) if before else NOTHING
            new = render([e for e in after if e.family == family])
            if old is not NOTHING:
                change.remove(old, new)  # of all first: what one Service gives up another may claim
            if old is not new:
                pairs.append((old, new))
        for old, new in pairs:
            change.add(old, new)
            self._count_shared(old, new, change)
            self._count_chains(old, new, change)
        return change.done()

    def _count_shared(self, old: Contribution, new: Contribution, change: _Change) -> None:
        uses = self._shared_uses
        for shared in new.shared:
            count = uses[shared] = uses.get(shared, 0) + 1
            if count == 1:
                change.put(*shared, None)
        for shared in old.shared:
            uses[shared] -= 1
            if not uses[shared]:
                del uses[shared]
                change.drop(*shared)

    def _count_chains(self, old: Contribution, new: Contribution, change: _Change) -> None:
        uses = self._chain_uses
        for name, chain in new.chains.items():
            uses[name] = uses.get(name, 0) + 1
            change.chain(name, chain)
        for name in old.chains:
            uses[name] -= 1
            if not uses[name]:
                del uses[name]
                change.chain(name, None)


_ABSENT: Data = (-1, -1)
"""Stands for "no such element", where None is an element of a set."""


class _Change:
    """Changes a table, remembering what was there, so that in the end exactly what differs is told."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._elements: dict[str, dict[ElementKey, Data]] = {}
        """Elements touched, as they were before."""
        self._fresh: dict[str, list[Iterable[ElementKey]]] = {}
        """Elements that certainly were not there before."""
        self._removed = False
        self._chains: dict[str, Chain | None] = {}
        self._sets: dict[str, NamedSet | None] = {}

    def remove(self, old: Contribution, new: Contribution) -> None:
        """Take out the elements that a Service contributes no more."""
        for name, data in old.elements.items():
            for key in data.keys() - new.elements.get(name, {}).keys():
                self.drop(name, key)
                self._removed = True

    def add(self, old: Contribution, new: Contribution) -> None:
        """Put in the elements and sets that a Service contributes now."""
        for name, data in new.elements.items():
            before = old.elements.get(name)
            if before is None and not self._removed:
                self.table.elements[name].update(data)
                self._fresh.setdefault(name, []).append(data)
            elif before != data:
                for key, value in data.items():
                    self.put(name, key, value)
        for name in old.sets.keys() | new.sets.keys():
            self._sets.setdefault(name, self.table.sets.get(name))
            if name in new.sets:
                self.table.sets[name] = new.sets[name]
            else:
                del self.table.sets[name]

    def put(self, name: str, key: ElementKey, data: Data) -> None:
        """Put one element in, or change where it leads."""
        held = self.table.elements[name]
        was = held.get(key, _ABSENT)
        if was != data:
            self._elements.setdefault(name, {}).setdefault(key, was)
            held[key] = data

    def drop(self, name: str, key: ElementKey) -> None:
        """Take one element out."""
        was = self.table.elements[name].pop(key)
        self._elements.setdefault(name, {}).setdefault(key, was)

    def chain(self, name: str, chain: Chain | None) -> None:
        """Write a chain, or delete it (None)."""
        was = self.table.chains.get(name)
        if was is chain or was == chain:
            return
        self._chains.setdefault(name, was)
        if chain is None:
            del self.table.chains[name]
        else:
            self.table.chains[name] = chain

    def done(self) -> TableChange:
        """Say what differs from before."""
        chains, sets, elements = self.table.chains, self.table.sets, self.table.elements
        differ: dict[str, frozenset[ElementKey]] = {}
        for name in sorted(self._elements.keys() | self._fresh.keys()):
            held = elements[name]
            touched = [k for k, was in self._elements.get(name, {}).items() if held.get(k, _ABSENT) != was]
            keys = frozenset(touched).union(*self._fresh.get(name, ()))
            if keys:
                differ[name] = keys
        return TableChange(
            frozenset(name for name, was in self._chains.items() if chains.get(name) != was),
            frozenset(name for name, was in self._sets.items() if sets.get(name) != was),
            differ,
        )


def _count(entries: tuple[ServiceEntry, ...]) -> int:
    return sum(len(e.reachable) for e in entries)
