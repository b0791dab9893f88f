"""iptables as Linux holds it: typed rules in chains in tables.

A ``Rule`` is what ``iptables-save`` shows on one line. The fields of the IP header (source, destination, interfaces,
protocol) are the rule's own; everything behind a ``-m`` is a match in ``matches``, in kernel order. Two rules that compare
equal are the same rule to the kernel, whichever words they were written in: ``--or-mark 0x4000`` and
``--set-xmark 0x4000/0x4000`` are one ``SetXmark``.

    family 4 or 6
      table filter | nat | mangle | raw
        chain KUBE-SERVICES      ours: replaced and deleted at will        -> Ruleset.chains
        chain PREROUTING         somebody else's: we only keep single      -> Ruleset.anchors
                                 rules in it, found again by equality

Source of the forms: iptables-extensions(8), kernel include/uapi/linux/netfilter/.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.address import Family, Prefix

Table: TypeAlias = Literal["raw", "mangle", "nat", "filter"]
Protocol: TypeAlias = Literal["", "tcp", "udp", "sctp", "icmp", "ipv6-icmp", "all"]

PROBABILITY_ONE = 1 << 31
"""xt_statistic keeps a probability as a fraction of 2^31 (xt_statistic.h)."""


class ChainKey(NamedTuple):
    """Where a chain lives."""

    family: Family
    table: Table
    name: str


# -- matches ---------------------------------------------------------------------------------------------------------


class Comment(msgspec.Struct, frozen=True, gc=False):
    """``-m comment --comment "text"``."""

    text: str


class Transport(msgspec.Struct, frozen=True, gc=False):
    """``-m tcp --dport 80``; ports are inclusive (first, last) pairs, ``None`` is any port. The rule says the same protocol."""

    protocol: Literal["tcp", "udp", "sctp"]
    dport: tuple[int, int] | None = None
    sport: tuple[int, int] | None = None


class OpensNoConnection(msgspec.Struct, frozen=True, gc=False):
    """``-m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN``: a TCP packet that is none that opens a connection. The rule says tcp."""


class ConnState(msgspec.Struct, frozen=True, gc=False):
    """``-m conntrack [!] --ctstate NEW,RELATED``; states sorted."""

    states: tuple[str, ...]
    negated: bool = False

    @classmethod
    def of(cls, *states: str, negated: bool = False) -> ConnState:
        """Return the match of these states, in whatever order they are named."""
        return cls(tuple(sorted(states)), negated)


class Mark(msgspec.Struct, frozen=True, gc=False):
    """``-m mark [!] --mark value/mask``."""

    value: int
    mask: int = 0xFFFFFFFF
    negated: bool = False


class AddrType(msgspec.Struct, frozen=True, gc=False):
    """``-m addrtype [!] --src-type LOCAL [!] --dst-type LOCAL``; an empty type is not asked, and never negated."""

    src: str = ""
    dst: str = ""
    src_negated: bool = False
    dst_negated: bool = False


class Statistic(msgspec.Struct, frozen=True, gc=False):
    """``-m statistic --mode random --probability p``; ``probability`` in units of 2^-31, as the kernel keeps it."""

    probability: int

    @classmethod
    def one_of(cls, n: int) -> Statistic:
        """Match one packet in ``n``, rounded as iptables does it from ten decimals."""
        return cls(round(float(f"{1 / n:.10f}") * PROBABILITY_ONE))


class Recent(msgspec.Struct, frozen=True, gc=False):
    """``-m recent --name N --set`` or ``--rcheck --seconds S --reap``; the key is the source address."""

    name: str
    set: bool
    seconds: int = 0


class NfAcct(msgspec.Struct, frozen=True, gc=False):
    """``-m nfacct --nfacct-name N``: counts, always matches."""

    name: str


class Limit(msgspec.Struct, frozen=True, gc=False):
    """``-m limit --limit N/sec --limit-burst M``: as many packets and no more."""

    per_second: int
    burst: int


class SetMatch(msgspec.Struct, frozen=True, gc=False):
    """``-m set [!] --match-set N dst,dst``: each dimension of the set is taken from the packet's source or destination."""

    name: str
    dimensions: tuple[Literal["src", "dst"], ...]
    negated: bool = False


class FromBridgePort(msgspec.Struct, frozen=True, gc=False):
    """``-m physdev [!] --physdev-is-in``: the packet came in through a port of a bridge and is still being bridged."""

    negated: bool = False


class OtherMatch(msgspec.Struct, frozen=True, gc=False):
    """A match of a rule that is not ours and that we only carry: its words as iptables-save printed them."""

    words: tuple[str, ...]


Match: TypeAlias = (
    Comment
    | Transport
    | OpensNoConnection
    | ConnState
    | Mark
    | AddrType
    | Statistic
    | Recent
    | Limit
    | NfAcct
    | SetMatch
    | FromBridgePort
    | OtherMatch
)

# -- targets ---------------------------------------------------------------------------------------------------------


class Verdict(Enum):
    """Targets that are a verdict."""

    ACCEPT = "ACCEPT"
    DROP = "DROP"
    RETURN = "RETURN"


class Jump(msgspec.Struct, frozen=True, gc=False):
    """``-j CHAIN``, a chain of the same table; ``goto`` for ``-g``."""

    chain: str
    goto: bool = False


class Reject(msgspec.Struct, frozen=True, gc=False):
    """``-j REJECT``; ``reject_with`` is empty for the family's default, a port-unreachable."""

    reject_with: str = ""


class Dnat(msgspec.Struct, frozen=True, gc=False):
    """``-j DNAT --to-destination address:port``; port 0 leaves the port alone."""

    family: Family
    address: int
    port: int


class Masquerade(msgspec.Struct, frozen=True, gc=False):
    """``-j MASQUERADE [--random-fully]``."""

    random_fully: bool = False


class SetXmark(msgspec.Struct, frozen=True, gc=False):
    """``-j MARK --set-xmark value/mask``: mark = (mark & ~mask) ^ value. Or: value == mask. Xor: mask == 0."""

    value: int
    mask: int


class Nflog(msgspec.Struct, frozen=True, gc=False):
    """``-j NFLOG --nflog-prefix P --nflog-group G --nflog-size S``: hand a copy to whoever listens to the group, and go on."""

    prefix: str
    group: int
    size: int


class OtherTarget(msgspec.Struct, frozen=True, gc=False):
    """A target of a rule that is not ours: its words after ``-j``."""

    words: tuple[str, ...]


Target: TypeAlias = Verdict | Jump | Reject | Dnat | Masquerade | SetXmark | Nflog | OtherTarget


class Rule(msgspec.Struct, frozen=True, gc=False):
    """One rule. ``target`` None is a rule that only counts; ``protocol`` empty is any.

    A prefix that holds every address is written as None, which is what the kernel makes of it.
    """

    target: Target | None
    matches: tuple[Match, ...] = ()
    protocol: Protocol = ""
    source: Prefix | None = None
    destination: Prefix | None = None
    source_negated: bool = False
    destination_negated: bool = False
    in_interface: str = ""
    out_interface: str = ""
    in_interface_negated: bool = False
    out_interface_negated: bool = False

    @property
    def comment(self) -> str:
        """The text of its comment, or the empty string."""
        return next((m.text for m in self.matches if isinstance(m, Comment)), "")


class Anchor(msgspec.Struct, frozen=True, gc=False):
    """A rule of ours in a chain that is not ours.

    ``first`` puts it before everything else in that chain when it is missing, otherwise it goes to the end. Several anchors
    of one chain keep the order in which the ruleset lists them: the first one listed is the first one the packet meets.
    """

    chain: ChainKey
    rule: Rule
    first: bool = True


class Ruleset(msgspec.Struct, frozen=True):
    """What should exist, or does: whole chains of ours, and single rules in other chains.

    ``chains`` must not be changed by whoever receives a ruleset; renderers that work incrementally hand over the same mapping
    again together with the keys they changed.
    """

    chains: dict[ChainKey, tuple[Rule, ...]]
    anchors: tuple[Anchor, ...] = ()
