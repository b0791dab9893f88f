"""nftables in memory: takes the same commands as libnftables and refuses what the kernel would refuse.

Decides exactly what reconciling relies on: a text is one transaction, done whole or not at all; an element is added once, and
only deleted if it is there; what is led to must exist, and cannot be deleted meanwhile. Whether an expression is possible in a
chain is left to the real kernel: rules are words here.

For tests it lists what was written, fails on demand, and lets somebody else interfere (``run``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from ipaddress import ip_address

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.address import Family
from kernelstate.objects.nftables import (
    Chain,
    Data,
    ElementKey,
    Field,
    Goto,
    Hook,
    Interval,
    JumpTo,
    NamedSet,
    Rule,
    Table,
    TableKey,
    plain_key,
)
from kernelstate.text import nft

ABSENT = "No such file or directory"
EXISTS = "File exists"
BUSY = "Device or resource busy"

FOREIGN = Chain((Rule((), (), "not as desired"),), Hook("filter", "forward", 1 << 31))
FAMILIES: dict[str, Family] = {"ip": 4, "ip6": 6}


class FakeTable:
    """A table as words: declarations of sets, hooks and rules of chains, elements."""

    def __init__(self) -> None:
        self.sets: dict[str, str] = {}
        self.hooks: dict[str, str] = {}
        self.rules: dict[str, list[str]] = {}
        self.elements: dict[str, dict[str, str]] = {}


class Refusal(Exception):  # noqa: N818  what the kernel answers; becomes KernelRefusedError with its line
    """A command was refused; the text is the kernel's words."""


class FakeNftables:
    """Implements ``reconcile_table.TablePort``.

    ``written`` lists every text and (set, number of elements) that was committed, ``fail_next`` is how many writes fail from now
    on, ``refuse`` decides for single rules and elements, as words, whether the kernel takes them; chains in ``busy`` cannot be
    deleted for now.
    """

    def __init__(self, refuse: Callable[[str], bool] = lambda _words: False) -> None:
        self.tables: dict[TableKey, FakeTable] = {}
        self.written: list[str | tuple[str, int]] = []
        self.observations = 0
        self.fail_next = 0
        self.busy: set[str] = set()
        self.miss = False
        self._refuse = refuse
        self._touched: set[TableKey] = set()

    # -- TablePort -----------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """There is nothing to select on."""
        return -1

    def touched(self, keys: Collection[TableKey]) -> frozenset[TableKey] | None:
        """Return the tables that ``run`` has changed; None if ``miss`` was set."""
        found = frozenset(self._touched.intersection(keys))
        missed, self.miss = self.miss, False
        self._touched.clear()
        return None if missed else found

    def observe(self, key: TableKey, like: Table) -> Table | None:
        """Return a table with the chains and sets of ``like`` where they are equal."""
        self.observations += 1
        table = self.tables.get(key)
        if table is None:
            return None
        chains = {name: self._chain(key, name, like.chains.get(name)) for name in table.rules}
        sets = {name: self._set(key, name, like.sets.get(name)) for name in table.sets}
        elements: dict[str, dict[ElementKey, Data]] = {}
        for name, named in sets.items():
            if not named.dynamic:
                same = {plain_key(k): k for k in like.elements.get(name, ())}
                held = table.elements[name].items() if named.key else ()
                elements[name] = {same.get(k := _key(named, text), k): _data(named, data) for text, data in held}
        return Table(chains, sets, elements)

    def apply(self, text: str) -> None:
        """Commit the commands. Raises KernelRefusedError with the line."""
        self._fail_if_asked()
        self._commit(text)
        self.written.append(text)

    def load(self, key: TableKey, named: NamedSet, elements: Mapping[ElementKey, Data]) -> None:
        """Add elements in bulk. Raises KernelRefusedError."""
        self._fail_if_asked()
        self._commit("\n".join(nft.add_elements(key, named, elements)))
        self.written.append((named.name, len(elements)))

    def fill(self, key: TableKey, sets: Mapping[str, NamedSet], chains: Mapping[str, Chain]) -> None:
        """Fill chains. Raises KernelRefusedError."""
        self._fail_if_asked()
        lines = [nft.flush_chain(key, name) for name in chains]
        for name, chain in chains.items():
            lines += nft.add_rules(key, name, chain.rules)
        self._commit("\n".join(lines))
        self.written.append("\n".join(lines))

    def settle(self) -> None:
        """Nothing is under way here."""
        self.written.append("settle")

    def _fail_if_asked(self) -> None:
        if self.fail_next:
            self.fail_next -= 1
            raise KernelRefusedError("nft", "transaction", "Resource temporarily unavailable")

    def _chain(self, key: TableKey, name: str, like: Chain | None) -> Chain:
        table = self.tables[key]
        if like is None:
            return FOREIGN
        same_hook = table.hooks[name] == nft.add_chain(key, name, like.hook)
        if same_hook and table.rules[name] == [nft.rule_text(key.family, rule) for rule in like.rules]:
            return like
        return Chain(FOREIGN.rules, like.hook if same_hook else FOREIGN.hook)

    def _set(self, key: TableKey, name: str, like: NamedSet | None) -> NamedSet:
        declared = self.tables[key].sets[name]
        if like is not None and nft.add_set(key, like) == declared:
            return like
        return NamedSet(name, (), "verdict" if declared.startswith("add map") else "")

    # -- somebody else -------------------------------------------------------------------------------------------------

    def run(self, text: str) -> None:
        """Commit commands that do not count as ours and never fail on demand."""
        before = copy.deepcopy(self.tables)
        self._commit(text)
        for key in before.keys() | self.tables.keys():
            old, new = before.get(key), self.tables.get(key)
            if (old and vars(old)) != (new and vars(new)):
                self._touched.add(key)

    # -- transactions --------------------------------------------------------------------------------------------------

    def _commit(self, text: str) -> None:
        tables = copy.deepcopy(self.tables)
        for number, line in enumerate(text.splitlines(), 1):
            try:
                self._execute(tables, line)
            except Refusal as refusal:
                raise KernelRefusedError("nft", line, str(refusal), number) from refusal
        self.tables = tables

    def _execute(self, tables: dict[TableKey, FakeTable], line: str) -> None:
        if line == "flush ruleset":
            tables.clear()
            return
        verb, kind, family, name, *rest = line.split(" ", 5)
        key = TableKey(FAMILIES[family], name)
        if kind == "table":
            if verb == "add":
                tables.setdefault(key, FakeTable())
            elif tables.pop(key, None) is None:
                raise Refusal(ABSENT)
            return
        if key not in tables:
            raise Refusal(ABSENT)
        what, words = rest[0], rest[1] if len(rest) > 1 else ""
        table = tables[key]
        match kind:
            case "chain":
                self._on_chain(table, verb, what, line)
            case "set" | "map":
                _on_set(table, verb, what, line)
            case "rule":
                self._add_rule(table, what, words)
            case "element":
                for element in words[2:-2].split(", "):
                    self._on_element(table, verb, what, element)

    def _on_chain(self, table: FakeTable, verb: str, name: str, line: str) -> None:
        if verb == "add":
            table.hooks.setdefault(name, line)
            table.rules.setdefault(name, [])
            return
        if name not in table.rules:
            raise Refusal(ABSENT)
        if verb == "flush":
            table.rules[name] = []
            return
        verdicts = {data for elements in table.elements.values() for data in elements.values()}
        if name in self.busy or table.rules[name] or f"goto {name}" in verdicts or _is_used(table, f"(jump|goto) {name}"):
            raise Refusal(BUSY)
        del table.rules[name], table.hooks[name]

    def _add_rule(self, table: FakeTable, chain: str, words: str) -> None:
        used_sets = re.findall(r"@(\S+)", words)
        used_chains = re.findall(r"(?:jump|goto) (\S+)", words)
        if chain not in table.rules or not (table.sets.keys() >= {*used_sets} and table.rules.keys() >= {*used_chains}):
            raise Refusal(ABSENT)
        if self._refuse(words):
            raise Refusal("Operation not supported")
        table.rules[chain].append(words)

    def _on_element(self, table: FakeTable, verb: str, name: str, element: str) -> None:
        if name not in table.elements:
            raise Refusal(ABSENT)
        held = table.elements[name]
        key, _, data = element.partition(" : ")
        if verb == "delete":
            if held.pop(key, None) is None:
                raise Refusal(ABSENT)
            return
        if data.startswith("goto ") and data.removeprefix("goto ") not in table.rules:
            raise Refusal(ABSENT)
        if self._refuse(element):
            raise Refusal("Invalid argument")
        if held.setdefault(key, data) != data:
            raise Refusal(EXISTS)


def _on_set(table: FakeTable, verb: str, name: str, line: str) -> None:
    if verb == "add":
        table.sets.setdefault(name, line)
        table.elements.setdefault(name, {})
        return
    if name not in table.sets:
        raise Refusal(ABSENT)
    if verb == "flush":
        table.elements[name] = {}
    elif _is_used(table, f"@{name}"):
        raise Refusal(BUSY)
    else:
        del table.sets[name], table.elements[name]


def _is_used(table: FakeTable, pattern: str) -> bool:
    return any(re.search(rf"{pattern}(?!\S)", words) for rules in table.rules.values() for words in rules)


def _key(named: NamedSet, text: str) -> ElementKey:
    """Read a key as it was printed."""
    values: list[int | str | Interval] = []
    for part, word in zip(named.key, text.split(" . "), strict=True):
        if isinstance(part, Field) and part.name.endswith("addr"):
            first, _, last = word.partition("-")
            number = int(ip_address(first))
            values.append(Interval(number, int(ip_address(last))) if last else number)
        else:
            first, _, last = word.partition("-")
            if last.isdigit():
                values.append(Interval(int(first), int(last)))
            else:
                values.append(int(word) if word.isdigit() else word)
    return tuple(values)


def _data(named: NamedSet, text: str) -> Data:
    if not named.data:
        return None
    if named.data == "endpoint":
        address, port = text.split(" . ")
        return int(ip_address(address)), int(port)
    if text.startswith("goto "):
        return Goto(text.removeprefix("goto "))
    if text.startswith("jump "):
        return JumpTo(text.removeprefix("jump "))
    return "drop" if text == "drop" else "accept"
