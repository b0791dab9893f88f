"""IPVS in memory: refuses what the kernel would refuse, and counts what it is asked.

Implements ``reconcile_ipvs.IpvsPort`` for tests that need no kernel. Decides what reconciling relies on: nothing is made twice, a
virtual server takes its real servers along, the count is of IPv4 only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from kernelstate.diff_ipvs import IpvsChange, RealKey
from kernelstate.errors import KernelRefusedError
from kernelstate.objects.ipvs import IpvsState, RealServer, ServerKey, VirtualServer
from kernelstate.reconcile_ipvs import SeenReal


class FakeIpvs:
    """``refuse`` decides which changes fail. ``applied`` lists all that were tried, ``looks`` counts what was read."""

    def __init__(self, refuse: Callable[[IpvsChange], bool] = lambda _c: False) -> None:
        self.shapes: dict[ServerKey, VirtualServer] = {}
        self.reals: dict[ServerKey, dict[RealKey, int]] = {}
        """Weights."""
        self.connections: dict[tuple[ServerKey, RealKey], int] = {}
        self.applied: list[IpvsChange] = []
        self.looks = 0
        self.broken = False
        self.refuse = refuse

    # -- IpvsPort ----------------------------------------------------------------------------------------------------

    def servers(self) -> dict[ServerKey, VirtualServer]:
        """Return every virtual server."""
        self._look()
        return dict(self.shapes)

    def real_servers(self, key: ServerKey) -> list[SeenReal]:
        """Return the real servers of one."""
        self._look()
        reals = self.reals.get(key, {})
        return [SeenReal(*real, weight, self.connections.get((key, real), 0)) for real, weight in reals.items()]

    def read(self, keys: Collection[ServerKey]) -> dict[ServerKey, VirtualServer]:
        """Return these, as far as they exist."""
        self._look()
        return {key: self.shapes[key] for key in keys if key in self.shapes}

    def count(self) -> int:
        """Return how many of IPv4 there are."""
        if self.broken:
            raise KernelRefusedError("count", "virtual servers", "broken")
        return sum(key.family == 4 for key in self.shapes)

    def apply(self, changes: Sequence[IpvsChange]) -> list[str]:
        """Do each, in order, going on after failures."""
        if self.broken:
            raise KernelRefusedError("change", "IPVS", "broken")
        return [self._apply(change) for change in changes]

    # -- somebody else -----------------------------------------------------------------------------------------------

    def state(self, *, quiet: bool = False) -> IpvsState:
        """Return everything; ``quiet`` with real servers of weight 0."""
        return {
            key: msgspec.structs.replace(
                shape,
                real_servers=tuple(
                    RealServer(*real, weight) for real, weight in sorted(self.reals[key].items()) if weight or quiet
                ),
            )
            for key, shape in self.shapes.items()
        }

    def put(self, key: ServerKey, server: VirtualServer) -> None:
        """Make or change a virtual server with its real servers."""
        self.shapes[key] = msgspec.structs.replace(server, real_servers=())
        self.reals[key] = {real[:2]: real.weight for real in server.real_servers}

    def take(self, key: ServerKey) -> None:
        """Remove a virtual server and what is behind it."""
        self.shapes.pop(key, None)
        self.reals.pop(key, None)

    # -- the kernel's own --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self.looks += 1
        if self.broken:
            raise KernelRefusedError("dump", "IPVS", "broken")

    def _apply(self, change: IpvsChange) -> str:
        self.applied.append(change)
        if self.refuse(change):
            return "refused by the test"
        verb, key, server, real = change
        if server is not None:
            return self._put_shape(verb == "add server", key, server)
        if real is None:
            self.take(key)
            return ""
        if key not in self.shapes:
            return "" if verb == "delete real" else "No such process"
        there = real[:2] in self.reals[key]
        if verb == "delete real":
            self.reals[key].pop(real[:2], None)
            return ""
        if there == (verb == "add real"):
            return "File exists" if there else "No such file or directory"
        self.reals[key][real[:2]] = real.weight
        return ""

    def _put_shape(self, make: bool, key: ServerKey, server: VirtualServer) -> str:
        if (key in self.shapes) == make:
            return "File exists" if make else "No such process"
        self.shapes[key] = msgspec.structs.replace(server, real_servers=())
        self.reals.setdefault(key, {})
        return ""
