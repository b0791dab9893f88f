"""From what the kernel holds to what it shall hold: the least that must be written, and that as ``iptables-restore`` text.

    kernel   KUBE-SERVICES (r1 r2 ... r9999 tail)      KUBE-SVC-A (s1)      KUBE-SVC-B (..)
    desired  KUBE-SERVICES (r1 r2 ... new   tail)      KUBE-SVC-A (s2)                         KUBE-SVC-C (..)
    plan     Edit: -D r9999, -I 9999 new               Replace: :A, -A s2   Delete: :B, -X B   Replace: :C, -A ..

Decides per chain between rewriting it and editing it in place. A chain line flushes its chain, which is cheap to say and also
repairs whatever else is in it, but zeroes its counters and costs a line per rule; so long chains that change in few places
are edited. In the text of a table, chains are declared before rules that jump to them and deleted after the last rule that
did. Which chains to compare, and what to do when the kernel refuses, is the reconciler's business.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any, TypeAlias

import msgspec

from kernelstate.objects.netfilter import Anchor, ChainKey, Rule, Table
from kernelstate.text.iptables_save import TABLES, chain_lines, print_spec

LONG_CHAIN = 64
"""Chains up to this length are always rewritten whole."""

MANY_EDITS = 64
"""With more edits than this a long chain is rewritten: each deletion makes iptables walk the chain."""

Rules: TypeAlias = tuple[Rule, ...]


class Replace(msgspec.Struct, frozen=True):
    """Make the chain hold exactly ``rules``; ``create`` when it is not there yet."""

    key: ChainKey
    rules: Rules
    create: bool = False


class Edit(msgspec.Struct, frozen=True):
    """Turn a long chain into ``rules``: first delete ``removed`` by their words, then insert at 1-based positions in order."""

    key: ChainKey
    rules: Rules
    removed: Rules
    inserted: tuple[tuple[int, Rule], ...]


class Delete(msgspec.Struct, frozen=True):
    """Empty the chain and remove it."""

    key: ChainKey


class RemoveAnchor(msgspec.Struct, frozen=True):
    """Delete the first rule equal to ``rule`` from a chain that is not ours."""

    key: ChainKey
    rule: Rule


class InsertAnchor(msgspec.Struct, frozen=True):
    """Insert ``rule`` at a 1-based position of a chain that is not ours; position 0 appends."""

    key: ChainKey
    rule: Rule
    position: int


Change: TypeAlias = Replace | Edit | Delete | RemoveAnchor | InsertAnchor


class Plan(msgspec.Struct, frozen=True):
    """What to change in one family; everything in it can be printed."""

    changes: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def text(self) -> str:
        """Print it as one ``iptables-restore --noflush --counters`` input; empty for an empty plan."""
        lines: list[str] = []
        for changes, print_change in self._parts():
            for change in changes:
                lines += print_change(change)
        return "\n".join(lines) + "\n" if lines else ""

    def change_at(self, line: int) -> Change | None:
        """Return the change that wrote a 1-based line of ``text``; None for table and COMMIT lines."""
        for changes, print_change in self._parts():
            for change in changes:
                line -= len(print_change(change))
                if line <= 0:
                    return change
        return None

    def of_table(self, table: Table) -> Plan:
        """Return the part of one table."""
        return Plan(tuple(change for change in self.changes if change.key.table == table))

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables it touches, in the order in which they are written."""
        touched = {change.key.table for change in self.changes}
        return tuple(table for table in TABLES if table in touched)

    def _parts(self) -> Iterator[tuple[Sequence[Change | None], Callable[[Any], list[str]]]]:
        """Yield, in the order of the text, changes (None: a table's own lines) with what prints each as lines."""
        of_table: dict[Table, list[Change]] = defaultdict(list)
        for change in self.changes:
            of_table[change.key.table].append(change)
        for table in [table for table in TABLES if table in of_table]:
            kinds: dict[type[Change], list[Change]] = defaultdict(list)
            for change in of_table[table]:
                kinds[type(change)].append(change)
            yield _TABLE_LINE, _fixed(f"*{table}")
            yield [c for c in of_table[table] if type(c) is Replace or type(c) is Delete], _declaration
            yield kinds[RemoveAnchor], _remove_line
            yield kinds[Replace], _replace_lines
            yield kinds[Edit], _edit_lines
            yield kinds[InsertAnchor], _insert_line
            yield kinds[Delete], _delete_line
            yield _TABLE_LINE, _fixed("COMMIT")


_TABLE_LINE = (None,)


def _fixed(line: str) -> Callable[[None], list[str]]:
    return lambda _: [line]


def _declaration(change: Replace | Delete) -> list[str]:
    return [f":{change.key.name} - [0:0]"]


def _remove_line(change: RemoveAnchor) -> list[str]:
    return [f"-D {change.key.name}{print_spec(change.rule)}"]


def _replace_lines(change: Replace) -> list[str]:
    return chain_lines(change.key.name, change.rules)


def _delete_line(change: Delete) -> list[str]:
    return [f"-X {change.key.name}"]


def _edit_lines(edit: Edit) -> list[str]:
    name = edit.key.name
    return [f"-D {name}{print_spec(rule)}" for rule in edit.removed] + [
        f"-I {name} {position}{print_spec(rule)}" for position, rule in edit.inserted
    ]


def _insert_line(change: InsertAnchor) -> list[str]:
    place = f"-I {change.key.name} {change.position}" if change.position else f"-A {change.key.name}"
    return [place + print_spec(change.rule)]


# -- chains ------------------------------------------------------------------------------------------------------------


def diff_chains(
    kernel: Mapping[ChainKey, Rules], desired: Mapping[ChainKey, Rules], keys: Iterable[ChainKey]
) -> Iterator[Replace | Edit | Delete]:
    """Yield what brings the chains ``keys`` from ``kernel`` to ``desired``; a chain missing from a mapping does not exist.

    Costs one comparison per key, and that by identity where both hold the same tuple.
    """
    for key in keys:
        have, want = kernel.get(key), desired.get(key)
        if have is want:
            continue
        if want is None:
            yield Delete(key)
        elif have is None:
            yield Replace(key, want, create=True)
        elif have != want:
            yield _edit(key, have, want) or Replace(key, want)


def _edit(key: ChainKey, have: Rules, want: Rules) -> Edit | None:
    """Return the edit from ``have`` to ``want``, or None when rewriting the chain is better or the only way."""
    shorter = min(len(have), len(want))
    if shorter <= LONG_CHAIN:
        return None
    start = next((i for i in range(shorter) if not _same(have[i], want[i])), shorter)
    left = shorter - start
    tail = next((i for i in range(left) if not _same(have[-1 - i], want[-1 - i])), left)
    removed, inserted = _unmatched(have[start : len(have) - tail], want[start : len(want) - tail])
    if len(removed) + len(inserted) > min(shorter // 8, MANY_EDITS):
        return None
    # -D takes the first rule that is equal: with two equal rules in the chain that may be the wrong one.
    if any(have.count(rule) > 1 for rule in removed):
        return None
    return Edit(key, want, tuple(removed), tuple((start + index + 1, rule) for index, rule in inserted))


def _same(a: Rule, b: Rule) -> bool:
    return a is b or a == b


def _unmatched(have: Rules, want: Rules) -> tuple[list[Rule], list[tuple[int, Rule]]]:
    """Return rules of ``have`` to delete and (index, rule) of ``want`` to insert; the rest keeps its order.

    Rules are paired by equality, then the longest run of pairs that is in the same order on both sides stays.
    """
    at = {id(rule): index for index, rule in enumerate(have)}  # most rules are the same objects: no need to hash them
    pairs = [(at.pop(id(rule)), index) for index, rule in enumerate(want) if id(rule) in at]
    by_value = {have[index]: index for index in at.values()}
    taken = {index for _, index in pairs}
    pairs += [(by_value[r], i) for i, r in enumerate(want) if i not in taken and r in by_value] if by_value else []
    pairs.sort(key=itemgetter(1))
    if any(a[0] >= b[0] for a, b in pairwise(pairs)):
        pairs = _longest_increasing(pairs)
    kept_have = {a for a, _ in pairs}
    kept_want = {b for _, b in pairs}
    removed = [rule for index, rule in enumerate(have) if index not in kept_have]
    return removed, [(index, rule) for index, rule in enumerate(want) if index not in kept_want]


def _longest_increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest subsequence whose first members increase (patience sorting)."""
    ends: list[int] = []  # the smallest first member that ends a run of each length
    last: list[int] = []  # index into pairs of that member
    before: list[int] = []  # index of the predecessor of each pair, -1 for none
    for index, (have, _) in enumerate(pairs):
        at = bisect_left(ends, have)
        ends[at : at + 1], last[at : at + 1] = [have], [index]
        before.append(last[at - 1] if at else -1)
    run: list[tuple[int, int]] = []
    index = last[-1] if last else -1
    while index >= 0:
        run.append(pairs[index])
        index = before[index]
    return run[::-1]


# -- anchors -----------------------------------------------------------------------------------------------------------


def diff_anchors(
    chain: ChainKey, rules: Sequence[Rule], anchors: Collection[Anchor], is_ours: Callable[[Rule], bool]
) -> Iterator[RemoveAnchor | InsertAnchor]:
    """Yield what makes a chain that is not ours hold each of its ``anchors`` once and no other rule that ``is_ours``.

    Anchors already there stay where they are, whatever stands around them. A missing one goes right behind the one listed
    before it, or to the top; one with ``first`` off goes to the end, but not behind one listed after it.
    """
    wanted = {anchor.rule for anchor in anchors}
    now: list[Rule] = []
    for rule in rules:
        if rule in wanted and rule in now:
            yield RemoveAnchor(chain, rule)  # takes the earlier of the two; equal rules are equally good
            now.remove(rule)
        elif rule not in wanted and is_ours(rule):
            yield RemoveAnchor(chain, rule)
            continue
        now.append(rule)
    behind: int | None = None  # index of the anchor listed before
    for position, anchor in enumerate(anchors):
        if anchor.rule in now:
            behind = now.index(anchor.rule)
            continue
        if anchor.first:
            at = 0 if behind is None else behind + 1
        else:
            later = [now.index(other.rule) for other in list(anchors)[position + 1 :] if other.rule in now]
            at = min(later, default=len(now))
        yield InsertAnchor(chain, anchor.rule, at + 1 if at < len(now) else 0)
        now.insert(at, anchor.rule)
        behind = at
