"""Keeps the short lane's programs at the links of pods, the uplink and the tunnel, whichever there are at the moment.

    links that take part (asked of the kernel) --differ?--> programs on and off, one by one
    something was written anywhere             --renew----> a new generation: every remembered way ends

The programs remember for a second at most what the kernel did with a connection's packets (packetpath/bpf/lane.bpf.c). When this
node's rules, policies or connections have changed there is a new generation, so that nothing goes by what was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kernelstate.errors import KernelStateError
from kernelstate.objects.lane import LaneLink
from kernelstate.ports import SyncReport


class LanePort(Protocol):
    """The programs of one network namespace. Everything may raise KernelStateError."""

    def wanted(self) -> Sequence[LaneLink]:
        """Return the links that take part as things are, sorted."""

    def observe(self) -> Sequence[LaneLink]:
        """Return the links at which programs of our build are, sorted; nothing where something is not as ``install`` leaves it."""

    def install(self, links: Sequence[LaneLink]) -> None:
        """Let programs be at exactly these links; those there go on with what they remember."""

    def renew(self) -> None:
        """Begin a new generation."""

    def remove(self) -> bool:
        """Take the programs off every link; whether there were any."""

    def counters(self) -> Mapping[str, int]:
        """Return packets by what became of them; empty if there are no programs."""


class LaneReconciler:
    """The lane of one node; implements ``ports.Reconciler``. Not safe for several threads at once."""

    part = "lane"

    def __init__(self, port: LanePort) -> None:
        self._port = port
        self._links: Sequence[LaneLink] | None = None
        """Where programs were left; None: look."""

    @property
    def dirty(self) -> bool:
        """Never: without its programs a node does the same, more slowly."""
        return False

    @property
    def links(self) -> int:
        """How many links take part, as far as is known."""
        return len(self._links or ())

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` looks at the programs."""
        self._links = None

    def drifted(self) -> bool:
        """Ask whether links have come or gone, or somebody took programs off."""
        try:
            links = self._port.wanted()
            if self._links != links or self._port.observe() != links:
                self._links = None
        except KernelStateError:
            self._links = None
        return self._links is None

    def sync(self) -> SyncReport:
        """Let programs be where they should be."""
        try:
            links = self._port.wanted()
            if self._links == links:
                return SyncReport(self.part)
            before = self._port.observe()
            if before != links:
                self._port.install(links)
            self._links = links
        except KernelStateError as error:
            self._links = None
            return SyncReport(self.part, 0, (str(error),))
        return SyncReport(self.part, len(set(links) ^ set(before)))

    def renew(self) -> str:
        """End all that is remembered; returns why that cannot be done, or nothing. Then there is no lane until the next ``sync``."""
        try:
            self._port.renew()
        except KernelStateError as error:
            left = self.cleanup().errors
            return "; ".join((str(error), *left))
        return ""

    def cleanup(self) -> SyncReport:
        """Take everything off; a later ``sync`` would bring it back."""
        self._links = None
        try:
            return SyncReport(self.part, int(self._port.remove()))
        except KernelStateError as error:
            return SyncReport(self.part, 0, (str(error),))

    def counters(self) -> Mapping[str, int]:
        """Return packets by what became of them."""
        return self._port.counters()
