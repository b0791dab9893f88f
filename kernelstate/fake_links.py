"""Links in memory: refuses what the kernel would refuse, takes along what goes with a link, and tells of every change.

Implements ``reconcile_links.LinkPort`` for tests that need no kernel. Decides what reconciling relies on: nothing lies on a link
that is not there or, for routes, not up; a link's deletion takes everything on it, without events for routes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

import msgspec

from kernelstate.diff_links import LinkChange, key_of
from kernelstate.errors import KernelRefusedError
from kernelstate.objects.links import ALIAS, ROUTE_PROTOCOL, Link, LinkObject, LinkState, Neigh, Route
from kernelstate.reconcile_links import LinkEvent


class FakeLinks:
    """A kernel with some links of others (``underlays``, up). ``refuse`` decides which changes fail; ``applied`` lists all."""

    def __init__(self, underlays: Collection[str] = ("eth0",), refuse: Callable[[LinkChange], bool] = lambda _c: False) -> None:
        self.objects: dict[Hashable, LinkObject] = {}
        self.applied: list[LinkChange] = []
        self.observations = 0
        self.broken = False
        self.refuse = refuse
        self.checksums: dict[str, bool] = {}
        """Whether checksums are left to a link; every new one has them left to it."""
        self._events: list[LinkEvent] | None = []
        for name in underlays:
            self.put(Link(name, 1500, "", None, alias=""))
        self._events = []

    # -- LinkPort ----------------------------------------------------------------------------------------------------

    def observe(self, own: Collection[str], used: Collection[str]) -> LinkState:
        """Return links with our mark or named in ``own``, what lies on them, and routes of our protocol."""
        self.observations += 1
        if self.broken:
            raise KernelRefusedError("dump", "links", "broken")
        links = {o.name for o in self.objects.values() if isinstance(o, Link) and (o.alias == ALIAS or o.name in own)}
        return LinkState.of([o for o in self.objects.values() if self._is_ours(o, links)])

    def apply(self, changes: Sequence[LinkChange]) -> list[str]:
        """Do each, in order, going on after failures."""
        return [self._apply(change) for change in changes]

    def events(self) -> list[LinkEvent] | None:
        """Return what happened since the last call."""
        found, self._events = self._events, []
        return found

    def tx_checksum(self, link: str) -> bool | None:
        """Return whether checksums are left to a link."""
        return self.checksums.get(link) if ("link", link) in self.objects else None

    # -- somebody else -----------------------------------------------------------------------------------------------

    def put(self, obj: LinkObject) -> None:
        """Make or change an object."""
        self.objects[key_of(obj)] = obj
        self._tell(gone=False, obj=obj)

    def take(self, obj: LinkObject) -> None:
        """Remove an object; with a link all that lies on it."""
        if self.objects.pop(key_of(obj), None) is None:
            return
        if isinstance(obj, Link):
            for other in [o for o in self.objects.values() if not isinstance(o, Link) and o.link == obj.name]:
                del self.objects[key_of(other)]
        self._tell(gone=True, obj=obj)

    def overflow(self) -> None:
        """Lose the events that wait."""
        self._events = None

    # -- the kernel's own --------------------------------------------------------------------------------------------

    def _apply(self, change: LinkChange) -> str:
        self.applied.append(change)
        if self.refuse(change):
            return "refused by the test"
        obj = change.obj
        if change.verb == "delete":
            self.take(obj)
            return ""
        if isinstance(obj, Link):
            there = key_of(obj) in self.objects
            if there and change.verb == "create":
                return "File exists"
            if obj.underlay and ("link", obj.underlay) not in self.objects:
                return f"no link {obj.underlay} to carry it"
            if change.before is not None and change.before.mac != obj.mac:
                for other in [o for o in self.objects.values() if isinstance(o, Neigh) and o.link == obj.name]:
                    self.take(other)
            if change.verb == "create":
                self.checksums[obj.name] = True
            if obj.tx_checksum is not None:
                self.checksums[obj.name] = obj.tx_checksum
            self.put(msgspec.structs.replace(obj, tx_checksum=None))
            return ""
        link = self.objects.get(("link", obj.link))
        if not isinstance(link, Link):
            return f"no link {obj.link}"
        if isinstance(obj, Route) and not link.up:
            return "Network is down"
        self.put(obj)
        return ""

    def _is_ours(self, obj: LinkObject, links: Collection[str]) -> bool:
        match obj:
            case Link():
                return obj.name in links
            case Route():
                return obj.protocol == ROUTE_PROTOCOL
            case _:
                return obj.link in links

    def _tell(self, *, gone: bool, obj: LinkObject) -> None:
        if self._events is not None:
            self._events.append(LinkEvent(gone, msgspec.structs.replace(obj)))
