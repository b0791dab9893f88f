"""The tunnel's programs in memory: there or not, with tables, and with somebody else who takes them off or writes into them.

Implements ``reconcile_tunnel.TunnelPort`` for tests that need no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.address import IPAddress, Prefix
from kernelstate.objects.tunnel import Place
from kernelstate.reconcile_tunnel import Observed
from kernelstate.tunnel_tables import Kind, Part, TableChange, Tables


class FakePrograms:
    """One kind of programs: what they do, and a number that every change by somebody else raises."""

    def __init__(self, wanted: Observed) -> None:
        self.arguments: Part = wanted.arguments
        self.places: dict[Prefix, Place] = dict(wanted.tables.places)
        self.nodes: set[IPAddress] = set(wanted.tables.nodes)
        self.meddled = 0

    @property
    def observed(self) -> Observed:
        """What they do."""
        return Observed(self.arguments, Tables(dict(self.places), frozenset(self.nodes)))


class FakeTunnel:
    """The machine's programs, and the agent's view of them. ``spoiled`` kinds make everything fail."""

    def __init__(self, programs: dict[Kind, FakePrograms] | None = None) -> None:
        self.programs = {} if programs is None else programs
        self.spoiled: set[Kind] = set()
        self.installed: list[Kind] = []
        self.observed: list[Kind] = []
        self.written: list[TableChange] = []
        self._known: dict[Kind, tuple[FakePrograms, int]] = {}

    # -- TunnelPort --------------------------------------------------------------------------------------------------

    def observe(self, kind: Kind) -> Observed | None:
        """Return what they do; from now on they are watched."""
        self._check(kind, "observe")
        self.observed.append(kind)
        found = self.programs.get(kind)
        if found is None:
            return None
        self._known[kind] = found, found.meddled
        return found.observed

    def install(self, kind: Kind, wanted: Observed) -> None:
        """Exchange everything."""
        self._check(kind, "install")
        self.installed.append(kind)
        self.programs[kind] = FakePrograms(wanted)
        self._known[kind] = self.programs[kind], 0

    def write(self, kind: Kind, changes: Sequence[TableChange]) -> None:
        """Do each, in order; a place whose node is not there is a mistake of the caller's."""
        self._check(kind, "write")
        programs = self._known[kind][0]
        for change in changes:
            self.written.append(change)
            if isinstance(change.entry, Place) and change.gone:
                programs.places.pop(change.entry.prefix, None)
            elif isinstance(change.entry, Place):
                programs.places[change.entry.prefix] = change.entry
            elif change.gone:
                programs.nodes.discard(change.entry)
            else:
                programs.nodes.add(change.entry)
            assert {p.node for p in programs.places.values()} - {None} <= programs.nodes, f"{change}: a place without its node"

    def is_intact(self, kind: Kind) -> bool:
        """Whether nobody meddled."""
        known = self._known.get(kind)
        return known is not None and self.programs.get(kind) is known[0] and known[0].meddled == known[1]

    def remove(self, kind: Kind) -> bool:
        """Take them off."""
        self._check(kind, "remove")
        self._known.pop(kind, None)
        return self.programs.pop(kind, None) is not None

    def counters(self, kind: Kind) -> Mapping[str, int]:
        """Nothing is counted here."""
        return {}

    # -- somebody else -----------------------------------------------------------------------------------------------

    def take_off(self, kind: Kind) -> None:
        """Take the programs off."""
        self.programs.pop(kind, None)

    def forget_place(self, kind: Kind, prefix: Prefix) -> None:
        """Delete one entry."""
        programs = self.programs[kind]
        programs.places.pop(prefix, None)
        programs.meddled += 1

    def _check(self, kind: Kind, what: str) -> None:
        if kind in self.spoiled:
            raise KernelRefusedError(what, kind, "spoiled by the test")
