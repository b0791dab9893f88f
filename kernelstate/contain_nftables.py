"""Writing a plan for an nftables table that the kernel has refused: in parts, so that what is refused ends up alone.

A transaction is committed whole or not at all, so one bad element takes everything with it. The plan is therefore written again
in parts which all leave a table that makes sense, and a refused part by halves:

    1. the table, new sets      2. new chains, empty, then rules      3. new base chains
    4. elements, each with what it replaces                           5. what is gone

Base chains come before elements here, for the kernel judges what it can reach from them: an element that leads to a chain which
is impossible where packets would come to it is then refused itself, and not the base chain. Elements that lead nowhere come before
those that lead to chains. An element that would lead to a refused chain waits without being tried. A refused chain keeps what
it held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kernelstate.diff_nftables import Item, TablePlan
from kernelstate.errors import KernelRefusedError
from kernelstate.objects.nftables import Chain, ElementKey, Goto, JumpTo, Table
from kernelstate.text.nft import WORD, key_texts

ATTEMPTS = 256
"""How many transactions one containment may spend; what is left then fails with the last refusal."""

Refused = dict[Item, KernelRefusedError | None]
"""What was refused and why; None: it waits for something else that was."""


def write_in_parts(
    plan: TablePlan, write: Callable[[TablePlan], None], kernel: Callable[[], Table | None], attempts: int = ATTEMPTS
) -> Refused:
    """Write as much of ``plan`` as the kernel takes; returns what it refused.

    ``write`` raises KernelRefusedError without having changed anything, or has done all; ``kernel`` tells what is there then.
    Where even the table cannot be made the refusal is raised.
    """
    parts = _Parts(plan, write, kernel, attempts)
    parts.everything()
    return parts.refused


def describe(plan: TablePlan, item: Item) -> str:
    """Name a refused thing in words for people."""
    family, table = plan.key
    words = f"{WORD[family]} {table} {item.kind} {item.name}"
    if item.kind == "element" and item.name in plan.specs:
        words += f" {{ {key_texts(family, plan.specs[item.name].key, [item.key])[0]} }}"
    return words


class _Parts:
    def __init__(
        self, plan: TablePlan, write: Callable[[TablePlan], None], kernel: Callable[[], Table | None], attempts: int
    ) -> None:
        self._plan, self._write, self._kernel, self._attempts = plan, write, kernel, attempts
        self._nothing = TablePlan(plan.key, plan.specs)
        self.refused: Refused = {}

    def everything(self) -> None:
        plan = self._plan
        if plan.replace or plan.create:
            self._write(self._part(replace=plan.replace, create=True))
        self._units([Item("set", named.name) for named in plan.sets], self._new_sets)
        inner = [name for name, chain in plan.chains.items() if chain.hook is None]
        self._units(_chains(inner), lambda items: self._part(chains={i.name: Chain(()) for i in items}))
        self._fill([*(name for name in inner if Item("chain", name) not in self.refused), *plan.fill])
        base = [name for name in plan.chains if name not in inner]
        self._units(_chains(base), lambda items: self._part(chains={i.name: plan.chains[i.name] for i in items}))
        elements = self._elements()
        leads = {name for name, spec in plan.specs.items() if spec.data == "verdict"}
        self._units([item for item in elements if item.name not in leads], self._turned)
        self._units([item for item in elements if item.name in leads], self._turned)
        gone = [Item("element", s, k) for s, found in plan.delete.items() for k in found if k not in plan.add.get(s, {})]
        self._units(gone, self._gone)
        self._drop()

    def _part(self, **parts: object) -> TablePlan:
        return msgspec.structs.replace(self._nothing, **parts)

    def _new_sets(self, items: Sequence[Item]) -> TablePlan:
        names = {item.name for item in items}
        return self._part(sets=tuple(named for named in self._plan.sets if named.name in names))

    def _fill(self, names: Sequence[str]) -> None:
        found = {**self._plan.fill, **self._plan.chains}
        self._units(_chains(names), lambda items: self._part(fill={item.name: found[item.name] for item in items}))

    def _elements(self) -> list[Item]:
        """Return the elements that can be tried; those that lead to, or belong to, what was refused wait."""
        found = []
        for name, elements in self._plan.add.items():
            for key, data in elements.items():
                item = Item("element", name, key)
                if Item("set", name) in self.refused or (isinstance(data, Goto | JumpTo) and self._is_missing(data.chain)):
                    self.refused[item] = None
                else:
                    found.append(item)
        return found

    def _is_missing(self, chain: str) -> bool:
        """Whether a chain was refused altogether; of others the rules may have been."""
        kernel = self._kernel()
        return Item("chain", chain) in self.refused and (kernel is None or chain not in kernel.chains)

    def _turned(self, items: Sequence[Item]) -> TablePlan:
        add: dict[str, dict[ElementKey, object]] = {}
        delete: dict[str, dict[ElementKey, object]] = {}
        for _, name, key in items:
            add.setdefault(name, {})[key] = self._plan.add[name][key]
            if key in self._plan.delete.get(name, {}):
                delete.setdefault(name, {})[key] = self._plan.delete[name][key]
        return self._part(add=add, delete=delete)

    def _gone(self, items: Sequence[Item]) -> TablePlan:
        delete: dict[str, dict[ElementKey, object]] = {}
        for _, name, key in items:
            delete.setdefault(name, {})[key] = self._plan.delete[name][key]
        return self._part(delete=delete)

    def _drop(self) -> None:
        """Empty all chains that go before any of them is deleted: then their order does not matter."""
        chains, sets = self._plan.drop_chains, {named.name: named for named in self._plan.drop_sets}
        self._units(_chains(chains), lambda items: self._part(fill={item.name: Chain(()) for item in items}))
        self._units(
            [Item("set", name) for name in sets], lambda items: self._part(drop_sets=tuple(sets[i.name] for i in items))
        )
        self._units(_chains(chains), lambda items: self._part(drop_chains=tuple(item.name for item in items)))

    def _units(self, items: Sequence[Item], part: Callable[[Sequence[Item]], TablePlan]) -> None:
        """Write as many of the items as go; those that are refused end up alone."""
        if not items:
            return
        try:
            self._attempts -= 1
            self._write(part(items))
        except KernelRefusedError as error:
            if len(items) == 1 or self._attempts <= 0:
                self.refused.update(dict.fromkeys(items, error))
                return
            self._units(items[: len(items) // 2], part)
            self._units(items[len(items) // 2 :], part)


def _chains(names: Sequence[str]) -> list[Item]:
    return [Item("chain", name) for name in names]
