"""What has to be written so that an nftables table becomes as desired, and in which order.

    remembered table ---.
                        +--> TablePlan --steps--> text | elements in bulk | text      each one transaction
    desired table ------'

One order serves a small plan, written in one transaction, and a large one in several, after each of which the table makes
sense: what is referred to comes before what refers to it, and base chains, through which packets enter, come last.

    sets, chains    elements that lead nowhere    elements that changed    elements that lead to chains
    rules           base chains                   elements that are gone   chains and sets that are gone

Where packets must never meet half of a change, three transactions do it, with a rest before the last:

    sets and chains that are new, with    packets are led to what is new    until every packet    chains and sets that
    their elements and rules              and from what goes                under way is through  are gone

For a transaction is not one moment to a packet that is under way: look-ups meet what is new while rules of chains are still as they
were, a chain that was led to is empty then, and sets of several fields with ranges are filled last of all. Rules are kept for two
generations, of which a packet goes on with the one it began with, so that one which is held up could find a chain emptied under it.
Source: net/netfilter/nf_tables_api.c, nf_tables_commit; nf_tables_core.c, nft_do_chain.

Sets and hooks cannot be altered in the kernel: where one differs the whole table is replaced, in one transaction. That happens
when a new version declares something else, not while running.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.nftables import Chain, Data, DnatByMap, ElementKey, Field, NamedSet, Table, TableChange, TableKey
from kernelstate.text import nft

LARGE = 2000
"""Elements from which on a plan is written in several transactions: libnftables takes 2 kB and 10 us for each."""

Elements: TypeAlias = dict[str, dict[ElementKey, Data]]


class Item(NamedTuple):
    """One thing that the kernel may refuse by itself."""

    kind: Literal["set", "chain", "element"]
    name: str
    key: ElementKey = ()


class Load(NamedTuple):
    """Elements to add to a set in bulk; none of them is there."""

    named: NamedSet
    elements: dict[ElementKey, Data]


class Fill(NamedTuple):
    """Chains whose rules look up endpoints by a number, to be filled; ``sets`` are all sets of the table."""

    sets: Mapping[str, NamedSet]
    chains: dict[str, Chain]


class Settle(NamedTuple):
    """Wait until every packet that was under way is through."""


Step: TypeAlias = str | Load | Fill | Settle


class TablePlan(msgspec.Struct, frozen=True):
    """What to write to one table. ``specs`` has every set that elements belong to.

    ``replace`` deletes the table first, ``create`` makes it. ``sets`` and ``chains`` are new; ``fill`` are chains whose rules
    are written again. An element both in ``delete`` and in ``add`` changes what it leads to.
    """

    key: TableKey
    specs: Mapping[str, NamedSet]
    replace: bool = False
    create: bool = False
    sets: tuple[NamedSet, ...] = ()
    chains: dict[str, Chain] = {}
    fill: dict[str, Chain] = {}
    add: Elements = {}
    delete: Elements = {}
    drop_chains: tuple[str, ...] = ()
    drop_sets: tuple[NamedSet, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return self.replace or self.create or bool(self.size or self.drop_chains or self.drop_sets)

    @property
    def size(self) -> int:
        """How many sets, chains and elements are written or deleted."""
        parts = len(self.sets) + len(self.chains) + len(self.fill) + len(self.drop_chains) + len(self.drop_sets)
        return parts + _count(self.add) + _count(self.delete)

    def text(self) -> str:
        """Return the commands for one transaction."""
        lines: list[str] = []
        for part in self._parts():
            lines += part if isinstance(part, list) else nft.add_elements(self.key, part.named, part.elements)
        return _lines(lines)

    def in_turn(self) -> tuple[TablePlan, TablePlan, TablePlan]:
        """Return what nobody asks yet, what leads there, and what nobody asks any more.

        A table that is new or replaced is all in the second.
        """
        nothing = TablePlan(self.key, self.specs)
        if self.create or self.replace:
            return nothing, self, nothing
        inner = {name: chain for name, chain in self.chains.items() if chain.hook is None}
        names = {named.name for named in self.sets}
        new = {name: elements for name, elements in self.add.items() if name in names}
        others = {name: elements for name, elements in self.add.items() if name not in names}
        chains = {name: chain for name, chain in self.chains.items() if name not in inner}
        return (
            msgspec.structs.replace(nothing, sets=self.sets, chains=inner, add=new),
            msgspec.structs.replace(self, sets=(), chains=chains, add=others, drop_chains=(), drop_sets=()),
            msgspec.structs.replace(nothing, drop_chains=self.drop_chains, drop_sets=self.drop_sets),
        )

    def steps(self, *, in_turn: bool = False) -> Iterator[Step]:
        """Return what to write one after the other, each in a transaction of its own: one text if the plan is small.

        ``in_turn``: no packet meets half of the change. In a table that is there already, chains that ask a map by a number are
        filled apart (``linux/nft_rules.py`` says why); a new one is filled before anything leads to it.
        """
        if in_turn:
            new, leads, gone = self.in_turn()
            yield from new.steps() if new else ()
            yield from leads.steps() if leads else ()
            yield from (Settle(), *gone.steps()) if gone else ()
            return
        written = {**self.chains, **self.fill}
        apart = {} if self.create else {name: chain for name, chain in written.items() if _asks_by_number(chain)}
        if not apart:
            yield from self.plain_steps()
            return
        inner = {name: chain for name, chain in self.chains.items() if chain.hook is None}
        declared = {name: Chain(()) if name in apart else chain for name, chain in inner.items()}
        head = TablePlan(self.key, self.specs, sets=self.sets, chains=declared)
        if head:
            yield head.text()
        yield Fill(self.specs, apart)
        chains = {name: chain for name, chain in self.chains.items() if name not in inner}
        fill = {name: chain for name, chain in self.fill.items() if name not in apart}
        yield from msgspec.structs.replace(self, sets=(), chains=chains, fill=fill).plain_steps()

    def plain_steps(self) -> Iterator[str | Load]:
        """Return the steps of a plan in which no chain is to be filled apart."""
        if self.replace or _count(self.add) + _count(self.delete) <= LARGE:
            yield from filter(None, [self.text()])
            return
        for part in self._parts():
            if not isinstance(part, list):
                yield part
            elif part:
                yield _lines(part)

    def _parts(self) -> Iterator[list[str] | Load]:
        """Yield the commands in order; elements that are simply new stand apart, for they may be many."""
        specs = self.specs
        changed = {name: _both(self.delete.get(name), elements, specs[name]) for name, elements in self.add.items()}
        new = {name: _without(elements, changed[name]) for name, elements in self.add.items()}
        ordered = [(specs[name], new[name]) for name in sorted(new) if new[name]]
        yield self._beginning()
        yield from (Load(spec, elements) for spec, elements in ordered if spec.data != "verdict")
        for name in sorted(changed):
            keys = iter(changed[name])
            while some := list(islice(keys, LARGE)):
                yield self._turn(specs[name], some)
        yield from (Load(spec, elements) for spec, elements in ordered if spec.data == "verdict")
        yield self._end(changed)

    def _beginning(self) -> list[str]:
        key = self.key
        lines = [nft.add_table(key), nft.delete_table(key)] if self.replace else []
        if self.create:
            lines.append(nft.add_table(key))
        lines += [nft.add_set(key, named) for named in self.sets]
        inner = {name: chain for name, chain in self.chains.items() if chain.hook is None}
        lines += [nft.add_chain(key, name, None) for name in inner]
        for name, chain in inner.items():
            lines += nft.add_rules(key, name, chain.rules)
        for name, elements in self.delete.items():
            if self._goes_first(name):
                lines += nft.delete_elements(key, self.specs[name], elements)
        return lines

    def _goes_first(self, name: str) -> bool:
        """Whether elements of a set are deleted before others are added: a new interval may overlap one that goes."""
        return self.specs[name].intervals and name in self.add

    def _turn(self, spec: NamedSet, keys: list[ElementKey]) -> list[str]:
        """Change what elements lead to, each within one transaction."""
        elements = self.add[spec.name]
        added = nft.add_elements(self.key, spec, {key: elements[key] for key in keys})
        return nft.delete_elements(self.key, spec, keys) + added

    def _end(self, changed: Mapping[str, Collection[ElementKey]]) -> list[str]:
        key = self.key
        lines: list[str] = []
        for name, chain in self.fill.items():
            lines += [nft.flush_chain(key, name), *nft.add_rules(key, name, chain.rules)]
        for name, chain in self.chains.items():
            if chain.hook is not None:
                lines += [nft.add_chain(key, name, chain.hook), *nft.add_rules(key, name, chain.rules)]
        for name, elements in self.delete.items():
            if not self._goes_first(name):
                lines += nft.delete_elements(key, self.specs[name], _without(elements, changed.get(name, ())))
        lines += [nft.flush_chain(key, name) for name in self.drop_chains]
        lines += [nft.delete_set(key, named) for named in self.drop_sets]
        return lines + [nft.delete_chain(key, name) for name in self.drop_chains]


def diff_tables(
    key: TableKey, kernel: Table | None, desired: Table, change: TableChange | None, skip: Container[Item] = ()
) -> TablePlan:
    """Compare a table, or the parts of it that ``change`` names; ``skip`` is left as it is. No kernel table: all is new."""
    if kernel is None:
        elements = {name: dict(found) for name, found in desired.elements.items() if found}
        return TablePlan(key, desired.sets, create=True, sets=tuple(desired.sets.values()), chains=desired.chains, add=elements)
    sets = sorted(change.sets) if change else [*desired.sets, *sorted(kernel.sets.keys() - desired.sets.keys())]
    chains = sorted(change.chains) if change else [*desired.chains, *sorted(kernel.chains.keys() - desired.chains.keys())]
    if _is_another_structure(kernel, desired, sets, chains):
        return msgspec.structs.replace(diff_tables(key, None, desired, None), replace=True)
    sets = [name for name in sets if Item("set", name) not in skip]
    chains = [name for name in chains if Item("chain", name) not in skip]
    new_sets = tuple(desired.sets[name] for name in sets if name in desired.sets and name not in kernel.sets)
    wanted = {name: desired.chains[name] for name in chains if name in desired.chains}
    add, delete = _diff_elements(kernel, desired, change, {named.name for named in new_sets}, skip)
    return TablePlan(
        key,
        {**kernel.sets, **desired.sets},
        sets=new_sets,
        chains={name: chain for name, chain in wanted.items() if name not in kernel.chains},
        fill={name: chain for name, chain in wanted.items() if name in kernel.chains and kernel.chains[name] != chain},
        add=add,
        delete=delete,
        drop_chains=tuple(name for name in chains if name in kernel.chains and name not in desired.chains),
        drop_sets=tuple(kernel.sets[name] for name in sets if name in kernel.sets and name not in desired.sets),
    )


def _is_another_structure(kernel: Table, desired: Table, sets: Iterable[str], chains: Iterable[str]) -> bool:
    """Whether a set or a hook would have to be altered."""
    both_sets = [name for name in sets if name in kernel.sets and name in desired.sets]
    both_chains = [name for name in chains if name in kernel.chains and name in desired.chains]
    return any(kernel.sets[name] != desired.sets[name] for name in both_sets) or any(
        kernel.chains[name].hook != desired.chains[name].hook for name in both_chains
    )


def _diff_elements(
    kernel: Table, desired: Table, change: TableChange | None, new_sets: Container[str], skip: Container[Item]
) -> tuple[Elements, Elements]:
    """Return the elements to add and those to delete; of a new set all are to be added, whatever the change says."""
    add: Elements = {}
    delete: Elements = {}
    for name, want in desired.elements.items():
        have = kernel.elements.get(name, {})
        keys: Iterable[ElementKey]
        if change is None or name in new_sets:
            keys = () if have == want else [*want, *(have.keys() - want.keys())]
        else:
            keys = change.elements.get(name, ())
        for key in keys:
            wanted, held = want.get(key, ABSENT), have.get(key, ABSENT)
            if wanted == held or (skip and Item("element", name, key) in skip):
                continue
            if held is not ABSENT:
                delete.setdefault(name, {})[key] = held  # type: ignore[assignment]  # it is there
            if wanted is not ABSENT:
                add.setdefault(name, {})[key] = wanted  # type: ignore[assignment]  # it is there
    return add, delete


ABSENT = object()
"""Stands for an element that is not there; None is what an element of a set leads to."""


def remember(kernel: Table | None, plan: TablePlan) -> Table:
    """Return what the kernel holds after a plan; the table given may be changed and returned."""
    table = kernel if kernel is not None and not (plan.replace or plan.create) else Table({}, {}, {})
    for named in plan.sets:
        table.sets[named.name] = named
        if not named.dynamic:
            table.elements[named.name] = {}
    table.chains.update(plan.chains)
    table.chains.update(plan.fill)
    for name, elements in plan.delete.items():
        held = table.elements.get(name, {})  # what a dynamic set holds is not remembered
        for key in elements:
            held.pop(key, None)
    for name, elements in plan.add.items():
        table.elements[name].update(elements)
    for name in plan.drop_chains:
        del table.chains[name]
    for named in plan.drop_sets:
        del table.sets[named.name]
        table.elements.pop(named.name, None)
    return table


def _asks_by_number(chain: Chain) -> bool:
    """Whether a chain inside looks up endpoints by chance or by a hash."""
    if chain.hook is not None:
        return False
    keys = [s.key for rule in chain.rules for s in rule.statements if isinstance(s, DnatByMap)]
    return any(not isinstance(part, Field) for key in keys for part in key)


def _count(elements: Elements) -> int:
    return sum(map(len, elements.values()))


def _both(gone: Mapping[ElementKey, Data] | None, new: Mapping[ElementKey, Data], spec: NamedSet) -> Collection[ElementKey]:
    """Return the keys that stay and change what they lead to, in the order of the new elements."""
    if not gone or spec.intervals:
        return ()
    return [key for key in new if key in gone]


def _without(elements: dict[ElementKey, Data], keys: Collection[ElementKey]) -> dict[ElementKey, Data]:
    if not keys:
        return elements
    left_out = set(keys)
    return {key: data for key, data in elements.items() if key not in left_out}


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
