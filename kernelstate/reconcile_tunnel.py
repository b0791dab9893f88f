"""Keeps the kernel's programs at the tunnel and at the uplink as desired: which there are, and their tables.

      set_desired(state)                              somebody takes a program off, or writes into its tables
             |                                                          |
             v                                                          v
      arguments differ --install--> programs, settings, tables <--is_intact-- no: observe
      only tables do   --write-----> entries that differ

Programs and tables stay in the kernel while no agent runs; a restarted one observes, finds them as desired, and touches nothing.
The UDP tunnel and the source guard are looked after each for itself, so trouble with one does not stop the other. What it takes
to have programs there is for ``linux/bpf_tunnel.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from kernelstate.errors import KernelStateError
from kernelstate.objects.tunnel import TunnelState
from kernelstate.ports import SyncReport
from kernelstate.tunnel_tables import KINDS, Kind, Part, TableChange, Tables, arguments_of, diff_tables, tables_of


class Observed(msgspec.Struct, frozen=True):
    """What one kind of program is doing: for which part (without its tables), and by which tables."""

    arguments: Part
    tables: Tables


class TunnelPort(Protocol):
    """The programs of the current network namespace."""

    def observe(self, kind: Kind) -> Observed | None:
        """Return what our programs do; None unless all of them are there, of this version, and where they should be.

        Raises KernelStateError.
        """

    def install(self, kind: Kind, wanted: Observed) -> None:
        """Have programs do exactly that, those that do something already without a packet lost. Raises KernelStateError."""

    def write(self, kind: Kind, changes: Sequence[TableChange]) -> None:
        """Change the tables of what was observed or installed last; deleting what is gone is success. Raises KernelStateError."""

    def is_intact(self, kind: Kind) -> bool:
        """Whether nobody but us changed anything since; cheap."""

    def remove(self, kind: Kind) -> bool:
        """Take all programs of a kind off, wherever they are; whether there were any. Raises KernelStateError."""

    def counters(self, kind: Kind) -> Mapping[str, int]:
        """Return packets by what became of them, since the programs were installed; empty if there are none."""


class TunnelReconciler:
    """The programs of one network namespace; implements ``ports.Reconciler``. Not safe for several threads at once."""

    part = "tunnel"

    def __init__(self, port: TunnelPort) -> None:
        self._port = port
        self._desired: dict[Kind, Part | None] | None = None
        self._done: dict[Kind, Part | None] = {}
        """What each kind is remembered to do; a missing one: look."""

    def set_desired(self, state: TunnelState) -> None:
        """Say what shall be done from now on; nothing is written before ``sync``."""
        self._desired = {"udp": state.udp, "guard": state.guard}

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in place yet."""
        return self._desired is not None and self._desired != self._done

    def drifted(self) -> bool:
        """Ask whether programs and tables are as they were left."""
        if self._desired is None:
            return False
        for kind, part in list(self._done.items()):
            if part is not None and not self._port.is_intact(kind):
                del self._done[kind]
        return self._done.keys() != self._desired.keys()

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` observes."""
        self._done.clear()

    def sync(self) -> SyncReport:
        """Bring each kind to what is desired."""
        if self._desired is None:
            return SyncReport(self.part)
        self.drifted()
        changed, errors = 0, []
        for kind, wanted in self._desired.items():
            if kind in self._done and self._done[kind] == wanted:
                continue
            try:
                changed += self._bring(kind, wanted)
                self._done[kind] = wanted
            except KernelStateError as error:
                self._done.pop(kind, None)
                errors.append(str(error))
        return SyncReport(self.part, changed, tuple(errors))

    def cleanup(self) -> SyncReport:
        """Take everything off; a later ``sync`` would bring it back."""
        self._done.clear()
        changed, errors = 0, []
        for kind in KINDS:
            try:
                changed += self._port.remove(kind)
            except KernelStateError as error:
                errors.append(str(error))
        return SyncReport(self.part, changed, tuple(errors))

    def _bring(self, kind: Kind, wanted: Part | None) -> int:
        if wanted is None:
            return int(self._port.remove(kind))
        target = Observed(arguments_of(wanted), tables_of(wanted))
        done = self._done.get(kind)
        found = Observed(arguments_of(done), tables_of(done)) if done is not None else self._port.observe(kind)
        if found is None or found.arguments != target.arguments:
            self._port.install(kind, target)
            return 1
        changes = diff_tables(target.tables, found.tables)
        if changes:
            self._port.write(kind, changes)
        return len(changes)
