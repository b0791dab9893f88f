"""The programs at sockets in memory: there or not, with maps, and with somebody else who takes them off or writes into them.

Implements ``reconcile_ebpf.ServiceMapsPort`` for tests that need no kernel. A map that is full refuses, as the kernel's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernelstate.errors import KernelRefusedError
from kernelstate.service_layout import MAPS, Contents, MapName, MapWrite, Sizes


class FakeServiceMaps:
    """The machine's programs; they outlive the agent that is given this. ``refusing`` makes everything fail."""

    def __init__(self) -> None:
        self.maps: dict[MapName, dict[bytes, bytes]] = {}
        """Empty: there are no programs."""
        self.sizes = Sizes()
        self.refusing = False
        self.installed = 0
        self.written: list[MapWrite] = []

    # -- ServiceMapsPort ---------------------------------------------------------------------------------------------

    def observe(self) -> tuple[Sizes, Contents] | None:
        """Return what the programs know."""
        self._check("observe")
        if not self.maps:
            return None
        return self.sizes, self.contents

    def install(self, sizes: Sizes, writes: Sequence[MapWrite]) -> None:
        """Begin with empty maps."""
        self._check("install")
        self.installed += 1
        self.sizes, self.maps = sizes, {name: {} for name in MAPS}
        self.write(writes)

    def write(self, writes: Sequence[MapWrite]) -> None:
        """Do each in its turn."""
        for one in writes:
            self._check("write")
            held = self.maps[one.table]
            held.update(one.put)
            if len(held) > getattr(self.sizes, one.table):
                raise KernelRefusedError("write map", one.table, "Argument list too long")
            for key in one.drop:
                held.pop(key, None)
            self.written.append(one)

    def is_intact(self) -> bool:
        """Whether there are programs."""
        return bool(self.maps)

    def remove(self) -> bool:
        """Take them off."""
        self._check("remove")
        there, self.maps = bool(self.maps), {}
        return there

    def counters(self) -> Mapping[str, int]:
        """Nobody asks."""
        return {}

    # -- what a test looks at ----------------------------------------------------------------------------------------

    @property
    def contents(self) -> Contents:
        """What is in the maps."""
        held = {name: dict(entries) for name, entries in self.maps.items()}
        return Contents(held["frontends"], held["slots"], frozenset(held["members"]), held["own"])

    def _check(self, operation: str) -> None:
        if self.refusing:
            raise KernelRefusedError(operation, "programs at sockets", "Operation not permitted")
