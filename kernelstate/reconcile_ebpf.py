"""Keeps the programs at sockets, and what they know of Services, as desired.

      set_desired(tables, change)                     somebody takes a program off
             |                                                  |
             v                                                  v
      programs are ours and there --adopt--> maps differ    is_intact: no --> look again
             |  no                              | change
             v                                  v
      install: maps filled, then attached    writes, in their order (service_layout.py)

Programs and maps stay in the kernel while no agent runs; a restarted one finds them, and writes what differs. Maps that have become
too small are replaced by larger ones together with the programs, which costs no connection. An entry that somebody else wrote
into the maps is found by a full look, which ``forget`` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kernelstate.errors import KernelStateError
from kernelstate.objects.ebpf import SocketChange, SocketTables
from kernelstate.ports import SyncReport
from kernelstate.service_layout import Contents, Layout, MapWrite, Sizes
from kernelstate.slots import NoRoomError


class ServiceMapsPort(Protocol):
    """The programs at the sockets of the current network namespace's node. Everything may raise KernelStateError."""

    def observe(self) -> tuple[Sizes, Contents] | None:
        """Return what the programs know; None unless all of them are there, of this version, and where they should be."""

    def install(self, sizes: Sizes, writes: Sequence[MapWrite]) -> None:
        """Have programs with maps of these sizes, filled so, in the place of those there are, which lose nothing they remember."""

    def write(self, writes: Sequence[MapWrite]) -> None:
        """Change the maps of what was observed or installed last; deleting what is gone is success."""

    def is_intact(self) -> bool:
        """Whether the programs are where they were left; cheap."""

    def remove(self) -> bool:
        """Take all programs of this node off, wherever they are; whether there were any."""

    def counters(self) -> Mapping[str, int]:
        """Return questions by their answers since the programs were installed; empty if there are none."""


class SocketReconciler:
    """The programs of one node; implements ``ports.Reconciler``. Not safe for several threads at once."""

    part = "sockets"

    def __init__(self, port: ServiceMapsPort, clock: Callable[[], float]) -> None:
        self._port, self._clock = port, clock
        self._tables: SocketTables | None = None
        self._change: SocketChange | None = None
        """What may differ from what the kernel holds; None: everything."""
        self._layout: Layout | None = None
        """Where pools lie; None: look."""

    def set_desired(self, tables: SocketTables, change: SocketChange | None = None) -> None:
        """Say what shall be known from now on; nothing is written before ``sync``.

        ``change`` names all that differs from the tables handed over before; None: anything may.
        """
        self._tables = tables
        if change is None or self._change is None:
            self._change = None
        else:
            before = self._change
            self._change = SocketChange(before.frontends | change.frontends, before.pools | change.pools)

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in place yet."""
        return self._tables is not None and (self._layout is None or self._change != SocketChange())

    def drifted(self) -> bool:
        """Ask whether the programs are where they were left."""
        if self._tables is None or self._layout is None:
            return False
        if not self._port.is_intact():
            self._layout = None
        return self._layout is None

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` reads the maps."""
        self._layout = None

    def sync(self) -> SyncReport:
        """Bring the kernel to what is desired."""
        if self._tables is None:
            return SyncReport(self.part)
        self.drifted()
        try:
            changed = self._bring(self._tables)
        except KernelStateError as error:
            self._layout = None
            return SyncReport(self.part, 0, (str(error),))
        self._change = SocketChange()
        return SyncReport(self.part, changed)

    def cleanup(self) -> SyncReport:
        """Take everything off; a later ``sync`` would bring it back."""
        self._layout = None
        try:
            return SyncReport(self.part, int(self._port.remove()))
        except KernelStateError as error:
            return SyncReport(self.part, 0, (str(error),))

    def counters(self) -> Mapping[str, int]:
        """Return questions by their answers."""
        return self._port.counters()

    def _bring(self, tables: SocketTables) -> int:
        try:
            writes = self._writes(tables)
        except NoRoomError:
            writes = None
        if writes is None:
            return self._install(tables)
        if writes:
            self._port.write(writes)
        return sum(map(len, writes))

    def _writes(self, tables: SocketTables) -> list[MapWrite] | None:
        """Return what has to be written; None if there are no programs. Raises NoRoomError."""
        if self._layout is not None and self._change is not None:
            return self._layout.change(tables, self._change.frontends, self._change.pools, self._clock())
        found = self._port.observe()
        if found is None:
            return None
        sizes, contents = found
        self._layout = Layout(sizes)
        return self._layout.adopt(contents, tables, self._clock())

    def _install(self, tables: SocketTables) -> int:
        sizes = Sizes.for_(tables)
        layout = Layout(sizes)
        writes = layout.fill(tables)
        self._port.install(sizes, writes)
        self._layout = layout
        return 1 + sum(map(len, writes))
