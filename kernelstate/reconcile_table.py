"""One nftables table of ours: when to look at the kernel, what to compare, what to remember.

    _desired    what shall be      the renderer's, changed in place by it; None: the table shall not exist
    _kernel     what is            our own copy; keys and chains are the same objects as the desired ones
    _change     where the two may differ; None: anywhere
    _refused    what the kernel did not take, tried again by itself at each sync (see ``contain_nftables.py``)

Looks at the start, when told that somebody else touched the table, and after a refusal; otherwise memory is enough, and a sync
costs what changed. What is right already is not written again, also after a restart.

Kernels before 6.2 let go of a chain some time after the element that led to it: a chain that is busy when it should go is empty
meanwhile and deleted later, and nobody is troubled with it. What the difference is, is ``diff_nftables.py``'s business.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from kernelstate.contain_nftables import Refused, describe, write_in_parts
from kernelstate.diff_nftables import Fill, Item, Load, Settle, Step, TablePlan, diff_tables, remember
from kernelstate.errors import KernelRefusedError, KernelStateError
from kernelstate.objects.nftables import Chain, Data, ElementKey, NamedSet, Table, TableChange, TableKey
from kernelstate.text.nft import WORD, delete_table

Done = tuple[int, list[str]]

BUSY = os.strerror(errno.EBUSY)


class TablePort(Protocol):
    """Reading and writing nftables in one network namespace."""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when any table changed."""

    def touched(self, keys: Collection[TableKey]) -> frozenset[TableKey] | None:
        """Return which of the tables somebody else may have changed since the last call; None if that is not known."""

    def observe(self, key: TableKey, like: Table) -> Table | None:
        """Return what the kernel holds, None if there is no such table; what equals ``like`` is the same in the answer.

        Elements are told exactly; chains and sets that are not as in ``like`` only as being something else. What is returned is
        the caller's to change. Raises KernelStateError.
        """

    def apply(self, text: str) -> None:
        """Do the commands in one transaction. Raises KernelRefusedError."""

    def load(self, key: TableKey, named: NamedSet, elements: Mapping[ElementKey, Data]) -> None:
        """Add many elements, none of which is there. Raises KernelRefusedError; some may have been added then."""

    def fill(self, key: TableKey, sets: Mapping[str, NamedSet], chains: Mapping[str, Chain]) -> None:
        """Empty chains that are there and write their rules, in one transaction. Raises KernelRefusedError.

        For chains that look up endpoints by a number; ``sets`` are all sets of the table.
        """

    def settle(self) -> None:
        """Return once every packet is through that was under way: milliseconds."""


class TableKeeper:
    """Desired and remembered state of one table; ``sync`` and ``cleanup`` return (changes made, error lines)."""

    def __init__(self, key: TableKey, port: TablePort, *, in_turn: bool = False) -> None:
        """``in_turn``: no packet meets half of a change, at the price of more transactions and of waiting before anything goes."""
        self.key = key
        self._port, self._in_turn = port, in_turn
        self._desired: Table | None = None
        self._kernel: Table | None = None
        self._is_known = False
        self._change: TableChange | None = None
        self._refused: Refused = {}

    def set_desired(self, table: Table | None, change: TableChange | None) -> None:
        """Take a new desired state; ``change`` names every part that differs from the one before, None: any may."""
        if change is None or table is None or self._desired is None:
            if self._desired is not None or table is not None:
                self._change = None
                self._refused.clear()
        else:
            self._change = _joined(self._change, change) if self._change is not None else None
            for item in [item for item in self._refused if _names(change, item)]:
                del self._refused[item]
        self._desired = table

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel."""
        return not self._is_known or self._change != NO_CHANGE or any(not _is_busy(error) for error in self._refused.values())

    @property
    def has_leftovers(self) -> bool:
        """Whether something that should be gone was busy; another sync may get rid of it."""
        return any(_is_busy(error) for error in self._refused.values())

    def forget(self) -> None:
        """Trust no memory: observe before the next comparison."""
        self._is_known, self._kernel = False, None

    def sync(self) -> Done:
        """Write what differs; what the kernel refuses is contained and returned as one error line each."""
        done = 0
        try:
            if not self._is_known:
                self._observe()
            if self._desired is None:
                return self._delete(), []
            plan = self._plan(self._change, self._refused)
            again = list(self._refused)
            done += self._write(plan)
            done += self._retry(again)
        except KernelStateError as error:
            self._change = None
            self.forget()
            return done, [f"sync {self._name}: {error}"]
        self._change = NO_CHANGE
        return done, [f"write {describe(plan, i)}: {e}" for i, e in self._refused.items() if e is not None and not _is_busy(e)]

    def cleanup(self) -> Done:
        """Delete the table, desired or not."""
        try:
            self._observe()
            return self._delete(), []
        except KernelStateError as error:
            return 0, [f"clean up {self._name}: {error}"]
        finally:
            self._change = None
            self.forget()

    # -- comparing -----------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"nftables table {WORD[self.key.family]} {self.key.name}"

    def _observe(self) -> None:
        self.forget()
        self._kernel = self._port.observe(self.key, self._desired or Table({}, {}, {}))
        self._is_known = True
        self._change = None

    def _plan(self, change: TableChange | None, skip: Refused) -> TablePlan:
        assert self._desired is not None
        return diff_tables(self.key, self._kernel, self._desired, change, skip)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, plan: TablePlan) -> int:
        """Write a plan, contained where it is refused; returns how many changes were made."""
        if not plan:
            return 0
        try:
            self._apply(plan)
        except KernelRefusedError:
            self._observe()  # steps before the refused one are committed
            return self._write_in_parts(self._plan(None, self._refused))
        return plan.size

    def _retry(self, again: Iterable[Item]) -> int:
        """Try once more what was refused at an earlier sync."""
        items = [item for item in again if item in self._refused]
        if not items:
            return 0
        plan = self._plan(_change_of(items), {})
        for item in items:
            del self._refused[item]
        return self._write_in_parts(plan)

    def _write_in_parts(self, plan: TablePlan) -> int:
        refused = write_in_parts(plan, self._apply_at_once, lambda: self._kernel)
        self._refused.update(refused)
        return max(plan.size - len(refused), 0)

    def _apply(self, plan: TablePlan) -> None:
        """Write a plan and remember it. Raises KernelRefusedError; where it has several steps, some may have been done."""
        for step in plan.steps(in_turn=self._in_turn):
            self._take(step)
        self._kernel = remember(self._kernel, plan)

    def _apply_at_once(self, plan: TablePlan) -> None:
        """Write a part of a plan and remember it. Raises KernelRefusedError."""
        for step in plan.steps():
            self._take(step)
        self._kernel = remember(self._kernel, plan)

    def _take(self, step: Step) -> None:
        match step:
            case Load(named, elements):
                self._port.load(self.key, named, elements)
            case Fill(sets, chains):
                self._port.fill(self.key, sets, chains)
            case Settle():
                self._port.settle()
            case text:
                self._port.apply(text)

    def _delete(self) -> int:
        if self._kernel is None:
            self._change = NO_CHANGE
            return 0
        self._port.apply(delete_table(self.key) + "\n")
        self._kernel, self._change = None, NO_CHANGE
        return 1


NO_CHANGE = TableChange()


def _is_busy(error: KernelRefusedError | None) -> bool:
    return error is not None and BUSY in error.reason


def _names(change: TableChange, item: Item) -> bool:
    """Whether a change is about a refused thing."""
    match item.kind:
        case "set":
            return item.name in change.sets
        case "chain":
            return item.name in change.chains
        case "element":
            return item.name in change.sets or item.key in change.elements.get(item.name, ())


def _joined(one: TableChange, other: TableChange) -> TableChange:
    if one == NO_CHANGE:
        return other
    elements = dict(one.elements)
    for name, keys in other.elements.items():
        elements[name] = elements.get(name, frozenset()) | keys
    return TableChange(one.chains | other.chains, one.sets | other.sets, elements)


def _change_of(items: Iterable[Item]) -> TableChange:
    chains: set[str] = set()
    sets: set[str] = set()
    elements: dict[str, set[ElementKey]] = {}
    for kind, name, key in items:
        if kind == "chain":
            chains.add(name)
        elif kind == "set":
            sets.add(name)
        else:
            elements.setdefault(name, set()).add(key)
    return TableChange(frozenset(chains), frozenset(sets), {name: frozenset(keys) for name, keys in elements.items()})
