"""Keeps the service addresses: a link of our own that carries every address IPVS balances, so that this node answers for them.

    packet to 10.96.0.10:53 --> eth0 --> routing: is it local? --> LOCAL_IN: IPVS takes it      other ports, ping: answered or
                                             |                                                  refused by this node itself
                           kube-ipvs0  10.96.0.10/32, 10.96.0.1/32, fd00:96::a/128, ...   (never up: nothing is sent through it)

The kernel tells of changes of links and addresses; an event is judged against what we remember, so our own writes mean nothing.
Everything on the link is ours. Its kind is chosen by whoever opens the door to the kernel (``linux/service_addresses.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Protocol

import msgspec

from kernelstate.errors import KernelStateError
from kernelstate.objects.address import Prefix
from kernelstate.ports import SyncReport

SERVICE_LINK = "kube-ipvs0"
"""kube-proxy's name for it: a node that changes over keeps its addresses."""
SERVICE_ALIAS = "nodeplane: service addresses"
"""Its ownership mark; another than that of overlay links (``objects/links.ALIAS``), which somebody else looks after."""
SHOWN_ERRORS = 20


class ServiceLink(msgspec.Struct, frozen=True):
    """The link as observed."""

    addresses: frozenset[Prefix]
    marked: bool = True
    """Whether it bears our mark; one that kube-proxy left does not."""
    strange: tuple[str, ...] = ()
    """Addresses with a subnet, as text: never wanted."""


class AddressEvent(NamedTuple):
    """An address of the link appeared or went; with ``address`` None the link itself changed or went."""

    gone: bool
    address: Prefix | None


class ServiceAddressPort(Protocol):
    """Reading and writing the link in the current network namespace. Everything may raise KernelStateError."""

    def observe(self) -> ServiceLink | None:
        """Return the link, None if there is none; from now on ``events`` tells of it."""

    def create(self) -> None:
        """Make the link, or mark the one that is there. Raises MissingFeatureError if this kernel has no kind that would do."""

    def delete(self) -> None:
        """Delete the link and all its addresses; gone already is success."""

    def apply(self, added: Sequence[Prefix], deleted: Sequence[Prefix]) -> list[str]:
        """Add, then delete addresses, going on after failures; return a line for each that was refused."""

    def drop_strange(self) -> None:
        """Delete addresses with a subnet."""

    def events(self) -> list[AddressEvent] | None:
        """Return what happened since the last call; None: more than could be kept. Never blocks."""


class AddressReconciler:
    """The service addresses of one network namespace; implements ``ports.Reconciler``. Not safe for several threads at once."""

    part = "service addresses"

    def __init__(self, port: ServiceAddressPort) -> None:
        self._port = port
        self._desired: set[Prefix] = set()
        self._is_told = False
        self._kernel: set[Prefix] | None = None
        """What the link is remembered to carry; None: look."""
        self._candidates: set[Prefix] | None = None
        """What may differ; None: everything."""
        self._errors: tuple[str, ...] = ()

    def set_desired(self, addresses: AbstractSet[Prefix], changed: Collection[Prefix] | None = None) -> None:
        """Say which addresses (host prefixes) the link shall carry from now on; nothing is written before ``sync``.

        ``changed`` names those that were added or removed since the set handed over before, None means any may.
        """
        if changed is None or not self._is_told:
            self._desired, self._candidates, self._is_told = set(addresses), None, True
        else:
            self.adjust([a for a in changed if a in addresses], [a for a in changed if a not in addresses])

    def adjust(self, added: Collection[Prefix], removed: Collection[Prefix]) -> None:
        """Say what differs from what was handed over before; costs the size of the change."""
        self._desired.difference_update(removed)
        self._desired.update(added)
        if self._candidates is not None:
            self._candidates.update(added, removed)

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet."""
        unsettled = self._kernel is None or self._candidates != set() or self._errors
        return self._is_told and bool(unsettled)

    def addresses(self) -> frozenset[Prefix]:
        """Return what the link carries now, looked up if need be: the addresses whose virtual servers are ours."""
        if self._kernel is None:
            link = self._port.observe()
            return link.addresses if link else frozenset()
        return frozenset(self._kernel)

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` observes everything."""
        self._kernel = None

    def drifted(self) -> bool:
        """Take in events; whether one of them tells of something else than we remember."""
        try:
            events = self._port.events()
        except KernelStateError:
            events = None
        if self._kernel is not None and (events is None or any(map(self._is_drift, events))):
            self.forget()
        return self._is_told and self._kernel is None

    def sync(self) -> SyncReport:
        """Write what differs. The first sync, and one after an event that says so, observes first."""
        if not self._is_told:
            return SyncReport(self.part)
        self.drifted()
        done = 0
        try:
            if self._kernel is None:
                done = self._observe()
            done += self._settle()
        except KernelStateError as error:
            self.forget()
            return SyncReport(self.part, done, (str(error),))
        return SyncReport(self.part, done, self._errors)

    def cleanup(self) -> SyncReport:
        """Remove the link with everything on it; a later ``sync`` would bring it back."""
        self.forget()
        try:
            link = self._port.observe()
            if link is not None:
                self._port.delete()
        except KernelStateError as error:
            return SyncReport(self.part, 0, (str(error),))
        return SyncReport(self.part, 0 if link is None else 1 + len(link.addresses))

    def _observe(self) -> int:
        """Replace memory by what is; make or mend the link. Returns how many changes that took."""
        link = self._port.observe()
        done = 0
        if link is None or not link.marked:
            self._port.create()
            done += 1
        if link is not None and link.strange:
            self._port.drop_strange()
            done += len(link.strange)
        self._kernel = set(link.addresses) if link is not None else set()
        self._candidates = None
        return done

    def _settle(self) -> int:
        desired, kernel = self._desired, self._kernel
        assert kernel is not None
        if self._errors:
            self._candidates = None
        among = desired | kernel if self._candidates is None else self._candidates
        added = sorted(a for a in among if a in desired and a not in kernel)
        deleted = sorted(a for a in among if a in kernel and a not in desired)
        refused = self._port.apply(added, deleted) if added or deleted else []
        self._candidates = set()
        self._errors = _lines(refused)
        if refused:
            self.forget()
        else:
            kernel.update(added)
            kernel.difference_update(deleted)
        return len(added) + len(deleted) - len(refused)

    def _is_drift(self, event: AddressEvent) -> bool:
        assert self._kernel is not None
        return event.address is None or (event.address in self._kernel) == event.gone


def _lines(refused: Sequence[str]) -> tuple[str, ...]:
    more = len(refused) - SHOWN_ERRORS
    return (*refused[:SHOWN_ERRORS], *([f"and {more} more service addresses"] if more > 0 else []))
