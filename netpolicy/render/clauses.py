"""Rules that do the same, one behind the other: a clause. What they are about together, kept by counting.

    a/web-in[0], a/web-in[1], a/deny-all  -->  Clause    peers    addresses, on every port
                                                         blocks   address ranges, on every port
                                                         tuples   address . protocol . port
                                                         boxes    address range . protocol . port range
                                                         ports    protocol . port range, whoever it is

A clause is found by what its rules state, so rules that state something else are another clause, which is complete before anybody
is led there; the pods among the peers come and go inside the clause, at the price of those that do. However many rules there are,
a packet meets each of these once. Which clauses a pod's packets meet, and what each of them does, is for ``groups.py``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import msgspec

from clusterstate.objects import IPAddress, Protocol
from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from netpolicy.blocks import Interval, joined
from netpolicy.selections import PeerChange
from netpolicy.table import AllowRule, Direction, PodPolicy, PolicyTable, PortRange, RuleKey, join_ports, policy_name

PARTS = ("peers", "blocks", "ports", "tuples", "boxes")
SINGLE_PORTS = 16
"""A range of at most so many ports is written port by port, which costs memory; a larger one costs time when peers change."""


class ClauseKey(NamedTuple):
    """What tells clauses apart."""

    direction: Direction
    policies: tuple[tuple[Name, str], ...]
    """Each with a digest of what it states."""
    doors: tuple[tuple[PortRange, ...], ...]
    """For each ingress rule the ports that it states by name, as they are at these pods."""
    numbers: tuple[tuple[int, ...], ...] = ()
    """Of each policy, which rules; none: all of all."""

    @property
    def name(self) -> str:
        """Return a short name, the same wherever the same is stated: ``in-6f1c2a90b3d4``."""
        return short_name(self.direction, tuple(self) if self.numbers else tuple(self)[:3])


class Tuple(NamedTuple):
    """One peer on one port."""

    address: int
    protocol: Protocol
    port: int


class Box(NamedTuple):
    """A range of peers on a range of ports."""

    first: int
    last: int
    ports: PortRange


Touched: TypeAlias = dict[Family, tuple[set[int], set[Tuple]]]
"""Addresses on every port, and tuples, that came or went, by family."""


class Union(msgspec.Struct):
    """What a clause is about in one family: what is in one of these."""

    ports: tuple[PortRange, ...]
    peers: Counter[int]
    """How many rules are about an address on every port."""
    tuples: Counter[Tuple]
    blocks: tuple[Interval, ...]
    boxes: tuple[Box, ...]


class Clause:
    """One clause, as its rules are now."""

    def __init__(self, key: ClauseKey, rules: list[AllowRule]) -> None:
        self.key = key
        self.name = key.name
        self.take(rules)

    def take(self, rules: list[AllowRule]) -> None:
        """Let these be its rules: they state the same as before, while peers and where their ports lead may be others."""
        self.rules = {rule.key: rule for rule in rules}
        doors = self.key.doors if self.key.direction == "ingress" else ((),) * len(rules)
        # Of each rule: the ports it states by number, and by name as they are at these pods.
        self.ports = {rule.key: join_ports((*rule.ports, *ports)) for rule, ports in zip(rules, doors, strict=True)}
        self.unions: dict[Family, Union] = {family: self._union(family) for family in (4, 6)}
        self.parts = {part: held for part, held in self._parts().items() if held}
        self._large = _large_ranges(self.rules.values(), self.ports)
        self.everything = any(rule.is_about_all for rule in rules)
        """Every packet fits, whatever is in the unions."""

    @property
    def large_ranges(self) -> dict[PortRange, list[AllowRule]]:
        """The ranges that are too large to be written port by port, sorted, and the rules that state each."""
        return {ports: [self.rules[key] for key in keys] for ports, keys in self._large.items()}

    def words(self, part: str) -> str:
        """Say which rules fill a part, and what they state."""
        return rules_words(self.parts[part])

    def move(self, rule: AllowRule, change: PeerChange) -> Touched:
        """Let peers come and go; return the addresses and tuples of each family that may differ now."""
        self.rules[rule.key] = rule
        touched: Touched = {4: (set(), set()), 6: (set(), set())}
        for addresses, step in ((change.come, 1), (change.gone, -1)):
            for address in addresses:
                family: Family = address.version
                self._count(self.unions[family], rule, address, step, touched[family])
        if any(not is_single(ports) for ports in self.ports[rule.key]) and not rule.every_port:
            for family, union in self.unions.items():
                union.boxes = self._boxes(family)
        return touched

    def _union(self, family: Family) -> Union:
        rules = list(self.rules.values())
        union = Union(
            ports=join_ports(p for rule in rules if rule.everybody and not rule.every_port for p in self.ports[rule.key]),
            peers=Counter(),
            tuples=Counter(),
            blocks=joined(b for rule in rules if rule.every_port for b in rule.blocks if b.family == family),
            boxes=self._boxes(family),
        )
        for rule in rules:
            for address in rule.pods:
                if address.version == family:
                    self._count(union, rule, address, 1, (set(), set()))
            for door in rule.doors if rule.key.direction == "egress" else ():
                if door.address.version == family:
                    union.tuples[Tuple(int(door.address), door.protocol, door.port)] += 1
        return union

    def _count(
        self, union: Union, rule: AllowRule, address: IPAddress, step: int, touched: tuple[set[int], set[Tuple]]
    ) -> None:
        """Count one peer of one rule in or out."""
        number = int(address)
        if rule.every_port:
            _add(union.peers, number, step)
            touched[0].add(number)
            return
        for protocol, first, last in self.ports[rule.key]:
            if last - first < SINGLE_PORTS:
                for port in range(first, last + 1):
                    one = Tuple(number, protocol, port)
                    _add(union.tuples, one, step)
                    touched[1].add(one)

    def _boxes(self, family: Family) -> tuple[Box, ...]:
        """Return what has a range of addresses or a large range of ports, cut so that no two overlap."""
        parts: list[Box] = []
        for rule in self.rules.values():
            if rule.every_port or rule.everybody:
                continue
            large = [ports for ports in self.ports[rule.key] if not is_single(ports)]
            parts += [Box(int(a), int(a), ports) for ports in large for a in rule.pods if a.version == family]
            blocks = [b for b in rule.blocks if b.family == family]
            parts += [Box(b.first, b.last, ports) for ports in self.ports[rule.key] for b in blocks]
        return disjoint(parts)

    def _parts(self) -> dict[str, list[AllowRule]]:
        """Return which rules may ever put something into each part; it follows from what they state, not from who there is."""
        outward = self.key.direction == "egress"
        found: dict[str, list[AllowRule]] = {part: [] for part in PARTS}
        for rule in self.rules.values():
            ports = self.ports[rule.key]
            if rule.every_port:
                found["peers"] += [] if rule.everybody else [rule]
                found["blocks"] += [rule] if rule.blocks else []
                continue
            found["ports"] += [rule] if rule.everybody else []
            # Ports stated by name lead to tuples of their own when packets leave.
            found["tuples"] += [rule] if outward or (not rule.everybody and any(map(is_single, ports))) else []
            large = bool(rule.blocks) or not all(map(is_single, ports))
            found["boxes"] += [rule] if large and not rule.everybody else []
        return found


def clause_key(pod: PodPolicy, direction: Direction, rules: Mapping[Name, list[AllowRule]], *, some: bool = False) -> ClauseKey:
    """Return the clause of these rules as they are for a pod; ``some``: there may be others of their policies."""
    doors = [_doors_at(pod, rule) for held in rules.values() for rule in held] if direction == "ingress" else []
    numbers = [tuple(rule.key.number for rule in held) for held in rules.values()] if some else []
    return ClauseKey(direction, tuple((policy, _digest(held)) for policy, held in rules.items()), tuple(doors), tuple(numbers))


def rules_of(key: ClauseKey, table: PolicyTable) -> list[AllowRule]:
    """Return a clause's rules, policy by policy."""
    numbers = key.numbers or (None,) * len(key.policies)
    return [
        rule
        for (policy, _), some in zip(key.policies, numbers, strict=True)
        for rule in table.rules_of(policy, key.direction)
        if some is None or rule.key.number in some
    ]


def short_name(direction: Direction, stated: object) -> str:
    """Return a name for what is stated: ``in-6f1c2a90b3d4``."""
    return f"{'in' if direction == 'ingress' else 'out'}-{hashlib.sha256(repr(stated).encode()).hexdigest()[:12]}"


def rules_words(rules: Iterable[AllowRule]) -> str:
    """Say several rules: ``shop/db[0] from pods of its namespace; on TCP 5432 | ...``."""
    return " | ".join(f"{policy_name(rule.key.policy)}[{rule.key.number}] {rule.says}" for rule in rules)


def _large_ranges(
    rules: Iterable[AllowRule], stated: Mapping[RuleKey, tuple[PortRange, ...]]
) -> dict[PortRange, list[RuleKey]]:
    found: dict[PortRange, list[RuleKey]] = {}
    for rule in rules:
        for ports in () if rule.every_port else stated[rule.key]:
            if not is_single(ports):
                found.setdefault(ports, []).append(rule.key)
    return dict(sorted(found.items()))


def is_single(ports: PortRange) -> bool:
    """Whether a range is written port by port."""
    return ports.last - ports.first < SINGLE_PORTS


def disjoint(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Return boxes that hold the same together, of which no two overlap: ranges of addresses, each with its ports."""
    found: list[Box] = []
    last: dict[PortRange, int] = {}
    for first, end, ports in _slices(list(boxes)):
        for one in ports:
            at = last.get(one)
            if at is not None and found[at].last + 1 == first:
                found[at] = Box(found[at].first, end, one)
            else:
                last[one] = len(found)
                found.append(Box(first, end, one))
    return tuple(found)


def _slices(boxes: list[Box]) -> Iterator[tuple[int, int, tuple[PortRange, ...]]]:
    """Cut the addresses where a box begins or ends; yield each slice with the ports of the boxes that hold it."""
    starts: dict[int, list[PortRange]] = {}
    ends: dict[int, list[PortRange]] = {}
    for box in boxes:
        starts.setdefault(box.first, []).append(box.ports)
        ends.setdefault(box.last + 1, []).append(box.ports)
    edges = sorted({*starts, *ends})
    open_: Counter[PortRange] = Counter()
    for edge, following in pairwise(edges):
        for ports in starts.get(edge, ()):
            open_[ports] += 1
        for ports in ends.get(edge, ()):
            _add(open_, ports, -1)
        if open_:
            yield edge, following - 1, join_ports(open_)


def _doors_at(pod: PodPolicy, rule: AllowRule) -> tuple[PortRange, ...]:
    return join_ports(PortRange(d.protocol, d.port, d.port) for d in rule.doors if d.pod == pod.pod)


def _digest(rules: Iterable[AllowRule]) -> str:
    stated = [(rule.says, rule.everybody, rule.every_port, rule.blocks, rule.ports) for rule in rules]
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:16]


def _add(counter: Counter[int] | Counter[Tuple] | Counter[PortRange], key: int | Tuple | PortRange, step: int) -> None:
    """Count up or down; what is at nothing is not in the counter."""
    value = counter[key] + step  # type: ignore[index]
    if value:
        counter[key] = value  # type: ignore[index]
    else:
        del counter[key]
