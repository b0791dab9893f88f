"""Keeps the process behind the TUN running, and its table of peers as desired.

      set_desired(tunnel)                         it is killed, or somebody starts another
             |                                              |
             v                                              v
      desired --ensure--> one process runs --fileno--> is it still that one? no: ensure, then look
             |
             '--diff--> peer 10.244.2.0/24 192.168.1.2 ... --> its table

The process outlives us and keeps its table, so a restarted agent finds it, reads the table, and writes only what differs; one
that just started gets the whole table at once. Where it runs and how it is spoken to is for ``linux/forwarder.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from kernelstate.errors import KernelStateError
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from kernelstate.ports import SyncReport

SHOWN_ERRORS = 20
"""So many refusals of one sync are told one by one; the rest as a number."""


class PeerChange(msgspec.Struct, frozen=True):
    """One line of the table to be set or, with ``gone``, forgotten."""

    gone: bool
    peer: TunnelPeer

    def __str__(self) -> str:
        return f"forget {self.peer.prefix}" if self.gone else f"peer {self.peer}"


class ForwarderPort(Protocol):
    """The process that forwards for one TUN of the current network namespace."""

    def ensure(self, tunnel: UdpTunnel) -> bool:
        """Let exactly one process run, of our program and for this tunnel's link, port and addresses.

        One that runs is kept, or replaced without losing a packet; else one is started. True unless one was kept. Raises
        KernelStateError.
        """

    def peers(self) -> tuple[TunnelPeer, ...]:
        """Return its table, sorted. Raises KernelStateError."""

    def replace(self, peers: Sequence[TunnelPeer]) -> None:
        """Exchange the whole table at once. Raises KernelStateError."""

    def apply(self, changes: Sequence[PeerChange]) -> list[str]:
        """Do each, going on after failures; return the words for each, empty for done. Forgetting what is gone is success."""

    def is_alive(self) -> bool:
        """Whether the process of the last ``ensure`` still runs; microseconds."""

    def stop(self) -> bool:
        """End whichever process runs; whether there was one. Raises KernelStateError."""


class ForwarderReconciler:
    """The forwarder of one network namespace; implements ``ports.Reconciler``. Not safe for several threads at once."""

    part = "forwarder"

    def __init__(self, port: ForwarderPort) -> None:
        self._port = port
        self._desired: UdpTunnel | None = None
        self._running: UdpTunnel | None = None
        """What the process is remembered to run for; its ``peers`` are the table. None: ensure and look."""

    def set_desired(self, tunnel: UdpTunnel | None) -> None:
        """Say what shall be forwarded from now on; nothing is written before ``sync``. None: as it is."""
        self._desired = tunnel

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in place yet."""
        return self._desired is not None and self._running != self._desired

    def drifted(self) -> bool:
        """Whether the process ended since the last look."""
        if self._running is not None and not self._port.is_alive():
            self._running = None
        return self._desired is not None and self._running is None

    def forget(self) -> None:
        """Trust no memory of the table: the next ``sync`` reads it."""
        self._running = None

    def sync(self) -> SyncReport:
        """Let the right process run, and write what differs in its table."""
        self.drifted()
        wanted, running = self._desired, self._running
        if wanted is None or wanted == running:
            return SyncReport(self.part)
        started = False
        try:
            if running is None or _arguments(running) != _arguments(wanted):
                self._running = None
                started = self._port.ensure(wanted)
                running = msgspec.structs.replace(wanted, peers=self._port.peers())
            changes = diff_peers(wanted.peers, running.peers)
            refused = self._write(wanted, running, changes)
        except KernelStateError as error:
            self._running = None
            return SyncReport(self.part, int(started), (str(error),))
        self._running = None if refused else wanted
        return SyncReport(self.part, started + len(changes) - len(refused), _lines(refused))

    def cleanup(self) -> SyncReport:
        """End the process; a later ``sync`` would start it anew."""
        self._running = None
        try:
            return SyncReport(self.part, int(self._port.stop()))
        except KernelStateError as error:
            return SyncReport(self.part, 0, (str(error),))

    def _write(self, wanted: UdpTunnel, running: UdpTunnel, changes: Sequence[PeerChange]) -> list[tuple[PeerChange, str]]:
        if changes and not running.peers:
            self._port.replace(wanted.peers)
            return []
        answers = self._port.apply(changes) if changes else []
        return [(change, words) for change, words in zip(changes, answers, strict=True) if words]


def diff_peers(wanted: Sequence[TunnelPeer], found: Sequence[TunnelPeer]) -> list[PeerChange]:
    """Return what turns one table into the other: what is new or elsewhere first, then what is gone."""
    have: dict[Prefix, TunnelPeer] = {peer.prefix: peer for peer in found}
    made = [PeerChange(gone=False, peer=peer) for peer in wanted if have.pop(peer.prefix, None) != peer]
    return [*made, *(PeerChange(gone=True, peer=peer) for peer in have.values())]


def _arguments(tunnel: UdpTunnel) -> UdpTunnel:
    """Return what a process is started with; the uplink is not its business."""
    return msgspec.structs.replace(tunnel, peers=(), uplink="")


def _lines(refused: Sequence[tuple[PeerChange, str]]) -> tuple[str, ...]:
    told = [f"{change}: {words}" for change, words in refused]
    more = len(told) - SHOWN_ERRORS
    return tuple(told[:SHOWN_ERRORS] + ([f"and {more} more peers"] if more > 0 else []))
