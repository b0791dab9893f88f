"""What a change of policies, or of labels, opens and closes between pods, and between pods and addresses outside: two tables compared.

    pods whose answers cannot differ     one class: under the same policies, peer of the same rules, with the same named ports
    addresses outside                    cut where a block begins or ends; between two cuts one class
    ports                                cut where a rule's range begins or ends; between two cuts one answer

    for two classes that a change concerns, and each piece of ports:  oracle before  !=  oracle after  -->  opened, closed

So 65,536 ports cost what the rules state, and a thousand pods what differs among them. Nothing here knows objects or prints.
What no rule has to do with is not looked at: a pod that reaches itself, the node's own packets, protocols without ports.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias, get_args

import msgspec

from clusterstate.objects import IPAddress, Protocol
from clusterstate.snapshot import Name
from netpolicy.oracle import Flow, Judgement, Oracle, is_peer
from netpolicy.table import DIRECTIONS, AllowRule, Direction, PodPolicy, PolicyTable, PortRange, RuleKey, join_ports

Kind: TypeAlias = Literal["opens", "closes"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
LAST_PORT = 65535
PODS_IN_A_PIECE = 64
"""Addresses at the start of a block among which one that no pod has is looked for."""


class Outside(NamedTuple):
    """Addresses of no pod, both ends included; several pieces that no rule tells apart. ``rest``: what no rule names."""

    pieces: tuple[tuple[IPAddress, IPAddress], ...]
    rest: bool


class Ends(NamedTuple):
    """One side of connections: pods, or addresses outside."""

    pods: frozenset[Name] = frozenset()
    outside: tuple[Outside, ...] = ()


class Effect(msgspec.Struct, frozen=True):
    """Connections that a change opens, or closes, in these families: of pods' addresses and of addresses outside alike."""

    kind: Kind
    families: tuple[int, ...]
    source: Ends
    destination: Ends
    ports: tuple[PortRange, ...]
    because: tuple[str, ...]


class _Role(NamedTuple):
    """What a table knows of an address; two with the same are told apart by nobody."""

    subject: frozenset[PodPolicy]
    peer_of: frozenset[RuleKey]
    doors: frozenset[tuple[RuleKey, Protocol, int]]


class _Class(NamedTuple):
    """Addresses that have the same roles before and after. ``first`` and ``last`` stand for them."""

    first: IPAddress
    last: IPAddress
    before: _Role
    after: _Role
    pods: frozenset[Name]
    outside: Outside | None


def impact(before: PolicyTable, after: PolicyTable, pods: Mapping[Name, Iterable[IPAddress]]) -> list[Effect]:
    """Return what differs for these pods, sorted; both tables are the whole cluster's."""
    sides = _Side(before), _Side(after)
    classes = [*_classes_of_pods(sides, pods), *_classes_outside(sides, {a for own in pods.values() for a in own})]
    judges = _Judges(sides)
    found: dict[tuple[Kind, int, tuple[PortRange, ...], tuple[str, ...]], set[int]] = defaultdict(set)
    for at, destination in enumerate(classes):
        for start, source in enumerate(classes):
            for (kind, because), ports in judges.compare(source, destination).items():
                found[kind, at, join_ports(ports), because].add(start)
    joined: dict[tuple[Kind, frozenset[int], tuple[PortRange, ...], tuple[str, ...]], set[int]] = defaultdict(set)
    for (kind, at, ranges, because), starts in found.items():
        joined[kind, frozenset(starts), ranges, because].add(at)
    effects = [
        Effect(
            kind,
            (classes[min(places)].first.version,),
            _ends(classes[i] for i in starts),
            _ends(classes[i] for i in places),
            ranges,
            because,
        )
        for (kind, starts, ranges, because), places in joined.items()
    ]
    return sorted(_both_families(effects), key=_order)


def _both_families(effects: Iterable[Effect]) -> Iterable[Effect]:
    """Say once what is the same in IPv4 and IPv6."""
    found: dict[tuple[object, ...], Effect] = {}
    for one in effects:
        key = (one.kind, one.source.pods, one.destination.pods, one.ports, one.because)
        other = found.get(key)
        if other is not None:
            one = Effect(  # noqa: PLW2901
                one.kind,
                tuple(sorted({*other.families, *one.families})),
                Ends(one.source.pods, other.source.outside + one.source.outside),
                Ends(one.destination.pods, other.destination.outside + one.destination.outside),
                one.ports,
                one.because,
            )
        found[key] = one
    return found.values()


def _order(effect: Effect) -> tuple[object, ...]:
    return (effect.kind, effect.families, _sortable(effect.destination), _sortable(effect.source), effect.ports, effect.because)


def _sortable(ends: Ends) -> tuple[object, ...]:
    pieces = tuple((one.rest, *((first.version, int(first)) for first, _ in one.pieces)) for one in ends.outside)
    return (not ends.pods, tuple(sorted(ends.pods)), str(pieces))


def _ends(classes: Iterable[_Class]) -> Ends:
    chosen = list(classes)
    outside = sorted(
        (one.outside for one in chosen if one.outside), key=lambda o: (o.rest, o.pieces[0][0].version, int(o.pieces[0][0]))
    )
    return Ends(frozenset(name for one in chosen for name in one.pods), tuple(outside))


# -- classes -----------------------------------------------------------------------------------------------------------


class _Side:
    """One table, ready to be asked for the roles of addresses."""

    def __init__(self, table: PolicyTable) -> None:
        self.table, self.oracle = table, Oracle(table)
        self.rules = {rule.key: rule for rules in table.rules.values() for rule in rules}
        self._subjects: dict[IPAddress, set[PodPolicy]] = defaultdict(set)
        self._peers: dict[IPAddress, set[RuleKey]] = defaultdict(set)
        self._doors: dict[IPAddress, set[tuple[RuleKey, Protocol, int]]] = defaultdict(set)
        self._with_blocks = [rule for rule in self.rules.values() if rule.blocks]
        for pod in table.pods.values():
            for address in pod.addresses:
                self._subjects[address].add(msgspec.structs.replace(pod, pod=("", ""), addresses=()))
        for rule in self.rules.values():
            for address in rule.pods:
                self._peers[address].add(rule.key)
            for door in rule.doors:
                self._doors[door.address].add((rule.key, door.protocol, door.port))

    def role(self, address: IPAddress) -> _Role:
        """Return what the table knows of an address."""
        in_blocks = {rule.key for rule in self._with_blocks if is_peer(rule, address)}
        return _Role(
            frozenset(self._subjects.get(address, ())),
            frozenset(self._peers.get(address, set()) | in_blocks),
            frozenset(self._doors.get(address, ())),
        )

    def knows(self, address: IPAddress) -> bool:
        """Whether it is a pod's address here."""
        return address in self._subjects or address in self._peers

    def rules_at(self, address: IPAddress, direction: Direction) -> list[AllowRule]:
        """Return the rules of every policy that has a say about a pod's connections in a direction."""
        names = {policy for subject in self._subjects.get(address, ()) for policy in subject.every_policy}
        return [rule for name in sorted(names) for rule in self.table.rules_of(name, direction)]


def _classes_of_pods(sides: tuple[_Side, _Side], pods: Mapping[Name, Iterable[IPAddress]]) -> Iterator[_Class]:
    found: dict[tuple[int, _Role, _Role], list[tuple[IPAddress, Name]]] = defaultdict(list)
    for name, addresses in sorted(pods.items()):
        for address in addresses:
            found[address.version, sides[0].role(address), sides[1].role(address)].append((address, name))
    for (_, before, after), members in found.items():
        first = members[0][0]
        other = next((address for address, _ in members if address != first), first)
        yield _Class(first, other, before, after, frozenset(name for _, name in members), None)


def _classes_outside(sides: tuple[_Side, _Side], taken: set[IPAddress]) -> Iterator[_Class]:
    """Cut each family's addresses where blocks begin and end; pieces with the same roles are one class."""
    for version, size in ((4, 1 << 32), (6, 1 << 128)):
        cuts = {0, size}
        for side in sides:
            for rule in side.rules.values():
                for block in rule.blocks:
                    if block.family == version:
                        cuts |= {block.first, block.last + 1}
        found: dict[tuple[_Role, _Role], list[tuple[IPAddress, IPAddress, IPAddress]]] = defaultdict(list)
        for first, end in pairwise(sorted(cuts)):
            free = next((a for a in _start(version, first, end) if a not in taken and not any(s.knows(a) for s in sides)), None)
            if free is not None:
                found[sides[0].role(free), sides[1].role(free)].append(
                    (free, _address(version, first), _address(version, end - 1))
                )
        for (before, after), pieces in found.items():
            rest = not before.peer_of and not after.peer_of
            outside = Outside(tuple((first, last) for _, first, last in pieces), rest)
            yield _Class(pieces[0][0], pieces[0][0], before, after, frozenset(), outside)


def _address(version: int, number: int) -> IPAddress:
    return IPv4Address(number) if version == 4 else IPv6Address(number)


def _start(version: int, first: int, end: int) -> Iterator[IPAddress]:
    return (_address(version, number) for number in range(first, min(end, first + PODS_IN_A_PIECE)))


# -- answers -----------------------------------------------------------------------------------------------------------


class _Judges:
    """Both oracles, asked about two classes at a time."""

    def __init__(self, sides: tuple[_Side, _Side]) -> None:
        self._sides = sides
        self._rules: dict[tuple[int, IPAddress, Direction], list[AllowRule]] = {}

    def compare(self, source: _Class, destination: _Class) -> dict[tuple[Kind, tuple[str, ...]], list[PortRange]]:
        """Return the ports on which both tables differ, by what happens and why."""
        found: dict[tuple[Kind, tuple[str, ...]], list[PortRange]] = defaultdict(list)
        first, last = source.first, destination.last
        is_nobody = first == last or first.version != last.version or not (source.pods or destination.pods)
        if is_nobody or self._is_same(source, destination):
            return found
        for protocol in PROTOCOLS:
            for low, end in pairwise(sorted(self._cuts(source, destination, protocol))):
                flow = Flow(first, last, protocol, low)
                before, after = (side.oracle.judge(flow) for side in self._sides)
                if before.allowed != after.allowed:
                    kind: Kind = "opens" if after.allowed else "closes"
                    found[kind, _reasons(before, after)].append(PortRange(protocol, low, end - 1))
        return found

    def _relevant(
        self, source: _Class, destination: _Class, i: int
    ) -> Iterator[tuple[AllowRule, frozenset[tuple[Protocol, int]]]]:
        """Yield the rules of one table that fit both ends, whatever the port, and where their named ports lead."""
        role = (destination.before, destination.after)[i]
        doors: dict[RuleKey, set[tuple[Protocol, int]]] = defaultdict(set)
        for key, protocol, port in role.doors:
            doors[key].add((protocol, port))
        ends: tuple[tuple[Direction, IPAddress, _Role], ...] = (
            ("egress", source.first, role),
            ("ingress", destination.last, (source.before, source.after)[i]),
        )
        for direction, subject, peer in ends:
            for rule in self._rules_at(i, subject, direction):
                own = frozenset(doors.get(rule.key, ()))
                if rule.everybody or rule.key in peer.peer_of or (direction == "egress" and own):
                    yield rule, own

    def _rules_at(self, i: int, address: IPAddress, direction: Direction) -> list[AllowRule]:
        key = (i, address, direction)
        if key not in self._rules:
            self._rules[key] = self._sides[i].rules_at(address, direction)
        return self._rules[key]

    def _is_same(self, source: _Class, destination: _Class) -> bool:
        """Whether no answer can differ: the same policies with the same rules that fit."""
        if source.before.subject != source.after.subject or destination.before.subject != destination.after.subject:
            return False
        before, after = ([_meaning(rule, own) for rule, own in self._relevant(source, destination, i)] for i in (0, 1))
        return before == after

    def _cuts(self, source: _Class, destination: _Class, protocol: Protocol) -> set[int]:
        cuts = {1, LAST_PORT + 1}
        for i in (0, 1):
            for rule, doors in self._relevant(source, destination, i):
                cuts |= {at for p in rule.ports if p.protocol == protocol for at in (p.first, p.last + 1)}
                cuts |= {at for named, port in doors if named == protocol for at in (port, port + 1)}
        return cuts - {0}


def _meaning(rule: AllowRule, doors: frozenset[tuple[Protocol, int]]) -> tuple[object, ...]:
    """Return what of a rule counts for two ends that it fits."""
    return (rule.key, rule.action, rule.every_port, rule.ports, doors)


def _reasons(before: Judgement, after: Judgement) -> tuple[str, ...]:
    """Return what the new table says of each direction that changed its mind; no pod's name is in it, for it is said of many."""
    found = []
    for direction in DIRECTIONS:
        if (getattr(before, direction) == "deny") != (getattr(after, direction) == "deny"):
            said = [
                words for words in after.because if words.startswith(f"{direction}: ") and not words.endswith("passes it on")
            ]
            found.append(
                re.sub(r"Pod \S+ is isolated", "isolated", said[0]) if said else f"{direction}: no policy has a say any more"
            )
    return tuple(found)
