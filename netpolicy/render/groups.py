"""Pods whose policies say the same share what is written for them: a group. What its rules let through together, kept by counting.

    pod a/web-1 --.
                   +--> Group("ingress", a/web-in, a/deny-all)       peers    addresses, on every port
    pod a/web-2 --'                                                  tuples   address . protocol . port
                                                                     boxes    address range . protocol . port range
                                                                     ports    protocol . port range, whoever it is

A group is found by what its policies state, so a policy that states something else leads its pods to another group, which is
complete before they are led there; the pods among the peers come and go inside the group, at the price of those that do. However
many policies and rules there are, a packet meets each of these once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import msgspec

from clusterstate.objects import IPAddress, Protocol
from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from netpolicy.blocks import Interval, joined
from netpolicy.selections import PeerChange
from netpolicy.table import AllowRule, Direction, PodPolicy, PolicyTable, PortRange, join_ports

PARTS = ("peers", "blocks", "ports", "tuples", "boxes")
SINGLE_PORTS = 16
"""A range of at most so many ports is written port by port, which costs memory; a larger one costs time when peers change."""


class GroupKey(NamedTuple):
    """What tells groups apart."""

    direction: Direction
    policies: tuple[tuple[Name, str], ...]
    """Each with a digest of what it states."""
    doors: tuple[tuple[PortRange, ...], ...]
    """For each ingress rule the ports that it states by name, as they are at these pods."""

    @property
    def name(self) -> str:
        """Return a short name, the same wherever the same is stated: ``in-6f1c2a90b3d4``."""
        digest = hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:12]
        return f"{'in' if self.direction == 'ingress' else 'out'}-{digest}"


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
    """What a group lets through in one family: anything, if ``everything``, else what is in one of the others."""

    everything: bool
    ports: tuple[PortRange, ...]
    peers: Counter[int]
    """How many rules let an address through on every port."""
    tuples: Counter[Tuple]
    blocks: tuple[Interval, ...]
    boxes: tuple[Box, ...]


class Group:
    """One group, as its rules are now."""

    def __init__(self, key: GroupKey, rules: list[AllowRule]) -> None:
        self.key = key
        self.name = key.name
        self.rules = {rule.key: rule for rule in rules}
        doors = key.doors if key.direction == "ingress" else ((),) * len(rules)
        # Of each rule: the ports it states by number, and by name as they are at these pods.
        self.ports = {rule.key: join_ports((*rule.ports, *ports)) for rule, ports in zip(rules, doors, strict=True)}
        self.unions: dict[Family, Union] = {family: self._union(family) for family in (4, 6)}
        self.who = f"{key.direction} of pods isolated by {', '.join('/'.join(policy) for policy, _ in key.policies)}"
        self.parts = {part: rules for part, rules in self._parts().items() if rules}

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
            everything=any(rule.everybody and rule.every_port for rule in rules),
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


def group_key(pod: PodPolicy, direction: Direction, table: PolicyTable) -> GroupKey | None:
    """Return the group of a pod in a direction; None where it is not isolated."""
    policies = pod.policies(direction)
    if policies is None:
        return None
    stated = []
    doors: list[tuple[PortRange, ...]] = []
    for policy in policies:
        rules = table.rules_of(policy, direction)
        stated.append((policy, _digest(rules)))
        if direction == "ingress":
            doors += [_doors_at(pod, rule) for rule in rules]
    return GroupKey(direction, tuple(stated), tuple(doors))


def rules_of(key: GroupKey, table: PolicyTable) -> list[AllowRule]:
    """Return a group's rules, policy by policy."""
    return [rule for policy, _ in key.policies for rule in table.rules_of(policy, key.direction)]


def rules_words(rules: Iterable[AllowRule]) -> str:
    """Say several rules: ``shop/db[0] from pods of its namespace; on TCP 5432 | ...``."""
    return " | ".join(f"{'/'.join(rule.key.policy)}[{rule.key.number}] {rule.says}" for rule in rules)


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
