"""Keeps the short lane's programs at the links of pods, the uplink and the tunnel, whichever there are at the moment.

    links that take part (asked of the kernel) --differ?--> programs on and off, one by one
    pods that some policy is about             --differ?--> their packets open no connection past the rules; written before any program is on
    something was written anywhere             --renew----> a new generation: every remembered way ends

The programs remember for a second at most what the kernel did with a connection's packets (packetpath/bpf/lane.bpf.c). When this
node's rules, policies or connections have changed there is a new generation, so that nothing goes by what was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from kernelstate.errors import KernelStateError
from kernelstate.objects.lane import Address, LaneLink
from kernelstate.ports import SyncReport


class LanePort(Protocol):
    """The programs of one network namespace. Everything may raise KernelStateError."""

    def wanted(self) -> Sequence[LaneLink]:
        """Return the links that take part as things are, sorted."""

    def observe(self) -> Sequence[LaneLink]:
        """Return the links at which programs of our build are, sorted; nothing where something is not as ``install`` leaves it."""

    def install(self, links: Sequence[LaneLink]) -> None:
        """Let programs be at exactly these links; those there go on with what they remember."""

    def judge(self, addresses: Collection[Address]) -> int:
        """Let packets from and to exactly these addresses begin connections by rules alone; how many that is news of."""

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
        self._judged: frozenset[Address] = frozenset()
        self._is_judged = False
        """Whether the programs know whom rules have to judge."""

    def set_judged(self, addresses: Iterable[Address]) -> None:
        """Say of which pods some policy speaks; nothing is written before ``sync``."""
        wanted = frozenset(addresses)
        self._is_judged = self._is_judged and wanted == self._judged
        self._judged = wanted

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
        self._links, self._is_judged = None, False

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
            told = self._tell(links)
            if self._links == links:
                return SyncReport(self.part, told)
            before = self._port.observe()
            if before != links:
                self._port.install(links)
            self._links = links
        except KernelStateError as error:
            self._links = None
            return SyncReport(self.part, 0, (str(error),))
        return SyncReport(self.part, told + len(set(links) ^ set(before)))

    def _tell(self, links: Sequence[LaneLink]) -> int:
        """Tell the programs whom rules judge. Where that is refused none stays: it might let through what rules would not."""
        if self._is_judged or not links:
            return 0
        try:
            told = self._port.judge(self._judged)
        except KernelStateError:
            self.cleanup()
            raise
        self._is_judged = True
        return told

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
        self._links, self._is_judged = None, False
        try:
            return SyncReport(self.part, int(self._port.remove()))
        except KernelStateError as error:
            return SyncReport(self.part, 0, (str(error),))

    def counters(self) -> Mapping[str, int]:
        """Return packets by what became of them."""
        return self._port.counters()
