"""Denied packets, as people meet them: counts by pod and direction, and lines in the agent's log that name both pods.

    counts   kernel's sets (netpolicy/render/denied.py) <-- read when somebody asks: `nodeplane status`
    log      NFLOG group --> a thread --> "denied ingress shop/web-1 (10.244.1.10:4242) -> shop/db-1 (10.244.2.11:5432) TCP"

The agent's loop waits for neither. How many lines there are at most is decided in the kernel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import closing

import msgspec

from clusterstate.snapshot import Snapshot
from kernelstate.errors import KernelStateError
from kernelstate.linux.nflog import Logged, PacketLog
from kernelstate.objects.address import Family, address_text
from kernelstate.objects.nftables import TableKey
from netpolicy.render.denied import GROUP, MARKS
from netpolicy.table import DIRECTIONS, Direction

WAIT = 0.5
"""Seconds until a thread that is to stop notices."""
log = logging.getLogger("nodeplane.policy")


class Denied(msgspec.Struct, frozen=True):
    """Packets that would have opened a connection, and were denied."""

    pod: str
    """``namespace/name``, or the address where the pod's name is not known (any more)."""
    direction: str
    packets: int


def read_denied(mode: str, pods: Mapping[str, str]) -> list[Denied]:
    """Return what was denied, the most first; ``pods`` names addresses. Needs root. Raises KernelStateError."""
    families: tuple[Family, ...] = (4, 6)
    counts: dict[tuple[str, str], int] = {}
    for direction in DIRECTIONS:
        for family in families:
            for number, packets in _counts(mode, direction, family).items():
                address = address_text(family, number)
                key = (pods.get(address, address), direction)
                counts[key] = counts.get(key, 0) + packets
    found = [Denied(pod, direction, packets) for (pod, direction), packets in counts.items() if packets]
    return sorted(found, key=lambda one: (-one.packets, one.pod, one.direction))


def _counts(mode: str, direction: Direction, family: Family) -> dict[int, int]:
    if mode == "nftables":
        from kernelstate.linux.nftables import NftablesPort  # noqa: PLC0415  (a second's tenth, and only where there is one)
        from netpolicy.render.nftables import COUNTING, TABLE  # noqa: PLC0415

        with closing(NftablesPort()) as tables:
            elements = tables.counts(TableKey(family, TABLE), COUNTING[direction])
        return {int(key[0]): packets for key, packets in elements.items()}  # type: ignore[arg-type]  # an address is a number
    from kernelstate.linux.ipset import LinuxIpset  # noqa: PLC0415
    from netpolicy.render.iptables import counting_set  # noqa: PLC0415

    port, spec = LinuxIpset(), counting_set(direction, family)
    members = port.counts(spec) if spec.name in port.headers() else {}
    return {int(key[0]): packets for key, packets in members.items()}  # type: ignore[arg-type]


class DeniedLogger:
    """Writes a line for each packet that the kernel hands over. ``learn`` is called by the agent, everything else is its own thread's."""

    def __init__(self) -> None:
        """Listen in the network namespace of this thread. Raises KernelRefusedError."""
        self._packets = PacketLog(GROUP, WAIT)
        self._snapshot: Snapshot | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="denied packets", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def learn(self, snapshot: Snapshot) -> None:
        """Take names from this snapshot from now on."""
        self._snapshot = snapshot

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(2 * WAIT)

    def _run(self) -> None:
        known: Snapshot | None = None
        names: Mapping[str, str] = {}
        with self._packets:
            while not self._stop.is_set():
                try:
                    packets = self._packets.read()
                except (OSError, KernelStateError):
                    log.exception("denied packets are not logged any more")
                    return
                if packets is None:
                    log.warning("denied packets: some were not logged, too many at once")
                    continue
                if packets and self._snapshot is not known and self._snapshot is not None:
                    known, names = self._snapshot, names_of(self._snapshot)
                for packet in packets:
                    log.info("%s", denied_line(packet, names))


def names_of(snapshot: Snapshot) -> dict[str, str]:
    """Return the pods' names by their addresses."""
    return {str(ip): "/".join(name) for name, pod in snapshot.pods.items() if not pod.host_network for ip in pod.ips}


def denied_line(packet: Logged, names: Mapping[str, str]) -> str:
    """Return a denied packet as a line: whose policies denied it, both ends, protocol."""
    direction = next((way for way, mark in MARKS.items() if mark == packet.prefix), packet.prefix)
    ends = [
        _end(address, port, names)
        for address, port in ((packet.source, packet.source_port), (packet.destination, packet.destination_port))
    ]
    return f"denied {direction} {ends[0]} -> {ends[1]} {packet.protocol}"


def _end(address: str, port: int, names: Mapping[str, str]) -> str:
    text = f"[{address}]:{port}" if port and ":" in address else f"{address}:{port}" if port else address
    return f"{names[address]} ({text})" if address in names else text
