"""A chain in which several Services have rules: one list while it is short, a tree when it is long.

    put(name, rules)  ...  put(name, rules)     what a Service writes into the chain
            settle()                            what the chain holds now, and which chains below it differ

Decides which of the two forms, by the number of rules alone, and in which tree a rule goes: that of its destination address, or
of its port where it has none. How a tree looks is ``kernelstate/chain_tree.py``'s business.

In both forms a Service's own address is met before a port on any address, which is the order of their meaning
(``proxy/oracle.py``), and rules of one address or port stand in the order of Services.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain as concat
from typing import TypeAlias

from clusterstate.snapshot import Name
from kernelstate.chain_tree import Addresses, Line, Ports, Space, Tree
from kernelstate.objects.netfilter import ChainKey, Rule, Transport
from proxy.render.iptables import EXTERNAL_SERVICES, NODE_PORTS, PROXY_FIREWALL, SERVICES

HEADS = {
    SERVICES: "KUBE-DST-",
    EXTERNAL_SERVICES: "KUBE-DSTX-",
    PROXY_FIREWALL: "KUBE-DSTF-",
    NODE_PORTS: "KUBE-DSTP-",
}
"""How the names of a tree's chains start, by the chain it stands in for: no two trees of one table share a name."""

REFILL = 8
"""Once one Service in so many changes at a time, making a tree afresh costs less than following."""

MIXED = frozenset({EXTERNAL_SERVICES, PROXY_FIREWALL})
"""Chains in which there are rules of both kinds."""

Rules: TypeAlias = tuple[Rule, ...]
Written: TypeAlias = dict[ChainKey, Rules | None]
"""Chains that may differ from before, None where they are gone."""


class SharedChain:
    """One chain and the trees below it. ``dispatch_above``: with more rules than that it is a tree; 0: never."""

    def __init__(self, key: ChainKey, dispatch_above: int) -> None:
        self.key = key
        self._above = dispatch_above or sys.maxsize
        self._rules: dict[Name, Rules] = {}
        self._order: list[Name] = []
        self._count = 0
        self._before: dict[Name, Rules] = {}  # of Services put since it was settled: what they had then
        self._trees: dict[Space, Tree] = {}

    def put(self, name: Name, rules: Rules | None) -> None:
        """Replace what a Service has in the chain, None or nothing: it has no rules there."""
        before = self._rules.pop(name, ())
        self._before.setdefault(name, before)
        self._count += len(rules or ()) - len(before)
        if rules:
            self._rules[name] = rules
            if not before:
                if not self._order or self._order[-1] < name:
                    self._order.append(name)
                else:
                    insort(self._order, name)
        elif before:
            del self._order[bisect_left(self._order, name)]

    def settle(self) -> tuple[Rules, Written]:
        """Return what the chain itself holds, and the chains below it that may differ since this was asked before."""
        if self._count <= self._above:
            written = self._replant({}) if self._trees else {}
            own = self._flat()
        else:
            is_much = not self._trees or REFILL * len(self._before) > len(self._rules)
            written = self._replant(self._lines(self._rules, self._order)) if is_much else self._follow()
            own = tuple([rule for space in sorted(self._trees, key=_precedence) for rule in self._trees[space].top])
        self._before = {}
        return own, written

    # -- as a list -----------------------------------------------------------------------------------------------------

    def _flat(self) -> Rules:
        rules = concat.from_iterable(map(self._rules.__getitem__, self._order))
        return tuple(sorted(rules, key=_has_no_address)) if self.key.name in MIXED else tuple(rules)

    # -- as a tree -----------------------------------------------------------------------------------------------------

    def _replant(self, lines: dict[Space, list[Line]]) -> Written:
        """Make every tree afresh."""
        written: Written = {}
        for space in self._trees.keys() | lines.keys():
            self._note(written, self._tree(space).fill(lines.get(space, ())))
        self._trees = {space: tree for space, tree in self._trees.items() if tree.lines}
        return written

    def _follow(self) -> Written:
        """Take what was put since into the trees."""
        removed = self._lines(self._before, self._before)
        added = self._lines(self._rules, [name for name in self._before if name in self._rules])
        written: Written = {}
        for space in removed.keys() | added.keys():
            self._note(written, self._tree(space).change(removed.get(space, ()), added.get(space, ())))
        return written

    def _tree(self, space: Space) -> Tree:
        if space not in self._trees:
            self._trees[space] = Tree(space)
        return self._trees[space]

    def _note(self, written: Written, chains: dict[str, Rules | None]) -> None:
        family, table = self.key.family, self.key.table
        for name, rules in chains.items():
            written[ChainKey(family, table, name)] = rules

    def _lines(self, rules_of: Mapping[Name, Rules], names: Iterable[Name]) -> dict[Space, list[Line]]:
        """Return the rules of these Services by tree, with where they stand."""
        family, head = self.key.family, HEADS[self.key.name]
        addresses = Addresses(family, head)
        found: dict[Space, list[Line]] = defaultdict(list)
        to_addresses = found[addresses]
        for name in names:
            for place, rule in enumerate(rules_of[name]):
                if rule.destination is not None:
                    to_addresses.append((rule.destination.network, name, place, rule))
                else:
                    ports = Ports(rule.protocol, head)
                    found[ports].append((port_of(rule), name, place, rule))
        return found


def port_of(rule: Rule) -> int:
    """Return the destination port of a rule that has no address: in chains of several Services it has one."""
    return next(m.dport[0] for m in rule.matches if isinstance(m, Transport) and m.dport)


def _has_no_address(rule: Rule) -> bool:
    return rule.destination is None


def _precedence(space: Space) -> tuple[bool, str]:
    return (True, space.protocol) if isinstance(space, Ports) else (False, "")
