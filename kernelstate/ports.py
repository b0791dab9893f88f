"""The few doors through which kernel state is read and changed; ``linux/`` opens them for real, ``fake.py`` in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import ChainKey, Rule, Ruleset


class SyncReport(msgspec.Struct, frozen=True):
    """What one ``sync`` did. ``errors`` are one line each: operation, object, the kernel's words."""

    part: str
    changed: int = 0
    errors: tuple[str, ...] = ()
    seconds: float = 0.0
    """How long it took, where somebody looked at the clock."""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.errors


class Reconciler(Protocol):
    """One kind of kernel state that is kept as desired. The agent drives a list of these and knows nothing else of them."""

    @property
    def part(self) -> str:
        """Its name in status and logs: ``netfilter``, ``links``."""

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet."""

    def sync(self) -> SyncReport:
        """Bring the kernel to the desired state, writing only what differs. Idempotent; what fails stays dirty."""

    def drifted(self) -> bool:
        """Cheap check whether somebody else changed what is ours; if so the next ``sync`` observes and repairs."""

    def cleanup(self) -> SyncReport:
        """Remove every trace of ours from the kernel, whatever is desired."""


class NetfilterPort(Protocol):
    """Reading and writing the packet filter of one variant (legacy or nft) in the current network namespace."""

    def observe(self, family: Family, known: Mapping[ChainKey, Sequence[Rule]] | None = None) -> Ruleset:
        """Return every chain of the family's tables: own ones in ``chains``; rules of builtin chains as ``anchors``, in order.

        Rules that equal those of ``known`` may be returned as the same objects.
        """

    def apply(self, family: Family, restore_text: str) -> None:
        """Feed one ``iptables-restore --noflush --counters`` text; all or nothing per table. Raises KernelRefusedError."""

    def generation(self, family: Family) -> object:
        """Return something comparable that changes when anybody changes the rules; costs microseconds."""


class ConntrackEntry(msgspec.Struct, frozen=True, gc=False):
    """One tracked flow: the original direction as sent, and the source of its replies (the backend after DNAT).

    ``stage`` is where a TCP or SCTP flow stands: only the first packet was sent, or a connection, or one that is over. ``tags``
    are the verification tags of an SCTP association, the one in packets of the original direction first.
    """

    family: Family
    protocol: str
    source: int
    destination: int
    source_port: int
    destination_port: int
    reply_source: int
    reply_source_port: int
    zone: int = 0
    mark: int = 0
    stage: Literal["", "opening", "open", "over"] = ""
    tags: tuple[int, int] = (0, 0)


class ConntrackPort(Protocol):
    """The connection tracking table."""

    def entries(self, family: Family, protocol: str) -> Sequence[ConntrackEntry]:
        """Dump the flows of one protocol (``udp``, ``tcp``, ``sctp``)."""

    def delete(self, entries: Sequence[ConntrackEntry]) -> int:
        """Delete exactly these; those already gone do not count. Returns how many were deleted."""

    def reset(self, entries: Sequence[ConntrackEntry], refuser: int) -> int:
        """Delete TCP or SCTP flows of one family and tell each client; ``refuser`` is an address of this node's own.

        Returns how many there were.
        """


class AddressPort(Protocol):
    """The node's own addresses."""

    def local_addresses(self) -> Sequence[tuple[str, Prefix]]:
        """Return (link name, address as a host prefix) for each address of a link that is up, loopback included."""
