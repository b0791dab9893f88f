"""Keeps the nftables tables of this program as desired: remembers what the kernel holds, compares what changed, writes that.

      set_desired(tables, changes)                       somebody else
               |                                              | nft flush ruleset
               v                                              v
      desired tables --diff--> plan --one transaction--> kernel --events--> ours? observe that table
               ^                  |                        |
               |                  +-- refused: in parts    +-- observed once, then remembered
               +-- refused, changed

Here is what the agent drives: both families behind one face. Each family has one table, which is ours whole: it is made,
replaced and deleted, and whatever others put into it goes. Others' tables are neither read nor written, and their
commits cost a look at a message. It has no owner flag: the kernel keeps forwarding when this program ends.

What is decided per table is in ``reconcile_table.py``; what the difference is in ``diff_nftables.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from kernelstate.objects.address import Family
from kernelstate.objects.nftables import Table, TableChange, TableKey
from kernelstate.ports import SyncReport
from kernelstate.reconcile_table import NO_CHANGE, TableKeeper, TablePort

TABLE = "nodeplane"
NAMES: Mapping[Family, str] = {4: TABLE, 6: TABLE}

SHOWN_ERRORS = 20
"""So many refusals of one sync are told one by one; the rest as a number."""


class NftablesReconciler:
    """One table a family in one network namespace, ``nodeplane`` unless ``names`` says otherwise; implements ``ports.Reconciler``.

    ``port`` is not to be shared with another reconciler: events are told once. Not safe for use by several threads at once.
    """

    def __init__(
        self, port: TablePort, names: Mapping[Family, str] = NAMES, part: str = "nftables", *, in_turn: bool = False
    ) -> None:
        """``in_turn``: no packet meets half of a change."""
        self.part = part
        self._port = port
        self._keepers = {family: TableKeeper(TableKey(family, name), port, in_turn=in_turn) for family, name in names.items()}
        self._keys = frozenset(keeper.key for keeper in self._keepers.values())
        self._is_managed = False

    def set_desired(self, tables: Mapping[Family, Table], changes: Mapping[Family, TableChange] | None = None) -> None:
        """Say what shall exist from now on; nothing is written before ``sync``.

        A family that is missing shall have no table of ours. ``changes`` names every part that differs from the tables handed
        over before, where a family that is missing has no change; None: any part of any family may differ.
        """
        for family, keeper in self._keepers.items():
            keeper.set_desired(tables.get(family), None if changes is None else changes.get(family, NO_CHANGE))
        self._is_managed = True

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet."""
        return self._is_managed and any(keeper.dirty for keeper in self._keepers.values())

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when ``drifted`` may have something to say."""
        return self._port.fileno()

    def sync(self) -> SyncReport:
        """Write what differs. The first sync, and one after ``drifted`` said so, observes first."""
        if not self._is_managed:
            return SyncReport(self.part)
        self._hear()
        return self._report(keeper.sync for keeper in self._keepers.values())

    def drifted(self) -> bool:
        """Ask the kernel's messages whether anybody else touched a table of ours; if so the next ``sync`` observes it.

        Also when something that should be gone was busy at the last sync. Microseconds.
        """
        heard = self._hear()
        return self._is_managed and (heard or any(keeper.has_leftovers for keeper in self._keepers.values()))

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` observes every table, at the price of a full listing."""
        for keeper in self._keepers.values():
            keeper.forget()

    def verify(self) -> SyncReport:
        """Observe everything and repair what differs."""
        self.forget()
        return self.sync()

    def cleanup(self) -> SyncReport:
        """Delete the tables; a later ``sync`` would bring them back."""
        return self._report(keeper.cleanup for keeper in self._keepers.values())

    def _hear(self) -> bool:
        """Forget the tables that somebody else touched; whether there were any."""
        touched = self._port.touched(self._keys)
        found = [keeper for keeper in self._keepers.values() if touched is None or keeper.key in touched]
        for keeper in found:
            keeper.forget()
        return bool(found)

    def _report(self, steps: Iterable[Callable[[], tuple[int, list[str]]]]) -> SyncReport:
        done = [step() for step in steps]
        lines = [line for _, errors in done for line in errors]
        more = len(lines) - SHOWN_ERRORS
        shown = (*lines[:SHOWN_ERRORS], *([f"and {more} more refusals of nftables"] if more > 0 else []))
        return SyncReport(self.part, sum(count for count, _ in done), shown)
