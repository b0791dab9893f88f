"""Keeps links, routes, neighbours and forwarding entries as desired: remembers, listens, compares, writes the difference.

      set_desired(state)                                   somebody else
             |                                                   | ip route del
             v                                                   v
      desired --diff--> changes --port.apply--> kernel --events--> is that what we remember? no: observe
             ^             |                       |
             '--- dirty <--+-- refused             '-- observe --> remembered

An event is judged by its content against what we remember to be in the kernel, so our own changes, which come back as events
as well, mean nothing, whatever the order. One refused object stops nothing but what lies on it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Protocol

import msgspec

from kernelstate.diff_links import LinkChange, diff_links, index, key_of
from kernelstate.errors import KernelStateError
from kernelstate.objects.links import ROUTE_PROTOCOL, Link, LinkObject, LinkState, Neigh, Route
from kernelstate.ports import SyncReport

SHOWN_ERRORS = 20
"""So many refusals of one sync are told one by one; the rest as a number."""


class LinkEvent(msgspec.Struct, frozen=True):
    """An object appeared or changed (``gone`` False), or disappeared."""

    gone: bool
    obj: LinkObject


class LinkPort(Protocol):
    """Reading and writing links and what belongs to them in the current network namespace."""

    def observe(self, own: Collection[str], used: Collection[str]) -> LinkState:
        """Return links with our mark or named in ``own``, what lies on them, and routes of our protocol.

        From now on ``events`` tells of these, and of the links in ``used``. Raises KernelRefusedError.
        """

    def apply(self, changes: Sequence[LinkChange]) -> list[str]:
        """Do each, in order, going on after failures; return the kernel's words for each, empty for done.

        Making what is there and deleting what is gone are success.
        """

    def events(self) -> list[LinkEvent] | None:
        """Return what happened since the last call; None: more than could be kept. Never blocks."""

    def tx_checksum(self, link: str) -> bool | None:
        """Return whether checksums are left to a link; None if there is none. ``observe`` and ``events`` leave it out."""


class LinkReconciler:
    """The overlay's part of one network namespace; implements ``ports.Reconciler``. Not safe for several threads at once."""

    part = "links"

    def __init__(self, port: LinkPort) -> None:
        self._port = port
        self._desired = LinkState()
        self._kernel: LinkState | None = None
        """What the kernel is remembered to hold; None: look."""
        self._index: dict[Hashable, LinkObject] = {}
        self._used: frozenset[str] = frozenset()
        self._managed = False

    def set_desired(self, state: LinkState) -> None:
        """Say what shall exist from now on; nothing is written before ``sync``."""
        if state.own_links != self._desired.own_links or state.used_links != self._used:
            self._kernel = None  # what to listen to is settled by observing
        self._desired = state
        self._used = state.used_links
        self._managed = True

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet."""
        return self._managed and self._kernel != self._desired

    def drifted(self) -> bool:
        """Whether somebody else changed what is ours since the last look; if so the next ``sync`` observes."""
        events = self._port.events()
        if self._kernel is not None and (events is None or any(self._is_drift(e) for e in events)):
            self._kernel = None
        return self._managed and self._kernel is None

    def sync(self) -> SyncReport:
        """Write what differs. Observes first where events, a failure or other links make that necessary."""
        if not self._managed:
            return SyncReport(self.part)
        self.drifted()
        return self._bring(self._desired)

    def cleanup(self) -> SyncReport:
        """Remove every link and route of ours; a later ``sync`` would bring them back."""
        self._kernel = None
        report = self._bring(LinkState())
        self._kernel = None
        return report

    def _bring(self, target: LinkState) -> SyncReport:
        if self._kernel == target:
            return SyncReport(self.part)
        try:
            if self._kernel is None:
                own = self._desired.own_links if target is self._desired else ()
                self._remember(self._with_checksums(self._port.observe(own, self._used), target))
            assert self._kernel is not None
            changes = diff_links(target, self._kernel)
            refused = self._apply(changes)
        except KernelStateError as error:
            self._kernel = None
            return SyncReport(self.part, 0, (str(error),))
        if refused:
            self._kernel = None
        else:
            self._remember(target)
        return SyncReport(self.part, len(changes) - len(refused), _lines(refused))

    def _apply(self, changes: Sequence[LinkChange]) -> list[tuple[LinkChange, str]]:
        """Links first: what would lie on one that was refused waits, and is not told as a failure of its own."""
        first = [c for c in changes if isinstance(c.obj, Link) and c.verb != "delete"]
        done = {c.obj.name for c in first if isinstance(c.obj, Link)}
        early = [c for c in changes if isinstance(c.obj, Link) and (c.verb != "delete" or c.obj.name in done)]
        refused = [(c, words) for c, words in zip(early, self._port.apply(early), strict=True) if words]
        missing = {c.obj.name for c, _ in refused if isinstance(c.obj, Link) and c.verb == "create"}
        held = [c for c in changes if not isinstance(c.obj, Link) and c.obj.link in missing]
        known = {id(c) for c in (*early, *held)}
        rest = [c for c in changes if id(c) not in known]
        refused += [(c, words) for c, words in zip(rest, self._port.apply(rest), strict=True) if words]
        return refused + [(c, "") for c in held]

    def _remember(self, state: LinkState) -> None:
        self._kernel = state
        self._index = index(state)

    def _with_checksums(self, found: LinkState, target: LinkState) -> LinkState:
        """Look at the checksums of those links of which it is said how they should be."""
        asked = {link.name for link in target.links if link.tx_checksum is not None}
        if not asked:
            return found
        links = [self._looked_at(link) if link.name in asked else link for link in found.links]
        return msgspec.structs.replace(found, links=tuple(links))

    def _looked_at(self, link: Link) -> Link:
        return msgspec.structs.replace(link, tx_checksum=self._port.tx_checksum(link.name))

    def _is_drift(self, event: LinkEvent) -> bool:
        """Whether an event tells of something other than what is remembered."""
        obj = event.obj
        assert self._kernel is not None
        if isinstance(obj, Link) and obj.name in self._used:
            # IPv4 routes vanish with their link going down, without an event of their own (fib_frontend.c).
            return event.gone or not obj.up
        known = self._index.get(key_of(obj))
        if isinstance(obj, Link) and isinstance(known, Link) and known.tx_checksum is not None and not event.gone:
            obj = self._looked_at(obj)
        if event.gone:
            return known == obj or (isinstance(obj, Link) and known is not None)
        if known is not None:
            return known != obj
        if isinstance(obj, Route):
            return obj.protocol == ROUTE_PROTOCOL
        if isinstance(obj, Neigh) and not obj.mac:
            return False  # the kernel's own, such as multicast groups
        own = obj.name if isinstance(obj, Link) else obj.link
        return any(link.name == own for link in self._kernel.links)


def _lines(refused: Sequence[tuple[LinkChange, str]]) -> tuple[str, ...]:
    told = [f"{change}: {words}" for change, words in refused if words]
    more = len(told) - SHOWN_ERRORS
    return tuple(told[:SHOWN_ERRORS] + ([f"and {more} more links, routes or neighbours"] if more > 0 else []))
