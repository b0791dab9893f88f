"""Where a packet goes between nodes, asked of both judges: the oracle by the peer table, the simulator by routes and tunnels."""

from __future__ import annotations

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.simulate_links import Leaving, simulate_links
from nodeplane.pipeline import Desired
from overlay.oracle import Path, path_of
from overlay.table import PeerTable


class Journey(msgspec.Struct, frozen=True):
    """The oracle's path, how the packet leaves by the rendered state, and whether that is the same."""

    path: Path
    leaving: Leaving | None
    agree: bool

    def __str__(self) -> str:
        words = f"{self.path.kind}{' to ' + self.path.peer if self.path.peer else ''}: {self.path.why}"
        if self.leaving is None:
            return words
        if self.leaving.lost:
            return f"{words}; {self.leaving.link} has no {self.leaving.lost} for it"
        return f"{words}; leaves through {self.leaving.link} to {self.leaving.next_hop}"


def journey(desired: Desired, destination: IPAddress) -> Journey | None:
    """Judge one destination; None where the overlay is somebody else's."""
    if desired.peers is None or desired.links is None:
        return None
    path = path_of(desired.peers, destination)
    leaving = simulate_links(desired.links, destination, desired.tunnel.udp if desired.tunnel else None)
    return Journey(path, leaving, _agree(desired.peers, path, leaving, destination))


def _agree(table: PeerTable, path: Path, leaving: Leaving | None, destination: IPAddress) -> bool:
    if path.kind not in {"vxlan", "host-gw", "udp"}:
        # What nobody has may still be led to the TUN, whose reader refuses it.
        return leaving is None or leaving.lost == "peer"
    ways = [w for p in table.peers if p.node == path.peer for w in p.ways if w.family == destination.version]
    outer = [w.public_ip for w in ways if destination in w.pod_cidr]
    return leaving is not None and leaving.next_hop in outer and leaving.tunnel == (path.kind != "host-gw")
