"""A long chain as a tree of short ones: which chain holds which rules, and nothing about what the rules do.

A chain with a rule for each of 10,000 addresses costs a packet to none of them 10,000 comparisons. The same rules by address:

    KUBE-SERVICES               -d 10.96.0.0/16  -j KUBE-DST-10.96.0.0-16       one jump a neighbourhood: what lies in none
      |                                                                         is through after a handful of rules
    KUBE-DST-10.96.0.0-16       -d 10.96.0.0/20  -j KUBE-DST-10.96.0.0-20       inner: at most FAN_OUT jumps
      |                         -d 10.96.16.0/20 -j KUBE-DST-10.96.16.0-20
    KUBE-DST-10.96.16.0-20      -d 10.96.16.0/29 -j KUBE-DST-10.96.16.0-29
      |                         ...
    KUBE-DST-10.96.16.0-29      -d 10.96.16.3/32 -p tcp ... -j KUBE-SVC-x       leaf: at most LEAF rules, word for word
                                                                                as they would stand in the long chain

Rules without an address go by protocol and port, ``-p tcp --dport 30000:30015 -j KUBE-DSTP-tcp-30000-30015``.

The shape is a function of the set of rules alone, whatever the order in which they came:

- a leaf is a largest range (a prefix, of any length) with at most LEAF rules, or one address with however many;
- an inner chain stands wherever more than LEAF rules share a prefix whose length is a multiple of STRIDE bits;
- both are written with the longest prefix that their rules share, so that packets to neighbours stay out.

So a rule more or less changes its leaf, which may become two or join its neighbour, and the chain of jumps above; the rest is
not looked at. Chains jump, never go to: what no leaf matches comes back and meets what stands behind the tree.
"""

from __future__ import annotations

from base64 import b32encode
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from hashlib import sha256
from operator import itemgetter
from typing import Literal, TypeAlias

import msgspec

from kernelstate.objects.address import BITS, Family, Prefix, address_text
from kernelstate.objects.netfilter import Jump, Rule, Transport

STRIDE = 4
FAN_OUT = 1 << STRIDE
"""Most jumps in an inner chain."""
LEAF = 16
"""Most rules in a leaf, unless they are all of one address (or port)."""
DEPTH = 8
"""Most chains below one another. All of IPv4 fits. An IPv6 leaf that deep holds what is left, however much: iptables-nft and the
kernel behind it refuse 16 nested jumps, and a refusal would take all Services down where a long leaf takes microseconds."""

Line: TypeAlias = tuple[int, tuple[str, ...], int, Rule]
"""A rule with where it stands: by key (address or port), then by whose it is and its place among those, as in the long chain."""


class Addresses(msgspec.Struct, frozen=True):
    """Rules of one address each, the packet's destination or its source; ``head`` is how names of chains start."""

    family: Family
    head: str
    side: Literal["src", "dst"] = "dst"

    @property
    def bits(self) -> int:
        """How long a key is."""
        return BITS[self.family]

    def jump(self, start: int, length: int) -> Rule:
        """Return the rule that sends the addresses of a prefix to the prefix's chain; IPv6 does not fit into a name."""
        prefix = Prefix(self.family, start, length)
        digest = b32encode(sha256(str(prefix).encode()).digest()).decode()
        jump = Jump(self.head + (f"{address_text(4, start)}-{length}" if self.family == 4 else digest[:16]))
        return Rule(jump, source=prefix) if self.side == "src" else Rule(jump, destination=prefix)


class Ports(msgspec.Struct, frozen=True):
    """Rules of one protocol and destination port each, at any address."""

    protocol: str
    head: str

    @property
    def bits(self) -> int:
        """How long a key is."""
        return 16

    def jump(self, start: int, length: int) -> Rule:
        """Return the rule that sends a range of ports to the range's chain."""
        last = start | 0xFFFF >> length
        ports = Transport(self.protocol, (start, last))  # type: ignore[arg-type]
        return Rule(Jump(f"{self.head}{self.protocol}-{start}-{last}"), (ports,), self.protocol)  # type: ignore[arg-type]


Space: TypeAlias = Addresses | Ports


class Node(msgspec.Struct, frozen=True):
    """One chain of a tree: its ``rules``, and the ``jump`` that leads to it."""

    jump: Rule
    rules: tuple[Rule, ...]
    children: tuple[tuple[_Range, Node], ...] = ()
    height: int = 0
    """Chains below one another under this one."""
    cut_off: bool = False
    """Whether it, or one below it, is a leaf only because no chain may be deeper."""

    @property
    def name(self) -> str:
        """The chain's name."""
        target = self.jump.target
        assert isinstance(target, Jump)
        return target.chain


_Range: TypeAlias = tuple[int, int]
"""A prefix: its first key and its length in bits."""


class Tree:
    """The tree of one space. ``change`` says what differs afterwards; ``top`` is what the long chain holds instead."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.lines: list[Line] = []
        self._bits = space.bits
        self._top: tuple[tuple[_Range, Node], ...] = ()
        self._nodes: dict[_Range, Node] = {}
        self._changed: list[int] | None = None  # keys whose rules differ from before, sorted; None: all
        self._made: dict[_Range, Node] = {}
        self._kept: set[_Range] = set()

    @property
    def top(self) -> tuple[Rule, ...]:
        """The jumps into the tree."""
        return tuple([node.jump for _, node in self._top])

    def fill(self, lines: Iterable[Line]) -> dict[str, tuple[Rule, ...] | None]:
        """Hold exactly these lines, given in the order of the long chain; returns what ``change`` does."""
        self.lines = sorted(lines, key=itemgetter(0))
        self._changed = None
        return self._settle()

    def change(self, removed: Iterable[Line], added: Iterable[Line]) -> dict[str, tuple[Rule, ...] | None]:
        """Take lines out and in; return the chains that may differ now, by name: what they hold, None where they are gone."""
        keys = set()
        for line in removed:
            del self.lines[bisect_left(self.lines, line[:3])]
            keys.add(line[0])
        for line in added:
            self.lines.insert(bisect_left(self.lines, line[:3]), line)
            keys.add(line[0])
        self._changed = sorted(keys)
        return self._settle()

    # -- shape ---------------------------------------------------------------------------------------------------------

    def _settle(self) -> dict[str, tuple[Rule, ...] | None]:
        self._made, self._kept = {}, set()
        before = self._top
        self._top = tuple(self._divide(0, len(self.lines), STRIDE, 1))
        written: dict[str, tuple[Rule, ...] | None] = {}
        for at, node in self._no_more(before):
            del self._nodes[at]
            written[node.name] = None
        for at, node in self._made.items():
            self._nodes[at] = node
            written[node.name] = node.rules
        return written

    def _divide(self, low: int, high: int, border: int, depth: int) -> Iterator[tuple[_Range, Node]]:
        """Yield the chains to which one chain sends ``lines[low:high]``: leaves, and inner ones from the next border on."""
        if low == high:
            return
        first, last = self.lines[low][0], self.lines[high - 1][0]
        differ = (first ^ last).bit_length()
        common = self._bits - differ
        if (common and high - low <= LEAF) or not differ or (common >= border and depth == DEPTH):
            yield self._leaf((first >> differ << differ, common), low, high)
        elif common >= border:
            yield self._inner(first, common - common % STRIDE, low, high, depth)
        else:
            middle = bisect_left(self.lines, (last >> differ - 1 << differ - 1,), low, high)
            yield from self._divide(low, middle, border, depth)
            yield from self._divide(middle, high, border, depth)

    def _leaf(self, at: _Range, low: int, high: int) -> tuple[_Range, Node]:
        known = self._unchanged(at)
        if known is not None and not known.children:
            self._kept.add(at)
            return at, known
        rules = tuple([line[3] for line in self.lines[low:high]])
        node = Node(self._jump(at), rules, cut_off=len(rules) > LEAF and at[1] < self._bits)
        self._made[at] = node
        return at, node

    def _inner(self, first: int, length: int, low: int, high: int, depth: int) -> tuple[_Range, Node]:
        rest = self._bits - length
        at = first >> rest << rest, length
        known = self._unchanged(at)
        if known is not None and known.children and not known.cut_off and depth + known.height <= DEPTH:
            self._kept.add(at)
            return at, known
        children = tuple(self._divide(low, high, length + STRIDE, depth + 1))
        node = Node(
            self._jump(at),
            tuple([child.jump for _, child in children]),
            children,
            1 + max([child.height for _, child in children]),
            any(child.cut_off for _, child in children),
        )
        self._made[at] = node
        return at, node

    def _jump(self, at: _Range) -> Rule:
        known = self._nodes.get(at)
        return self.space.jump(*at) if known is None else known.jump

    def _unchanged(self, at: _Range) -> Node | None:
        """Return the chain of a prefix as it was, if none of its rules has changed."""
        changed, (start, length) = self._changed, at
        if changed is None:
            return None
        index = bisect_left(changed, start)
        if index < len(changed) and changed[index] >> self._bits - length == start >> self._bits - length:
            return None
        return self._nodes.get(at)

    def _no_more(self, nodes: Iterable[tuple[_Range, Node]]) -> Iterator[tuple[_Range, Node]]:
        """Yield the chains of before that are not in the tree now; what was kept is not descended into."""
        for at, node in nodes:
            if at in self._kept:
                continue
            if at not in self._made:
                yield at, node
            yield from self._no_more(node.children)
