"""A clause's sets for iptables, and the look-ups that ask them.

    PEERS    hash:ip          a pod, on every port
    BLOCKS   hash:net         an address block, on every port
    TUPLES   hash:ip,port     a pod on a port
    NETS     hash:net,port    a block, or anybody, on a port
    R6F1C2   hash:net         who may use one large range of ports, which the rule itself states

Set types have no range of addresses, so blocks are cut into prefixes; nor any of ports, so a large range is a look-up of its own.
What becomes of a packet that one of them fits is for ``iptables.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

from kernelstate.objects.address import BITS, Family
from kernelstate.objects.netfilter import Match, Protocol, SetMatch, Transport
from kernelstate.objects.sets import Member, SetSpec, SetType
from netpolicy.blocks import Interval, prefixes
from netpolicy.render.clauses import Clause, Touched, Tuple, is_single, rules_words
from netpolicy.table import AllowRule, Direction, PortRange

HEADS: Mapping[Direction, str] = {"egress": "NETPOL-EG-", "ingress": "NETPOL-IN-"}
"""How names begin."""
Side: TypeAlias = Literal["src", "dst"]
_PEERS: Mapping[Direction, Side] = {"egress": "dst", "ingress": "src"}
_PROTOCOLS: Mapping[str, Literal["tcp", "udp", "sctp"]] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
_EVERY_PORT = (0, 65535)


class LookUp(NamedTuple):
    """What has to hold of a packet, and the rules that say so in words."""

    matches: tuple[Match, ...]
    protocol: Protocol
    says: str


def own_name(direction: Direction, name: str) -> str:
    """Return the name of a group's chain, or the beginning of those of a clause's sets."""
    return HEADS[direction] + name.partition("-")[2].upper()


def look_ups(clause: Clause, family: Family) -> Iterator[LookUp]:
    """Yield the look-ups of a clause that is not about everything; one of them fits wherever the clause does."""
    peer = _PEERS[clause.key.direction]

    def ask(part: str, says: str, *dimensions: Side) -> LookUp:
        return LookUp((SetMatch(_set_name(clause, part, family), dimensions),), "", says)

    if "peers" in clause.parts:
        yield ask("PEERS", clause.words("peers"), peer)
    if "blocks" in clause.parts:
        yield ask("BLOCKS", clause.words("blocks"), peer)
    if "tuples" in clause.parts:
        yield ask("TUPLES", clause.words("tuples"), peer, "dst")
    if _net_rules(clause):
        yield ask("NETS", rules_words(_net_rules(clause)), peer, "dst")
    for ports, rules in clause.large_ranges.items():
        matches: list[Match] = []
        protocol = _PROTOCOLS[ports.protocol]
        if (ports.first, ports.last) != _EVERY_PORT:
            matches.append(Transport(protocol, (ports.first, ports.last)))
        if not _is_for_everybody(rules):
            matches.append(SetMatch(_set_name(clause, _range_name(ports), family), (peer,)))
        yield LookUp(tuple(matches), protocol, rules_words(rules))


def sets_of(clause: Clause, family: Family) -> Iterator[tuple[SetSpec, Iterable[Member]]]:
    """Yield a clause's sets in one family: those that its rules may ever fill, so that peers can come."""
    union = clause.unions[family]
    if clause.everything:
        return
    if "peers" in clause.parts:
        yield _spec(clause, "PEERS", "hash:ip", family), [(address,) for address in union.peers]
    if "blocks" in clause.parts:
        yield _spec(clause, "BLOCKS", "hash:net", family), [(one,) for block in union.blocks for one in prefixes(block)]
    if "tuples" in clause.parts:
        yield _spec(clause, "TUPLES", "hash:ip,port", family), map(_tuple, union.tuples)
    if _net_rules(clause):
        yield _spec(clause, "NETS", "hash:net,port", family), _nets(clause, family)
    yield from ranges_of(clause, family)


def moves_of(clause: Clause, family: Family, touched: Touched) -> Iterator[tuple[SetSpec, Mapping[Member, bool]]]:
    """Yield the sets in which peers come or go, and of these which are there now."""
    union, (addresses, tuples) = clause.unions[family], touched[family]
    if addresses:
        yield _spec(clause, "PEERS", "hash:ip", family), {(address,): address in union.peers for address in addresses}
    if tuples:
        yield _spec(clause, "TUPLES", "hash:ip,port", family), {_tuple(one): one in union.tuples for one in tuples}


def ranges_of(clause: Clause, family: Family) -> Iterator[tuple[SetSpec, set[Member]]]:
    """Yield the sets of those who may use a large range of ports, whole."""
    for ports, rules in clause.large_ranges.items():
        if not _is_for_everybody(rules):
            yield _range_set(clause, ports, rules, family)


def _spec(clause: Clause, part: str, kind: SetType, family: Family) -> SetSpec:
    return SetSpec(_set_name(clause, part, family), kind, family)


def _set_name(clause: Clause, part: str, family: Family) -> str:
    return f"{own_name(clause.key.direction, clause.name)}-{part}-{family}"


def _net_rules(clause: Clause) -> list[AllowRule]:
    """Return the rules that let blocks, or anybody, in on single ports."""
    return [
        rule
        for rule in clause.rules.values()
        if not rule.every_port and (rule.everybody or rule.blocks) and any(map(is_single, clause.ports[rule.key]))
    ]


def _nets(clause: Clause, family: Family) -> Iterator[Member]:
    for rule in _net_rules(clause):
        networks = _networks(rule, family)
        for protocol, first, last in filter(is_single, clause.ports[rule.key]):
            for port in range(first, last + 1):
                yield from ((network, _PROTOCOLS[protocol], port) for network in networks)


def _networks(rule: AllowRule, family: Family) -> list[tuple[int, int]]:
    """Return a rule's peers that are not pods."""
    if rule.everybody:
        return prefixes(Interval(family, 0, (1 << BITS[family]) - 1))
    return [one for block in rule.blocks if block.family == family for one in prefixes(block)]


def _is_for_everybody(rules: list[AllowRule]) -> bool:
    return any(rule.everybody for rule in rules)


def _range_name(ports: PortRange) -> str:
    return "R" + hashlib.sha256(repr(tuple(ports)).encode()).hexdigest()[:5].upper()


def _range_set(clause: Clause, ports: PortRange, rules: list[AllowRule], family: Family) -> tuple[SetSpec, set[Member]]:
    """Return who may use a large range of ports."""
    pods: set[Member] = {((int(a), BITS[family]),) for rule in rules for a in rule.pods if a.version == family}
    blocks: set[Member] = {(one,) for rule in rules for one in _networks(rule, family)}
    return _spec(clause, _range_name(ports), "hash:net", family), pods | blocks


def _tuple(one: Tuple) -> Member:
    return (one.address, _PROTOCOLS[one.protocol], one.port)
