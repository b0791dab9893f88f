"""nftables as Linux holds it: tables with chains of typed rules, and named sets and maps with their elements.

    table ip nodeplane                              Table
      map services {10.96.0.1 . tcp . 80 : goto cluster-ip-3}     NamedSet + elements {key: data}
      chain cluster-ip-3                            Chain: rules, and a hook if the kernel calls it itself
        mark set ... ; dnat to ... map @endpoints   Rule: matches first, then statements

A ``Rule`` is one line of ``nft list chain``. Only what our own tables need is here: a table of ours is ours whole, and
others' tables are never read. Elements live beside their set, because sets change rarely and elements all the time.

Source of the forms: nft(8), kernel include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.address import Family, Prefix

# -- what keys and rules look at -------------------------------------------------------------------------------------


class Field(msgspec.Struct, frozen=True, gc=False):
    """A value taken from the packet: ``saddr``, ``daddr``, ``l4proto``, ``dport``, ``original-saddr``, ...

    ``original-*`` are conntrack's: the packet's addresses and port as they were before translation.
    """

    name: Literal["saddr", "daddr", "l4proto", "dport", "original-saddr", "original-daddr", "original-dport"]


class Random(msgspec.Struct, frozen=True, gc=False):
    """``numgen random mod N``: a number from 0 to N - 1 by chance."""

    modulus: int


class SourceHash(msgspec.Struct, frozen=True, gc=False):
    """``jhash ip saddr mod N seed S``: a number from 0 to N - 1 that is the same for one client everywhere."""

    modulus: int
    seed: int


KeyPart: TypeAlias = Field | Random | SourceHash
Key: TypeAlias = tuple[KeyPart, ...]
"""What is looked up, part by part: ``ip daddr . meta l4proto . th dport``."""

# -- elements --------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A range of addresses or ports, both ends included, in a key of an interval set."""

    first: int
    last: int


ElementKey: TypeAlias = tuple[int | str | Interval, ...]
"""Addresses and ports as numbers, protocols as ``tcp``, ``udp`` or ``sctp``; parts as in the set's ``key``."""


def plain_key(key: ElementKey) -> ElementKey:
    """Return a key as it is read back and as it is printed, where an interval of one address or port is that one."""
    return tuple(part.first if isinstance(part, Interval) and part.first == part.last else part for part in key)


class Goto(NamedTuple):
    """``goto CHAIN`` as the verdict of an element."""

    chain: str


class JumpTo(NamedTuple):
    """``jump CHAIN`` as the verdict of an element: what returns from there goes on with the next rule."""

    chain: str
    returns: bool = True
    """Always; without it this would be the same tuple as a ``Goto``."""


Data: TypeAlias = Goto | JumpTo | Literal["drop", "accept"] | tuple[int, int] | None
"""What an element leads to: a verdict, an (address, port), or nothing (a set)."""


class NamedSet(msgspec.Struct, frozen=True):
    """A set or map without its elements. ``key`` gives the types; ``data`` empty is a set.

    ``timeout`` in seconds; a ``dynamic`` set is filled by rules, so its elements are the kernel's, never ours. The kernel cannot
    alter a set, so a renderer gives another name to another set: what is declared under one name stays as it is.
    """

    name: str
    key: Key
    data: Literal["", "verdict", "endpoint"] = ""
    intervals: bool = False
    dynamic: bool = False
    timeout: int = 0
    size: int = 0
    comment: str = ""
    counter: bool = False
    """Whether each element counts the packets that ask for it."""


# -- matches ---------------------------------------------------------------------------------------------------------


class CtState(msgspec.Struct, frozen=True, gc=False):
    """``ct state new``; states sorted."""

    states: tuple[str, ...]


class CtStatus(msgspec.Struct, frozen=True, gc=False):
    """``ct status dnat``."""

    status: str


class InSet(msgspec.Struct, frozen=True, gc=False):
    """``KEY @set`` or ``KEY != @set``."""

    key: Key
    set: str
    negated: bool = False


class AddressIs(msgspec.Struct, frozen=True, gc=False):
    """``ip saddr 10.244.0.0/16``, ``ip daddr != 127.0.0.0/8``; several prefixes are an anonymous set."""

    side: Literal["saddr", "daddr"]
    prefixes: tuple[Prefix, ...]
    negated: bool = False


class InterfaceIs(msgspec.Struct, frozen=True, gc=False):
    """``iifname cni0`` or ``iifname "veth*"``; ``name`` ends in ``*`` for a prefix."""

    name: str
    negated: bool = False


class FibLocal(msgspec.Struct, frozen=True, gc=False):
    """``fib daddr type local``: the address is one of the node's own."""

    side: Literal["saddr", "daddr"]


class ProtocolIs(msgspec.Struct, frozen=True, gc=False):
    """``meta l4proto tcp``; several are an anonymous set."""

    protocols: tuple[str, ...]


class MarkIs(msgspec.Struct, frozen=True, gc=False):
    """``meta mark & mask != 0`` (``negated``: ``== 0``)."""

    mask: int
    negated: bool = False


class Chance(msgspec.Struct, frozen=True, gc=False):
    """``numgen random mod N 0``: true for one packet in N."""

    modulus: int


class OpensNoConnection(msgspec.Struct, frozen=True, gc=False):
    """``tcp flags & (fin | syn | rst | ack) != syn``: a TCP packet that is none that opens a connection."""


class NeighbourDiscovery(msgspec.Struct, frozen=True, gc=False):
    """``icmpv6 type { nd-router-solicit, ... }``: what IPv6 cannot do without (RFC 4861). Never holds for IPv4."""


Match: TypeAlias = (
    OpensNoConnection
    | NeighbourDiscovery
    | CtState
    | CtStatus
    | InSet
    | AddressIs
    | InterfaceIs
    | FibLocal
    | ProtocolIs
    | MarkIs
    | Chance
)

# -- statements ------------------------------------------------------------------------------------------------------


class OrMark(msgspec.Struct, frozen=True, gc=False):
    """``meta mark set meta mark | mask``."""

    mask: int


class XorMark(msgspec.Struct, frozen=True, gc=False):
    """``meta mark set meta mark ^ mask``."""

    mask: int


class JumpChain(msgspec.Struct, frozen=True, gc=False):
    """``jump CHAIN``."""

    chain: str


class GotoChain(msgspec.Struct, frozen=True, gc=False):
    """``goto CHAIN``."""

    chain: str


class VerdictMap(msgspec.Struct, frozen=True, gc=False):
    """``KEY vmap @map``: the verdict found under the key, or go on with the next rule."""

    key: Key
    map: str


class DnatByMap(msgspec.Struct, frozen=True, gc=False):
    """``dnat to KEY map @map``: to the endpoint found under the key; without one, go on with the next rule."""

    key: Key
    map: str


class DnatTo(msgspec.Struct, frozen=True, gc=False):
    """``dnat to address:port``."""

    address: int
    port: int


class Remember(msgspec.Struct, frozen=True, gc=False):
    """``update @set { KEY }`` or, with ``data``, ``update @map { KEY : DATA }``: put in, or start its timeout again."""

    key: Key
    set: str
    data: Key = ()


class LogSome(msgspec.Struct, frozen=True, gc=False):
    """``limit rate N/second burst M packets log prefix "P" group G``: hand a copy of some packets to whoever listens to the group."""

    per_second: int
    burst: int
    prefix: str
    group: int


class MasqueradeFully(msgspec.Struct, frozen=True, gc=False):
    """``masquerade`` or ``masquerade fully-random``."""

    random_fully: bool = True


class Refuse(msgspec.Struct, frozen=True, gc=False):
    """``reject``: a port-unreachable."""


class DropPacket(msgspec.Struct, frozen=True, gc=False):
    """``drop``."""


class AcceptPacket(msgspec.Struct, frozen=True, gc=False):
    """``accept``: done with this hook's chain; chains of later priorities still see the packet."""


class ReturnToCaller(msgspec.Struct, frozen=True, gc=False):
    """``return``: back to the calling chain; in a base chain, its end."""


Statement: TypeAlias = (
    OrMark
    | XorMark
    | JumpChain
    | GotoChain
    | VerdictMap
    | DnatByMap
    | DnatTo
    | Remember
    | LogSome
    | MasqueradeFully
    | Refuse
    | DropPacket
    | AcceptPacket
    | ReturnToCaller
)


class Rule(msgspec.Struct, frozen=True, gc=False):
    """One rule: every match must hold, then the statements are done in order."""

    matches: tuple[Match, ...]
    statements: tuple[Statement, ...]
    comment: str = ""


# -- tables ----------------------------------------------------------------------------------------------------------


class Hook(msgspec.Struct, frozen=True, gc=False):
    """Where the kernel calls a chain: ``type nat hook prerouting priority -100``."""

    type: Literal["filter", "nat"]
    hook: Literal["prerouting", "input", "forward", "output", "postrouting"]
    priority: int


class Chain(msgspec.Struct, frozen=True, gc=False):
    """A chain: its rules, and its hook if it is a base chain."""

    rules: tuple[Rule, ...]
    hook: Hook | None = None


class TableKey(NamedTuple):
    """A table of ours."""

    family: Family
    name: str


class Table(msgspec.Struct, frozen=True):
    """One table. ``elements`` has an entry for every set that is not dynamic; sets and elements are named apart.

    Whoever receives a table must not change its mappings; a renderer that works incrementally hands over the same ones again
    together with what it changed (``TableChange``).
    """

    chains: dict[str, Chain]
    sets: dict[str, NamedSet]
    elements: dict[str, dict[ElementKey, Data]]


class TableChange(msgspec.Struct, frozen=True):
    """Which parts of a table may differ from the one handed over before."""

    chains: frozenset[str] = frozenset()
    sets: frozenset[str] = frozenset()
    elements: dict[str, frozenset[ElementKey]] = {}
